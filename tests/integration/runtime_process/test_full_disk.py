"""Tasks whose state folder has no room left: they end, can be stopped, and are reported."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.runtime.base import EventKind, Failed
from swarm.v1 import ContainerSpec, HealthConfig, LogOptions
from tests.integration.runtime_process.conftest import Harness, harness, work

pytestmark = [pytest.mark.root]
LOOP = "while [ ! -e {mark} ]; do sleep 0.02; done; exit 5"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
async def small(disk: Path) -> AsyncIterator[Harness]:
    """A runtime whose folder is the whole of it."""
    async with harness(disk, isolate=False) as held:
        try:
            yield held
        finally:
            (disk / "filler").unlink(missing_ok=True)


def fill(held: Harness) -> None:
    with contextlib.suppress(OSError), (held.folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


async def test_a_task_that_ends_on_a_full_disk_is_reported_with_its_code(
    small: Harness, tmp_path: Path
) -> None:
    job = work("sh", "-c", LOOP.format(mark=tmp_path / "mark"))
    await small.run(job)
    fill(small)
    (tmp_path / "mark").touch()
    event = await small.event()
    assert (event.kind, event.exit_code) == (EventKind.EXITED, 5)


async def test_a_task_on_a_full_disk_can_be_stopped(small: Harness) -> None:
    polite = work("sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.02; done")
    stubborn = work("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.02; done")
    for job in (polite, stubborn):
        await small.run(job)
        async for _ in small.runtime.logs(job.task_id, LogOptions(tail=-1, follow=True)):
            break
    fill(small)
    assert await small.runtime.stop(polite.task_id, signal="", grace_s=10) == 7
    assert await small.runtime.stop(stubborn.task_id, signal="", grace_s=0.2) == 137


async def test_health_is_told_on_a_full_disk_and_nothing_new_is_begun(small: Harness) -> None:
    check = HealthConfig(test=("CMD", "false"), interval_ns=200_000_000, retries=1)
    await small.run(work("sleep", "60", container=ContainerSpec(healthcheck=check)))
    fill(small)
    assert (await small.event()).kind is EventKind.UNHEALTHY
    with pytest.raises(Failed, match="No space left") as caught:
        await small.run(work("sleep", "60"))
    assert caught.value.cause == "disk_full"


async def test_a_start_without_room_says_so(small: Harness) -> None:
    job = work("sleep", "60")
    await small.runtime.prepare(job)
    fill(small)
    with pytest.raises(Failed) as caught:
        await small.runtime.start(job)
    assert caught.value.cause == "disk_full", caught.value.message
