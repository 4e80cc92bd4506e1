"""Three managers with etcd and three workers on the test bed, clients at work through all managers,
and one fault after another.

After each fault: what clients were told is linearizable and nothing acknowledged is lost, no task
was started twice, no slot had two tasks at a time that could be told to stop, the cluster is whole
again, and each slot has exactly one task that beats.

MANAGER_FAULT_ROUNDS=n with `-m ''` runs the long form: each fault n times, pauses and cuts of 15 to
20 s. What is jumped is swarmd's wall clock, by libfaketime. etcd, a Go program, asks the kernel
itself, which has one wall clock for all hosts of the bed; its leases and elections go by monotonic
time.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from deploy.testbed import Bed, Host
from swarm import errors
from swarm.v1 import ConfigSpec, CreateRequest, Kind, RemoveRequest, Spec
from swarm.v1.services import ControlClient
from tests.e2e import slow_disk
from tests.e2e.cluster import wait_for
from tests.e2e.load import Load
from tests.e2e.managers import Managers, cut_apart, etcds, kill, pause, start
from tests.e2e.scene import Scene

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = int(os.environ.get("MANAGER_FAULT_ROUNDS", "0"))
PAUSE_S = 20.0 if ROUNDS else 6.0
CUT_S = 15.0 if ROUNDS else 5.0
AWAY_S = 5.0 if ROUNDS else 1.5  # of a killed manager
SLOW_MS = (50, 400) if ROUNDS else (300,)
TMPFS_BYTES = 300 << 20  # etcd's log alone takes 64 MiB, and as much for its next part
LARGE_BYTES = 500_000
JUMP_S = 3600
FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"


@pytest.fixture(scope="module")
def scene(bed: Bed) -> Iterator[Scene]:
    cluster = Managers(bed)
    for host in cluster.managers:
        host.up()
        slow_disk.install(host.folder / "bin")
        path = f"{host.folder / 'bin'}:{host.environment()['PATH']}"
        host.extra_environment["PATH"] = path
    cluster.up("--store", "etcd")
    cluster.converge()
    yield Scene(cluster)
    cluster.down()
    for host in cluster.managers:
        host.extra_environment.clear()


def hold(seconds: float) -> None:
    """Until a fault has lasted."""
    until = time.monotonic() + seconds
    wait_for("it has lasted", lambda: time.monotonic() >= until, timeout_s=seconds + 5)


def others(scene: Scene, *but: Host) -> list[str]:
    return [h.name for h in scene.cluster.managers if h not in but]


# ------------------------------------------------------------------ the faults


def kill_leader(scene: Scene, load: Load) -> None:
    leader = scene.cluster.leader()
    kill(leader)
    load.work(AWAY_S, others(scene, leader))
    start(leader)


def kill_follower(scene: Scene, load: Load) -> None:
    leader = scene.cluster.leader()
    follower = next(h for h in scene.cluster.managers if h is not leader)
    kill(follower)
    load.work(AWAY_S, others(scene, follower))
    start(follower)


def kill_all(scene: Scene, load: Load) -> None:
    kill(*scene.cluster.managers)
    start(*scene.cluster.managers)


def pause_leader(scene: Scene, load: Load) -> None:
    leader = scene.cluster.leader()
    pause(leader)
    try:
        load.work(PAUSE_S, others(scene, leader))
    finally:
        pause(leader, signal.SIGCONT)


def cut_leader(scene: Scene, load: Load) -> None:
    leader = scene.cluster.leader()
    with scene.absent((), cut=(leader,)):
        leader.cut()
        load.work(CUT_S, others(scene, leader))


def deafen_leader(scene: Scene, load: Load) -> None:
    """It hears nobody; all hear it."""
    leader = scene.cluster.leader()
    with scene.absent((), cut=(leader,)):
        leader.cut("in")
        load.work(CUT_S, others(scene, leader))


def mute_leader(scene: Scene, load: Load) -> None:
    """Nobody hears it; it hears all."""
    leader = scene.cluster.leader()
    with scene.absent((), cut=(leader,)):
        leader.cut("out")
        load.work(CUT_S, others(scene, leader))


def cut_in_halves(scene: Scene, load: Load) -> None:
    """The leader and a worker on one side, the majority on the other."""
    leader, worker = scene.cluster.leader(), scene.cluster.workers[0]
    rest = [h for h in scene.cluster.hosts if h not in (leader, worker)]
    with scene.absent((worker,), cut=(leader,)):
        cut_apart((leader, worker), rest)
        load.work(CUT_S, others(scene, leader))


def cut_a_link(scene: Scene, load: Load) -> None:
    """Two managers do not reach each other; the third reaches both."""
    leader = scene.cluster.leader()
    other = next(h for h in scene.cluster.managers if h is not leader)
    with scene.absent((), cut=(leader,)):
        cut_apart((leader,), (other,))
        hold(CUT_S)


def slow_disk_of_leader(scene: Scene, load: Load) -> None:
    leader = scene.cluster.etcd_leader()
    assert leader is not None
    delay = leader.folder / "bin" / "delay"
    for slow_ms in SLOW_MS:
        delay.write_text(str(slow_ms))
        try:
            load.work(CUT_S, others(scene, leader))
        finally:
            delay.write_text("0")


def full_disk(scene: Scene, load: Load) -> None:
    """A member's file system fills up until etcd ends, and is emptied again."""
    cluster = scene.cluster
    leader = cluster.leader()
    full = next(h for h in cluster.managers if h is not leader)
    with small_disk(scene, full) as ballast:
        load.progress(timeout_s=40)
        (before,) = etcds(full)
        fill(full, ballast)
        made = grow_until(scene, leader, lambda: before not in etcds(full))
        load.work(1.0, others(scene, full))
        full.run("rm", ballast)
        load.progress(timeout_s=40)
        for name in made:
            scene.cluster.ask(partial(remove_config, name=name), leader)


