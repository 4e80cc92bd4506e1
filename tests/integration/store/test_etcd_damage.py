"""Members whose disk is damaged, empty or full, and the last one of three that goes on alone."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from manager.store import Corrupt, Store
from manager.store.engines.etcd_damage import consistent_index
from manager.store.engines.etcd_member import READY_S
from manager.store.engines.etcd_wal import SEGMENT_BYTES, end_of
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import Task
from tests.integration.store.etcd_lab import Lab, eventually, open_lab, task_ids, until

pytestmark = pytest.mark.slow

CLOCK = SystemClock()
TASKS = 400


@pytest.fixture
async def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    # So that a small state has snapshots.
    monkeypatch.setattr("manager.store.engines.etcd_member.SNAPSHOT_ENTRIES", 100)
    async with open_lab(tmp_path.name) as made:
        yield made


async def filled(lab: Lab) -> Path:
    """A member that held TASKS tasks and has been killed; its data folder."""
    await lab.founded()
    store = await lab.store("n1")
    for i in range(TASKS):
        await store.update(lambda d, n=i: d.put(Task(id=f"t{n}")))  # type: ignore[misc]
    await store.close()
    member = lab.folder / "n1" / "data" / "member"
    # etcd writes its database ten times a second. Where that is far behind, a log that ends too
    # early is no damage that anybody could see.
    await until(lambda: (consistent_index(member / "snap" / "db") or 0) > TASKS)
    await lab.vanish("n1")
    return member


def last_log(member: Path) -> Path:
    return max(member.glob("wal/*.wal"))


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def noise(size: int) -> bytes:
    return bytes((i * 167 + 13) % 256 for i in range(size))


def used_bytes(log: Path) -> int:
    data = log.read_bytes().rstrip(b"\0")
    return len(data)


def cut_log(member: Path) -> None:
    os.truncate(last_log(member), used_bytes(last_log(member)) // 2 + 3)


def empty_log(member: Path) -> None:
    os.truncate(last_log(member), 0)


def zero_log(member: Path) -> None:
    log = last_log(member)
    half = used_bytes(log) // 2
    overwrite(log, half, bytes(used_bytes(log) - half))


def garble_log(member: Path) -> None:
    overwrite(last_log(member), used_bytes(last_log(member)) // 2, noise(500))


def garble_record(member: Path) -> None:
    """The value of one record, so that all lengths are right and its checksum is not."""
    log = last_log(member)
    data = log.read_bytes()
    at = data.index(b"t150", len(data[: data.index(b"t149")]))
    overwrite(log, at, b"t95")


def lose_log(member: Path) -> None:
    for path in member.glob("wal/*.wal"):
        path.unlink()


def lose_all(member: Path) -> None:
    shutil.rmtree(member.parent)


def lose_database(member: Path) -> None:
    (member / "snap" / "db").unlink()


def cut_database(member: Path) -> None:
    os.truncate(member / "snap" / "db", 9000)


def empty_database(member: Path) -> None:
    os.truncate(member / "snap" / "db", 0)


def garble_database(member: Path) -> None:
    overwrite(member / "snap" / "db", 0, noise(6 * 4096))


def garble_pages(member: Path) -> None:
    size = (member / "snap" / "db").stat().st_size
    overwrite(member / "snap" / "db", 2 * 4096, noise(size - 2 * 4096))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_log, r"wal/\S+\.wal is cut off"),
        (empty_log, r"wal/\S+\.wal is cut off"),
        # In the midst of a record the record is damaged.
        (zero_log, r"wal/\S+\.wal ends at entry \d+|member/wal is damaged; etcd says: "),
        (garble_log, r"member/wal"),
        (garble_record, r"member/wal is damaged; etcd says: .*crc"),
        (lose_log, r"log in \S+/wal is gone"),
        (lose_all, r"log in \S+/wal is gone"),
        (lose_database, r"snap/db is damaged; etcd says: "),
        (cut_database, r"snap/db is damaged; etcd says: "),
        (empty_database, r"snap/db is damaged; etcd says: "),
        (garble_database, r"snap/db is damaged; etcd says: "),
        (garble_pages, r"snap/db is damaged; etcd says: "),
    ],
)
async def test_damaged_data_is_refused_by_name_with_what_to_do(
    lab: Lab, damage: Callable[[Path], None], named: str
) -> None:
    data = await filled(lab)
    damage(data)
    assert lab.members["n1"].initialized
    began_s = CLOCK.monotonic_s()
    with pytest.raises(Corrupt, match=named) as caught:
        await lab.start("n1")
    assert CLOCK.monotonic_s() - began_s < READY_S
    assert "swarmctl swarm restore FILE" in caught.value.message
    assert "swarmctl swarm leave --force" in caught.value.message
    assert "{" not in caught.value.message and "goroutine" not in caught.value.message
    assert lab.members["n1"].pid is None
    print(caught.value.message)


async def test_what_only_looks_like_damage_is_none(lab: Lab) -> None:
    """A log that a power loss tore amid the last record, and one cut short between two records as a
    full disk leaves it: etcd goes on with what was agreed, and all of it is there.
    """
    data = await filled(lab)
    log = last_log(data)
    end = used_bytes(log)
    torn = (4096).to_bytes(8, "little") + b"\x08\x02"  # of 4 KiB two bytes came down
    overwrite(log, end + (-end % 8), torn)
    await lab.start("n1")
    store = await lab.store("n1")
    assert len(task_ids(store)) == TASKS
    await store.update(lambda d: d.put(Task(id="after")))
    await store.close()
    await lab.vanish("n1")
    log = last_log(data)
    end = used_bytes(log)
    os.truncate(log, end + (-end % 8))
    await lab.start("n1")
    store = await lab.store("n1")
    assert len(task_ids(store)) == TASKS + 1


async def test_the_examination_knows_where_log_and_database_end(lab: Lab) -> None:
    data = await filled(lab)
    end, applied = end_of(last_log(data)), consistent_index(data / "snap" / "db")
    assert end is not None and applied is not None
    assert TASKS < applied <= end.index and not end.torn
    assert end.size == SEGMENT_BYTES


async def test_a_member_damaged_while_it_runs_says_so_and_is_not_restarted_madly(lab: Lab) -> None:
    data = await filled(lab)
    await lab.start("n1")
    member = lab.members["n1"]
    garble_record(data)
    os.kill(member.pid or 0, 9)
    await until(lambda: "damaged" in member.problem)
    assert member.pid is None and not lab.running["n1"].done()


# ------------------------------------------------------------------ alone


async def test_the_last_of_three_goes_on_alone_and_takes_others_again(lab: Lab) -> None:
    await lab.founded()
    for name in ("n2", "n3"):
        await lab.grown(name)
    store = await lab.store("n3")
    for i in range(50):
        await eventually(lambda n=i: store.update(lambda d: d.put(Task(id=f"t{n}"))))  # type: ignore[misc]
    await store.close()
    for name in ("n1", "n2", "n3"):
        await lab.vanish(name)
    # It comes up, and nobody agrees with it.
    await lab.start("n3")
    async with lab.of("n3") as members:
        assert not await members.all_healthy()
    await lab.stop("n3")

    began_s = CLOCK.monotonic_s()
    await lab.start("n3", force_new_cluster=True)
    print(f"alone after {CLOCK.monotonic_s() - began_s:.2f} s")
    async with lab.of("n3") as members:
        assert [p.name for p in await members.list()] == ["n3"]
    store = await lab.store("n3")
    assert task_ids(store) == {f"t{i}" for i in range(50)}
    await store.update(lambda d: d.put(Task(id="alone")))

    # Restarts after it are as any: of the process alone, and by a start.
    pid = lab.members["n3"].pid
    os.kill(pid or 0, 9)
    await until(lambda: lab.members["n3"].pid not in (pid, None))
    command = Path(f"/proc/{lab.members['n3'].pid}/cmdline").read_bytes()
    assert b"force-new-cluster" not in command
    await lab.wait_healthy("n3")
    await lab.grown("n4", by="n3")
    await eventually(lambda: store.update(lambda d: d.put(Task(id="again"))))
    fourth = await lab.store("n4")
    assert task_ids(fourth) == {f"t{i}" for i in range(50)} | {"alone", "again"}

    # One of those that were gone comes back: it is a member no more.
    await lab.start("n1")
    await lab.removed("n1")


async def test_what_has_no_data_cannot_go_on_alone(lab: Lab) -> None:
    lab.make("n1")
    with pytest.raises(Corrupt, match="is gone"):
        await lab.start("n1", force_new_cluster=True)


# ------------------------------------------------------------------ a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("needs root: mounts a file system")
    folder = Path("/tmp") / f"swarm-disk-{os.getpid()}"
    folder.mkdir()
    # Two log files of 64 MB that etcd makes beforehand, and a little.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


@pytest.mark.root
async def test_a_full_disk_is_said_and_it_comes_back_with_room(lab: Lab, small_disk: Path) -> None:
    member = lab.make("n1", folder=small_disk / "n1")
    await lab.start("n1")
    store = await lab.store("n1")
    await store.update(lambda d: d.put(Task(id="before")))
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free)
    done: set[str] = set()
    said: list[errors.SwarmError] = []

    async def fill(store: Store) -> None:
        for i in range(10_000):
            try:
                await store.update(
                    lambda d, n=i: d.put(Task(id=f"t{n}", node_id="x" * 60_000))  # type: ignore[misc]
                )
                done.add(f"t{i}")
            except errors.SwarmError as error:
                said.append(error)
                return

    async with asyncio.timeout(90):
        await fill(store)
    await until(lambda: "no space left on device" in member.problem)
    print(f"{len(done)} written; then {said[0]!r}; problem: {member.problem}")
    assert isinstance(said[0], (errors.Unavailable, errors.TimedOut))
    assert f"make room on the file system of {small_disk / 'n1'}" in member.problem
    assert "{" not in member.problem
    ballast.unlink()
    await until(lambda: not member.problem, within_s=30)
    await eventually(lambda: store.update(lambda d: d.put(Task(id="after"))))
    assert done | {"before", "after"} <= task_ids(store)
    await store.close()
