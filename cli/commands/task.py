"""`swarmctl task`: single tasks, and why they are where they are."""

from __future__ import annotations

import click
import msgspec

from cli.commands.logs import task_logs
from cli.connection import Connection, call
from cli.format import print_inspected
from cli.lazy import Group
from cli.objects import inspect_all
from cli.options import (
    Ref,
    filter_option,
    format_option,
    make_filters,
    no_trunc_option,
    quiet_option,
)
from cli.reasons import explain_lines
from cli.settings import settings
from cli.tasks import fetch_tasks, print_tasks
from swarm.v1 import ExplainTaskRequest, ExplainTaskResponse, Kind


@click.group(cls=Group)
def group() -> None:
    """Look into tasks: the containers and processes that services are made of."""


group.add_command(task_logs, "logs")


@group.command("ls")
@filter_option("id", "name", "label", "service", "node", "desired-state", "stack")
@format_option
@quiet_option
@no_trunc_option
@click.option("--no-resolve", is_flag=True, help="Show ids instead of names.")
def ls(
    filters: tuple[tuple[str, str], ...],
    form: str,
    *,
    quiet: bool,
    no_trunc: bool,
    no_resolve: bool,
) -> None:
    """List all tasks."""
    asked = tuple(
        ("label", f"com.docker.stack.namespace={value}") if key == "stack" else (key, value)
        for key, value in filters
    )

    async def work(connection: Connection) -> None:
        tasks, lookup = await fetch_tasks(connection, make_filters(asked), resolve=not no_resolve)
        print_tasks(tasks, lookup, settings(), form=form, quiet=quiet, no_trunc=no_trunc)

    call(work)


@group.command()
@click.argument("tasks", nargs=-1, required=True, type=Ref("task"), metavar="TASK...")
@format_option
def inspect(tasks: tuple[str, ...], form: str) -> None:
    """Show tasks with the spec they run."""
    inspect_all(Kind.TASK, tasks, form=form)


@group.command()
@click.argument("task", type=Ref("task"))
@format_option
def explain(task: str, form: str) -> None:
    """Tell why a task runs where it does, or why it runs nowhere.

    Shows what each of the scheduler's filters let through, how much was needed, and what the best
    node has free.
    """

    async def work(connection: Connection) -> ExplainTaskResponse:
        return await connection.control.explain_task(ExplainTaskRequest(task=task))

    answer = call(work)
    if form:
        print_inspected([_document(answer)], form=form, known=frozenset())
        return
    width = settings().terminal().width
    for line in explain_lines(answer, width=width):
        click.echo(line)


def _document(answer: ExplainTaskResponse) -> dict[str, object]:
    def named(message: msgspec.Struct) -> dict[str, object]:
        return {
            "".join(part.capitalize() for part in name.split("_")): getattr(message, name)
            for name in message.__struct_fields__
        }

    return named(answer) | {"Filters": [named(result) for result in answer.filters]}
