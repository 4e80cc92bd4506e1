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
from cli.detaching import DEFAULT, DetachKeys
from cli.lazy import Command
from cli.options import Ref
from cli.service_values import env_file, env_value
from swarm.errors import EXIT_INTERRUPTED, Invalid, Unavailable
from swarm.v1 import ExecInput, ExecStart, WindowSize


@click.command(cls=Command, context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Hand standard input on.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-d", "--detach", is_flag=True, help="Begin the command and leave it running.")
@click.option(
    "--detach-keys",
    default=DEFAULT,
    metavar="KEYS",
    show_default=True,
    help="What is typed to leave the command running; with -it.",
)
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
    detach_keys: str,
    *,
    detach: bool,
    interactive: bool,
    tty: bool,
    privileged: bool,
) -> int:
    """Run a command in a running task.

    TASK is a task's id or name, or a service, which stands for its first running task. Ends with
    the command's exit code.
    """
    keys = DetachKeys(detach_keys if tty and interactive else "")
    if detach:
        interactive = False
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
        session = Session(keys, detach=detach)
        return await session.run(connection, start, interactive=interactive)

    raw = terminal.raw_mode(sys.stdin.fileno()) if tty and interactive else contextlib.nullcontext()
    try:
        with raw:
            return call(work)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


class Session:
    """One command, as seen from here."""

    def __init__(self, keys: DetachKeys, *, detach: bool) -> None:
        self._keys = keys
        self._detach = detach
        self._left = False
        self._begun = asyncio.Event()
        # One input waits at most: what is typed is read no faster than it is sent.
        self._inputs: asyncio.Queue[ExecInput] = asyncio.Queue(1)
        self._sizes: asyncio.Queue[WindowSize] = asyncio.Queue()

    async def run(self, connection: Connection, start: ExecStart, *, interactive: bool) -> int:
        """Until it ends or is left; its exit code."""
        watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if start.size is not None:
            watching = terminal.watch_size(sys.stdout.fileno(), self._sizes.put_nowait)
        sources = [
            asyncio.create_task(self._typed(interactive=interactive)),
            asyncio.create_task(self._resized()),
        ]
        try:
            with watching:
                return await self._outputs(connection, start)
        finally:
            for source in sources:
                source.cancel()
            await asyncio.gather(*sources, return_exceptions=True)

    async def _outputs(self, connection: Connection, start: ExecStart) -> int:
        """Writes what the command prints."""
        async for output in connection.control.exec(self._each(start)):
            self._begun.set()
            if output.stdout is not None and not self._detach:
                _write(sys.stdout.buffer, output.stdout)
            if output.stderr is not None and not self._detach:
                _write(sys.stderr.buffer, output.stderr)
            if output.exit_code is not None:
                return 0 if self._detach else output.exit_code
        if self._left:
            if not self._detach:
                click.echo("\r\nleft; the command runs on\r", err=True)
            return 0
        raise Unavailable(
            "the connection ended before the command did; whether it goes on is unknown"
        )

    async def _each(self, start: ExecStart) -> AsyncIterator[ExecInput]:
        """Input follows once the command has begun: where a call is refused, gRPC would report the
        message that could not be sent any more in place of the reason.
        """
        yield ExecInput(start=start)
        await self._begun.wait()
        while not self._left:
            item = await self._inputs.get()
            self._left = bool(item.detach)
            yield item

    async def _typed(self, *, interactive: bool) -> None:
        if self._detach:
            await self._inputs.put(ExecInput(detach=True))
            return
        if interactive:
            async for chunk in terminal.read_chunks(sys.stdin.fileno()):
                data, left = self._keys.feed(chunk)
                if data:
                    await self._inputs.put(ExecInput(stdin=data))
                if left:
                    await self._inputs.put(ExecInput(detach=True))
                    return
        await self._inputs.put(ExecInput(stdin_closed=True))

    async def _resized(self) -> None:
        while True:
            await self._inputs.put(ExecInput(resize=await self._sizes.get()))


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()
