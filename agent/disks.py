"""Whether there is room on the file systems that tasks are kept on.

A file system is full when less than 1 % of it, or 256 MiB if that is less, is left to those who are
not root, and has room again when there is twice as much: an engine that clears up after a pull that
did not fit shall not make the node come and go. Inodes count as bytes do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from swarm.clock import Clock

log = structlog.get_logger("worker")

PERIOD_S = 10.0
SHARE = 100  # one part of so many must be free
BYTES_MAX = 256 * 1024 * 1024
INODES_MAX = 10_000
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Room:
    """What a file system has; `inodes_total` 0: it makes them as needed."""

    free_bytes: int
    total_bytes: int
    inodes_free: int = 0
    inodes_total: int = 0


@dataclass(frozen=True, slots=True)
class Full:
    """A file system without room; `since_ns` is unix time."""

    message: str
    since_ns: int


def measure(folder: Path) -> Room | None:
    """None: the folder is not to be seen. Blocks as long as the file system does."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return Room(
        found.f_bavail * found.f_frsize,
        found.f_blocks * found.f_frsize,
        found.f_favail,
        found.f_files,
    )


def lacking(room: Room, *, was_full: bool) -> str:
    """What there is too little of, "3 MiB of 1024 MiB left"; empty: there is enough."""
    factor = 2 if was_full else 1
    if room.total_bytes:
        low_bytes = min(room.total_bytes // SHARE, BYTES_MAX) * factor
        if room.free_bytes < low_bytes:
            return f"{room.free_bytes // _MIB} MiB of {room.total_bytes // _MIB} MiB left"
    if room.inodes_total and room.inodes_free < factor * min(
        room.inodes_total // SHARE, INODES_MAX
    ):
        return f"{room.inodes_free} of {room.inodes_total} inodes left"
    return ""


class Disks:
    """The file systems of a node. `folders` names, whenever it is asked, the folder of each of its
    users; `full` has those without room, by user. `on_change` is called when that differs.
    """

    def __init__(
        self, folders: Callable[[], Mapping[str, Path]], on_change: Callable[[], None], clock: Clock
    ) -> None:
        self._folders = folders
        self._on_change = on_change
        self._clock = clock
        self._soon = asyncio.Event()
        self._measuring = asyncio.Lock()
        self.full: dict[str, Full] = {}

    def look(self) -> None:
        """Something said that there is no room: look at once."""
        self._soon.set()

    async def run(self) -> None:
        """Looks again and again until cancelled."""
        while True:
            self._soon.clear()
            await self.measured()
            try:
                async with asyncio.timeout(PERIOD_S):
                    await self._soon.wait()
            except TimeoutError:
                continue

    async def measured(self) -> None:
        """Looks once. One measurement is under way at a time: one that hangs keeps its thread."""
        async with self._measuring:
            for user, folder in dict(self._folders()).items():
                room = await asyncio.to_thread(measure, folder)
                if room is not None:
                    self.take(user, folder, room)

    def take(self, user: str, folder: Path, room: Room) -> None:
        """Concludes from one measurement."""
        before = self.full.get(user)
        lack = lacking(room, was_full=before is not None)
        if not lack:
            if before is not None:
                del self.full[user]
                log.info("disk_has_room", runtime=user, folder=str(folder))
                self._on_change()
            return
        if before is None:
            log.warning("disk_full", runtime=user, folder=str(folder), left=lack)
        message = f"the disk below {folder} is full: {lack}; free some space"
        if before is None or before.message != message:
            since_ns = self._clock.now_ns() if before is None else before.since_ns
            self.full[user] = Full(message, since_ns)
            self._on_change()
