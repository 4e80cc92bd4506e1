"""The records on disk: written, read back, and damaged in every way."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from agent import state as module
from agent.state import FILE, Record, StateFile
from swarm import errors
from swarm.v1 import Assignment, Task, TaskSpec, TaskState, TaskStatus
from tests.fakes.waiting import until


def record(task_id: str, state: TaskState = TaskState.RUNNING) -> Record:
    return Record(
        Assignment(task=Task(id=task_id), spec=TaskSpec(runtime="process")),
        TaskStatus(state=state, timestamp_ns=5),
    )


@contextlib.asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[tuple[StateFile, tuple[Record, ...]]]:
    state = StateFile(folder)
    records = await state.open()
    running = asyncio.create_task(state.run())
    try:
        yield state, records
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await state.close()


async def read(folder: Path) -> tuple[Record, ...]:
    async with opened(folder) as (_, records):
        return records


async def test_records_come_back_as_they_were_put(tmp_path: Path) -> None:
    async with opened(tmp_path) as (state, records):
        assert records == ()
        state.put(record("a"))
        state.put(record("b", TaskState.PREPARING))
        state.put(record("b", TaskState.FAILED))
        state.put(record("c"))
        state.drop("c")
    assert await read(tmp_path) == (record("a"), record("b", TaskState.FAILED))


async def test_what_was_flushed_survives_a_kill(tmp_path: Path) -> None:
    async with opened(tmp_path / "live") as (state, _):
        state.put(record("a"))
        await state.flushed()
        shutil.copytree(tmp_path / "live", tmp_path / "after")  # the files at this moment
    assert await read(tmp_path / "after") == (record("a"),)


async def test_registry_credentials_are_not_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as (state, _):
        state.put(
            Record(
                Assignment(task=Task(id="a"), registry_auth="c2VjcmV0"),
                TaskStatus(state=TaskState.READY),
            )
        )
        await state.flushed()
        assert all(b"c2VjcmV0" not in p.read_bytes() for p in tmp_path.iterdir())


async def test_file_is_the_owners_alone(tmp_path: Path) -> None:
    await read(tmp_path)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def cut_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096])


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database, by no means " * 400)


def scribble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 2000] = b"\xff" * 2000
    path.write_bytes(bytes(data))


def other_tables(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE other (x)")


def broken_record(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE tasks SET assignment = x'ffffffff'")
        db.commit()


def other_columns(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE meta (x)")


@pytest.mark.parametrize(
    "damage", [truncate, cut_page, garbage, scribble, other_tables, other_columns, broken_record]
)
async def test_damaged_file_is_set_aside_and_named(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async with opened(tmp_path) as (state, _):
        for number in range(200):
            state.put(record(f"t{number}"))
    damage(tmp_path / FILE)
    async with opened(tmp_path) as (state, records):
        assert records == ()
        assert str(tmp_path / FILE) in state.problem
        assert (tmp_path / f"{FILE}.damaged-1").exists()
        state.put(record("new"))
    assert await read(tmp_path) == (record("new"),)


async def test_empty_file_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    async with opened(tmp_path) as (state, records):
        assert records == ()
        assert state.problem == ""


async def test_file_of_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as (state, _):
        state.put(record("a"))
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as db:
        db.execute("UPDATE meta SET format = 99")
        db.commit()
    state = StateFile(tmp_path)
    with pytest.raises(errors.Invalid, match="format 99, this version reads up to 1"):
        await state.open()
    await state.close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as db:
        assert db.execute("SELECT count(*) FROM tasks").fetchone() == (1,)


async def test_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state = StateFile(tmp_path / "file" / "worker")
    with pytest.raises(errors.Unavailable, match="cannot be opened"):
        await state.open()
    await state.close()


@pytest.mark.root
class TestFullDisk:
    """On a file system of half a mebibyte."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "small"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=True)
        yield folder
        subprocess.run(["umount", "--lazy", folder], check=True)

    @staticmethod
    def fill(disk: Path) -> None:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)

    async def test_records_wait_in_memory_until_there_is_room(
        self, disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "RETRY_S", 0.02)
        changes: list[str] = []
        async with opened(disk) as (state, _):
            state.on_change = lambda: changes.append(state.lack)
            state.put(record("before"))
            await state.flushed()
            self.fill(disk)
            for number in range(300):
                state.put(record(f"t{number}"))
            state.drop("before")
            await until(lambda: state.lack)
            assert str(disk / FILE) in state.lack
            state.put(record("t0", TaskState.FAILED))
            (disk / "filler").unlink()
            await state.flushed()
            await until(lambda: not state.lack)
            assert [bool(c) for c in changes] == [True, False]
        found = await read(disk)
        assert len(found) == 300
        assert record("t0", TaskState.FAILED) in found

    @pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
    async def test_an_agent_that_starts_on_a_full_disk_knows_its_tasks(
        self, disk: Path, killed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "RETRY_S", 0.02)
        folder = disk / "worker"
        async with opened(folder) as (state, _):
            state.put(record("a"))
            state.put(record("b"))
            await state.flushed()
            if killed:
                shutil.copytree(folder, disk / "copy")
        if killed:
            shutil.rmtree(folder)
            (disk / "copy").rename(folder)
            (folder / f"{FILE}-shm").unlink()
        self.fill(disk)
        async with opened(folder) as (state, records):
            assert records == (record("a"), record("b"))
            assert "cannot be written" in state.lack
            state.drop("a")
            (disk / "filler").unlink()
            await state.flushed()
            assert state.lack == ""
        assert await read(folder) == (record("b"),)

    async def test_a_first_start_on_a_full_disk_goes_on_without_records(
        self, disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "RETRY_S", 0.02)
        self.fill(disk)
        async with opened(disk / "worker") as (state, records):
            assert records == ()
            state.put(record("a"))
            (disk / "filler").unlink()
            await state.flushed()
        assert await read(disk / "worker") == (record("a"),)
