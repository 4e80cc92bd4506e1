"""A node whose engine hangs, is killed or restarts: its tasks are neither lost nor doubled."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.runtime.docker import DockerRuntime, engine, events
from deploy.testbed import Bed, Host
from deploy.testbed.images import provide
from swarm.clock import SECOND_NS, SystemClock
from swarm.ids import new_id, system_rng
from swarm.v1 import (
    Assignment,
    Assignments,
    ContainerSpec,
    RuntimeProblem,
    TaskSpec,
    TaskState,
    TaskStatus,
)
from tests.fakes.node import Node, assignment
from tests.fakes.waiting import until

pytestmark = [pytest.mark.docker, pytest.mark.root]
S = TaskState
DEADLINE_S = 60.0
# A host of its own: other tests must not see their engine go away.
HOST = 4
NODE = new_id(system_rng())


@pytest.fixture(scope="module")
def away_host(bed: Bed) -> Iterator[Host]:
    host = bed.host(HOST)
    host.start_docker()
    provide(host)
    yield host
    host.kill("dockerd", signal.SIGCONT)


class Scene:
    """A node's worker over a real engine."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        runtime = DockerRuntime(
            socket=str(host.docker_socket),
            node_id=NODE,
            cluster_id="c" * 25,
            clock=SystemClock(),
        )
        self.node = Node(runtime, folder)
        self._wanted: tuple[Assignment, ...] = ()

    def add(self, *command: str) -> str:
        """Assigns one more task; its id."""
        task_id = new_id(system_rng())
        container = ContainerSpec(
            image="busybox:latest",
            args=command,
            pull_policy="missing",
            stop_grace_period_ns=SECOND_NS // 10,
        )
        spec = TaskSpec(container=container)
        self._wanted += (assignment(task_id, spec, node_id=NODE),)
        self.node.worker.assign(Assignments(full=True, tasks=self._wanted))
        return task_id

    def clear(self) -> None:
        self._wanted = ()
        self.node.worker.assign(Assignments(full=True))

    def status(self, task_id: str) -> TaskStatus:
        return self.node.status(task_id) or TaskStatus()

    async def reach(self, state: TaskState, *tasks: str) -> None:
        await until(
            lambda: all(self.status(t).state == state for t in tasks),
            timeout_s=DEADLINE_S,
            what=lambda: [self.status(t) for t in tasks],
        )

    def problems(self) -> tuple[RuntimeProblem, ...]:
        return self.node.worker.description().runtime_problems

    async def trouble(self, *, expected: bool) -> None:
        await until(
            lambda: bool(self.problems()) is expected,
            timeout_s=DEADLINE_S,
            what=lambda: self.problems(),
        )

    def containers(self, task_id: str) -> list[str]:
        label = f"label=com.docker.swarm.task.id={task_id}"
        return self.host.docker("ps", "-aq", "--filter", label).split()

    async def restart(self, *args: str) -> None:
        self.host.kill("dockerd")
        await self.trouble(expected=True)
        await asyncio.to_thread(self.host.start_docker, *args)


@pytest.fixture
async def scene(
    away_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scene]:
    monkeypatch.setattr(engine, "PING_S", 1.5)
    monkeypatch.setattr(events, "PING_PERIOD_S", 0.3)
    monkeypatch.setattr(events, "RECONNECT_S", 0.5)
    if not away_host.alive("dockerd"):
        await asyncio.to_thread(away_host.start_docker, "--live-restore=false")
    made = Scene(away_host, tmp_path)
    async with made.node:
        try:
            yield made
        finally:
            away_host.kill("dockerd", signal.SIGCONT)
            if not away_host.alive("dockerd"):
                await asyncio.to_thread(away_host.start_docker, "--live-restore=false")
            made.clear()
            with contextlib.suppress(AssertionError):
                await until(lambda: len(made.node.worker) == 0, timeout_s=DEADLINE_S)


