"""`swarmctl task`: single tasks, and why they are where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import click
import msgspec

from cli.commands.logs import task_logs
from cli.connection import Connection, call
from cli.format import print_inspected
from cli.lazy import Group
from cli.objects import inspect_all, names_of
from cli.options import (
    Ref,
    TaskList,
    format_option,
    task_list_options,
)
from cli.reasons import explain_lines
from cli.services import STACK_LABEL
from cli.settings import settings
from cli.tasks import list_tasks
from swarm.v1 import ExplainTaskRequest, ExplainTaskResponse, GetResponse, Kind


@click.group(cls=Group)
def group() -> None:
    """Look into tasks: the containers and processes that services are made of."""


group.add_command(task_logs, "logs")


@group.command("ls")
@task_list_options("id", "name", "label", "service", "node", "desired-state", "stack")
def ls(*, wanted: TaskList) -> None:
    """List all tasks."""
    asked = tuple(
        ("label", f"{STACK_LABEL}={value}") if key == "stack" else (key, value)
        for key, value in wanted.filters
    )

    async def work(connection: Connection) -> None:
        await list_tasks(connection, settings(), replace(wanted, filters=asked))

    call(work)


@group.command()
@click.argument("tasks", nargs=-1, required=True, type=Ref("task"), metavar="TASK...")
@format_option
@click.option("--pretty", is_flag=True, help="Print for people.")
def inspect(tasks: tuple[str, ...], form: str, *, pretty: bool) -> None:
    """Show tasks with the spec they run."""
    inspect_all(Kind.TASK, tasks, form=form, prepare=_describing if pretty else None)


async def _describing(
    connection: Connection, answers: Sequence[GetResponse]
) -> Callable[[GetResponse], str]:
    from cli.pretty_task import describe_task

    del answers
    nodes = await names_of(connection, Kind.NODE)
    return partial(describe_task, nodes=nodes, now_ns=settings().clock.now_ns())


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
