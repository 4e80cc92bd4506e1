"""Logs of many tasks as one stream, and commands inside a task."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.api import relays as relays_module
from manager.api.merging import QUEUED_MAX, Merger
from swarm import errors
from swarm.v1 import (
    ContainerStatus,
    ExecInput,
    ExecOutput,
    ExecStart,
    LogLine,
    LogOptions,
    LogsRequest,
    LogsResponse,
    LogStream,
    NodeState,
    NodeStatus,
    RelayFrame,
    RuntimeProblem,
    Service,
    StackSpec,
    TaskState,
    TaskStatus,
)
from tests.unit.api.harness import CONTEXT, Api, FakeRelays, changed, node, service, task


def lines(*pairs: tuple[int, str]) -> RelayFrame:
    found = tuple(LogLine(timestamp_ns=t, data=d.encode()) for t, d in pairs)
    return RelayFrame(logs=LogsResponse(lines=found))


END = RelayFrame(end=True)


async def read(api: Api, **fields: Any) -> tuple[list[LogLine], list[str]]:
    """The whole answer."""
    got: list[LogLine] = []
    problems: list[str] = []
    async with asyncio.timeout(5):
        async for response in api.control.logs(LogsRequest(**fields), CONTEXT):
            got.extend(response.lines)
            problems.extend(response.problems)
    return got, problems


@pytest.fixture
async def running(api: Api) -> Api:
    """A service with a task on each of two nodes."""
    await api.put(node("n1", hostname="host-1"), node("n2", hostname="host-2"))
    await api.create(service=service("web", replicas=2))
    web = api.one(Service, "web")
    await api.put(task("t1", web, node_id="n1"), task("t2", web, slot=2, node_id="n2"))
    return api


async def test_lines_of_all_tasks_come_in_order_of_time_and_say_whose_they_are(running: Api):
    running.relays.scripts = {
        "t1": [lines((1, "a"), (4, "d")), lines((5, "e")), END],
        "t2": [lines((2, "b"), (3, "c"), (6, "f")), END],
    }
    got, problems = await read(running, services=("web",))
    assert [line.data for line in got] == [b"a", b"b", b"c", b"d", b"e", b"f"]
    assert problems == []
    assert {(line.service_name, line.slot, line.node_id, line.node_name) for line in got} == {
        ("web", 1, "n1", "host-1"),
        ("web", 2, "n2", "host-2"),
    }
    assert got[0].task_id == "t1"


async def test_options_go_to_the_nodes_and_both_streams_are_the_default(running: Api):
    await read(running, services=("web",), options=LogOptions(tail=3, since_ns=5))
    assert [(n, r.task_id) for n, r in running.relays.requests] == [("n1", "t1"), ("n2", "t2")]
    assert running.relays.requests[0][1].logs == LogOptions(
        tail=3, since_ns=5, stdout=True, stderr=True
    )


async def test_node_that_cannot_be_read_is_a_sentence_and_the_rest_goes_on(running: Api):
    await running.put(node("n2", hostname="host-2", state=NodeState.DOWN))
    running.relays.scripts = {
        "t1": [lines((1, "a")), END],
        "t2": errors.Unavailable("node n2 has no session"),
    }
    got, problems = await read(running, services=("web",))
    assert [line.data for line in got] == [b"a"]
    assert problems == [
        "task web.2 (t2) on node host-2 (which is down) cannot be read: node n2 has no session"
    ]


async def test_error_of_the_agent_is_a_sentence(running: Api):
    running.relays.scripts = {
        "t1": [lines((1, "a")), RelayFrame(error="the log driver cannot be read")],
        "t2": [RelayFrame(logs=LogsResponse(problems=("2 lines were lost",))), END],
    }
    got, problems = await read(running, services=("web",))
    assert len(got) == 1
    assert sorted(problems) == [
        "task web.1 (t1) on node host-1: the log driver cannot be read",
        "task web.2 (t2) on node host-2: 2 lines were lost",
    ]


async def test_tasks_that_never_began_are_not_asked(running: Api):
    web = running.one(Service, "web")
    ended = TaskStatus(state=TaskState.FAILED, container=ContainerStatus(container_id="x"))
    await running.put(
        task("t3", web, slot=3, state=TaskState.PREPARING),
        task("t4", web, slot=4, state=TaskState.REJECTED),
        task("t5", web, slot=5, node_id="", state=TaskState.PENDING),
        changed(task("t6", web, slot=1), status=ended, desired_state=TaskState.SHUTDOWN),
    )
    await read(running, services=("web",))
    assert sorted(r.task_id for _, r in running.relays.requests) == ["t1", "t2", "t6"]


async def test_single_tasks_and_stacks(running: Api):
    running.relays.scripts = {"t2": [lines((1, "b")), END], "t9": [lines((1, "x")), END]}
    assert [line.data for line in (await read(running, tasks=("web.2",)))[0]] == [b"b"]
    await running.deploy(StackSpec(name="app", services=(service("app_a"),)))
    await running.put(task("t9", running.one(Service, "app_a")))
    assert [line.data for line in (await read(running, stack="app"))[0]] == [b"x"]


async def test_following_opens_tasks_that_begin_later_and_ends_with_the_service(running: Api):
    web = running.one(Service, "web")
    open_ended = asyncio.Event()

    async def follow(_: FakeRelays) -> AsyncIterator[RelayFrame]:
        yield lines((1, "old"))
        await open_ended.wait()

    running.relays.scripts = {"t1": follow, "t2": follow, "t3": [lines((9, "new")), END]}
    options = LogOptions(follow=True, tail=5)
    stream = running.control.logs(LogsRequest(services=("web",), options=options), CONTEXT)
    got: list[bytes] = []
    async with asyncio.timeout(5):
        while len(got) < 2:
            got.extend(line.data for line in (await anext(stream)).lines)
        assert got == [b"old", b"old"]
        await running.put(task("t3", web, slot=3))
        while len(got) < 3:
            got.extend(line.data for line in (await anext(stream)).lines)
        assert got[-1] == b"new"
        tails = {r.task_id: r.logs.tail for _, r in running.relays.requests if r.logs}
        assert tails == {"t1": 5, "t2": 5, "t3": -1}
        open_ended.set()
        await running.drop(web)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_caller_that_leaves_ends_all_relays(running: Api):
    ended: list[str] = []

    async def follow(_: FakeRelays) -> AsyncIterator[RelayFrame]:
        try:
            yield lines((1, "x"))
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    running.relays.scripts = {"t1": follow, "t2": follow}
    options = LogOptions(follow=True, tail=-1)
    stream = running.control.logs(LogsRequest(services=("web",), options=options), CONTEXT)
    async with asyncio.timeout(5):
        await anext(stream)
        await stream.aclose()
    assert ended == ["ended", "ended"]


async def test_more_tasks_than_relays_is_said(running: Api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("manager.api.relays.RELAYS_MAX", 1)
    running.relays.scripts = {"t1": [lines((1, "a")), END]}
    got, problems = await read(running, services=("web",))
    assert len(got) == 1
    assert problems[0].startswith("more than 1 tasks match")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "name the services, tasks or the stack"),
        ({"services": ("web",), "options": LogOptions(tail=-2)}, "tail -2: give a number of lines"),
        (
            {"services": ("web",), "options": LogOptions(since_ns=5, until_ns=4)},
            "since is later than until",
        ),
    ],
)
async def test_bad_requests(running: Api, fields: dict[str, Any], message: str):
    with pytest.raises(errors.Invalid, match=message):
        await read(running, **fields)


# ---------------------------------------------------------------- merging


STREAMS = st.lists(st.lists(st.integers(0, 50), max_size=12).map(sorted), max_size=5)


@given(STREAMS)
@settings(deadline=None, max_examples=60)
def test_merged_lines_are_all_lines_in_order(streams: list[list[int]]):
    async def merge() -> list[int]:
        merger = Merger()
        sources = [merger.source() for _ in streams]

        async def feed(i: int) -> None:
            for time in streams[i]:
                await sources[i].put([LogLine(timestamp_ns=time)])
                await asyncio.sleep(0)
            sources[i].close()

        async with asyncio.TaskGroup() as group:
            for i in range(len(streams)):
                group.create_task(feed(i))
            return [line.timestamp_ns async for batch in merger.batches() for line in batch]

    assert asyncio.run(merge()) == sorted(t for s in streams for t in s)


async def test_silent_source_does_not_hold_the_others_up():
    merger = Merger()
    loud, silent = merger.source(), merger.source()
    await loud.put([LogLine(timestamp_ns=1)])
    async with asyncio.timeout(5):
        async for batch in merger.batches():
            if batch:
                break
    silent.close()


async def test_source_waits_when_nobody_reads():
    merger = Merger()
    source = merger.source()
    putting = asyncio.create_task(source.put([LogLine()] * (QUEUED_MAX + 1)))
    while len(source.lines) < QUEUED_MAX:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not putting.done()
    batches = merger.batches()
    while not putting.done():
        await anext(batches)
        await asyncio.sleep(0)
    assert len(source.lines) <= QUEUED_MAX


# ---------------------------------------------------------------- exec


async def run(api: Api, *inputs: ExecInput) -> list[ExecOutput]:
    async def given_inputs() -> AsyncIterator[ExecInput]:
        for message in inputs:
            yield message

    async with asyncio.timeout(5):
        return [o async for o in api.control.exec(given_inputs(), CONTEXT)]


def start(ref: str, *command: str) -> ExecInput:
    return ExecInput(start=ExecStart(task=ref, command=command or ("sh",)))


@pytest.mark.parametrize("ref", ["t2", "web.2", "web.2.t2"])
async def test_frames_go_both_ways_until_the_exit_code(running: Api, ref: str):
    async def shell(relays: FakeRelays) -> AsyncIterator[RelayFrame]:
        yield RelayFrame(output=ExecOutput(started=True))
        while len(relays.sent) < 2:
            await asyncio.sleep(0)
        yield RelayFrame(output=ExecOutput(stdout=b"out"))
        yield RelayFrame(output=ExecOutput(exit_code=3))

    running.relays.scripts = {"t2": shell}
    outputs = await run(running, start(ref), ExecInput(stdin=b"in"))
    assert outputs == [
        ExecOutput(started=True),
        ExecOutput(stdout=b"out"),
        ExecOutput(exit_code=3),
    ]
    assert running.relays.sent == [
        RelayFrame(input=ExecInput(stdin=b"in")),
        RelayFrame(input=ExecInput(stdin_closed=True)),
    ]
    ((node_id, request),) = running.relays.requests
    assert (node_id, request.exec) == ("n2", ExecStart(task="t2", command=("sh",)))


async def test_service_stands_for_its_first_running_task(running: Api):
    running.relays.scripts = {"t1": [RelayFrame(output=ExecOutput(exit_code=0))]}
    assert await run(running, start("web")) == [ExecOutput(exit_code=0)]


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ((), errors.Invalid, "the first message must say"),
        ((ExecInput(stdin=b"x"),), errors.Invalid, "the first message must say"),
        ((ExecInput(start=ExecStart(task="web")),), errors.Invalid, "give the command to run"),
        ((start("nope"),), errors.NotFound, "task nope not found"),
        ((start("t3"),), errors.Conflict, "task web.3 .t3. is pending; a command can only run"),
        ((start("idle"),), errors.Conflict, 'service "idle" has no running task'),
        ((start("t1"),), errors.Conflict, "task web.1: no such file: sh"),
        ((start("t2"),), errors.Unavailable, "task web.2: the stream ended before the command did"),
    ],
)
async def test_exec_that_cannot_be_done(running: Api, inputs: Any, kind: Any, message: str):
    web = running.one(Service, "web")
    await running.put(task("t3", web, slot=3, node_id="", state=TaskState.PENDING))
    await running.create(service=service("idle"))
    running.relays.scripts = {"t1": [RelayFrame(error="no such file: sh")], "t2": [END]}
    with pytest.raises(kind, match=message):
        await run(running, *inputs)


# ------------------------------------------------------------------ relays that break


OUT, ERR = LogStream.STDOUT, LogStream.STDERR


class Breaking:
    """A task's log on its node, whose relay breaks after so many lines, each time it is read."""

    def __init__(self, log: list[tuple[int, LogStream, str]], breaks: list[int]) -> None:
        self.log = log
        self.breaks = breaks
        self.asked: list[LogOptions] = []

    async def __call__(self, relays: FakeRelays) -> AsyncIterator[RelayFrame]:
        options = relays.requests[-1][1].logs
        assert options is not None
        self.asked.append(options)
        found = [line for line in self.log if line[0] >= options.since_ns]
        found = found[-options.tail :] if options.tail > 0 else found
        limit = self.breaks.pop(0) if self.breaks else None
        for number, (at_ns, stream, text) in enumerate(found):
            if number == limit:
                raise errors.Unavailable("the stream from node n1 broke off")
            line = LogLine(timestamp_ns=at_ns, stream=stream, data=text.encode())
            yield RelayFrame(logs=LogsResponse(lines=(line,)))
        if limit is not None and limit >= len(found):
            raise errors.Unavailable("the stream from node n1 broke off")
        yield END


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays_module, "RESUME_PAUSE_S", 0.001)


