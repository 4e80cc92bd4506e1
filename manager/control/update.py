"""Rolling updates and rollbacks: which slots get a new task now, and what follows from failures.

There is no updater that runs along: each tick works the next step out of the objects. A slot is
- to do, when none of its tasks fits the present spec;
- in flight, when its new task does not run yet;
- done otherwise.
`parallelism` slots are in flight at most. With a delay the slots go in batches: the next batch
starts `delay` after the last one runs (UpdateStatus.next_batch_at_ns); without, each slot that is
done makes room for the next. States, messages and defaults are Docker's (SwarmKit's
orchestrator/update/updater.go). A task made by the roll-out that ends by itself within `monitor`
of its start counts as a failure, once a slot; if more than max_failure_ratio of the slots have
failed, failure_action says what follows. When all is done and the last new task has run for
`monitor`, the update is completed.

A newer spec supersedes: the API clears update_status with it, and the roll-out begins anew with
what is to do then. A rollback by failure makes the previous spec the next version of the service
and forgets the previous one, as in Docker, so that a failed rollback leads nowhere else.

With start-first, an old task is stopped when the new one runs; with stop-first the new task is
made together with the old one's stop, and starts when that has happened.

What depends_on holds back (gates.py) is not begun: no slot loses its old task to a new one that may
not start. Meanwhile the status stays UPDATING and its message says what it waits for.
"""

from __future__ import annotations

from msgspec import structs

from manager.control.moves import alike, left, on_drained_node
from manager.control.slots import Slot, slot_of
from manager.control.template import (
    PAUSED,
    ROLLBACK,
    UPDATING,
    monitor_ns,
    spec_of_version,
    state_of,
    update_config,
)
from manager.control.work import Work
from swarm import states
from swarm.clock import SECOND_NS
from swarm.v1 import ServiceRevision, Task, TaskState, UpdateConfig, UpdateState, UpdateStatus

_BY_ITSELF = frozenset({TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED})
# How long two tasks of a slot run side by side where nodes lead connections to them: the dispatcher
# gathers changes of published services for a moment, and a node must not be left with none to ask.
OVERLAP_NS = SECOND_NS
_IN_PROGRESS = "update in progress"
_WAITS = "update waits "
_COMPLETED = "update completed"
_ROLLED_BACK = "rollback completed"


def update(work: Work) -> None:
    """One step of the service's roll-out, if there is one."""
    if work.mode.job:
        return
    settle(work)
    status = work.service.update_status
    if status is not None and status.state in PAUSED:
        return
    to_do = [slot for slot in work.used_slots() if _to_do(work, slot)]
    first = False
    if status is None or status.state not in UPDATING:
        if not to_do:
            return
        first = True
        status = UpdateStatus(
            state=UpdateState.UPDATING, started_at_ns=work.now_ns, message=_IN_PROGRESS
        )
        _set_status(work, status)
    config = update_config(work.service)
    failed = _failed(work, status)
    changed = _changed_slots(work, status)
    total = len(to_do) + len(changed)
    if failed and len(failed) / total > config.max_failure_ratio and _act(work, config, failed[0]):
        return
    in_flight = [s for s in changed if _in_flight(work, s, status)]
    if to_do:
        if what := work.held_back():
            _say(work, f"{_WAITS}{what}")
            return
        if status.message.startswith(_WAITS):
            status = _say(work, _IN_PROGRESS)
        _next_batch(work, config, status, to_do, in_flight, first=first or not changed)
    elif all(_arrived(work, s, status) for s in changed):
        _complete_when_watched(work, config, status, changed)


def settle(work: Work) -> None:
    """Where a new task runs, the slot's older ones are stopped: the end of start-first, and of a
    move. Where connections come through published ports, nodes have to hear of the new task first.
    """
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
    return task.meta.updated_at_ns + OVERLAP_NS


def _to_do(work: Work, slot: Slot) -> bool:
    if not work.may_create(slot):
        return False
    if any(work.up_to_date(t) for t in work.live(slot)):
        return False
    newest = work.newest(slot)
    return newest is not None and not (states.ended(state_of(newest)) and work.up_to_date(newest))


def _made_by(work: Work, status: UpdateStatus, task: Task) -> bool:
    """Whether the task was made since the roll-out began, for the spec that is rolled out."""
    made_ns = task.meta.created_at_ns if task.meta else work.now_ns
    return made_ns >= status.started_at_ns and work.up_to_date(task)


def _changed_slots(work: Work, status: UpdateStatus) -> list[Slot]:
    """Slots that have come to the present spec since the roll-out began."""
    slots = dict.fromkeys(
        slot_of(t)
        for t in work.tasks.values()
        if t.desired_state != TaskState.REMOVE and _made_by(work, status, t)
    )
    return [slot for slot in work.used_slots() if slot in slots]


def _arrived(work: Work, slot: Slot, status: UpdateStatus) -> bool:
    """Whether the slot's new task runs, or has come to its end."""
    made = [t for t in work.live(slot) if _made_by(work, status, t)]
    return all(state_of(t) == TaskState.RUNNING for t in made)


def _in_flight(work: Work, slot: Slot, status: UpdateStatus) -> bool:
    for task in work.live(slot):
        if state_of(task) != TaskState.RUNNING and _made_by(work, status, task):
            # A slot that never had a place and finds none does not hold up those that run.
            return state_of(task) >= TaskState.ASSIGNED or len(work.slots[slot]) > 1
    return False


