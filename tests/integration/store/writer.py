"""Commits without end and says what was acknowledged; meant to be killed.

Run with the state file as argument. Writes "<revision> <writer> <count>" to its output once a
commit has been answered, in one write each.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from msgspec.structs import replace

from manager.store import Draft, Store
from manager.store.engines.embedded import EmbeddedEngine
from swarm.clock import SystemClock
from swarm.v1 import Task

WRITERS = 8
TASKS_IN_COMMIT = 5


async def write(store: Store, writer: int) -> None:
    """Raises the slot of this writer's tasks by one, all in one commit, again and again."""

    def step(draft: Draft) -> int:
        count = 0
        for n in range(TASKS_IN_COMMIT):
            id_ = f"w{writer}-{n}"
            task = draft.get(Task, id_) or Task(id=id_)
            count = task.slot + 1
            draft.put(replace(task, slot=count))
        return count

    while True:
        draft = store.draft()
        count = step(draft)
        revision = await store.commit(draft)
        os.write(1, f"{revision} {writer} {count}\n".encode())


async def main(path: Path) -> None:
    clock = SystemClock()
    store = Store(EmbeddedEngine(path, clock), clock)
    await store.open()
    os.write(1, b"open\n")
    async with asyncio.TaskGroup() as group:
        for writer in range(WRITERS):
            group.create_task(write(store, writer))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
