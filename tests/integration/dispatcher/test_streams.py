"""Logs, usage and copies of many tasks, through the API, while sessions are cut and move between
managers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from manager.api import relays as relays_module
from manager.api.copying import run_copy
from manager.api.merging import QUEUED_MAX
from manager.api.relays import LogReader
from manager.api.usage import UsageReader
from swarm import errors
from swarm.clock import SECOND_NS
from swarm.v1 import (
    CopyInput,
    CopyOutput,
    CopyStart,
    LogLine,
    LogOptions,
    LogsRequest,
    NodeState,
    NodeUsage,
    StatsRequest,
    TaskState,
)
from tests.fakes.waiting import until
from tests.integration.dispatcher.harness import Agent, Manager, address, managers

NODES = ("n1", "n2", "n3", "n4", "n5")
TASKS = 10  # of each node


@contextlib.asynccontextmanager
async def running(
    folder: Path, nodes: tuple[str, ...] = NODES, tasks: int = TASKS
) -> AsyncIterator[tuple[list[Manager], dict[str, Agent], dict[str, list[str]]]]:
    """Two managers, agents that are with the first, and tasks of a service."""
    async with managers(folder, 2, *nodes) as (made, agents):
        service = await made[0].add_service("web")
        ids = {node: await made[0].add_tasks(service, node, tasks) for node in nodes}
        await made[0].reach(TaskState.RUNNING, *(t for of in ids.values() for t in of))
        yield made, {a.node_id: a for a in agents}, ids


async def move(agent: Agent, manager: str) -> None:
    """Ends the agent's session at once; the next one is with this manager."""
    await agent.stop()
    await agent.start(address(manager))
    await agent.connected()


class Reading:
    """A client that reads logs and keeps what it gets."""

    def __init__(self, manager: Manager, request: LogsRequest) -> None:
        self.lines: list[LogLine] = []
        self.problems: list[str] = []
        self.reader = LogReader(manager.store, manager.dispatcher.relays, request)
        self.go = asyncio.Event()
        self.go.set()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with aclosing(self.reader.read()) as responses:
            async for response in responses:
                self.lines += response.lines
                self.problems += response.problems
                await self.go.wait()

    def by_task(self) -> dict[str, list[str]]:
        out = defaultdict(list)
        for line in self.lines:
            out[line.task_id].append(line.data.decode())
        return out

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_followed_lines_come_once_each_and_in_order_while_sessions_move(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as (made, agents, ids):
        expected: dict[str, list[str]] = defaultdict(list)

        def say(count: int) -> None:
            for node, tasks in ids.items():
                for task in tasks:
                    for _ in range(count):
                        text = str(len(expected[task]))
                        expected[task].append(text)
                        agents[node].runtime.say(task, text)

        say(20)
        options = LogOptions(follow=True, tail=-1)
        reading = Reading(made[0], LogsRequest(services=("web",), options=options))

        async def moving() -> None:
            for turn in range(2):
                for number, node in enumerate(NODES[:4]):
                    await move(agents[node], f"m{(number + turn) % 2 + 1}")

        async with asyncio.timeout(60):
            moves = asyncio.create_task(moving())
            while not moves.done():
                say(3)
                await asyncio.sleep(0.02)
            await moves
            # The next attempt of a slot joins.
            (new,) = await made[0].add_tasks("s-web", "n5")
            await made[0].reach(TaskState.RUNNING, new)
            ids["n5"].append(new)
            say(20)
            total = sum(len(lines) for lines in expected.values())
            await until(lambda: len(reading.lines) >= total, timeout_s=20)
        await reading.close()
        assert reading.by_task() == expected
        assert reading.problems == []


async def test_node_that_is_away_for_long_is_told_and_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays_module, "RESUME_S", 0.3)
    async with running(tmp_path, ("n1",), 1) as (made, agents, ids):
        (task,) = ids["n1"]
        agents["n1"].runtime.say(task, "before")
        options = LogOptions(follow=True, tail=-1)
        reading = Reading(made[1], LogsRequest(services=("web",), options=options))
        await until(lambda: len(reading.lines) == 1)
        await agents["n1"].stop()
        await until(lambda: reading.problems, timeout_s=20)
        agents["n1"].runtime.say(task, "meanwhile")
        await agents["n1"].start(address("m2"))
        await until(lambda: len(reading.lines) == 2, timeout_s=20)
        await reading.close()
        assert reading.by_task() == {task: ["before", "meanwhile"]}
        assert len(reading.problems) == 1
        assert "cannot be read" in reading.problems[0]


async def test_whole_logs_are_in_order_of_time_over_nodes_and_managers(tmp_path: Path) -> None:
    async with running(tmp_path, NODES[:2], 5) as (made, agents, ids):
        await move(agents["n2"], "m2")
        for node, tasks in ids.items():
            for task in tasks:
                for number in range(300):
                    agents[node].runtime.say(task, str(number))
        async with asyncio.timeout(30):
            reading = Reading(made[0], LogsRequest(services=("web",)))
            await reading.task
        times = [line.timestamp_ns for line in reading.lines]
        assert len(times) == 3000
        assert times == sorted(times)


