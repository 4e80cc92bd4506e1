"""`swarmctl task`: single tasks, and why they are where they are."""

from __future__ import annotations

import textwrap

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
from cli.settings import settings
from cli.table import layout
from cli.tasks import fetch_tasks, print_tasks
from swarm.quantities import format_bytes, format_cpus
from swarm.v1 import ExplainTaskRequest, ExplainTaskResponse, FilterResult, Kind


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


def explain_lines(answer: ExplainTaskResponse, *, width: int | None) -> list[str]:
    """The account for people."""
    lines = _wrap(answer.summary, width)
    if answer.filters:
        table = [["FILTER", "NODES OUT", "NEEDED", "BEST FREE", "REASON"]]
        table += [_filter_row(result) for result in answer.filters]
        lines += ["", *layout(table, width=width, sentences=4)]
    if answer.nodes_total:
        lines += ["", f"{answer.nodes_fit} of {answer.nodes_total} nodes fit now."]
    if answer.never and "even if" not in answer.summary:
        lines.append("No node could take it, even if it were empty.")
    if answer.hint:
        lines += ["", *_wrap(answer.hint, width)]
    return lines


def _wrap(text: str, width: int | None) -> list[str]:
    return textwrap.wrap(text, width) if width else [text]


def _filter_row(result: FilterResult) -> list[str]:
    name = f"{result.filter} ({result.detail})" if result.detail else result.filter
    amounts = ["", ""]
    if result.needed or result.best:
        amounts = [_amount(result.detail, result.needed), _amount(result.detail, result.best)]
        if result.best_node:
            amounts[1] += f" on {result.best_node}"
    return [name, str(result.nodes), *amounts, result.message]


def _amount(dimension: str, value: int) -> str:
    if dimension == "cpu":
        return format_cpus(value)
    return format_bytes(value) if dimension == "memory" else str(value)
