"""Many streams of log lines become one, roughly in the order of their times.

Each source is in order by itself, and stays so whatever its times are. The earliest head of all
goes out as soon as every open source has a head, or when it has waited long enough: a source that
is silent (a task that is followed) must not hold the others up. Where nothing is followed, more
lines come without being waited for, so the wait is longer; so it is for a source that has only just
begun, which may have to be fetched from far away. Bounded: a source takes QUEUED_MAX lines or
QUEUED_BYTES_MAX, then its reader waits.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from swarm.v1 import LogLine

# For a silent source: one that is followed, one that is not, and one that has said nothing yet.
HOLD_S = 0.15
HOLD_S_WHOLE = 3.0
HOLD_S_BEGIN = 1.0
# Lines of one source, and their bytes: there may be hundreds, and a line may have a MiB.
QUEUED_MAX = 1000
QUEUED_BYTES_MAX = 128 * 1024
# Lines of one message, and bytes unless it is one line.
BATCH_MAX = 500
BATCH_BYTES_MAX = 1 << 20


class Source:
    """One stream's lines that have not gone out yet."""

    __slots__ = ("_merger", "bytes", "fresh_until_s", "lines", "room")

    def __init__(self, merger: Merger, fresh_until_s: float) -> None:
        self._merger = merger
        self.lines: deque[tuple[float, LogLine]] = deque()  # with the time of arrival
        self.bytes = 0
        # Until then, or its first line, it is waited for longer.
        self.fresh_until_s = fresh_until_s
        self.room = asyncio.Event()
        self.room.set()

    @property
    def full(self) -> bool:
        return len(self.lines) >= QUEUED_MAX or self.bytes >= QUEUED_BYTES_MAX

    async def put(self, lines: Sequence[LogLine]) -> None:
        """Takes lines; waits while the source is full."""
        for line in lines:
            await self.room.wait()
            self._merger.take(self, line)

    def close(self) -> None:
        """No more lines come. May be called again."""
        self._merger.end(self)


class Merger:
    """Takes lines of many sources, gives batches of one stream."""

    def __init__(self, *, follow: bool = True) -> None:
        self._hold_s = HOLD_S if follow else HOLD_S_WHOLE
        self._begin_s = HOLD_S_BEGIN if follow else HOLD_S_WHOLE
        self._open: set[Source] = set()
        self._silent = 0  # open sources without a line
        self._fresh: set[Source] = set()  # of those: that have said nothing yet
        # One entry per source that has lines: time of its first one, a number against ties.
        self._heads: list[tuple[int, int, Source]] = []
        self._count = 0
        self._held_open = False
        self._woken = asyncio.Event()

    def source(self, *, late: bool = False) -> Source:
        """A new one. `late`: it begins while others are being read, and holds nobody up."""
        source = Source(self, 0.0 if late else _now_s() + self._begin_s)
        self._open.add(source)
        self._silent += 1
        if not late:
            self._fresh.add(source)
        return source

    def hold_open(self) -> None:
        """More sources may come: the stream does not end before `release`."""
        self._held_open = True

    def release(self) -> None:
        self._held_open = False
        self.wake()

    def wake(self) -> None:
        """The reader gets a batch soon, an empty one if need be."""
        self._woken.set()

    def take(self, source: Source, line: LogLine) -> None:
        source.lines.append((_now_s(), line))
        source.bytes += len(line.data)
        if len(source.lines) == 1:
            self._silent -= 1
            self._fresh.discard(source)
            self._push(source)
        if source.full:
            source.room.clear()
        self.wake()

    def end(self, source: Source) -> None:
        if source in self._open:
            self._open.discard(source)
            self._fresh.discard(source)
            self._silent -= not source.lines
        self.wake()

    async def batches(self) -> AsyncGenerator[tuple[LogLine, ...], None]:
        """Batches of lines until every source is closed and empty; may be empty when woken."""
        while True:
            self._woken.clear()
            batch = self._ready()
            ended = not self._open and not self._heads and not self._held_open
            yield batch
            if ended:
                return
            if not batch or self._due_s() > _now_s():
                await self._wait()

    async def _wait(self) -> None:
        """Until something comes, or the earliest line has waited long enough."""
        if not self._heads:
            await self._woken.wait()
            return
        try:
            async with asyncio.timeout(max(0.0, self._due_s() - _now_s())):
                await self._woken.wait()
        except TimeoutError:
            return

    def _ready(self) -> tuple[LogLine, ...]:
        out: list[LogLine] = []
        size = 0
        while self._heads and len(out) < BATCH_MAX and self._due_s() <= _now_s():
            source = self._heads[0][2]
            line = source.lines[0][1]
            if out and size + len(line.data) > BATCH_BYTES_MAX:
                break
            heapq.heappop(self._heads)
            source.lines.popleft()
            source.bytes -= len(line.data)
            size += len(line.data)
            out.append(line)
            if source.lines:
                self._push(source)
            elif source in self._open:
                self._silent += 1
            if len(source.lines) < QUEUED_MAX // 2 and source.bytes < QUEUED_BYTES_MAX // 2:
                source.room.set()
        return tuple(out)

    def _due_s(self) -> float:
        """When the earliest line may go; it may at once where no source is silent."""
        if not self._heads or not self._silent:
            return 0.0
        due_s = self._heads[0][2].lines[0][0] + self._hold_s
        while self._fresh:
            source = next(iter(self._fresh))
            if source.fresh_until_s > _now_s():
                return max(due_s, source.fresh_until_s)
            self._fresh.discard(source)
        return due_s

    def _push(self, source: Source) -> None:
        self._count += 1
        heapq.heappush(self._heads, (source.lines[0][1].timestamp_ns, self._count, source))


def _now_s() -> float:
    """The event loop's time, on which the waits are measured as well."""
    return asyncio.get_running_loop().time()
