"""Files into tasks and out of them, as the API carries them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from manager.api.copying import DATA_BYTES_MAX, PIECE_BYTES
from swarm import errors
from swarm.rpc import Context
from swarm.v1 import (
    ContainerStatus,
    CopyInput,
    CopyOutput,
    CopyStart,
    FileStat,
    RelayFrame,
    Service,
    TaskState,
    TaskStatus,
)
from tests.unit.api.harness import CONTEXT, Api, FakeRelays, changed, node, service, task

FILE = CopyOutput(stat=FileStat(name="f", mode=0o100644))
NOTHING = CopyOutput(stat=FileStat())
DONE = CopyOutput(done=True)


def out(*outputs: CopyOutput) -> list[RelayFrame]:
    return [RelayFrame(copy_output=output) for output in outputs]


@pytest.fixture
async def running(api: Api) -> Api:
    await api.put(node("n1"), node("n2"))
    await api.create(service=service("web", replicas=2))
    web = api.one(Service, "web")
    await api.put(task("t1", web, node_id="n1"), task("t2", web, slot=2, node_id="n2"))
    return api


async def copy(api: Api, *inputs: CopyInput, context: Any = CONTEXT) -> list[CopyOutput]:
    async def given() -> AsyncIterator[CopyInput]:
        for message in inputs:
            yield message

    async with asyncio.timeout(5):
        return [o async for o in api.control.copy(given(), context)]


def start(ref: str = "t1", path: str = "/f", **fields: Any) -> CopyInput:
    return CopyInput(start=CopyStart(task=ref, path=path, **fields))


def data(text: bytes) -> CopyInput:
    return CopyInput(data=text)


END = CopyInput(end=True)


class Taker:
    """A node that takes an archive and is content, or stops with an error after so many parts."""

    def __init__(self, error: str = "", after: int = 0) -> None:
        self.error = error
        self.after = after

    async def __call__(self, relays: FakeRelays) -> AsyncIterator[RelayFrame]:
        while True:
            await asyncio.sleep(0)
            sent = [f.copy_input for f in relays.sent if f.copy_input is not None]
            if self.error and len(sent) >= self.after:
                yield RelayFrame(error=self.error)
                return
            if sent and sent[-1].end:
                yield RelayFrame(copy_output=DONE)
                yield RelayFrame(end=True)
                return


@pytest.mark.parametrize("ref", ["t1", "web.1", "web"])
async def test_what_comes_out_of_a_task_is_passed_on(running: Api, ref: str) -> None:
    parts = (FILE, CopyOutput(data=b"one"), CopyOutput(data=b"two"), DONE)
    running.relays.scripts = {"t1": out(*parts)}
    assert await copy(running, start(ref)) == list(parts)
    ((node_id, request),) = running.relays.requests
    assert (node_id, request.task_id) == ("n1", "t1")
    assert request.copy == CopyStart(task="t1", path="/f")


async def test_what_goes_into_a_task_is_passed_on_in_pieces(running: Api) -> None:
    running.relays.scripts = {"t1": Taker()}
    begin = start(into=True, keep_kind=True, keep_owner=True)
    whole = b"x" * (2 * PIECE_BYTES + 5)
    assert await copy(running, begin, data(whole), data(b"end"), END) == [DONE]
    sent = [f.copy_input for f in running.relays.sent if f.copy_input is not None]
    pieces = [s.data for s in sent if s.data is not None]
    assert b"".join(pieces) == whole + b"end"
    assert max(len(p) for p in pieces) == PIECE_BYTES
    assert sent[-1].end
    copied = running.relays.requests[0][1].copy
    assert copied is not None
    assert (copied.into, copied.keep_kind, copied.keep_owner) == (True, True, True)


async def test_only_looking(running: Api) -> None:
    running.relays.scripts = {"t1": out(NOTHING, DONE)}
    assert await copy(running, start(stat_only=True)) == [NOTHING, DONE]


async def test_task_that_has_ended_may_still_have_files(running: Api) -> None:
    web = running.one(Service, "web")
    ended = TaskStatus(state=TaskState.FAILED, container=ContainerStatus(container_id="x"))
    await running.put(changed(task("t3", web, slot=3), status=ended))
    running.relays.scripts = {"t3": out(FILE, DONE)}
    assert await copy(running, start("t3")) == [FILE, DONE]


BROKEN = errors.Unavailable("the stream from node n1 broke off")


def breaking(*frames: RelayFrame) -> Any:
    async def script(_: FakeRelays) -> AsyncIterator[RelayFrame]:
        for frame in frames:
            yield frame
        raise BROKEN

    return script


@pytest.mark.parametrize(
    ("script", "inputs", "kind", "message"),
    [
        ((), (), errors.Invalid, "the first message must say"),
        ((), (data(b"x"),), errors.Invalid, "the first message must say"),
        ((), (start(path=""),), errors.Invalid, "give the path inside the task"),
        ((), (start(path="a\0b"),), errors.Invalid, "a path cannot hold a zero byte"),
        ((), (start("nope"),), errors.NotFound, "task nope not found"),
        ((), (start("new"),), errors.Conflict, "task web.4 .new. is pending; only where it has"),
        ((), (start("idle"),), errors.Conflict, 'service "idle" has no running task'),
        (out(NOTHING), (start(),), errors.NotFound, "task web.1: /f: no such file or folder$"),
        (
            [*out(FILE), RelayFrame(error="permission denied")],
            (start(),),
            errors.Conflict,
            "task web.1: permission denied$",
        ),
        (
            [*out(FILE, CopyOutput(data=b"x")), RelayFrame(error="it became shorter")],
            (start(),),
            errors.Conflict,
            "it became shorter; what was copied until then is only a part",
        ),
        (
            breaking(*out(FILE, CopyOutput(data=b"x"))),
            (start(),),
            errors.Unavailable,
            "broke off; what was copied until then is only a part",
        ),
        (
            out(FILE, CopyOutput(data=b"x")),
            (start(),),
            errors.Unavailable,
            "the archive broke off; what was copied until then is only a part",
        ),
        (
            Taker(),
            (start(into=True), data(b"x")),
            errors.Invalid,
            "broke off before its end; a part of it may be in /f",
        ),
        (
            Taker("no space left", after=1),
            (start(into=True), data(b"x"), END),
            errors.Conflict,
            "task web.1: no space left; a part of it may be in /f",
        ),
        (
            Taker("/f: no such file or folder"),
            (start(into=True),),
            errors.Conflict,
            "task web.1: /f: no such file or folder$",
        ),
        (
            breaking(),
            (start(into=True), data(b"x"), END),
            errors.Unavailable,
            "task web.1: the stream from node n1 broke off; a part of it may be in /f",
        ),
        (
            Taker(),
            (start(into=True), data(b"x" * (DATA_BYTES_MAX + 1)), END),
            errors.Invalid,
            "send at most 1,048,576 at a time",
        ),
    ],
)
async def test_copies_that_go_wrong(
    running: Api, script: Any, inputs: Any, kind: type[Exception], message: str
) -> None:
    web = running.one(Service, "web")
    await running.put(task("new", web, slot=4, node_id="", state=TaskState.PENDING))
    await running.create(service=service("idle"))
    running.relays.scripts = {"t1": script}
    with pytest.raises(kind, match=message):
        await copy(running, *inputs)


async def test_audit_tells_what_was_copied_and_no_data(running: Api) -> None:
    running.relays.scripts = {"t1": Taker()}
    context = Context(CONTEXT.identity, CONTEXT.peer)
    await copy(running, start(into=True), data(b"s3cret"), END, context=context)
    assert context.notes == {
        "what": "copy",
        "kind": "task",
        "name": "web.1",
        "object_id": "t1",
        "path": "/f",
        "direction": "into",
    }
