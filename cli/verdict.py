"""How far services have come, and whether that is what was wanted: the decisions behind waiting.

`judge` decides on one service from its status; a `Verdict` gathers all and says how it ended. The
manager is believed: a service has converged, or is stuck, when its status says so. What is decided
here is what an update's state means for the change that is waited for. An update status from before
the change says nothing about it (`before`). Pure; cli/converge.py waits.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from swarm.errors import EXIT_NOT_CONVERGED, EXIT_ROLLED_BACK, Conflict, mapping
from swarm.quantities import format_duration
from swarm.v1 import Service, ServiceStatus, UpdateState

__all__ = [
    "CONFLICT",
    "Goal",
    "Progress",
    "StuckServices",
    "Verdict",
    "done",
    "judge",
    "next_step",
    "started",
]

STUCK_GRACE_S = 10.0  # for the others, once a service is stuck
CONFLICT = mapping(Conflict("")).exit_code
STUCK_HOLD_S = 1.0  # how long a service is stuck before it counts: what helps may be under way


class Progress(enum.Enum):
    """How far one service is."""

    GOING = "going"
    DONE = "converged"
    GONE = "removed"
    PAUSED = "paused"
    # Paused as was asked for, until somebody says that it may go on.
    AWAITS = "awaits a person"
    STUCK = "stuck"
    ROLLED_BACK = "rolled back"
    # Somebody else has changed the service since.
    SUPERSEDED = "superseded"


class Goal(enum.Enum):
    """What the change was, and so what its end is."""

    UPDATED = "updated"
    # A rollback was asked for, so that one which is complete is no failure.
    ROLLED_BACK = "rolled back"
    REMOVED = "removed"
    # Nothing was changed: somebody waits for what others did.
    ANY = "any"


_PAUSED = (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED)
_GOING = (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED)
_BACK = (
    UpdateState.ROLLBACK_STARTED,
    UpdateState.ROLLBACK_PAUSED,
    UpdateState.ROLLBACK_COMPLETED,
)
_ROLLED_BACK = "the last update failed and was rolled back"


def started(service: Service) -> int:
    """What tells a service's update from a later one."""
    return service.update_status.started_at_ns if service.update_status else 0


def judge(
    status: ServiceStatus, *, before: int = 0, goal: Goal = Goal.UPDATED, version: int = 0
) -> Progress:
    """How far a service is. `before`: start of its last update before the change, unix time in ns.
    `version`: the service's since the change (0: not known); a later one that no failure has made
    supersedes it.
    """
    if status.removed:
        return Progress.GONE
    if goal is Goal.REMOVED:
        return Progress.GOING
    update = status.update_status
    if version and status.spec_version > version and (update is None or update.state not in _BACK):
        return Progress.SUPERSEDED
    state = UpdateState.UNSPECIFIED
    if update is not None and (not before or update.started_at_ns != before):
        state = update.state
    if state in _PAUSED:
        return Progress.AWAITS if update is not None and update.awaits_resume else Progress.PAUSED
    if state == UpdateState.ROLLBACK_COMPLETED:
        if goal is Goal.UPDATED:
            return Progress.ROLLED_BACK
        # By hand, a rollback converges as any change does; by a failure, it comes to rest.
        if goal is Goal.ANY and not status.converged and _at_rest(status):
            return Progress.ROLLED_BACK
    if state in _GOING or not (status.converged or _settled(status)):
        return Progress.STUCK if status.stuck else Progress.GOING
    if update is None or update.state not in _PAUSED or status.converged:
        return Progress.DONE
    return Progress.AWAITS if update.awaits_resume else Progress.PAUSED


def _settled(status: ServiceStatus) -> bool:
    """Whether an earlier update that was paused or rolled back is all that keeps the service from
    counting as converged: nothing will change any more.
    """
    over = (*_PAUSED, UpdateState.ROLLBACK_COMPLETED)
    past = status.update_status is not None and status.update_status.state in over
    return past and not status.stuck and _at_rest(status)


def _at_rest(status: ServiceStatus) -> bool:
    moving = status.stopping or status.settles_in_ns
    return not moving and status.running == status.desired


