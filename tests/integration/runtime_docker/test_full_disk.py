"""An engine whose disk is full: what its tasks and its node say, and that it goes on."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import disks
from agent.runtime.docker import DockerRuntime
from deploy.testbed import BASE, Bed, Host, Registry
from deploy.testbed.images import provide
from swarm.clock import SystemClock
from swarm.ids import new_id, system_rng
from swarm.v1 import Assignment, Assignments, ContainerSpec, TaskSpec, TaskState, TaskStatus
from tests.fakes.node import Node, assignment
from tests.fakes.waiting import until

pytestmark = [pytest.mark.docker, pytest.mark.root]
S = TaskState
# A host of its own, for its engine is not where others expect it.
HOST = 6
NODE = new_id(system_rng())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Made before the host, which sees it then; the test's process sees it, too."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def host(bed: Bed, disk: Path) -> Iterator[Host]:
    host = bed.host(HOST)
    host.start_docker("--data-root", str(disk))
    provide(host)
    yield host
    host.stop("dockerd")
    host.down()


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return filler


def wanted(image: str, task_id: str) -> Assignment:
    container = ContainerSpec(
        image=image,
        args=("sleep", "1000"),
        pull_policy="missing",
        stop_grace_period_ns=10**8,
    )
    return assignment(task_id, TaskSpec(container=container), node_id=NODE)


async def test_without_room_tasks_and_node_say_so_until_there_is_some(
    host: Host, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "PERIOD_S", 0.2)
    registry = Registry(host)
    registry.start()
    registry.push(host, BASE, ["base:1"])
    host.docker("rmi", BASE)  # its layers would not have to be pulled
    node = Node(
        DockerRuntime(
            socket=str(host.docker_socket),
            node_id=NODE,
            cluster_id="c" * 25,
            clock=SystemClock(),
        ),
        tmp_path / "state",
    )
    local, remote = new_id(system_rng()), new_id(system_rng())

    def status(task_id: str) -> TaskStatus:
        return node.status(task_id) or TaskStatus()

    async with node:
        filler = fill(disk)
        await until(lambda: node.worker.description().runtime_problems)
        (problem,) = node.worker.description().runtime_problems
        assert (problem.cause, problem.runtimes[0]) == ("disk_full", "docker")
        assert str(disk) in problem.message
        image = f"{registry.address}/base:1"
        tasks = (wanted("web:latest", local), wanted(image, remote))
        node.worker.assign(Assignments(full=True, tasks=tasks))
        await until(
            lambda: all(status(t).state == S.FAILED for t in (local, remote)), timeout_s=30.0
        )
        for task_id in (local, remote):
            assert status(task_id).cause == "disk_full", status(task_id)
            assert "free some space" in status(task_id).err
        filler.unlink()
        await until(lambda: not node.worker.description().runtime_problems)
        again = new_id(system_rng())
        node.worker.assign(Assignments(full=True, tasks=(wanted(image, again),)))
        await until(
            lambda: status(again).state == S.RUNNING, timeout_s=30.0, what=lambda: status(again)
        )
        node.worker.assign(Assignments(full=True))
        await until(lambda: len(node.worker) == 0, timeout_s=30.0)
    registry.stop()
