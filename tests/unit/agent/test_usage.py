"""What a node and its tasks use, measured for many callers."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from pathlib import Path

import pytest

from agent.usage import CALLERS_MAX, Measurable, Meter, read_node
from swarm import errors
from swarm.clock import SECOND_NS, SystemClock
from swarm.v1 import GpuLoad, NodeUsage, TaskStats, UsageOptions

FAST = SECOND_NS // 5
STAT = (
    "cpu  10 1 5 100 50 2 3 4 9 9\ncpu0 5 0 2 50 25 1 1 2 0 0\ncpu1 5 1 3 50 25 1 2 2 0 0\nintr 1\n"
)
MEMINFO = "MemTotal:  1000 kB\nMemFree: 100 kB\nMemAvailable:   400 kB\n"


class Counting:
    """A runtime that only measures."""

    def __init__(self, name: str = "docker") -> None:
        self.name = name
        self.asked: list[str] = []
        self.fails: dict[str, errors.SwarmError] = {}
        self.hangs = asyncio.Event()
        self.hangs.set()

    async def stats(self, task_id: str) -> TaskStats:
        self.asked.append(task_id)
        await self.hangs.wait()
        if task_id in self.fails:
            raise self.fails[task_id]
        return TaskStats(task_id=task_id, pids=len(self.asked))


class Bench:
    def __init__(self, folder: Path) -> None:
        self.docker, self.process = Counting(), Counting("process")
        self.tasks = [self.task("d1", self.docker), self.task("p1", self.process, service="s2")]
        self.meter = Meter(
            lambda: self.tasks,
            node_id="n1",
            clock=SystemClock(),
            folders=lambda: (folder,),
            gpus=lambda: (GpuLoad(uuid="GPU-1", percent=50),),
        )

    @staticmethod
    def task(id_: str, runtime: Counting, service: str = "s1") -> Measurable:
        return Measurable(id_, service, f"web.1.{id_}", runtime)  # type: ignore[arg-type]

    async def take(self, count: int, **options: object) -> list[NodeUsage]:
        out = []
        asked = UsageOptions(**{"period_ns": FAST, **options})  # type: ignore[arg-type]
        async with asyncio.timeout(10), aclosing(self.meter.measure(asked)) as usages:
            async for usage in usages:
                out.append(usage)
                if len(out) == count:
                    break
        return out


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def ids(usage: NodeUsage) -> list[str]:
    return sorted(stats.task_id for stats in usage.tasks)


def test_node_is_read_as_the_kernel_has_it(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    (tmp_path / "meminfo").write_text(MEMINFO)
    line = read_node((tmp_path,), proc=tmp_path)
    tick_ns = SECOND_NS // os.sysconf("SC_CLK_TCK")
    # Without idle, iowait, and the guests' time that is in user and nice already.
    assert (line.cpu_total_ns, line.cpus) == (25 * tick_ns, 2)
    assert (line.memory_bytes, line.memory_total_bytes) == (600 * 1024, 1000 * 1024)
    assert 0 < line.disk_bytes <= line.disk_total_bytes


def test_what_cannot_be_read_is_zero(tmp_path: Path) -> None:
    line = read_node((tmp_path / "gone",), proc=tmp_path)
    assert (line.cpu_total_ns, line.cpus, line.memory_total_bytes, line.disk_total_bytes) == (
        0,
        0,
        0,
        0,
    )


def test_the_disk_is_the_one_that_tasks_are_kept_on(tmp_path: Path) -> None:
    # Another file system than that of /; a remote engine's folder is not to be seen.
    line = read_node((tmp_path / "gone", Path("/dev/shm"), Path("/")), proc=tmp_path)
    found = os.statvfs("/dev/shm")
    assert line.disk_total_bytes == found.f_blocks * found.f_frsize


async def test_one_measurement_has_the_node_its_gpus_and_all_tasks(bench: Bench) -> None:
    first, second = await bench.take(2)
    assert (first.node_id, first.gpus[0].uuid, ids(first)) == ("n1", "GPU-1", ["d1", "p1"])
    assert second.timestamp_ns - first.timestamp_ns >= 0.9 * FAST
    assert second.cpu_total_ns >= first.cpu_total_ns > 0
    assert first.cpus >= 1
    assert first.memory_total_bytes > first.memory_bytes > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"task_ids": ("d1",)}, ["d1"]),
        ({"service_ids": ("s2",)}, ["p1"]),
        ({"task_ids": ("d1",), "service_ids": ("s2",)}, ["d1", "p1"]),
        ({"task_ids": ("nope",)}, []),
        ({"node_only": True}, []),
    ],
)
async def test_only_what_is_asked_for_is_measured(
    bench: Bench, options: dict[str, object], expected: list[str]
) -> None:
    (usage,) = await bench.take(1, **options)
    assert ids(usage) == expected
    assert sorted(bench.docker.asked + bench.process.asked) == expected


async def test_tasks_that_come_and_go_are_followed(bench: Bench) -> None:
    async with asyncio.timeout(10):
        async with aclosing(bench.meter.measure(UsageOptions(period_ns=FAST))) as usages:
            assert ids(await anext(usages)) == ["d1", "p1"]
            bench.tasks = [bench.task("d2", bench.docker)]
            assert ids(await anext(usages)) == ["d2"]


async def test_once_is_two_measurements(bench: Bench) -> None:
    assert [ids(u) for u in await bench.take(5, once=True)] == [["d1", "p1"]] * 2


async def test_slow_runtime_does_not_hold_up_the_node_and_the_others(bench: Bench) -> None:
    bench.docker.hangs.clear()
    async with asyncio.timeout(10):
        async with aclosing(bench.meter.measure(UsageOptions(period_ns=FAST))) as usages:
            for _ in range(3):
                assert ids(await anext(usages)) == ["p1"]
            assert bench.docker.asked == ["d1"], "asked again while it has not answered"
            bench.docker.hangs.set()
            assert ids(await anext(usages)) == ["d1", "p1"]


async def test_task_that_cannot_be_measured_is_told_once_until_it_can(bench: Bench) -> None:
    bench.tasks.append(bench.task("d2", bench.docker))
    async with asyncio.timeout(10):
        async with aclosing(bench.meter.measure(UsageOptions(period_ns=FAST))) as usages:
            await anext(usages)
            bench.docker.fails = {id_: errors.NotFound("no container") for id_ in ("d1", "d2")}
            said = [(await anext(usages)).problems for _ in range(4)]
            assert said == [
                (),
                ("task web.1.d1 and 1 more of runtime docker cannot be measured: no container",),
                (),
                (),
            ]
            bench.docker.fails = {}
            assert ids(await anext(usages)) == ["d1", "d2", "p1"]
            bench.docker.fails = {"d1": errors.NotFound("gone again")}
            said = [(await anext(usages)).problems for _ in range(2)]
            assert said[1] == ("task web.1.d1 cannot be measured: gone again",)


async def test_callers_share_answers(bench: Bench) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(bench.take(1))
            await asyncio.sleep(0.01)
    assert bench.process.asked.count("p1") < 5


async def test_limits_are_told(bench: Bench) -> None:
    for period_ns in (1, SECOND_NS // 6, 4000 * SECOND_NS):
        with pytest.raises(errors.Invalid, match="it must be from 0.2 s to 3600 s"):
            await bench.take(1, period_ns=period_ns)
    held = [bench.meter.measure(UsageOptions()) for _ in range(CALLERS_MAX)]
    for usages in held:
        await anext(usages)
    with pytest.raises(errors.Exhausted, match="measured for 20 callers already"):
        await bench.take(1)
    for usages in held:
        await usages.aclose()
    assert len(await bench.take(1)) == 1


async def test_caller_that_leaves_ends_its_questions(bench: Bench) -> None:
    bench.docker.hangs.clear()
    await bench.take(1)
    assert [t for t in asyncio.all_tasks() if "ask" in repr(t.get_coro())] == []
