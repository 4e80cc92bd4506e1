"""`swarmctl service ls | ps | inspect | rm`: what reads services, and what removes them."""

from __future__ import annotations

import click

from cli.connection import Connection, call
from cli.lazy import Command
from cli.objects import get_each, inspect_all, raise_all, remove_all
from cli.options import (
    Ref,
    TaskList,
    format_option,
    list_options,
    make_filters,
    no_trunc_option,
    task_list_options,
)
from cli.services import describing, fetch_services, print_services
from cli.settings import settings
from cli.tasks import list_tasks
from swarm.errors import SwarmError
from swarm.v1 import Kind

SERVICES = click.argument(
    "services", nargs=-1, required=True, type=Ref("service"), metavar="SERVICE..."
)


@click.command(cls=Command)
@list_options("id", "name", "label", "mode", "runtime")
@no_trunc_option
def ls(filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool, no_trunc: bool) -> None:
    """List services."""

    async def work(connection: Connection) -> None:
        pairs = await fetch_services(connection, make_filters(filters))
        print_services(pairs, settings(), form=form, quiet=quiet, no_trunc=no_trunc)

    call(work)


@click.command(cls=Command)
@SERVICES
@task_list_options("id", "name", "node", "desired-state", "label")
def ps(services: tuple[str, ...], *, wanted: TaskList) -> None:
    r"""List the tasks of services.

    The newest task of each slot comes first; the ones before it are marked with \_.
    """

    async def work(connection: Connection) -> list[SwarmError]:
        found, problems = await get_each(connection, Kind.SERVICE, services)
        ids = [a.object.service.id for a in found if a.object and a.object.service]
        if ids:
            await list_tasks(connection, settings(), wanted, service=ids)
        return problems

    raise_all(call(work))


@click.command(cls=Command)
@SERVICES
@format_option
@click.option("--pretty", is_flag=True, help="Print for people.")
def inspect(services: tuple[str, ...], form: str, *, pretty: bool) -> None:
    """Show services."""
    inspect_all(Kind.SERVICE, services, form=form, prepare=describing if pretty else None)


@click.command(cls=Command)
@SERVICES
def rm(services: tuple[str, ...]) -> None:
    """Remove services and their tasks."""
    remove_all(Kind.SERVICE, services)
