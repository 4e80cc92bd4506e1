"""What tasks of the process runtime use."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from swarm.v1 import TaskStats
from tests.integration.runtime_process.conftest import DEADLINE_S, harness, work

BUSY = (
    "dd if=/dev/zero of=f bs=1M count=4 conv=fsync 2>/dev/null; i=0;"
    " while [ $i -lt 20000 ]; do i=$((i+1)); done; touch done; exec sleep 100"
)


async def measured(folder: Path, *, isolate: bool) -> TaskStats:
    async with harness(folder, isolate=isolate) as held:
        job = work("sh", "-c", BUSY)
        await held.run(job)
        done = folder / "tasks" / job.task_id / "work" / "done"
        async with asyncio.timeout(DEADLINE_S):
            while not done.exists():
                await asyncio.sleep(0.01)
        return await held.runtime.stats(job.task_id)


@pytest.mark.root
async def test_task_with_namespaces_has_a_network_of_its_own_and_counts_its_disk(
    tmp_path: Path,
) -> None:
    stats = await measured(tmp_path / "state", isolate=True)
    assert stats.cpu_total_ns > 0
    assert stats.pids >= 1
    assert stats.network_in_bytes is not None and stats.network_out_bytes is not None
    blocks = [Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup/cgroup.controllers")]
    if any(path.exists() for path in blocks):
        assert stats.disk_read_bytes is not None
        assert stats.disk_written_bytes is not None


async def test_task_on_the_hosts_network_has_none_to_tell(tmp_path: Path) -> None:
    stats = await measured(tmp_path / "state", isolate=False)
    assert (stats.network_in_bytes, stats.network_out_bytes) == (None, None)
    assert stats.cpu_total_ns > 0
    assert stats.memory_bytes > 0
