"""The daemon's own metrics, and the HTTP endpoint that serves all of the process's.

`/metrics` is Prometheus' text format, `/healthz` answers while the event loop turns.
"""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Gauge, Histogram, Info, generate_latest

from swarm import errors, tls

LOOP_LAG = Histogram(
    "swarm_event_loop_lag_seconds",
    "How much later than asked the event loop came back",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
CONNECTED = Gauge("swarm_agent_session_connected", "1 while the agent has a session, else 0")
TASKS = Gauge("swarm_agent_tasks", "Tasks that the agent holds")
CERTIFICATE_EXPIRY = Gauge(
    "swarm_node_certificate_expiry_seconds", "Unix time at which the node's certificate runs out"
)
BUILD = Info("swarm_build", "The daemon's version")

_LAG_PERIOD_S = 0.5
CONNECTIONS_MAX = 100  # at a time; Prometheus makes one
CONNECTION_S = 10.0  # a scrape takes some milliseconds; also for who sends or reads slowly


async def watch_lag() -> None:
    """Measures the event loop's lag for as long as it runs."""
    loop = asyncio.get_running_loop()
    while True:
        asked_s = loop.time() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        LOOP_LAG.observe(max(0.0, loop.time() - asked_s))


class Endpoint:
    """The endpoint while it serves. It answers whoever asks, so that it bounds what they cost:
    connections are few and short, and what strangers send is not logged.
    """

    def __init__(self, runner: web.AppRunner, listening: asyncio.Server) -> None:
        self._runner = runner
        self._listening = listening

    async def cleanup(self) -> None:
        """Ends it."""
        self._listening.close()
        await self._runner.cleanup()
        await self._listening.wait_closed()


async def serve(address: str) -> Endpoint:
    """Serves on host:port until cleaned up. Raises Unavailable when the port is taken."""
    host, port = tls.split_address(address, default_port=9323)
    app = web.Application()
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/healthz", _healthz)
    logger = logging.getLogger("swarm.metrics")
    logger.addFilter(_is_ours)
    runner = web.AppRunner(app, access_log=None, logger=logger)
    await runner.setup()
    loop = asyncio.get_running_loop()

    def accept() -> asyncio.Protocol:
        assert runner.server is not None
        handler = runner.server()
        full = len(runner.server.connections) >= CONNECTIONS_MAX
        loop.call_later(0 if full else CONNECTION_S, _end, handler)
        return handler

    try:
        listening = await loop.create_server(accept, host, port)
    except OSError as error:
        await runner.cleanup()
        raise errors.Unavailable(f"cannot serve metrics on {address}: {error.strerror}") from None
    return Endpoint(runner, listening)


def _end(handler: web.RequestHandler) -> None:
    if handler.transport is not None:
        handler.transport.abort()


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether an error is a defect here, not what a peer has sent."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


async def _metrics(_: web.Request) -> web.Response:
    return web.Response(
        body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )


async def _healthz(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")
