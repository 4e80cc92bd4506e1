"""What becomes of a manager when one of its parts fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from manager import main
from manager.control import ControlLoop
from manager.store.engines.embedded import EmbeddedEngine
from swarm import errors
from swarm.clock import SystemClock
from swarm.ids import seeded_rng
from swarm.v1 import InitRequest, Node
from swarm.vault import Vault
from tests.fakes.waiting import until
from tests.ports import free_ports


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[main.Manager, asyncio.Task[None]]]:
    """A manager that runs, on the embedded store."""
    clock, rng = SystemClock(), seeded_rng(1)
    vault = Vault(folder / "node.key")
    vault.make()
    new = await main.bootstrap(
        folder,
        InitRequest(store="embedded"),
        vault=vault,
        hostname="h",
        advertise_addr="127.0.0.1:2377",
        clock=clock,
        rng=rng,
    )
    (port,) = free_ports(1)
    settings = main.Settings(
        state_dir=folder,
        node_id=new.node.id,
        listen_addr=f"127.0.0.1:{port}",
        advertise_addr="127.0.0.1:2377",
        key_pem=new.key_pem,
        certificate_pem=new.certificate_pem,
        version="1",
    )
    manager = main.Manager(settings, clock, rng, vault=vault)
    await manager.start()
    task = asyncio.create_task(manager.run(lambda: None))
    try:
        yield manager, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await manager.stop()


async def test_part_that_a_defect_ended_runs_again_and_the_problem_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0

    async def fails_once(self: object) -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise ExceptionGroup("parts", [ZeroDivisionError("a defect")])
        await asyncio.Event().wait()

    monkeypatch.setattr(ControlLoop, "run", fails_once)
    async with running(tmp_path) as (manager, task):
        await until(lambda: begun == 2)
        assert not task.done()
        assert "control loop failed (ZeroDivisionError('a defect')" in "".join(
            manager.problems.values()
        )


async def test_store_that_can_write_no_more_ends_the_manager_and_is_not_tried_again(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as (manager, task):
        engine: Any = manager.store.engine
        await until(lambda: engine._fence is not None)
        engine._give_up(errors.Unavailable("the disk failed to sync"))
        await asyncio.wait({task}, timeout=5)
        error = task.exception()
        assert isinstance(error, ExceptionGroup)
        assert error.subgroup(errors.Internal) is not None
        assert error.subgroup(errors.Unavailable) is None


async def test_disk_that_is_full_at_the_start_delays_leadership_and_not_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign, full = EmbeddedEngine.campaign, True

    async def refused(self: EmbeddedEngine, node_id: str) -> Any:
        if full:
            raise errors.Unavailable("the disk is full")
        return await campaign(self, node_id)

    monkeypatch.setattr(EmbeddedEngine, "campaign", refused)
    async with running(tmp_path) as (manager, task):
        await until(lambda: manager.problems.get("leadership") == "the disk is full")
        assert manager.store.count(Node) == 1
        full = False
        await until(lambda: not manager.problems)
        assert not task.done()
