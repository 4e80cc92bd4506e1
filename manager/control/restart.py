"""What follows a task that has ended by itself.

The policy is Docker's: condition (none, on-failure, any), delay, max_attempts, window; and the
delay grows with the crashes in a row (backoff.py). The replacement is made at once, so that it is
placed and prepared during the delay; it has desired state READY and `start_after_ns`, and becomes
RUNNING when it is due, its predecessor has stopped and no gate (gates.py) holds it back; one that
is held back gets its node only then. One that fails to get ready before is replaced when it would
have been due. All of it stands in the objects: a new leader goes on where the old one was.

Where the node is to blame, the next attempt is made elsewhere before any of this (elsewhere.py).

The window, and a departure: SwarmKit counts the restarts of the last `window`. With a window
shorter than the delay none is ever counted, and max_attempts does nothing. Here the time spent
waiting for delays, which may have grown, and getting started does not count as part of the window,
so it measures running.

Leaders' clocks may differ by hours. No attempt waits for longer than the policy can have meant,
whatever the clock of the leader that made it has said.

A slot whose task ended for good keeps that task as its newest; whether it has, is decided again
from the same facts each time, so a changed policy or template brings it back to life.
"""

from __future__ import annotations

from msgspec import structs

from manager.control.backoff import (
    crashes_after,
    crashes_kept,
    delay_ns,
    starting_ns,
    waited_ns,
)
from manager.control.elsewhere import goes_elsewhere
from manager.control.moves import waits_for_stop
from manager.control.nodes import replacement_version
from manager.control.slots import Slot, is_live
from manager.control.template import restart_policy, state_of, stop_grace_ns
from manager.control.work import Work
from swarm import states
from swarm.clock import SECOND_NS
from swarm.v1 import RestartPolicy, StopCause, Task, TaskState

# How long a replacement waits for a predecessor that does not stop, beyond its grace period
# (SwarmKit's OldTaskTimeout is the minute alone).
OLD_TASK_TIMEOUT_NS = 60 * SECOND_NS
_BY_ITSELF = frozenset({TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED})


def restart(work: Work) -> None:
    """Replaces what has ended, slot by slot, where the policy says so."""
    for slot in work.used_slots():
        tasks = work.slots[slot]
        if len(tasks) == 1 and is_live(tasks[0]):
            continue  # as most are, so that a look at a large service costs less
        newest = work.newest(slot)
        assert newest is not None
        live = work.live(slot)
        if any(work.up_to_date(t) for t in live):
            _retire(work, slot)
            continue
        # With start-first the old task goes on beside a new one that failed.
        if live and (is_live(newest) or not work.up_to_date(newest)):
            _retire(work, slot)
            continue
        if not work.may_create(slot):
            _retire(work, slot)
            continue
        if not work.lost(newest) and goes_elsewhere(work, newest):
            if _try_elsewhere(work, slot, newest):
                _retire(work, slot)
            continue
        if not _replaced(work, newest):
            _retire(work, slot)
            continue
        if _failed_early(work, newest):
            work.wake(newest.start_after_ns)
            continue
        if _next_attempt(work, slot, newest):
            _retire(work, slot)


def _failed_early(work: Work, newest: Task) -> bool:
    """Whether a replacement failed to get ready while its restart delay still ran. The next one
    waits for the end of that delay: what fails at once must not be tried at the speed of failing.
    """
    early = work.now_ns < newest.start_after_ns <= _latest_ns(work, newest)
    if not early or not _ended_by_itself(newest) or work.lost(newest):
        return False
    # What runs another version now may be tried at once; where a roll-out is paused that is none.
    return work.up_to_date(newest) or replacement_version(work, newest) == newest.spec_version


def _retire(work: Work, slot: Slot) -> None:
    """Tasks that ended by themselves are not asked to run any more. A job's successes stay."""
    for task in list(work.slots[slot]):
        if not states.ended(state_of(task)) or not states.wanted(task.desired_state):
            continue
        if not (work.mode.job and state_of(task) == TaskState.COMPLETE):
            work.stop(task)


def _try_elsewhere(work: Work, slot: Slot, refused: Task) -> bool:
    due_ns = refused.start_after_ns if refused.start_after_ns > work.now_ns else 0
    made = work.create(
        slot,
        version=replacement_version(work, refused),
        ready_first=True,
        start_after_ns=due_ns,
        restarts_ns=refused.restarts_ns,
        crashes=refused.crashes,
    )
    return made is not None


