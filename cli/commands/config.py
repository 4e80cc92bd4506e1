"""`swarmctl config`: files that services read."""

from __future__ import annotations

import click

from cli.commands.common import create_blob, describe_blob
from cli.connection import Connection, call
from cli.format import Record, print_rows
from cli.lazy import Group
from cli.objects import inspect_all, list_objects, remove_all
from cli.options import Ref, format_option, list_options, make_filters
from cli.settings import settings
from cli.times import ago
from swarm.v1 import Config, Kind

COLUMNS = (
    ("ID", "ID"),
    ("NAME", "Name"),
    ("CREATED", "CreatedAt"),
    ("UPDATED", "UpdatedAt"),
)


@click.group(cls=Group)
def group() -> None:
    """Manage configs."""


@group.command()
@click.argument("name")
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label.")
@click.option("--template-driver", default="", help="Template driver; golang.")
def create(name: str, file: str | None, labels: tuple[str, ...], template_driver: str) -> None:
    """Make a config from a file or standard input (-).

    The data may have up to 1000 KiB. Prints the config's id.
    """
    create_blob(Kind.CONFIG, name, file, labels=labels, template_driver=template_driver)


@group.command("ls")
@list_options("id", "name", "label")
def ls(filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool) -> None:
    """List configs."""

    async def work(connection: Connection) -> list[Config]:
        return await list_objects(connection, Kind.CONFIG, filters=make_filters(filters))

    now_ns = settings().clock.now_ns()
    rows = [_row(config, now_ns) for config in call(work)]
    print_rows(rows, COLUMNS, form=form, quiet=quiet, terminal=settings().terminal())


def _row(config: Config, now_ns: int) -> Record:
    assert config.spec is not None and config.meta is not None
    return Record(
        ID=config.id,
        Name=config.spec.name,
        CreatedAt=ago(config.meta.created_at_ns, now_ns),
        UpdatedAt=ago(config.meta.updated_at_ns, now_ns),
        Labels=",".join(f"{k}={v}" for k, v in sorted(config.spec.labels.items())),
        Label=lambda key: config.spec.labels.get(key, "") if config.spec else "",
    )


@group.command()
@click.argument("configs", nargs=-1, required=True, type=Ref("config"), metavar="CONFIG...")
@format_option
@click.option("--pretty", is_flag=True, help="Print for people.")
def inspect(configs: tuple[str, ...], form: str, *, pretty: bool) -> None:
    """Show configs; their data is in base64, with --pretty in clear."""
    inspect_all(Kind.CONFIG, configs, form=form, pretty=describe_blob if pretty else None)


@group.command()
@click.argument("configs", nargs=-1, required=True, type=Ref("config"), metavar="CONFIG...")
def rm(configs: tuple[str, ...]) -> None:
    """Remove configs that no service uses."""
    remove_all(Kind.CONFIG, configs)
