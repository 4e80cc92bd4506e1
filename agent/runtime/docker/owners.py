"""Gives all entries of a tar stream to one user, as it passes.

The engine can do the like (copyUIDGID), but looks the container's user up among the users of its
own host, so it is done here: `owner_of` says who a container's user is by the container's files,
and `given_to` changes the headers. Formats: POSIX ustar and pax ("pax Interchange Format"), and
GNU tar's long names and sparse files; of pax records those about owners are left out. What is
compressed (gzip, bzip2, xz) is unpacked on the way, as the engine does itself.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Protocol

from agent.runtime.base import Failed

__all__ = ["given_to", "owner_of"]

BLOCK = 512
# Of one pax header: names and attributes of one file.
RECORDS_BYTES_MAX = 1 << 20
# Of the users' and groups' files.
FILE_BYTES_MAX = 1 << 20
_OWNERS = frozenset({b"uid", b"gid", b"uname", b"gname"})


class _Unpacker(Protocol):
    def decompress(self, data: bytes, /) -> bytes: ...


_MAGICS: tuple[tuple[bytes, Callable[[], _Unpacker]], ...] = (
    (b"\x1f\x8b", lambda: zlib.decompressobj(wbits=31)),
    (b"BZh", bz2.BZ2Decompressor),
    (b"\xfd7zXZ\x00", lzma.LZMADecompressor),
)


async def owner_of(user: str, read: Callable[[str], Awaitable[str]]) -> tuple[int, int]:
    """The numbers of `user` or `user:group`, by name or number; empty: root. `read` gives a file of
    the container, empty where there is none. Raises Failed.
    """
    name, _, group = user.partition(":")
    if not name:
        return 0, 0
    uid, gid = (int(name), 0) if name.isdigit() else (None, 0)
    if uid is None or not group:
        for words in _entries(await read("/etc/passwd"), 4):
            if words[0] == name or (uid is not None and words[2] == name):
                uid, gid = int(words[2]), int(words[3])
                break
    if uid is None:
        raise Failed(f"the task's user {name!r} is not in its /etc/passwd")
    if not group or group.isdigit():
        return uid, int(group or gid)
    for words in _entries(await read("/etc/group"), 3):
        if words[0] == group:
            return uid, int(words[2])
    raise Failed(f"the task's group {group!r} is not in its /etc/group")


def _entries(text: str, fields: int) -> list[list[str]]:
    lines = (line.split(":") for line in text.splitlines())
    return [w for w in lines if len(w) >= fields and all(n.isdigit() for n in w[2:fields])]


async def given_to(data: AsyncIterator[bytes], uid: int, gid: int) -> AsyncGenerator[bytes, None]:
    """The archive with other owners. Raises Failed when it is none."""
    change = _Change(uid, gid)
    async for part in _unpacked(data):
        if out := change.feed(part):
            yield out
    if rest := change.end():
        yield rest


async def _unpacked(data: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    head = b""
    unpacker: _Unpacker | None = None
    begun = False
    async for part in data:
        if not begun:
            head += part
            if len(head) < 6:
                continue
            part, begun = head, True
            unpacker = next((make() for magic, make in _MAGICS if head.startswith(magic)), None)
        if unpacker is None:
            yield part
            continue
        try:
            yield unpacker.decompress(part)
        except (zlib.error, OSError, EOFError, lzma.LZMAError) as error:
            raise Failed(f"the archive's compression is damaged: {error}") from None
    if not begun and head:
        yield head


class _Change:
    """Changes headers in a stream that comes in parts of any size."""

    def __init__(self, uid: int, gid: int) -> None:
        # What does not fit in seven octal digits is in base 256, GNU's and star's way.
        self._uid, self._gid = _number(uid), _number(gid)
        self._buffer = bytearray()
        self._pass = 0  # bytes that are not headers
        self._records: bytes | None = None  # the header of pax records that follow
        self._records_bytes = 0
        self._sparse = False  # a block of a sparse file's map follows
        self._over = False

    def feed(self, part: bytes) -> bytes:
        """What can be given on."""
        self._buffer += part
        out = bytearray()
        while self._buffer:
            if self._over:
                out += self._take(len(self._buffer))
            elif self._pass:
                some = self._take(min(self._pass, len(self._buffer)))
                self._pass -= len(some)
                out += some
            elif self._records is not None:
                if len(self._buffer) < _padded(self._records_bytes):
                    break
                out += self._changed_records()
            elif len(self._buffer) < BLOCK:
                break
            else:
                out += self._block(self._take(BLOCK))
        return bytes(out)

    def end(self) -> bytes:
        """What is left of an archive that was not whole; the engine says so."""
        return self._take(len(self._buffer))

    def _take(self, count: int) -> bytes:
        some = bytes(self._buffer[:count])
        del self._buffer[:count]
        return some

    def _block(self, block: bytes) -> bytes:
        if self._sparse:
            self._sparse = block[504] != 0
            return block
        if not block.strip(b"\0"):
            self._over = True  # behind the end there is only padding
            return block
        kind, size = block[156:157], _size(block)
        if kind in (b"x", b"g"):
            if size > RECORDS_BYTES_MAX:
                raise Failed("the archive is damaged: a pax header of impossible size")
            self._records, self._records_bytes = block, size
            return b""
        if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            size = 0  # links and the like have no data, whatever their size says
        self._pass = _padded(size)
        self._sparse = kind == b"S" and block[482] != 0
        changed = bytearray(block)
        changed[108:116], changed[116:124] = self._uid, self._gid
        if block[257:262] == b"ustar":
            changed[265:329] = bytes(64)  # their names, which come before their numbers
        return _signed(changed)

    def _changed_records(self) -> bytes:
        """A pax header without its records about owners."""
        assert self._records is not None
        data = self._take(_padded(self._records_bytes))[: self._records_bytes]
        kept = b"".join(
            r for r in _split(data) if r.partition(b" ")[2].split(b"=")[0] not in _OWNERS
        )
        header = bytearray(self._records)
        header[124:136] = b"%011o\0" % len(kept)
        self._records = None
        return _signed(header) + kept + bytes(_padded(len(kept)) - len(kept))


def _split(data: bytes) -> list[bytes]:
    """Records of the form `LENGTH KEY=VALUE\\n`."""
    out = []
    while data:
        length = data.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise Failed("the archive is damaged: a pax header that is none")
        out.append(data[: int(length)])
        data = data[int(length) :]
    return out


def _signed(header: bytearray) -> bytes:
    """With its checksum: the sum of all bytes, itself taken for spaces."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _number(value: int) -> bytes:
    if value < 8**7:
        return b"%07o\0" % value
    return b"\x80" + value.to_bytes(7, "big")


def _size(header: bytes) -> int:
    field = header[124:136]
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.strip(b"\0 ")
    if not text:
        return 0
    try:
        return int(text, 8)
    except ValueError:
        raise Failed("what came is no tar archive") from None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
