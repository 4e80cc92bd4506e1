"""Files into a task and out of it, between a client and the task's node.

The archive is passed on as it comes, in both directions as fast as its reader takes it; nothing of
it is kept, looked at or written to the log. A copy cannot be gone on with after a break, as nobody
knows what has been done: it ends with an error that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import structlog
from msgspec import structs

from manager.api.lookup import name_of
from manager.api.relays import Relay, Relays, check_engine, has_begun, one_task
from manager.store import View
from swarm import errors
from swarm.v1 import CopyInput, CopyOutput, CopyStart, RelayFrame, RelayRequest, Task

log = structlog.get_logger("api")

# Of one message from a client, as the contract says.
DATA_BYTES_MAX = 1 << 20
# Of one message to a node: a stream keeps some tens of them in memory at each of its stations.
PIECE_BYTES = 128 * 1024
# How long a client that was told to stop may go on.
STOP_S = 5.0


async def run_copy(
    view: View,
    relays: Relays,
    inputs: AsyncIterator[CopyInput],
    *,
    who: str,
    note: Callable[..., None] = lambda **_: None,
) -> AsyncGenerator[CopyOutput, None]:
    """Copies until all is done. Raises Invalid, NotFound, Conflict (the task or its node cannot do
    it), Unavailable.
    """
    first = await anext(aiter(inputs), None)
    if first is None or first.start is None:
        raise errors.Invalid("the first message must say what to copy into or out of which task")
    start = first.start
    if not start.path:
        raise errors.Invalid("give the path inside the task")
    if "\0" in start.path:
        raise errors.Invalid("a path cannot hold a zero byte")
    task = one_task(view, start.task, _can_copy, "only where it has begun are there files of it")
    name = name_of(task, view)
    direction = "look" if start.stat_only else "into" if start.into else "out"
    log.info("copy", who=who, task_id=task.id, node_id=task.node_id, direction=direction)
    note(
        what="copy",
        kind="task",
        name=name,
        object_id=task.id,
        path=start.path,
        direction=direction,
    )
    check_engine(view, task)
    request = RelayRequest(task_id=task.id, copy=structs.replace(start, task=task.id))
    subject = f"task {name}"
    async with relays.open(task.node_id, request) as relay:
        carry = _into if direction == "into" else _out
        async with contextlib.aclosing(carry(relay, start, inputs, subject)) as outputs:
            async for output in outputs:
                yield output


async def _out(
    relay: Relay, start: CopyStart, _: AsyncIterator[CopyInput], subject: str
) -> AsyncGenerator[CopyOutput, None]:
    begun = False
    try:
        async for frame in relay.frames():
            if frame.error is not None:
                raise errors.Conflict(f"{subject}: {frame.error}{_partial(begun)}")
            output = frame.copy_output
            if output is None:
                continue
            if output.stat is not None and not output.stat.mode and not start.stat_only:
                raise errors.NotFound(f"{subject}: {start.path}: no such file or folder")
            begun = begun or output.data is not None
            yield output
            if output.done:
                return
    except errors.Unavailable as error:
        raise errors.Unavailable(f"{subject}: {error.message}{_partial(begun)}") from None
    raise errors.Unavailable(f"{subject}: the archive broke off{_partial(begun)}")


def _partial(begun: bool) -> str:
    return "; what was copied until then is only a part" if begun else ""


async def _into(
    relay: Relay, start: CopyStart, inputs: AsyncIterator[CopyInput], subject: str
) -> AsyncGenerator[CopyOutput, None]:
    begun = False

    async def send() -> None:
        nonlocal begun
        async for message in inputs:
            if message.end:
                await relay.send(RelayFrame(copy_input=message))
                return
            data = message.data or b""
            if len(data) > DATA_BYTES_MAX:
                raise errors.Invalid(
                    f"a part of {len(data):,} bytes: send at most {DATA_BYTES_MAX:,} at a time"
                )
            begun = begun or bool(data)
            for at in range(0, len(data), PIECE_BYTES):
                piece = CopyInput(data=data[at : at + PIECE_BYTES])
                await relay.send(RelayFrame(copy_input=piece))
        raise errors.Invalid(
            f"{subject}: the archive broke off before its end; a part of it may be in {start.path}"
        )

    async def answer() -> CopyOutput:
        async for frame in relay.frames():
            if frame.error is not None:
                raise errors.Conflict(f"{subject}: {frame.error}{_left(start, begun)}")
            if frame.copy_output is not None and frame.copy_output.done:
                return frame.copy_output
        raise errors.Unavailable("the stream ended before the copy did")

    sending = asyncio.create_task(send(), name="copy input")
    answering = asyncio.create_task(answer(), name="copy answer")
    try:
        await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
        # What the node says comes first: it may be the reason why nothing more can be sent.
        if not answering.done() and not _lost(sending):
            sending.result()
        yield await answering
    except errors.SwarmError as error:
        # What is sent into a call that has ended hides from the sender why it has.
        yield CopyOutput(stop=True)
        await _rest(sending, inputs)
        if isinstance(error, errors.Unavailable):
            raise errors.Unavailable(f"{subject}: {error.message}{_left(start, begun)}") from None
        raise
    finally:
        for task in (sending, answering):
            task.cancel()
        await asyncio.gather(sending, answering, return_exceptions=True)


async def _rest(sending: asyncio.Task[None], inputs: AsyncIterator[CopyInput]) -> None:
    """Takes what the client had sent before it heard that it is to stop."""
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_S):
            async for _ in inputs:
                pass


def _lost(sending: asyncio.Task[None]) -> bool:
    return isinstance(sending.exception(), errors.Unavailable)


def _left(start: CopyStart, begun: bool) -> str:
    return f"; a part of it may be in {start.path}" if begun else ""


def _can_copy(task: Task) -> bool:
    """A task that has ended may still be there, if its runtime keeps it."""
    return bool(task.node_id) and has_begun(task)
