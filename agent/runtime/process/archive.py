"""Files into and out of a task: a helper process reads and writes them inside (tree.py), and this
module moves its archive.

The helper is the task in all that matters to the kernel: it has its namespaces, user and
capabilities. It ends with the task, which breaks a copy off. What has ended has no namespaces any
more, so nothing can be copied then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from agent.runtime.base import PIECE_BYTES_MAX, Failed
from agent.runtime.process import spawn as process_spawn
from swarm.v1 import FileStat

__all__ = ["archive", "extract", "file_stat"]

STAT_S_MAX = 30.0


class NotRunning(Failed):
    """What has ended has no files any more."""

    def __init__(self) -> None:
        super().__init__(
            "the task does not run, and the process runtime keeps no files of what has ended; put "
            "what is to be kept in a volume"
        )


async def file_stat(plan: dict[str, Any], path: str) -> FileStat | None:
    """See Runtime; `plan` as for a command beside the task."""
    async with _helper(plan, {"what": "stat", "path": path}) as helper:
        try:
            async with asyncio.timeout(STAT_S_MAX):
                said = await helper.output.read()
                await helper.ended()
        except TimeoutError:
            raise Failed(f"{path}: its file system has not answered for {STAT_S_MAX:g} s") from None
    found = json.loads(said)
    return None if found is None else FileStat(**found)


async def archive(plan: dict[str, Any], path: str) -> AsyncGenerator[bytes, None]:
    """See Runtime."""
    async with _helper(plan, {"what": "archive", "path": path}) as helper:
        while data := await helper.output.read(PIECE_BYTES_MAX):
            yield data
        await helper.ended()


async def extract(
    plan: dict[str, Any],
    path: str,
    data: AsyncIterator[bytes],
    *,
    keep_kind: bool,
    keep_owner: bool,
) -> None:
    """See Runtime."""
    order = {
        "what": "extract",
        "path": path,
        "keep_kind": keep_kind,
        "keep_owner": keep_owner,
    }
    async with _helper(plan, order) as helper:
        # It may give up while the sender takes its time.
        ending = asyncio.create_task(helper.ended())
        feeding = asyncio.create_task(helper.feed(data))
        try:
            await asyncio.wait({ending, feeding}, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()
            await ending
        finally:
            for task in (ending, feeding):
                task.cancel()
            await asyncio.gather(ending, feeding, return_exceptions=True)


class _Helper:
    """The process, and what it says at its end."""

    def __init__(self, process: asyncio.subprocess.Process, answers: socket.socket) -> None:
        self._process = process
        self._answers = answers
        assert process.stdout is not None
        self.output = process.stdout

    async def feed(self, data: AsyncIterator[bytes]) -> None:
        """Gives it all that comes; its input is closed only when that came to its end, so that a
        part is never taken for the whole. Raises what `data` raises.
        """
        stdin = self._process.stdin
        assert stdin is not None
        try:
            async for part in data:
                stdin.write(part)
                await stdin.drain()
            stdin.close()
            await stdin.wait_closed()
        except ConnectionError:
            return  # it has given up, and says why

    async def ended(self) -> None:
        """Raises Failed with what went wrong."""
        code = await self._process.wait()
        if code == 0:
            return
        said = b""
        with contextlib.suppress(BlockingIOError):
            said = self._answers.recv(4096)
        raise Failed(
            said.decode(errors="replace") or "the task ended, or somebody ended the copying process"
        )


@contextlib.asynccontextmanager
async def _helper(plan: dict[str, Any], order: dict[str, Any]) -> AsyncIterator[_Helper]:
    ours, theirs = socket.socketpair()
    pipe = asyncio.subprocess.PIPE
    with ours, theirs:
        ours.setblocking(False)
        process = await asyncio.create_subprocess_exec(
            *process_spawn.command("copy", str(theirs.fileno())),
            pass_fds=[theirs.fileno()],
            stdin=pipe if order["what"] == "extract" else asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,
            limit=PIECE_BYTES_MAX,
        )
        try:
            theirs.close()
            loop = asyncio.get_running_loop()
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(
                    ours, process_spawn.packed({**plan, "cgroups": [], "order": order})
                )
            yield _Helper(process, ours)
        finally:
            await process_spawn.end(process)
