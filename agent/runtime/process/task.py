"""A task of the process runtime as the agent holds it while it runs, or after."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from agent.runtime.base import DISK_FULL, Failed, Started, cause_of
from agent.runtime.process import health as process_health
from agent.runtime.process import state as process_state
from agent.runtime.process.state import Outcome, Record
from swarm.v1 import ContainerStatus

log = structlog.get_logger("process_runtime")


class Task:
    """A task that runs, or has run, as the agent sees it."""

    def __init__(self, record: Record, folder: Path) -> None:
        self.record = record
        self.folder = folder
        self.pids: process_state.Pids | None = None
        self.pidfd = -1
        self.outcome: Outcome | None = None
        self.exited = asyncio.Event()
        self.health: asyncio.Task[None] | None = None
        self.stopping = False

    @property
    def running(self) -> bool:
        return self.pidfd >= 0


def try_to_save(task: Task, save: Callable[[], None]) -> None:
    """Writes what only a later agent needs: without room on the disk the task goes on without."""
    try:
        save()
    except OSError as error:
        log.warning("task_not_written", task_id=task.record.task_id, reason=str(error))


def trouble(what: str, error: OSError) -> Failed:
    """What becomes of a task that the system refused something."""
    cause = cause_of(error)
    then = "; free some space on this node" if cause == DISK_FULL else ""
    return Failed(f"{what}: {error.strerror or error}{then}", cause=cause)


def started(task: Task) -> Started:
    """What the worker learns of a task that runs."""
    record, pids = task.record, task.pids
    assert pids is not None
    return Started(
        container=ContainerStatus(container_id=f"process:{pids.main}", pid=pids.main),
        address=record.address,
        port_map=record.port_map,
        host_ports=record.host_ports,
        healthy=process_health.schedule(record.health) is None or bool(record.healthy),
    )
