"""Start-first where there is no room for two: the slot changes stop-first after all.

Where the new task of a slot has found no place beside the old one (its host port, a full node, its
GPU, max_replicas), and would fit if the old one were gone, the old one is stopped and its place is
kept for the new one: that may go to this node only, and holds.py keeps others off until it is
there. Not as long as the service itself is about to free a place: a spare node is enough for a
roll-out that starts first. No more slots are down at once than `parallelism`; and nothing is
stopped for a task that would not fit afterwards either, the deadline sees to those.

The new task that is made for the place is told by its node, which others of a roll-out have not
before they are placed; so a new leader goes on. When the place will not do after all (the node
failed, a service of higher priority took it), the task may go anywhere again.
"""

from __future__ import annotations

from msgspec import structs

from manager.control.rollout import Rollout, made_by
from manager.control.slots import Slot, is_live, is_unplaced, slot_of
from manager.control.template import state_of
from manager.control.work import Work
from manager.scheduler import FOR_EVER, unavailable
from swarm import states
from swarm.clock import SECOND_NS
from swarm.v1 import Task, TaskState, UpdateConfig, UpdateStatus

# How long a new task looks for a place beside the old one.
LOOKS_NS = SECOND_NS


def fall_back(
    work: Work, roll: Rollout, config: UpdateConfig, status: UpdateStatus
) -> UpdateStatus:
    """Stops old tasks whose places the new ones need; the status with those counted."""
    if config.order != "start-first" or not roll.beside:
        return status
    if _frees_a_place(work):
        return status
    down = len(roll.down)
    for old, new in roll.beside:
        if config.parallelism and down >= config.parallelism:
            break
        reason = new.status.err if new.status else ""
        made_ns = new.meta.created_at_ns if new.meta else work.now_ns
        # A next attempt does not need the place before it may start.
        from_ns = max(made_ns + LOOKS_NS, new.start_after_ns)
        if work.now_ns < from_ns:
            work.wake(from_ns)
            continue
        if work.held(new.spec_version) or not _fits_after(work, new, old):
            continue
        if not _take_over(work, old, new):
            break
        down += 1
        status = structs.replace(
            status,
            stopped_first=status.stopped_first + 1,
            stopped_first_reason=reason.removesuffix(FOR_EVER),
        )
    return status


def _frees_a_place(work: Work) -> bool:
    """Whether a task of the service is on its way out, or about to be: its place may do."""
    for slot, tasks in work.slots.items():
        live = work.live(slot)
        taken = {t.node_id for t in live if is_unplaced(t)}
        if any(_stops(work, t) and t.node_id not in taken for t in tasks):
            return True
        if len(live) > 1 and any(
            state_of(t) >= TaskState.ASSIGNED for t in live if work.up_to_date(t)
        ):
            return True
    return False


def _stops(work: Work, task: Task) -> bool:
    if states.wanted(task.desired_state) or is_unplaced(task):
        return False
    return not states.ended(state_of(task)) and not work.lost(task)


def _fits_after(work: Work, new: Task, old: Task) -> bool:
    if work.places is None or work.lost(old):
        return False
    node = work.node(old)
    if node is None or unavailable(node) is not None:
        return False
    return work.places.fits(work.draft, new, old.node_id, out=(old.id,))


def _take_over(work: Work, old: Task, new: Task) -> bool:
    """Puts a task that waits for the old one's place into its slot; False: not in this tick."""
    slot: Slot = slot_of(old)
    made = work.create(
        slot,
        ready_first=True,
        restarts_ns=new.restarts_ns,
        crashes=new.crashes,
        node_id=old.node_id,
    )
    if made is None:
        return False
    for task in work.live(slot):
        if task.id != made.id:
            work.stop(task)
    return True


def let_go(work: Work) -> None:
    """Tasks that were to have an old one's place, and will not, may go anywhere, also while the
    roll-out rests.
    """
    if work.mode.per_node or work.places is None:
        return
    for task in [t for t in work.tasks.values() if t.node_id and is_unplaced(t)]:
        if task.meta is None or not made_by(work, task):
            continue
        siblings = work.slots[slot_of(task)]
        if any(t.node_id == task.node_id and _stops(work, t) for t in siblings):
            continue
        if any(is_live(t) and state_of(t) == TaskState.RUNNING for t in siblings):
            continue  # on the move to a node (moves.py)
        node = work.node(task)
        open_ = node is not None and unavailable(node) is None
        if open_ and work.places.fits(work.draft, task, task.node_id):
            continue
        made = work.create(
            slot_of(task),
            ready_first=True,
            start_after_ns=task.start_after_ns,
            restarts_ns=task.restarts_ns,
            crashes=task.crashes,
        )
        if made is not None:
            work.stop(task)
