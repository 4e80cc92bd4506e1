"""The embedded engine on real files: full disks, damaged files, two processes."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from manager.store import Corrupt, Deposed, Draft, Fence, Op, Stale, Store, codec
from manager.store.engines import embedded, preconditions, state_file
from manager.store.engines.embedded import EmbeddedEngine
from manager.store.engines.memory import MemoryEngine
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import Config, ConfigSpec, Kind, Node, Service, ServiceSpec, Task

CLOCK = SystemClock()
TASK = int(Kind.TASK)
MNT_DETACH = 2


def big(n: int, size: int = 100_000) -> Config:
    return Config(id=f"c{n}", spec=ConfigSpec(name=f"c{n}", data=os.urandom(size)))


async def opened(path: Path) -> Store:
    store = Store(EmbeddedEngine(path, CLOCK), CLOCK)
    await store.open()
    return store


async def filled(path: Path, objects: int = 200) -> int:
    """A state file, closed in order; its revision."""
    store = await opened(path)

    def fill(draft: Draft) -> None:
        draft.put(Service(id="s", spec=ServiceSpec(name="web")))
        for n in range(objects):
            draft.put(Task(id=f"t{n}", service_id="s", slot=n, node_id=f"n{n % 7}"))

    await store.update(fill)
    await store.close()
    return store.revision


# ------------------------------------------------------------------ what every engine promises


@pytest.fixture(params=["memory", "embedded"])
def make_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    """Makes the engine; again: the same state after a restart."""
    if request.param == "embedded":
        return lambda: EmbeddedEngine(tmp_path / "store.db", CLOCK)
    engine = MemoryEngine(CLOCK)
    return lambda: engine


async def started(engine: Any, log: list[Any] | None = None) -> Any:
    list((await engine.load())[1])
    engine.start(lambda *commit: log.append(commit) if log is not None else None)
    return engine


async def test_commits_are_reported_once_in_order_before_their_writer(
    make_engine: Callable[[], Any],
) -> None:
    log: list[Any] = []
    engine = await started(make_engine(), log)

    async def write(n: int) -> None:
        ops = [Op(TASK, f"t{n}", b"x", 0)]
        revision = await engine.commit(ops, [], None, f"w{n}")
        assert [(r, o, w) for r, _, o, w in log if r == revision] == [(revision, ops, f"w{n}")]

    await asyncio.gather(*(write(n) for n in range(200)))
    assert [revision for revision, *_ in log] == list(range(1, 201))
    await engine.close()


async def test_one_manager_is_present_while_it_is_announced_and_always_in_touch(
    make_engine: Callable[[], Any],
) -> None:
    engine = await started(make_engine())
    assert engine.present() == frozenset()
    announcing = asyncio.create_task(engine.announce("n1"))
    assert await engine.present_changed(frozenset()) == {"n1"}
    await engine.barrier()
    await engine.forget("n2")
    assert engine.present() == {"n1"}
    announcing.cancel()
    assert await engine.present_changed(frozenset(("n1",))) == frozenset()
    assert engine.in_touch
    await engine.close()
    with pytest.raises(errors.Unavailable):
        await engine.barrier()


async def test_an_engines_facts_are_its_name_and_its_size(
    make_engine: Callable[[], Any],
) -> None:
    engine = await started(make_engine())
    ops = [Op(TASK, f"t{n}", bytes(1_000), 0) for n in range(1_000)]
    revision = await engine.commit(ops, [], None)
    full = await engine.facts()
    assert full.version == engine.name
    assert 1_000_000 <= full.bytes_used <= full.bytes
    await engine.commit([Op(TASK, f"t{n}", None, revision) for n in range(1_000)], [], None)
    assert (await engine.facts()).bytes_used < full.bytes_used / 2
    await engine.close()


@pytest.mark.parametrize(
    ("expected", "accepted"), [(None, True), (1, True), (0, False), (2, False)]
)
async def test_a_row_must_be_at_the_version_expected(
    make_engine: Callable[[], Any], expected: int | None, accepted: bool
) -> None:
    engine = await started(make_engine())
    await engine.commit([Op(TASK, "t", b"x", 0)], [], None)
    for ops, requires in (
        ([Op(TASK, "u", b"y", None)], [Op(TASK, "t", None, expected)]),
        ([Op(TASK, "u", b"y", None), Op(TASK, "t", b"y", expected)], []),
    ):
        if accepted:
            await engine.commit(ops, requires, None)
        else:
            with pytest.raises(Stale):
                await engine.commit(ops, requires, None)
    await engine.close()
    engine = make_engine()
    revision, rows = await engine.load()
    found = {row.id: (row.version, row.value) for row in rows}
    assert found == ({"t": (3, b"y"), "u": (3, b"y")} if accepted else {"t": (1, b"x")})
    assert revision == (3 if accepted else 1)
    await engine.close()


async def test_of_two_creations_in_one_group_the_first_wins(
    make_engine: Callable[[], Any],
) -> None:
    engine = await started(make_engine())
    results = await asyncio.gather(
        *(engine.commit([Op(TASK, "t", b"x", 0)], [], None) for _ in range(10)),
        return_exceptions=True,
    )
    assert results[0] == 1
    assert all(isinstance(r, Stale) for r in results[1:])
    await engine.close()


async def test_rows_come_back_sorted_and_with_their_versions(
    make_engine: Callable[[], Any],
) -> None:
    engine = await started(make_engine())
    await engine.commit([Op(7, "b", b"1", 0), Op(7, "a", b"2", 0), Op(2, "z", b"", 0)], [], None)
    await engine.commit([Op(7, "b", None, 1), Op(3, "é\0", b"\0\xff", 0)], [], None)
    await engine.close()
    engine = make_engine()
    revision, rows = await engine.load()
    assert revision == 2
    assert [(r.table, r.id, r.version, r.value) for r in rows] == [
        (2, "z", 1, b""),
        (3, "é\0", 2, b"\0\xff"),
        (7, "a", 1, b"2"),
    ]
    await engine.close()


async def test_leadership_ends_with_resignation_and_with_closing(
    make_engine: Callable[[], Any],
) -> None:
    engine = await started(make_engine())
    op = [Op(TASK, "t", b"x", None)]
    first = await engine.campaign("n")
    await engine.resign(first)
    with pytest.raises(Deposed):
        await engine.commit(op, [], first)
    second = await engine.campaign("n")
    await engine.resign(first)  # not its own any more: no effect
    await engine.commit(op, [], second)
    with pytest.raises(Deposed):
        await engine.commit(op, [], Fence("n", second.epoch + 1))
    waiting = asyncio.ensure_future(engine.wait_deposed(second))
    await asyncio.sleep(0)
    assert not waiting.done()
    await engine.close()
    async with asyncio.timeout(5):
        await waiting
    engine = await started(make_engine())
    with pytest.raises(Deposed):
        await engine.commit(op, [], second)
    assert (await engine.campaign("n")).epoch > second.epoch
    await engine.close()


# ------------------------------------------------------------------ full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    libc = ctypes.CDLL(None, use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        # Lazily, for a test that failed may have left its file open.
        assert libc.umount2(os.fsencode(folder), MNT_DETACH) == 0


@pytest.mark.root
async def test_a_full_disk_refuses_writes_until_there_is_space(small_disk: Path) -> None:
    store = await opened(small_disk / "store.db")
    await store.update(lambda d: d.put(Task(id="t", slot=1)))
    (small_disk / "ballast").write_bytes(bytes(300_000))

    async def fill() -> None:
        for _ in range(20):
            await store.update(lambda d: d.put(big(d.count(Config))))

    with pytest.raises(errors.Unavailable, match="nothing was changed. Free space"):
        await fill()
    kept, revision = store.count(Config), store.revision
    assert kept
    # All of one group fail alike, and what was there is still served.
    results = await asyncio.gather(
        *(store.update(lambda d, n=n: d.put(big(100 + n))) for n in range(5)),  # type: ignore[misc]
        return_exceptions=True,
    )
    assert {type(r) for r in results} == {errors.Unavailable}
    task = store.get(Task, "t")
    assert task is not None
    assert (task.slot, store.count(Config), store.revision) == (1, kept, revision)
    store.check_invariants()

    (small_disk / "ballast").unlink()
    await store.update(lambda d: d.put(big(200)))
    await store.update(lambda d: d.put(replace(task, slot=2)))
    await store.close()
    store = await opened(small_disk / "store.db")
    store.check_invariants()
    assert [t.slot for t in store.all(Task)] == [2]
    assert {c.id for c in store.all(Config)} == {*(f"c{n}" for n in range(kept)), "c200"}
    await store.close()


@pytest.mark.root
async def test_a_disk_too_full_for_the_file_is_said_on_opening(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(1_040_000))
    with pytest.raises(errors.Unavailable, match="disk is full"):
        await opened(small_disk / "store.db")
    (small_disk / "ballast").unlink()
    store = await opened(small_disk / "store.db")
    await store.close()


async def test_a_file_that_may_not_grow_refuses_writes_until_it_may(tmp_path: Path) -> None:
    store = await opened(tmp_path / "store.db")
    await store.update(lambda d: d.put(big(0)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
    try:
        with pytest.raises(errors.Unavailable, match="raise the limit"):
            await store.update(lambda d: d.put(big(1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.count(Config) == 1
    await store.update(lambda d: d.put(big(2)))
    await store.close()
    store = await opened(tmp_path / "store.db")
    assert {c.id for c in store.all(Config)} == {"c0", "c2"}
    await store.close()


async def test_after_a_failed_sync_nothing_more_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(tmp_path / "store.db")
    await store.update(lambda d: d.put(Task(id="t")))
    engine: Any = store.engine
    real = engine._db

    class Failing:
        in_transaction = True

        def execute(self, sql: str, *args: Any) -> Any:
            if sql == "COMMIT":
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
                raise error
            return real.execute(sql, *args)

        def close(self) -> None:
            real.close()

    monkeypatch.setattr(engine, "_db", Failing())
    with pytest.raises(errors.TimedOut, match="failed to sync"):
        await store.update(lambda d: d.put(Task(id="u")))
    monkeypatch.setattr(engine, "_db", real)
    with pytest.raises(errors.Unavailable, match="restart swarmd"):
        await store.update(lambda d: d.put(Task(id="v")))
    assert store.get(Task, "t") is not None
    await store.close()


async def test_a_defect_of_the_writer_answers_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(tmp_path / "store.db")

    def defect(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(preconditions, "problem", defect)
    async with asyncio.timeout(5):
        with pytest.raises(errors.Internal, match="ZeroDivisionError"):
            await store.update(lambda d: d.put(Task(id="t")))
        await store.close()


async def test_a_busy_event_loop_does_not_starve_the_writer(tmp_path: Path) -> None:
    store = await opened(tmp_path / "store.db")
    done = asyncio.Event()

    async def busy() -> None:
        while not done.is_set():
            sum(range(20_000))  # keeps the interpreter's lock for half a millisecond
            await asyncio.sleep(0)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(busy())
        started_s = CLOCK.monotonic_s()
        for n in range(100):
            await store.update(lambda d, n=n: d.put(Task(id=f"t{n}")))  # type: ignore[misc]
        took_s = CLOCK.monotonic_s() - started_s
        done.set()
    # Half a second alone; without giving way it was anything up to minutes.
    assert took_s < 10
    await store.close()


async def test_too_many_waiting_commits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "QUEUE_COMMITS_MAX", 5)
    store = await opened(tmp_path / "store.db")
    results = await asyncio.gather(
        *(store.update(lambda d, n=n: d.put(Task(id=f"t{n}"))) for n in range(20)),  # type: ignore[misc]
        return_exceptions=True,
    )
    refused = [r for r in results if isinstance(r, errors.Unavailable)]
    assert len(refused) == 15
    assert store.count(Task) == 5
    await store.update(lambda d: d.put(Task(id="later")))
    await store.close()


# ------------------------------------------------------------------ damaged and foreign files


async def damaged(path: Path) -> str:
    """Opening must be refused and change nothing; returns what was said."""
    before = path.read_bytes()
    with pytest.raises(Corrupt) as caught:
        await opened(path)
    assert path.read_bytes() == before
    assert str(path) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("keep", [0.0, 0.0005, 0.01, 0.3, 0.5, 0.9, 0.999])
async def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "restore the state from a backup" in await damaged(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello", id="short"),
        pytest.param(b"\xff" * 9000, id="rubbish"),
        pytest.param(b"SQLite format 3\0" + b"\x37" * 9000, id="rubbish after the magic"),
        pytest.param(b"SQLite format 3\0", id="magic alone"),
    ],
)
async def test_a_garbage_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(content)
    assert "is damaged" in await damaged(path)


async def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE rows(x)")
    db.commit()
    db.close()
    assert "of another program" in await damaged(path)


async def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={state_file.FORMAT + 1}")
    db.close()
    assert "start the version that wrote it" in await damaged(path)


def tamper(path: Path, sql: str, *values: Any) -> None:
    db = sqlite3.connect(path)
    db.execute(sql, values)
    db.commit()
    db.close()


async def test_a_flipped_bit_in_a_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    value = codec.encode(Task(id="t7", slot=1_000))  # readable, and not what was written
    tamper(path, "UPDATE rows SET value = ? WHERE id = 't7'", value)
    assert "row 't7' of table 5" in await damaged(path)


async def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path, objects=60)
    store = await opened(path)
    expected = sorted(store.all(Task), key=lambda t: t.id)
    await store.close()
    whole = path.read_bytes()
    noticed = 0
    for position in range(100, len(whole), 331):
        copy = tmp_path / f"flip{position}.db"
        copy.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            store = await opened(copy)
        except errors.SwarmError:
            noticed += 1
            continue
        assert sorted(store.all(Task), key=lambda t: t.id) == expected
        await store.close()
    assert noticed > 5


async def test_a_missing_file_beside_its_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    path.rename(tmp_path / "gone")
    (tmp_path / "store.db-wal").write_bytes(b"x" * 100)
    with pytest.raises(Corrupt, match="is gone"):
        await opened(path)
    assert not path.exists()


async def test_a_half_made_file_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    (tmp_path / "store.db.new").write_bytes(b"half")
    await filled(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store.db", "store.db.lock"]


# ------------------------------------------------------------------ files and processes


async def test_the_file_is_its_owners_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "store.db"
    store = await opened(path)
    await store.update(lambda d: d.put(Node(id="n")))
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    assert modes == {"store.db": 0o600, "store.db-wal": 0o600, "store.db.lock": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await store.close()


async def test_a_commit_is_synced_to_the_disk(tmp_path: Path) -> None:
    store = await opened(tmp_path / "store.db")
    engine: Any = store.engine
    assert engine._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert engine._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


async def test_a_file_in_use_is_refused_with_the_process_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await opened(path)
    with pytest.raises(errors.Unavailable, match=f"in use by process {os.getpid()}"):
        await opened(path)
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from manager.store.engines.embedded import EmbeddedEngine\n"
        "from swarm.clock import SystemClock\n"
        "from swarm import errors\n"
        "try:\n"
        "    asyncio.run(EmbeddedEngine(Path(sys.argv[1]), SystemClock()).load())\n"
        "except errors.Unavailable as error:\n"
        "    print(error)\n"
    )
    answer = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert f"in use by process {os.getpid()}" in answer.stdout
    await store.update(lambda d: d.put(Task(id="t")))
    await store.close()
    await (await opened(path)).close()


async def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(errors.Unavailable, match="--state-dir"):
        await opened(tmp_path / "file" / "store.db")


async def test_more_rows_than_one_statement_takes(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    count = 2 * embedded.STATEMENT_ROWS + 1
    store = await opened(path)
    await store.update(lambda d: [d.put(Task(id=f"t{n}", slot=n)) for n in range(count)])

    def remove_all_but_the_last(draft: Draft) -> None:
        for n in range(count - 1):
            draft.delete(Task, f"t{n}")

    await store.update(remove_all_but_the_last)
    await store.close()
    store = await opened(path)
    assert [t.slot for t in store.all(Task)] == [count - 1]
    await store.close()


async def test_closing_finishes_what_was_begun(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await opened(path)
    writes = [
        asyncio.ensure_future(store.update(lambda d, n=n: d.put(Task(id=f"t{n}"))))  # type: ignore[misc]
        for n in range(50)
    ]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*writes)
    assert store.count(Task) == 50
    store = await opened(path)
    assert store.count(Task) == 50
    await store.close()


async def test_reopening_many_times_keeps_the_state(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    revision = await filled(path)
    for _ in range(5):
        store = await opened(path)
        assert (store.revision, store.count(Task)) == (revision, 200)
        store.check_invariants()
        await store.close()
