"""What the node still has to tell the managers of its tasks.

Owns the reports that no manager has acknowledged: per task the latest one, in the order in which
they came up. One batch is under way at a time, so while a manager commits it the next ones grow
together. A batch that was not acknowledged when its session ended is sent again in the next.
"""

from __future__ import annotations

from collections.abc import Callable

from swarm.v1 import StatusBatch, TaskReport

BATCH_MAX = 1000  # reports; about 150 KB


class Outbox:
    """Reports on their way. `on_change` is called whenever there may be something to send."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._waiting: dict[str, TaskReport] = {}
        self._sent: tuple[TaskReport, ...] = ()
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, report: TaskReport) -> None:
        """Replaces what waits for the same task, and goes last."""
        self._waiting.pop(report.task_id, None)
        self._waiting[report.task_id] = report
        self._on_change()

    def take(self) -> StatusBatch | None:
        """The next batch; None while one is under way, or when there is nothing to tell."""
        if self._sent or not self._waiting:
            return None
        self._sequence += 1
        self._sent = tuple(self._waiting.values())[:BATCH_MAX]
        return StatusBatch(sequence=self._sequence, reports=self._sent)

    def acknowledged(self, sequence: int) -> None:
        """A manager has committed the batch; what changed meanwhile stays."""
        if sequence != self._sequence:
            return
        for report in self._sent:
            if self._waiting.get(report.task_id) is report:
                del self._waiting[report.task_id]
        self._sent = ()
        if self._waiting:
            self._on_change()

    def restart(self) -> None:
        """A new session: what was under way is sent again."""
        self._sent = ()
