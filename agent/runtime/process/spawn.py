"""Starts supervisors and exec helpers: our own Python in isolated mode, without site-packages.

The package `agent` is replaced by an empty one whose path is this source tree, so that only the two
supervisor modules are loaded, whatever the real package's `__init__` imports.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import marshal
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.runtime.base import (
    ENGINE_FAILED,
    PROGRAM_MISSING,
    UNSUPPORTED,
    Failed,
    Rejected,
    cause_of,
)

START_TIMEOUT_S = 30.0
CHUNK_BYTES = 4096
# What the spec is to blame for; anything else may work another time.
_SPEC_ERRNOS = frozenset({1, 2, 8, 13, 20, 22, 36, 40})

_HERE = Path(__file__).resolve().parent
_BOOT = (
    "import sys;M=type(sys)\n"
    f"for n,p in (('agent',{str(_HERE.parents[1])!r}),('agent.runtime',{str(_HERE.parent)!r}),"
    f"('agent.runtime.process',{str(_HERE)!r})):\n"
    " m=M(n);m.__path__=[p];sys.modules[n]=m\n"
    "from agent.runtime.process.supervisor import main;main()"
)


def command(*arguments: str) -> list[str]:
    """The supervisor's command line."""
    return [sys.executable, "-I", "-S", "-c", _BOOT, *arguments]


def packed(plan: dict[str, Any]) -> bytes:
    """A plan as the supervisor reads it."""
    data = marshal.dumps(plan)
    return len(data).to_bytes(8, "big") + data


class Supervisor:
    """The conversation with a supervisor until its task runs."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        self._buffer = b""
        self._program = ""
        words = command("run", folder.name)
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        try:
            self.pid = os.posix_spawn(
                words[0],
                words,
                {"PATH": os.defpath},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, str(folder / "supervisor.log"), flags, 0o600),
                ],
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pidfd = os.pidfd_open(self.pid)

    async def give(self, plan: dict[str, Any]) -> int:
        """Hands the plan over; the pid of the task's first process once its namespaces exist.
        Raises Rejected, Failed.
        """
        self._program = str(plan["argv"][0])
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, packed(plan))
        except ConnectionError:
            raise Failed(
                "the task's supervisor ended; see supervisor.log", cause=ENGINE_FAILED
            ) from None
        return int(await self._answer("pid"))

    async def go(self) -> None:
        """Lets the task run; returns once its command is executed. Raises Rejected, Failed."""
        with contextlib.suppress(ConnectionError):  # the answer tells why
            await asyncio.get_running_loop().sock_sendall(self._socket, b"go\n")
        await self._answer("started")

    async def _answer(self, wanted: str) -> str:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while b"\n" not in self._buffer:
                    with contextlib.suppress(ConnectionError):
                        if data := await loop.sock_recv(self._socket, 4096):
                            self._buffer += data
                            continue
                    raise Failed(
                        "the task's supervisor ended unexpectedly; see supervisor.log",
                        cause=ENGINE_FAILED,
                    )
        except TimeoutError:
            raise Failed(
                f"the task did not start within {START_TIMEOUT_S:g} s", cause=ENGINE_FAILED
            ) from None
        line, _, self._buffer = self._buffer.partition(b"\n")
        word, _, rest = line.decode(errors="replace").partition(" ")
        if word == wanted:
            return rest
        number, _, text = rest.partition(" ")
        if int(number) not in _SPEC_ERRNOS:
            raise Failed(text, cause=cause_of(OSError(int(number), text)))
        missing = int(number) == errno.ENOENT and text.endswith(
            (f": {self._program}", f"/{self._program}")
        )
        raise Rejected(text, cause=PROGRAM_MISSING if missing else UNSUPPORTED)

    def close(self) -> None:
        """Ends the conversation; the supervisor goes on if its task runs."""
        self._socket.close()

    async def abandon(self) -> None:
        """Ends the supervisor and with it what it had begun."""
        self.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        await ended(self.pidfd)
        reap(self.pid)
        os.close(self.pidfd)


async def ended(pidfd: int) -> None:
    """Waits until the process has ended."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(pidfd, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(pidfd)


def reap(pid: int) -> None:
    """Takes the exit status of a child; nothing happens for a process of a former agent."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


async def probe() -> str:
    """Empty: namespaces and mounts can be made; else why not."""
    process = await asyncio.create_subprocess_exec(
        *command("probe"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    words = (out or err).decode(errors="replace").strip().splitlines()
    answer = words[-1] if words else "the probe ended without an answer"
    return "" if answer == "ok" else answer


async def output_of(
    plan: dict[str, Any],
    words: Sequence[str],
    *,
    timeout_s: float,
    bytes_max: int,
    drain_s: float,
) -> tuple[int | None, bytes]:
    """Runs a command beside a task without input; exit code and the end of its output. None: it
    took too long and was killed. What it leaves behind may hold its output open; that is waited for
    no longer than `drain_s`.
    """
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    with ours, theirs, _Output(bytes_max) as output:
        ours.setblocking(False)
        process = await asyncio.create_subprocess_exec(
            *command("exec", str(theirs.fileno())),
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output.write_end,
            stderr=output.write_end,
        )
        theirs.close()
        output.follow()
        try:
            async with asyncio.timeout(timeout_s):
                with contextlib.suppress(ConnectionError):
                    await loop.sock_sendall(ours, packed({**plan, "argv": list(words)}))
                code = await process.wait()
                problem = await loop.sock_recv(ours, 4096)
            await output.ended(drain_s)
        except TimeoutError:
            return None, output.data
        finally:
            await end(process)
        return code, output.data + problem


class _Output:
    """The end of what a command says, through a pipe that asyncio does not know: it would not say
    that a process has ended before whatever inherited its pipe has, too.
    """

    def __init__(self, bytes_max: int) -> None:
        self.data = b""
        self._bytes_max = bytes_max
        self._over = asyncio.Event()
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)

    def __enter__(self) -> _Output:
        return self

    def follow(self) -> None:
        """The command has its end by now."""
        os.close(self.write_end)
        self.write_end = -1
        os.set_blocking(self._read_end, False)
        asyncio.get_running_loop().add_reader(self._read_end, self._read)

    def _read(self) -> None:
        data = os.read(self._read_end, CHUNK_BYTES)
        self.data = (self.data + data)[-self._bytes_max :]
        if not data:
            asyncio.get_running_loop().remove_reader(self._read_end)
            self._over.set()

    async def ended(self, timeout_s: float) -> None:
        """Waits for the end of the output, for so long at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._over.wait()

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._read_end)
        os.close(self._read_end)
        if self.write_end >= 0:
            os.close(self.write_end)


async def end(process: asyncio.subprocess.Process, number: int = signal.SIGTERM) -> None:
    """Ends an exec helper that still runs, and with it the command and what that has started; with
    leaving.LEAVE, what the agent knows of them, and they go on.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(process.pid)
            try:
                process.send_signal(number)
                await ended(handle)
            finally:
                os.close(handle)
    # Of a pipe with output that nobody takes asyncio hears no end, and `wait` waits for that. There
    # is no other way to let go of it.
    process._transport.close()  # type: ignore[attr-defined]
    await process.wait()