def _next_attempt(work: Work, slot: Slot, ended: Task) -> bool:
    policy = restart_policy(work.service.spec)
    version = replacement_version(work, ended)
    if _ended_by_itself(ended) and not work.lost(ended):
        crashes = crashes_after(work.service, ended, work.now_ns)
        due_ns = work.now_ns + delay_ns(policy, crashes, work.rng)
        restarts = _counted(ended, policy, work.now_ns)
        limit = policy.max_attempts or 0
        made = work.create(
            slot,
            version=version,
            ready_first=True,
            start_after_ns=due_ns,
            restarts_ns=(*restarts, due_ns)[-limit:] if limit else (),
            crashes=crashes,
        )
    else:
        # Where a node was lost, the delay is not over for that.
        due_ns = ended.start_after_ns if ended.start_after_ns > work.now_ns else 0
        made = work.create(
            slot,
            version=version,
            ready_first=True,
            start_after_ns=due_ns,
            restarts_ns=ended.restarts_ns,
            crashes=crashes_kept(work.service, ended, work.now_ns),
        )
    return made is not None


def _ended_by_itself(task: Task) -> bool:
    """Not those that the cluster stopped for its own reasons: what they say of their end does not
    count, and they are replaced whatever the policy (preempted, moved, a device).
    """
    if task.stop_cause != StopCause.UNSPECIFIED:
        return False
    if not states.ended(state_of(task)) or state_of(task) == TaskState.ORPHANED:
        return False
    return states.wanted(task.desired_state) or state_of(task) in _BY_ITSELF


def _replaced(work: Work, task: Task) -> bool:
    """Whether the slot's newest task, which does not run, gets a successor."""
    if not _ended_by_itself(task):
        return True
    policy = restart_policy(work.service.spec)
    if state_of(task) == TaskState.COMPLETE:
        again = not work.mode.job and policy.condition in ("", "any")
    else:
        again = policy.condition != "none"
    if not again:
        return False
    limit = policy.max_attempts or 0
    if not limit:
        return True
    # Decided now, or decided when its desired state was changed: the same moment either way.
    decided_ns = work.now_ns
    if not states.wanted(task.desired_state) and task.meta is not None:
        decided_ns = task.meta.updated_at_ns
    return len(_counted(task, policy, decided_ns)) < limit


def _counted(task: Task, policy: RestartPolicy, at_ns: int) -> tuple[int, ...]:
    """The restarts that count at a time, oldest first."""
    window_ns = policy.window_ns or 0
    if not window_ns:
        return task.restarts_ns
    kept: list[int] = []
    starting = starting_ns(task, at_ns, due_ns=task.start_after_ns)
    waited = 0  # by the attempts since
    for i, restart_ns in enumerate(reversed(task.restarts_ns)):
        # What is kept is moved on, so that the attempts that follow know of it.
        moved_ns = restart_ns + starting
        if at_ns - moved_ns - waited <= window_ns:
            kept.append(moved_ns)
        waited += waited_ns(policy, max(0, task.crashes - i))
    return tuple(reversed(kept))


def promote(work: Work) -> None:
    """Lets tasks start that are due, whose predecessors have stopped and whose gates are open."""
    for task in list(work.tasks.values()):
        if task.desired_state != TaskState.READY or states.ended(state_of(task)):
            continue
        if task.start_after_ns > work.now_ns:
            due_ns = min(task.start_after_ns, _latest_ns(work, task))
            if due_ns < task.start_after_ns:
                work.put(structs.replace(task, start_after_ns=due_ns))
            work.wake(due_ns)
            continue
        if _predecessors_stop(work, task) or work.held(task.spec_version):
            continue
        if waits_for_stop(work, task):
            continue
        work.put(structs.replace(task, desired_state=work.target))


def _latest_ns(work: Work, task: Task) -> int:
    """When an attempt is due at the latest, as seen from now."""
    return work.now_ns + waited_ns(restart_policy(work.service.spec), task.crashes)


def _predecessors_stop(work: Work, task: Task) -> bool:
    """Whether a task of the same slot is still on its way out, and worth waiting for."""
    made_ns = task.meta.created_at_ns if task.meta else work.now_ns
    until_ns = made_ns + OLD_TASK_TIMEOUT_NS + stop_grace_ns(work.service.spec)
    if work.now_ns >= until_ns:
        return False
    slot = task.slot or task.node_id
    for other in work.slots[slot]:
        stopping = other.desired_state == TaskState.SHUTDOWN
        if stopping and not states.ended(state_of(other)) and not work.lost(other):
            work.wake(until_ns)
            return True
    return False
