"""Waiting until services have come to where their specs want them.

`judge` decides on one service from its status; `wait` follows Control.WatchServices, shows progress
and ends with a `Verdict`. The deploy itself is done when waiting starts: giving up, or Ctrl-C,
changes nothing in the cluster.

The manager says when a service has converged (its tasks have run for as long as they are
watched) and when it is stuck. A stuck service ends the wait before the deadline: at once where no
other service moves any more, else after `STUCK_GRACE_S`, in which the others may come to their own
end. So one run tells of all that fails, and does not sit out the deadline for what is known
already. What is stuck only for a moment does not count.

An update status from before the change says nothing about it: statuses older than the change's
revision are skipped, and an update that was already over when the change was made (`before`) is
ignored.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import click

from cli.connection import Connection
from cli.failures import print_last_lines
from cli.progress import make_display
from cli.settings import Settings
from cli.table import wrapped
from swarm.clock import SECOND_NS
from swarm.errors import EXIT_NOT_CONVERGED, EXIT_ROLLED_BACK, NotFound, NotManager, Unavailable
from swarm.quantities import format_duration
from swarm.v1 import (
    GetRequest,
    Kind,
    Service,
    ServiceStatus,
    UpdateState,
    WatchServicesRequest,
)

__all__ = [
    "Display",
    "Goal",
    "Progress",
    "Verdict",
    "judge",
    "started",
    "wait",
    "wait_and_report",
]

LOST_S = 30.0  # how long a manager may be gone before waiting is given up
RETRY_S = 0.5
STUCK_GRACE_S = 10.0  # for the others, once a service is stuck
STUCK_HOLD_S = 1.0  # how long a service is stuck before it counts: a restart may be under way
LOGS_MAX = 5  # services whose failing task's last lines are shown


class Progress(enum.Enum):
    """How far one service is."""

    GOING = "going"
    DONE = "converged"
    GONE = "removed"
    PAUSED = "paused"
    STUCK = "stuck"
    ROLLED_BACK = "rolled back"


class Goal(enum.Enum):
    """What the change was, and so what its end is."""

    UPDATED = "updated"
    # A rollback was asked for, so that one which is complete is no failure.
    ROLLED_BACK = "rolled back"
    REMOVED = "removed"
    # Nothing was changed: somebody waits for what others did.
    ANY = "any"


class Display(Protocol):
    """What shows progress while waiting."""

    def show(self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress]) -> None: ...

    def close(self) -> None: ...


_PAUSED = (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED)
_GOING = (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED)


def started(service: Service) -> int:
    """What tells a service's update from a later one."""
    return service.update_status.started_at_ns if service.update_status else 0


def judge(status: ServiceStatus, *, before: int = 0, goal: Goal = Goal.UPDATED) -> Progress:
    """How far a service is. `before`: start of its last update before the change, unix time in
    ns.
    """
    if status.removed:
        return Progress.GONE
    if goal is Goal.REMOVED:
        return Progress.GOING
    update = status.update_status
    state = UpdateState.UNSPECIFIED
    if update is not None and (not before or update.started_at_ns != before):
        state = update.state
    if state in _PAUSED:
        return Progress.PAUSED
    if state == UpdateState.ROLLBACK_COMPLETED:
        if goal is Goal.UPDATED:
            return Progress.ROLLED_BACK
        # By hand, a rollback converges as any change does; by a failure, it comes to rest.
        if goal is Goal.ANY and not status.converged and _at_rest(status):
            return Progress.ROLLED_BACK
    if state in _GOING or not (status.converged or _settled(status)):
        return Progress.STUCK if status.stuck else Progress.GOING
    earlier = status.update_status.state if status.update_status else None
    return Progress.PAUSED if earlier in _PAUSED and not status.converged else Progress.DONE


def _settled(status: ServiceStatus) -> bool:
    """Whether an earlier update that was paused or rolled back is all that keeps the service from
    counting as converged: nothing will change any more.
    """
    over = (*_PAUSED, UpdateState.ROLLBACK_COMPLETED)
    past = status.update_status is not None and status.update_status.state in over
    return past and not status.stuck and _at_rest(status)


