"""`swarmctl cp`: files from this machine into a task, and out of it. The rules are docker cp's
(cli/copying/rules.py).

The archive goes through Control.Copy in pieces, as fast as its reader takes it; packing and
unpacking have a thread of their own. What ends before the other side has said that all is done is
only a part, which is said, and the exit code is not 0.
"""

from __future__ import annotations

import asyncio
import io
import stat
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, cast

import click
import msgspec

from cli import terminal
from cli.connection import Connection, call
from cli.copying import rules
from cli.copying.pack import packed, problem, source_place
from cli.copying.rules import Place, Target
from cli.copying.unpack import Unpacked, destination_place, unpack
from cli.lazy import Command
from cli.options import Ref
from cli.usage.rows import human_size
from swarm.errors import EXIT_INTERRUPTED, Invalid, NotFound, SwarmError, Unsupported
from swarm.pipes import Pipe
from swarm.v1 import CopyInput, CopyOutput, CopyStart, FileStat

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PIECES_MAX = 8  # that wait to be unpacked
DRAW_S = 0.2
STREAM = "-"
EXIT_INCOMPLETE = 1


class _Argument(Ref):
    """A path on this machine, or TASK:PATH; completes files, tasks and services."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        files = [CompletionItem(incomplete, type="file")]
        if "/" in incomplete or ":" in incomplete:
            return files
        found = super().shell_complete(ctx, param, incomplete)
        return [CompletionItem(f"{item.value}:") for item in found] + files


@click.command(cls=Command)
@click.option("-a", "--archive", "keep_owner", is_flag=True, help="Keep owners and groups.")
@click.option(
    "-L", "--follow-link", "follow", is_flag=True, help="Copy what SRC leads to, if it is a link."
)
@click.option("-q", "--quiet", is_flag=True, help="Show neither progress nor the result.")
@click.argument("source", type=_Argument("service", "task"), metavar="SRC")
@click.argument("destination", type=_Argument("service", "task"), metavar="DEST")
def command(source: str, destination: str, *, keep_owner: bool, follow: bool, quiet: bool) -> int:
    """Copy files into a task, or out of it.

    One of SRC and DEST is TASK:PATH, the other a path here, or - for a tar archive on standard
    input or output. A service stands for its first running task. `folder/.` is what the folder
    contains; a file here whose name has a colon is written ./name.
    """
    told = Told(quiet=quiet)

    async def work(connection: Connection) -> int:
        return await copy(
            connection, source, destination, told, keep_owner=keep_owner, follow=follow
        )

    try:
        return call(work)
    except KeyboardInterrupt:
        told.incomplete()
        return EXIT_INTERRUPTED
    except (SwarmError, ExceptionGroup):
        told.incomplete()
        raise


async def copy(
    connection: Connection,
    source: str,
    destination: str,
    told: Told,
    *,
    keep_owner: bool = False,
    follow: bool = False,
) -> int:
    """Copies; the exit code. Raises operating errors, after which `told` knows how far it came."""
    (source_task, source_path), (task, path) = rules.split(source), rules.split(destination)
    if source_task and task:
        raise Unsupported("copying between tasks is not supported; copy to here first")
    if not source_task and not task:
        raise Invalid("name a task on one of the two sides, as TASK:PATH")
    if not source_path or not path:
        raise Invalid("give a path on both sides")
    if source_task:
        start = CopyStart(task=source_task, path=source_path)
        return await _out(connection, start, path, told, follow=follow)
    start = CopyStart(task=task, path=path, into=True, keep_kind=True, keep_owner=keep_owner)
    return await _into(connection, source_path, start, told, follow=follow)


@dataclass(slots=True)
class Told:
    """What the user is told of a copy: how much so far, and how it ended."""

    quiet: bool
    # Where to; empty: nothing was begun.
    where: str = ""
    count: int = 0
    _drawn_s: float = 0.0
    _line: bool = False

    def moved(self, count: int) -> None:
        """So many bytes more."""
        self.count += count
        now_s = asyncio.get_running_loop().time()
        if self.quiet or not sys.stderr.isatty() or now_s - self._drawn_s < DRAW_S:
            return
        self._drawn_s, self._line = now_s, True
        self._print(f"\rCopying to {self.where} - {human_size(self.count)}\x1b[K", end="")

    def done(self) -> None:
        """All of it."""
        self._clear()
        if not self.quiet:
            self._print(f"Successfully copied {human_size(self.count)} to {self.where}")

    def incomplete(self) -> None:
        """It broke off. Said with -q as well."""
        self._clear()
        if self.count:
            self._print(f"Warning: the copy is not complete: a part of it may be in {self.where}")

    def left_out(self, sentences: list[str]) -> None:
        """What was not made."""
        self._clear()
        for sentence in sentences:
            self._print(f"Warning: {sentence}")

    def _clear(self) -> None:
        if self._line:
            self._print("\r\x1b[K", end="")
            self._line = False

    def _print(self, text: str, end: str = "\n") -> None:
        click.echo(text + end, err=True, nl=False)


# ------------------------------------------------------------------ out of a task


async def _out(
    connection: Connection, start: CopyStart, destination: str, told: Told, *, follow: bool
) -> int:
    place = None
    if destination != STREAM:
        place = destination_place(destination)
    elif sys.stdout.isatty():
        raise Invalid("an archive is not for reading; send standard output to a file or a program")
    name = ""
    if follow:
        start, name = await _followed(connection, start)
    async with aclosing(_copy(connection, _only(start))) as outputs:
        found = await _first(outputs, start)
        if place is None:
            told.where = "standard output"
            async for data in _pieces(outputs, told):
                await asyncio.to_thread(_write, data)
            return 0
        source = Place(start.path, is_dir=stat.S_ISDIR(found.mode), rebase_name=name)
        into = rules.target(source, place)
        if name:
            # As the archive calls it, and as it is to be called.
            archived = rules.split_entry(start.path)[1]
            into = Target(into.folder, archived, into.new or name)
        told.where = place.path
        done = Unpacked()
        await _unpack(outputs, into, done, told)
    if done.left_out:
        told.left_out(done.left_out)
        told.incomplete()
        return EXIT_INCOMPLETE
    told.done()
    return 0


async def _followed(connection: Connection, start: CopyStart) -> tuple[CopyStart, str]:
    """What the path leads to if it is a link, and what the archive is to call it."""
    found = await _stat(connection, start)
    if found is None or not stat.S_ISLNK(found.mode):
        return start, ""
    path, name = rules.rebase(start.path, _led(start.path, found.link_target))
    return msgspec.structs.replace(start, path=path), name


def _led(path: str, link: str) -> str:
    return link if link.startswith("/") else rules.join(rules.split_entry(path)[0], link)


async def _first(outputs: AsyncIterator[CopyOutput], start: CopyStart) -> FileStat:
    first = await anext(outputs, None)
    if first is None or first.stat is None or not first.stat.mode:
        raise NotFound(f"{start.task}: {start.path}: no such file or folder")
    return first.stat


async def _pieces(outputs: AsyncIterator[CopyOutput], told: Told) -> AsyncIterator[bytes]:
    """The archive, until it is whole."""
    async for output in outputs:
        if output.data:
            told.moved(len(output.data))
            yield output.data
        if output.done:
            return
    raise Invalid("the archive broke off before its end")


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def _unpack(
    outputs: AsyncIterator[CopyOutput], into: Target, done: Unpacked, told: Told
) -> None:
    pipe: Pipe[bytes] = Pipe(PIECES_MAX)
    reader = cast("IO[bytes]", io.BufferedReader(_Reader(pipe, asyncio.get_running_loop())))

    async def work() -> None:
        try:
            await asyncio.to_thread(unpack, reader, into, done)
        finally:
            await pipe.close(drop=True)

    working = asyncio.create_task(work(), name="unpack")
    try:
        async for data in _pieces(outputs, told):
            # Once it takes no more it has seen the archive's end, or could not go on.
            if not await pipe.put(data) and working.done():
                working.result()
        await pipe.close()
        await working
    finally:
        # The thread ends as soon as it wants more.
        await pipe.close(drop=True)
        await asyncio.gather(working, return_exceptions=True)


class _Reader(io.RawIOBase):
    """What a pipe holds, read by another thread."""

    def __init__(self, pipe: Pipe[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self._pipe = pipe
        self._loop = loop
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        if not self._left:
            taking = asyncio.run_coroutine_threadsafe(self._pipe.take(1), self._loop)
            self._left = b"".join(taking.result())
        room = memoryview(buffer)  # type: ignore[arg-type]  # a buffer, which Python 3.11 has no name for
        count = min(len(room), len(self._left))
        room[:count], self._left = self._left[:count], self._left[count:]
        return count


# ------------------------------------------------------------------ into a task


async def _into(
    connection: Connection, source: str, start: CopyStart, told: Told, *, follow: bool
) -> int:
    local = None
    if source != STREAM:
        local = source_place(source, follow=follow)
    elif sys.stdin.isatty():
        raise Invalid("standard input is a terminal; hand an archive to it")
    place = await _place(connection, start)
    told.where = f"{start.task}:{place.path}"
    if local is None:
        if not place.is_dir:
            raise Invalid(f"{start.task}:{start.path} must be a folder to unpack an archive in")
        into, archive = Target(place.path), terminal.read_chunks(sys.stdin.fileno())
    else:
        into = rules.target(local, place)
        archive = _packed(local, into)
    sending = _Sending(msgspec.structs.replace(start, path=into.folder), archive, told)
    try:
        async with aclosing(_copy(connection, sending.inputs())) as outputs:
            async for output in outputs:
                if output.done:
                    told.done()
                    return 0
                if output.stop:
                    sending.stop()
    except SwarmError:
        if sending.failure is not None:  # the other end only knows that it broke off
            raise sending.failure from None
        raise
    raise Invalid("the copy ended before all was there")


async def _place(connection: Connection, start: CopyStart) -> Place:
    """Where a copy goes inside the task; of a link, where it leads."""
    found, path = await _stat(connection, start), start.path
    if found is not None and stat.S_ISLNK(found.mode):
        path = _led(path, found.link_target)
        found = await _stat(connection, msgspec.structs.replace(start, path=path))
    if found is None:
        return Place(path, exists=False)
    if not (stat.S_ISDIR(found.mode) or stat.S_ISREG(found.mode)):
        raise Invalid(f"{start.task}:{start.path} is neither a folder nor a file")
    return Place(path, is_dir=stat.S_ISDIR(found.mode))


class _Sending:
    """What is sent, and why it broke off, if it did here."""

    def __init__(self, start: CopyStart, archive: AsyncIterator[bytes], told: Told) -> None:
        self._start = start
        self._archive = archive
        self._told = told
        self.failure: SwarmError | None = None
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """The other side takes no more, and tells why once nothing comes."""
        self._stopped.set()

    async def inputs(self) -> AsyncIterator[CopyInput]:
        """Without the last message the archive is not whole."""
        yield CopyInput(start=self._start)
        try:
            async for data in self._archive:
                if self._stopped.is_set():
                    return
                yield CopyInput(data=data)
                self._told.moved(len(data))
        except SwarmError as error:
            self.failure = error
            return
        except OSError as error:
            self.failure = problem(error, "")
            return
        yield CopyInput(end=True)


async def _packed(local: Place, into: Target) -> AsyncIterator[bytes]:
    pieces = packed(local, (into.old, into.new))
    while piece := await asyncio.to_thread(_joined, pieces):
        yield piece


def _joined(pieces: object) -> bytes:
    """The next pieces, so many that they are worth a message."""
    taken, size = [], 0
    for piece in pieces:  # type: ignore[attr-defined]  # an iterator
        taken.append(piece)
        size += len(piece)
        if size >= terminal.CHUNK_BYTES:
            break
    return b"".join(taken)


# ------------------------------------------------------------------ calls


async def _stat(connection: Connection, start: CopyStart) -> FileStat | None:
    """What is at the path; None: nothing."""
    look = CopyStart(task=start.task, path=start.path, stat_only=True)
    async with aclosing(_copy(connection, _only(look))) as outputs:
        async for output in outputs:
            if output.stat is not None:
                return output.stat if output.stat.mode else None
    return None


async def _only(start: CopyStart) -> AsyncIterator[CopyInput]:
    yield CopyInput(start=start)


def _copy(
    connection: Connection, inputs: AsyncIterator[CopyInput]
) -> AsyncGenerator[CopyOutput, None]:
    # Streams of a channel are generators, whose closing cancels the call.
    return cast("AsyncGenerator[CopyOutput, None]", connection.control.copy(inputs))