@dataclass(slots=True)
class Verdict:
    """How waiting ended."""

    progress: dict[str, Progress] = field(default_factory=dict)
    statuses: dict[str, ServiceStatus] = field(default_factory=dict)
    # By service: the newest task that failed, also where the service has forgotten it since.
    failing: dict[str, str] = field(default_factory=dict)
    timed_out: bool = False
    # That an update awaits a person is what was asked for, and no failure.
    may_pause: bool = False

    def note(self, status: ServiceStatus, progress: Progress) -> None:
        """Takes in a service's newest status."""
        self.statuses[status.service_id] = status
        self.progress[status.service_id] = progress
        if status.failing_task_id:
            self.failing[status.service_id] = status.failing_task_id

    @property
    def over(self) -> bool:
        """True once no service moves any more, and none may yet turn out to."""
        return bool(self.progress) and not self.of(Progress.GOING, Progress.STUCK)

    def of(self, *wanted: Progress) -> list[str]:
        """Ids of the services that are that far."""
        return [id_ for id_, progress in self.progress.items() if progress in wanted]

    @property
    def exit_code(self) -> int:
        failed = self.of(Progress.PAUSED, Progress.STUCK, Progress.GOING)
        if self.timed_out or failed or (self.of(Progress.AWAITS) and not self.may_pause):
            return EXIT_NOT_CONVERGED
        if self.of(Progress.SUPERSEDED):
            return CONFLICT
        return EXIT_ROLLED_BACK if self.of(Progress.ROLLED_BACK) else 0

    def headline(self, subject: str, *, timeout_ns: int, goal: Goal) -> str:
        """What went wrong, in one line; empty: nothing."""
        if self.timed_out:
            return (
                f"{subject} {'is not gone' if goal is Goal.REMOVED else 'has not converged'} "
                f"within {format_duration(timeout_ns)}"
            )
        if names := self._names(Progress.STUCK):
            are = "are" if len(names) > 1 else "is"
            return f"{subject} does not converge: {', '.join(names)} {are} stuck"
        if names := self._names(Progress.PAUSED):
            what = "rollback" if self._all_back() else "update"
            are = (
                f"{what}s of {', '.join(names)} are"
                if len(names) > 1
                else f"{what} of {names[0]} is"
            )
            return f"{subject} does not converge: the {are} paused"
        if (names := self._names(Progress.AWAITS)) and not self.may_pause:
            updates = "the updates of {} await" if len(names) > 1 else "the update of {} awaits"
            return f"{subject} does not converge: {updates.format(', '.join(names))} a person"
        if names := self._names(Progress.SUPERSEDED):
            told = "" if subject == f"service {names[0]!r}" else f": {', '.join(names)}"
            was = "were" if len(names) > 1 else "was"
            return f"{subject}{told} {was} changed again before this change was done"
        if names := self._names(Progress.ROLLED_BACK):
            were = "were" if len(names) > 1 else "was"
            told = "" if subject == f"service {names[0]!r}" else f": {', '.join(names)}"
            return f"{subject}{told} {were} rolled back"
        return ""

    def _all_back(self) -> bool:
        """Whether all that are paused were on their way back."""
        updates = [self.statuses[id_].update_status for id_ in self.of(Progress.PAUSED)]
        return all(u is not None and u.state in _BACK for u in updates)

    def _names(self, progress: Progress) -> list[str]:
        return [self.statuses[id_].name for id_ in self.of(progress)]

    def explain(self) -> dict[str, list[str]]:
        """By service that is not where it should be: a line on it, then its reasons."""
        found: dict[str, list[str]] = {}
        for id_, progress in self.progress.items():
            status = self.statuses[id_]
            message = status.update_status.message if status.update_status else ""
            match progress:
                case Progress.PAUSED:
                    text = _paused_text(message)
                case Progress.AWAITS if not self.may_pause:
                    text = _paused_text(message)
                case Progress.SUPERSEDED:
                    text = f"version {status.spec_version} has taken its place, and goes on"
                    found[id_] = [f"{status.name}: {text}"]
                    continue
                case Progress.ROLLED_BACK:
                    cause = message.partition("; ")[2]
                    found[id_] = [f"{status.name}: {cause or _ROLLED_BACK}"]
                    continue
                case Progress.GOING if status.stopping and not status.desired:
                    noun = "task is" if status.stopping == 1 else "tasks are"
                    text = f"{status.stopping} {noun} not gone yet"
                case Progress.GOING if not self.timed_out:
                    text = f"{_count(status)}, not converged yet; it goes on"
                case Progress.GOING:
                    text = _count(status)
                case Progress.STUCK:
                    text = f"{_count(status)}, stuck"
                case _:
                    continue
            # What the manager says of a pause, this says already.
            asked = progress is Progress.AWAITS
            reasons = [
                reason
                for reason in status.reasons
                if reason != message and not (asked and reason.startswith("update paused"))
            ]
            found[id_] = [f"{status.name}: {text}", *(f"  {reason}" for reason in reasons)]
        return found


