"""Waiting until services have come to where their specs want them.

`wait` follows Control.WatchServices, shows progress and ends with a `Verdict` (cli/verdict.py). The
deploy itself is done when waiting starts: giving up, or Ctrl-C, changes nothing in the cluster.
Statuses older than the change's revision are skipped.

The manager says when a service has converged (its tasks have run for as long as they are
watched) and when it is stuck. A stuck service ends the wait before the deadline: at once where no
other service moves any more, else after STUCK_GRACE_S (cli/verdict.py), in which the others may
come to their own end. So one run tells of all that fails, and does not sit out the deadline for
what is known already. What is stuck only for a moment does not count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import click

from cli.connection import Connection
from cli.failures import print_last_lines
from cli.following import Patience
from cli.progress import make_display
from cli.settings import Settings
from cli.table import wrapped
from cli.verdict import Goal, Progress, StuckServices, Verdict, judge
from swarm.clock import SECOND_NS
from swarm.errors import NotFound, Unavailable
from swarm.v1 import (
    GetRequest,
    Kind,
    ServiceStatus,
    WatchServicesRequest,
)

__all__ = ["Display", "wait", "wait_and_report"]

# What to do after such an end, in a sentence; empty: nothing.
Advise = Callable[[Verdict], str]
NO_VERSIONS: Mapping[str, int] = MappingProxyType({})
LOGS_MAX = 5  # services whose failing task's last lines are shown


class Display(Protocol):
    """What shows progress while waiting."""

    def show(self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress]) -> None: ...

    def close(self) -> None: ...


async def wait(
    connection: Connection,
    request: WatchServicesRequest,
    *,
    revision: int,
    before: Mapping[str, int],
    timeout_s: float | None,
    display: Display,
    goal: Goal = Goal.UPDATED,
    versions: Mapping[str, int] = NO_VERSIONS,
    may_pause: bool = False,
) -> Verdict:
    """Follows the services until none moves any more, one is stuck, or the time is up. Statuses
    older than `revision`, the change's in the store, do not count; `versions`: those of the
    services since the change, by id. Raises Unavailable when no manager answers for long.
    """
    verdict = Verdict(may_pause=may_pause)

    def judge_one(status: ServiceStatus) -> Progress:
        id_ = status.service_id
        return judge(status, before=before.get(id_, 0), goal=goal, version=versions.get(id_, 0))

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
    stuck = StuckServices()
    try:
        async with asyncio.timeout(None) as grace:
            await _follow(
                connection,
                request,
                verdict,
                display,
                judge_one,
                lambda: grace.reschedule(stuck.note(verdict, loop.time())),
                revision=revision,
                removing=removing,
            )
    except TimeoutError:
        if not grace.expired():
            raise
        stuck.settle(verdict)


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
    patience = Patience()
    while True:
        lost: Unavailable | None = None
        try:
            async for answer in connection.control.watch_services(request):
                patience.answered()
                if answer.revision < revision:
                    continue
                for status in answer.statuses:
                    verdict.note(status, judge_one(status))
                display.show(list(verdict.statuses.values()), verdict.progress)
                if verdict.over or not answer.statuses:
                    return
                shown()
        except NotFound:
            # A service was gone before the watch began; the others may not be.
            if not removing:
                raise
            request = await _left(connection, request, verdict)
            if not request.services:
                return
            continue
        except Unavailable as error:
            lost = error
        await patience.wait(lost)


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
    versions: Mapping[str, int] = NO_VERSIONS,
    may_pause: bool = False,
    advise: Advise = lambda verdict: "",
) -> int:
    """`wait` with the display that fits stderr; then, on stderr, what went wrong and the last lines
    of the tasks that failed. The exit code. `interrupted` is said when Ctrl-C or the deadline ends
    the wait, what `advise` says after another end. With `may_pause` an update may end as one that
    awaits a person.
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
            versions=versions,
            may_pause=may_pause,
        )
        await report(
            connection,
            verdict,
            subject,
            timeout_ns=timeout_ns,
            goal=goal,
            width=settings.terminal("stderr").width,
        )
        if verdict.timed_out:
            click.echo(interrupted, err=True)
        elif text := advise(verdict):
            click.echo(text, err=True)
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
            await print_last_lines(connection, verdict.failing[id_], told=lines, indent="    ")
