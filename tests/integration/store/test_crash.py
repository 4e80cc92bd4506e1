"""What was acknowledged survives, however the process or the power ends."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manager.store import Store
from manager.store.engines.embedded import EmbeddedEngine
from swarm.clock import SystemClock
from swarm.v1 import Task
from tests.integration.store.writer import TASKS_IN_COMMIT, WRITERS

ROOT = Path(__file__).resolve().parents[3]
CLOCK = SystemClock()


async def opened(path: Path) -> Store:
    store = Store(EmbeddedEngine(path, CLOCK), CLOCK)
    await store.open()
    return store


def counts(store: Store) -> dict[int, int]:
    """How far each writer got; each commit is there whole or not at all."""
    store.check_invariants()
    out = {}
    for writer in range(WRITERS):
        tasks = [store.get(Task, f"w{writer}-{n}") for n in range(TASKS_IN_COMMIT)]
        slots = {task.slot if task else 0 for task in tasks}
        assert len(slots) == 1, f"writer {writer}: half a commit: {slots}"
        (out[writer],) = slots
    return out


def acknowledged_before_kill(path: Path, lines: int) -> tuple[int, dict[int, int]]:
    """Runs the writer, kills it -9 after so many acknowledgements; the last revision and counts."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.store.writer", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "open\n"
            read = [process.stdout.readline() for _ in range(lines)]
        finally:
            process.kill()
        # What it still said before the kill took effect was acknowledged as well.
        read += process.stdout.readlines()
    whole = [tuple(map(int, line.split())) for line in read if line.endswith("\n")]
    done: dict[int, int] = {}
    for _, writer, count in whole:
        done[writer] = max(done.get(writer, 0), count)
    return max((revision for revision, _, _ in whole), default=0), done


async def test_every_acknowledged_commit_is_there_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    rng = random.Random(7)
    for _ in range(8):
        revision, done = acknowledged_before_kill(path, rng.randrange(1, 400))
        store = await opened(path)
        assert store.revision >= revision
        found = counts(store)
        for writer, count in done.items():
            # At most the one commit in flight is there without having been acknowledged.
            assert found[writer] in (count, count + 1)
        await store.close()


async def test_a_torn_write_leaves_whole_commits_only(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    revision, _ = acknowledged_before_kill(path, 300)
    wal = path.with_name("store.db-wal")
    whole = wal.read_bytes()
    assert len(whole) > 50_000
    rng = random.Random(11)
    revisions = set()
    for n in range(25):
        folder = tmp_path / f"torn{n}"
        folder.mkdir()
        shutil.copy(path, folder / "store.db")
        cut = rng.randrange(len(whole))
        # The disk had taken the log's beginning, and rubbish where its next blocks belong.
        (folder / "store.db-wal").write_bytes(whole[:cut] + rng.randbytes(rng.randrange(9_000)))
        store = await opened(folder / "store.db")
        found = counts(store)
        assert sum(found.values()) == store.revision
        revisions.add(store.revision)
        await store.close()
    assert len(revisions) > 10
    assert max(revisions) <= revision + WRITERS


@pytest.mark.parametrize("end", ["kill", "close"])
def test_epochs_of_leadership_never_repeat(tmp_path: Path, end: str) -> None:
    path = tmp_path / "store.db"
    script = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from manager.store.engines.embedded import EmbeddedEngine\n"
        "from swarm.clock import SystemClock\n"
        "async def main():\n"
        "    engine = EmbeddedEngine(Path(sys.argv[1]), SystemClock())\n"
        "    list((await engine.load())[1])\n"
        "    engine.start(lambda *_: None)\n"
        "    print((await engine.campaign('n')).epoch, flush=True)\n"
        "    if sys.argv[2] == 'kill':\n"
        "        os.kill(os.getpid(), 9)\n"
        "    await engine.close()\n"
        "asyncio.run(main())\n"
    )
    epochs = [
        int(
            subprocess.run(
                [sys.executable, "-c", script, str(path), end],
                stdout=subprocess.PIPE,
                cwd=ROOT,
                check=end == "close",
                timeout=30,
            ).stdout.split()[-1]
        )
        for _ in range(3)
    ]
    assert epochs == [1, 2, 3]