def _at_rest(status: ServiceStatus) -> bool:
    moving = status.stopping or status.settles_in_ns
    return not moving and status.running >= status.desired


@dataclass(slots=True)
class Verdict:
    """How waiting ended."""

    progress: dict[str, Progress] = field(default_factory=dict)
    statuses: dict[str, ServiceStatus] = field(default_factory=dict)
    # By service: the newest task that failed, also where the service has forgotten it since.
    failing: dict[str, str] = field(default_factory=dict)
    timed_out: bool = False

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
        if self.timed_out or self.of(Progress.PAUSED, Progress.STUCK, Progress.GOING):
            return EXIT_NOT_CONVERGED
        return EXIT_ROLLED_BACK if self.of(Progress.ROLLED_BACK) else 0

    def headline(self, subject: str, *, timeout_ns: int, goal: Goal) -> str:
        """What went wrong, in one line; empty: nothing."""
        names = [self.statuses[id_].name for id_ in self.of(Progress.STUCK)]
        if self.timed_out:
            return (
                f"{subject} {'is not gone' if goal is Goal.REMOVED else 'has not converged'} "
                f"within {format_duration(timeout_ns)}; it goes on in the background"
            )
        if names:
            stuck = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} stuck"
            return f"{subject} does not converge: {stuck}"
        if self.of(Progress.PAUSED):
            return f"{subject} does not converge: an update is paused"
        return f"{subject} was rolled back" if self.of(Progress.ROLLED_BACK) else ""

    def explain(self) -> dict[str, list[str]]:
        """By service that is not where it should be: a line on it, then its reasons."""
        found: dict[str, list[str]] = {}
        for id_, progress in self.progress.items():
            status = self.statuses[id_]
            message = status.update_status.message if status.update_status else ""
            match progress:
                case Progress.PAUSED:
                    known = message.startswith("update paused")
                    text = message if known else f"update paused: {message}"
                case Progress.ROLLED_BACK:
                    text = f"rolled back: {message}"
                case Progress.GOING if status.stopping and not status.desired:
                    noun = "task is" if status.stopping == 1 else "tasks are"
                    text = f"{status.stopping} {noun} not gone yet"
                case Progress.GOING if not self.timed_out:
                    text = f"{count(status)} running, not converged yet; it goes on"
                case Progress.GOING:
                    text = f"{count(status)} running"
                case Progress.STUCK:
                    text = f"{count(status)} running, stuck"
                case _:
                    continue
            reasons = [reason for reason in status.reasons if reason != message]
            found[id_] = [f"{status.name}: {text}", *(f"  {reason}" for reason in reasons)]
        return found


def count(status: ServiceStatus) -> str:
    """ "3/5": tasks of the current spec that run, or have completed, of those wanted."""
    done = max(status.up_to_date, status.completed) if status.desired else status.running
    return f"{done}/{status.desired}"


async def wait(
    connection: Connection,
    request: WatchServicesRequest,
    *,
    revision: int,
    before: Mapping[str, int],
    timeout_s: float | None,
    display: Display,
    goal: Goal = Goal.UPDATED,
) -> Verdict:
    """Follows the services until none moves any more, one is stuck, or the time is up. Statuses
    older than `revision`, the change's in the store, do not count. Raises Unavailable when no
    manager answers for long.
    """
    verdict = Verdict()

    def judge_one(status: ServiceStatus) -> Progress:
        known = before.get(status.service_id, 0)
        return judge(status, before=known, goal=goal)

    try:
        async with asyncio.timeout(timeout_s):
            await _until_stuck(
                connection,
                request,
                verdict,
                display,
                judge_one,
                revision=revision,
                removing=goal is Goal.REMOVED,
            )
    except TimeoutError:
        verdict.timed_out = True
    finally:
        display.close()
    return verdict


