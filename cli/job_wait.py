"""Waiting until jobs have ended, and telling how they did.

The control loop says when a job has ended (`Service.job_status`); what is followed is the service
itself. How far its tasks are is shown meanwhile, from Control.WatchServices, and decides nothing.
Giving up, or Ctrl-C, changes nothing in the cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import click

from cli.connection import Connection
from cli.converge import LOGS_MAX, Display
from cli.failures import print_last_lines, printable
from cli.following import Patience
from cli.jobs import ending, has_ended
from cli.objects import name_of
from cli.progress import make_display
from cli.service_watch import until_over
from cli.settings import Settings
from cli.table import wrapped
from cli.verdict import Progress
from swarm.clock import SECOND_NS
from swarm.errors import EXIT_NOT_CONVERGED, NotFound, SwarmError, Unavailable, mapping
from swarm.quantities import format_duration
from swarm.v1 import (
    GetRequest,
    JobState,
    Kind,
    Service,
    ServiceStatus,
    WatchServicesRequest,
)

__all__ = ["wait_and_report"]


async def wait_and_report(
    connection: Connection,
    settings: Settings,
    jobs: Sequence[Service],
    *,
    timeout_ns: int,
    quiet: bool,
) -> int:
    """Waits for all, with the display that fits stderr, and says there how each that did not
    complete ended, with the last lines of what failed. The exit code: that of the first, in their
    order, that did not complete; 6 at the deadline.
    """
    display = make_display(settings.terminal("stderr"), settings.clock, quiet=quiet)
    names = {job.id: name_of(job) for job in jobs}
    ended: dict[str, Service | None] = {}
    timed_out = False
    try:
        async with asyncio.timeout(timeout_ns / SECOND_NS if timeout_ns else None):
            try:
                await _wait(connection, tuple(names), ended, display)
            finally:
                display.close()  # before anything is said below it
    except TimeoutError:
        timed_out = True
    except asyncio.CancelledError:
        click.echo(f"\n{_goes_on([n for i, n in names.items() if i not in ended])}", err=True)
        raise
    codes = [
        await _tell(connection, names[id_], job, settings, lines=number < LOGS_MAX)
        for number, (id_, job) in enumerate((i, ended[i]) for i in names if i in ended)
    ]
    if timed_out:
        left = [name for id_, name in names.items() if id_ not in ended]
        have = "has" if len(left) == 1 else "have"
        within = format_duration(timeout_ns)
        click.echo(f"Error: {_subject(left)} {have} not ended within {within}", err=True)
        click.echo(_goes_on(left), err=True)
        codes.append(EXIT_NOT_CONVERGED)
    return next((code for code in codes if code), 0)


def _subject(names: Sequence[str]) -> str:
    return f"job {names[0]!r}" if len(names) == 1 else f"jobs {', '.join(names)}"


def _goes_on(names: Sequence[str]) -> str:
    many = " ".join(names)
    goes = "The job goes on" if len(names) == 1 else "The jobs go on"
    return (
        f"{goes}; `swarmctl job wait {many}` waits for {'it' if len(names) == 1 else 'them'}, "
        f"`swarmctl job cancel {many}` stops {'it' if len(names) == 1 else 'them'}."
    )


# ------------------------------------------------------------------ following


async def _wait(
    connection: Connection,
    ids: tuple[str, ...],
    ended: dict[str, Service | None],
    display: Display,
) -> None:
    """Returns when all have ended; `ended` has those that have, None: removed."""
    async with asyncio.TaskGroup() as group:
        showing = group.create_task(_show(connection, ids, display))
        try:
            await until_over(connection, ids, ended, has_ended)
        finally:
            showing.cancel()


async def _show(connection: Connection, ids: tuple[str, ...], display: Display) -> None:
    """Shows how far the tasks are until it is cancelled, or no job is left to be shown."""
    statuses: dict[str, ServiceStatus] = {}
    patience = Patience()
    while True:
        lost: Unavailable | None = None
        try:
            async for answer in connection.control.watch_services(
                WatchServicesRequest(services=ids)
            ):
                patience.answered()
                statuses |= {status.service_id: status for status in answer.statuses}
                display.show(list(statuses.values()), _progress(statuses))
        except NotFound:
            return  # one is gone, which the waiting notices itself
        except Unavailable as error:
            lost = error
        await patience.wait(lost)


def _progress(statuses: Mapping[str, ServiceStatus]) -> dict[str, Progress]:
    return {
        id_: Progress.GONE
        if status.removed
        else Progress.DONE
        if status.converged
        else Progress.GOING
        for id_, status in statuses.items()
    }


# ------------------------------------------------------------------ telling


async def _tell(
    connection: Connection, name: str, job: Service | None, settings: Settings, *, lines: bool
) -> int:
    """Says how one job ended; its exit code."""
    if job is None:
        error = NotFound(f"job {name!r} was removed before it ended")
        click.echo(f"Error: {error.message}", err=True)
        return mapping(error).exit_code
    found = ending(job)
    if not found.exit_code:
        return 0
    message = printable(found.message.encode())
    for piece in wrapped(f"Error: {message}", settings.terminal("stderr").width):
        click.echo(piece, err=True)
    if lines and (failing := await _failing(connection, job)):
        await print_last_lines(connection, failing, told=(found.message,), indent="  ")
    return found.exit_code


async def _failing(connection: Connection, job: Service) -> str:
    """The task whose last lines tell why it failed; empty: none is known."""
    if job.job_status is None or job.job_status.state is not JobState.FAILED:
        return ""
    try:
        answer = await connection.control.get(GetRequest(kind=Kind.SERVICE, ref=job.id))
    except SwarmError:
        return ""  # removed meanwhile, or nobody answers: what its status says is left
    return answer.service_status.failing_task_id if answer.service_status is not None else ""
