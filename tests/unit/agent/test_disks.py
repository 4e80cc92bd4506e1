"""When a file system counts as full, and when it does not any more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import disks
from agent.disks import BYTES_MAX, Disks, Room, lacking
from swarm.clock import ManualClock
from tests.fakes.waiting import until

GIB = 1 << 30


@pytest.mark.parametrize(
    ("room", "was_full", "lack"),
    [
        (Room(11 << 20, GIB), False, False),
        (Room(10 << 20, GIB), False, True),
        (Room(20 << 20, GIB), True, True),
        (Room(21 << 20, GIB), True, False),
        (Room(256 << 20, 1000 * GIB), False, False),
        (Room(255 << 20, 1000 * GIB), False, True),
        (Room(511 << 20, 1000 * GIB), True, True),
        (Room(512 << 20, 1000 * GIB), True, False),
        (Room(GIB, 2 * GIB, 5, 1000), False, True),
        (Room(GIB, 2 * GIB, 10, 1000), False, False),
        (Room(GIB, 2 * GIB, 9_999, 100_000_000), False, True),
        (Room(GIB, 2 * GIB, 0, 0), False, False),
        (Room(0, 0), False, False),
    ],
)
def test_full_is_less_than_a_hundredth_or_a_quarter_of_a_gibibyte(
    room: Room, was_full: bool, lack: bool
) -> None:
    assert bool(lacking(room, was_full=was_full)) is lack


@given(st.integers(1, 1 << 50), st.integers(0, 1 << 50))
def test_what_has_room_for_one_that_was_full_has_room(total: int, free: int) -> None:
    room = Room(min(free, total), total)
    if not lacking(room, was_full=True):
        assert not lacking(room, was_full=False)
    if room.free_bytes >= 2 * BYTES_MAX:
        assert not lacking(room, was_full=True)


async def test_a_disk_is_looked_at_again_and_again_and_when_somebody_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    rooms = [Room(0, GIB), Room(0, GIB), Room(GIB, GIB)]

    def measure(folder: Path) -> Room:
        looks.append(folder)
        return rooms[min(len(looks), len(rooms)) - 1]

    monkeypatch.setattr(disks, "measure", measure)
    changes: list[bool] = []
    clock = ManualClock()
    watched = Disks(lambda: {"docker": tmp_path}, lambda: changes.append(bool(watched.full)), clock)
    running = asyncio.create_task(watched.run())
    await until(lambda: len(looks) == 1)
    await until(lambda: "docker" in watched.full)
    since_ns = watched.full["docker"].since_ns
    watched.look()
    await until(lambda: len(looks) == 2)
    assert watched.full["docker"].since_ns == since_ns
    watched.look()
    await until(lambda: not watched.full)
    assert changes == [True, False]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_a_folder_that_is_not_to_be_seen_says_nothing(tmp_path: Path) -> None:
    assert disks.measure(tmp_path / "nothing") is None
    found = disks.measure(tmp_path)
    assert found is not None
    assert 0 < found.free_bytes <= found.total_bytes
