"""The network: calls and streams between agents, clients and managers, and what goes wrong on them.

Stands in for swarm.rpc's Channel and server. A stream is one connection: within it messages are
late, held up while a direction is cut (and sent again when it is healed), or lost together with the
connection. Its end is told to the other side if the way is open; if not, a side notices after
BREAK_S. A connection that a side has given up may still bring what was under way on it. Beyond what
a connection does, `noise` doubles and swaps messages after the welcome: the protocol counts them.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from swarm import errors
from swarm.rpc import Channel, Context, Identity, Method
from swarm.v1 import AgentMessage, Caller, ManagerMessage, decode, encode
from tests.sim.loop import PROC, Proc, SimLoop

LATENCY_S, JITTER_S = 0.001, 0.004
WINDOW = 16  # messages that may be under way in one direction
BREAK_S = 20.0  # a connection on which nothing gets through ends
SAMPLE = 16  # of so many messages one is written and read as on the wire


class _End:
    def __init__(self, error: errors.SwarmError | None) -> None:
        self.error = error


@dataclass(slots=True)
class Noise:
    """Shares of messages, from and to one host."""

    drop: float = 0.0
    double: float = 0.0
    swap: float = 0.0
    late_s: float = 0.0


_QUIET = Noise()


@dataclass(slots=True)
class _Server:
    servicer: Any
    proc: Proc
    host: str
    address: str


class Net:
    """Hosts are names; an address is `host:port`."""

    def __init__(self, loop: SimLoop, rng: random.Random, note: Callable[[str], None]) -> None:
        self.loop = loop
        self.rng = rng
        self.note = note
        self.noise: dict[str, Noise] = {}
        self.cuts: set[tuple[str, str]] = set()  # (from, to)
        self.on_down: Callable[[str, str, Any], None] = lambda *_: None
        self.on_up: Callable[[str, str, Any], None] = lambda *_: None
        self.messages = 0
        self._servers: dict[str, _Server] = {}
        self._streams: dict[_Stream, None] = {}

    # -------------------------------------------------------------- servers

    def serve(self, address: str, servicer: Any, proc: Proc) -> None:
        self._servers[address] = _Server(servicer, proc, address.partition(":")[0], address)

    def unserve(self, address: str, *, silent: bool = False) -> None:
        """Nobody listens any more. `silent`: the machine is gone, and nobody says so."""
        server = self._servers.pop(address, None)
        if server is None:
            return
        for stream in list(self._streams):
            if stream.server is server:
                stream.server_died(silent=silent)

    def client_died(self, proc: Proc, *, silent: bool = False) -> None:
        for stream in list(self._streams):
            if stream.client is proc:
                stream.client_died(silent=silent)

    # -------------------------------------------------------------- faults

    def cut(self, a: str, b: str) -> None:
        """Nothing gets from `a` to `b`."""
        self.cuts.add((a, b))

    def heal(self, a: str, b: str) -> None:
        self.cuts.discard((a, b))
        for stream in list(self._streams):
            for pipe in (stream.up, stream.down):
                if (pipe.src, pipe.dst) == (a, b):
                    pipe.flush()

    def open(self, a: str, b: str) -> bool:
        return (a, b) not in self.cuts

    def both(self, a: str, b: str) -> bool:
        return self.open(a, b) and self.open(b, a)

    def delay_s(self, src: str, dst: str) -> float:
        late_s = self._noise(src).late_s + self._noise(dst).late_s
        return LATENCY_S + self.rng.random() * (JITTER_S + late_s)

    def _noise(self, host: str) -> Noise:
        return self.noise.get(host, _QUIET) if self.noise else _QUIET

    def lot(self, src: str, dst: str) -> str:
        """What becomes of a message: "", drop, double or swap."""
        if not self.noise:
            return ""
        for noise in (self._noise(src), self._noise(dst)):
            if noise is _QUIET:
                continue
            at = self.rng.random()
            for word, share in (
                ("drop", noise.drop), ("double", noise.double), ("swap", noise.swap)
            ):  # fmt: skip
                if at < share:
                    return word
                at -= share
        return ""

    # -------------------------------------------------------------- clients

    def connector(self, host: str, node_id: str) -> Callable[[str], Awaitable[Channel]]:
        """What an agent connects with."""

        async def connect(address: str) -> Channel:
            return cast("Channel", _Channel(self, host, node_id, address))

        return connect

    def answers(self, host: str) -> Callable[[str], Awaitable[bool]]:
        """How one host sees whether something listens at an address."""

        async def answers(address: str) -> bool:
            await asyncio.sleep(0.01)
            server = self._servers.get(address)
            return server is not None and self.both(host, server.host)

        return answers

    def server(self, address: str) -> _Server | None:
        return self._servers.get(address)

    async def ask(
        self, host: str, address: str, call: Callable[[Any], Awaitable[Any]], timeout_s: float
    ) -> Any:
        """One call to what listens at the address, which runs in its process. Raises Unavailable
        also where it may have been done.
        """
        server = self._servers.get(address)
        if server is None or not self.both(host, server.host):
            await asyncio.sleep(1.0)
            raise errors.Unavailable(f"{address} does not answer")
        answer = self.loop.create_future()
        gone = errors.Unavailable(f"{address} does not answer any more")

        def settle(result: Any, error: BaseException | None) -> None:
            if not answer.done():
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(result)

        async def serve() -> None:
            result, error = None, None
            try:
                result = await call(server.servicer)
            except errors.SwarmError as raised:
                error = raised
            except Exception as raised:
                self.loop.on_defect(server.host, raised, "in a call")
                error = errors.Internal(repr(raised))
            self.loop.outside(self.delay_s(server.host, host), settle, result, error)

        await asyncio.sleep(self.delay_s(host, server.host))
        if server.proc.alive:
            server.proc.on_death.append(lambda: settle(None, gone))
            self.loop.spawn(server.proc, serve())
        else:
            raise gone
        self.loop.outside(timeout_s, settle, None, errors.Unavailable(f"{address}: timed out"))
        return await answer


class _Channel:
    """See swarm.rpc.Channel: as much of it as a session uses."""

    def __init__(self, net: Net, host: str, node_id: str, address: str) -> None:
        self.target = address
        self._net, self._host, self._node_id = net, host, node_id

    async def ready(self, *, timeout_s: float, once: bool = False) -> None:
        net, until_s = self._net, self._net.loop.now_s + timeout_s
        there = self.target.partition(":")[0]
        while True:
            await asyncio.sleep(net.delay_s(self._host, there))
            reached = net.both(self._host, there)
            server = net.server(self.target)
            if reached and server is not None:
                if server.proc.life == 0:
                    return
            elif reached and once:
                raise errors.Unavailable(f"{self.target} does not answer: connection refused")
            if net.loop.now_s + 0.5 >= until_s:
                await asyncio.sleep(max(0.0, until_s - net.loop.now_s))
                raise errors.Unavailable(f"{self.target} does not answer within {timeout_s:g} s")
            await asyncio.sleep(0.5)

    def stream_stream(
        self,
        method: Method,
        response: type[Any],
        request: AsyncIterable[Any],
        timeout_s: float | None,
    ) -> AsyncIterator[Any]:
        server = self._net.server(self.target)
        if server is None:
            raise errors.Unavailable(f"{self.target} does not answer: connection refused")
        identity = Identity(Caller.WORKER, node_id=self._node_id, cluster_id="cluster")
        context = Context(identity, f"ipv4:10.0.{int(self._host[1:] or 0)}.9:4711")
        stream = _Stream(self._net, server, self._host, method, context)
        return stream.client_side(request)

    async def close(self) -> None:
        return None

    async def __aenter__(self) -> _Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class _Pipe:
    """One direction of a stream."""

    def __init__(self, net: Net, src: str, dst: str, broken: Callable[[], None]) -> None:
        self.net, self.src, self.dst = net, src, dst
        self._broken = broken
        self._items: deque[Any] = deque()
        self._held: deque[Any] = deque()  # sent while the way was cut
        self._swapped: Any = None
        self._pending = 0
        self._last_s = 0.0
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._lost = False
        self.settled = False  # the welcome was told: noise may begin
        self.closed = False

    async def send(self, message: Any) -> None:
        while self._pending >= WINDOW and not self.closed:
            self._writer = self.net.loop.create_future()
            await self._writer
        self.post(message)

    def post(self, message: Any) -> None:
        self._pending += 1
        net = self.net
        net.messages += 1
        lot = net.lot(self.src, self.dst) if self.settled and not isinstance(message, _End) else ""
        if lot == "swap" and self._swapped is None:
            self._swapped = message
            net.loop.outside(0.5, self._unswap)
            return
        self._transmit(message, lot)
        if self._swapped is not None:
            self._unswap()
        if lot == "double":
            self._pending += 1
            self._transmit(message, "")

    def _unswap(self) -> None:
        message, self._swapped = self._swapped, None
        if message is not None:
            self._transmit(message, "")

    def _transmit(self, message: Any, lot: str) -> None:
        loop = self.net.loop
        self._last_s = max(self._last_s, loop.now_s + self.net.delay_s(self.src, self.dst))
        loop.outside(self._last_s - loop.now_s, self._arrive, message, lot == "drop")

    def _arrive(self, message: Any, lost: bool) -> None:
        if self.closed or self._lost:
            return
        if lost:
            # What was lost is sent again or the connection ends; it ends.
            self._lost = True
            self.net.loop.outside(1 + self.net.rng.random() * 10, self._broken)
        elif self._held or not self.net.open(self.src, self.dst):
            if not self._held:
                self.net.loop.outside(BREAK_S, self._stalled)
            self._held.append(message)
        else:
            self._deliver(message)

    def _stalled(self) -> None:
        if self._held and not self.closed:
            self._broken()

    def flush(self) -> None:
        """The way is open again: what was held up is sent again."""
        if self._held:
            self.net.loop.outside(self.net.rng.random(), self._flush)

    def _flush(self) -> None:
        while self._held and self.net.open(self.src, self.dst) and not self.closed:
            self._deliver(self._held.popleft())

    def _deliver(self, message: Any) -> None:
        self._items.append(message)
        _wake(self._reader)

    async def receive(self) -> Any:
        while not self._items:
            self._reader = self.net.loop.create_future()
            await self._reader
        self._pending -= 1
        _wake(self._writer)
        return self._items.popleft()

    def end(self, error: errors.SwarmError | None) -> None:
        """The reader hears of the end at once, before what was under way."""
        self.closed = True
        self._items.clear()
        self._items.append(_End(error))
        _wake(self._reader)
        _wake(self._writer)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class _Stream:
    """One call: the server's side runs in the server's process."""

    def __init__(
        self, net: Net, server: _Server, host: str, method: Method, context: Context
    ) -> None:
        self.net, self.server, self.host = net, server, host
        self.client = PROC.get()
        self._method = getattr(server.servicer, method.name)
        self._admit = server.servicer.admit
        self._context = context
        self.up = _Pipe(net, host, server.host, self._break)
        self.down = _Pipe(net, server.host, host, self._break)
        self._serving: asyncio.Task[None] | None = None

    async def client_side(self, request: AsyncIterable[Any]) -> AsyncGenerator[Any]:
        net = self.net
        net._streams[self] = None
        self._serving = net.loop.spawn(self.server.proc, self._serve())
        sending = asyncio.create_task(self._send(request))
        try:
            while True:
                message = await self.down.receive()
                if isinstance(message, _End):
                    if message.error is not None:
                        raise message.error
                    return
                net.on_down(self._context.identity.node_id, self.server.host, message)
                yield message
        finally:
            sending.cancel()
            self.client_died()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, request: AsyncIterable[Any]) -> None:
        async for message in request:
            await self.up.send(_written(self.net, AgentMessage, message))
        await self.up.send(_End(None))

    async def _received(self) -> AsyncIterator[Any]:
        node_id, host = self._context.identity.node_id, self.server.host
        while not isinstance(message := await self.up.receive(), _End):
            self.net.on_up(node_id, host, message)
            yield message

    async def _serve(self) -> None:
        error: errors.SwarmError | None = None
        try:
            self._admit(self._context.identity)
            answers = self._method(self._received(), self._context)
            try:
                async for message in answers:
                    await self.down.send(_written(self.net, ManagerMessage, message))
                    if not self.down.settled and message.assignments is not None:
                        self.down.settled = self.up.settled = True
            finally:
                await answers.aclose()
        except errors.SwarmError as raised:
            error = raised
        self.down.post(_End(error))

    # -------------------------------------------------------------- ends

    def _break(self) -> None:
        """Nothing gets through for too long: each side notices."""
        if self in self.net._streams:
            self.net.note(f"stream {self.host}-{self.server.host} breaks")
            self._end_client(f"{self.server.address} does not answer: connection timed out")
            self._end_server()

    def server_died(self, *, silent: bool) -> None:
        text = f"{self.server.address} does not answer: connection reset"
        if silent or not self.net.open(self.server.host, self.host):
            self.net.loop.outside(BREAK_S, self._end_client, text)
        else:
            self.net.loop.outside(
                self.net.delay_s(self.server.host, self.host), self._end_client, text
            )

    def client_died(self, *, silent: bool = False) -> None:
        """What it had sent still arrives, if it can; then the server hears of the end."""
        self.net._streams.pop(self, None)
        self.down.closed = True
        if silent or not self.net.open(self.host, self.server.host):
            self.net.loop.outside(BREAK_S, self._end_server)
        else:
            late_s = 0.05 * self.net.rng.random()
            self.net.loop.outside(self.net.delay_s(self.host, self.server.host) + late_s,
                                  self._end_server)  # fmt: skip

    def _end_client(self, text: str) -> None:
        self.down.end(errors.Unavailable(text))

    def _end_server(self) -> None:
        self.net._streams.pop(self, None)
        self.up.closed = True
        # As gRPC does with the method of a call whose client is gone.
        if self._serving is not None and not self._serving.done():
            self._serving.cancel()


def _written(net: Net, cls: type[Any], message: Any) -> Any:
    if net.messages % SAMPLE:
        return message
    read = decode(cls, encode(message))
    errors.invariant(read == message, f"written and read again it differs: {message}")
    return read
