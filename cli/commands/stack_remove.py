"""`swarmctl stack rm`: stacks go, with all that belongs to them."""

from __future__ import annotations

import asyncio

import click

from cli.connection import Connection
from cli.converge import wait_and_report
from cli.gone import wait_gone
from cli.lazy import Command
from cli.objects import list_objects, raise_all
from cli.options import Ref, detach_options, make_filters
from cli.services import STACK_LABEL, interruptible
from cli.settings import settings
from cli.verdict import Goal
from swarm.clock import SECOND_NS
from swarm.errors import EXIT_NOT_CONVERGED, Conflict, NotFound, SwarmError
from swarm.quantities import format_duration
from swarm.v1 import GetRequest, Kind, RemoveRequest, Service, Stack, WatchServicesRequest


@click.command(cls=Command)
@click.argument("stacks", nargs=-1, required=True, type=Ref("stack"), metavar="STACK...")
@detach_options(until="all of it is gone")
def rm(stacks: tuple[str, ...], *, detach: bool, timeout_ns: int) -> int:
    """Remove stacks with all that belongs to them.

    Waits until all of it is gone: the tasks, then networks, secrets, configs and the stack's
    history. Volumes of the nodes stay, as with Docker.
    """

    async def work(connection: Connection) -> int:
        problems: list[SwarmError] = []
        going: list[tuple[Stack, list[Service]]] = []
        for name in stacks:
            try:
                going.append(await _ask(connection, name))
            except (NotFound, Conflict) as error:
                problems.append(error)
        code = 0
        if not detach:
            end_s = _now_s() + timeout_ns / SECOND_NS if timeout_ns else None
            for stack, services in going:
                found = await _wait(connection, stack, services, end_s, timeout_ns)
                code = found or code
        raise_all(problems)
        return code

    return interruptible(work)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _ask(connection: Connection, name: str) -> tuple[Stack, list[Service]]:
    """Asks for the removal and says what goes."""
    found = await connection.control.get(GetRequest(kind=Kind.STACK, ref=name))
    stack = found.object.stack if found.object else None
    assert stack is not None and stack.spec is not None
    label = f"{STACK_LABEL}={stack.spec.name}"
    services: list[Service] = await list_objects(
        connection, Kind.SERVICE, filters=make_filters((), label=[label])
    )
    await connection.control.remove(RemoveRequest(kind=Kind.STACK, ref=stack.id))
    spec = stack.spec
    for kind, names in (
        ("service", [service.spec.name for service in services if service.spec]),
        ("secret", [item.name for item in spec.secrets]),
        ("config", [item.name for item in spec.configs]),
        ("network", [item.name for item in spec.networks]),
    ):
        for item in names:
            click.echo(f"Removing {kind} {item}")
    return stack, services


async def _wait(
    connection: Connection,
    stack: Stack,
    services: list[Service],
    end_s: float | None,
    timeout_ns: int,
) -> int:
    """Until the services, and then the stack itself, are gone; the exit code. `end_s`: when the
    time is up, on the loop's clock.
    """
    name = stack.spec.name if stack.spec else stack.id
    interrupted = f"The removal of stack {name} goes on; `swarmctl stack ls` shows it until then."
    if services:
        left_ns = max(1, int((end_s - _now_s()) * SECOND_NS)) if end_s is not None else 0
        code = await wait_and_report(
            connection,
            settings(),
            WatchServicesRequest(services=tuple(service.id for service in services)),
            revision=0,
            before={},
            timeout_ns=left_ns,
            subject=f"stack {name!r}",
            interrupted=interrupted,
            goal=Goal.REMOVED,
        )
        if code:
            return code
    try:
        async with asyncio.timeout_at(end_s):
            await wait_gone(connection, Kind.STACK, stack.id)
    except TimeoutError:
        click.echo(
            f"Error: stack {name!r} is not gone within {format_duration(timeout_ns)}: its tasks "
            "are, but some of its networks, secrets or configs are still in use; it goes on in the "
            "background",
            err=True,
        )
        return EXIT_NOT_CONVERGED
    except asyncio.CancelledError:
        click.echo(f"\n{interrupted}", err=True)
        raise
    return 0