async def _until_stuck(
    connection: Connection,
    request: WatchServicesRequest,
    verdict: Verdict,
    display: Display,
    judge_one: Callable[[ServiceStatus], Progress],
    *,
    revision: int,
    removing: bool,
) -> None:
    """`_follow`, left early when a service stays stuck."""
    loop = asyncio.get_running_loop()
    since: float | None = None

    try:
        async with asyncio.timeout(None) as grace:

            def shown() -> None:
                nonlocal since
                if not verdict.of(Progress.STUCK):
                    since = None
                    grace.reschedule(None)
                    return
                since = loop.time() if since is None else since
                others = verdict.of(Progress.GOING)
                grace.reschedule(since + (STUCK_GRACE_S if others else STUCK_HOLD_S))

            await _follow(
                connection,
                request,
                verdict,
                display,
                judge_one,
                shown,
                revision=revision,
                removing=removing,
            )
    except TimeoutError:
        if not grace.expired():
            raise


async def _follow(
    connection: Connection,
    request: WatchServicesRequest,
    verdict: Verdict,
    display: Display,
    judge_one: Callable[[ServiceStatus], Progress],
    shown: Callable[[], None],
    *,
    revision: int,
    removing: bool,
) -> None:
    loop = asyncio.get_running_loop()
    lost_s: float | None = None
    while True:
        try:
            async for answer in connection.control.watch_services(request):
                lost_s = None
                if answer.revision < revision:
                    continue
                for status in answer.statuses:
                    verdict.note(status, judge_one(status))
                display.show(list(verdict.statuses.values()), verdict.progress)
                if verdict.over or not answer.statuses:
                    return
                shown()
        except NotManager:
            raise
        except NotFound:
            # A service was gone before the watch began; the others may not be.
            if not removing:
                raise
            request = await _left(connection, request, verdict)
            if not request.services:
                return
        except Unavailable:
            lost_s = lost_s if lost_s is not None else loop.time()
            if loop.time() - lost_s > LOST_S:
                raise
            await asyncio.sleep(RETRY_S)


async def _left(
    connection: Connection, request: WatchServicesRequest, verdict: Verdict
) -> WatchServicesRequest:
    """The request for those of its services that still exist."""
    left = []
    for id_ in request.services:
        try:
            await connection.control.get(GetRequest(kind=Kind.SERVICE, ref=id_))
        except NotFound:
            if id_ in verdict.statuses:
                verdict.progress[id_] = Progress.GONE
        else:
            left.append(id_)
    return WatchServicesRequest(services=tuple(left))


async def wait_and_report(
    connection: Connection,
    settings: Settings,
    request: WatchServicesRequest,
    *,
    revision: int,
    before: Mapping[str, int],
    timeout_ns: int,
    subject: str,
    interrupted: str,
    goal: Goal = Goal.UPDATED,
    quiet: bool = False,
) -> int:
    """`wait` with the display that fits stderr; then, on stderr, what went wrong and the last lines
    of the tasks that failed. The exit code. `interrupted` is said when Ctrl-C ends the wait.
    """
    display = make_display(
        settings.terminal("stderr"),
        settings.clock,
        removing=goal is Goal.REMOVED,
        quiet=quiet,
    )
    try:
        verdict = await wait(
            connection,
            request,
            revision=revision,
            before=before,
            timeout_s=timeout_ns / SECOND_NS if timeout_ns else None,
            display=display,
            goal=goal,
        )
        await report(
            connection,
            verdict,
            subject,
            timeout_ns=timeout_ns,
            goal=goal,
            width=settings.terminal("stderr").width,
        )
    except asyncio.CancelledError:
        click.echo(f"\n{interrupted}", err=True)
        raise
    return verdict.exit_code


async def report(
    connection: Connection,
    verdict: Verdict,
    subject: str,
    *,
    timeout_ns: int,
    goal: Goal,
    width: int | None,
) -> None:
    """Says on stderr, `width` wide, what went wrong; nothing where all is well."""
    headline = verdict.headline(subject, timeout_ns=timeout_ns, goal=goal)
    if not headline:
        return
    click.echo(f"Error: {headline}", err=True)
    explained = verdict.explain()
    with_lines = [id_ for id_ in explained if id_ in verdict.failing][:LOGS_MAX]
    for id_, lines in explained.items():
        for line in lines:
            for piece in wrapped(f"  {line}", width):
                click.echo(piece, err=True)
        if id_ in with_lines and goal is not Goal.REMOVED:
            await print_last_lines(connection, verdict.failing[id_], indent="    ")
