"""Streams between a client of this manager and one task's node.

A relay begins as a request over the node's session; the agent then opens a stream of its own and
names the relay in it. Both ways are bounded: a client that reads slowly slows the agent down, by
HTTP/2's flow control. When either side ends, so does the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING

from msgspec import structs

from manager.dispatcher.metrics import RELAYS
from swarm import errors
from swarm.ids import Rng, new_id
from swarm.pipes import Pipe
from swarm.v1 import RelayFrame, RelayRequest

if TYPE_CHECKING:
    from types import TracebackType

FRAMES_MAX = 32  # each way; a frame of logs has some hundred lines
# Of the frames that wait in one direction, or one frame: a call may have some hundred streams.
BYTES_MAX = 512 * 1024
ANSWER_TIMEOUT_S = 10.0

# Sends a request over the node's session. Raises NotFound when it has none here.
Ask = Callable[[str, RelayRequest], None]


def weight(frame: RelayFrame) -> int:
    """Bytes of data that a frame carries."""
    if frame.logs is not None:
        return sum(len(line.data) for line in frame.logs.lines)
    if frame.output is not None:
        return len(frame.output.stdout or b"") + len(frame.output.stderr or b"")
    if frame.input is not None:
        return len(frame.input.stdin or b"")
    part = frame.copy_output or frame.copy_input
    return len(part.data or b"") if part is not None else 0


def pipe() -> Pipe[RelayFrame]:
    """One direction of a stream."""
    return Pipe(FRAMES_MAX, weigh=weight, weight_max=BYTES_MAX)


class Relay:
    """One stream; an async context manager that stands once the agent has answered."""

    def __init__(self, relays: Relays, node_id: str, request: RelayRequest) -> None:
        self.node_id = node_id
        self.request = request
        self._relays = relays
        self._incoming = pipe()
        self._outgoing = pipe()
        self._answered = asyncio.Event()
        self._whole = False  # the agent has sent its last frame
        self._lost = ""

    async def __aenter__(self) -> Relay:
        self._relays.start(self)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._answered.wait()
        except TimeoutError:
            await self._end()
            raise errors.Unavailable(
                f"node {self.node_id} did not open the stream within {ANSWER_TIMEOUT_S:g} s; "
                "its agent is busy or cut off, try again"
            ) from None
        except BaseException:
            await self._end()
            raise
        if self._lost:
            await self._end()
            raise errors.Unavailable(self._lost)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        self._relays.forget(self)
        await self._outgoing.close()
        await self._incoming.close(drop=True)

    async def frames(self) -> AsyncIterator[RelayFrame]:
        """What the agent sends, its last frame (`end` or `error`) included. Raises Unavailable when
        the stream broke before it.
        """
        async for frame in self._incoming:
            yield frame
        if not self._whole:
            raise errors.Unavailable(f"the stream from node {self.node_id} broke off")

    async def send(self, frame: RelayFrame) -> None:
        """Waits for room. Raises Unavailable when the stream has ended."""
        if not await self._outgoing.put(frame):
            raise errors.Unavailable(f"the stream to node {self.node_id} has ended")

    def lose(self, why: str) -> None:
        """The node is gone before it answered."""
        self._lost = why
        self._answered.set()

    async def carry(self, frames: AsyncIterator[RelayFrame]) -> AsyncGenerator[RelayFrame, None]:
        """The agent's side: takes its frames in, gives out what is to be sent to it."""
        self._answered.set()
        taking = asyncio.create_task(self._take(frames))
        try:
            async for frame in self._outgoing:
                yield frame
        finally:
            taking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await taking
            await self._incoming.close()
            await self._outgoing.close(drop=True)

    async def _take(self, frames: AsyncIterator[RelayFrame]) -> None:
        try:
            async for frame in frames:
                self._whole = bool(frame.end) or frame.error is not None
                if not await self._incoming.put(frame) or self._whole:
                    return
        finally:
            await self._incoming.close()
            await self._outgoing.close()


class Relays:
    """The relays of one manager."""

    def __init__(self, ask: Ask, rng: Rng) -> None:
        self._ask = ask
        self._rng = rng
        self._open: dict[str, Relay] = {}

    def open(self, node_id: str, request: RelayRequest) -> Relay:
        """A relay for the request, whose id is filled in; it begins when it is entered."""
        return Relay(self, node_id, structs.replace(request, relay_id=new_id(self._rng)))

    def start(self, relay: Relay) -> None:
        """Asks the node for its stream. Raises NotFound (no session here), Exhausted."""
        self._ask(relay.node_id, relay.request)
        self._open[relay.request.relay_id] = relay
        RELAYS.set(len(self._open))

    def forget(self, relay: Relay) -> None:
        self._open.pop(relay.request.relay_id, None)
        RELAYS.set(len(self._open))

    def nodes(self) -> set[str]:
        """The nodes with streams that a move would end for good; logs and usage are read on."""
        lasting = (r for r in self._open.values() if r.request.logs is None)
        return {relay.node_id for relay in lasting if relay.request.usage is None}

    def claim(self, relay_id: str, node_id: str) -> Relay:
        """The relay that a node's stream is for. Raises NotFound: it was given up, or is another
        node's.
        """
        relay = self._open.get(relay_id)
        if relay is None or relay.node_id != node_id:
            raise errors.NotFound("nobody waits for this stream any more")
        return relay

    def node_lost(self, node_id: str) -> None:
        """The node's session ended: what it was asked for will not come."""
        for relay in self._open.values():
            if relay.node_id == node_id:
                relay.lose(f"node {node_id} lost its session; try again")
