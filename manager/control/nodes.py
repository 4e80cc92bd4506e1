"""What becomes of tasks when something becomes of their node.

| node | tasks that should run there |
|---|---|
| object gone | ORPHANED; replaced at once |
| down, left, or removed by force | told to stop when it is back; replaced at once, elsewhere |
| up, but the runtime does not answer | nothing for ENGINE_GRACE_NS; then as if it were down |
| down for 24 h | the same, and ORPHANED: given up |
| a GPU that the task holds is sick or gone | stopped; the replacement starts when it has |
| drained | moved within the service's budget, the new task first (moves.py) |
| drained, and it cannot move (a job's; one a node; it does not run yet) | as the next row |
| no longer within the constraints | stopped; the replacement starts when it has |
| paused, unknown | nothing |

SwarmKit does the same in several places (orchestrator/*, constraintenforcer, taskreaper; the 24 h
are its defaultOrphanTimeout), with its restart delay for tasks lost with their node, which has no
purpose: the delay is there to slow crash loops down.
In services with one task a node there is no elsewhere: the slot stays empty until it may be used,
and a task whose runtime does not answer is left alone.

Since when a runtime does not answer stands in the node, by the managers' clocks, so a new leader
goes on. It says nothing of the node's other runtimes.
"""

from __future__ import annotations

from manager.control.backoff import crashes_kept
from manager.control.slots import is_live, is_lost, slot_of
from manager.control.template import THROUGH, state_of
from manager.control.work import Work
from swarm import states
from swarm.clock import SECOND_NS
from swarm.v1 import Availability, Node, StopCause, Task, TaskState

ORPHAN_AFTER_NS = 24 * 3600 * SECOND_NS
DRAINED = "its node is being drained"
NO_ANSWER = "its node's runtime did not answer, so another task has taken its place"


def follow_nodes(work: Work) -> None:
    """Applies the table above to all tasks of the service."""
    for task in list(work.tasks.values()):
        if state_of(task) < TaskState.ASSIGNED:
            if work.mode.per_node and is_live(task) and not work.may_create(slot_of(task)):
                work.stop(task)
            continue
        if states.ended(state_of(task)):
            continue
        node = work.node(task)
        if node is None:
            task = work.orphan(task, "its node was removed from the cluster")
            if states.wanted(task.desired_state):
                _replace(work, task)
        elif is_lost(node):
            if states.wanted(task.desired_state):
                _replace(work, task)
            _give_up_late(work, work.tasks.get(task.id, task), node)
        elif not _answers(work, task, node) or not states.wanted(task.desired_state):
            continue
        elif fault := _device_fault(task, node):
            _replace(work, task, cause=StopCause.DEVICE, message=fault)
        elif is_drained(node):
            if _moves(work, task):
                work.leaving.add(slot_of(task))
            else:
                _replace(work, task, cause=StopCause.MOVED, message=DRAINED)
        elif _must_leave(work, task, node):
            _replace(work, task)


def _answers(work: Work, task: Task, node: Node) -> bool:
    """Whether the task's runtime answers, or has done so a moment ago. If not, the task is replaced
    elsewhere, and stays known: it stops when the runtime is back.
    """
    at_ns = work.engine_lost_ns(task, node)
    if not at_ns:
        return True
    if work.now_ns < at_ns:
        work.wake(at_ns, slot_of(task))
        return True
    # Where a node is the slot there is no elsewhere: what runs there runs on.
    if states.wanted(task.desired_state) and not work.mode.per_node:
        _replace(work, task, message=NO_ANSWER)
    return False


def _device_fault(task: Task, node: Node) -> str:
    """Why the task cannot go on with its GPUs, for people; empty: it can. A GPU that is not told
    of at all is gone: agents keep those that they lose as unhealthy, and know them again when they
    start anew.
    """
    if not task.assigned_gpus or node.description is None:
        return ""
    known = {gpu.uuid: gpu for gpu in node.description.gpus}
    for uuid in task.assigned_gpus:
        gpu = known.get(uuid)
        if gpu is None:
            return f"GPU {uuid} is not on its node any more"
        if not gpu.healthy:
            why = f": {gpu.health_message}" if gpu.health_message else ""
            return f"GPU {uuid} is not healthy{why}"
    return ""


def is_drained(node: Node) -> bool:
    """Whether tasks are to leave the node."""
    return node.spec is not None and node.spec.availability == Availability.DRAIN


def _moves(work: Work, task: Task) -> bool:
    """Whether the task stays until another has taken its place: moves.py sees to it."""
    if work.mode.job or work.mode.per_node:
        return False
    return state_of(task) == TaskState.RUNNING


def _must_leave(work: Work, task: Task, node: Node) -> bool:
    if all(c.matches(node) for c in work.need.constraints):
        return False
    # Tasks that are out of date are the roll-out's: it decides when they go. Where a node is a slot
    # it leaves this one out, as nothing may follow there.
    return work.mode.per_node or work.up_to_date(task)


def _give_up_late(work: Work, task: Task, node: Node) -> None:
    since_ns = node.status.since_ns if node.status else 0
    if not since_ns:
        return
    if work.now_ns >= since_ns + ORPHAN_AFTER_NS:
        work.orphan(task, "its node has been down for 24 hours")
    else:
        work.wake(since_ns + ORPHAN_AFTER_NS, slot_of(task))


def _replace(
    work: Work,
    task: Task,
    *,
    cause: StopCause = StopCause.UNSPECIFIED,
    message: str = "",
) -> None:
    """Stops the task and puts the next one in its slot, which starts when those before it have
    stopped, or are lost. Restarts that count are carried on, and so is a delay that is not over,
    and the crashes in a row. What follows a job's task is made when that has ended (jobs.py).
    """
    if work.mode.job:
        work.stop(task, cause=cause, message=message)
        return
    slot = slot_of(task)
    others = [t for t in work.live(slot) if t.id != task.id]
    if not others and work.may_create(slot):
        due_ns = task.start_after_ns if task.start_after_ns > work.now_ns else 0
        made = work.create(
            slot,
            version=replacement_version(work, task),
            ready_first=True,
            start_after_ns=due_ns,
            restarts_ns=task.restarts_ns,
            crashes=crashes_kept(work.service, task, work.now_ns),
        )
        if made is None:
            return  # the next tick comes back to it
    work.stop(task, cause=cause, message=message)


def replacement_version(work: Work, task: Task) -> int:
    """What a replacement runs: what it replaces. Only a roll-out moves slots to another version, so
    that its pace, its watch over failures and its pause hold whatever happens meanwhile. Once it is
    through, a slot that was closed then (its node was away) comes with the present version: its
    failures are no roll-out's, to be rolled back for.
    """
    status = work.service.update_status
    through = status is not None and status.state in THROUGH
    if through or work.up_to_date(task) or not work.knows_version(task.spec_version):
        return work.service.spec_version
    return task.spec_version
