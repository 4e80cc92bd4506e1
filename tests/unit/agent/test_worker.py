"""The worker over a runtime in memory: what a second look at the host may conclude."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from agent import hosts
from agent.description import About
from agent.runtime.base import Event, Found
from agent.state import StateFile
from agent.worker import Worker
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import (
    Assignment,
    Assignments,
    ContainerSpec,
    DeviceRequest,
    Gpu,
    ResourceRequirements,
    Resources,
    Task,
    TaskSpec,
    TaskState,
)
from tests.fakes.runtime import FakeIngress, FakeRuntime
from tests.fakes.waiting import until


class Flaky(FakeRuntime):
    """Its event stream breaks when told so; the next look takes as long as the test likes."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = asyncio.Event()
        self.looking = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def adopt(self) -> tuple[Found, ...]:
        found = tuple(Found(i, c.phase, c.started) for i, c in self.containers.items())
        await super().adopt()
        self.looking.set()
        await self.go_on.wait()
        return found

    async def events(self) -> AsyncIterator[Event]:
        await self.broken.wait()
        self.broken.clear()
        raise errors.Unavailable("the engine restarts")
        yield


class Answering(FakeIngress):
    """Tasks are connected to until the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = asyncio.Event()

    async def finished(self, task_id: str, *, timeout_s: float) -> bool:
        await super().finished(task_id, timeout_s=timeout_s)
        await self.answered.wait()
        return True


def wanted(*names: str) -> Assignments:
    spec = TaskSpec(container=ContainerSpec(image="busybox"))
    tasks = [Task(id=name, desired_state=TaskState.RUNNING) for name in names]
    return Assignments(full=True, tasks=tuple(Assignment(task=t, spec=spec) for t in tasks))


def states(worker: Worker) -> dict[str, TaskState]:
    return {r.task_id: r.status.state for r in worker.reports() if r.status is not None}


async def test_a_task_started_while_the_runtime_is_looked_at_is_not_taken_for_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "RETRY_S_MIN", 0.01)
    runtime = Flaky()
    worker = Worker(
        runtimes=[runtime],
        ingress=FakeIngress(),
        state=StateFile(tmp_path),
        about=About("n1", "1.0"),
        clock=SystemClock(),
    )
    running = asyncio.create_task(worker.run(lambda: None))
    try:
        await until(runtime.looking.is_set)
        worker.assign(wanted("old", "lost"))
        await until(lambda: set(states(worker).values()) == {TaskState.RUNNING})
        runtime.looking.clear()
        runtime.go_on.clear()
        del runtime.containers["lost"]
        runtime.broken.set()
        await until(runtime.looking.is_set)  # it has seen what there is, and has not told it yet
        worker.assign(wanted("old", "lost", "new"))
        await until(lambda: states(worker)["new"] == TaskState.RUNNING)
        runtime.go_on.set()
        await until(lambda: states(worker)["lost"] == TaskState.FAILED)
        assert states(worker)["old"] == states(worker)["new"] == TaskState.RUNNING
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_gpus_are_told_when_they_change_and_not_otherwise(tmp_path: Path) -> None:
    worker = Worker(
        runtimes=[],
        ingress=FakeIngress(),
        state=StateFile(tmp_path),
        about=About("n1", "1.0"),
        clock=SystemClock(),
    )
    told = []
    worker.on_change = lambda: told.append(worker.description())
    for gpus, problem in (
        ((Gpu(uuid="a", healthy=True),), ""),
        ((Gpu(uuid="a", healthy=True),), ""),
        ((Gpu(uuid="a", health_message="lost"),), ""),
        ((Gpu(uuid="a", health_message="lost"),), "NVML cannot be used"),
    ):
        worker.use_gpus(gpus, problem)
    assert [d.gpus[0].healthy for d in told] == [True, False, False]
    assert told[-1].warnings == ("NVML cannot be used",)


async def test_a_task_answers_before_it_is_told_to_stop(tmp_path: Path) -> None:
    ingress = Answering()
    runtime = FakeRuntime()
    worker = Worker(
        runtimes=[runtime],
        ingress=ingress,
        state=StateFile(tmp_path),
        about=About("n1", "1.0"),
        clock=SystemClock(),
    )
    running = asyncio.create_task(worker.run(lambda: None))
    try:
        worker.assign(wanted("a"))
        await until(lambda: states(worker).get("a") == TaskState.RUNNING)
        worker.assign(Assignments(full=True))
        await until(lambda: ingress.finishing == [("a", 5.0)])
        assert "a" not in ingress.targets, "it takes no more connections"
        assert states(worker)["a"] == TaskState.RUNNING
        ingress.answered.set()
        await until(lambda: "a" not in states(worker))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_part_of_a_gpu_that_does_not_hold_is_told_with_the_task_and_with_the_node(
    tmp_path: Path,
) -> None:
    worker = Worker(
        runtimes=[FakeRuntime()],
        ingress=FakeIngress(),
        state=StateFile(tmp_path),
        about=About("n1", "1.0"),
        clock=SystemClock(),
    )
    half = DeviceRequest(capabilities=("gpu",), options={"fraction": "0.5"})
    spec = TaskSpec(
        container=ContainerSpec(image="busybox"),
        resources=ResourceRequirements(reservations=Resources(devices=(half,))),
    )
    task = Task(id="t", desired_state=TaskState.RUNNING, assigned_gpus=("GPU-1",))
    running = asyncio.create_task(worker.run(lambda: None))
    try:
        worker.use_gpus((Gpu(uuid="GPU-1", driver="nvidia", healthy=True),), "")
        assignment = Assignment(task=task, spec=spec, name="half.1")
        worker.assign(Assignments(full=True, tasks=(assignment,)))
        await until(lambda: states(worker) == {"t": TaskState.RUNNING})
        why = "its 0.5 of GPU GPU-1 is not enforced: no MPS control daemon runs here"
        [report] = worker.reports()
        assert report.status is not None
        assert report.status.message == f"started; {why}"
        assert worker.description().warnings == (f"task half.1: {why}",)
        worker.use_gpus(worker.description().gpus, "", mps="/run/mps")
        assert worker.description().warnings == ()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_task_that_is_told_to_stop_in_the_same_breath_is_not_started(
    tmp_path: Path,
) -> None:
    runtime = FakeRuntime()
    worker = Worker(
        runtimes=[runtime],
        ingress=FakeIngress(),
        state=StateFile(tmp_path),
        about=About("n1", "1.0"),
        clock=SystemClock(),
    )
    running = asyncio.create_task(worker.run(lambda: None))

    def told(desired: TaskState) -> Assignments:
        (one,) = wanted("a").tasks
        task = Task(id="a", desired_state=desired)
        return Assignments(full=True, tasks=(structs.replace(one, task=task),))

    try:
        worker.assign(told(TaskState.READY))
        await until(lambda: states(worker).get("a") == TaskState.READY)
        # As after a cut: what was sent meanwhile comes all at once.
        worker.assign(told(TaskState.RUNNING))
        worker.assign(told(TaskState.SHUTDOWN))
        await until(lambda: states(worker)["a"] == TaskState.SHUTDOWN)
        assert not runtime.starts
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
