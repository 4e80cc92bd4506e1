"""`swarmctl stack ls | ps | services | history`: what stacks there are, and what became of them."""

from __future__ import annotations

import click

from cli.connection import Connection, call
from cli.format import Record, print_rows, to_yaml
from cli.lazy import Command
from cli.objects import list_objects
from cli.options import (
    Ref,
    StackRevisionRef,
    TaskList,
    filter_option,
    format_option,
    make_filters,
    quiet_names_option,
    quiet_option,
    task_list_options,
)
from cli.services import STACK_LABEL, fetch_services, print_services
from cli.settings import settings
from cli.tasks import list_tasks, natural
from cli.times import ago, rfc3339
from swarm.errors import NotFound
from swarm.v1 import (
    GetRequest,
    GetStackHistoryRequest,
    GetStackHistoryResponse,
    Kind,
    Service,
    Stack,
    StackRevision,
)

COLUMNS = (("NAME", "Name"), ("SERVICES", "Services"))
HISTORY_COLUMNS = (
    ("REVISION", "_Revision"),
    ("DEPLOYED", "Deployed"),
    ("BY", "By"),
    ("CHANGES", "Changes"),
    ("NOTE", "Note"),
)


@click.command("ls", cls=Command)
@format_option
@quiet_names_option
def ls(form: str, *, quiet: bool) -> None:
    """List stacks."""

    async def work(connection: Connection) -> list[Stack]:
        return await list_objects(connection, Kind.STACK)

    rows = [
        Record(
            ID=stack.id,
            Name=stack.spec.name,
            Services=len(stack.spec.services),
            Revision=stack.revision,
        )
        for stack in call(work)
        if stack.spec is not None
    ]
    rows.sort(key=lambda row: natural(row["Name"]))
    print_rows(
        rows, COLUMNS, form=form, quiet=quiet, terminal=settings().terminal(), identifier="Name"
    )


@click.command(cls=Command)
@click.argument("stack", type=Ref("stack"))
@task_list_options("id", "name", "node", "desired-state", "label")
def ps(stack: str, *, wanted: TaskList) -> None:
    """List the tasks of a stack."""

    async def work(connection: Connection) -> None:
        found = await connection.control.get(GetRequest(kind=Kind.STACK, ref=stack))
        services = await _services_of(connection, found.object.stack if found.object else None)
        if not services:
            click.echo(f"Nothing found in stack: {stack}", err=True)
            return
        await list_tasks(
            connection, settings(), wanted, service=[service.id for service in services]
        )

    call(work)


async def _services_of(connection: Connection, stack: Stack | None) -> list[Service]:
    assert stack is not None and stack.spec is not None
    label = f"{STACK_LABEL}={stack.spec.name}"
    return await list_objects(connection, Kind.SERVICE, filters=make_filters((), label=[label]))


@click.command(cls=Command)
@click.argument("stack", type=Ref("stack"))
@filter_option("id", "name", "label", "mode")
@format_option
@quiet_option
def services(stack: str, filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool) -> None:
    """List the services of a stack."""

    async def work(connection: Connection) -> None:
        found = await connection.control.get(GetRequest(kind=Kind.STACK, ref=stack))
        held = found.object.stack if found.object else None
        assert held is not None and held.spec is not None
        asked = make_filters((*filters, ("label", f"{STACK_LABEL}={held.spec.name}")))
        pairs = await fetch_services(connection, asked)
        if not pairs:
            click.echo(f"Nothing found in stack: {stack}", err=True)
            return
        print_services(pairs, settings(), form=form, quiet=quiet)

    call(work)


@click.command(cls=Command)
@click.argument("stack", type=Ref("stack"))
@click.option(
    "--revision",
    type=StackRevisionRef(),
    default=0,
    metavar="REVISION",
    help="Show what this deploy asked for, as YAML.",
)
@format_option
@click.option("-q", "--quiet", is_flag=True, help="Print revisions only.")
def history(stack: str, *, revision: int, form: str, quiet: bool) -> None:
    """List the deploys of a stack that changed something, newest first; * marks the present one.

    stack rollback goes back to any of them.
    """

    async def work(connection: Connection) -> GetStackHistoryResponse:
        return await connection.control.get_stack_history(GetStackHistoryRequest(stack=stack))

    answer = call(work)
    if revision:
        _show_revision(answer, revision, stack, form)
        return
    present = answer.stack.revision if answer.stack else 0
    now_ns = settings().clock.now_ns()
    rows = [_history_row(found, present, now_ns) for found in answer.revisions]
    if form in ("json", "yaml"):
        rows = [Record({k: v for k, v in row.items() if not k.startswith("_")}) for row in rows]
    print_rows(
        rows,
        HISTORY_COLUMNS,
        form=form,
        quiet=quiet,
        terminal=settings().terminal(),
        sentences="Note",
        identifier="Revision",
        headers={"Revision": "REVISION", "CreatedAt": "CREATED AT"},
    )


def _history_row(found: StackRevision, present: int, now_ns: int) -> Record:
    from cli.plan_view import counts

    created_ns = found.meta.created_at_ns if found.meta else 0
    notes = []
    if found.rollback_to:
        notes.append(f"rollback to {found.rollback_to}")
    elif found.prune:
        notes.append("pruned")
    return Record(
        _Revision=f"{found.revision}{' *' if found.revision == present else ''}",
        Revision=found.revision,
        Present=found.revision == present,
        Deployed=ago(created_ns, now_ns),
        CreatedAt=rfc3339(created_ns),
        By=found.who,
        Changes=counts(found.changes) or "none",
        Note=", ".join(notes),
        RollbackTo=found.rollback_to,
        Services=len(found.spec.services) if found.spec else 0,
    )


def _show_revision(answer: GetStackHistoryResponse, number: int, stack: str, form: str) -> None:
    """What a deploy asked for. Raises NotFound with those that are kept."""
    from cli import docker_json
    from cli.format import print_inspected

    for found in answer.revisions:
        if found.revision == number:
            document = docker_json.stack(Stack(spec=found.spec))["Spec"]
            if form in ("", "table", "yaml"):
                click.echo(to_yaml(document), nl=False)
            else:
                print_inspected([document], form=form, known=docker_json.KNOWN)
            return
    kept = ", ".join(str(found.revision) for found in answer.revisions)
    raise NotFound(f"stack {stack!r} has no revision {number}; kept are {kept or 'none'}")
