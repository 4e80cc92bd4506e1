"""Finds, before etcd is started, what it would take for whole and is not.

etcd notices a garbled record by its checksum and a broken database by its structure; then it ends,
and says so. What it does not notice is what is missing: a write-ahead log that is cut off, or that
reads as zeros from somewhere on, looks to it like one whose end a power loss took, and it goes on
with what is left; and without any log it begins a new cluster upon the old database. Agreed entries
are lost then, and a vote forgets what it was given for. So this is held against two facts:

- What is in the database was in the log before it: no healthy log ends before the database's
  `consistent_index`.
- The log's last file is made with its full size. It is shorter, with a record that its end cuts
  through, only where etcd itself has repaired it; the file as it was lies beside it then, as
  `.broken`. (Cut between two records it may be: on a full disk etcd cannot make it long again.)

Format of the database: go.etcd.io/bbolt page.go, db.go, bucket.go. What cannot be read here is left
for etcd to judge.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Final

from manager.store.engine import Corrupt
from manager.store.engines.etcd_wal import SEGMENT_BYTES, end_of, segments

WHAT_TO_DO: Final = (
    "where the cluster has other managers: `swarmctl swarm leave --force` here, `swarmctl node "
    "demote` and `node rm` of this node there, and join again; otherwise restore a backup with "
    "`swarmctl swarm restore FILE`"
)
_META_PAGE, _BRANCH_PAGE, _LEAF_PAGE = 4, 1, 2
_BOLT_MAGIC: Final = 0xED0CDAED


def examine(data: Path, *, begun: bool) -> None:
    """Raises Corrupt when the folder lacks what must be there. `begun`: it has been a member's."""
    database = data / "member" / "snap" / "db"
    applied = consistent_index(database)
    wal = data / "member" / "wal"
    files = segments(data)
    if not files:
        if begun or applied:
            raise Corrupt(f"etcd's write-ahead log in {wal} is gone; {WHAT_TO_DO}")
        return
    last = files[-1]
    end = end_of(last)
    if end is None:
        return
    repaired = last.with_name(last.name + ".broken").exists()
    if end.torn and end.size < SEGMENT_BYTES and not repaired:
        raise Corrupt(
            f"etcd's write-ahead log {last} is cut off: it has {end.size:,} bytes and was made "
            f"with {SEGMENT_BYTES:,}; {WHAT_TO_DO}"
        )
    if applied is not None and applied > end.index:
        raise Corrupt(
            f"etcd's write-ahead log {last} ends at entry {end.index}, and {database} holds what "
            f"entry {applied} brought: the log's end is lost; {WHAT_TO_DO}"
        )


# ------------------------------------------------------------------ the database


def consistent_index(database: Path) -> int | None:
    """The raft index up to which the database holds what the log brought; None: not to be told."""
    try:
        with database.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            root, page_bytes = _newest_root(view)
            bucket = _find(view, root * page_bytes, b"meta", page_bytes)
            if bucket is None:
                return None
            at, size = bucket
            (page,) = struct.unpack_from("<Q", view, at)
            # A small bucket lies in its parent's page, behind its own header of 16 bytes.
            inner = _find(
                view, page * page_bytes if page else at + 16, b"consistent_index", page_bytes
            )
            if inner is None or inner[1] != 8 or size < 16:
                return None
            return int.from_bytes(view[inner[0] : inner[0] + 8], "big")
    except (ValueError, OSError, struct.error):
        return None


def _newest_root(view: mmap.mmap) -> tuple[int, int]:
    """The page of the root bucket by the newer of the two headers, and the size of pages."""
    best: tuple[int, int, int] | None = None
    for at in (0, mmap.PAGESIZE):
        flags = struct.unpack_from("<QHHI", view, at)[1]
        magic, version, page_bytes, _ = struct.unpack_from("<IIII", view, at + 16)
        root, _, _, _, txid, checksum = struct.unpack_from("<QQQQQQ", view, at + 32)
        whole = _fnv(view[at + 16 : at + 72]) == checksum
        if flags & _META_PAGE and magic == _BOLT_MAGIC and version == 2 and whole:
            best = max(best or (0, 0, 0), (txid, root, page_bytes))
    if best is None:
        raise ValueError("no header of a database")
    return best[1], best[2]


def _fnv(data: bytes) -> int:
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def _find(view: mmap.mmap, page_at: int, key: bytes, page_bytes: int) -> tuple[int, int] | None:
    """Where a key's value lies in the tree from this page on: offset and size."""
    for _ in range(64):
        _, flags, count, _ = struct.unpack_from("<QHHI", view, page_at)
        elements = range(page_at + 16, page_at + 16 + 16 * count, 16)
        if flags & _LEAF_PAGE:
            for at in elements:
                _, offset, key_size, value_size = struct.unpack_from("<IIII", view, at)
                begin = at + offset
                if view[begin : begin + key_size] == key:
                    return begin + key_size, value_size
            return None
        if not flags & _BRANCH_PAGE:
            break
        child = None
        for at in elements:
            offset, key_size, page = struct.unpack_from("<IIQ", view, at)
            if child is None or view[at + offset : at + offset + key_size] <= key:
                child = page
        if child is None:
            return None
        page_at = child * page_bytes
    raise ValueError("no tree of a database")


# ------------------------------------------------------------------ what etcd itself finds

# The machine's troubles; the data may be whole.
_SYSTEM: Final = (
    "no space left on device",
    "permission denied",
    "too many open files",
    "input/output error",
    "cannot allocate memory",
    "read-only file system",
    "resource temporarily unavailable",
    "address already in use",
)
_LOG_WORDS: Final = ("walpb:", "wal:", "WAL", "proto:", "unexpected EOF", "cannot use none as id")
_PANIC: Final = 2  # the Go runtime's status


def damaged_file(data: Path, code: int, words: str) -> Path | None:
    """Which file is damaged when etcd, loading what it has been a member with, ends with this
    status and these last words; None: that is not why.
    """
    if any(w in words for w in _SYSTEM):
        return None
    if any(w in words for w in _LOG_WORDS):
        return data / "member" / "wal"
    return data / "member" / "snap" / "db" if code == _PANIC else None
