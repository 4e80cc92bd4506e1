"""The audit trail on a disk that is really full."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm import audit
from swarm.audit import Query, Trail
from swarm.clock import ManualClock
from swarm.ids import seeded_rng


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
async def test_nothing_is_torn_or_lost_while_the_disk_is_full(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "RETRY_S", 0.02)
    trail = Trail(small_disk / "audit", ManualClock(), seeded_rng(1))
    task = asyncio.create_task(trail.run())
    await asyncio.sleep(0)
    try:
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(200 << 10))
        count = 0
        async with asyncio.timeout(30):
            while not trail.problem:
                for _ in range(20):
                    trail.ended(
                        "Create",
                        peer="unix:",
                        who="local",
                        request_id="r",
                        notes={"name": f"s{count}", "text": "x" * 500},
                        error=None,
                    )
                    count += 1
                await trail.written()
        assert "No space left on device" in trail.problem
        ballast.unlink()
        async with asyncio.timeout(30):
            while trail.problem:
                await asyncio.sleep(0.01)
        records = []
        async for some, damaged in trail.read(Query()):
            assert not damaged
            records += some
        assert [r.name for r in records] == [f"s{n}" for n in range(count)]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
