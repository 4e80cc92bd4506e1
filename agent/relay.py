"""Streams that a manager asks this node for: a task's logs, a command inside it, its use of
resources.

The agent opens the stream, so that managers need no way into the node. What the runtime gives is
sent as fast as the manager takes it, and no faster: a slow reader slows the runtime's reader, not
the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import cast

import structlog

from agent.runtime.base import Runtime
from swarm import errors
from swarm.pipes import Pipe
from swarm.v1 import ExecInput, LogLine, LogsResponse, RelayFrame, RelayRequest
from swarm.v1.services import DispatcherClient

log = structlog.get_logger("relay")

FRAMES_MAX = 32  # that wait for the manager
LINES_MAX = 1000  # that wait to be framed
FRAME_LINES = 250
END_TIMEOUT_S = 5.0  # for the manager to take the last frames

RuntimeOf = Callable[[str], Runtime]


async def serve(
    client: DispatcherClient, request: RelayRequest, runtime_of: RuntimeOf, *, refused: str = ""
) -> None:
    """Serves one stream to its end; never raises but for cancellation. `refused`: the answer is
    only why not.
    """
    out: Pipe[RelayFrame] = Pipe(FRAMES_MAX)
    stdin: Pipe[ExecInput] = Pipe(FRAMES_MAX)

    async def produce() -> None:
        try:
            if refused:
                raise errors.Exhausted(refused)
            await _produce(request, runtime_of(request.task_id), stdin, out)
            await out.put(RelayFrame(end=True))
        except errors.SwarmError as error:
            await out.put(RelayFrame(error=error.message))
        except Exception as error:  # told to the client and logged; others are not to suffer
            log.exception("relay_failed", task_id=request.task_id)
            await out.put(RelayFrame(error=f"internal error of the agent: {error!r}"))
        finally:
            await out.close()
            await stdin.close(drop=True)

    async def consume() -> None:
        frames = _outgoing(request.relay_id, out)
        try:
            # Channel's streams are generators, whose closing cancels the call.
            stream = cast("AsyncGenerator[RelayFrame]", client.relay(frames))
            async with contextlib.aclosing(stream):
                async for frame in stream:
                    if frame.end:
                        return
                    if frame.input is not None:
                        await stdin.put(frame.input)
        except errors.SwarmError as error:
            log.debug("relay_ended", task_id=request.task_id, reason=error.message)
        finally:
            await stdin.close()

    producing = asyncio.create_task(produce())
    consuming = asyncio.create_task(consume())
    try:
        await asyncio.wait({producing, consuming}, return_when=asyncio.FIRST_COMPLETED)
        if not consuming.done():
            await asyncio.wait({consuming}, timeout=END_TIMEOUT_S)
    finally:
        for task in (producing, consuming):
            task.cancel()
        await asyncio.gather(producing, consuming, return_exceptions=True)


async def _outgoing(relay_id: str, out: Pipe[RelayFrame]) -> AsyncIterator[RelayFrame]:
    yield RelayFrame(hello=relay_id)
    async for frame in out:
        yield frame


async def _produce(
    request: RelayRequest, runtime: Runtime, stdin: Pipe[ExecInput], out: Pipe[RelayFrame]
) -> None:
    if request.logs is not None:
        await _frame_lines(runtime.logs(request.task_id, request.logs), out)
    elif request.exec is not None:
        outputs = runtime.exec(request.task_id, request.exec, aiter(stdin))
        async for output in outputs:
            if not await out.put(RelayFrame(output=output)):
                return
    else:
        raise errors.Unsupported(
            "the manager asks for a kind of stream this agent does not know; update swarmd"
        )


async def _frame_lines(lines: AsyncIterator[LogLine], out: Pipe[RelayFrame]) -> None:
    """Packs the lines that are there into one frame, without waiting for more of them."""
    waiting: Pipe[LogLine] = Pipe(LINES_MAX)

    async def read() -> None:
        try:
            async for line in lines:
                if not await waiting.put(line):
                    return
        finally:
            await waiting.close()

    reading = asyncio.create_task(read())
    try:
        while batch := await waiting.take(FRAME_LINES):
            if not await out.put(RelayFrame(logs=LogsResponse(lines=tuple(batch)))):
                return
        await reading  # raises what ended it
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, errors.SwarmError):
            await reading
