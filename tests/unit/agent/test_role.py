"""What follows from a role: when a manager's state goes, and what has to be on the disk before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent import identity as ids
from agent import role as module
from agent.managing import FOLDER, Demoted
from agent.role import Role
from swarm import errors
from swarm.v1 import NodeRole
from tests.fakes.waiting import until
from tests.unit.agent.parts import Here, Others


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S_MIN", 0.01)
    monkeypatch.setattr(module, "LOOK_S", 0.01)


class Scene:
    """A node with a manager's state, and its role."""

    def __init__(self, folder: Path, *answers: NodeRole | errors.SwarmError) -> None:
        self.here = Here(folder)
        self.others = Others(*(answers or (errors.Unavailable("nobody answers"),)))
        self.state = folder / FOLDER
        self.state.mkdir()
        self.here.vault.make()
        self.renew = asyncio.Event()
        self.refuses_disk = False
        self.role = Role(
            self.here.managing,
            state_dir=folder,
            vault=self.here.vault,
            identity=lambda: self.here.identity,
            replace=self.replace,
            renew=self.renew,
            renewing=asyncio.Lock(),
            ask=lambda: self.others.issue,
        )

    async def replace(self, identity: ids.Identity) -> None:
        if self.refuses_disk:
            raise errors.Unavailable("the disk is full")
        assert self.state.exists(), "the state goes after the identity is on the disk"
        before, self.here.identity = self.here.identity, identity
        if before.role != identity.role:
            self.role.changed()

    @asynccontextmanager
    async def running(self, *, serves: bool = True) -> AsyncIterator[None]:
        task = asyncio.create_task(self.role.run())
        try:
            if serves:
                await until(lambda: self.here.managing.serving)
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def kept(self) -> bool:
        """Whether all that a manager has is there."""
        return self.state.exists() and self.here.vault.exists


async def test_a_demoted_manager_is_a_worker_once_others_say_so(tmp_path: Path) -> None:
    scene = Scene(
        tmp_path, NodeRole.MANAGER, errors.Unavailable("busy"), NodeRole.MANAGER, NodeRole.WORKER
    )
    async with scene.running():
        scene.here.part.end(Demoted("removed"))
        await scene.role.worker_alone.wait()
    assert scene.others.asked == 4
    assert scene.here.identity.role == NodeRole.WORKER
    assert scene.here.identity.certificate_pem == "certificate 4"
    assert not scene.state.exists() and not scene.here.vault.exists
    assert not scene.role.problem


async def test_nothing_goes_while_no_other_manager_answers(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    async with scene.running():
        scene.here.part.end(Demoted("removed"))
        await until(lambda: scene.others.asked >= 2)
        assert scene.kept and "nobody answers" in scene.role.problem
        scene.others.answers = [NodeRole.WORKER]
        scene.refuses_disk = True
        await until(lambda: "the disk is full" in scene.role.problem)
        assert scene.kept and scene.here.identity.role == NodeRole.MANAGER
        scene.refuses_disk = False
        await scene.role.worker_alone.wait()
    assert not scene.kept


async def test_one_that_was_promoted_again_meanwhile_comes_in_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEMOTION_S", 0.05)
    scene = Scene(tmp_path, NodeRole.MANAGER)
    async with scene.running():
        scene.here.part.end(Demoted("removed"))
        await until(lambda: scene.here.part.started == 2 and scene.here.managing.serving)
        assert not scene.state.exists(), "its member of etcd is none any more"
        assert scene.here.vault.exists
        assert scene.here.identity.certificate_pem == f"certificate {scene.others.asked}"


async def test_a_node_that_was_removed_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    scene = Scene(tmp_path, errors.Removed("this node was removed"))
    async with scene.running():
        scene.here.part.end(Demoted("removed"))
        await until(lambda: scene.role.problem == "this node was removed")
        await asyncio.sleep(0.05)
        assert scene.others.asked == 1 and scene.kept


async def test_roles_are_followed_both_ways(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.here.become(NodeRole.WORKER)
    async with scene.running(serves=False):
        await scene.role.worker_alone.wait()
        assert not scene.kept, "what a swarmd that was killed has left goes"
        scene.here.become(NodeRole.MANAGER)
        scene.role.changed()
        await until(lambda: scene.here.managing.serving)
        assert scene.here.vault.exists and not scene.role.worker_alone.is_set()
        scene.here.become(NodeRole.WORKER)
        scene.role.changed()
        await scene.role.worker_alone.wait()
        assert scene.here.part.stopped == 1 and not scene.here.vault.exists


async def test_stepping_down_passes_the_reason_on_and_changes_nothing(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.here.part.refuses = errors.Conflict("this would result in a loss of quorum")
    async with scene.running():
        with pytest.raises(errors.Conflict, match="loss of quorum"):
            await scene.role.step_down(())
        assert scene.here.managing.serving and scene.kept


async def test_stepping_down_ends_when_the_node_is_a_worker(tmp_path: Path) -> None:
    scene = Scene(tmp_path, NodeRole.WORKER)
    async with scene.running():
        leaving = asyncio.create_task(scene.role.step_down(()))
        await asyncio.sleep(0)
        scene.here.part.end(Demoted("removed"))
        await leaving
        assert scene.here.identity.role == NodeRole.WORKER and not scene.kept


async def test_stepping_down_outlives_a_manager_that_ends_before_it_answers(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path, errors.Unavailable("busy"), NodeRole.WORKER)
    part = scene.here.part

    async def step_down() -> None:
        part.end(Demoted("removed"))
        await until(lambda: scene.here.managing.part is None)
        raise errors.Unavailable("the store is closed")

    part.step_down = step_down  # type: ignore[method-assign]  # what this manager does
    async with scene.running():
        await scene.role.step_down(())
        assert scene.role.worker_alone.is_set() and scene.renew.is_set()


async def test_one_that_does_not_serve_asks_the_others(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.here.part.waits = "too few managers are there"
    async with scene.running(serves=False):
        await scene.here.managing.settled.wait()
        with pytest.raises(errors.Unavailable, match="no other manager is known"):
            await scene.role.step_down(())
