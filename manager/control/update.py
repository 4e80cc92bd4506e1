"""Rolling updates and rollbacks: which slots get a new task now, and what follows from failures.

There is no updater that runs along: each tick works the next step out of the objects (rollout.py).
`parallelism` slots are in flight at most, and none is stopped while so many are down already for
whatever reason. With a delay the slots go in batches: the next batch starts `delay` after the last
one runs (UpdateStatus.next_batch_at_ns); without, each slot that is done makes room for the next.
States, messages and defaults are Docker's (SwarmKit's orchestrator/update/updater.go). A task made
by the roll-out that ends by itself within `monitor` of its start counts as a failure, once a slot;
if more than max_failure_ratio of the slots have failed, failure_action says what follows. So it
does where no slot gets done for too long (deadline.py). When all is done and the last new task has
run for `monitor`, the update is completed.

A newer spec supersedes: the API clears update_status with it, and the roll-out begins anew with
what is to do then. A rollback by failure makes the spec before the roll-out the next version of the
service (versions.py, as a rollback by hand) and forgets the previous one, as in Docker, so that a
failed rollback leads nowhere else. Where it cannot be done the roll-out is paused, with the reason.

With start-first, an old task is stopped when the new one runs (overlap.py); with stop-first the new
task is made together with the old one's stop, and starts when that has happened. Where the two do
not fit beside each other, start-first becomes stop-first (fallback.py).

With `pause_after` the roll-out pauses for a person once so many slots have the new template and
have been watched; what a resume lets go on stands in its UpdateStatus as well.

What depends_on holds back (gates.py) is not begun: no slot loses its old task to a new one that may
not start. Meanwhile the status stays UPDATING and its message says what it waits for. Nor is one
begun whose new task no node could ever take.
"""

from __future__ import annotations

from msgspec import structs

from manager.allocator import PortLedger
from manager.control import versions
from manager.control.deadline import can_never_begin, noted, overdue, takes
from manager.control.fallback import LOOKS_NS, fall_back, let_go
from manager.control.moves import on_drained_node
from manager.control.overlap import settle
from manager.control.rollout import Rollout, failed, is_to_do, look
from manager.control.slots import Slot
from manager.control.stuck import failure
from manager.control.template import (
    PAUSED,
    ROLLBACK,
    UPDATING,
    monitor_ns,
    state_of,
    update_config,
)
from manager.control.work import Work
from swarm import errors, states
from swarm.v1 import TaskState, UpdateConfig, UpdateState, UpdateStatus

_IN_PROGRESS = "update in progress"
_WAITS = "update waits "
_COMPLETED = "update completed"
_ROLLED_BACK = "rollback completed"
_BECAUSE = "update rolled back"


def update(work: Work) -> None:
    """One step of the service's roll-out, if there is one."""
    if work.mode.job:
        return
    settle(work)
    status = work.service.update_status
    if status is not None and (status.state in PAUSED or status.state in UPDATING):
        let_go(work)
    if status is not None and status.state in PAUSED:
        return
    if status is None or status.state not in UPDATING:
        if not any(is_to_do(work, slot) for slot in work.used_slots()):
            return
        status = UpdateStatus(
            state=UpdateState.UPDATING, started_at_ns=work.now_ns, message=_IN_PROGRESS
        )
    roll = look(work)
    config = update_config(work.service)
    status = _in_time(work, config, status)
    ended = failed(work, status)
    total = len(roll.to_do) + len(roll.changed)
    if ended and len(ended) / total > config.max_failure_ratio:
        first = ended[0]
        cause = f" due to failure or early termination of task {first.id}: {failure(first)}"
        if config.failure_action != "continue":
            _fail(work, config, status, cause)
            return
    what = work.held_back() if roll.to_do else ""
    status = noted(work, roll, status, held=bool(what))
    if not roll.to_do and roll.arrived:
        _complete_when_watched(work, config, status, roll)
    elif what:
        _set_status(work, _said(status, f"{_WAITS}{what}"))
    elif lack := overdue(work, roll, status):
        _fail(work, config, status, f": {lack}")
    else:
        if status.message.startswith(_WAITS):
            status = _said(status, _IN_PROGRESS)
        _set_status(work, _step(work, config, status, roll))


def _step(work: Work, config: UpdateConfig, status: UpdateStatus, roll: Rollout) -> UpdateStatus:
    """Begins what may begin now; the status that follows."""
    left = None
    if roll.to_do and status.pause_after:
        left = status.pause_after - roll.fresh
        if left <= 0 and roll.arrived:
            return _pause_when_watched(work, config, status, roll)
    status = _next_batch(work, config, status, roll, left)
    return fall_back(work, roll, config, status)


