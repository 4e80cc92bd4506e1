"""UDP on published ports, and the relay's UDP side.

A session is one client address on one published port; it sticks to its backend until the backend is
taken from the service, or the session has been silent for `IDLE_S`. The table is bounded: beyond
`SESSIONS_MAX` the session that was silent longest is dropped. Sockets are read here, not by
asyncio's transports, because an answer must leave from the address that the client asked
(IP_PKTINFO), and transports do not tell it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from agent.proxy import metrics
from agent.proxy.balance import Balancer, Slot
from agent.proxy.dial import Cluster
from agent.proxy.preamble import (
    Datagram,
    Kind,
    Sequence64,
    decode_datagram,
    encode_datagram,
)
from swarm import errors

log = structlog.get_logger("proxy")

# Longer than twice the window in which a datagram is good (preamble.WINDOW_NS), so that the replay
# of an ended session's datagram is always too old.
IDLE_S = 130.0
SESSIONS_MAX = 8_192
DATAGRAM_BYTES_MAX = 65_535
BURST = 64  # datagrams read before others get their turn
BUFFER_BYTES = 4 << 20
_PKTINFO = struct.Struct("=I4s4s")
_PKTINFO6 = struct.Struct("=16sI")
IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)

# What the kernel says of earlier datagrams: nobody listens there, or the task's address is gone.
_NOBODY = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH)

Address = tuple[Any, ...]
Sender = Callable[[bytes], None]


class Port:
    """A bound UDP socket that tells which of its addresses was asked."""

    def __init__(
        self, sock: socket.socket, on_data: Callable[[bytes, Address, bytes], None]
    ) -> None:
        self._sock = sock
        self._on_data = on_data
        self._six = sock.family == socket.AF_INET6
        if self._six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        asyncio.get_running_loop().add_reader(sock.fileno(), self._read)

    def _read(self) -> None:
        for _ in range(BURST):
            try:
                data, ancillary, _, peer = self._sock.recvmsg(DATAGRAM_BYTES_MAX, 64)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an answer to an earlier send that could not be delivered
                continue
            self._on_data(data, peer, self._asked(ancillary))

    def _asked(self, ancillary: list[tuple[int, int, bytes]]) -> bytes:
        """The local address, as it must be given back to send from it."""
        for level, kind, data in ancillary:
            if self._six and (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
                return data[:16]
            if not self._six and (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
                return _PKTINFO.unpack_from(data)[1]  # type: ignore[no-any-return]  # bytes by format
        return b""

    def send(self, data: bytes, peer: Address, source: bytes = b"") -> None:
        """Sends, or drops when the socket's buffer is full, as a network does."""
        ancillary = []
        if source and self._six:
            info = _PKTINFO6.pack(source, 0)
            ancillary = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)]
        elif source:
            ancillary = [(socket.IPPROTO_IP, IP_PKTINFO, _PKTINFO.pack(0, source, b"\0" * 4))]
        with contextlib.suppress(OSError):
            self._sock.sendmsg([data], ancillary, 0, peer)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()


class Upstream:
    """A socket connected to one local task, for one session."""

    def __init__(
        self, target: tuple[str, int], on_data: Sender, on_refused: Callable[[], None]
    ) -> None:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._on_data = on_data
        self._on_refused = on_refused
        try:
            self._sock.connect(target)
        except OSError:
            self._sock.close()
            raise
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._read)

    def _read(self) -> None:
        for _ in range(BURST):
            try:
                data = self._sock.recv(DATAGRAM_BYTES_MAX)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _NOBODY:
                    self._on_refused()
                return
            self._on_data(data)

    def send(self, data: bytes) -> None:
        try:
            self._sock.send(data)
        except OSError as error:  # else dropped, as a network does
            if error.errno in _NOBODY:
                self._on_refused()

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()


@dataclass(slots=True)
class Session:
    """One client's way to one backend."""

    send: Sender
    close: Callable[[], None]
    used_s: float
    # Whether the backend is still there. A client that is never silent would else keep to one that
    # is gone for ever.
    good: Callable[[], bool]


