"""`swarmctl service history`: the versions of a service that are kept, and how each differs from
the one before.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import click

from cli.connection import Connection, call
from cli.format import Record, print_rows, short_id
from cli.lazy import Command
from cli.options import Ref, format_option
from cli.plan_view import field_lines
from cli.plan_words import Field, fields, value
from cli.services import STACK_LABEL
from cli.settings import settings
from cli.table import layout
from cli.tasks import image_of, shown_image
from cli.times import ago, rfc3339
from swarm.v1 import (
    FieldChange,
    GetServiceHistoryRequest,
    GetServiceHistoryResponse,
    Kind,
    Meta,
    ServiceRevision,
    ServiceVersion,
)

COLUMNS = (
    ("VERSION", "_Version"),
    ("CREATED", "Created"),
    ("WHO", "Who"),
    ("IMAGE", "Image"),
    ("TASKS", "Tasks"),
)
CHANGES = ("CHANGES", "Changes")
FIELDS_MAX = 3  # of a version, in the table
VALUE_MAX = 32  # characters of a value there; an image's name is not cut
_CLUSTER = "cluster"  # made by nobody: a rollback after a failure


@click.command(cls=Command)
@click.argument("service", type=Ref("service"))
@format_option
@click.option("-q", "--quiet", is_flag=True, help="Print versions only.")
@click.option("--no-trunc", is_flag=True, help="Show all changes, field by field, and digests.")
def history(service: str, *, form: str, quiet: bool, no_trunc: bool) -> None:
    """List the versions of a service that can be gone back to, newest first.

    The first is the present one; previous is what service rollback goes back to unless --to names
    another. CHANGES are against the next older one. Of versions that differ in nothing that needs
    new tasks the last is kept; those of the last ten that did.
    """

    async def work(connection: Connection) -> GetServiceHistoryResponse:
        return await connection.control.get_service_history(
            GetServiceHistoryRequest(service=service)
        )

    answer = call(work)
    terminal = settings().terminal()
    rows = _rows(answer, no_trunc=no_trunc)
    if no_trunc and form in ("", "table") and not quiet:
        table = [[title for title, _ in COLUMNS]]
        table += [[str(row[name]) for _, name in COLUMNS] for row in rows]
        heads = layout(table, width=terminal.width)
        click.echo(click.style(heads[0], bold=True) if terminal.colour else heads[0])
        for head, version in zip(heads[1:], answer.versions, strict=True):
            click.echo(head)
            for note in _notes(version, oldest=version is answer.versions[-1]):
                click.echo(f"    {note}")
            for line in field_lines(_fields(answer, version), terminal):
                click.echo(line)
        return
    if form in ("json", "yaml"):
        rows = [Record({k: v for k, v in row.items() if not k.startswith("_")}) for row in rows]
    print_rows(
        rows,
        (*COLUMNS, CHANGES),
        form=form,
        quiet=quiet,
        terminal=terminal,
        sentences="Changes",
        identifier="Version",
        headers={"Version": "VERSION", "CreatedAt": "CREATED AT"},
    )


def _rows(answer: GetServiceHistoryResponse, *, no_trunc: bool) -> list[Record]:
    now_ns = settings().clock.now_ns()
    return [
        _row(answer, version, number, now_ns=now_ns, no_trunc=no_trunc)
        for number, version in enumerate(answer.versions)
    ]


def _row(
    answer: GetServiceHistoryResponse,
    version: ServiceVersion,
    number: int,
    *,
    now_ns: int,
    no_trunc: bool,
) -> Record:
    revision = version.revision or ServiceRevision()
    created_ns = (revision.meta or Meta()).created_at_ns
    present = number == 0
    mark = " present" if present else " previous" if version.previous else ""
    who = revision.who or (_CLUSTER if revision.task_version else "")
    changed = _fields(answer, version)
    notes = _notes(version, oldest=number == len(answer.versions) - 1)
    return Record(
        _Version=f"{revision.spec_version}{mark}",
        ID=short_id(revision.service_id, whole=no_trunc),
        Version=revision.spec_version,
        TaskVersion=revision.task_version,
        Present=present,
        Previous=version.previous,
        Created=ago(created_ns, now_ns),
        CreatedAt=rfc3339(created_ns) if created_ns else "",
        Who=who,
        Image=shown_image(image_of(revision.spec), whole=no_trunc),
        Tasks=version.tasks,
        RollbackTo=revision.rollback_to,
        Changes="; ".join([*notes, *_short(changed)]),
        Fields=[_document(change) for change in version.changes],
    )


def _notes(version: ServiceVersion, *, oldest: bool) -> list[str]:
    """What is said of a version beside its fields."""
    revision = version.revision or ServiceRevision()
    if revision.rollback_to:
        return [f"rollback to {revision.rollback_to}"]
    if revision.spec_version == 1:
        return ["created"]
    return ["the oldest that is kept"] if oldest else []


def _fields(answer: GetServiceHistoryResponse, version: ServiceVersion) -> list[Field]:
    """What changed, in compose's words. Names of the service's stack are as its files have them."""
    spec = answer.service.spec if answer.service else None
    stack = spec.labels.get(STACK_LABEL, "") if spec else ""
    return fields(Kind.SERVICE, version.changes, stack=stack)


def _short(changed: Sequence[Field]) -> list[str]:
    """The first fields in a few words each."""
    told = [_words(field) for field in changed[:FIELDS_MAX]]
    left = len(changed) - FIELDS_MAX
    return [*told, f"{left} more"] if left > 0 else told


def _words(field: Field) -> str:
    """ "image: a:1 -> a:2", "+ environment.DEBUG: 1", "- user"."""
    before, after = (_cut(field.key, text) for text in (field.before, field.after))
    if field.before is None:
        return f"+ {field.key}: {after}"
    if field.after is None:
        return f"- {field.key}"
    return f"{field.key}: {before} -> {after}"


def _cut(key: str, text: str | None) -> str:
    text = text or ""
    if key == "image":
        return shown_image(text, whole=False)
    return textwrap.shorten(text, VALUE_MAX, placeholder="…") or f"{text[: VALUE_MAX - 1]}…"


def _document(change: FieldChange) -> dict[str, Any]:
    """For machines: the manager's path and what compose calls it; null: not set."""
    key = next((field.key for field in fields(Kind.SERVICE, (change,))), change.path)
    found = {"Path": change.path, "Key": key}
    return found | {"Before": value(change.before), "After": value(change.after)}