# ------------------------------------------------------------------ failing


def _fail(work: Work, config: UpdateConfig, status: UpdateStatus, cause: str) -> None:
    """Does what failure_action says of a roll-out that has failed. `cause` follows the words
    "update paused" or "update rolled back".
    """
    back = status.state in ROLLBACK
    if config.failure_action == "rollback" and not back:
        why = _roll_back(work, cause)
        if not why:
            return
        cause = f"{cause}; it cannot be rolled back: {why}"
    state = UpdateState.ROLLBACK_PAUSED if back else UpdateState.PAUSED
    word = "rollback" if back else "update"
    paused = structs.replace(status, state=state, message=f"{word} paused{cause}")
    _set_status(work, structs.replace(paused, next_batch_at_ns=0))


def _roll_back(work: Work, cause: str) -> str:
    """Makes the spec before the roll-out the next version; why not, if that cannot be done."""
    service, draft = work.service, work.draft
    entry = versions.before_roll_out(draft, service)
    if entry is None or entry.spec is None:
        return "there is no version before it"
    spec = versions.spec_back(draft, service, entry)
    try:
        endpoint = versions.checked(draft, service, spec, entry.spec_version, PortLedger(draft))
    except errors.SwarmError as error:
        return error.message
    status = UpdateStatus(
        state=UpdateState.ROLLBACK_STARTED,
        started_at_ns=work.now_ns,
        message=f"{_BECAUSE}{cause}",
    )
    work.use(
        versions.put_next(
            draft,
            service,
            spec,
            endpoint=endpoint,
            sealed=entry.sealed_registry_auth,
            status=status,
            rollback_to=entry.spec_version,
            forgets=True,
        )
    )
    update(work)
    return ""


# ------------------------------------------------------------------ batches


def _next_batch(
    work: Work, config: UpdateConfig, status: UpdateStatus, roll: Rollout, left: int | None
) -> UpdateStatus:
    """Starts as many slots as may start now, and no more than are `left` before the pause. Slots
    whose task has no node yet have nothing to lose and are changed at once.
    """
    to_do = roll.to_do
    for slot in [s for s in to_do if _waits_for_node(work, s)]:
        if left is not None and left <= 0:
            return status
        if not _change_slot(work, slot, config):
            return status
        left = None if left is None else left - 1
        to_do = [s for s in to_do if s != slot]
    if not to_do:
        return status
    room = (config.parallelism or len(to_do)) - len(roll.in_flight)
    if config.delay_ns > 0 and roll.changed:
        if roll.in_flight:
            return status
        at_ns = status.next_batch_at_ns
        if not at_ns:
            at_ns = work.now_ns + config.delay_ns
            counts_ns = max(status.progress_at_ns, at_ns)
            status = structs.replace(status, next_batch_at_ns=at_ns, progress_at_ns=counts_ns)
        if work.now_ns < at_ns:
            work.wake(at_ns)
            return status
    room = room if left is None else min(room, left)
    if room <= 0:
        return status
    _change(work, config, roll, to_do, room)
    return structs.replace(status, next_batch_at_ns=0) if status.next_batch_at_ns else status


def _change(work: Work, config: UpdateConfig, roll: Rollout, to_do: list[Slot], room: int) -> None:
    """Begins with so many of the slots. Slots that do not run go first: they have least to lose (as
    SwarmKit's updater). Then those that have to leave their node: they need not move twice.
    """
    down = set(roll.down)
    never = not work.mode.per_node and can_never_begin(work, roll)
    for slot in sorted(to_do, key=lambda slot: (_runs(work, slot), not _leaves(work, slot))):
        if room <= 0:
            return
        if _runs(work, slot):
            if never or (work.mode.per_node and not takes(work, slot)):
                continue
            if config.order != "start-first" and config.parallelism:
                if len(down) >= config.parallelism:
                    return
                down.add(slot)
        if not _change_slot(work, slot, config):
            return
        room -= 1


def _waits_for_node(work: Work, slot: Slot) -> bool:
    live = work.live(slot)
    return bool(live) and all(state_of(t) < TaskState.ASSIGNED for t in live)


def _runs(work: Work, slot: Slot) -> bool:
    return any(state_of(t) == TaskState.RUNNING for t in work.live(slot))


def _leaves(work: Work, slot: Slot) -> bool:
    return any(on_drained_node(work, t) for t in work.live(slot))


