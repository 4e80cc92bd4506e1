"""What nodes and their tasks use, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from manager.api import usage as usage_module
from swarm import errors
from swarm.clock import SECOND_NS
from swarm.v1 import (
    NodeState,
    NodeUsage,
    RelayFrame,
    Service,
    StackSpec,
    StatsRequest,
    StatsResponse,
    TaskStats,
    UsageOptions,
)
from tests.unit.api.harness import CONTEXT, Api, FakeRelays, changed, node, service, task

END = RelayFrame(end=True)


def frame(at_ns: int, *task_ids: str, problems: tuple[str, ...] = ()) -> RelayFrame:
    tasks = tuple(TaskStats(task_id=i, timestamp_ns=at_ns) for i in task_ids)
    return RelayFrame(usage=NodeUsage(timestamp_ns=at_ns, tasks=tasks, problems=problems))


def says(*frames: RelayFrame, then: asyncio.Event | None = None) -> Callable[..., Any]:
    """A node that says this and then nothing."""

    async def script(_: FakeRelays) -> AsyncIterator[RelayFrame]:
        for one in frames:
            yield one
        await (then or asyncio.Event()).wait()

    return script


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("GATHER_S", 0.005),
        ("SETTLE_S", 0.01),
        ("RETRY_S_MIN", 0.005),
        ("RETRY_S_MAX", 0.02),
        ("SILENT_S", 0.05),
        ("ONCE_S_MAX", 0.05),
    ):
        monkeypatch.setattr(usage_module, name, value)


@pytest.fixture
async def running(api: Api) -> Api:
    """A service with a task on each of two nodes."""
    await api.put(node("n1", hostname="host-1"), node("n2", hostname="host-2"))
    await api.create(service=service("web", replicas=2))
    web = api.one(Service, "web")
    first = changed(task("t1", web, node_id="n1"), assigned_gpus=("GPU-1",))
    await api.put(first, task("t2", web, slot=2, node_id="n2"))
    return api


async def read(
    api: Api, enough: Callable[[list[StatsResponse]], object], **fields: Any
) -> list[StatsResponse]:
    """The stream until there is enough of it, or it ends."""
    got: list[StatsResponse] = []
    async with asyncio.timeout(5):
        async with aclosing(api.control.stats(StatsRequest(**fields), CONTEXT)) as stream:
            async for response in stream:
                got.append(response)
                if enough(got):
                    break
    return got


def nodes(got: list[StatsResponse]) -> list[NodeUsage]:
    return [usage for response in got for usage in response.nodes]


def problems(got: list[StatsResponse]) -> list[str]:
    return [problem for response in got for problem in response.problems]


async def test_names_slots_and_gpus_are_filled_in(running: Api) -> None:
    running.relays.scripts = {"n1": says(frame(1, "t1")), "n2": says(frame(2, "t2", "stray"))}
    got = nodes(await read(running, lambda g: len(nodes(g)) == 2))
    first, second = sorted(got, key=lambda u: u.node_id)
    assert (first.node_id, first.node_name) == ("n1", "host-1")
    assert first.tasks == (
        TaskStats(task_id="t1", timestamp_ns=1, service_name="web", slot=1, gpus=("GPU-1",)),
    )
    assert [(t.service_name, t.slot) for t in second.tasks] == [("web", 2), ("", 0)]


ALL = UsageOptions(period_ns=SECOND_NS)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"n1": ALL, "n2": ALL}),
        ({"nodes": ("host-2",)}, {"n2": ALL}),
        ({"tasks": ("web.1",)}, {"n1": UsageOptions(period_ns=SECOND_NS, task_ids=("t1",))}),
        (
            {"nodes_only": True, "period_ns": 5 * SECOND_NS},
            {i: UsageOptions(period_ns=5 * SECOND_NS, node_only=True) for i in ("n1", "n2")},
        ),
        ({"nodes": ("n1",), "tasks": ("t2",)}, {"n1": ALL, "n2": ...}),
    ],
)
async def test_nodes_are_asked_for_what_is_wanted(
    running: Api, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    running.relays.scripts = {"n1": says(frame(1)), "n2": says(frame(1))}
    await read(running, lambda g: len(nodes(g)) == len(expected), **fields)
    asked = {node_id: request.usage for node_id, request in running.relays.requests}
    assert set(asked) == set(expected)
    assert all(asked[i] == options for i, options in expected.items() if options is not ...)


async def test_services_and_stacks_are_asked_for_by_their_ids(running: Api) -> None:
    await running.deploy(StackSpec(name="app", services=(service("app_a"),)))
    app = running.one(Service, "app_a")
    await running.put(task("t9", app, node_id="n2"))
    running.relays.scripts = {"n1": says(frame(1)), "n2": says(frame(1))}
    await read(running, lambda g: len(nodes(g)) == 1, stack="app")
    assert [(i, r.usage and r.usage.service_ids) for i, r in running.relays.requests] == [
        ("n2", (app.id,))
    ]


async def test_tasks_and_nodes_that_come_are_followed_and_those_that_go(running: Api) -> None:
    web = running.one(Service, "web")
    running.relays.scripts = {i: says(frame(1)) for i in ("n1", "n2", "n3")}
    heard: list[str] = []
    async with asyncio.timeout(5):
        stream = running.control.stats(StatsRequest(services=("web",)), CONTEXT)
        async with aclosing(stream):
            while len(heard) < 2:
                heard += [u.node_id for u in (await anext(stream)).nodes]
            await running.put(node("n3"), task("t3", web, slot=3, node_id="n3"))
            while "n3" not in heard:
                heard += [u.node_id for u in (await anext(stream)).nodes]
            await running.drop(running.stored(type(task("t3", web)), "t3"))
            await asyncio.sleep(0.1)
    assert sorted(heard) == ["n1", "n2", "n3"]


async def test_node_whose_relay_breaks_is_read_on(running: Api) -> None:
    count = 0

    async def breaking(_: FakeRelays) -> AsyncIterator[RelayFrame]:
        nonlocal count
        count += 1
        yield frame(count)
        raise errors.Unavailable("node n1 has moved to another manager")

    running.relays.scripts = {"n1": breaking}
    got = await read(running, lambda g: len(nodes(g)) >= 3, nodes=("n1",))
    times = [u.timestamp_ns for u in nodes(got)]
    assert times == sorted(set(times))
    assert count >= 3
    assert problems(got) == []


async def test_node_that_is_silent_is_told_once_and_the_rest_goes_on(running: Api) -> None:
    await running.put(node("n2", hostname="host-2", state=NodeState.DOWN))

    async def ticking(_: FakeRelays) -> AsyncIterator[RelayFrame]:
        for at in range(1000):
            yield frame(at)
            await asyncio.sleep(0.02)

    running.relays.scripts = {"n1": ticking, "n2": errors.Unavailable("node n2 has no session")}
    got = await read(running, lambda g: len(nodes(g)) >= 10)
    assert problems(got) == [
        "node host-2 (which is down) cannot be measured: node n2 has no session"
    ]


async def test_what_an_agent_cannot_measure_is_told(running: Api) -> None:
    running.relays.scripts = {
        "n1": says(frame(1, problems=("task web.1 cannot be measured: no",))),
        "n2": [RelayFrame(error="this agent does not know this kind of stream; update swarmd")],
    }
    got = await read(running, lambda g: len(problems(g)) == 2)
    assert sorted(problems(got)) == [
        "node host-1: task web.1 cannot be measured: no",
        "node host-2 cannot be measured: this agent does not know this kind of stream; update "
        "swarmd",
    ]
    assert all(not u.problems for u in nodes(got))


async def test_once_ends_after_two_measurements_of_each_node(running: Api) -> None:
    await running.put(node("n3", state=NodeState.DOWN))
    running.relays.scripts = {
        "n1": [frame(1, "t1"), frame(2, "t1"), END],
        "n2": [frame(1, "t2"), frame(2, "t2"), END],
        "n3": errors.Unavailable("it has no session"),
    }
    got = await read(running, lambda _: False, once=True)
    for response in got:
        assert len({u.node_id for u in response.nodes}) == len(response.nodes)
    assert sorted((u.node_id, u.timestamp_ns) for u in nodes(got)) == [
        ("n1", 1),
        ("n1", 2),
        ("n2", 1),
        ("n2", 2),
    ]
    assert len(problems(got)) == 1
    assert all(r.usage and r.usage.once for _, r in running.relays.requests)


async def test_slow_caller_gets_the_newest_of_each_task(running: Api) -> None:
    running.relays.scripts = {
        "n1": says(frame(1, "t1", "late"), *(frame(at, "t1") for at in range(2, 500)))
    }
    async with asyncio.timeout(5):
        stream = running.control.stats(StatsRequest(nodes=("n1",)), CONTEXT)
        async with aclosing(stream):
            got = nodes([await anext(stream)])
    assert [(u.timestamp_ns, {t.task_id: t.timestamp_ns for t in u.tasks}) for u in got] == [
        (499, {"late": 1, "t1": 499})
    ]


async def test_caller_that_leaves_ends_all_relays(running: Api) -> None:
    ended: list[int] = []

    async def held(_: FakeRelays) -> AsyncIterator[RelayFrame]:
        try:
            yield frame(1)
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    running.relays.scripts = {"n1": held, "n2": held}
    await read(running, lambda g: len(nodes(g)) == 2)
    for _ in range(10):
        await asyncio.sleep(0)
    assert ended == [1, 1]


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"services": ("nope",)}, errors.NotFound, "service nope not found"),
        ({"nodes": ("nope",)}, errors.NotFound, "node nope not found"),
        ({"period_ns": 1}, errors.Invalid, "it must be from 0.2 s to 3,600 s"),
        ({"period_ns": 4000 * SECOND_NS}, errors.Invalid, "it must be from 0.2 s"),
        ({"period_ns": SECOND_NS // 5}, errors.Exhausted, "ask for a period of at least 0.4 s"),
    ],
)
async def test_bad_requests(
    running: Api,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(usage_module, "LINES_PER_S_MAX", 10)
    with pytest.raises(kind, match=message):
        await read(running, lambda _: True, **fields)


async def test_too_many_nodes_are_refused_and_too_many_lines_take_their_time(
    running: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_module, "LINES_PER_S_MAX", 2)
    running.relays.scripts = {"n1": says(frame(1))}
    await read(running, lambda g: nodes(g))
    assert running.relays.requests[0][1].usage == UsageOptions(period_ns=2 * SECOND_NS)
    monkeypatch.setattr(usage_module, "NODES_MAX", 1)
    with pytest.raises(errors.Exhausted, match="2 nodes are concerned, and one call measures"):
        await read(running, lambda _: True)
