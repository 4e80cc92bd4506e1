"""What this node and its tasks use: the answer to a manager's request for its usage.

One measurement is the node's own line (CPU time, memory, disk, GPUs) and a line for each task asked
for. A runtime that is slow does not hold the node's line up: what it has not said after a part of
the period comes with a later measurement, with a time of its own, and is not asked for again
meanwhile. Bounded: so many callers at once, so many questions to one runtime; callers with the same
period share the answers.

Counters are the kernel's: /proc/stat, /proc/meminfo (proc(5)), statvfs(3).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from agent.runtime.base import Runtime
from swarm import errors
from swarm.clock import SECOND_NS, Clock
from swarm.v1 import GpuLoad, NodeUsage, TaskStats, UsageOptions

__all__ = ["Measurable", "Meter", "NodeLine", "read_node"]

CALLERS_MAX = 20
AT_ONCE = 8  # questions to one runtime; more only queue inside an engine
PERIOD_S_DEFAULT, PERIOD_S_MIN, PERIOD_S_MAX = 1.0, 0.2, 3600.0
# The part of a period that the tasks' lines are waited for, and the longest wait.
PATIENCE, PATIENCE_S_MAX = 0.5, 2.0
# Where there are only two measurements, the lines that are missing are missing for good.
PATIENCE_S_ONCE = 5.0
# An answer to one caller does for others for this part of their period.
SHARED = 0.5
ANSWER_S_MAX = 10.0
# So many failures in a row are told: a task may end between the list and the question.
FAILURES_TOLD = 2

_TICK_NS = SECOND_NS // os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Measurable:
    """A task that runs here."""

    task_id: str
    service_id: str
    name: str
    runtime: Runtime


@dataclass(frozen=True, slots=True)
class NodeLine:
    """The node itself."""

    cpu_total_ns: int
    cpus: int
    memory_bytes: int
    memory_total_bytes: int
    disk_bytes: int
    disk_total_bytes: int


def read_node(folders: Iterable[Path], *, proc: Path = _PROC) -> NodeLine:
    """As the kernel has it now; the disk is the one that the first of the folders is on that can be
    seen. Blocks for as long as the file system takes to answer.
    """
    busy, cpus = _cpu(proc / "stat")
    memory, memory_total = _memory(proc / "meminfo")
    disk, disk_total = _disk(folders)
    return NodeLine(busy * _TICK_NS, cpus, memory, memory_total, disk, disk_total)


def _cpu(stat: Path) -> tuple[int, int]:
    """Ticks in which CPUs were busy, and how many CPUs there are."""
    ticks = cpus = 0
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        name, *words = line.split()
        if name == "cpu":
            # user nice system idle iowait irq softirq steal; a guest's time is in user and nice.
            numbers = [int(word) for word in words[:8]]
            ticks = sum(numbers) - sum(numbers[3:5])
        elif name.startswith("cpu"):
            cpus += 1
        else:
            break
    return ticks, cpus


def _memory(meminfo: Path) -> tuple[int, int]:
    """In use, without what the kernel can drop at once, and in all."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0, 0
    kib = {}
    for line in lines:
        key, _, rest = line.partition(":")
        if key in ("MemTotal", "MemFree", "MemAvailable"):
            kib[key] = int(rest.split()[0])
    total = kib.get("MemTotal", 0)
    free = kib.get("MemAvailable", kib.get("MemFree", 0))
    return (total - free) * 1024, total * 1024


def _disk(folders: Iterable[Path]) -> tuple[int, int]:
    for folder in folders:
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_blocks * found.f_frsize
    return 0, 0


