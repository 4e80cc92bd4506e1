"""Moving running tasks to other nodes: off a node that is drained, or as a rebalance says.

A move is a slot with two tasks of one template that should run: the *leaver*, which runs, and the
*comer*, made after it. Nothing else is written down, so a new leader goes on where the old one was.

- Start first, the rule: the comer is placed and started, and the leaver is told to stop once the
  comer runs (`settle` in update.py, for roll-outs as well).
- Stop first, where the service's update_config says so in words: the comer is placed and prepared;
  then the leaver is told to stop, and the comer starts when it has.

So a task that finds no other place runs on where it is, and the comer, which waits, says why. Host
ports, max_replicas and resources need no stop first: the two tasks never share a node, and what the
leaver holds is of no use to the comer. Jobs, and services with one task a node, do not move
(nodes.py).

The budget is that of the service's update_config: so many slots are on the move as `parallelism`
says, at least one, and start first a quarter of them; with stop first a task is told to stop only
while no more than parallelism of the slots that have a place do not run then. `delay` is not kept:
it is for watching a new version. A roll-out has the right of way: it decides about tasks that are
out of date, and what it has under way counts. One that is paused, or held back by a gate, lets
tasks move with the version that they have.

When the reason for a move is gone (the node is active again) before the comer runs, the comer goes
and the leaver stays. A comer that ends by itself before it runs is tried again after the restart
delay, doubled with each that the slot remembers.
"""

from __future__ import annotations

from manager.control.backoff import crashes_kept
from manager.control.nodes import is_drained, replacement_version
from manager.control.slots import Slot, slot_of, slot_order
from manager.control.template import (
    DEFAULT_RESTART_DELAY_NS,
    UPDATING,
    restart_policy,
    state_of,
)
from manager.control.work import Work
from swarm.clock import SECOND_NS
from swarm.v1 import StopCause, Task, TaskState, UpdateConfig

RETRY_NS_MAX = 300 * SECOND_NS
MOVING_SHARE = 4  # one in so many slots of a service may be on the move, start first
_BY_ITSELF = frozenset({TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED})
_NO_UPDATE = UpdateConfig(parallelism=1)


def move(work: Work) -> None:
    """One step of what is on the move, and of leaving nodes that are drained."""
    if work.mode.job or work.mode.per_node:
        return
    # Two tasks at least, history included: most slots have one.
    for slot in sorted((s for s, tasks in work.slots.items() if len(tasks) > 1), key=slot_order):
        found = pair(work, slot)
        if found is not None:
            _go_on(work, *found)
        else:
            _end(work, slot)
    if not work.leaving:
        return
    rolls = update_goes_on(work)
    left_over = room(work)
    for slot in sorted(work.leaving, key=slot_order):
        leaver = movable(work, slot)
        # In this very tick another may have taken the place of the one that was to leave.
        if leaver is None or not on_drained_node(work, leaver):
            continue
        if rolls and not work.up_to_date(leaver):
            continue
        # Where there is no room, one that is on its way makes some.
        work.moving = True
        if left_over <= 0:
            return
        left_over -= begin(work, leaver)


def _go_on(work: Work, leaver: Task, comer: Task) -> None:
    """What becomes of a move that is under way."""
    if state_of(comer) < TaskState.ASSIGNED and comer.node_id and comer.meta is not None:
        # It was made for one node and did not get its place in the tick that made it.
        work.refused = comer
        work.remove(comer)
        return
    if not _has_reason(work, leaver):
        # Not as history: the leaver is to be the slot's newest again, whose end counts.
        work.remove(comer)
        return
    work.moving = True
    if state_of(comer) < TaskState.READY or not stop_first(work) or work.held(comer.spec_version):
        return
    if _may_lose_one(work):
        left(work, leaver, comer)


def left(work: Work, leaver: Task, comer: Task) -> None:
    """The leaver is told to stop, for the comer has its place."""
    info = work.table.nodes.get(comer.node_id)
    where = info.name if info is not None else comer.node_id
    work.moved += 1
    work.stop(leaver, cause=StopCause.MOVED, message=f"moved to {where}")


def _has_reason(work: Work, leaver: Task) -> bool:
    if on_drained_node(work, leaver):
        return True
    status = work.service.rebalance_status
    return status is not None and status.running


def _end(work: Work, slot: Slot) -> None:
    """Where the leaver has come to its end for good while the comer waited, there is nothing to
    take over.
    """
    live = work.live(slot)
    tasks = work.slots[slot]
    if len(live) != 1 or live[0] is not tasks[-1] or state_of(live[0]) >= TaskState.STARTING:
        return
    before = tasks[-2] if len(tasks) > 1 else None
    if before is None or state_of(before) != TaskState.COMPLETE or not alike(work, before, live[0]):
        return
    if restart_policy(work.service.spec).condition not in ("", "any"):
        work.remove(live[0])


