"""Waiting until services have come to where their specs want them.

`judge` decides on one service from its status; `wait` follows Control.WatchServices, shows progress
and ends with a `Verdict`. The deploy itself is done when waiting starts: giving up, or Ctrl-C,
changes nothing in the cluster.

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
from cli.progress import make_display
from cli.settings import Settings
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

__all__ = ["Display", "Progress", "Verdict", "judge", "started", "wait", "wait_and_report"]

LOST_S = 30.0  # how long a manager may be gone before waiting is given up
RETRY_S = 0.5


class Progress(enum.Enum):
    """How far one service is."""

    GOING = "going"
    DONE = "converged"
    GONE = "removed"
    PAUSED = "paused"
    ROLLED_BACK = "rolled back"


class Display(Protocol):
    """What shows progress while waiting."""

    def show(self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress]) -> None: ...

    def close(self) -> None: ...


_PAUSED = (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED)
_GOING = (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED)


def started(service: Service) -> int:
    """What tells a service's update from a later one."""
    return service.update_status.started_at_ns if service.update_status else 0


def judge(
    status: ServiceStatus, *, before: int = 0, removing: bool = False, rollback: bool = False
) -> Progress:
    """How far a service is. `before`: start of its last update before the change, unix time in ns;
    `removing`: the wish is that it is gone; `rollback`: the change is a rollback.
    """
    if status.removed:
        return Progress.GONE
    if removing:
        return Progress.GOING
    update = status.update_status
    state = UpdateState.UNSPECIFIED
    if update is not None and (not before or update.started_at_ns != before):
        state = update.state
    if state in _PAUSED:
        return Progress.PAUSED
    if state == UpdateState.ROLLBACK_COMPLETED and not rollback:
        return Progress.ROLLED_BACK
    if state in _GOING or not (status.converged or _settled(status)):
        return Progress.GOING
    earlier = status.update_status.state if status.update_status else None
    return Progress.PAUSED if earlier in _PAUSED and not status.converged else Progress.DONE


def _settled(status: ServiceStatus) -> bool:
    """Whether an earlier update that was paused or rolled back is all that keeps the service from
    counting as converged: nothing will change any more.
    """
    over = (*_PAUSED, UpdateState.ROLLBACK_COMPLETED)
    past = status.update_status is not None and status.update_status.state in over
    return past and status.running >= status.desired and not status.stopping


@dataclass(slots=True)
class Verdict:
    """How waiting ended."""

    progress: dict[str, Progress] = field(default_factory=dict)
    statuses: dict[str, ServiceStatus] = field(default_factory=dict)
    timed_out: bool = False

    @property
    def over(self) -> bool:
        """True once no service moves any more."""
        return bool(self.progress) and Progress.GOING not in self.progress.values()

    @property
    def exit_code(self) -> int:
        found = set(self.progress.values())
        if self.timed_out or found & {Progress.PAUSED, Progress.GOING}:
            return EXIT_NOT_CONVERGED
        return EXIT_ROLLED_BACK if Progress.ROLLED_BACK in found else 0

    def explain(self) -> list[str]:
        """A line for each service that is not where it should be, then its reasons."""
        lines: list[str] = []
        for id_, progress in self.progress.items():
            status = self.statuses[id_]
            message = status.update_status.message if status.update_status else ""
            match progress:
                case Progress.PAUSED:
                    text = (
                        message
                        if message.startswith("update paused")
                        else f"update paused: {message}"
                    )
                    lines.append(f"{status.name}: {text}")
                case Progress.ROLLED_BACK:
                    lines.append(f"{status.name}: rolled back: {message}")
                case Progress.GOING if status.stopping and not status.desired:
                    lines.append(f"{status.name}: {status.stopping} tasks are not gone yet")
                case Progress.GOING:
                    lines.append(f"{status.name}: {count(status)} running")
                case _:
                    continue
            lines += [f"  {reason}" for reason in status.reasons if reason != message]
        return lines


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
    removing: bool = False,
    rollback: bool = False,
) -> Verdict:
    """Follows the services until none moves any more or the time is up. Statuses older than
    `revision`, the change's, do not count. Raises Unavailable when no manager answers for long.
    """
    verdict = Verdict()

    def judge_one(status: ServiceStatus) -> Progress:
        known = before.get(status.service_id, 0)
        return judge(status, before=known, removing=removing, rollback=rollback)

    try:
        async with asyncio.timeout(timeout_s):
            await _follow(
                connection,
                request,
                verdict,
                display,
                judge_one,
                revision=revision,
                removing=removing,
            )
    except TimeoutError:
        verdict.timed_out = True
    finally:
        display.close()
    return verdict


async def _follow(
    connection: Connection,
    request: WatchServicesRequest,
    verdict: Verdict,
    display: Display,
    judge_one: Callable[[ServiceStatus], Progress],
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
                    verdict.statuses[status.service_id] = status
                    verdict.progress[status.service_id] = judge_one(status)
                display.show(list(verdict.statuses.values()), verdict.progress)
                if verdict.over or not answer.statuses:
                    return
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
    removing: bool = False,
    rollback: bool = False,
    quiet: bool = False,
) -> int:
    """`wait` with the display that fits stderr, and the verdict on stderr; the exit code."""
    display = make_display(settings.terminal("stderr"), removing=removing, quiet=quiet)
    verdict = await wait(
        connection,
        request,
        revision=revision,
        before=before,
        timeout_s=timeout_ns / SECOND_NS if timeout_ns else None,
        display=display,
        removing=removing,
        rollback=rollback,
    )
    goal = "gone" if removing else "converged"
    if verdict.timed_out:
        click.echo(
            f"Error: {subject} has not {'gone' if removing else 'converged'} within "
            f"{format_duration(timeout_ns)}; it goes on in the background",
            err=True,
        )
    elif verdict.exit_code == EXIT_ROLLED_BACK:
        click.echo(f"Error: {subject} was rolled back", err=True)
    elif verdict.exit_code:
        click.echo(f"Error: {subject} cannot get {goal}: an update is paused", err=True)
    for line in verdict.explain():
        click.echo(f"  {line}", err=True)
    return verdict.exit_code
