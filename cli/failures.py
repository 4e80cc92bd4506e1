"""The last words of a task that failed: what a person looks at next after "it did not converge".

They are a help and no more: reading them takes at most `LOGS_S`, and when they cannot be read that
is said in one line, and nothing else changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import click

from cli.connection import Connection
from cli.objects import name_of
from swarm.errors import NotFound, SwarmError
from swarm.v1 import (
    GetRequest,
    GetResponse,
    Kind,
    LogLine,
    LogOptions,
    LogsRequest,
    Task,
)

__all__ = ["print_last_lines", "printable"]

LINES = 10
LOGS_S = 5.0  # for one task; its node may be the thing that is broken


async def print_last_lines(
    connection: Connection, task_id: str, *, told: Sequence[str], indent: str
) -> None:
    """Prints a task's last lines to stderr, under who printed them, or that there are none. Of a
    task that never had a container its error is all there is; not again where it was `told`.
    """
    task = Task(id=task_id)
    who = f"task {task_id[:12]}"
    lines: list[LogLine] = []
    problems: list[str] = []
    try:
        async with asyncio.timeout(LOGS_S):
            found = await connection.control.get(GetRequest(kind=Kind.TASK, ref=task_id))
            task = (found.object and found.object.task) or task
            who = _who(found, task, await _node_of(connection, task))
            if task.status is None or task.status.container is None:
                error = printable(task.status.err.encode()) if task.status else ""
                if error and not any(error in line for line in told):
                    click.echo(f"{indent}{who}: {error}", err=True)
                return
            options = LogOptions(tail=LINES, stdout=True, stderr=True)
            request = LogsRequest(tasks=(task.id,), options=options)
            async for answer in connection.control.logs(request):
                lines += answer.lines
                problems += answer.problems
    except NotFound:
        return  # forgotten by the cluster: there is nothing to show
    except TimeoutError:
        problems.append(f"its node has not sent them within {LOGS_S:g} s")
    except SwarmError as error:
        problems.append(error.message)
    if lines:
        click.echo(f"{indent}last lines of {who}:", err=True)
        for line in sorted(lines, key=lambda line: line.timestamp_ns)[-LINES:]:
            click.echo(f"{indent}| {printable(line.data)}", err=True)
    elif problems:
        click.echo(f"{indent}the log of {who} cannot be read: {problems[0]}", err=True)
    else:
        click.echo(f"{indent}{who} printed nothing", err=True)


async def _node_of(connection: Connection, task: Task) -> str:
    """The name of the task's node; its id where the node is no longer known."""
    try:
        found = await connection.control.get(GetRequest(kind=Kind.NODE, ref=task.node_id))
    except NotFound:
        return task.node_id
    return name_of(found.object.node) if found.object and found.object.node else task.node_id


def _who(found: GetResponse, task: Task, node: str) -> str:
    """ "app_web.1 (k2x… on n2, exit code 3)"."""
    spec = found.revision.spec if found.revision else None
    service = spec.name if spec else ""
    name = f"{service}.{task.slot}" if service and task.slot else service
    container = task.status.container if task.status else None
    code = container.exit_code if container else None
    ended = f", exit code {code}" if code is not None else ""
    return f"{name or 'task'} ({task.id[:12]} on {node}{ended})"


def printable(data: bytes) -> str:
    """A line without what a terminal would obey."""
    text = data.decode(errors="replace").rstrip("\r")
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
