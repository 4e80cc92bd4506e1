"""Commands inside a container: Docker's exec over a hijacked connection.

The connection carries stdin one way and output the other, framed as logs are unless there is a TTY.
Closing stdin is a half-close of the socket. Output is read only as fast as it is taken, so a slow
client slows the command and fills no memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from agent.runtime.base import Failed, Rejected
from agent.runtime.docker.engine import INSPECT_S, Engine, Refusal
from swarm.v1 import ExecInput, ExecOutput, ExecStart

CHUNK_BYTES = 64 * 1024
_HEADER = 8
_STDERR = 2
# The engine notes the exit code shortly after it closes the stream.
_CODE_TRIES = 50
_CODE_PAUSE_S = 0.02


async def run(
    engine: Engine, container_id: str, start: ExecStart, stdin: AsyncIterator[ExecInput]
) -> AsyncGenerator[ExecOutput, None]:
    """See Runtime.exec."""
    exec_id = await _create(engine, container_id, start)
    try:
        reader, writer = await engine.hijack(
            f"exec/{exec_id}/start", {"Detach": False, "Tty": start.tty}
        )
    except Refusal as refusal:
        raise Rejected(f"the command cannot be run: {refusal.message}") from None
    feeder = asyncio.create_task(_feed(engine, exec_id, start, stdin, writer))
    try:
        yield ExecOutput(started=True)
        async for output in _output(reader, tty=start.tty):
            yield output
            if feeder.done() and not feeder.cancelled() and (error := feeder.exception()):
                raise error
        yield ExecOutput(exit_code=await _exit_code(engine, exec_id))
    finally:
        feeder.cancel()
        await asyncio.gather(feeder, return_exceptions=True)
        writer.close()


async def _create(engine: Engine, container_id: str, start: ExecStart) -> str:
    body = {
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "Tty": start.tty,
        "Cmd": list(start.command),
        "Env": list(start.env),
        "User": start.user,
        "WorkingDir": start.dir,
        "Privileged": start.privileged,
    }
    if not start.command:
        raise Rejected("no command is given")
    try:
        answer = await engine.call(
            "exec_create",
            "POST",
            f"containers/{container_id}/exec",
            body=body,
            timeout_s=INSPECT_S,  # somebody waits at a terminal
        )
    except Refusal as refusal:
        if refusal.status == 409:
            raise Rejected("the task does not run") from None
        raise Rejected(f"the command cannot be run: {refusal.message}") from None
    return str(answer["Id"])


async def _feed(
    engine: Engine,
    exec_id: str,
    start: ExecStart,
    stdin: AsyncIterator[ExecInput],
    writer: asyncio.StreamWriter,
) -> None:
    """Carries input to the command until there is no more."""
    if start.tty and start.size is not None:
        await _resize(engine, exec_id, start.size.rows, start.size.columns)
    async for message in stdin:
        if message.resize is not None:
            await _resize(engine, exec_id, message.resize.rows, message.resize.columns)
        try:
            if message.stdin:
                writer.write(message.stdin)
                await writer.drain()
            if message.stdin_closed and writer.can_write_eof():
                writer.write_eof()
        except ConnectionError:
            return  # the command ended; its output tells how


async def _resize(engine: Engine, exec_id: str, rows: int, columns: int) -> None:
    try:
        await engine.call(
            "exec_resize",
            "POST",
            f"exec/{exec_id}/resize",
            params={"h": str(rows), "w": str(columns)},
        )
    except Refusal as refusal:
        # The command may have ended between the user's key and this call.
        if refusal.status not in (404, 409, 500):
            raise Failed(f"the terminal cannot be resized: {refusal.message}") from None


async def _output(reader: asyncio.StreamReader, *, tty: bool) -> AsyncIterator[ExecOutput]:
    if tty:
        while data := await reader.read(CHUNK_BYTES):
            yield ExecOutput(stdout=data)
        return
    while True:
        try:
            header = await reader.readexactly(_HEADER)
        except asyncio.IncompleteReadError:
            return
        left = int.from_bytes(header[4:], "big")
        while left:
            data = await reader.read(min(left, CHUNK_BYTES))
            if not data:
                return
            left -= len(data)
            yield ExecOutput(stderr=data) if header[0] == _STDERR else ExecOutput(stdout=data)


async def _exit_code(engine: Engine, exec_id: str) -> int:
    for _ in range(_CODE_TRIES):
        try:
            found = await engine.call("exec_inspect", "GET", f"exec/{exec_id}/json")
        except Refusal as refusal:
            raise Failed(f"the command's exit code is lost: {refusal.message}") from None
        if not found.get("Running") and found.get("ExitCode") is not None:
            return int(found["ExitCode"])
        await asyncio.sleep(_CODE_PAUSE_S)
    raise Failed("the connection to the command was lost while it still ran")
