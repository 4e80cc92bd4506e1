"""Connections between agents and managers within one event loop, for tests in virtual time.

Stands in for gRPC (swarm.rpc.Channel) where what matters is when messages come or do not: a manager
may be killed (its connections are reset, new ones refused), or vanish (nothing comes back any more,
and nothing says so).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, cast

from swarm import errors
from swarm.rpc import Channel, Context, Identity, Method
from swarm.v1 import Caller


class Wire:
    """Who is reached at which address."""

    def __init__(self) -> None:
        self._servers: dict[str, _Server] = {}
        self.connects: list[tuple[str, str]] = []  # node, address

    def serve(self, address: str, servicer: object) -> None:
        self._servers[address] = _Server(servicer)

    def kill(self, address: str) -> None:
        """Its connections are reset, new ones refused."""
        server = self._servers.pop(address)
        for stream in list(server.streams):
            stream.reset(errors.Unavailable(f"{address} does not answer: connection reset"))

    def drop(self, address: str, node_id: str) -> None:
        """One node's connections to it are reset."""
        for stream in list(self._servers[address].streams):
            if stream.node_id == node_id:
                stream.reset(errors.Unavailable(f"{address} does not answer: connection reset"))

    def addresses(self) -> set[str]:
        """Where somebody answers."""
        return set(self._servers)

    def vanish(self, address: str) -> None:
        """Nothing comes back from there any more."""
        self._servers[address].gone = True

    def connector(self, node_id: str) -> Callable[[str], Awaitable[Channel]]:
        """What an agent, or a manager, connects with."""

        async def connect(address: str) -> Channel:
            self.connects.append((node_id, address))
            return cast("Channel", _Channel(self, address, node_id))

        return connect

    def server(self, address: str) -> _Server | None:
        return self._servers.get(address)

    async def close(self) -> None:
        for address in list(self._servers):
            self.kill(address)
        await asyncio.sleep(0)


class _Server:
    def __init__(self, servicer: object) -> None:
        self.servicer = servicer
        self.gone = False
        self.streams: set[_Stream] = set()


class _Channel:
    def __init__(self, wire: Wire, address: str, node_id: str) -> None:
        self.target = address
        self._wire = wire
        self._node_id = node_id

    def _reach(self) -> _Server:
        server = self._wire.server(self.target)
        if server is None:
            raise errors.Unavailable(f"{self.target} does not answer: connection refused")
        return server

    async def ready(self, *, timeout_s: float, once: bool = False) -> None:
        await asyncio.sleep(0.001)
        server = self._reach() if once else self._wire.server(self.target)
        if server is None or server.gone:
            await asyncio.sleep(timeout_s)
            raise errors.Unavailable(f"{self.target} does not answer within {timeout_s:g} s")

    def stream_stream(
        self,
        method: Method,
        response: type[Any],
        request: AsyncIterable[Any],
        timeout_s: float | None,
    ) -> AsyncIterator[Any]:
        server = self._reach()
        identity = Identity(Caller.WORKER, node_id=self._node_id, cluster_id="cluster")
        context = Context(identity, "ipv4:10.0.0.9:4711")
        return _Stream(server, getattr(server.servicer, method.name), request, context).answers()

    async def close(self) -> None:
        return None

    async def __aenter__(self) -> _Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Stream:
    """One call: the server's side runs in a task of its own, as it would elsewhere."""

    def __init__(
        self,
        server: _Server,
        method: Callable[..., AsyncGenerator[Any, None]],
        request: AsyncIterable[Any],
        context: Context,
    ) -> None:
        self._server = server
        self._method = method
        self._request = request
        self._context = context
        self.node_id = context.identity.node_id
        self._up: asyncio.Queue[Any] = asyncio.Queue(16)
        self._down: asyncio.Queue[Any] = asyncio.Queue(16)

    async def answers(self) -> AsyncIterator[Any]:
        self._server.streams.add(self)
        self._serving = asyncio.create_task(self._serve())
        sending = asyncio.create_task(self._send())
        try:
            while True:
                message = await self._down.get()
                if self._server.gone:
                    await asyncio.get_running_loop().create_future()
                if isinstance(message, _End):
                    if message.error is not None:
                        raise message.error
                    return
                yield message
        finally:
            sending.cancel()
            self._server.streams.discard(self)
            if not self._server.gone:
                self._serving.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    def reset(self, error: errors.SwarmError) -> None:
        self._serving.cancel()
        while not self._down.empty():
            self._down.get_nowait()
        self._down.put_nowait(_End(error))

    async def _send(self) -> None:
        async for message in self._request:
            if not self._server.gone:
                await self._up.put(message)
        await self._up.put(_End(None))

    async def _received(self) -> AsyncIterator[Any]:
        while not isinstance(message := await self._up.get(), _End):
            yield message

    async def _serve(self) -> None:
        error: BaseException | None = None
        try:
            async with contextlib.aclosing(
                self._method(self._received(), self._context)
            ) as messages:
                async for message in messages:
                    await self._down.put(message)
        except errors.SwarmError as raised:
            error = raised
        await self._down.put(_End(error))