def _failed(work: Work, status: UpdateStatus) -> list[Task]:
    """The first failure of each slot whose new task ended by itself while it was watched."""
    found: dict[Slot, Task] = {}
    for task in work.tasks.values():
        if (
            state_of(task) in _BY_ITSELF
            and task.desired_state != TaskState.REMOVE
            and task.id not in work.survived
            and _made_by(work, status, task)
        ):
            found.setdefault(slot_of(task), task)
    return sorted(found.values(), key=lambda t: (t.meta.created_at_ns if t.meta else 0, t.id))


def _act(work: Work, config: UpdateConfig, failed: Task) -> bool:
    """Does what failure_action says; False: go on."""
    status = work.service.update_status
    assert status is not None
    back = status.state in ROLLBACK
    cause = f"due to failure or early termination of task {failed.id}"
    if config.failure_action == "continue":
        return False
    if config.failure_action == "rollback" and not back and _roll_back(work, cause):
        return True
    state = UpdateState.ROLLBACK_PAUSED if back else UpdateState.PAUSED
    word = "rollback" if back else "update"
    _set_status(work, structs.replace(status, state=state, message=f"{word} paused {cause}"))
    return True


def _roll_back(work: Work, cause: str) -> bool:
    """Makes the previous spec the next version; False: there is none."""
    service = work.service
    previous = service.previous_spec_version
    spec = spec_of_version(work.draft, service, previous) if previous else None
    if spec is None:
        return False
    before = work.draft.get(ServiceRevision, f"{service.id}.{previous}")
    number = service.spec_version + 1
    work.draft.put(
        ServiceRevision(
            id=f"{service.id}.{number}",
            service_id=service.id,
            spec_version=number,
            spec=spec,
            sealed_registry_auth=before.sealed_registry_auth if before else b"",
        )
    )
    endpoint = service.endpoint
    if endpoint is not None and spec.endpoint is not None:
        # Published ports that the cluster chose stay with their targets.
        chosen = {(p.target_port, p.protocol, p.publish_mode): p for p in endpoint.ports}
        endpoint = structs.replace(
            endpoint,
            spec=spec.endpoint,
            ports=tuple(
                p
                if p.published_port
                else chosen.get((p.target_port, p.protocol, p.publish_mode), p)
                for p in spec.endpoint.ports
            ),
        )
    status = UpdateStatus(
        state=UpdateState.ROLLBACK_STARTED,
        started_at_ns=work.now_ns,
        message=f"update rolled back {cause}",
    )
    work.use(
        work.draft.put(
            structs.replace(
                service,
                spec=spec,
                spec_version=number,
                previous_spec_version=0,
                task_version=number,
                endpoint=endpoint if spec.endpoint is not None else None,
                update_status=status,
            )
        )
    )
    update(work)
    return True


def _next_batch(
    work: Work,
    config: UpdateConfig,
    status: UpdateStatus,
    to_do: list[Slot],
    in_flight: list[Slot],
    *,
    first: bool,
) -> None:
    """Starts as many slots as may start now. Slots whose task has no node yet have nothing to lose
    and are changed at once.
    """
    for slot in [s for s in to_do if _waits_for_node(work, s)]:
        if not _change_slot(work, slot, config):
            return
        to_do = [s for s in to_do if s != slot]
    if not to_do:
        return
    room = (config.parallelism or len(to_do)) - len(in_flight)
    if config.delay_ns > 0 and not first:
        if in_flight:
            return
        if not status.next_batch_at_ns:
            status = structs.replace(status, next_batch_at_ns=work.now_ns + config.delay_ns)
            _set_status(work, status)
        if work.now_ns < status.next_batch_at_ns:
            work.wake(status.next_batch_at_ns)
            return
    if room <= 0:
        return
    # Slots that do not run go first: they have least to lose (as SwarmKit's updater). Then those
    # that have to leave their node: they need not move twice.
    order = sorted(to_do, key=lambda slot: (_runs(work, slot), not _leaves(work, slot)))
    for slot in order[:room]:
        if not _change_slot(work, slot, config):
            break
    if status.next_batch_at_ns:
        _set_status(work, structs.replace(status, next_batch_at_ns=0))


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
    stops = any(
        state_of(t) >= TaskState.ASSIGNED and not states.ended(state_of(t)) and not work.lost(t)
        for t in ahead
    )
    if work.create(slot, ready_first=stops and not beside) is None:
        return False
    for task in old:
        if not (beside and state_of(task) == TaskState.RUNNING):
            work.stop(task)
    return True


def _complete_when_watched(
    work: Work, config: UpdateConfig, status: UpdateStatus, changed: list[Slot]
) -> None:
    """Ends the roll-out once its last task has run long enough."""
    since_ns = max(
        (
            t.meta.updated_at_ns
            for slot in changed
            for t in work.live(slot)
            if t.meta and state_of(t) == TaskState.RUNNING and _made_by(work, status, t)
        ),
        default=status.started_at_ns - monitor_ns(config),
    )
    until_ns = since_ns + monitor_ns(config)
    if work.now_ns < until_ns:
        work.wake(until_ns)
        return
    back = status.state == UpdateState.ROLLBACK_STARTED
    _set_status(
        work,
        UpdateStatus(
            state=UpdateState.ROLLBACK_COMPLETED if back else UpdateState.COMPLETED,
            started_at_ns=status.started_at_ns,
            completed_at_ns=work.now_ns,
            message=_ROLLED_BACK if back else _COMPLETED,
        ),
    )


def _say(work: Work, message: str) -> UpdateStatus:
    """Another message for a roll-out; a rollback keeps its own, which says why there is one."""
    status = work.service.update_status
    assert status is not None
    if status.state == UpdateState.UPDATING and status.message != message:
        status = structs.replace(status, message=message)
        _set_status(work, status)
    return status


def _set_status(work: Work, status: UpdateStatus) -> None:
    work.use(work.draft.put(structs.replace(work.service, update_status=status)))
