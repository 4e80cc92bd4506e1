"""`swarmctl secret`: what services read in files and nobody can read back."""

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
from swarm.v1 import Kind, Secret

COLUMNS = (
    ("ID", "ID"),
    ("NAME", "Name"),
    ("DRIVER", "Driver"),
    ("CREATED", "CreatedAt"),
    ("UPDATED", "UpdatedAt"),
)


@click.group(cls=Group)
def group() -> None:
    """Manage secrets."""


@group.command()
@click.argument("name")
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label.")
@click.option("-d", "--driver", default="", help="Driver that holds the data; then without FILE.")
@click.option("--template-driver", default="", help="Template driver; golang.")
def create(
    name: str, file: str | None, labels: tuple[str, ...], driver: str, template_driver: str
) -> None:
    """Make a secret from a file or standard input (-).

    The data may have 1 byte to 500 KiB. Prints the secret's id.
    """
    create_blob(
        Kind.SECRET, name, file, labels=labels, driver=driver, template_driver=template_driver
    )


@group.command("ls")
@list_options("id", "name", "label")
def ls(filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool) -> None:
    """List secrets."""

    async def work(connection: Connection) -> list[Secret]:
        return await list_objects(connection, Kind.SECRET, filters=make_filters(filters))

    now_ns = settings().clock.now_ns()
    rows = [_row(secret, now_ns) for secret in call(work)]
    print_rows(rows, COLUMNS, form=form, quiet=quiet, terminal=settings().terminal())


def _row(secret: Secret, now_ns: int) -> Record:
    assert secret.spec is not None and secret.meta is not None
    return Record(
        ID=secret.id,
        Name=secret.spec.name,
        Driver=secret.spec.driver.name if secret.spec.driver else "",
        CreatedAt=ago(secret.meta.created_at_ns, now_ns),
        UpdatedAt=ago(secret.meta.updated_at_ns, now_ns),
        Labels=",".join(f"{k}={v}" for k, v in sorted(secret.spec.labels.items())),
        Label=lambda key: secret.spec.labels.get(key, "") if secret.spec else "",
    )


@group.command()
@click.argument("secrets", nargs=-1, required=True, type=Ref("secret"), metavar="SECRET...")
@format_option
@click.option("--pretty", is_flag=True, help="Print for people.")
def inspect(secrets: tuple[str, ...], form: str, *, pretty: bool) -> None:
    """Show secrets, without their data."""
    inspect_all(Kind.SECRET, secrets, form=form, pretty=describe_blob if pretty else None)


@group.command()
@click.argument("secrets", nargs=-1, required=True, type=Ref("secret"), metavar="SECRET...")
def rm(secrets: tuple[str, ...]) -> None:
    """Remove secrets that no service uses."""
    remove_all(Kind.SECRET, secrets)
