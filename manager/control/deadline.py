"""When a roll-out has failed for want of progress, and what it is said to lack.

Progress is a slot that gets done beyond those that were (UpdateStatus.done): one that crashes and
comes back again and again is none. From `progress_at_ns` on the deadline of the update_config runs.
That is put off where the roll-out waits for what it may wait for: the watch over the slot that got
done, the delay before the next batch, gates. All of it stands in the objects, so a new leader fails
a roll-out at the same moment.

What no node could take even if it were empty and ready fails sooner: nothing will bring it back but
another node, or another spec. No running task is stopped for it in the meantime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from msgspec import structs

from manager.control.backoff import healthcheck
from manager.control.rollout import Rollout, made_by
from manager.control.slots import Slot, slot_of
from manager.control.stuck import failure, newest_failure
from manager.control.template import ROLLBACK, monitor_ns, state_of, update_config
from manager.control.work import Work
from manager.scheduler import FOR_EVER, account, ceiling, pending_reason
from swarm import states
from swarm.clock import SECOND_NS
from swarm.quantities import format_duration
from swarm.v1 import Node, Task, UpdateConfig, UpdateStatus

DEFAULT_DEADLINE_NS = 600 * SECOND_NS
# For what can never be placed: time for a node that just joins to be heard.
NEVER_NS = 30 * SECOND_NS


def deadline_ns(work: Work) -> int:
    """How long the present roll-out may go without progress; 0: for ever."""
    config = update_config(work.service)
    if config.deadline_ns is not None:
        return config.deadline_ns
    check = healthcheck(work.service)
    return DEFAULT_DEADLINE_NS + (check.start_period_ns if check is not None else 0)


def noted(work: Work, roll: Rollout, status: UpdateStatus, *, held: bool) -> UpdateStatus:
    """The status with what the look tells of progress. `held`: a gate is closed, so that the time
    does not count.
    """
    if held:
        return structs.replace(status, progress_at_ns=0)
    if not status.progress_at_ns:
        status = structs.replace(status, progress_at_ns=work.now_ns)
        if not status.done:
            return structs.replace(status, done=roll.done)
    # Slots that were done may have gone meanwhile, with their nodes or as it was scaled down.
    most = len(roll.slots) - len(roll.to_do) - roll.untried
    if status.done > most:
        status = structs.replace(status, done=most)
    if roll.done <= status.done:
        return status
    watched_ns = work.now_ns + monitor_ns(update_config(work.service))
    return structs.replace(
        status, done=roll.done, progress_at_ns=max(status.progress_at_ns, watched_ns)
    )


def overdue(work: Work, roll: Rollout, status: UpdateStatus) -> str:
    """What it lacks if it has made no progress for too long, as the end of a sentence; else empty,
    and the service is looked at again when it would have.
    """
    limit_ns = deadline_ns(work)
    if not limit_ns:
        return ""
    never = can_never_begin(work, roll)
    if never:
        limit_ns = min(limit_ns, NEVER_NS)
    due_ns = status.progress_at_ns + limit_ns
    if work.now_ns < due_ns:
        work.wake(due_ns)
        return ""
    lack = _never(work, roll) if never else _lack(work, roll, update_config(work.service))
    return f"no progress for {format_duration(limit_ns)}: {lack}"


# ------------------------------------------------------------------ what can never be placed


def can_never_begin(work: Work, roll: Rollout) -> bool:
    """Whether no node could ever take the new template; where each node has its task, none of those
    that are left.
    """
    if work.mode.per_node:
        left = [*roll.to_do, *(slot_of(t) for t in roll.unplaced)]
        return bool(left) and not roll.coming and not any(takes(work, slot) for slot in left)
    if roll.placed:
        return False
    nodes = [n for n in work.draft.all(Node) if not n.revoked]
    return bool(nodes) and not ceiling(nodes, work.need, enough=1)


def takes(work: Work, slot: Slot) -> bool:
    """Whether the slot's node could take a task of the new template if nothing else ran there."""
    node = work.draft.get(Node, str(slot))
    return node is not None and bool(ceiling((node,), work.need, enough=1))


# ------------------------------------------------------------------ words


def _never(work: Work, roll: Rollout) -> str:
    what = _version(work)
    if work.mode.per_node:
        what = f"{_part(work, len(roll.slots) - roll.done, len(roll.slots))} of {what}"
    return f"{what} can never be placed: {_reason(work, roll.unplaced)}"


def _lack(work: Work, roll: Rollout, config: UpdateConfig) -> str:
    """What keeps it from getting on, most of it first."""
    total = len(roll.slots)
    said: list[tuple[int, str]] = []
    if roll.unplaced:
        text = f"no place: {_reason(work, roll.unplaced)}"
        said.append((len(roll.unplaced), f"{_have(len(roll.unplaced))} {text}"))
    kinds: Counter[str] = Counter(_doing(work, task) for task in roll.coming)
    said += [(count, f"{'is' if count == 1 else 'are'} {text}") for text, count in kinds.items()]
    said.sort(key=lambda clause: (-clause[0], clause[1]))
    clauses = [f"{_part(work, count, total)} of {_version(work)} {text}" for count, text in said]
    if clauses:
        return "; ".join(clauses[:2])
    if roll.down:
        return (
            f"{_part(work, len(roll.down), total)} {'does' if len(roll.down) == 1 else 'do'} not "
            f"run, and no more than {config.parallelism} may be down at once"
        )
    return f"{_part(work, len(roll.to_do), total)} {_have(len(roll.to_do))} the old version still"


def _doing(work: Work, task: Task) -> str:
    if states.ended(state_of(task)):
        return f"waiting to be restarted: {failure(task)}"
    last = newest_failure(t for t in work.slots[slot_of(task)] if made_by(work, t))
    after = f", after a failure: {failure(last)}" if last is not None else ""
    return f"{states.label(state_of(task))}{after}"


def _reason(work: Work, unplaced: Iterable[Task]) -> str:
    """What the scheduler says of tasks of the new template."""
    said = (t.status.err for t in unplaced if t.status and t.status.err)
    reason = next(said, "")
    if not reason:
        reason = pending_reason(account(work.table, work.need, work.service.id, ""))
    return reason.removesuffix(FOR_EVER)


def _part(work: Work, count: int, total: int) -> str:
    unit = "task" if work.mode.per_node else "replica"
    return f"{count} of {total} {unit}{'' if total == 1 else 's'}"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _version(work: Work) -> str:
    status = work.service.update_status
    back = status is not None and status.state in ROLLBACK
    return "the version that it goes back to" if back else "the new version"