def _change_slot(work: Work, slot: Slot, config: UpdateConfig) -> bool:
    """Gives the slot a task of the present spec; False: no more in this tick."""
    old = work.live(slot)
    beside = config.order == "start-first" and _runs(work, slot)
    ahead = [t for t in work.slots[slot] if t.desired_state != TaskState.REMOVE]
    stays = [t for t in old if beside and state_of(t) == TaskState.RUNNING]
    # Beside the old one that runs, and not beside one more that is still on its way out.
    waits = any(
        state_of(t) >= TaskState.ASSIGNED and not states.ended(state_of(t)) and not work.lost(t)
        for t in ahead
        if t not in stays
    )
    if work.create(slot, ready_first=waits) is None:
        return False
    if beside:
        work.wake(work.now_ns + LOOKS_NS)
    for task in old:
        if task not in stays:
            work.stop(task)
    return True


# ------------------------------------------------------------------ time


def _in_time(work: Work, config: UpdateConfig, status: UpdateStatus) -> UpdateStatus:
    """The status without moments further ahead than they can be meant: a leader before, whose clock
    was ahead, has noted them, and the roll-out does not wait for them.
    """
    now_ns = work.now_ns
    next_ns = now_ns + config.delay_ns
    return structs.replace(
        status,
        started_at_ns=min(status.started_at_ns, now_ns),
        resumed_at_ns=min(status.resumed_at_ns, now_ns),
        next_batch_at_ns=min(status.next_batch_at_ns, next_ns),
        progress_at_ns=min(status.progress_at_ns, next_ns + monitor_ns(config)),
    )


def _watched_until_ns(work: Work, config: UpdateConfig, status: UpdateStatus, roll: Rollout) -> int:
    """When all that are changed have run long enough; where by such a clock they run only in times
    to come, they are watched from the last progress on.
    """
    if not roll.arrived_ns:
        return 0
    since_ns = roll.arrived_ns
    if since_ns > work.now_ns:
        since_ns = min(status.progress_at_ns or work.now_ns, work.now_ns)
    return since_ns + monitor_ns(config)


# ------------------------------------------------------------------ pausing, completing


def _pause_when_watched(
    work: Work, config: UpdateConfig, status: UpdateStatus, roll: Rollout
) -> UpdateStatus:
    """Pauses once those that are changed have run long enough."""
    until_ns = _watched_until_ns(work, config, status, roll)
    if work.now_ns < until_ns:
        work.wake(until_ns)
        return status
    back = status.state == UpdateState.ROLLBACK_STARTED
    total, unit = len(roll.slots), "task" if work.mode.per_node else "replica"
    word, way_out = ("rollback", "resume it") if back else ("update", "resume it or roll back")
    return structs.replace(
        status,
        state=UpdateState.ROLLBACK_PAUSED if back else UpdateState.PAUSED,
        message=(f"{word} paused after {roll.fresh} of {total} {unit}s, as asked: {way_out}"),
        awaits_resume=True,
        next_batch_at_ns=0,
    )


def _complete_when_watched(
    work: Work, config: UpdateConfig, status: UpdateStatus, roll: Rollout
) -> None:
    """Ends the roll-out once its last task has run long enough."""
    until_ns = _watched_until_ns(work, config, status, roll)
    if work.now_ns < until_ns:
        work.wake(until_ns)
        _set_status(work, status)
        return
    back = status.state == UpdateState.ROLLBACK_STARTED
    _set_status(
        work,
        UpdateStatus(
            state=UpdateState.ROLLBACK_COMPLETED if back else UpdateState.COMPLETED,
            started_at_ns=status.started_at_ns,
            completed_at_ns=work.now_ns,
            message=_rolled_back(status) if back else _COMPLETED,
            resumed_at_ns=status.resumed_at_ns,
            stopped_first=status.stopped_first,
            stopped_first_reason=status.stopped_first_reason,
        ),
    )


def _rolled_back(status: UpdateStatus) -> str:
    """Of a rollback that a failure led to, the failure is told for as long as the service rests."""
    because = status.message.startswith(_BECAUSE)
    return f"{_ROLLED_BACK}; {status.message}" if because else _ROLLED_BACK


def _said(status: UpdateStatus, message: str) -> UpdateStatus:
    """Another message for a roll-out; a rollback keeps its own, which says why there is one."""
    if status.state != UpdateState.UPDATING:
        return status
    return structs.replace(status, message=message)


def _set_status(work: Work, status: UpdateStatus) -> None:
    if status != work.service.update_status:
        work.use(work.draft.put(structs.replace(work.service, update_status=status)))