async def test_a_hung_engine_is_a_problem_of_the_node_until_it_answers(scene: Scene) -> None:
    old = scene.add("sleep", "1000")
    await scene.reach(S.RUNNING, old)
    before = scene.status(old)
    scene.host.kill("dockerd", signal.SIGSTOP)
    await scene.trouble(expected=True)
    (problem,) = scene.problems()
    assert problem.cause == "engine_unresponsive"
    assert problem.runtimes[0] == "docker"
    assert "did not answer" in problem.message
    new = scene.add("sleep", "1000")
    await scene.reach(S.PREPARING, new)
    assert scene.status(old) == before
    scene.host.kill("dockerd", signal.SIGCONT)
    await scene.trouble(expected=False)
    await scene.reach(S.RUNNING, old, new)
    assert scene.status(old) == before
    assert [len(scene.containers(t)) for t in (old, new)] == [1, 1]


async def test_a_stop_reaches_a_task_whose_engine_hung(scene: Scene) -> None:
    task = scene.add("sleep", "1000")
    await scene.reach(S.RUNNING, task)
    scene.host.kill("dockerd", signal.SIGSTOP)
    await scene.trouble(expected=True)
    scene.clear()
    await asyncio.sleep(0)
    assert scene.status(task).state == S.RUNNING
    scene.host.kill("dockerd", signal.SIGCONT)
    await until(lambda: len(scene.node.worker) == 0, timeout_s=DEADLINE_S)
    assert scene.containers(task) == []


async def test_containers_that_went_with_their_engine_have_failed_because_of_it(
    scene: Scene,
) -> None:
    task = scene.add("sleep", "1000")
    await scene.reach(S.RUNNING, task)
    await scene.restart("--live-restore=false")
    await scene.reach(S.FAILED, task)
    assert scene.status(task).cause == "engine_failed"
    assert "restarted without live-restore" in scene.status(task).err
    await scene.trouble(expected=False)
    later = scene.add("sleep", "1000")
    await scene.reach(S.RUNNING, later)


async def test_starts_that_an_engine_died_in_are_done_once(scene: Scene) -> None:
    tasks = [scene.add("sleep", "1000") for _ in range(6)]
    await until(
        lambda: any(scene.status(t).state >= S.STARTING for t in tasks), timeout_s=DEADLINE_S
    )
    await scene.restart("--live-restore=false")
    await scene.trouble(expected=False)
    await until(
        lambda: all(scene.status(t).state in (S.RUNNING, S.FAILED) for t in tasks),
        timeout_s=DEADLINE_S,
        what=lambda: [scene.status(t) for t in tasks],
    )
    assert {scene.status(t).state for t in tasks} >= {S.RUNNING}
    for task in tasks:
        assert len(scene.containers(task)) <= 1
        status = scene.status(task)
        assert status.state == S.RUNNING or status.cause == "engine_failed", status


async def test_who_ends_in_peace_with_its_engine_is_not_complete(scene: Scene) -> None:
    """A program that ends with 0 when it is told to, as most do."""
    task = scene.add("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done")
    await scene.reach(S.RUNNING, task)
    await asyncio.sleep(0.5)
    await asyncio.to_thread(scene.host.stop, "dockerd")
    await asyncio.to_thread(scene.host.start_docker, "--live-restore=false")
    await scene.reach(S.FAILED, task)
    assert "with its engine" in scene.status(task).err


async def test_containers_that_outlive_their_engine_are_adopted(scene: Scene) -> None:
    await asyncio.to_thread(scene.host.stop, "dockerd")
    await asyncio.to_thread(scene.host.start_docker, "--live-restore=true")
    await scene.trouble(expected=False)
    stays, ends = scene.add("sleep", "1000"), scene.add("sh", "-c", "sleep 3; exit 4")
    await scene.reach(S.RUNNING, stays, ends)
    before = scene.status(stays)
    await scene.restart("--live-restore=true")
    await scene.reach(S.FAILED, ends)
    assert scene.status(ends).err.startswith("task: non-zero exit (4)")
    await scene.trouble(expected=False)
    assert scene.status(stays) == before
    assert len(scene.containers(stays)) == 1
    await asyncio.to_thread(scene.host.stop, "dockerd")
