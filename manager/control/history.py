"""What is forgotten: ended tasks beyond the history limit, and services. Versions: versions.py.

Of each slot the newest `task_history_limit` ended tasks are kept (Docker's default 5; negative:
all), and the slot's newest ended task whatever the limit, if nothing came after it that has a
place: it tells that the slot has come to its end, that what was to take a task's place has failed,
or that the slot had one. Tasks with a node are told to be removed there, and deleted when the node
says so; those without are deleted at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import structs

from manager.control.slots import Slot, is_live, is_unplaced, slot_order
from manager.control.template import state_of
from manager.control.work import Work
from manager.store import Draft
from swarm import states
from swarm.v1 import Cluster, Node, Task, TaskState

DEFAULT_HISTORY_LIMIT = 5


def reap_tasks(work: Work) -> None:
    """Forgets ended tasks beyond the limit, slot by slot."""
    reap_slots(work, sorted(work.slots, key=slot_order))


def reap_slots(work: Work, slots: Iterable[Slot]) -> None:
    """As `reap_tasks`, of these slots."""
    limit = history_limit(work.draft)
    for slot in slots:
        tasks = list(work.slots.get(slot, ()))
        for task in tasks:
            if task.desired_state == TaskState.REMOVE:
                work.remove(task)  # deletes it if its node is gone
        if work.mode.per_node and work.draft.get(Node, str(slot)) is None:
            for task in tasks:
                work.remove(task)
            continue
        if limit >= 0:
            _reap_slot(work, slot, limit)


def _reap_slot(work: Work, slot: int | str, limit: int) -> None:
    kept = [t for t in work.slots.get(slot, ()) if t.desired_state != TaskState.REMOVE]
    past = [t for t in kept if states.ended(state_of(t))]
    if past and (past[-1] is kept[-1] or all(is_unplaced(t) for t in kept if is_live(t))):
        limit = max(1, limit)
    if work.mode.job:
        # The last attempt tells how many there were, also while the next one waits for a place.
        limit = max(1, limit)
        past = [t for t in past if state_of(t) != TaskState.COMPLETE]
    for task in past[: max(0, len(past) - limit)]:
        work.remove(task)


def history_limit(draft: Draft) -> int:
    """The cluster's limit."""
    for cluster in draft.all(Cluster):
        if cluster.spec is not None:
            return cluster.spec.task_history_limit
    return DEFAULT_HISTORY_LIMIT


def remove_service(work: Work) -> bool:
    """Stops and forgets all tasks of a service that is to go; True once it can be deleted.

    It does not wait for nodes that are down: their tasks keep their versions (keep_versions) and go
    when the nodes are back or given up.
    """
    for task in list(work.tasks.values()):
        work.remove(task)
    wait_for_engines(work)
    return all(work.lost(task) for task in work.tasks.values())


def wait_for_engines(work: Work) -> None:
    """Looks at the service again when runtimes that do not answer count as lost."""
    for task in work.tasks.values():
        node = work.node(task)
        if node is not None:
            work.wake(work.engine_lost_ns(task, node))


def versions_of(tasks: Iterable[Task]) -> set[int]:
    """The spec versions that the tasks run."""
    return {task.spec_version for task in tasks}


def forget_orphans(draft: Draft, service_id: str) -> list[Task]:
    """For tasks whose service is gone: they are removed as well; returns those that stay."""
    left = []
    for task in sorted(draft.by(Task, "service", service_id), key=lambda t: t.id):
        gone = not task.node_id or draft.get(Node, task.node_id) is None
        if gone or state_of(task) < TaskState.ASSIGNED:
            draft.delete(Task, task.id)
            continue
        left.append(task)
        if task.desired_state != TaskState.REMOVE:
            draft.put(structs.replace(task, desired_state=TaskState.REMOVE))
    return left