class Meter:
    """Measures for many callers. `tasks` lists what runs here now, `folders` where tasks are kept;
    `gpus` tells what the GPUs do, at the caller's cost nothing.
    """

    def __init__(
        self,
        tasks: Callable[[], Iterable[Measurable]],
        *,
        node_id: str,
        clock: Clock,
        folders: Callable[[], Iterable[Path]],
        gpus: Callable[[], tuple[GpuLoad, ...]] = tuple,
    ) -> None:
        self._tasks = tasks
        self._node_id = node_id
        self._clock = clock
        self._folders = folders
        self._gpus = gpus
        self._callers = 0
        self._gates: dict[str, asyncio.Semaphore] = {}  # by runtime
        # The last answers, with when they came.
        self._recent: dict[str, tuple[float, TaskStats]] = {}

    async def measure(self, options: UsageOptions) -> AsyncGenerator[NodeUsage, None]:
        """Measurements until the caller has enough; two with `once`. Raises Invalid, Exhausted."""
        period_s = options.period_ns / SECOND_NS if options.period_ns else PERIOD_S_DEFAULT
        if not PERIOD_S_MIN <= period_s <= PERIOD_S_MAX:
            raise errors.Invalid(
                f"a period of {period_s:g} s: it must be from {PERIOD_S_MIN:g} s to "
                f"{PERIOD_S_MAX:g} s"
            )
        if self._callers >= CALLERS_MAX:
            raise errors.Exhausted(
                f"the node is measured for {CALLERS_MAX} callers already, the most at a time; end "
                "one of them, or try later"
            )
        self._callers += 1
        questions = _Questions(self, period_s)
        try:
            async for usage in self._measurements(options, questions, period_s):
                yield usage
        finally:
            self._callers -= 1
            await questions.close()

    async def _measurements(
        self, options: UsageOptions, questions: _Questions, period_s: float
    ) -> AsyncGenerator[NodeUsage, None]:
        patience_s = min(PATIENCE * period_s, PATIENCE_S_MAX)
        if options.once:
            patience_s = PATIENCE_S_ONCE
        due_s, count = self._clock.monotonic_s(), 0
        while True:
            questions.begin(self._wanted(options))
            # Not on the loop: a file system may take its time.
            line = await asyncio.to_thread(read_node, tuple(self._folders()))
            now_ns = self._clock.now_ns()
            await questions.wait(patience_s)
            yield self._usage(line, now_ns, questions)
            count += 1
            if options.once and count == 2:
                return
            due_s = max(due_s + period_s, self._clock.monotonic_s())
            await asyncio.sleep(due_s - self._clock.monotonic_s())

    def _wanted(self, options: UsageOptions) -> list[Measurable]:
        if options.node_only:
            return []
        tasks, services = set(options.task_ids), set(options.service_ids)
        present = list(self._tasks())
        if len(self._recent) > len(present):
            ids = {task.task_id for task in present}
            self._recent = {id_: found for id_, found in self._recent.items() if id_ in ids}
        if not tasks and not services:
            return present
        return [t for t in present if t.task_id in tasks or t.service_id in services]

    def _usage(self, line: NodeLine, now_ns: int, questions: _Questions) -> NodeUsage:
        answers, problems = questions.take()
        return NodeUsage(
            node_id=self._node_id,
            timestamp_ns=now_ns,
            cpu_total_ns=line.cpu_total_ns,
            cpus=line.cpus,
            memory_bytes=line.memory_bytes,
            memory_total_bytes=line.memory_total_bytes,
            disk_bytes=line.disk_bytes,
            disk_total_bytes=line.disk_total_bytes,
            gpus=self._gpus(),
            tasks=tuple(answers),
            problems=tuple(problems),
        )

    async def ask(self, task: Measurable, age_s_max: float) -> TaskStats:
        """What the task uses, as it is now or was a moment ago. Raises what the runtime raises, and
        TimedOut.
        """
        recent = self._recent.get(task.task_id)
        if recent is not None and self._clock.monotonic_s() - recent[0] <= age_s_max:
            return recent[1]
        gate = self._gates.setdefault(task.runtime.name, asyncio.Semaphore(AT_ONCE))
        async with gate:
            try:
                async with asyncio.timeout(ANSWER_S_MAX):
                    stats = await task.runtime.stats(task.task_id)
            except TimeoutError:
                raise errors.TimedOut(
                    f"the runtime did not answer within {ANSWER_S_MAX:g} s"
                ) from None
        self._recent[task.task_id] = (self._clock.monotonic_s(), stats)
        return stats


@dataclass(slots=True)
class _Failing:
    """A task that was not measured the last times."""

    task: Measurable
    message: str
    count: int = 1


@dataclass(slots=True)
class _Asked:
    task: Measurable
    asking: asyncio.Task[TaskStats] = field(repr=False)


class _Questions:
    """What one caller's measurements have asked of runtimes."""

    def __init__(self, meter: Meter, period_s: float) -> None:
        self._meter = meter
        self._age_s_max = period_s * SHARED
        self._asked: dict[str, _Asked] = {}
        self._failing: dict[str, _Failing] = {}
        self._told: set[str] = set()  # runtimes with tasks that fail, as the caller knows

    def begin(self, wanted: list[Measurable]) -> None:
        """Asks for all but those that are being asked for."""
        ids = {task.task_id for task in wanted}
        for gone in [id_ for id_ in self._failing if id_ not in ids]:
            del self._failing[gone]
        for task in wanted:
            if task.task_id not in self._asked:
                asking = asyncio.create_task(self._meter.ask(task, self._age_s_max))
                self._asked[task.task_id] = _Asked(task, asking)

    async def wait(self, patience_s: float) -> None:
        """Until all have answered, or the patience is over."""
        asking = [a.asking for a in self._asked.values() if not a.asking.done()]
        if asking:
            await asyncio.wait(asking, timeout=patience_s)

    def take(self) -> tuple[list[TaskStats], list[str]]:
        """The answers that have come since the last time, and what is wrong that was not before."""
        answers = []
        for id_ in [id_ for id_, a in self._asked.items() if a.asking.done()]:
            asked = self._asked.pop(id_)
            error = asked.asking.exception()
            if error is None:
                self._failing.pop(id_, None)
                answers.append(asked.asking.result())
            else:
                self._failed(asked.task, error)
        return answers, self._problems()

    def _failed(self, task: Measurable, error: BaseException) -> None:
        message = error.message if isinstance(error, errors.SwarmError) else repr(error)
        known = self._failing.setdefault(task.task_id, _Failing(task, message, 0))
        known.message = message
        known.count += FAILURES_TOLD if isinstance(error, errors.TimedOut) else 1

    def _problems(self) -> list[str]:
        """One sentence for each runtime, once until all its tasks can be measured again."""
        by_runtime: dict[str, list[_Failing]] = {}
        for failing in self._failing.values():
            if failing.count >= FAILURES_TOLD:
                by_runtime.setdefault(failing.task.runtime.name, []).append(failing)
        new = [name for name in by_runtime if name not in self._told]
        self._told = set(by_runtime)
        out = []
        for name in new:
            first, *others = by_runtime[name]
            more = f" and {len(others)} more of runtime {name}" if others else ""
            out.append(f"task {first.task.name}{more} cannot be measured: {first.message}")
        return out

    async def close(self) -> None:
        asking = [a.asking for a in self._asked.values()]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