@dataclass(slots=True)
class Sessions:
    """All sessions of a proxy, the one silent longest first."""

    cluster: Cluster
    _table: OrderedDict[Any, Session] = field(default_factory=OrderedDict)

    def get(self, key: Any) -> Session | None:
        """A session that can be used."""
        session = self._table.get(key)
        if session is not None and not session.good():
            self.drop(key)
            return None
        if session is not None:
            session.used_s = self.cluster.clock.monotonic_s()
            self._table.move_to_end(key)
        return session

    def add(self, key: Any, session: Session) -> None:
        while len(self._table) >= SESSIONS_MAX:
            metrics.CONNECTIONS.labels("udp", "evicted").inc()
            self.drop(next(iter(self._table)))
        self._table[key] = session
        metrics.OPEN.labels("udp").inc()

    def drop(self, key: Any) -> None:
        """Ends a session; nothing happens if it is gone."""
        session = self._table.pop(key, None)
        if session is not None:
            metrics.OPEN.labels("udp").dec()
            session.close()

    def sweep(self) -> None:
        """Ends those that have been silent for too long."""
        limit_s = self.cluster.clock.monotonic_s() - IDLE_S
        while self._table:
            key, session = next(iter(self._table.items()))
            if session.used_s > limit_s:
                return
            self.drop(key)

    def close(self) -> None:
        for key in tuple(self._table):
            self.drop(key)

    def __len__(self) -> int:
        return len(self._table)


class Listener:
    """A published UDP port on one address."""

    def __init__(
        self,
        sock: socket.socket,
        sessions: Sessions,
        balancer: Balancer,
        port: int,
        relay: Relay,
    ) -> None:
        self._sessions = sessions
        self._balancer = balancer
        self._target_port = port
        self._relay = relay
        self._port = Port(sock, self._received)

    def _received(self, data: bytes, peer: Address, asked: bytes) -> None:
        cluster = self._sessions.cluster
        key = (id(self), peer, asked)
        session = self._sessions.get(key)
        if session is None:
            session = self._begin(key, peer, asked)
            if session is None:
                metrics.CONNECTIONS.labels("udp", "no_backend").inc()
                return
        cluster.traffic.received += len(data)
        session.send(data)

    def _begin(self, key: Any, peer: Address, asked: bytes) -> Session | None:
        cluster, balancer = self._sessions.cluster, self._balancer

        def answer(data: bytes) -> None:
            if self._sessions.get(key) is not None:
                cluster.traffic.sent += len(data)
                self._port.send(data, peer, asked)

        for slot in balancer.order(cluster.clock.monotonic_s()):

            def refused(slot: Slot = slot) -> None:
                balancer.failed(slot, cluster.clock.monotonic_s())
                self._sessions.drop(key)

            way = self._way(slot, answer, refused)
            if way is None:
                continue
            send, close = way
            balancer.chosen(slot)

            def end(slot: Slot = slot, close: Callable[[], None] = close) -> None:
                balancer.closed(slot)
                close()

            def good(slot: Slot = slot) -> bool:
                return balancer.has(slot)

            session = Session(send, end, cluster.clock.monotonic_s(), good)
            self._sessions.add(key, session)
            metrics.CONNECTIONS.labels("udp", "ok").inc()
            return session
        return None

    def _way(
        self, slot: Slot, answer: Sender, refused: Callable[[], None]
    ) -> tuple[Sender, Callable[[], None]] | None:
        cluster, backend = self._sessions.cluster, slot.backend
        local = cluster.local(backend.task_id, self._target_port)
        if local is not None:
            try:
                upstream = Upstream(local, answer, refused)
            except OSError:
                return None
            return upstream.send, upstream.close
        relay = (backend.relay_addr, backend.relay_port)
        return self._relay.open(backend.task_id, self._target_port, relay, answer, refused)

    def close(self) -> None:
        """Takes nothing new; sessions end when they fall silent, but get no answers any more."""
        self._port.close()


@dataclass(slots=True)
class _Outgoing:
    """A session of ours through another node's relay."""

    peer: Address
    answer: Sender
    gone: Callable[[], None]
    seen: Sequence64
    sent: int = 0


