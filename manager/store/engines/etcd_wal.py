"""etcd's write-ahead log, as far as it must be read without etcd, and the one thing added to it.

A log is files of records: the length of each in 8 bytes, of which the highest tells of padding,
then a protobuf message of type, checksum and data. The checksum (CRC-32C) runs on over all records'
data. A file is made with its full size; what is behind the last record is zeros. Sources:
go.etcd.io/etcd wal/encoder.go, wal/decoder.go, wal/walpb/record.proto, raft/raftpb/raft.proto (3.4
to 3.6). Must not be called while etcd runs.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SEGMENT_BYTES: Final = 64 * 1000 * 1000
_METADATA, _ENTRY, _STATE, _CRC, _SNAPSHOT = 1, 2, 3, 4, 5
_SECTOR: Final = 512  # bytes that a disk writes at once
_TYPES: Final = frozenset((_METADATA, _ENTRY, _STATE, _CRC, _SNAPSHOT))
# Numbers of fields: of a record; of an entry, a snapshot and a state in its data.
_RECORD_CRC, _RECORD_DATA = 2, 3
_ENTRY_INDEX, _SNAPSHOT_INDEX = 3, 1
_STATE_TERM, _STATE_VOTE, _STATE_COMMIT = 1, 2, 3
_POLYNOMIAL: Final = 0x82F63B78


@dataclass(frozen=True, slots=True)
class End:
    """How a log ends: at which raft index; at which byte of a file of which size, amid a record or
    not; the checksum there; the last state: term, vote, and what is known to be agreed on.
    """

    index: int
    at: int
    size: int
    torn: bool
    crc: int = 0
    state: tuple[int, int, int] | None = None


def segments(data: Path) -> list[Path]:
    """The files of a member's log, the oldest first."""
    return sorted((data / "member" / "wal").glob("*.wal"))


def end_of(segment: Path) -> End | None:
    """How the log ends, by its last file; None: it cannot be told."""
    try:
        # NUMBER-INDEX.wal: the index of the first entry that it is for.
        before = max(int(segment.stem.split("-")[1], 16) - 1, 0)
        if not segment.stat().st_size:
            return End(before, 0, 0, torn=True)
        with segment.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            return _walk(view, before)
    except (ValueError, IndexError, OSError, struct.error):
        return None


def agree_on_all(segment: Path) -> int:
    """Calls agreed on whatever the log holds, by a state record behind its last one; how many
    entries that are.

    For a member that goes on alone: etcd would drop the entries that it does not know to be agreed
    on. It knows that of the newest ones only by hearsay and writes it down without haste, so that
    changes that had been acknowledged would be among those dropped.
    """
    end = end_of(segment)
    if end is None or end.torn or end.state is None or end.state[2] >= end.index:
        return 0
    term, vote, commit = end.state
    data = b"".join(
        bytes((number << 3,)) + _as_varint(value)
        for number, value in ((_STATE_TERM, term), (_STATE_VOTE, vote), (_STATE_COMMIT, end.index))
    )
    record = bytes((1 << 3, _STATE, _RECORD_CRC << 3)) + _as_varint(_crc32c(end.crc, data))
    record += bytes((_RECORD_DATA << 3 | 2, len(data))) + data
    padding = -len(record) % 8
    length = len(record) | ((0x80 | padding) << 56 if padding else 0)
    with segment.open("r+b") as file:
        file.seek(end.at)
        file.write(struct.pack("<Q", length) + record + bytes(padding))
        file.flush()
        os.fsync(file.fileno())
    return end.index - commit


def _walk(view: mmap.mmap, before: int) -> End | None:
    """Each record by its length; only the last ones of a kind are looked into. A later entry takes
    the place of those from its index on.
    """
    at, size, torn = 0, len(view), False
    last: dict[int, tuple[int, int]] = {}
    snapshot = 0
    start = end = 0
    while at + 8 <= size:
        (field,) = struct.unpack_from("<Q", view, at)
        if field == 0:
            break
        begin = at + 8
        following = begin + (field & ((1 << 56) - 1)) + ((field >> 56) & 7 if field >> 63 else 0)
        if following > size:
            torn = True
            break
        if not any(view[following : following + 8]) and _half_written(
            view, start, end, begin, following
        ):
            break  # etcd leaves it out as well
        start, end, at = begin, begin + (field & ((1 << 56) - 1)), following
        kind = view[start + 1] if view[start] == 1 << 3 else 0
        if kind not in _TYPES:
            return None  # etcd's checksums tell
        last[kind] = (start, end)
        if kind == _SNAPSHOT:
            snapshot = max(snapshot, _inner(view, start, end, _SNAPSHOT_INDEX))
    else:
        torn = at != size
    entry = _inner(view, *last[_ENTRY], _ENTRY_INDEX) if _ENTRY in last else before
    state = None
    if _STATE in last:
        term, vote, commit = (
            _inner(view, *last[_STATE], n) for n in (_STATE_TERM, _STATE_VOTE, _STATE_COMMIT)
        )
        state = (term, vote, commit)
    crc = _field(view, start, end, _RECORD_CRC) if end else None
    return End(max(entry, snapshot), at, size, torn, crc[0] if crc else 0, state)


def _half_written(view: mmap.mmap, start: int, end: int, begin: int, following: int) -> bool:
    """Whether the last record, from `begin` on, was being written when the power went: one of its
    sectors is still empty, and its checksum does not follow that of the record before.
    """
    cuts = [begin, *range(begin - begin % _SECTOR + _SECTOR, following, _SECTOR), following]
    if all(any(view[a:b]) for a, b in itertools.pairwise(cuts)):
        return False
    try:
        before = _field(view, start, end, _RECORD_CRC) if end else None
        crc = _field(view, begin, following, _RECORD_CRC)
        data = _field(view, begin, following, _RECORD_DATA)
    except ValueError:
        return True
    if before is None or crc is None or data is None:
        return True
    return _crc32c(before[0], view[data[0] : sum(data)]) != crc[0]


def _inner(view: mmap.mmap, start: int, end: int, number: int) -> int:
    """A number in a record's data."""
    data = _field(view, start, end, _RECORD_DATA)
    found = _field(view, data[0], sum(data), number) if data is not None else None
    return found[0] if found is not None else 0


def _field(view: mmap.mmap, at: int, end: int, number: int) -> tuple[int, int] | None:
    """A field of a protobuf message: (value, 0) of a number, (offset, size) of bytes; None: not
    there. Raises ValueError for what is no message.
    """
    while at < end:
        key, at = _varint(view, at, end)
        value, at = _varint(view, at, end)
        match key & 7:
            case 0:
                found = (value, 0)
            case 2:
                found = (at, value)
                at += value
            case _:
                raise ValueError("not a record of etcd's")
        if at > end:
            raise ValueError("not a record of etcd's")
        if key >> 3 == number:
            return found
    return None


def _varint(view: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("not a record of etcd's")


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _crc32c(crc: int, data: bytes) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
