"""One `exec`: a command beside a running task, with streams or a terminal, until it ends.

The command is a child of a helper of ours that enters the task's namespaces; it dies with the
helper, and the helper with the agent, unless the command is left (leaving.py). Output waits in a
bounded queue: a client that does not read makes the command wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import signal
import socket
import struct
import termios
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from agent.runtime.base import Rejected
from agent.runtime.process import fields as process_fields
from agent.runtime.process import leaving as process_leaving
from agent.runtime.process import plan as process_plan
from agent.runtime.process import spawn as process_spawn
from agent.runtime.process.fields import Powers
from swarm.v1 import ContainerSpec, ExecInput, ExecOutput, ExecStart, WindowSize

CHUNK_BYTES = 32_768
CHUNKS_MAX = 16  # waiting for the client
# Output that a killed or finished command leaves in a pipe that something else still holds is not
# waited for longer than this.
DRAIN_S = 2.0


def ordered(plan: dict[str, Any], start: ExecStart, powers: Powers) -> dict[str, Any]:
    """A plan for a command beside the task, as the caller wants it. Raises Rejected."""
    if not start.command:
        raise Rejected("exec: no command given")
    plan["argv"] = list(start.command)
    plan["cwd"] = start.dir or plan["cwd"]
    plan["tty"] = start.tty
    if start.tty:
        plan["env"].setdefault("TERM", "xterm")
    for line in start.env:
        key, _, value = line.partition("=")
        plan["env"][key] = value
    if (start.user or start.privileged) and not powers.root:
        raise Rejected(f"exec: user and privileged need root, and {powers.lack}")
    if start.user:
        who = process_plan.identity(ContainerSpec(user=start.user))
        plan |= {"uid": who.uid, "gid": who.gid, "groups": list(who.groups)}
    if start.privileged:
        plan["capabilities"] = process_fields.capability_mask(ContainerSpec(privileged=True))
    return plan


async def run(
    plan: dict[str, Any],
    size: WindowSize | None,
    stdin: AsyncIterator[ExecInput],
    left: asyncio.Event | None,
) -> AsyncGenerator[ExecOutput]:
    """See Runtime.exec."""
    session = _Terminal(plan, size) if plan["tty"] else _Streams(plan)
    feeding: asyncio.Task[None] | None = None
    try:
        await session.start()
        yield ExecOutput(started=True)
        feeding = asyncio.create_task(session.feed(stdin))
        async for output in session.outputs():
            yield output
        yield ExecOutput(exit_code=await session.process.wait())
    finally:
        if feeding is not None:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
        # Before it has begun there is nothing to be left.
        await session.close(leave=feeding is not None and left is not None and left.is_set())


class _Session:
    """The helper process; subclasses say what its streams are."""

    process: asyncio.subprocess.Process

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._queue: asyncio.Queue[ExecOutput | None] = asyncio.Queue(CHUNKS_MAX)

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        with ours, theirs:
            ours.setblocking(False)
            await self._spawn(theirs.fileno())
            theirs.close()
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(ours, process_spawn.packed(self._plan))
            problem = await loop.sock_recv(ours, 4096)
        if problem:
            await self.process.wait()
            raise Rejected(
                f"exec {self._plan['argv'][0]}: {problem.decode(errors='replace').lower()}"
            )

    async def _spawn(self, plan_fd: int) -> None:
        raise NotImplementedError

    async def feed(self, stdin: AsyncIterator[ExecInput]) -> None:
        raise NotImplementedError

    async def outputs(self) -> AsyncIterator[ExecOutput]:
        raise NotImplementedError
        yield

    async def close(self, *, leave: bool) -> None:
        process = getattr(self, "process", None)
        if process is not None:
            number = process_leaving.LEAVE if leave else signal.SIGTERM
            await process_spawn.end(process, number)


class _Streams(_Session):
    """Three streams. Those out are pipes of our own, since the helper must have their ends too, and
    not every event loop makes pipes where pipes are asked for.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        self._transports: list[asyncio.ReadTransport] = []
        self._outputs: list[asyncio.StreamReader] = []

    async def _spawn(self, plan_fd: int) -> None:
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
        with contextlib.ExitStack() as ours:
            reads = [ours.enter_context(open(pipe[0], "rb", buffering=0)) for pipe in pipes]
            self._plan["drains"] = [pipe[0] for pipe in pipes]
            try:
                self.process = await asyncio.create_subprocess_exec(
                    *process_spawn.command("exec", str(plan_fd)),
                    pass_fds=[plan_fd, *self._plan["drains"]],
                    stdin=asyncio.subprocess.PIPE,
                    stdout=pipes[0][1],
                    stderr=pipes[1][1],
                )
            finally:
                for _, write_end in pipes:
                    os.close(write_end)
            loop = asyncio.get_running_loop()
            for file in reads:
                reader = asyncio.StreamReader(limit=CHUNK_BYTES)
                make = functools.partial(asyncio.StreamReaderProtocol, reader)
                transport, _ = await loop.connect_read_pipe(make, file)
                self._transports.append(transport)
                self._outputs.append(reader)
            ours.pop_all()  # they are the transports' now

    async def close(self, *, leave: bool) -> None:
        await super().close(leave=leave)
        for transport in self._transports:
            transport.close()

    async def feed(self, stdin: AsyncIterator[ExecInput]) -> None:
        writer = self.process.stdin
        assert writer is not None
        try:
            async for given in stdin:
                if given.stdin:
                    writer.write(given.stdin)
                    await writer.drain()
                if given.stdin_closed:
                    break
        except ConnectionError:
            return  # the command does not read; its exit is reported as usual
        finally:
            writer.close()

    async def outputs(self) -> AsyncIterator[ExecOutput]:
        readers = [
            asyncio.create_task(self._read(stream, error=number == 1))
            for number, stream in enumerate(self._outputs)
        ]
        waiter = asyncio.create_task(self._end(readers))
        try:
            while (output := await self._queue.get()) is not None:
                yield output
        finally:
            for task in (waiter, *readers):
                task.cancel()
            await asyncio.gather(waiter, *readers, return_exceptions=True)

    async def _end(self, readers: list[asyncio.Task[None]]) -> None:
        await self.process.wait()
        # Something the command left behind may hold the pipes for ever. While the queue is full the
        # client is the one who is slow, and the clock does not run.
        while any(not r.done() for r in readers):
            done, _ = await asyncio.wait(readers, timeout=DRAIN_S)
            if not done and not self._queue.full():
                break
            if len(done) == len(readers):
                break
        await self._queue.put(None)

    async def _read(self, stream: asyncio.StreamReader, *, error: bool) -> None:
        while data := await stream.read(CHUNK_BYTES):
            await self._queue.put(ExecOutput(stderr=data) if error else ExecOutput(stdout=data))


