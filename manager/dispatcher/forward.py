"""Streams to tasks of any node: here, or through the manager that holds the node's session.

`Forwarding` is what the API opens streams with. Where the session is elsewhere, it asks that
manager over Managers.Forward, whose answering side is `serve`; a stream is handed on once at most.
Bounded both ways, as relays.py is: who reads slowly slows the node down, through both managers.
When either end ends, so does the other, and errors keep their class.

A stream breaks when the node's session moves or the manager between is gone, both of which the
store's log tells within seconds, however the connection to that manager fares.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, cast

from manager.dispatcher.relays import ANSWER_TIMEOUT_S, Relay, Relays, pipe
from manager.dispatcher.session import Session
from manager.store import Store
from swarm import errors
from swarm.rpc import Channel
from swarm.v1 import (
    ForwardFrame,
    ForwardStart,
    Node,
    NodeState,
    NodeStatus,
    RelayFrame,
    RelayRequest,
)
from swarm.v1.services import ManagersClient

if TYPE_CHECKING:
    from types import TracebackType

CONNECT_TIMEOUT_S = 2.0
# How long a node that is ready may be without a session, as one is that moves.
MOVING_S = 3.0
LOOK_S = 0.05  # while it is
# The other manager waits ANSWER_TIMEOUT_S for the node; its own word on that is the better one.
FORWARD_TIMEOUT_S = ANSWER_TIMEOUT_S + 2.0

Connect = Callable[[str], Awaitable[Channel]]


async def unreachable(address: str) -> Channel:
    """The way to other managers of one that has none."""
    raise errors.Unavailable(f"this manager has no way to the one at {address}")


class Forwarding:
    """Opens streams; implements manager.api's Relays. `run` until cancelled."""

    def __init__(
        self,
        local: Relays,
        store: Store,
        *,
        node_id: str,
        sessions: Mapping[str, Session],
        connect: Connect,
    ) -> None:
        self._local = local
        self._store = store
        self._node_id = node_id
        self._sessions = sessions
        self._connect = connect
        self._links: dict[str, _Link] = {}  # by address
        self._open: set[_Forwarded] = set()

    def open(
        self, node_id: str, request: RelayRequest
    ) -> AbstractAsyncContextManager[Relay | _Forwarded]:
        """A stream for the request, whose id is filled in; it begins when it is entered. Raises
        Unavailable (no session, no answer), Exhausted.
        """
        return self._opened(node_id, request)

    @contextlib.asynccontextmanager
    async def _opened(
        self, node_id: str, request: RelayRequest
    ) -> AsyncIterator[Relay | _Forwarded]:
        async with contextlib.AsyncExitStack() as stack:
            yield await self._enter(stack, node_id, request)

    async def _enter(
        self, stack: contextlib.AsyncExitStack, node_id: str, request: RelayRequest
    ) -> Relay | _Forwarded:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + MOVING_S
        while True:
            manager_id = self._holder(node_id)
            if manager_id == self._node_id:
                return await stack.enter_async_context(self._local.open(node_id, request))
            if manager_id is not None:
                channel = await stack.enter_async_context(self._link(self._addr(manager_id)))
                relay = _Forwarded(channel, node_id, request, manager_id, self._open)
                try:
                    return await stack.enter_async_context(relay)
                except errors.NotFound:  # nobody was asked: the node has moved on meanwhile
                    await stack.aclose()
            if not self._ready(node_id) or loop.time() >= until_s:
                raise errors.Unavailable(
                    f"node {node_id} has no session with any manager; see `swarmctl node ls`"
                )
            await asyncio.sleep(LOOK_S)

    # -------------------------------------------------------------- where the node is

    def _holder(self, node_id: str) -> str | None:
        """The manager that the node's session is with; None: it is not known now."""
        session = self._sessions.get(node_id)
        if session is not None and not session.ended:
            return self._node_id
        manager_id = self._status(node_id).manager_id
        there = manager_id in self._store.engine.present() and self._addr(manager_id)
        return manager_id if there and manager_id != self._node_id else None

    def _status(self, node_id: str) -> NodeStatus:
        node = self._store.get(Node, node_id)
        return (node and node.status) or NodeStatus()

    def _ready(self, node_id: str) -> bool:
        return self._status(node_id).state == NodeState.READY

    def _addr(self, manager_id: str) -> str:
        node = self._store.get(Node, manager_id)
        return node.manager_status.addr if node and node.manager_status else ""

    @contextlib.asynccontextmanager
    async def _link(self, address: str) -> AsyncIterator[Channel]:
        """The one connection to a manager, for as long as somebody uses it."""
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = _Link()
        link.users += 1
        try:
            yield await link.connected(self._connect, address)
        finally:
            link.users -= 1
            if not link.users:
                del self._links[address]
                if link.channel is not None:
                    await link.channel.close()

    # -------------------------------------------------------------- what breaks streams

    async def run(self) -> None:
        """Breaks streams through managers that are gone."""
        engine = self._store.engine
        known = engine.present()
        while True:
            for relay in list(self._open):
                if relay.manager_id not in known:
                    relay.lose(f"manager {relay.manager_id}, which carried the stream, is gone")
            known = await engine.present_changed(known)

    def settle(self, node_id: str) -> None:
        """The node may have moved."""
        if not self._open:
            return
        manager_id = self._status(node_id).manager_id
        for relay in list(self._open):
            if relay.node_id == node_id and relay.manager_id != manager_id:
                relay.lose(f"node {node_id} has moved to another manager; try again")