def read_over(
    log: list[tuple[int, LogStream, str]], breaks: list[int], options: LogOptions
) -> list[str]:
    """What is read of a log whose relay breaks after so many lines, each time."""
    place = relays_module._Place(options)
    got: list[str] = []
    for limit in [*breaks, None]:
        options = place.options()
        found = [line for line in log if line[0] >= options.since_ns]
        found = found[-options.tail :] if options.tail > 0 else found
        lines = [
            LogLine(timestamp_ns=t, stream=stream, data=text.encode())
            for t, stream, text in found[:limit]
        ]
        got.extend(line.data.decode() for line in place.new(lines))
    return got


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([OUT, ERR])), max_size=12),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_logs_read_over_breaks_are_the_same_as_without(
    steps: list[tuple[int, LogStream]], breaks: list[int]
) -> None:
    """Times of each stream grow, or stay; the two streams' may overlap."""
    at = {OUT: 10**15, ERR: 10**15 - 2}
    log = []
    for number, (step, stream) in enumerate(steps):
        at[stream] += step
        log.append((at[stream], stream, str(number)))
    got = read_over(log, breaks, LogOptions(tail=-1))
    assert got == [text for _, _, text in log]


@given(st.integers(1, 12), st.lists(st.integers(1, 12), max_size=4))
def test_tail_read_over_breaks_brings_no_earlier_lines(tail: int, breaks: list[int]) -> None:
    log = [(10**15 + n, OUT if n % 2 else ERR, str(n)) for n in range(12)]
    got = read_over(log, breaks, LogOptions(tail=tail))
    assert got == [text for _, _, text in log[-tail:]]


