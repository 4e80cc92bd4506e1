"""`swarmctl secret` and `swarmctl config`: what services read in files.

Both are names with a content, and their commands differ in a few words only: a secret's data cannot
be read back, and a driver may hold it. `_group` makes the group of a kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cli.commands.common import create_blob, describe_blob
from cli.connection import Connection, call
from cli.converge import wait_and_report
from cli.format import Record, print_rows
from cli.lazy import Group
from cli.objects import inspect_all, list_objects, name_of, remove_all
from cli.options import (
    Ref,
    detach_options,
    format_option,
    list_options,
    make_filters,
    read_input,
)
from cli.services import interruptible, subject_of
from cli.settings import settings
from cli.times import ago
from cli.verdict import started
from swarm.v1 import (
    Config,
    GetRequest,
    Kind,
    Object,
    RotateRequest,
    Secret,
    WatchServicesRequest,
)

_CREATED = (("CREATED", "CreatedAt"), ("UPDATED", "UpdatedAt"))
COLUMNS = {
    Kind.SECRET: (("ID", "ID"), ("NAME", "Name"), ("DRIVER", "Driver"), *_CREATED),
    Kind.CONFIG: (("ID", "ID"), ("NAME", "Name"), *_CREATED),
}
_SUPERSEDED = ("SUPERSEDED", "Superseded")
# Earlier and present versions: the values of one filter are alternatives.
_ALL = ("true", "false")


def _group(kind: Kind, *, size: str, shown: str) -> click.Group:
    """The group of secrets or configs. `size`: of the data; `shown`: what inspect shows of it."""
    what = kind.name.lower()

    @click.group(what, cls=Group, help=f"Manage {what}s.")
    def group() -> None:
        pass

    _create(group, kind, what, size)

    @group.command(
        help=f"List {what}s.\n\nOf a {what} whose content was changed, by a deploy or by rotate, "
        "the earlier versions stay for as long as something can go back to them; --all shows them."
    )
    @list_options("id", "name", "label", "superseded")
    @click.option("-a", "--all", "every", is_flag=True, help="Earlier versions as well.")
    def ls(filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool, every: bool) -> None:
        _list(kind, filters, form, quiet=quiet, every=every)

    refs = click.argument(
        "refs", nargs=-1, required=True, type=Ref(what), metavar=f"{what.upper()}..."
    )

    @group.command(help=f"Show {what}s{shown}.")
    @refs
    @format_option
    @click.option("--pretty", is_flag=True, help="Print for people.")
    def inspect(refs: tuple[str, ...], form: str, *, pretty: bool) -> None:
        inspect_all(kind, refs, form=form, pretty=describe_blob if pretty else None)

    @group.command(help=f"Remove {what}s that no service uses.")
    @refs
    def rm(refs: tuple[str, ...]) -> None:
        remove_all(kind, refs)

    _rotate(group, kind, what, size)
    return group


def _create(group: click.Group, kind: Kind, what: str, size: str) -> None:
    def with_driver(function: Callable[..., Any]) -> Callable[..., Any]:
        if kind is not Kind.SECRET:
            return function
        return click.option(
            "-d", "--driver", default="", help="Driver that holds the data; then without FILE."
        )(function)

    @group.command(
        help=f"Make a {what} from a file or standard input (-).\n\n"
        f"The data may have {size}. Prints the {what}'s id."
    )
    @click.argument("name")
    @click.argument("file", required=False, metavar="[FILE|-]")
    @click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label.")
    @with_driver
    @click.option("--template-driver", default="", help="Template driver; golang.")
    def create(
        name: str,
        file: str | None,
        labels: tuple[str, ...],
        template_driver: str,
        driver: str = "",
    ) -> None:
        create_blob(kind, name, file, labels=labels, driver=driver, template_driver=template_driver)


def _list(
    kind: Kind,
    filters: tuple[tuple[str, str], ...],
    form: str,
    *,
    quiet: bool,
    every: bool,
) -> None:
    if every and any(key == "superseded" for key, _ in filters):
        raise click.UsageError("--all and --filter superseded exclude each other.")
    asked = make_filters(filters, superseded=_ALL) if every else make_filters(filters)

    async def work(connection: Connection) -> list[Secret | Config]:
        return await list_objects(connection, kind, filters=asked)

    now_ns = settings().clock.now_ns()
    rows = [_row(item, now_ns) for item in call(work)]
    columns = (*COLUMNS[kind], _SUPERSEDED) if every else COLUMNS[kind]
    print_rows(rows, columns, form=form, quiet=quiet, terminal=settings().terminal())


def _row(item: Secret | Config, now_ns: int) -> Record:
    spec = item.spec
    assert spec is not None and item.meta is not None
    row = Record(
        ID=item.id,
        Name=spec.name,
        CreatedAt=ago(item.meta.created_at_ns, now_ns),
        UpdatedAt=ago(item.meta.updated_at_ns, now_ns),
        Labels=",".join(f"{k}={v}" for k, v in sorted(spec.labels.items())),
        Label=lambda key: spec.labels.get(key, ""),
        Superseded=item.superseded,
    )
    if isinstance(item, Secret):
        row["Driver"] = item.spec.driver.name if item.spec and item.spec.driver else ""
    return row


def _rotate(group: click.Group, kind: Kind, what: str, size: str) -> None:
    @group.command(
        help=f"Give a {what} new content, from a file or standard input (-), and roll the services "
        f"that use it.\n\nThe data may have {size}. The services get new tasks by their own update "
        "rules; waits until they have converged and ends as service update does. A rollback of a "
        "service brings the earlier content back; a deploy of its stack that of the stack's files."
    )
    @click.argument("ref", type=Ref(what), metavar=what.upper())
    @click.argument("file", metavar="FILE|-")
    @click.option("-q", "--quiet", is_flag=True, help="No progress display.")
    @detach_options()
    def rotate(ref: str, file: str, *, quiet: bool, detach: bool, timeout_ns: int) -> int:
        data = read_input(file, what=what)
        request = RotateRequest(kind=kind, ref=ref, data=data)

        async def work(connection: Connection) -> int:
            return await _roll(
                connection, request, quiet=quiet, detach=detach, timeout_ns=timeout_ns
            )

        return interruptible(work)


async def _roll(
    connection: Connection,
    request: RotateRequest,
    *,
    quiet: bool,
    detach: bool,
    timeout_ns: int,
) -> int:
    kind = request.kind
    found = await connection.control.get(GetRequest(kind=kind, ref=request.ref))
    held = found.object or Object()
    old: Secret | Config | None = held.secret or held.config
    assert old is not None
    what = f"{kind.name.lower()} {name_of(old)}"
    services = await list_objects(connection, Kind.SERVICE)
    before = {service.id: started(service) for service in services}
    answer = await connection.control.rotate(request)
    if answer.id == old.id:
        click.echo(f"Nothing to change: {what} has this content already")
        return 0
    click.echo(f"Rotated {what} (id: {answer.id})")
    if not answer.services:
        click.echo("No service uses it")
        return 0
    for name, id_ in zip(answer.services, answer.service_ids, strict=True):
        click.echo(f"Updating service {name} (id: {id_})")
    if detach:
        return 0
    return await wait_and_report(
        connection,
        settings(),
        WatchServicesRequest(services=answer.service_ids),
        revision=answer.revision,
        before=before,
        timeout_ns=timeout_ns,
        subject=subject_of(answer.services),
        interrupted=(
            "The rotation goes on; `swarmctl service wait "
            f"{' '.join(answer.services)}` waits for it."
        ),
        quiet=quiet,
    )


secret = _group(Kind.SECRET, size="1 byte to 500 KiB", shown=", without their data")
config = _group(
    Kind.CONFIG, size="up to 1000 KiB", shown="; their data is in base64, with --pretty in clear"
)