def begin(work: Work, leaver: Task, *, node_id: str = "") -> bool:
    """Makes the comer, which may go to this node only (any that fits); False: not now."""
    slot = slot_of(leaver)
    at_ns = _not_before_ns(work, slot, leaver)
    if work.now_ns < at_ns:
        work.wake(at_ns)
        return False
    work.moving = True
    comer = work.create(
        slot,
        version=replacement_version(work, leaver),
        ready_first=stop_first(work),
        restarts_ns=leaver.restarts_ns,
        crashes=crashes_kept(work.service, leaver, work.now_ns),
        node_id=node_id,
    )
    return comer is not None


# ------------------------------------------------------------------ reading


def pair(work: Work, slot: Slot) -> tuple[Task, Task] | None:
    """The slot's leaver and comer, while the comer does not run; None: nothing moves there."""
    live = work.live(slot)
    if len(live) < 2:
        return None
    comer = live[-1]
    runs = [t for t in live[:-1] if state_of(t) == TaskState.RUNNING]
    if not runs or state_of(comer) == TaskState.RUNNING or not alike(work, runs[-1], comer):
        return None
    return runs[-1], comer


def alike(work: Work, one: Task, other: Task) -> bool:
    """Whether two tasks are of one template, so that one can take the other's place."""
    same = one.spec_version == other.spec_version
    return same or (work.up_to_date(one) and work.up_to_date(other))


def waits_for_stop(work: Work, task: Task) -> bool:
    """Whether the task is a comer that starts when the leaver has stopped."""
    if not stop_first(work):
        return False
    found = pair(work, slot_of(task))
    return found is not None and found[1].id == task.id


def movable(work: Work, slot: Slot) -> Task | None:
    """The slot's task, if it runs and nothing else is under way in the slot."""
    live = work.live(slot)
    if len(live) != 1 or state_of(live[0]) != TaskState.RUNNING or work.lost(live[0]):
        return None
    return live[0]


def on_drained_node(work: Work, task: Task) -> bool:
    """Whether the task is to leave its node."""
    node = work.node(task)
    return node is not None and is_drained(node)


def stop_first(work: Work) -> bool:
    """Whether the service wants its tasks stopped before others take their place: only if it says
    so. Empty stands for Docker's default of roll-outs, which is stop first as well, and nobody has
    asked for it.
    """
    update = work.service.spec.update if work.service.spec else None
    return update is not None and update.order == "stop-first"


def parallelism(work: Work) -> int:
    """How many slots may be on the move at once."""
    spec = work.service.spec
    config = (spec.update if spec else None) or _NO_UPDATE
    own = config.parallelism or max(1, len(work.slots))
    # With start first never fewer run, whatever the number: it only bounds what they take in
    # addition while they move.
    return own if stop_first(work) else max(own, len(work.slots) // MOVING_SHARE)


def room(work: Work) -> int:
    """How many more moves may begin now."""
    rolls = update_goes_on(work)
    busy = 0
    for slot in work.used_slots():
        live = work.live(slot)
        if len(live) > 1:
            # Where the newest runs, the old one only waits for nodes to hear of it.
            busy += state_of(live[-1]) != TaskState.RUNNING
        elif rolls and live:
            busy += TaskState.ASSIGNED <= state_of(live[0]) < TaskState.RUNNING
    return parallelism(work) - busy


def update_goes_on(work: Work) -> bool:
    """Whether a roll-out is at work, so that what is out of date is its."""
    status = work.service.update_status
    return status is not None and status.state in UPDATING and not work.held_back()


def _may_lose_one(work: Work) -> bool:
    """Whether enough others run for one task to be told to stop before another has started. Slots
    that have found no place are not waited for: that could be for ever.
    """
    placed = running = 0
    for slot in work.used_slots():
        live = work.live(slot)
        placed += any(state_of(t) >= TaskState.ASSIGNED for t in live)
        running += any(state_of(t) == TaskState.RUNNING and not work.lost(t) for t in live)
    return running - 1 >= placed - parallelism(work)


def _not_before_ns(work: Work, slot: Slot, leaver: Task) -> int:
    """When the next comer may be made: comers that failed are not to be followed at the speed of
    failing.
    """
    failed = failed_after(work.slots[slot], leaver)
    if not failed:
        return 0
    policy = restart_policy(work.service.spec)
    delay_ns = DEFAULT_RESTART_DELAY_NS if policy.delay_ns is None else policy.delay_ns
    delay_ns = max(SECOND_NS, delay_ns) << min(len(failed) - 1, 16)
    last_ns = max(t.meta.updated_at_ns if t.meta else work.now_ns for t in failed)
    return last_ns + min(delay_ns, RETRY_NS_MAX)


def failed_after(slot: list[Task], leaver: Task) -> list[Task]:
    """Comers of the slot, whose tasks come oldest first, that ended by themselves."""
    place = next(i for i, task in enumerate(slot) if task.id == leaver.id)
    return [t for t in slot[place + 1 :] if state_of(t) in _BY_ITSELF]
