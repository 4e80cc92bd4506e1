"""Streams that a manager asks this node for: a task's logs, a command inside it, files into it or
out of it, and what the node and its tasks use.

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
from agent.usage import Meter
from swarm import errors
from swarm.pipes import Pipe
from swarm.v1 import (
    CopyOutput,
    CopyStart,
    ExecInput,
    FileStat,
    LogLine,
    LogsResponse,
    RelayFrame,
    RelayRequest,
    UsageOptions,
)
from swarm.v1.services import DispatcherClient

log = structlog.get_logger("relay")

FRAMES_MAX = 32  # that wait for the manager
LINES_MAX = 1000  # that wait to be framed
FRAME_LINES = 250
# Of the lines that wait, and of those in one frame: a line may have a MiB.
LINES_BYTES_MAX = 128 * 1024
END_TIMEOUT_S = 5.0  # for the manager to take the last frames

RuntimeOf = Callable[[str], Runtime]


async def serve(
    client: DispatcherClient,
    request: RelayRequest,
    runtime_of: RuntimeOf,
    *,
    meter: Meter | None = None,
    refused: str = "",
) -> None:
    """Serves one stream to its end; never raises but for cancellation. `refused`: the answer is
    only why not. Without a meter the node's usage is not told.
    """
    # What is long has a pipe of its own before this one; here one frame more waits.
    out: Pipe[RelayFrame] = Pipe(1 if request.logs is not None else FRAMES_MAX)
    incoming: Pipe[RelayFrame] = Pipe(FRAMES_MAX)
    # The client has left its command, which runs on.
    left = asyncio.Event()

    async def produce() -> None:
        try:
            if refused:
                raise errors.Exhausted(refused)
            if request.usage is not None:
                await _produce_usage(meter, request.usage, out)
            else:
                await _produce(request, runtime_of(request.task_id), incoming, out, left)
            await out.put(RelayFrame(end=True))
        except errors.SwarmError as error:
            await out.put(RelayFrame(error=error.message))
        except Exception as error:  # told to the client and logged; others are not to suffer
            log.exception("relay_failed", task_id=request.task_id)
            await out.put(RelayFrame(error=f"internal error of the agent: {error!r}"))
        finally:
            await out.close()
            await incoming.close(drop=True)

    async def consume() -> None:
        frames = _outgoing(request.relay_id, out)
        try:
            # Channel's streams are generators, whose closing cancels the call.
            stream = cast("AsyncGenerator[RelayFrame]", client.relay(frames))
            async with contextlib.aclosing(stream):
                async for frame in stream:
                    if frame.end:
                        return
                    if frame.input is not None and frame.input.detach:
                        left.set()
                        await out.put(RelayFrame(end=True))
                        await out.close()
                        producing.cancel()
                        continue
                    await incoming.put(frame)
        except errors.SwarmError as error:
            log.debug("relay_ended", task_id=request.task_id, reason=error.message)
        finally:
            await incoming.close()

    producing = asyncio.create_task(produce())
    consuming = asyncio.create_task(consume())
    try:
        await asyncio.wait({producing, consuming}, return_when=asyncio.FIRST_COMPLETED)
        if left.is_set():
            await asyncio.wait({producing})  # it must come to leave it
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
    request: RelayRequest,
    runtime: Runtime,
    incoming: Pipe[RelayFrame],
    out: Pipe[RelayFrame],
    left: asyncio.Event,
) -> None:
    if request.logs is not None:
        await _frame_lines(runtime.logs(request.task_id, request.logs), out)
    elif request.exec is not None:
        outputs = runtime.exec(request.task_id, request.exec, _inputs(incoming), left)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if not await out.put(RelayFrame(output=output)):
                    return
    elif request.copy is not None:
        await _copy(runtime, request.task_id, request.copy, incoming, out)
    else:
        raise errors.Unsupported(
            "the manager asks for a kind of stream this agent does not know; update swarmd"
        )


# ------------------------------------------------------------------ commands


async def _inputs(incoming: Pipe[RelayFrame]) -> AsyncIterator[ExecInput]:
    async for frame in incoming:
        if frame.input is not None:
            yield frame.input


# ------------------------------------------------------------------ logs


async def _frame_lines(lines: AsyncIterator[LogLine], out: Pipe[RelayFrame]) -> None:
    """Packs the lines that are there into one frame, without waiting for more of them."""
    waiting: Pipe[LogLine] = Pipe(
        LINES_MAX, weigh=lambda line: len(line.data), weight_max=LINES_BYTES_MAX
    )

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


# ------------------------------------------------------------------ usage


async def _produce_usage(meter: Meter | None, options: UsageOptions, out: Pipe[RelayFrame]) -> None:
    if meter is None:
        raise errors.Unsupported("this agent does not measure what its node uses")
    async with contextlib.aclosing(meter.measure(options)) as usages:
        async for usage in usages:
            if not await out.put(RelayFrame(usage=usage)):
                return


# ------------------------------------------------------------------ copies


async def _copy(
    runtime: Runtime,
    task_id: str,
    start: CopyStart,
    incoming: Pipe[RelayFrame],
    out: Pipe[RelayFrame],
) -> None:
    """Raises what the runtime raises, NotFound, and Unavailable for an archive that broke off."""
    if start.into and not start.stat_only:
        await runtime.extract(
            task_id,
            start.path,
            _archive(incoming),
            keep_kind=start.keep_kind,
            keep_owner=start.keep_owner,
        )
    else:
        found = await runtime.file_stat(task_id, start.path)
        await out.put(RelayFrame(copy_output=CopyOutput(stat=found or FileStat())))
        if not start.stat_only:
            if found is None:
                raise errors.NotFound(f"{start.path}: no such file or folder in the task")
            async for data in runtime.archive(task_id, start.path):
                if not await out.put(RelayFrame(copy_output=CopyOutput(data=data))):
                    return
    await out.put(RelayFrame(copy_output=CopyOutput(done=True)))


async def _archive(incoming: Pipe[RelayFrame]) -> AsyncIterator[bytes]:
    """What is to be unpacked, to its end. Raises Unavailable when it does not come to one."""
    async for frame in incoming:
        part = frame.copy_input
        if part is None:
            continue
        if part.end:
            return
        if part.data:
            yield part.data
    raise errors.Unavailable("the archive broke off before its end")
