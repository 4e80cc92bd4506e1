"""The file of a backup: a cluster's state at one revision, whatever engine it came from.

Owns the format: framing, checksums, limits, and what is said of a file that is not whole. Managers
write it (manager/api/backup.py) and load it (manager/restore.py); swarmctl checks it as it passes
and may seal it (swarm/backup_seal.py). What a row's value means is the store's business.

    file   = "SWRMBACK" format:u16 zero:u16 frame*
    frame  = kind:u8 length:u32 payload crc32(kind length payload):u32        all big-endian
    "H"    one, first: the header, JSON (`Header`)
    "K"    one, second: what restoring needs beside the rows, JSON (`Keys`)
    "R"    rows, MessagePack: a list of [table, id, version, value]
    "E"    one, last: the SHA-256 of every byte before this frame

A frame's CRC tells where a file is damaged; the SHA-256 and the header's counts, that nothing is
missing or moved. Neither keeps out a forger: sealing does. Later versions of the format change its
number; a reader refuses numbers above its own, and unknown fields of the JSON parts are skipped.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from swarm import errors

__all__ = ["FORMAT", "MAGIC", "Corrupt", "Header", "Keys", "Reader", "Row", "Writer"]

MAGIC: Final = b"SWRMBACK"
FORMAT: Final = 1
PIECE_BYTES: Final = 256 << 10  # of rows, in one frame; a larger row goes alone
FRAME_BYTES_MAX: Final = 64 << 20  # above any row: a length beyond it is damage
_START: Final = struct.Struct(">8sHH")
_HEAD: Final = struct.Struct(">cI")
_CRC: Final = struct.Struct(">I")
_KINDS: Final = b"HKRE"


class Corrupt(errors.Invalid):
    """The file is no whole backup. Says where, and what to do."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup is of."""

    cluster_id: str
    # The node whose manager wrote it.
    node_id: str
    # The store's, and when that was read, unix time.
    revision: int
    time_ns: int
    # The store's engine it came from, and the version of swarmd.
    engine: str = ""
    version: str = ""
    cluster_name: str = ""
    # Where that manager was reached.
    addr: str = ""
    # Objects by kind ("service"), all rows together.
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    rows: int = 0


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """What opens the sealed parts of rows."""

    seal_key: bytes

    def __repr__(self) -> str:  # never in a log
        return "Keys(...)"


