"""Two tasks of a slot side by side: where the new one runs, the older ones are stopped. The end of
start-first, and of a move.
"""

from __future__ import annotations

from manager.control.moves import alike, left
from manager.control.rollout import runs_since_ns
from manager.control.template import state_of
from manager.control.work import Work
from swarm.clock import SECOND_NS
from swarm.v1 import Task, TaskState

# How long two tasks of a slot run side by side where nodes lead connections to them: the dispatcher
# gathers changes of published services for a moment, and a node must not be left with none to ask.
OVERLAP_NS = SECOND_NS


def settle(work: Work) -> None:
    """Where connections come through published ports, nodes have to hear of the new task first."""
    for slot in work.used_slots():
        live = work.live(slot)
        if len(live) < 2:
            continue
        runs = [t for t in live if state_of(t) == TaskState.RUNNING]
        fit = [t for t in runs if work.up_to_date(t)] or (runs if len(runs) > 1 else [])
        if not fit:
            continue
        kept = fit[-1]
        at_ns = _known_ns(work, kept)
        for task in live[: live.index(kept)]:
            if state_of(task) == TaskState.RUNNING and work.now_ns < at_ns:
                work.wake(at_ns)
            elif alike(work, task, kept) and state_of(task) == TaskState.RUNNING:
                left(work, task, kept)
            else:
                work.stop(task)
        for task in live[live.index(kept) + 1 :]:
            # One that is alike is to take its place (moves.py).
            if not alike(work, kept, task):
                work.stop(task)


def _known_ns(work: Work, task: Task) -> int:
    """From when on all nodes send connections to a task that runs."""
    ports = work.service.endpoint.ports if work.service.endpoint else ()
    if not any(p.publish_mode != "host" for p in ports) or task.meta is None:
        return 0
    return runs_since_ns(task) + OVERLAP_NS
