"""A roll-out as the objects tell it: which slots are to do, in flight, done, and what has failed.

Read only, and nothing is remembered, so a new leader sees the same. Which tasks are the roll-out's
is told by versions: `task_version` moves with each template, and a task of it or a later version
that is up to date was made since. Times would not do, for managers' clocks differ. A slot is

- to do, when none of its tasks fits the present spec;
- in flight, when its new task does not run yet, or failed and is to be followed by another. One
  that never had a place and finds none does not count: it must not hold up those that run;
- done, when its new task runs, or has come to its end for good;
- down, when it should run and does not, whatever the version, and had a place before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from manager.control.elsewhere import went_elsewhere
from manager.control.slots import Slot, is_live, is_unplaced
from manager.control.template import monitor_ns, state_of, update_config
from manager.control.work import Work
from swarm import states
from swarm.v1 import Task, TaskState, UpdateStatus

_BY_ITSELF = frozenset({TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED})


@dataclass(slots=True)
class Rollout:
    """One look at a service's roll-out."""

    # All that have a task, in order.
    slots: list[Slot] = field(default_factory=list)
    to_do: list[Slot] = field(default_factory=list)
    # Those that have come to the present template by this roll-out.
    changed: list[Slot] = field(default_factory=list)
    in_flight: list[Slot] = field(default_factory=list)
    down: set[Slot] = field(default_factory=set)
    # How many have the new template, be it that they do not run yet; and how many are done.
    fresh: int = 0
    done: int = 0
    # How many were begun of which no task has run or failed yet.
    untried: int = 0
    # Whether all that are changed run, or have come to their end, and since when at the latest.
    arrived: bool = True
    arrived_ns: int = 0
    # Whether a task of it was ever given a place.
    placed: bool = False
    # Its tasks that have no place, or do not run yet; and those that failed before they were due,
    # so that the next attempt has yet to be made (restart.py).
    unplaced: list[Task] = field(default_factory=list)
    coming: list[Task] = field(default_factory=list)
    # Where the old task runs and the new one, which is to run beside it first, has no place.
    beside: list[tuple[Task, Task]] = field(default_factory=list)


def look(work: Work) -> Rollout:
    """The service's roll-out as it is now."""
    roll = Rollout(slots=work.used_slots())
    for slot in roll.slots:
        _look(work, roll, slot)
    return roll


def _look(work: Work, roll: Rollout, slot: Slot) -> None:
    if len(work.slots[slot]) == 1 and _look_at_one(work, roll, slot):
        return
    tasks = [t for t in work.slots[slot] if t.desired_state != TaskState.REMOVE]
    live = [t for t in tasks if is_live(t)]
    fit = [t for t in live if work.up_to_date(t)]
    running = [t for t in live if state_of(t) == TaskState.RUNNING]
    newest = tasks[-1]
    ended = not fit and states.ended(state_of(newest)) and work.up_to_date(newest)
    # One that is not to be followed by another was told to stop (restart.py).
    again = [newest] if ended and states.wanted(newest.desired_state) else []
    if fit or ended:
        roll.fresh += 1
        over = not live and not again
        roll.done += over or any(state_of(t) == TaskState.RUNNING for t in fit)
    elif work.may_create(slot):
        roll.to_do.append(slot)
    had_place = len(work.slots[slot]) > 1 or any(not is_unplaced(t) for t in (*live, *again))
    if (live or again) and not running and had_place:
        roll.down.add(slot)
    made = [t for t in tasks if made_by(work, t)]
    if not made:
        return
    roll.changed.append(slot)
    roll.placed = roll.placed or any(state_of(t) >= TaskState.ASSIGNED for t in made)
    coming = [t for t in made if is_live(t) and state_of(t) != TaskState.RUNNING]
    for task in (*coming, *again):
        (roll.unplaced if is_unplaced(task) else roll.coming).append(task)
    if coming or again:
        roll.arrived = False
        ran = again or coming[-1].crashes or any(t.running_since_ns for t in made)
        roll.untried += not ran
        if had_place:
            roll.in_flight.append(slot)
    old = [t for t in running if not work.up_to_date(t)]
    if old and coming and is_unplaced(coming[-1]):
        roll.beside.append((old[-1], coming[-1]))
    for task in made:
        if is_live(task) and state_of(task) == TaskState.RUNNING:
            roll.arrived_ns = max(roll.arrived_ns, runs_since_ns(task))


def _look_at_one(work: Work, roll: Rollout, slot: Slot) -> bool:
    """As `_look`, for a slot of one task that runs, as most do in large services; False: it does
    not.
    """
    task = work.slots[slot][0]
    if state_of(task) != TaskState.RUNNING or not is_live(task):
        return False
    if work.up_to_date(task):
        roll.fresh += 1
        roll.done += 1
        if task.spec_version >= work.service.task_version:
            roll.changed.append(slot)
            roll.placed = True
            roll.arrived_ns = max(roll.arrived_ns, runs_since_ns(task))
    elif work.may_create(slot):
        roll.to_do.append(slot)
    return True


def is_to_do(work: Work, slot: Slot) -> bool:
    """Whether the slot has no task that fits the present spec, and may get one."""
    if not work.may_create(slot) or any(work.up_to_date(t) for t in work.live(slot)):
        return False
    newest = work.newest(slot)
    return newest is not None and not (states.ended(state_of(newest)) and work.up_to_date(newest))


def made_by(work: Work, task: Task) -> bool:
    """Whether the task was made for the template that is rolled out."""
    return task.spec_version >= work.service.task_version and work.up_to_date(task)


def runs_since_ns(task: Task) -> int:
    """Since when the task runs, by managers' clocks."""
    return task.running_since_ns or (task.meta.updated_at_ns if task.meta else 0)


def failed(work: Work, status: UpdateStatus) -> list[Task]:
    """The first failure of each slot whose new task ended by itself while it was watched, and since
    the roll-out began or was resumed.
    """
    since_ns = max(status.started_at_ns, status.resumed_at_ns)
    watched_ns = monitor_ns(update_config(work.service))
    found: dict[Slot, Task] = {}
    for slot, tasks in work.slots.items():
        for task in tasks:
            if (
                state_of(task) in _BY_ITSELF
                and task.desired_state != TaskState.REMOVE
                and _ended_ns(work, task) >= since_ns
                and not _outlived(work, task, watched_ns)
                and made_by(work, task)
                and not went_elsewhere(work, task)
            ):
                found.setdefault(slot, task)
    return sorted(found.values(), key=lambda t: (t.meta.created_at_ns if t.meta else 0, t.id))


def _outlived(work: Work, task: Task, watched_ns: int) -> bool:
    """Whether an ended task had run for longer than it was watched."""
    since_ns = task.running_since_ns
    return bool(since_ns) and _ended_ns(work, task) - since_ns > watched_ns


def _ended_ns(work: Work, task: Task) -> int:
    """When a manager heard of the end; what is written to a task afterwards is written at once."""
    return task.meta.updated_at_ns if task.meta else work.now_ns
