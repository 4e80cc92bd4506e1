"""What a node says to another node's relay before bytes flow: who may reach which task's port.

    "SWR1" | protocol 1 | port 2 | time ns 8 | nonce 16 | length 1 | task id | HMAC-SHA256 32

The MAC is over all before it, with the cluster's relay key, so only members of the cluster can open
a connection. A preamble that is old, or whose nonce was seen, is refused, so one that was overheard
opens nothing. The bytes that follow are not protected: encryption between nodes is the network's
business (as with Swarm's ingress). Integers are big-endian. The answer is one status byte.

Datagrams carry the same in each one:

    "SWU1" | kind 1 | port 2 | time ns 8 | session 16 | sequence 8
    | length 1 | task id | data | MAC 16

where replays are found per session by sequence number, as in IPsec (RFC 4303, section 3.4.3).
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from swarm import errors

TCP, UDP = 6, 17  # IANA's numbers
# How far the clocks of two nodes may differ, with the time on the way.
WINDOW_NS = 60 * 1_000_000_000
NONCES_MAX = 200_000  # of each of two generations; about 60 MB when full

_HEAD = struct.Struct(">4sBHQ16sB")
_MAC_BYTES = 32
_MAGIC = b"SWR1"
LENGTH_MAX = _HEAD.size + 255 + _MAC_BYTES

_DATAGRAM = struct.Struct(">4sBHQ16sQB")
_DATAGRAM_MAC_BYTES = 16
_DATAGRAM_MAGIC = b"SWU1"


class Status(IntEnum):
    """The relay's answer."""

    OPEN = 0
    REFUSED = 1  # the task does not accept the connection
    UNKNOWN = 2  # no such task here
    DENIED = 3  # wrong key, old, or seen before
    BUSY = 4


class Kind(IntEnum):
    """What a datagram between nodes is."""

    TO_TASK = 0
    FROM_TASK = 1
    GONE = 2  # the task is not here; no data


@dataclass(frozen=True, slots=True)
class Hello:
    """A preamble that was proven."""

    protocol: int
    task_id: str
    port: int


@dataclass(frozen=True, slots=True)
class Datagram:
    """A datagram that was proven; `session` and `sequence` are still to be judged for replay."""

    kind: Kind
    task_id: str
    port: int
    session: bytes
    sequence: int
    data: bytes


def encode(
    key: bytes, *, protocol: int, task_id: str, port: int, now_ns: int, nonce: bytes
) -> bytes:
    """The preamble of one connection."""
    name = task_id.encode()
    body = _HEAD.pack(_MAGIC, protocol, port, now_ns, nonce, len(name)) + name
    return body + hmac.digest(key, body, hashlib.sha256)


def length(start: bytes) -> int | None:
    """How long the preamble is that begins so; None: not told yet. Raises Denied for anything that
    is no preamble.
    """
    if start[:4] != _MAGIC[: len(start)]:
        raise errors.Denied("not a preamble of this protocol version")
    if len(start) < _HEAD.size:
        return None
    return _HEAD.size + start[_HEAD.size - 1] + _MAC_BYTES


class Guard:
    """Checks preambles for one relay: key, time, and nonce.

    Nonces are kept in two generations of one window each. When a generation is full it is closed
    early: the oldest nonces are then forgotten before their time, which lets an overheard preamble
    of the last minute be used again, rather than refuse connections.
    """

    def __init__(self) -> None:
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()
        self._turned_ns = 0

    def check(self, keys: Sequence[bytes], data: bytes, now_ns: int) -> Hello:
        """Raises Denied."""
        body, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
        if not any(hmac.compare_digest(hmac.digest(k, body, hashlib.sha256), mac) for k in keys):
            raise errors.Denied("the preamble was made with another key")
        _, protocol, port, time_ns, nonce, size = _HEAD.unpack_from(body)
        if abs(now_ns - time_ns) > WINDOW_NS:
            raise errors.Denied(
                f"the preamble is {abs(now_ns - time_ns) / 1e9:.0f} s off; set the nodes' clocks"
            )
        self._turn(now_ns)
        if nonce in self._young or nonce in self._old:
            raise errors.Denied("the preamble was used before")
        self._young.add(nonce)
        name = body[_HEAD.size : _HEAD.size + size]
        return Hello(protocol=protocol, task_id=name.decode("ascii", "replace"), port=port)

    def _turn(self, now_ns: int) -> None:
        # A preamble is good from a window before to a window after its time.
        if now_ns - self._turned_ns > 2 * WINDOW_NS or len(self._young) >= NONCES_MAX:
            self._old, self._young, self._turned_ns = self._young, set(), now_ns


def encode_datagram(key: bytes, datagram: Datagram, now_ns: int) -> bytes:
    name = datagram.task_id.encode()
    body = b"".join(
        (
            _DATAGRAM.pack(
                _DATAGRAM_MAGIC,
                datagram.kind,
                datagram.port,
                now_ns,
                datagram.session,
                datagram.sequence,
                len(name),
            ),
            name,
            datagram.data,
        )
    )
    return body + hmac.digest(key, body, hashlib.sha256)[:_DATAGRAM_MAC_BYTES]


def decode_datagram(keys: Sequence[bytes], data: bytes, now_ns: int) -> Datagram:
    """Raises Denied."""
    if len(data) < _DATAGRAM.size + _DATAGRAM_MAC_BYTES or data[:4] != _DATAGRAM_MAGIC:
        raise errors.Denied("not a datagram of this protocol version")
    body, mac = data[:-_DATAGRAM_MAC_BYTES], data[-_DATAGRAM_MAC_BYTES:]
    if not any(
        hmac.compare_digest(hmac.digest(k, body, hashlib.sha256)[:_DATAGRAM_MAC_BYTES], mac)
        for k in keys
    ):
        raise errors.Denied("the datagram was made with another key")
    _, kind, port, time_ns, session, sequence, size = _DATAGRAM.unpack_from(body)
    if abs(now_ns - time_ns) > WINDOW_NS:
        raise errors.Denied("the datagram is too old; set the nodes' clocks")
    if kind not in tuple(Kind):
        raise errors.Denied(f"a datagram of unknown kind {kind}")
    start = _DATAGRAM.size + size
    return Datagram(
        kind=Kind(kind),
        task_id=body[_DATAGRAM.size : start].decode("ascii", "replace"),
        port=port,
        session=session,
        sequence=sequence,
        data=body[start:],
    )


class Sequence64:
    """Which of a session's sequence numbers were seen: the newest, and 63 before it."""

    __slots__ = ("_newest", "_seen")

    def __init__(self) -> None:
        self._newest = 0
        self._seen = 0

    def accept(self, number: int) -> bool:
        """False: seen before, or too old to tell. Numbers start at 1."""
        ahead = number - self._newest
        if ahead > 0:
            self._seen = ((self._seen << ahead) | 1) & (1 << 64) - 1 if ahead < 64 else 1
            self._newest = number
            return True
        if -ahead >= 64 or number < 1 or self._seen >> -ahead & 1:
            return False
        self._seen |= 1 << -ahead
        return True
