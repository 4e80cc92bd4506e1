"""`swarmctl stack wait` and `service wait`: waiting for what was changed before, by whomever."""

from __future__ import annotations

import click

from cli.connection import Connection
from cli.converge import wait_and_report
from cli.lazy import Command
from cli.options import Ref, timeout_option
from cli.services import interruptible, subject_of
from cli.settings import settings
from cli.verdict import Goal
from swarm.v1 import WatchServicesRequest

_QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress display.")


@click.command("wait", cls=Command)
@click.argument("stack", type=Ref("stack"))
@_QUIET
@timeout_option()
def stack(stack: str, *, quiet: bool, timeout_ns: int) -> int:
    """Wait until every service of a stack has converged.

    Ends as stack deploy does: with 0 when all have converged, with 6 and the reasons when they do
    not, with 7 when a service's last update was rolled back.
    """
    request = WatchServicesRequest(stack=stack)
    return _wait(request, f"stack {stack!r}", timeout_ns=timeout_ns, quiet=quiet)


@click.command("wait", cls=Command)
@click.argument("services", nargs=-1, required=True, type=Ref("service"), metavar="SERVICE...")
@_QUIET
@timeout_option()
def service(services: tuple[str, ...], *, quiet: bool, timeout_ns: int) -> int:
    """Wait until services have converged.

    Ends with 0 when all have converged, with 6 and the reasons when they do not, with 7 when the
    last update of one was rolled back.
    """
    request = WatchServicesRequest(services=services)
    return _wait(request, subject_of(services), timeout_ns=timeout_ns, quiet=quiet)


def _wait(request: WatchServicesRequest, subject: str, *, timeout_ns: int, quiet: bool) -> int:
    async def work(connection: Connection) -> int:
        return await wait_and_report(
            connection,
            settings(),
            request,
            revision=0,
            before={},
            timeout_ns=timeout_ns,
            subject=subject,
            interrupted="Stopped waiting; nothing was changed.",
            goal=Goal.ANY,
            quiet=quiet,
        )

    return interruptible(work)
