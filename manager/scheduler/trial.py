"""What would fit if: claims taken out of the node table and put into it, and all of it taken back.

For decisions about several nodes and tasks at a time (gangs, preemption, reservations). A trial is
made on the table itself, which knows how to count; nothing else may read the table meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType

from manager.scheduler.placement import Group, place
from manager.scheduler.table import Claim, NodeInfo, NodeTable
from manager.store import View
from swarm.v1 import Task


class Trial:
    """To be used with `with`: at its end the table holds for each task what the view says, as
    before. `view` has all that the table claims, the changes of the present tick included.
    """

    def __init__(self, table: NodeTable, view: View, now_ns: int) -> None:
        self._table = table
        self._view = view
        self._now_ns = now_ns
        self._touched: dict[str, None] = {}

    def __enter__(self) -> Trial:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What was put in goes first: what it stood in for needs the room, and the very GPUs.
        self.back(reversed(list(self._touched)))

    def out(self, task_id: str) -> None:
        """The task claims nothing any more. One that the view does not have there yet, for it has
        just been given its place, stays: nobody could put it back.
        """
        task = self._view.get(Task, task_id)
        if task is None or not task.node_id:
            return
        self._touched[task_id] = None
        self._table.sync_task(task_id, None, self._view)

    def back(self, task_ids: Iterable[str]) -> None:
        """The tasks claim what the view says."""
        missing = []
        for task_id in task_ids:
            task = self._view.get(Task, task_id)
            if task is None or not task.node_id:
                self._table.sync_task(task_id, task, self._view)
            else:
                missing.append(task)
        for task in missing:
            self._table.sync_task(task.id, task, self._view)

    def place(self, group: Group) -> tuple[Task, ...]:
        """Claims places for the group's tasks; those that found one."""
        self._touched.update(dict.fromkeys(t.id for t in group.tasks))
        return place(self._table, group, self._view, self._now_ns).placed

    def fits(self, info: NodeInfo, group: Group) -> bool:
        """Whether the node can take one more task of the group now."""
        one = replace(group, tasks=group.tasks[:1], node_id=info.id, without=frozenset())
        placed = place(self._table, one, self._view, self._now_ns).placed
        for task in placed:
            self._table.sync_task(task.id, None, self._view)
        return bool(placed)


def part_of(info: NodeInfo, claim: Claim) -> float:
    """The largest part of the node that the claim is, of CPU, memory and GPUs."""
    need, description = claim.requirement, info.node.description
    gpus = len(description.gpus) if description else 0
    return max(
        need.cpu / info.cpu_total if info.cpu_total else 0.0,
        need.memory / info.memory_total if info.memory_total else 0.0,
        len(claim.gpus) / gpus if gpus else 0.0,
    )
