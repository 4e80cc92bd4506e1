"""Which slots a service has: filling the missing, giving up those too many.

replicated: slots 1..n; missing ones are filled lowest number first. What goes on scaling down goes
in the order of SwarmKit's replicated orchestrator: slots that do not run, then slots on the nodes
with most of the service's tasks, highest number first. Given up means removed: no history is kept.
global: each eligible node is a slot; a node that may not have one any more loses it (nodes.py), a
paused one keeps it. Jobs: as many slots as must complete, so many of them at a time; tasks of an
earlier iteration are removed.

What depends_on holds back is not made: an empty slot stays one until the gates open.
"""

from __future__ import annotations

from collections import Counter

from manager.control.slots import Slot, slot_order
from manager.control.template import Mode, job_size, replicas_of, state_of
from manager.control.work import Work
from swarm.v1 import Node, TaskState


def scale(work: Work) -> None:
    """Creates and gives up slots as the service's mode says."""
    if work.mode.job:
        _drop_old_iterations(work)
    match work.mode:
        case Mode.REPLICATED:
            _replicated(work)
        case Mode.REPLICATED_JOB:
            _replicated_job(work)
        case Mode.GLOBAL | Mode.GLOBAL_JOB:
            _per_node(work)


def _replicated(work: Work) -> None:
    wanted = replicas_of(work.service.spec)
    used = work.used_slots()
    if len(used) > wanted:
        for slot in _least_needed(work, used)[: len(used) - wanted]:
            give_up(work, slot)
    else:
        _fill(work, set(used), wanted - len(used))


def _fill(work: Work, used: set[Slot], count: int) -> None:
    """New tasks in the lowest free slots."""
    if count <= 0 or work.held_back():
        return
    slot = 0
    while count > 0:
        slot += 1
        if slot in used:
            continue
        if work.create(slot) is None:
            return
        count -= 1


def _least_needed(work: Work, used: list[Slot]) -> list[Slot]:
    """The slots in the order in which they can be done without."""
    running: list[tuple[Slot, str]] = []
    idle: list[Slot] = []
    for slot in used:
        nodes = [
            t.node_id
            for t in work.live(slot)
            if state_of(t) == TaskState.RUNNING and not work.lost(t)
        ]
        if nodes:
            running.append((slot, nodes[0]))
        else:
            idle.append(slot)
    order = sorted(idle, key=slot_order, reverse=True)
    # Each slot given up lowers its node's count, so the fullest node is asked for anew each time.
    load = Counter(node for _, node in running)
    by_node: dict[str, list[Slot]] = {}
    for slot, node in sorted(running, key=lambda pair: slot_order(pair[0])):
        by_node.setdefault(node, []).append(slot)
    levels = [
        (load[node] - i, slot_order(slot), slot)
        for node, slots in by_node.items()
        for i, slot in enumerate(reversed(slots))
    ]
    levels.sort(key=lambda level: (level[0], level[1]), reverse=True)
    return order + [slot for _, _, slot in levels]


def give_up(work: Work, slot: Slot) -> None:
    """The slot and all that was in it goes."""
    for task in list(work.slots.get(slot, ())):
        work.remove(task)


def _per_node(work: Work) -> None:
    used = set(work.used_slots())
    free = [n.id for n in work.draft.all(Node) if n.id not in used and work.eligible(n)]
    if free and not work.held_back():
        for node_id in sorted(free):
            work.create(node_id)


def _drop_old_iterations(work: Work) -> None:
    for task in list(work.tasks.values()):
        if task.job_iteration != work.service.job_iteration:
            work.remove(task)


def _replicated_job(work: Work) -> None:
    total, at_once = job_size(work.service.spec)
    used = work.used_slots()
    live = sum(1 for slot in used if work.live(slot))
    _fill(work, set(used), min(total - len(used), at_once - live))