def clock_jumps(scene: Scene, load: Load) -> None:
    """A manager's and a worker's clock go an hour ahead, then an hour back."""
    (library,) = Path("/").glob(FAKETIME[1:])
    manager, worker = scene.cluster.leader(), scene.cluster.workers[1]
    for host in (manager, worker):
        clock = host.folder / "clock"
        clock.write_text("+0\n")
        host.extra_environment |= {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
    try:
        restart_with_worker(scene, load, manager, worker)
        for jump_s in (JUMP_S, -JUMP_S):
            for host in (manager, worker):
                (host.folder / "clock").write_text(f"{jump_s:+d}\n")
                load.work(CUT_S / 2)
    finally:
        for host in (manager, worker):
            for name in [n for n in host.extra_environment if n != "PATH"]:
                del host.extra_environment[name]
        restart_with_worker(scene, load, manager, worker)


def restart_with_worker(scene: Scene, load: Load, manager: Host, worker: Host) -> None:
    restart(manager)
    # An agent that is away for longer than its grace is given up.
    with scene.absent((worker,)):
        restart(worker)
    load.progress(timeout_s=40)


def rolling_restart(scene: Scene, load: Load) -> None:
    for host in scene.cluster.managers:
        restart(host)
        load.progress(timeout_s=40)


# Each change gets the first ones; the others are much alike in what they ask of the managers.
FAULTS: list[Callable[[Scene, Load], None]] = [
    kill_leader,
    kill_all,
    pause_leader,
    cut_in_halves,
    full_disk,
    rolling_restart,
]
MORE_FAULTS: list[Callable[[Scene, Load], None]] = [
    kill_follower,
    cut_leader,
    deafen_leader,
    mute_leader,
    cut_a_link,
    slow_disk_of_leader,
    clock_jumps,
]


@pytest.mark.parametrize("round_", range(max(1, ROUNDS)))
@pytest.mark.parametrize(
    "fault",
    [*FAULTS, *(pytest.param(fault, marks=pytest.mark.long) for fault in MORE_FAULTS)],
    ids=lambda f: f.__name__,
)
def test_nothing_is_lost_or_doubled(
    scene: Scene, fault: Callable[[Scene, Load], None], round_: int
) -> None:
    with scene.load() as load:
        fault(scene, load)


# ------------------------------------------------------------------ what the faults take


def restart(host: Host) -> None:
    host.stop("swarmd")
    start(host)


@contextmanager
def small_disk(scene: Scene, host: Host) -> Iterator[Path]:
    """The host's etcd on a file system of its own that is soon full; a file to fill it with."""
    (socket,) = (host.state_dir / "manager").rglob("client.sock:0")
    folder, kept = socket.parent, socket.parent.with_name("kept")
    host.stop("swarmd")
    folder.rename(kept)
    folder.mkdir(mode=0o700)
    options = f"size={TMPFS_BYTES},mode=700"
    host.run("mount", "-t", "tmpfs", "-o", options, "tmpfs", folder)
    host.run("cp", "-a", f"{kept}/.", folder)
    start(host)
    try:
        yield folder / "ballast"
    finally:
        host.stop("swarmd")
        shutil.rmtree(kept)
        host.run("cp", "-a", f"{folder}/.", kept)
        host.run("umount", folder)
        folder.rmdir()
        kept.rename(folder)
        start(host)


def fill(host: Host, ballast: Path) -> None:
    """Until there is no room."""
    host.run("sh", "-c", f"dd if=/dev/zero of={ballast} bs=64k 2>/dev/null || true")


def grow_until(scene: Scene, through: Host, done: Callable[[], bool]) -> list[str]:
    """Makes etcd write large objects; their names."""
    names: list[str] = []
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "a full disk goes unnoticed"
        names.append(f"large{time.monotonic_ns()}")
        spec = ConfigSpec(name=names[-1], data=os.urandom(LARGE_BYTES))
        request = CreateRequest(spec=Spec(config=spec))

        async def create(control: ControlClient, request: CreateRequest = request) -> None:
            await control.create(request, timeout_s=10)

        try:
            scene.cluster.ask(create, through)
        except (errors.Unavailable, errors.TimedOut):
            names.pop()
    return names


async def remove_config(control: ControlClient, name: str) -> None:
    await control.remove(RemoveRequest(kind=Kind.CONFIG, ref=name), timeout_s=10)