class _Terminal(_Session):
    """A pseudo-terminal; everything comes as stdout."""

    def __init__(self, plan: dict[str, Any], size: WindowSize | None) -> None:
        super().__init__(plan)
        self._size = size
        self._master = -1

    async def _spawn(self, plan_fd: int) -> None:
        self._master, slave = os.openpty()
        self._plan["drains"] = [self._master]
        os.set_blocking(self._master, False)
        try:
            if self._size is not None:
                self._resize(self._size)
            self.process = await asyncio.create_subprocess_exec(
                *process_spawn.command("exec", str(plan_fd)),
                pass_fds=[plan_fd, self._master],
                stdin=slave,
                stdout=slave,
                stderr=slave,
            )
        finally:
            os.close(slave)

    def _resize(self, size: WindowSize) -> None:
        data = struct.pack("HHHH", size.rows, size.columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, data)

    async def feed(self, stdin: AsyncIterator[ExecInput]) -> None:
        async for given in stdin:
            if given.resize is not None:
                self._resize(given.resize)
            if given.stdin:
                await self._write(given.stdin)
            if given.stdin_closed:
                await self._write(b"\x04")  # what a person types for the end of input

    async def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._master, view) :]
            except BlockingIOError:
                await _ready(self._master, write=True)
            except OSError:
                return  # nobody reads any more

    async def outputs(self) -> AsyncIterator[ExecOutput]:
        while True:
            try:
                data = os.read(self._master, CHUNK_BYTES)
            except BlockingIOError:
                await _ready(self._master, write=False)
                continue
            except OSError:  # EIO: the last process has closed its side
                return
            if not data:
                return
            yield ExecOutput(stdout=data)

    async def close(self, *, leave: bool) -> None:
        await super().close(leave=leave)
        if self._master >= 0:
            os.close(self._master)
            self._master = -1


async def _ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    (loop.add_writer if write else loop.add_reader)(fd, event.set)
    try:
        await event.wait()
    finally:
        (loop.remove_writer if write else loop.remove_reader)(fd)
