"""The audit trail: kept, bounded, readable, and in nobody's way."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from swarm import audit, errors
from swarm.audit import Copy, Query, Trail, copy_to
from swarm.clock import SECOND_NS, ManualClock
from swarm.ids import seeded_rng
from swarm.v1 import AuditRecord


@asynccontextmanager
async def running(folder: Path, **more: Any) -> AsyncIterator[Trail]:
    trail = Trail(folder, more.pop("clock", None) or ManualClock(), seeded_rng(1), **more)
    task = asyncio.create_task(trail.run())
    await asyncio.sleep(0)
    try:
        yield trail
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def ended(trail: Trail, error: BaseException | None = None, **notes: object) -> None:
    trail.ended(
        "Create", peer="ipv4:10.0.0.1:9", who="admin ada", request_id="r1", notes=notes, error=error
    )


async def read(trail: Trail, **query: Any) -> tuple[list[AuditRecord], list[str]]:
    records: list[AuditRecord] = []
    damaged: list[str] = []
    async for some, bad in trail.read(Query(**query)):
        records += some
        damaged += bad
    return records, damaged


async def test_record_is_on_the_disk_once_written_returns(tmp_path: Path) -> None:
    async with running(tmp_path / "a") as trail:
        trail.node_id = "n1"
        ended(
            trail, what="create", kind="service", name="web", object_id="s1", revision=7, force=True
        )
        await trail.written()
        (line,) = (tmp_path / "a/audit-000001.jsonl").read_text().splitlines()
        found = json.loads(line)
        assert found["who"] == "admin ada" and found["time"].endswith("Z")
        (record,), damaged = await read(trail)
        assert not damaged
        assert (record.what, record.kind, record.name, record.revision) == (
            "create",
            "service",
            "web",
            7,
        )
        assert (record.outcome, record.node_id, record.peer) == ("done", "n1", "ipv4:10.0.0.1:9")
        assert record.more == {"force": "True"}
        assert os.stat(tmp_path / "a/audit-000001.jsonl").st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("error", "outcome", "told"),
    [
        (None, "done", ""),
        (errors.Conflict("name web is taken"), "failed", "Conflict"),
        (errors.Denied("not for you"), "denied", "Denied: not for you"),
        (errors.Removed("gone"), "denied", "Removed: gone"),
        (errors.TimedOut("unknown"), "unknown", "TimedOut"),
        (asyncio.CancelledError(), "unknown", "the caller left"),
        (RuntimeError("token=abc"), "failed", "RuntimeError"),
    ],
)
async def test_outcomes_tell_the_kind_of_error_and_no_more(
    tmp_path: Path, error: BaseException | None, outcome: str, told: str
) -> None:
    async with running(tmp_path) as trail:
        ended(trail, error)
        (record,), _ = await read(trail)
        assert (record.outcome, record.error) == (outcome, told)


async def test_files_are_rotated_and_the_oldest_go(tmp_path: Path) -> None:
    async with running(tmp_path, file_bytes_max=1_000, files_max=3) as trail:
        for number in range(40):
            ended(trail, name=f"s{number}")
            await trail.written()
        files = sorted(p.name for p in tmp_path.iterdir())
        assert len(files) == 3 and files[0] > "audit-000001.jsonl"
        assert all(p.stat().st_size <= 1_000 for p in tmp_path.iterdir())
        records, _ = await read(trail)
        names = [r.name for r in records]
        assert names == [f"s{n}" for n in range(40 - len(names), 40)]


async def test_a_new_daemon_goes_on_where_the_last_one_ended_and_cuts_a_torn_line(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as trail:
        ended(trail, name="a")
    path = tmp_path / "audit-000001.jsonl"
    with path.open("ab") as file:
        file.write(b'{"time_ns":5,"name":"to')
    async with running(tmp_path) as trail:
        ended(trail, name="b")
        records, damaged = await read(trail)
    assert [r.name for r in records] == ["a", "b"] and not damaged


async def test_damaged_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    async with running(tmp_path) as trail:
        for name in "abc":
            ended(trail, name=name)
        await trail.written()
        path = tmp_path / "audit-000001.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + b"\x00\x01garbage\n" + lines[2])
        records, (damaged,) = await read(trail)
    assert [r.name for r in records] == ["a", "c"]
    assert damaged.startswith(f"{path}, line 2: ")


async def test_queries_choose_by_time_fields_and_number(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path, clock=clock) as trail:
        times = []
        for name in "abcd":
            times.append(clock.now_ns())
            ended(trail, name=name, what="create" if name in "ab" else "remove")
            clock.advance(seconds=10)
        names = [r.name for r in (await read(trail, since_ns=times[1], until_ns=times[3]))[0]]
        assert names == ["b", "c"]
        chosen = {"what": frozenset({"create"}), "name": frozenset({"b", "c"})}
        assert [r.name for r in (await read(trail, filters=chosen))[0]] == ["b"]
        assert [r.name for r in (await read(trail, limit=2))[0]] == ["c", "d"]
        with pytest.raises(errors.Invalid, match="accepted are who"):
            await read(trail, filters={"colour": frozenset({"red"})})


class Disk:
    """A place for lines that can be full."""

    def __init__(self) -> None:
        self.full = False
        self.lines: list[bytes] = []
        self.tries = 0

    def write(self, lines: Sequence[bytes]) -> None:
        self.tries += 1
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.lines += lines


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_full_disk_stops_nobody_and_its_records_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "RETRY_S", 0.02)
    disk = Disk()
    trail = Trail(tmp_path, ManualClock(), seeded_rng(1))
    trail._own._write = disk.write
    task = asyncio.create_task(trail.run())
    await asyncio.sleep(0)
    disk.full = True
    ended(trail, name="a")
    await asyncio.wait_for(trail.written(), 1)
    await until(lambda: "No space left on device" in trail.problem)
    ended(trail, name="b")
    await asyncio.wait_for(trail.written(), 1)  # at once: it is known
    disk.full = False
    await until(lambda: not trail.problem)
    assert [json.loads(line)["name"] for line in disk.lines] == ["a", "b"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_memory_cannot_hold_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "RETRY_S", 0.02)
    monkeypatch.setattr(audit, "PENDING_MAX", 5)
    disk = Disk()
    disk.full = True
    async with running(tmp_path, copies=[Copy("x", disk.write)]) as trail:
        await until(lambda: True)
        for number in range(9):
            ended(trail, name=str(number))
        await until(lambda: disk.tries > 1)
        disk.full = False
        await until(lambda: disk.lines)
    records = [json.loads(line) for line in disk.lines]
    assert records[0]["outcome"] == "lost" and records[0]["more"]["records"] == "4"
    assert [r["name"] for r in records[1:]] == ["4", "5", "6", "7", "8"]


async def test_denied_calls_cannot_push_the_rest_out(tmp_path: Path) -> None:
    clock = ManualClock()
    clock.advance(seconds=100)
    async with running(tmp_path, clock=clock) as trail:
        for _ in range(1_000):
            ended(trail, errors.Denied("no"))
        ended(trail, name="change")
        clock.advance(seconds=audit.DENIED_WINDOW_S)
        ended(trail, errors.Denied("no"))
        records, _ = await read(trail)
    assert len(records) == audit.DENIED_MAX + 3  # the first of the caller's, the change, the last
    assert records[-2].name == "change"
    assert records[-1].more == {"left_out": "899"}


async def test_one_callers_denied_calls_hide_nobody_elses(tmp_path: Path) -> None:
    async with running(tmp_path) as trail:
        for _ in range(1_000):
            ended(trail, errors.Denied("no"))
        for who, method in (("worker x", "Create"), ("admin ada", "Remove")):
            trail.ended(
                method, peer="", who=who, request_id="r", notes={}, error=errors.Denied("no")
            )
        records, _ = await read(trail)
    assert [(r.who, r.method) for r in records[-2:]] == [
        ("worker x", "Create"),
        ("admin ada", "Remove"),
    ]


async def test_long_record_is_shortened(tmp_path: Path) -> None:
    async with running(tmp_path) as trail:
        ended(trail, name="x" * 40_000, text="y" * 40_000)
        (record,), _ = await read(trail)
    assert record.more == {"shortened": "yes"} and record.name == "x" * 256


# ------------------------------------------------------------------ copies


async def test_copy_to_a_file_survives_its_rotation_by_others(tmp_path: Path) -> None:
    path = tmp_path / "copy.jsonl"
    async with running(tmp_path / "own", copies=[copy_to(str(path))]) as trail:
        ended(trail, name="a")
        await until(lambda: path.exists() and path.stat().st_size)
        path.rename(tmp_path / "moved")
        ended(trail, name="b")
        await until(lambda: path.exists() and path.stat().st_size)
    assert json.loads((tmp_path / "moved").read_text())["name"] == "a"
    assert json.loads(path.read_text())["name"] == "b"


async def test_copy_to_syslog_is_one_message_a_record_and_waits_for_its_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "RETRY_S", 0.02)
    path = tmp_path / "log"
    async with running(tmp_path / "own", copies=[copy_to(f"syslog:{path}")]) as trail:
        ended(trail, name="a")
        await until(lambda: "cannot be written to syslog:" in trail.problem)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
            daemon.bind(str(path))
            daemon.settimeout(10)
            message = await asyncio.to_thread(daemon.recv, 65_536)
            tag, _, body = message.partition(b": ")
            assert tag == f"<85>swarmd[{os.getpid()}]".encode()
            assert json.loads(body)["name"] == "a"
            await until(lambda: not trail.problem)


@pytest.mark.parametrize("text", ["", "syslog:host:514"])
def test_copies_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(errors.Invalid, match="--audit-log"):
        copy_to(text)


def test_clock_is_in_nanoseconds() -> None:
    line = json.loads(audit.encode(AuditRecord(time_ns=1_795_275_000 * SECOND_NS + 5)))
    assert line["time"] == "2026-11-21T15:30:00.000000005Z"