class Row(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One object as stored; `table` is its Kind."""

    table: int
    id: str
    version: int
    value: bytes


_ROWS: Final = msgspec.msgpack.Decoder(list[Row])
_PACK: Final = msgspec.msgpack.Encoder()


class Writer:
    """Makes the bytes of one file, in order: `begin`, `rows` as often as needed, `end`."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def begin(self, header: Header, keys: Keys) -> bytes:
        start = _START.pack(MAGIC, FORMAT, 0)
        return self._count(
            start
            + _frame(b"H", msgspec.json.encode(header))
            + _frame(b"K", msgspec.json.encode(keys))
        )

    def rows(self, rows: Iterable[Row]) -> Iterator[bytes]:
        """Frames of about PIECE_BYTES; pieces of the file are made as they are asked for."""
        batch: list[Row] = []
        size = 0
        for row in rows:
            batch.append(row)
            size += len(row.value) + len(row.id) + 16
            if size >= PIECE_BYTES:
                yield self._count(_frame(b"R", _PACK.encode(batch)))
                batch, size = [], 0
        if batch:
            yield self._count(_frame(b"R", _PACK.encode(batch)))

    def end(self) -> bytes:
        return _frame(b"E", self._hash.digest())

    def _count(self, data: bytes) -> bytes:
        self._hash.update(data)
        return data


class Reader:
    """Takes a file in pieces of any size and gives its rows. Nothing it gave counts until `finish`
    has returned: only then is the file known to be whole.

    Raises Corrupt, in `feed` as soon as it shows. Keeps one frame in memory.
    """

    def __init__(self, *, name: str = "the backup") -> None:
        self._name = name
        self._buffer = bytearray()
        self._at = 0  # offset in the file of the buffer's first byte
        self._last = 0  # offset of the frame taken last
        self._begun = False
        self._ended = False
        self._hash = hashlib.sha256()
        self._counts: dict[int, int] = {}
        self._header: Header | None = None
        self._keys: Keys | None = None

    @property
    def taken(self) -> int:
        """Bytes so far."""
        return self._at + len(self._buffer)

    @property
    def header(self) -> Header | None:
        return self._header

    @property
    def keys(self) -> Keys | None:
        return self._keys

    @property
    def counts(self) -> dict[int, int]:
        """Rows so far, by table."""
        return dict(self._counts)

    def feed(self, data: bytes) -> list[Row]:
        """The rows that these bytes complete."""
        self._buffer += data
        rows: list[Row] = []
        if not self._begun and not self._start():
            return rows
        while (frame := self._next()) is not None:
            kind, payload, offset = frame
            rows += self._take(kind, payload, offset)
        return rows

    def finish(self) -> Header:
        """The file has ended here. Raises Corrupt unless all of it was there."""
        if not self._ended:
            raise self._corrupt(
                self.taken,
                "it is empty" if not self.taken else "it ends here, in the middle: it was cut off",
            )
        assert self._header is not None
        return self._header

    def corrupt(self, problem: str) -> Corrupt:
        """What a reader of the rows says of one that it cannot use."""
        return self._corrupt(self._last, problem)

    def _start(self) -> bool:
        head = bytes(self._buffer[: _START.size])
        if head[: len(MAGIC)] != MAGIC[: len(head)]:
            raise Corrupt(
                f"{self._name} is no backup of a cluster: it begins with {head[:8]!r} at byte 0, "
                f"not with {MAGIC!r}; name a file that `swarmctl swarm backup` wrote"
            )
        if len(head) < _START.size:
            return False
        _, found, _ = _START.unpack(head)
        if found != FORMAT:
            raise Corrupt(
                f"{self._name} has format {found} (bytes 8 and 9), this version reads "
                f"format {FORMAT}; use the version of swarmctl and swarmd that wrote it, or a "
                "later one"
            )
        self._drop(_START.size)
        self._begun = True
        return True

    def _next(self) -> tuple[int, bytes, int] | None:
        """The next whole frame: its kind, payload and offset."""
        buffer = self._buffer
        if not buffer:
            return None
        if self._ended:
            raise self._corrupt(self._at, "more follows after its end")
        if buffer[0] not in _KINDS:
            raise self._corrupt(self._at, f"no part begins with byte {buffer[0]:#04x}")
        if len(buffer) < _HEAD.size:
            return None
        kind, length = _HEAD.unpack_from(buffer)
        if length > FRAME_BYTES_MAX:
            raise self._corrupt(self._at, f"a part of {length} bytes is larger than any may be")
        whole = _HEAD.size + length + _CRC.size
        if len(buffer) < whole:
            return None
        body = bytes(buffer[: whole - _CRC.size])
        (crc,) = _CRC.unpack_from(buffer, whole - _CRC.size)
        offset = self._at
        if zlib.crc32(body) != crc:
            raise self._corrupt(
                offset, f"the {whole} bytes from here on are not as written (checksum)"
            )
        if kind == b"E":
            if body[_HEAD.size :] != self._hash.digest():
                raise self._corrupt(offset, "the SHA-256 of the file is not the one noted here")
            self._at += whole
            del buffer[:whole]
        else:
            self._drop(whole)
        return kind[0], body[_HEAD.size :], offset

    def _drop(self, count: int) -> None:
        self._hash.update(self._buffer[:count])
        del self._buffer[:count]
        self._at += count

    def _take(self, kind: int, payload: bytes, offset: int) -> list[Row]:
        self._last = offset
        try:
            match chr(kind):
                case "H" if self._header is None:
                    self._header = msgspec.json.decode(payload, type=Header)
                case "K" if self._header is not None and self._keys is None:
                    self._keys = msgspec.json.decode(payload, type=Keys)
                case "R" if self._keys is not None:
                    rows = _ROWS.decode(payload)
                    for row in rows:
                        self._counts[row.table] = self._counts.get(row.table, 0) + 1
                    return rows
                case "E" if self._keys is not None:
                    self._check_counts(offset)
                    self._ended = True
                case part:
                    raise self._corrupt(offset, f"part {part!r} is out of its place")
        except msgspec.DecodeError as error:
            raise self._corrupt(offset, f"part {chr(kind)!r} cannot be read: {error}") from None
        return []

    def _check_counts(self, offset: int) -> None:
        assert self._header is not None
        found = sum(self._counts.values())
        if found != self._header.rows:
            raise self._corrupt(
                offset, f"it holds {found} objects, its header says {self._header.rows}"
            )

    def _corrupt(self, offset: int, problem: str) -> Corrupt:
        return Corrupt(
            f"{self._name} is damaged at byte {offset}: {problem}; nothing was changed. Use "
            "another copy of this backup, or another backup"
        )


def _frame(kind: bytes, payload: bytes) -> bytes:
    errors.invariant(len(payload) <= FRAME_BYTES_MAX, f"a part of {len(payload)} bytes")
    body = _HEAD.pack(kind, len(payload)) + payload
    return body + _CRC.pack(zlib.crc32(body))