class _Link:
    """A connection that several streams share."""

    def __init__(self) -> None:
        self.users = 0
        self.channel: Channel | None = None
        self._connecting = asyncio.Lock()

    async def connected(self, connect: Connect, address: str) -> Channel:
        """Raises Unavailable."""
        async with self._connecting:
            if self.channel is None:
                channel = await connect(address)
                try:
                    await channel.ready(timeout_s=CONNECT_TIMEOUT_S, once=True)
                except BaseException:
                    await channel.close()
                    raise
                self.channel = channel
            return self.channel


class _Forwarded:
    """One stream through another manager; an async context manager that stands once the node has
    answered. Raises NotFound when that manager does not hold the node.
    """

    def __init__(
        self,
        channel: Channel,
        node_id: str,
        request: RelayRequest,
        manager_id: str,
        registry: set[_Forwarded],
    ) -> None:
        self.node_id = node_id
        self.manager_id = manager_id
        self._channel = channel
        self._start = ForwardStart(node_id=node_id, request=request)
        self._registry = registry
        self._incoming = pipe()
        self._outgoing = pipe()
        self._settled = asyncio.Event()  # it stands, or it never will
        self._stands = False
        self._whole = False  # the node has sent its last frame
        self._error: errors.SwarmError | None = None
        self._carrying: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _Forwarded:
        self._carrying = asyncio.create_task(self._carry(), name="relay forwarded")
        self._registry.add(self)
        try:
            async with asyncio.timeout(FORWARD_TIMEOUT_S):
                await self._settled.wait()
            if not self._stands:
                raise self._why()
        except TimeoutError:
            await self._end()
            raise errors.Unavailable(
                f"manager {self.manager_id} did not open the stream to node {self.node_id} within "
                f"{FORWARD_TIMEOUT_S:g} s; try again"
            ) from None
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        self._registry.discard(self)
        if self._carrying is not None:
            self._carrying.cancel()
            await asyncio.gather(self._carrying, return_exceptions=True)
        await self._incoming.close(drop=True)

    async def frames(self) -> AsyncIterator[RelayFrame]:
        """What the node sends, its last frame (`end` or `error`) included. Raises what the other
        manager raised, and Unavailable when the stream broke before that frame.
        """
        async for frame in self._incoming:
            yield frame
        if not self._whole:
            raise self._why()

    async def send(self, frame: RelayFrame) -> None:
        """Waits for room. Raises Unavailable when the stream has ended."""
        if not await self._outgoing.put(frame):
            raise errors.Unavailable(f"the stream to node {self.node_id} has ended")

    def lose(self, why: str) -> None:
        """What carries the stream is gone."""
        self._error = self._error or errors.Unavailable(why)
        if self._carrying is not None:
            self._carrying.cancel()

    def _why(self) -> errors.SwarmError:
        if self._error is None:
            return errors.Unavailable(f"the stream from node {self.node_id} broke off")
        return type(self._error)(self._error.message)

    async def _carry(self) -> None:
        """Takes the frames in until the stream ends; what is to be sent goes out meanwhile."""
        try:
            # Channel's streams are generators, whose closing cancels the call.
            stream = cast(
                "AsyncGenerator[RelayFrame]", ManagersClient(self._channel).forward(self._says())
            )
            async with contextlib.aclosing(stream):
                async for frame in stream:
                    if frame.hello is not None:
                        self._stands = True
                        self._settled.set()
                        continue
                    self._whole = bool(frame.end) or frame.error is not None
                    if not await self._incoming.put(frame) or self._whole:
                        return
        except errors.SwarmError as error:
            self._error = self._error or error
        finally:
            self._settled.set()
            await self._incoming.close()
            await self._outgoing.close(drop=True)

    async def _says(self) -> AsyncIterator[ForwardFrame]:
        yield ForwardFrame(start=self._start)
        async for frame in self._outgoing:
            yield ForwardFrame(relay=frame)


async def serve(
    local: Relays, request: AsyncIterator[ForwardFrame]
) -> AsyncGenerator[RelayFrame, None]:
    """The other end: carries the stream of a node whose session is here. Its first frame is
    `hello`, once the node has answered. Raises NotFound when the session is not here: then nobody
    was asked.
    """
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            first = await anext(request, None)
    except TimeoutError:
        first = None
    if first is None or first.start is None or first.start.request is None:
        raise errors.Invalid("a forwarded stream's first frame must be its start")
    async with local.open(first.start.node_id, first.start.request) as relay:
        yield RelayFrame(hello=relay.request.relay_id)
        sending = asyncio.create_task(_send(relay, request), name="relay input")
        try:
            async for frame in relay.frames():
                yield frame
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def _send(relay: Relay, request: AsyncIterator[ForwardFrame]) -> None:
    """Until the other manager has no more to say, or the stream has ended."""
    async for frame in request:
        if frame.relay is not None:
            await relay.send(frame.relay)