class Relay:
    """The relay's UDP socket: our sessions to tasks elsewhere, others' sessions to tasks here."""

    def __init__(self, sock: socket.socket, sessions: Sessions, token: Callable[[], bytes]) -> None:
        self._sessions = sessions
        self._token = token
        self._outgoing: dict[bytes, _Outgoing] = {}
        self._incoming: dict[bytes, Sequence64] = {}
        self._addresses: dict[tuple[str, int], Address] = {}
        self._port = Port(sock, self._received)
        self._family = sock.family

    async def resolve(self, host: str, port: int) -> None:
        """Looks a relay's address up, so that `open` need not wait."""
        if (host, port) in self._addresses:
            return
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, family=self._family, type=socket.SOCK_DGRAM)
        except OSError as error:
            log.warning("relay_not_found", address=f"{host}:{port}", reason=str(error))
            return
        self._addresses[host, port] = found[0][4]

    def open(
        self,
        task_id: str,
        port: int,
        relay: tuple[str, int],
        answer: Sender,
        gone: Callable[[], None],
    ) -> tuple[Sender, Callable[[], None]] | None:
        """A way to a task on another node: how to send, and how to end it. None: there is none."""
        cluster = self._sessions.cluster
        address = self._addresses.get(relay)
        if address is None or not cluster.keys:
            return None
        token = self._token()
        outgoing = self._outgoing[token] = _Outgoing(address, answer, gone, Sequence64())

        def send(data: bytes) -> None:
            outgoing.sent += 1
            datagram = Datagram(Kind.TO_TASK, task_id, port, token, outgoing.sent, data)
            self._send(datagram, address)

        def close() -> None:
            self._outgoing.pop(token, None)

        return send, close

    def _send(self, datagram: Datagram, peer: Address, source: bytes = b"") -> None:
        cluster = self._sessions.cluster
        if cluster.keys:
            data = encode_datagram(cluster.keys[0], datagram, cluster.clock.now_ns())
            self._port.send(data, peer, source)

    def _received(self, data: bytes, peer: Address, asked: bytes) -> None:
        cluster = self._sessions.cluster
        try:
            datagram = decode_datagram(cluster.keys, data, cluster.clock.now_ns())
        except errors.Denied:
            metrics.REFUSED.labels("denied").inc()
            return
        if datagram.kind is Kind.TO_TASK:
            self._to_task(datagram, peer, asked)
            return
        outgoing = self._outgoing.get(datagram.session)
        if outgoing is None or not outgoing.seen.accept(datagram.sequence):
            return
        if datagram.kind is Kind.GONE:
            outgoing.gone()
        else:
            outgoing.answer(datagram.data)

    def _to_task(self, datagram: Datagram, peer: Address, asked: bytes) -> None:
        token = datagram.session
        key = ("relay", token)
        session = self._sessions.get(key)
        if session is None:
            session = self._begin(datagram, key, peer, asked)
            if session is None:
                return
        if self._incoming[token].accept(datagram.sequence):
            session.send(datagram.data)

    def _begin(self, first: Datagram, key: Any, peer: Address, asked: bytes) -> Session | None:
        cluster, token = self._sessions.cluster, first.session
        # The other side may know this session from before: from before its task left, or before
        # our restart. Numbers that began at 1 again would be taken for replays.
        sent = cluster.clock.now_ns()

        def back(kind: Kind, data: bytes) -> None:
            nonlocal sent
            sent += 1
            self._send(Datagram(kind, first.task_id, first.port, token, sent, data), peer, asked)

        def answer(data: bytes) -> None:
            if self._sessions.get(key) is not None:
                back(Kind.FROM_TASK, data)

        def refused() -> None:
            back(Kind.GONE, b"")
            self._sessions.drop(key)

        target = cluster.local(first.task_id, first.port)
        try:
            upstream = None if target is None else Upstream(target, answer, refused)
        except OSError:
            upstream = None
        if upstream is None:
            metrics.REFUSED.labels("unknown").inc()
            back(Kind.GONE, b"")
            return None

        def end() -> None:
            self._incoming.pop(token, None)
            upstream.close()

        self._incoming[token] = Sequence64()

        def good() -> bool:
            return cluster.local(first.task_id, first.port) == target

        session = Session(upstream.send, end, cluster.clock.monotonic_s(), good)
        self._sessions.add(key, session)
        metrics.CONNECTIONS.labels("relay", "ok").inc()
        return session

    def close(self) -> None:
        self._port.close()
