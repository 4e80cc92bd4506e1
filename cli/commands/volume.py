"""`swarmctl volume`: the cluster's volumes."""

from __future__ import annotations

import click

from cli.connection import Connection, call
from cli.format import Record, print_rows
from cli.lazy import Group
from cli.objects import inspect_all, list_objects, remove_all
from cli.options import Ref, format_option, list_options, make_filters
from cli.settings import settings
from swarm.v1 import Kind, Volume

COLUMNS = (("DRIVER", "Driver"), ("VOLUME NAME", "Name"))


@click.group(cls=Group)
def group() -> None:
    """Manage volumes that stacks declare.

    They belong to the cluster; the data itself lives on the nodes whose tasks mount them.
    """


@group.command("ls")
@list_options("id", "name", "label")
def ls(filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool) -> None:
    """List volumes."""

    async def work(connection: Connection) -> list[Volume]:
        return await list_objects(connection, Kind.VOLUME, filters=make_filters(filters))

    rows = []
    for volume in call(work):
        assert volume.spec is not None
        labels = volume.spec.labels
        rows.append(
            Record(
                ID=volume.id,
                Name=volume.spec.name,
                Driver=(volume.spec.driver.name if volume.spec.driver else "") or "local",
                Labels=",".join(f"{k}={v}" for k, v in sorted(labels.items())),
                Label=labels.get,
            )
        )
    print_rows(
        rows,
        COLUMNS,
        form=form,
        quiet=quiet,
        terminal=settings().terminal(),
        identifier="Name",
    )


@group.command()
@click.argument("volumes", nargs=-1, required=True, type=Ref("volume"), metavar="VOLUME...")
@format_option
def inspect(volumes: tuple[str, ...], form: str) -> None:
    """Show volumes."""
    inspect_all(Kind.VOLUME, volumes, form=form)


@group.command()
@click.argument("volumes", nargs=-1, required=True, type=Ref("volume"), metavar="VOLUME...")
def rm(volumes: tuple[str, ...]) -> None:
    """Remove volumes that no service uses."""
    remove_all(Kind.VOLUME, volumes)