def _paused_text(message: str) -> str:
    return message if "paused" in message else f"update paused: {message}"


def next_step(verdict: Verdict, name: str, goal: Goal) -> str:
    """What to do about the one service that was changed, in a sentence; empty: nothing."""
    [progress] = verdict.progress.values() or [Progress.DONE]
    [status] = verdict.statuses.values() or [ServiceStatus()]
    resume, back = f"`swarmctl service resume {name}`", f"`swarmctl service rollback {name}`"
    history = f"`swarmctl service history {name}`"
    undo = "" if goal is Goal.ROLLED_BACK else f", or undo this update with {back}"
    match progress:
        case Progress.AWAITS:
            message = status.update_status.message if status.update_status else ""
            said = (
                f"{name}: {_paused_text(message).partition(':')[0]}.\n" if verdict.may_pause else ""
            )
            return f"{said}Let it go on with {resume}{undo}."
        case Progress.PAUSED:
            again = f", update it again{undo}" if undo else ", or update it again"
            return f"Let it go on with {resume}{again}."
        case Progress.STUCK:
            return f"Update it again{undo}." if undo else ""
        case Progress.ROLLED_BACK:
            return f"{history} shows what was tried."
        case Progress.SUPERSEDED:
            return f"{history} tells by whom; `swarmctl service wait {name}` waits for that change."
    return ""


class StuckServices:
    """Which services are stuck, and for how long: when to stop waiting because of them.

    A service that fails again and again is stuck, and for a moment, while its next task is made, is
    not. So it stays stuck until it gets further than it was: one more task runs.
    """

    def __init__(self) -> None:
        # By service: since when, on the caller's clock, and the newest status that said so.
        self._since_s: dict[str, float] = {}
        self._statuses: dict[str, ServiceStatus] = {}

    def note(self, verdict: Verdict, now_s: float) -> float | None:
        """Takes in what came now. When waiting shall end if nothing else comes; None: not for this.
        The grace for the others is not prolonged by what happens in it.
        """
        for id_ in verdict.of(Progress.STUCK):
            self._since_s.setdefault(id_, now_s)
            self._statuses[id_] = verdict.statuses[id_]
        for id_ in [id_ for id_ in self._since_s if self._further(verdict, id_)]:
            del self._since_s[id_], self._statuses[id_]
        if not self._since_s:
            return None
        others = [id_ for id_ in verdict.of(Progress.GOING) if id_ not in self._since_s]
        hold_s = STUCK_GRACE_S if others else STUCK_HOLD_S
        return min(self._since_s.values()) + hold_s

    def _further(self, verdict: Verdict, id_: str) -> bool:
        progress, status = verdict.progress[id_], verdict.statuses[id_]
        if progress not in (Progress.GOING, Progress.STUCK):
            return True
        before = self._statuses[id_]
        return max(status.up_to_date, status.completed) > max(before.up_to_date, before.completed)

    def settle(self, verdict: Verdict) -> None:
        """Waiting has ended because of them: they are stuck, whatever they were doing just now."""
        for status in self._statuses.values():
            verdict.note(status, Progress.STUCK)


def done(status: ServiceStatus) -> tuple[int, str]:
    """How many tasks are where they are wanted, and what that is: running, completed, or updated
    while tasks of an earlier version run as well.
    """
    if status.job and status.up_to_date:
        return status.completed, "completed"
    if status.completed and status.converged and status.up_to_date:
        # No job: of its tasks some have ended well and are not to be restarted.
        return status.completed + status.up_to_date, "running or completed"
    if status.completed:
        return status.completed, "completed"
    if not status.desired:
        return status.running, "running"
    return status.up_to_date, "updated" if status.running > status.up_to_date else "running"


def _count(status: ServiceStatus) -> str:
    """ "3/5 running": of the tasks that are wanted."""
    number, unit = done(status)
    return f"{number}/{status.desired} {unit}"
