"""`swarmctl exec`: a command inside a running task, wherever it runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import BinaryIO

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
@click.option(
    "--env-file", "env_files", multiple=True, type=click.Path(), metavar="FILE", help="Variables."
)
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
    # One input waits at most: what is typed is read no faster than it is sent.
    inputs: asyncio.Queue[ExecInput] = asyncio.Queue(1)
    sizes: asyncio.Queue[WindowSize] = asyncio.Queue()
    watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if start.size is not None:
        watching = terminal.watch_size(sys.stdout.fileno(), sizes.put_nowait)
    begun = asyncio.Event()
    sources = [
        asyncio.create_task(_typed(inputs, interactive=interactive)),
        asyncio.create_task(_resized(inputs, sizes)),
    ]
    try:
        with watching:
            return await _outputs(connection, _each(start, inputs, begun), begun)
    finally:
        for source in sources:
            source.cancel()
        await asyncio.gather(*sources, return_exceptions=True)


async def _outputs(
    connection: Connection, inputs: AsyncIterator[ExecInput], begun: asyncio.Event
) -> int:
    """Writes what the command prints; its exit code."""
    async for output in connection.control.exec(inputs):
        begun.set()
        if output.stdout is not None:
            _write(sys.stdout.buffer, output.stdout)
        if output.stderr is not None:
            _write(sys.stderr.buffer, output.stderr)
        if output.exit_code is not None:
            return output.exit_code
    raise Unavailable("the connection ended before the command did; whether it goes on is unknown")


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()


async def _each(
    start: ExecStart, inputs: asyncio.Queue[ExecInput], begun: asyncio.Event
) -> AsyncIterator[ExecInput]:
    """Input follows once the command has begun: where a call is refused, gRPC would report the
    message that could not be sent any more in place of the reason.
    """
    yield ExecInput(start=start)
    await begun.wait()
    while True:
        yield await inputs.get()


async def _typed(inputs: asyncio.Queue[ExecInput], *, interactive: bool) -> None:
    if interactive:
        async for chunk in terminal.read_chunks(sys.stdin.fileno()):
            await inputs.put(ExecInput(stdin=chunk))
    await inputs.put(ExecInput(stdin_closed=True))


async def _resized(inputs: asyncio.Queue[ExecInput], sizes: asyncio.Queue[WindowSize]) -> None:
    while True:
        await inputs.put(ExecInput(resize=await sizes.get()))
