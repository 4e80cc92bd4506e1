"""TCP on one published port, and the relay's TCP side."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from agent.proxy import metrics, preamble
from agent.proxy.balance import Balancer
from agent.proxy.dial import CONNECT_TIMEOUT_S, Cluster, dial, hang_up, visit
from agent.proxy.listen import BACKLOG
from agent.proxy.preamble import Guard, Status
from agent.proxy.splice import Side
from swarm import errors

log = structlog.get_logger("proxy")

# Of one proxy; each takes two descriptors. Beyond it clients are turned away at once.
CONNECTIONS_MAX = 16_384
PREAMBLE_TIMEOUT_S = 5.0
REFUSED_LOG_PERIOD_S = 10.0


class Connections:
    """All of a proxy's TCP connections: their number, and the tasks that set them up."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.open = 0
        self._opening: set[asyncio.Task[None]] = set()
        self._sides: set[Side] = set()

    def take(self, side: Side, serve: Callable[[Side], Coroutine[Any, Any, None]]) -> None:
        """Begins to serve a connection that was accepted."""
        if self.open >= CONNECTIONS_MAX:
            metrics.CONNECTIONS.labels("tcp", "turned_away").inc()
            side.reset()
            return
        self.open += 1
        metrics.OPEN.labels("tcp").inc()
        task = asyncio.create_task(self._serve(side, serve))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _serve(self, side: Side, serve: Callable[[Side], Coroutine[Any, Any, None]]) -> None:
        self._sides.add(side)
        try:
            await serve(side)
        except BaseException:
            side.transport.abort()
            self.over(side)
            raise

    def over(self, side: Side) -> None:
        """A connection that was taken is gone."""
        if side in self._sides:
            self._sides.discard(side)
            self.open -= 1
            metrics.OPEN.labels("tcp").dec()

    async def close(self) -> None:
        """Ends all."""
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for side in tuple(self._sides):
            side.transport.abort()
            self.over(side)


async def listen(
    sock: socket.socket, connections: Connections, balancer: Balancer, port: int
) -> asyncio.Server:
    """Serves a published port on a listening socket: `port` is the target port."""

    async def serve(client: Side) -> None:
        client.hold()
        try:
            way = await dial(connections.cluster, balancer, port)
        except errors.Unavailable as error:
            metrics.CONNECTIONS.labels("tcp", "no_backend").inc()
            log.debug("no_backend", port=port, reason=error.message)
            client.reset()
            connections.over(client)
            return

        def closed() -> None:
            hang_up(connections.cluster, balancer, way)
            connections.over(client)

        metrics.CONNECTIONS.labels("tcp", "ok").inc()
        if way.guest is not None:
            way.guest.opened(client, way.side)
        client.link(way.side, closed)

    return await _serve_socket(sock, connections, serve)


async def listen_relay(sock: socket.socket, connections: Connections) -> asyncio.Server:
    """Serves the relay: connections of other nodes to tasks here."""
    cluster, guard = connections.cluster, Guard()
    quiet_until_s = 0.0

    def refuse(client: Side, status: Status, reason: str) -> None:
        nonlocal quiet_until_s
        metrics.REFUSED.labels(status.name.lower()).inc()
        now_s = cluster.clock.monotonic_s()
        # A task that has ended or does not listen yet is everyday life; a wrong key is not.
        if status is not Status.DENIED:
            log.debug("relay_not_connected", reason=reason)
        elif now_s >= quiet_until_s:
            quiet_until_s = now_s + REFUSED_LOG_PERIOD_S
            peer = client.transport.get_extra_info("peername")
            log.warning("relay_refused", peer=str(peer), reason=reason)
        if not client.transport.is_closing():
            client.transport.write(bytes((status,)))
        client.transport.close()
        connections.over(client)

    async def serve(client: Side) -> None:
        try:
            async with asyncio.timeout(PREAMBLE_TIMEOUT_S):
                data = await client.receive(0, more=preamble.length)
            hello = guard.check(cluster.keys, data, cluster.clock.now_ns())
        except (OSError, TimeoutError, errors.Denied) as error:
            refuse(client, Status.DENIED, str(error) or "no preamble came")
            return
        client.hold()
        target = cluster.local(hello.task_id, hello.port)
        if target is None or hello.protocol != preamble.TCP:
            refuse(client, Status.UNKNOWN, f"task {hello.task_id} is not on this node")
            return
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                backend, guest = await visit(cluster, hello.task_id, target)
        except (OSError, TimeoutError) as error:
            refuse(client, Status.REFUSED, f"task {hello.task_id}: {error or 'no answer'}")
            return
        metrics.CONNECTIONS.labels("relay", "ok").inc()
        client.transport.write(bytes((Status.OPEN,)))
        guest.opened(client, backend)

        def closed() -> None:
            cluster.guests.leave(guest)
            connections.over(client)

        client.link(backend, closed)

    return await _serve_socket(sock, connections, serve)


async def _serve_socket(
    sock: socket.socket,
    connections: Connections,
    serve: Callable[[Side], Coroutine[Any, Any, None]],
) -> asyncio.Server:
    def accept() -> Side:
        return Side(
            connections.cluster.traffic,
            client=True,
            made=lambda side: connections.take(side, serve),
        )

    return await asyncio.get_running_loop().create_server(accept, sock=sock, backlog=BACKLOG)
