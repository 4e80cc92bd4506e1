"""The worker over a runtime in memory: what a second look at the host may conclude."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent import hosts
from agent.description import About
from agent.runtime.base import Event, Found
from agent.state import StateFile
from agent.worker import Worker
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import Assignment, Assignments, ContainerSpec, Gpu, Task, TaskSpec, TaskState
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
