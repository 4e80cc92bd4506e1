"""`swarmctl exec`: a command inside a running task, wherever it runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

import click

from cli import terminal
from cli.connection import Connection, call
from cli.lazy import Command
from cli.options import Ref
from cli.service_values import env_file, env_value
from swarm.errors import EXIT_INTERRUPTED, Invalid, Unavailable
from swarm.v1 import ExecInput, ExecStart, WindowSize


@click.command(cls=Command, context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Hand standard input on.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-e", "--env", multiple=True, metavar="K=V", help="Variable.")
@click.option("--env-file", "env_files", multiple=True, metavar="FILE", help="Variables.")
@click.option("-u", "--user", default="", help="User: name|uid[:group|gid].")
@click.option("-w", "--workdir", default="", help="Working directory.")
@click.option("--privileged", is_flag=True, help="With all privileges.")
@click.argument("task", type=Ref("task", "service"))
@click.argument("words", nargs=-1, required=True, metavar="COMMAND [ARG...]")
def command(
    task: str,
    words: tuple[str, ...],
    env: tuple[str, ...],
    env_files: tuple[str, ...],
    user: str,
    workdir: str,
    *,
    interactive: bool,
    tty: bool,
    privileged: bool,
) -> int:
    """Run a command in a running task.

    TASK is a task's id or name, or a service, which stands for its first running task. Ends with
    the command's exit code.
    """
    if tty and interactive and not sys.stdin.isatty():
        raise Invalid("standard input is not a terminal; leave -t out")
    size = terminal.window_size(sys.stdout.fileno()) if tty and sys.stdout.isatty() else None
    variables = [line for path in env_files for line in env_file(path, os.environ)]
    variables += [env_value(text, os.environ) for text in env]
    start = ExecStart(
        task=task,
        command=words,
        env=tuple(variables),
        user=user,
        dir=workdir,
        tty=tty,
        privileged=privileged,
        size=size,
    )

    async def work(connection: Connection) -> int:
        return await _run(connection, start, interactive=interactive)

    raw = terminal.raw_mode(sys.stdin.fileno()) if tty and interactive else contextlib.nullcontext()
    try:
        with raw:
            return call(work)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


async def _run(connection: Connection, start: ExecStart, *, interactive: bool) -> int:
    sizes: asyncio.Queue[WindowSize] = asyncio.Queue()
    watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if start.size is not None:
        watching = terminal.watch_size(sys.stdout.fileno(), sizes.put_nowait)
    with watching:
        outputs = connection.control.exec(_inputs(start, sizes, interactive=interactive))
        async for output in outputs:
            if output.stdout is not None:
                _write(sys.stdout.buffer, output.stdout)
            if output.stderr is not None:
                _write(sys.stderr.buffer, output.stderr)
            if output.exit_code is not None:
                return output.exit_code
    raise Unavailable("the connection ended before the command did; whether it goes on is unknown")


def _write(stream: object, data: bytes) -> None:
    stream.write(data)  # type: ignore[attr-defined]  # a binary stream
    stream.flush()  # type: ignore[attr-defined]


async def _inputs(
    start: ExecStart, sizes: asyncio.Queue[WindowSize], *, interactive: bool
) -> AsyncIterator[ExecInput]:
    """The start, then what is typed and how the window changes, as it happens."""
    yield ExecInput(start=start)
    queue: asyncio.Queue[ExecInput] = asyncio.Queue(1)

    async def typed() -> None:
        if interactive:
            async for chunk in terminal.read_chunks(sys.stdin.fileno()):
                await queue.put(ExecInput(stdin=chunk))
        await queue.put(ExecInput(stdin_closed=True))

    async def resized() -> None:
        while True:
            await queue.put(ExecInput(resize=await sizes.get()))

    async with asyncio.TaskGroup() as group:
        group.create_task(typed())
        group.create_task(resized())
        while True:
            yield await queue.get()
