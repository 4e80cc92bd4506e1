"""`swarmctl gpu`: the cluster's GPUs, and which tasks have them."""

from __future__ import annotations

from collections.abc import Sequence

import click

from cli.connection import Connection, call
from cli.format import print_inspected, print_rows
from cli.gpu_view import FILTERS, find_gpu, gpu_json, gpu_row, is_split, list_gpus, matching
from cli.lazy import Group
from cli.objects import names_of, raise_all
from cli.options import Ref, format_option, list_options, no_trunc_option
from cli.pretty_gpu import describe_gpu
from cli.settings import settings
from swarm.errors import SwarmError
from swarm.v1 import GpuUsage, Kind

COLUMNS = (
    ("NODE", "Node"),
    ("INDEX", "Index"),
    ("UUID", "UUID"),
    ("MODEL", "Model"),
    ("MEMORY", "Memory"),
    ("FREE", "Free"),
    ("HEALTH", "Health"),
    ("TASKS", "Tasks"),
)
REASON = ("REASON", "Reason")


@click.group(cls=Group)
def group() -> None:
    """Look into GPUs and who has them."""


async def _fetch(connection: Connection) -> tuple[Sequence[GpuUsage], dict[str, str]]:
    usages = await list_gpus(connection)
    return usages, await names_of(connection, Kind.NODE) if usages else {}


@group.command("ls")
@list_options(*FILTERS)
@no_trunc_option
def ls(filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool, no_trunc: bool) -> None:
    """List GPUs.

    FREE is the share of a GPU that tasks can still be given: 1 is a whole one. A GPU that is split
    into instances (MIG) can only be had as those. Filters: node, model, task (or its service),
    health=healthy|unhealthy, free=whole|part|none.
    """
    usages, names = call(_fetch)
    rows = [
        gpu_row(usage, names, split=is_split(usage, usages), whole=no_trunc or bool(form))
        for usage in matching(usages, filters, names)
    ]
    columns = (*COLUMNS, REASON) if any(row["Reason"] for row in rows) else COLUMNS
    print_rows(
        rows,
        columns,
        form=form,
        quiet=quiet,
        terminal=settings().terminal(),
        sentences="Reason" if columns[-1] is REASON else "Tasks",
    )


@group.command()
@click.argument("gpus", nargs=-1, required=True, type=Ref("gpu"), metavar="UUID|NODE/INDEX...")
@format_option
@click.option("--pretty", is_flag=True, help="Print for people.")
def inspect(gpus: tuple[str, ...], form: str, *, pretty: bool) -> None:
    """Show GPUs: what they are, how they are joined, who has them."""
    usages, names = call(_fetch)
    found: list[GpuUsage] = []
    problems: list[SwarmError] = []
    for ref in gpus:
        try:
            found.append(find_gpu(usages, ref, names))
        except SwarmError as error:
            problems.append(error)
    if pretty:
        click.echo("\n\n".join(describe_gpu(usage, usages, names) for usage in found))
    elif found or not form:
        from cli import docker_json  # large, and lists do without

        documents = [gpu_json(usage, names) for usage in found]
        print_inspected(documents, form=form, known=docker_json.KNOWN)
    raise_all(problems)
