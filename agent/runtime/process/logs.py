"""Reads the log files that a task's supervisor writes: tail, since, until, follow.

A line is `<unix ns> <o|e> <data>`; with O or E it is a piece of a longer one, which is joined again
here, up to LINE_BYTES_MAX. Files are numbered and only grow; the oldest are removed by the
supervisor while we read, which loses their lines and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from swarm.v1 import LogLine, LogOptions, LogStream

CHUNK_BYTES = 256 * 1024
# A file has no event to wait on without inotify; a tenth of a second is not felt by a reader.
POLL_S = 0.1
# A line that goes on for ever is given out in parts of this size, as with the engine's logs.
LINE_BYTES_MAX = 1024 * 1024
_STREAMS = {b"o": LogStream.STDOUT, b"e": LogStream.STDERR}


async def read(
    folder: Path, task_id: str, options: LogOptions, ended: Callable[[], bool]
) -> AsyncIterator[LogLine]:
    """The lines asked for, oldest first. Following ends when the task has ended and all is read, or
    at `until`.
    """
    wanted = _Wanted(task_id, options)
    place = _Place(folder)
    if options.tail >= 0:
        last: deque[LogLine] = deque(maxlen=options.tail)
        while block := place.read():
            last.extend(wanted.lines(block))
            await asyncio.sleep(0)
        for line in last:
            yield line
    while True:
        over = ended()  # asked before reading: what comes after the end was written before it
        while block := place.read():
            for line in wanted.lines(block):
                yield line
            if wanted.past_end:
                return
            await asyncio.sleep(0)
        if over or not options.follow:
            for line in wanted.rest():
                yield line
            return
        await asyncio.sleep(POLL_S)


class _Place:
    """Where a reader is: a file's number and an offset at the begin of a line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._offset = 0

    def read(self) -> bytes:
        """The next whole lines; empty: there are none now."""
        while True:
            numbers = self._numbers()
            if not numbers:
                return b""
            if self._number not in numbers:  # the first time, or it was removed under us
                later = [n for n in numbers if n > self._number]
                if not later:
                    return b""
                self._number, self._offset = later[0], 0
            block = self._block()
            if block:
                self._offset += len(block)
                return block
            if self._number == numbers[-1]:
                return b""
            # A later file exists, so this one is complete, but what was written to it between our
            # read and the listing must not be skipped.
            if block := self._block():
                self._offset += len(block)
                return block
            self._number, self._offset = self._number + 1, 0

    def _numbers(self) -> list[int]:
        try:
            return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdigit())
        except FileNotFoundError:
            return []

    def _block(self) -> bytes:
        try:
            with (self._folder / f"{self._number:08d}").open("rb") as file:
                file.seek(self._offset)
                data = file.read(CHUNK_BYTES)
        except FileNotFoundError:
            return b""
        return data[: data.rfind(b"\n") + 1]


class _Wanted:
    """Which lines are asked for."""

    def __init__(self, task_id: str, options: LogOptions) -> None:
        self._task_id = task_id
        self._options = options
        # Neither stream asked for means both.
        both = not options.stdout and not options.stderr
        self._keys = {
            key
            for key, asked in ((b"o", options.stdout or both), (b"e", options.stderr or both))
            if asked
        }
        self.past_end = False
        # By stream: when a line began that has not ended, and its pieces.
        self._open: dict[bytes, tuple[int, bytearray]] = {}

    def rest(self) -> Iterator[LogLine]:
        """Lines that will not end any more."""
        for key in sorted(self._open):
            at_ns, data = self._open[key]
            if at_ns >= self._options.since_ns:
                yield self._line(key, at_ns, bytes(data))
        self._open.clear()

    def _line(self, key: bytes, at_ns: int, data: bytes) -> LogLine:
        return LogLine(task_id=self._task_id, stream=_STREAMS[key], timestamp_ns=at_ns, data=data)

    def lines(self, block: bytes) -> Iterator[LogLine]:
        options = self._options
        for raw in block.split(b"\n")[:-1]:
            stamp, _, rest = raw.partition(b" ")
            mark, _, data = rest.partition(b" ")
            key = mark.lower()
            if key not in self._keys or not stamp.isdigit():
                continue  # a torn line after power loss
            at_ns = int(stamp)
            if key in self._open or mark != key:
                at_ns, pieces = self._open.setdefault(key, (at_ns, bytearray()))
                pieces += data
                if mark != key and len(pieces) < LINE_BYTES_MAX:
                    continue
                data = bytes(pieces)
                del self._open[key]
            if at_ns < options.since_ns:
                continue
            if options.until_ns and at_ns > options.until_ns:
                self.past_end = True
                return
            yield self._line(key, at_ns, data)
