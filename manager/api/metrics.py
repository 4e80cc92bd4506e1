"""The API's metrics: calls by method and how they ended, and how long they took."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import Counter, Gauge, Histogram

from swarm import errors
from swarm.clock import Clock

REQUESTS = Counter(
    "swarm_api_requests_total",
    "Calls of the control API, by method and by class of result",
    ["method", "result"],
)
SECONDS = Histogram(
    "swarm_api_request_seconds",
    "How long unary calls of the control API took",
    ["method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
STREAMS = Gauge("swarm_api_streams", "Open streams of the control API", ["method"])

# The closed set of results: what the caller is told, and a call that the caller ended.
OK = "ok"
CANCELLED = "cancelled"


@asynccontextmanager
async def measured(clock: Clock, method: str, *, stream: bool = False) -> AsyncIterator[None]:
    """Counts one call, whichever way it ends."""
    begun_s = clock.monotonic_s()
    result = OK
    if stream:
        STREAMS.labels(method).inc()
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        result = CANCELLED
        raise
    except errors.SwarmError as error:
        result = errors.mapping(error).grpc.lower()
        raise
    except Exception:
        result = "internal"
        raise
    finally:
        REQUESTS.labels(method, result).inc()
        if stream:
            STREAMS.labels(method).dec()
        else:
            SECONDS.labels(method).observe(clock.monotonic_s() - begun_s)
