"""A task's files, which are a folder of the test's: what Control.Copy does there, by Docker's
rules. Paths of the task begin at the folder.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from swarm.errors import Conflict, Invalid
from swarm.v1 import CopyInput, CopyOutput, CopyStart, FileStat

PIECE_BYTES = 10_000  # an odd size, so that no message ends where a block does


class FakeFiles:
    """The folder, and what was asked of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.starts: list[CopyStart] = []
        # An archive to send instead.
        self.archive: bytes | None = None
        # Break a copy off after so many bytes.
        self.break_after: int | None = None

    def _at(self, path: str) -> str:
        """The real path, ending as it was written."""
        end = "/." if posixpath.basename(path) == "." else "/" if path.endswith("/") else ""
        return str(self.root) + posixpath.normpath("/" + path) + end

    def stat(self, path: str) -> FileStat:
        try:
            found = os.lstat(self._at(path))
        except OSError:
            return FileStat()
        link = ""
        if stat.S_ISLNK(found.st_mode):
            # The engine tells where links lead in the end, from the task's root on.
            link = os.path.realpath(self._at(path)).removeprefix(str(self.root))
        return FileStat(
            name=os.path.basename(path),
            size_bytes=found.st_size,
            mode=found.st_mode,
            link_target=link,
        )

    def _packed(self, path: str) -> bytes:
        real = self._at(path)
        name = posixpath.basename(real.rstrip("/"))
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.add(real, name)
        return out.getvalue()

    def _unpack(self, start: CopyStart, archive: bytes) -> None:
        folder = self._at(start.path)
        if not os.path.isdir(folder):
            raise Conflict(f"{start.path} is no folder")
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                there = os.path.join(folder, member.name)
                if os.path.lexists(there):
                    is_dir = os.path.isdir(there) and not os.path.islink(there)
                    if start.keep_kind and is_dir != member.isdir():
                        raise Conflict(f"{member.name}: folder and file")
                    if not is_dir:
                        os.unlink(there)
                tar.extract(member, folder, filter="tar")

    async def copy(self, request: AsyncIterator[CopyInput]) -> AsyncIterator[CopyOutput]:
        """See Control.Copy."""
        start = (await anext(request)).start
        assert start is not None, "the first message is start"
        self.starts.append(start)
        if start.stat_only:
            yield CopyOutput(stat=self.stat(start.path))
            return
        if not start.into:
            async for output in self._out(start):
                yield output
            return
        taken = bytearray()
        async for item in request:
            if item.end:
                self._unpack(start, bytes(taken))
                yield CopyOutput(done=True)
                return
            taken += item.data or b""
            if self.break_after is not None and len(taken) > self.break_after:
                yield CopyOutput(stop=True)
                async for _ in request:
                    pass
                raise Conflict("no space left on device; a part of it may be there")
        raise Invalid("the archive broke off before its end")

    async def _out(self, start: CopyStart) -> AsyncIterator[CopyOutput]:
        yield CopyOutput(stat=self.stat(start.path))
        archive = self._packed(start.path) if self.archive is None else self.archive
        sent = 0
        for piece in _pieces(archive):
            if self.break_after is not None and sent + len(piece) > self.break_after:
                raise Conflict("the task has ended; what was copied until then is only a part")
            sent += len(piece)
            yield CopyOutput(data=piece)
        yield CopyOutput(done=True)


def _pieces(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), PIECE_BYTES):
        yield data[at : at + PIECE_BYTES]