async def test_slow_client_keeps_little_in_memory(tmp_path: Path) -> None:
    async with running(tmp_path, NODES[:1], 5) as (made, agents, ids):
        for task in ids["n1"]:
            agents["n1"].runtime.say(task, "x" * 100_000)
            agents["n1"].runtime.containers[task].lines *= 1_000  # 100 MB each
        reading = Reading(made[0], LogsRequest(services=("web",)))
        reading.go.clear()
        relays = made[0].dispatcher._local._open
        sources = reading.reader._merger._open
        await until(lambda: len(sources) == 5 and all(s.lines for s in sources))
        before = -1
        while before != (before := sum(r._incoming._weight for r in relays.values())):
            await asyncio.sleep(0.2)
        assert before <= 5 * 1_000_000
        assert all(s.bytes <= 300_000 and len(s.lines) <= QUEUED_MAX for s in sources)
        assert sum(len(line.data) for line in reading.lines) <= 2_000_000
        await reading.close()
        await until(lambda: not agents["n1"].session.relays)


async def test_long_lines_pass(tmp_path: Path) -> None:
    async with running(tmp_path, NODES[:1], 1) as (made, agents, ids):
        (task,) = ids["n1"]
        for _ in range(60):
            agents["n1"].runtime.say(task, "x" * 1_000_000)  # more than one message may hold
        async with asyncio.timeout(30):
            reading = Reading(made[0], LogsRequest(tasks=(task,)))
            await reading.task
        assert [len(line.data) for line in reading.lines] == [1_000_000] * 60


async def test_usage_goes_on_over_moves_and_follows_tasks(tmp_path: Path) -> None:
    async with running(tmp_path, NODES[:2], 3) as (made, agents, ids):
        request = StatsRequest(services=("web",), period_ns=SECOND_NS // 5)
        heard: list[NodeUsage] = []
        problems: list[str] = []

        async def read() -> None:
            reader = UsageReader(made[0].store, made[0].dispatcher.relays, request)
            async with aclosing(reader.read()) as responses:
                async for response in responses:
                    heard.extend(response.nodes)
                    problems.extend(response.problems)

        reading = asyncio.create_task(read())
        try:
            await until(lambda: {u.node_id for u in heard} == {"n1", "n2"})
            for usage in heard:
                assert sorted(s.task_id for s in usage.tasks) == sorted(ids[usage.node_id])
                assert {s.service_name for s in usage.tasks} == {"web"}
            await move(agents["n2"], "m2")
            heard.clear()
            await until(lambda: {u.node_id for u in heard} == {"n1", "n2"})
            (new,) = await made[0].add_tasks("s-web", "n1")
            await until(lambda: any(s.task_id == new for u in heard for s in u.tasks))
            assert problems == []
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: not any(a.session.relays for a in agents.values()))


async def copied(
    manager: Manager, start: CopyStart, *parts: bytes, end: bool = True
) -> list[CopyOutput]:
    async def inputs() -> AsyncIterator[CopyInput]:
        yield CopyInput(start=start)
        for part in parts:
            yield CopyInput(data=part)
        if end:
            yield CopyInput(end=True)

    async with asyncio.timeout(20):
        outputs = run_copy(manager.store, manager.dispatcher.relays, inputs(), who="ada")
        return [output async for output in outputs]


async def test_copies_go_through_managers_both_ways(tmp_path: Path) -> None:
    async with running(tmp_path, NODES[:1], 1) as (made, agents, ids):
        (task,) = ids["n1"]
        await move(agents["n1"], "m2")
        await made[1].node_reaches("n1", NodeState.READY)
        whole = bytes(range(256)) * 20_000
        into = CopyStart(task=task, path="/f", into=True)
        parts = [whole[at : at + 1_000_000] for at in range(0, len(whole), 1_000_000)]
        assert await copied(made[0], into, *parts) == [CopyOutput(done=True)]
        assert agents["n1"].runtime.containers[task].files["/f"] == whole
        out = await copied(made[0], CopyStart(task=task, path="/f"))
        assert b"".join(o.data for o in out if o.data is not None) == whole
        assert (out[0].stat and out[0].stat.size_bytes, out[-1].done) == (len(whole), True)
        with pytest.raises(errors.NotFound, match="/g: no such file or folder"):
            await copied(made[0], CopyStart(task=task, path="/g"))
        with pytest.raises(errors.Conflict, match="/nowhere: no such folder"):
            await copied(made[0], CopyStart(task=task, path="/nowhere", into=True), *parts)


async def test_copy_ends_with_an_error_when_the_session_moves(tmp_path: Path) -> None:
    async with running(tmp_path, NODES[:1], 1) as (made, agents, ids):
        (task,) = ids["n1"]
        agents["n1"].runtime.containers[task].files["/f"] = bytes(50_000_000)
        outputs = run_copy(
            made[0].store,
            made[0].dispatcher.relays,
            only(CopyInput(start=CopyStart(task=task, path="/f"))),
            who="ada",
        )
        async with aclosing(outputs) as stream:
            assert (await anext(stream)).stat
            await anext(stream)
            await agents["n1"].stop()
            with pytest.raises(errors.Unavailable, match="only a part"):
                await asyncio.wait_for(rest(stream), 20)


async def test_archive_without_an_end_is_not_unpacked_as_whole(tmp_path: Path) -> None:
    async with running(tmp_path, NODES[:1], 1) as (made, agents, ids):
        (task,) = ids["n1"]
        into = CopyStart(task=task, path="/f", into=True)
        with pytest.raises(errors.Invalid, match="broke off before its end; a part of it may be"):
            await copied(made[0], into, b"half", end=False)
        await until(lambda: not agents["n1"].session.relays)


async def rest(stream: AsyncIterator[CopyOutput]) -> None:
    async for _ in stream:
        pass


async def only(message: CopyInput) -> AsyncIterator[CopyInput]:
    yield message
