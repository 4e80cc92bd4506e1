"""`service logs`, `job logs`, `stack logs`, `task logs` and `logs`: what tasks print."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import click

from cli.connection import Connection, call
from cli.following import follow_logs
from cli.lazy import Command
from cli.options import Ref
from cli.settings import settings
from cli.times import parse_time, rfc3339
from cli.unread import until_unread
from swarm.errors import EXIT_INTERRUPTED, Invalid, NotFound
from swarm.v1 import (
    GetRequest,
    Kind,
    LogLine,
    LogOptions,
    LogsRequest,
    LogStream,
)

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue")
SHORT_ID = 12
TIMESTAMP_DIGITS = 9  # as Docker prints them, so that lines stay aligned


def _options(function: Callable[..., int]) -> Callable[..., int]:
    for decorate in (
        click.option("--raw", is_flag=True, help="Lines only, without who printed them."),
        click.option("--no-trunc", is_flag=True, help="Whole task ids."),
        click.option("--no-task-ids", is_flag=True, help="No task ids."),
        click.option("--no-resolve", is_flag=True, help="Ids instead of names."),
        click.option("-t", "--timestamps", is_flag=True, help="When each line was printed."),
        click.option("--details", is_flag=True, help="The ids of node, service and task."),
        click.option("--until", default="", metavar="TIME", help="Only lines before this time."),
        click.option(
            "--since",
            default="",
            metavar="TIME",
            help="Only lines from this time on: 2026-11-21T09:00:00Z, or 10m for that long ago.",
        ),
        click.option(
            "-n",
            "--tail",
            default="all",
            metavar="NUMBER",
            show_default=True,
            help="Last lines of each task.",
        ),
        click.option("-f", "--follow", is_flag=True, help="Go on as new lines come."),
    ):
        function = decorate(function)
    return function


@click.command("logs", cls=Command)
@_options
@click.argument("refs", type=Ref("service"), nargs=-1, required=True, metavar="SERVICE|TASK...")
def service_logs(**flags: Any) -> int:
    """Show what the tasks of services, or single tasks, print.

    Each line tells who printed it: service.slot.task@node. Lines of the task's standard error go to
    standard error.
    """
    return _logs(**flags)


@click.command("logs", cls=Command)
@_options
@click.argument("refs", type=Ref("job"), nargs=-1, required=True, metavar="JOB|TASK...")
def job_logs(**flags: Any) -> int:
    """Show what the tasks of jobs, or single tasks, print.

    Each line tells who printed it: job.number.task@node. Lines of the task's standard error go to
    standard error.
    """
    return _logs(**flags)


@click.command("logs", cls=Command)
@_options
@click.argument("refs", type=Ref("task"), nargs=-1, required=True, metavar="TASK...")
def task_logs(**flags: Any) -> int:
    """Show what tasks print."""
    return _logs(task_only=True, **flags)


@click.command("logs", cls=Command)
@_options
@click.argument("stack", type=Ref("stack"))
def stack_logs(stack: str, **flags: Any) -> int:
    """Show what the tasks of a stack print, in order of time.

    Each line tells who printed it: service.slot.task@node. Lines of the task's standard error go to
    standard error.
    """
    return _logs(refs=(), stack=stack, **flags)


def _logs(
    *,
    refs: tuple[str, ...],
    follow: bool,
    tail: str,
    since: str,
    until: str,
    raw: bool,
    no_trunc: bool,
    no_task_ids: bool,
    no_resolve: bool,
    timestamps: bool,
    details: bool,
    task_only: bool = False,
    stack: str = "",
) -> int:
    now_ns = settings().clock.now_ns()
    options = LogOptions(
        follow=follow,
        tail=_tail(tail),
        since_ns=parse_time(since, now_ns) if since else 0,
        until_ns=parse_time(until, now_ns) if until else 0,
        stdout=True,
        stderr=True,
    )
    printer = Printer(
        colour=settings().terminal().colour,
        raw=raw,
        ids="none" if no_task_ids else "whole" if no_trunc else "short",
        resolve=not no_resolve,
        timestamps=timestamps,
        details=details,
    )

    async def work(connection: Connection) -> int:
        if stack:
            # So that one that does not exist is told as such.
            await connection.control.get(GetRequest(kind=Kind.STACK, ref=stack))
            request = LogsRequest(stack=stack, options=options)
        else:
            request = await _request(connection, refs, options, task_only=task_only)
        failed = False
        answers = follow_logs(connection, request) if follow else connection.control.logs(request)
        with until_unread():
            async for answer in answers:
                for problem in answer.problems:
                    failed = True
                    click.echo(f"Warning: {problem}", err=True)
                printer.show(answer.lines)
        return 1 if failed else 0

    try:
        return call(work)
    except KeyboardInterrupt:
        return 0 if follow else EXIT_INTERRUPTED


async def _request(
    connection: Connection, refs: Sequence[str], options: LogOptions, *, task_only: bool
) -> LogsRequest:
    """Of each a service where there is one of this name, else a task; as Docker looks it up."""
    services: list[str] = []
    tasks: list[str] = []
    kinds = ((Kind.TASK, tasks),) if task_only else ((Kind.SERVICE, services), (Kind.TASK, tasks))
    for ref in refs:
        for kind, found in kinds:
            try:
                await connection.control.get(GetRequest(kind=kind, ref=ref))
            except NotFound:
                continue  # it may be a task
            found.append(ref)
            break
        else:
            what = "task" if task_only else "service or task"
            raise NotFound(f"no such {what}: {ref}")
    return LogsRequest(services=tuple(services), tasks=tuple(tasks), options=options)


def _tail(text: str) -> int:
    if text == "all":
        return -1
    if not text.isdecimal():
        raise Invalid(f"--tail {text!r}: write a number of lines, or all")
    return int(text)


class Printer:
    """Writes lines with their origin, each task in a colour of its own."""

    def __init__(
        self,
        *,
        colour: bool,
        raw: bool,
        ids: str,
        resolve: bool,
        timestamps: bool,
        details: bool,
    ) -> None:
        self._colour = colour
        self._raw = raw
        self._ids = ids
        self._resolve = resolve
        self._timestamps = timestamps
        self._details = details
        self._width = 0

    def show(self, lines: Sequence[LogLine]) -> None:
        """Writes lines, each to the stream it came from; none waits in a buffer afterwards."""
        if not self._raw:
            # Lines stay aligned once the longest name was seen.
            self._width = max((self._width, *(len(self.origin(line)) for line in lines)))
        for error, those in groupby(lines, lambda line: line.stream is LogStream.STDERR):
            out = sys.stderr if error else sys.stdout
            out.flush()
            for line in those:
                out.buffer.write(self._before(line).encode() + line.data + b"\n")
            out.flush()

    def _before(self, line: LogLine) -> str:
        text = f"{rfc3339(line.timestamp_ns, digits=TIMESTAMP_DIGITS)} " if self._timestamps else ""
        if self._details:
            text += (
                f"com.docker.swarm.node.id={line.node_id},"
                f"com.docker.swarm.service={line.service_name},"
                f"com.docker.swarm.task.id={line.task_id} "
            )
        if self._raw:
            return text
        shown = self.origin(line).ljust(self._width)
        if self._colour:
            number = zlib.crc32(line.task_id.encode()) % len(_COLOURS)
            shown = click.style(shown, fg=_COLOURS[number])
        return f"{text}{shown}    | "

    def origin(self, line: LogLine) -> str:
        """ "web.1.xk2…@node1"."""
        name = f"{line.service_name}.{line.slot}" if line.slot else line.service_name
        if not line.service_name:
            name = line.task_id
        elif self._ids != "none":
            name += f".{line.task_id if self._ids == 'whole' else line.task_id[:SHORT_ID]}"
        node = (line.node_name if self._resolve else "") or line.node_id
        return f"{name}@{node}"