async def test_logs_of_a_node_that_moves_are_read_on_without_loss(running: Api, no_pause: None):
    await running.put(node("n1", hostname="host-1", state=NodeState.READY))
    log = [(10**15 + n // 2, OUT if n % 3 else ERR, str(n)) for n in range(20)]
    breaking = Breaking(log, [5, 0, 9])
    running.relays.scripts = {"t1": breaking, "t2": [END]}
    got, problems = await read(running, services=("web",))
    assert problems == []
    assert sorted(int(line.data) for line in got) == list(range(20))
    assert len(breaking.asked) == 4


async def test_logs_that_break_for_good_end_with_a_sentence(
    running: Api, no_pause: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(relays_module, "RESUME_S", 0.1)
    await running.put(node("n1", hostname="host-1", state=NodeState.READY))
    running.relays.scripts = {"t1": Breaking([], [0] * 100_000), "t2": [END]}
    _, problems = await read(running, services=("web",))
    assert problems == [
        "task web.1 (t1) on node host-1 cannot be read: the stream from node n1 broke off"
    ]


async def test_logs_of_a_node_that_is_down_are_not_waited_for(running: Api):
    await running.put(node("n1", hostname="host-1", state=NodeState.DOWN))
    running.relays.scripts = {"t1": Breaking([], [0] * 100), "t2": [END]}
    _, problems = await read(running, services=("web",))
    assert len(problems) == 1


async def test_an_engine_that_does_not_answer_is_not_asked(running: Api):
    problem = RuntimeProblem(
        runtimes=("docker", "runc"),
        message="docker does not answer: no answer in 10 s",
        cause="engine_unresponsive",
    )
    silent = node("n1", hostname="host-1")
    assert silent.description is not None
    await running.put(
        structs.replace(
            silent,
            description=structs.replace(
                silent.description,
                runtimes=("docker", "runc", "process"),
                runtime_problems=(problem,),
            ),
            status=NodeStatus(
                state=NodeState.READY, unresponsive_since_ns={"docker": 1, "runc": 1}
            ),
        )
    )
    running.relays.scripts = {"t1": [END], "t2": [lines((1, "a")), END]}
    why = "node host-1: docker does not answer: no answer in 10 s; try again when it does"
    got, problems = await read(running, services=("web",))
    assert [line.data for line in got] == [b"a"]
    assert problems == [f"task web.1 (t1) on node host-1 cannot be read: {why}"]
    with pytest.raises(errors.Unavailable, match=why):
        await run(running, start("t1"))
    assert {n for n, _ in running.relays.requests} == {"n2"}


async def test_following_a_single_task_waits_until_it_begins(running: Api) -> None:
    web = running.one(Service, "web")
    await running.put(task("t3", web, slot=3, state=TaskState.PREPARING))
    running.relays.scripts = {"t3": [lines((1, "begun")), END]}
    request = LogsRequest(tasks=("t3",), options=LogOptions(follow=True, tail=-1))
    async with asyncio.timeout(5):
        async with aclosing(running.control.logs(request, CONTEXT)) as stream:
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.01)
            assert not first.done()
            await running.put(task("t3", web, slot=3))
            assert [line.data for line in (await first).lines] == [b"begun"]
            # It has begun, and its log has come to its end.
            assert [r async for r in stream] == []


async def test_followed_task_that_is_removed_while_it_cannot_be_read_is_told(
    running: Api, no_pause: None
) -> None:
    running.relays.scripts = {"t1": errors.Unavailable("node n1 has no session")}
    await running.put(node("n1", hostname="host-1", state=NodeState.DOWN))
    request = LogsRequest(tasks=("t1",), options=LogOptions(follow=True, tail=-1))
    said: list[str] = []
    async with asyncio.timeout(5):
        async with aclosing(running.control.logs(request, CONTEXT)) as stream:
            said += (await anext(stream)).problems
            await running.drop(running.stored(type(task("t1", "x")), "t1"))
            async for response in stream:
                said += response.problems
    assert len(said) == 2
    assert said[1].endswith("node n1 has no session; the task was removed, and its logs with it")
