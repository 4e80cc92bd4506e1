"""A node's worker over one real runtime, told what to run as a manager would."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from agent.description import About
from agent.runtime.base import Runtime
from agent.state import StateFile
from agent.worker import Worker
from swarm.clock import SystemClock
from swarm.v1 import (
    Assignment,
    Assignments,
    ConfigData,
    SecretData,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)
from tests.fakes.runtime import FakeIngress
from tests.fakes.waiting import until

DEADLINE_S = 30.0
HOSTNAME = "node-one"
SERVICE = "s" * 25


class Node:
    """`async with`; the runtime is closed with it, its tasks stay."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self.runtime = runtime
        self.worker = Worker(
            runtimes=[runtime],
            ingress=FakeIngress(),
            state=StateFile(folder),
            about=About(HOSTNAME, "1.0"),
            clock=SystemClock(),
        )
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Node:
        ready = asyncio.Event()
        self._running = asyncio.create_task(self.worker.run(ready.set))
        async with asyncio.timeout(DEADLINE_S):
            await ready.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._running is not None
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.runtime.close()

    def status(self, task_id: str) -> TaskStatus | None:
        return next((r.status for r in self.worker.reports() if r.task_id == task_id), None)

    async def run(
        self,
        *tasks: Assignment,
        secrets: Sequence[SecretData] = (),
        configs: Sequence[ConfigData] = (),
        until_state: TaskState = TaskState.RUNNING,
    ) -> None:
        """These tasks and no others; returns when all have come that far."""
        self.worker.assign(
            Assignments(full=True, tasks=tasks, secrets=tuple(secrets), configs=tuple(configs))
        )
        ids = {a.task.id for a in tasks if a.task is not None}

        def reached() -> bool:
            states = {r.task_id: r.status.state for r in self.worker.reports() if r.status}
            return set(states) == ids and all(s >= until_state for s in states.values())

        await until(reached, timeout_s=DEADLINE_S, what=lambda: f"{self.worker.reports()}")


def assignment(
    task_id: str,
    spec: TaskSpec,
    *,
    node_id: str,
    slot: int = 1,
    service: str = "web",
    labels: dict[str, str] | None = None,
) -> Assignment:
    """One task of a service, as a manager sends it."""
    return Assignment(
        task=Task(
            id=task_id,
            service_id=SERVICE,
            node_id=node_id,
            slot=slot,
            desired_state=TaskState.RUNNING,
        ),
        service_name=service,
        service_labels=labels or {},
        name=f"{service}.{slot or node_id}.{task_id}",
        spec=spec,
        node_name=HOSTNAME,
    )


def shut_down(given: Assignment) -> Assignment:
    assert given.task is not None
    task = structs.replace(given.task, desired_state=TaskState.SHUTDOWN)
    return structs.replace(given, task=task)


def on_disk(marker: bytes, *folders: Path) -> list[Path]:
    """The files below the folders, on the same file system, that hold the text."""
    found = []
    for folder in folders:
        device = folder.stat().st_dev
        for path, names, files in os.walk(folder):
            names[:] = [n for n in names if Path(path, n).lstat().st_dev == device]
            for name in files:
                file = Path(path, name)
                try:
                    if file.is_symlink() or not file.is_file() or file.stat().st_dev != device:
                        continue
                    if marker in file.read_bytes():
                        found.append(file)
                except FileNotFoundError:  # it was removed since it was listed
                    continue
    return found
