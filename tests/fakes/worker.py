"""A worker without tasks: what a session needs of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from agent.outbox import Outbox
from agent.worker import Worker
from swarm.v1 import Assignments, ClusterInfo, NodeDescription, TaskReport


class IdleWorker:
    """See agent.worker.Worker; `held` is what it says of tasks."""

    def __init__(self, hostname: str) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.outbox = Outbox(lambda: self.on_change())
        self.hostname = hostname
        self.held: tuple[TaskReport, ...] = ()
        self.cluster: ClusterInfo | None = None

    def description(self) -> NodeDescription:
        return NodeDescription(hostname=self.hostname)

    def reports(self) -> tuple[TaskReport, ...]:
        return self.held

    def assign(self, assignments: Assignments) -> None:
        return None

    def use_cluster(self, info: ClusterInfo) -> None:
        self.cluster = info


def idle_worker(hostname: str) -> Worker:
    """One, as a session's type wants it."""
    return cast("Worker", IdleWorker(hostname))
