"""Two TCP connections joined into one: what comes in on one side goes out on the other.

Each side is an asyncio protocol. A side whose peer cannot take more stops reading (bounded memory:
at most `HIGH_BYTES` and one chunk wait per direction). The end of one direction is passed on
without ending the other; when both have ended, or one side breaks, what still waits is written and
both are closed. No byte that was received is dropped while its receiver lives.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

from agent.proxy.metrics import Traffic

HIGH_BYTES = 256 * 1024
_LINGER_NONE = struct.pack("ii", 1, 0)


class Side(asyncio.Protocol):
    """One end. Until it is linked it holds back what it receives."""

    def __init__(
        self, traffic: Traffic, *, client: bool, made: Callable[[Side], None] | None = None
    ) -> None:
        self._traffic = traffic
        self._client = client  # the side of whoever opened the connection
        self._made = made
        self._peer: Side | None = None
        self._early = bytearray()
        self._ended = False  # nothing more will be received
        self._lost = False
        self.chunks = 0  # that were received since it was linked
        self.spoke_last = False  # of the two sides
        self._on_lost: Callable[[], None] | None = None
        self._received: Callable[[], None] | None = None
        self.transport: asyncio.Transport

    # -------------------------------------------------------------- before it is linked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            # A peer that vanished without a word is found out in the end.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._made is not None:
            self._made(self)

    async def receive(
        self, size: int, *, more: Callable[[bytes], int | None] | None = None
    ) -> bytes:
        """Takes the first bytes itself, before `link`: `size` of them, or as many as `more` says
        once it can tell. Raises ConnectionError when the peer ends first.
        """
        arrived = asyncio.Event()
        self._received = arrived.set
        if not self._lost:
            self.transport.resume_reading()  # it may be held
        try:
            while True:
                needed = more(bytes(self._early)) if more is not None else size
                if needed is not None and len(self._early) >= needed:
                    data = bytes(self._early[:needed])
                    del self._early[:needed]
                    return data
                if self._ended or self._lost:
                    raise ConnectionResetError("the peer ended before it said what it wants")
                arrived.clear()
                await arrived.wait()
        finally:
            self._received = None

    def hold(self) -> None:
        """Stops reading until it is linked."""
        if not self._lost:
            self.transport.pause_reading()

    def reset(self) -> None:
        """Breaks the connection: the peer sees a reset, as from a port where nobody listens."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None and not self._lost:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
        self.transport.abort()

    # -------------------------------------------------------------- linked

    def link(self, other: Side, on_closed: Callable[[], None]) -> None:
        """Joins two sides; `on_closed` is called once, when both are gone."""

        def one_lost() -> None:
            if self._lost and other._lost:
                on_closed()

        self._peer, other._peer = other, self
        self._on_lost = other._on_lost = one_lost
        for side in (self, other):
            side._begin()
        if self._lost and other._lost:
            on_closed()

    def _begin(self) -> None:
        peer = self._peer
        assert peer is not None
        if self._early:
            data, self._early = bytes(self._early), bytearray()
            self.data_received(data)
        if self._lost:
            peer.transport.close()
        elif self._ended:
            self._pass_end(peer)
        else:
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        peer = self._peer
        if peer is None:
            self._early += data
            if self._received is not None:
                self._received()
            else:
                self.hold()
            return
        self.chunks += 1
        self.spoke_last, peer.spoke_last = True, False
        if self._client:
            self._traffic.received += len(data)
        else:
            self._traffic.sent += len(data)
        peer.transport.write(data)

    def eof_received(self) -> bool:
        self._ended = True
        if self._peer is not None:
            self._pass_end(self._peer)
        elif self._received is not None:
            self._received()
        return True  # the other direction goes on

    def _pass_end(self, peer: Side) -> None:
        if peer._ended:
            self.transport.close()
            peer.transport.close()
        elif not peer.transport.is_closing():
            peer.transport.write_eof()

    def pause_writing(self) -> None:
        if self._peer is not None and not self._peer._lost:
            self._peer.transport.pause_reading()

    def resume_writing(self) -> None:
        peer = self._peer
        if peer is not None and not peer._lost and not peer._ended:
            peer.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        if self._received is not None:
            self._received()
        if self._peer is not None:
            # Writes what waits, then closes; also after an error of ours the peer gets all we had.
            self._peer.transport.close()
        if self._on_lost is not None:
            self._on_lost()
