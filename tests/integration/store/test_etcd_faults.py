"""Three managers on three etcd members while members die, stop, lose their network or their disk.

STORE_FAULT_ROUNDS=n in the environment repeats each fault n times over, with other seeds, and makes
cuts last longer than a client waits, so that some never learn what became of their writes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from manager.store import Draft
from swarm.v1 import Task
from tests.integration.store.arena import CLOCK, Arena, arena

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROUNDS = int(os.environ.get("STORE_FAULT_ROUNDS", "1"))
FAULT_S = 2.5  # longer than a lease and an election
CUT_S = FAULT_S / 2 if ROUNDS == 1 else 15.0
TMPFS_BYTES = 200 << 20  # etcd's log alone takes 64 MiB, and as much for its next part


async def kill_leader(a: Arena) -> None:
    leader = await a.leader()
    leader.etcd.kill()
    await a.work(0.5, a.others(leader))
    await asyncio.to_thread(leader.etcd.start)


async def kill_follower(a: Arena) -> None:
    follower = a.others(await a.leader())[0]
    follower.etcd.kill()
    await a.work(0.5, a.others(follower))
    await asyncio.to_thread(follower.etcd.start)


async def kill_all(a: Arena) -> None:
    for manager in a.managers:
        manager.etcd.kill()
    for manager in a.managers:
        manager.etcd.start(wait=False)
    for manager in a.managers:
        await asyncio.to_thread(manager.etcd.wait_ready)


async def pause_leader(a: Arena) -> None:
    leader = await a.leader()
    leader.etcd.signal(signal.SIGSTOP)
    try:
        await a.work(FAULT_S, a.others(leader))
    finally:
        leader.etcd.signal(signal.SIGCONT)


async def cut_clients(a: Arena) -> None:
    """One manager loses its member: both ways, then answers alone, then requests alone."""
    cut = await a.leader()
    for up, down in ((True, True), (False, True), (True, False)):
        cut.clients.cut(up=up, down=down)
        await a.work(CUT_S, a.others(cut))
        await a.until(lambda: not cut.engine.in_touch)
        await a.work(CUT_S, a.others(cut))
        cut.clients.heal()
        await a.until(lambda: cut.engine.in_touch)
        await a.progress()


async def slow_clients(a: Arena) -> None:
    slow = a.managers[0]
    slow.clients.delay_s = 0.2
    await a.work(FAULT_S)
    slow.clients.heal()


async def mute_leader(a: Arena) -> None:
    """etcd's leader hears the others, and they do not hear it."""
    leader = await a.leader()
    leader.peers.cut(up=False)
    await a.work(FAULT_S, a.others(leader))
    leader.peers.heal()


async def deaf_leader(a: Arena) -> None:
    """What others send to etcd's leader over their own connections does not arrive."""
    leader = await a.leader()
    leader.peers.cut(down=False)
    await a.work(FAULT_S, a.others(leader))
    leader.peers.heal()


FAULTS: list[Callable[[Arena], Awaitable[None]]] = [
    kill_leader,
    kill_follower,
    kill_all,
    pause_leader,
    cut_clients,
    slow_clients,
    mute_leader,
    deaf_leader,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
async def test_what_clients_were_told_is_right(
    tmp_path: Path, fault: Callable[[Arena], Awaitable[None]]
) -> None:
    for seed in range(ROUNDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        async with arena(folder, seed=seed) as a:
            await fault(a)
            await a.work(0.5)
        shutil.rmtree(folder)


async def test_state_changes_again_soon_after_the_leader_is_killed(tmp_path: Path) -> None:
    """The member that dies leads etcd, and its manager leads the cluster."""
    async with arena(tmp_path) as a:
        a.handing_round = False
        leader = await a.leader()
        # Leadership goes round until it is there.
        async with asyncio.timeout(30):
            while not a.led or a.led[-1][1].node_id != leader.name:
                a.handing_round = True
                await asyncio.sleep(0.01)
            a.handing_round = False
        count = len(a.led)
        killed_s = CLOCK.monotonic_s()
        leader.etcd.kill()
        write_s = await a.progress(a.others(leader)) - killed_s
        await a.until(lambda: len(a.led) > count)
        led_s, fence = a.led[count]
        assert fence.node_id != leader.name
        print(f"write_gap_s={write_s:.2f} new_leader_s={led_s - killed_s:.2f}")
        await asyncio.to_thread(leader.etcd.start)
    assert write_s < 4
    assert led_s - killed_s < 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is soon full."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)], check=True
    )
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.root
async def test_a_full_disk_under_one_member_stops_that_member_alone(
    tmp_path: Path, small_disk: Path
) -> None:
    def folder_of(name: str) -> Path:
        return small_disk if name == "m1" else tmp_path

    async with arena(tmp_path, folder_of=folder_of) as a:
        full = a.managers[0]
        ballast = small_disk / "ballast"
        with ballast.open("wb") as file:
            fill(file.fileno())
        async with asyncio.timeout(60):
            while full.etcd.running:
                await a.managers[1].store.update(grow)
        await a.work(0.5, a.others(full))
        ballast.unlink()
        full.etcd.kill()
        await asyncio.to_thread(full.etcd.start)


def grow(draft: Draft) -> None:
    """Makes etcd write half a megabyte."""
    known = draft.get(Task, "large") or Task(id="large", node_id="x" * 500_000)
    draft.put(replace(known, slot=known.slot + 1))


def fill(descriptor: int) -> None:
    """Until there is no room."""
    block = bytes(1 << 20)
    while len(block) > 1:
        try:
            os.write(descriptor, block)
        except OSError:
            block = block[: len(block) // 2]
