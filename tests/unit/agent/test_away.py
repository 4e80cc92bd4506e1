"""A runtime that goes away, hangs or comes back: what the worker reports, and what it does again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from agent import hosts
from agent.description import About
from agent.disks import Room
from agent.runtime.base import Event, Failed, Started, Work
from agent.state import StateFile
from agent.worker import INTERRUPTIONS_MAX, Worker
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import Assignment, Assignments, ContainerSpec, Task, TaskSpec, TaskState, TaskStatus
from tests.fakes.runtime import FakeIngress, FakeRuntime, Script
from tests.fakes.waiting import until

S = TaskState


class Engine(FakeRuntime):
    """`lose(error)`: it goes away. `drop`: the answers that get lost, operation by operation; the
    engine has done what it was asked all the same.
    """

    def __init__(self, name: str = "docker") -> None:
        super().__init__(name, runtimes=(name,))
        self.drop: list[str] = []
        self.hangs = False
        self._lost = asyncio.Event()

    def lose(self, why: str = "connection refused") -> None:
        self.down = why
        self._lost.set()

    def come_back(self) -> None:
        self.down = ""

    async def events(self) -> AsyncIterator[Event]:
        self._lost.clear()
        queue = self._subscribers[-1]
        while True:
            getter = asyncio.create_task(queue.get())
            lost = asyncio.create_task(self._lost.wait())
            await asyncio.wait({getter, lost}, return_when=asyncio.FIRST_COMPLETED)
            lost.cancel()
            if not getter.done():
                getter.cancel()
                raise errors.Unavailable(self.down)
            event = getter.result()
            if event is None:
                return
            yield event

    async def prepare(self, work: Work) -> None:
        self._take("before prepare")
        await super().prepare(work)
        self._take("prepare")

    async def start(self, work: Work) -> Started:
        started = await super().start(work)
        self._take("start")
        return started

    def _take(self, operation: str) -> None:
        if operation in self.drop:
            self.drop.remove(operation)
            if self.hangs:
                raise errors.TimedOut("no answer within 60 s")
            self.lose()
            raise errors.Unavailable("connection reset")


def assignments(*ids: str, runtime: str = "", desired: TaskState = S.RUNNING) -> Assignments:
    spec = TaskSpec(container=ContainerSpec(image="busybox"), runtime=runtime)
    tasks = [Task(id=i, desired_state=desired) for i in ids]
    return Assignments(full=True, tasks=tuple(Assignment(task=t, spec=spec) for t in tasks))


def statuses(worker: Worker) -> dict[str, TaskStatus]:
    return {r.task_id: r.status for r in worker.reports() if r.status is not None}


def state(worker: Worker, task_id: str = "a") -> TaskState | None:
    found = statuses(worker).get(task_id)
    return found.state if found else None


@contextlib.asynccontextmanager
async def working(folder: Path, *runtimes: FakeRuntime) -> AsyncIterator[Worker]:
    worker = Worker(
        runtimes=runtimes,
        ingress=FakeIngress(),
        state=StateFile(folder),
        about=About("n1", "1.0"),
        clock=SystemClock(),
    )
    ready = asyncio.Event()
    running = asyncio.create_task(worker.run(ready.set))
    try:
        await ready.wait()
        yield worker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "RETRY_S_MIN", 0.01)


def causes(worker: Worker) -> Sequence[tuple[tuple[str, ...], str]]:
    return [(p.runtimes, p.cause) for p in worker.description().runtime_problems]


async def test_a_runtime_that_goes_away_is_a_problem_of_the_node_and_none_of_its_tasks(
    tmp_path: Path,
) -> None:
    engine, other = Engine(), Engine("process")
    async with working(tmp_path, engine, other) as worker:
        worker.assign(assignments("a"))
        await until(lambda: state(worker) == S.RUNNING)
        before = worker.reports()
        engine.lose("the engine hangs")
        await until(lambda: worker.description().runtime_problems)
        (problem,) = worker.description().runtime_problems
        assert problem.runtimes == ("docker",)
        assert problem.cause == "engine_unresponsive"
        assert "the engine hangs" in problem.message
        assert problem.since_ns > 0
        assert worker.description().runtimes == ("docker", "process"), "they stay listed"
        assert worker.reports() == before
        both = assignments("a").tasks + assignments("p", runtime="process").tasks
        worker.assign(Assignments(full=True, tasks=both))
        await until(lambda: state(worker, "p") == S.RUNNING, what=lambda: "the other goes on")
        engine.come_back()
        await until(lambda: not worker.description().runtime_problems)
        assert state(worker) == S.RUNNING
        assert engine.starts["a"] == 1


async def test_a_problem_keeps_its_beginning_while_its_words_change(tmp_path: Path) -> None:
    engine = Engine()
    async with working(tmp_path, engine) as worker:
        engine.lose("refused")
        await until(lambda: worker.description().runtime_problems)
        (first,) = worker.description().runtime_problems
        engine.down = "no answer"
        await until(lambda: "no answer" in worker.description().runtime_problems[0].message)
        assert worker.description().runtime_problems[0].since_ns == first.since_ns


@pytest.mark.parametrize("lost", ["before prepare", "prepare", "start"])
async def test_what_was_under_way_is_done_once_the_runtime_is_back(
    tmp_path: Path, lost: str
) -> None:
    engine = Engine()
    engine.drop = [lost]
    async with working(tmp_path, engine) as worker:
        worker.assign(assignments("a"))
        await until(lambda: worker.description().runtime_problems)
        assert state(worker) in (S.PREPARING, S.STARTING), "nothing is reported of it"
        engine.come_back()
        await until(lambda: state(worker) == S.RUNNING)
        assert engine.starts["a"] == 1
        assert list(engine.containers) == ["a"]


async def test_what_ended_while_nobody_could_see_it_has_failed_with_its_reason(
    tmp_path: Path,
) -> None:
    engine = Engine()
    engine.drop = ["start"]
    async with working(tmp_path, engine) as worker:
        worker.assign(assignments("a"))
        await until(lambda: worker.description().runtime_problems)
        engine.exit("a", 137, "killed")
        engine.come_back()
        await until(lambda: state(worker) == S.FAILED)
        assert statuses(worker)["a"].err == "task: non-zero exit (137): killed"
        assert engine.starts["a"] == 1


async def test_a_call_that_alone_gets_no_answer_is_the_engines_failure(tmp_path: Path) -> None:
    engine = Engine()
    engine.hangs, engine.drop = True, ["start"]
    async with working(tmp_path, engine) as worker:
        worker.assign(assignments("a"))
        await until(lambda: state(worker) == S.FAILED)
        assert statuses(worker)["a"].cause == "engine_failed"
        assert engine.running() == set(), "it was stopped, for nobody knew whether it ran"
        assert causes(worker) == []


async def test_a_task_at_which_the_engine_breaks_again_and_again_is_given_up(
    tmp_path: Path,
) -> None:
    engine = Engine()
    engine.drop = ["before prepare"] * 99
    async with working(tmp_path, engine) as worker:

        async def restart() -> None:
            while True:
                await until(lambda: engine.down)
                engine.come_back()

        restarting = asyncio.create_task(restart())
        worker.assign(assignments("a"))
        await until(lambda: state(worker) == S.FAILED)
        restarting.cancel()
        await asyncio.gather(restarting, return_exceptions=True)
        assert statuses(worker)["a"].cause == "engine_failed"
        assert len(engine.drop) == 99 - INTERRUPTIONS_MAX - 1


async def test_a_stop_waits_for_the_runtime_and_is_done_at_once_then(tmp_path: Path) -> None:
    engine = Engine()
    async with working(tmp_path, engine) as worker:
        worker.assign(assignments("a"))
        await until(lambda: state(worker) == S.RUNNING)
        engine.lose()
        await until(lambda: worker.description().runtime_problems)
        worker.assign(assignments("a", desired=S.SHUTDOWN))
        await asyncio.sleep(0)
        assert state(worker) == S.RUNNING
        engine.come_back()
        await until(lambda: state(worker) == S.SHUTDOWN, timeout_s=2.0)


async def test_a_full_disk_is_a_problem_until_there_is_room_again(tmp_path: Path) -> None:
    engine, other = Engine(), Engine("process")
    async with working(tmp_path, engine, other) as worker:
        changes: list[None] = []
        worker.on_change = lambda: changes.append(None)
        disks = worker._disks
        disks.take("docker", tmp_path, Room(1, 1000))
        (problem,) = worker.description().runtime_problems
        assert (problem.runtimes, problem.cause) == (("docker",), "disk_full")
        assert str(tmp_path) in problem.message
        assert changes
        disks.take("docker", tmp_path, Room(15, 1000))
        assert causes(worker) == [(("docker",), "disk_full")], "twice as much must be free"
        disks.take("docker", tmp_path, Room(20, 1000))
        assert causes(worker) == []


async def test_a_task_that_found_no_room_says_so(tmp_path: Path) -> None:
    engine = Engine()
    refusal = Failed("no space left on device", cause="disk_full")
    engine.script = lambda work: Script(prepare_error=refusal)
    async with working(tmp_path, engine) as worker:
        worker.assign(assignments("a"))
        await until(lambda: state(worker) == S.FAILED)
        assert statuses(worker)["a"].cause == "disk_full"
