"""The daemon's own metrics, and the HTTP endpoint that serves all of the process's.

`/metrics` is Prometheus' text format, `/healthz` answers while the event loop turns.
"""

from __future__ import annotations

import asyncio

from aiohttp import web
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


async def watch_lag() -> None:
    """Measures the event loop's lag for as long as it runs."""
    loop = asyncio.get_running_loop()
    while True:
        asked_s = loop.time() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        LOOP_LAG.observe(max(0.0, loop.time() - asked_s))


async def serve(address: str) -> web.AppRunner:
    """Serves on host:port until the runner is cleaned up. Raises Unavailable when the port is
    taken.
    """
    host, port = tls.split_address(address, default_port=9323)
    app = web.Application()
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/healthz", _healthz)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise errors.Unavailable(f"cannot serve metrics on {address}: {error.strerror}") from None
    return runner


async def _metrics(_: web.Request) -> web.Response:
    return web.Response(
        body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )


async def _healthz(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")
