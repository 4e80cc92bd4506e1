"""Streams to nodes whose session is with another manager."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from manager.api.relays import LogReader
from manager.dispatcher.relays import BYTES_MAX
from manager.store import Draft
from swarm import errors
from swarm.v1 import (
    ExecInput,
    ExecStart,
    Goodbye,
    LogOptions,
    LogsRequest,
    Node,
    NodeState,
    NodeStatus,
    RelayFrame,
    RelayRequest,
    TaskState,
)
from tests.fakes.waiting import until
from tests.integration.dispatcher.harness import Agent, Manager, managers
from tests.integration.dispatcher.test_relays import ALL, FOLLOW, text


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[Manager, Manager, Agent, str]]:
    """A manager that is asked, the one that has the node's session, the agent, and its task."""
    async with managers(folder, 2, "n1") as ((holder, asked), (agent,)):
        service = await holder.add_service("web")
        (task,) = await holder.add_tasks(service, "n1")
        await holder.reach(TaskState.RUNNING, task)
        yield asked, holder, agent, task


async def test_logs_of_another_managers_node_come_whole_and_in_order(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, _, agent, task):
        for number in range(3000):
            agent.runtime.say(task, str(number))
        async with asked.dispatcher.relays.open("n1", RelayRequest(task_id=task, logs=ALL)) as r:
            frames = [f async for f in r.frames()]
        assert text(frames) == [str(n) for n in range(3000)]
        assert frames[-1].end
        assert asked.dispatcher.relays._links == {}


async def test_exec_goes_both_ways_through_another_manager(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, _, _, task):
        request = RelayRequest(task_id=task, exec=ExecStart(task=task, command=("cat",)))
        async with asked.dispatcher.relays.open("n1", request) as relay:
            await relay.send(RelayFrame(input=ExecInput(stdin=b"hello")))
            await relay.send(RelayFrame(input=ExecInput(stdin_closed=True)))
            outputs = [f.output async for f in relay.frames() if f.output]
        assert [o.stdout for o in outputs if o.stdout is not None] == [b"hello"]
        assert outputs[-1].exit_code == 0


async def test_slow_reader_holds_up_the_node_through_two_managers(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, holder, agent, task):
        agent.runtime.say(task, "x" * 2_000)
        agent.runtime.containers[task].lines *= 100_000  # 200 MB, far more than all buffers
        async with asked.dispatcher.relays.open("n1", RelayRequest(task_id=task, logs=ALL)) as r:
            assert (await anext(r.frames())).logs is not None
            (relay,) = holder.dispatcher._local._open.values()
            await until(lambda: relay._incoming._weight > BYTES_MAX // 2)
            assert r._incoming._weight <= BYTES_MAX
        await until(lambda: not agent.session.relays)


async def test_client_that_goes_away_ends_the_agents_side(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, holder, agent, task):
        agent.runtime.say(task, "one")
        async with asked.dispatcher.relays.open("n1", RelayRequest(task_id=task, logs=FOLLOW)) as r:
            assert text([await anext(r.frames())]) == ["one"]
            assert agent.session.relays == 1
        await until(lambda: not agent.session.relays)
        await until(lambda: not holder.dispatcher._local._open)


async def test_what_the_agent_cannot_do_comes_back_through_both(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, _, _, _task):
        request = RelayRequest(task_id="nope", logs=ALL)
        async with asked.dispatcher.relays.open("n1", request) as relay:
            frames = [f async for f in relay.frames()]
        assert frames[-1].error is not None
        assert "task nope is not on this node" in frames[-1].error


async def test_errors_of_the_other_manager_keep_their_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as (asked, holder, _, task):

        def refuses(request: RelayRequest) -> None:
            raise errors.Exhausted("too many streams")

        monkeypatch.setattr(holder.dispatcher._sessions["n1"], "ask_relay", refuses)
        with pytest.raises(errors.Exhausted, match="too many streams"):
            async with asked.dispatcher.relays.open("n1", RelayRequest(task_id=task, logs=ALL)):
                pass
        assert asked.dispatcher.relays._links == {}


async def test_many_streams_share_one_connection(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, _, agent, task):
        agent.runtime.say(task, "one")
        async with contextlib.AsyncExitStack() as stack:
            request = RelayRequest(task_id=task, logs=FOLLOW)
            for _ in range(50):
                relay = await stack.enter_async_context(asked.dispatcher.relays.open("n1", request))
                assert text([await anext(relay.frames())]) == ["one"]
            assert len(asked.dispatcher.relays._links) == 1


async def test_node_without_a_session_anywhere_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, holder, agent, task):
        await agent.stop()
        await asked.node_reaches("n1", NodeState.DOWN)
        with pytest.raises(errors.Unavailable, match="node n1 has no session with any manager"):
            async with asked.dispatcher.relays.open("n1", RelayRequest(task_id=task, logs=ALL)):
                pass
        assert holder.dispatcher._local._open == {}


async def test_stream_to_a_node_that_is_moving_waits_for_it(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, holder, agent, task):
        agent.runtime.say(task, "one")

        def mistake(draft: Draft) -> None:
            """The store says that the session is where it is not."""
            node = draft.get(Node, "n1")
            assert node is not None
            wrong = NodeStatus(state=NodeState.READY, manager_id="m2", session_id="x")
            draft.put(Node(id="n1", spec=node.spec, status=wrong, meta=node.meta))

        holder.dispatcher._sessions["n1"].entered = False
        await asked.store.update(mistake)

        async def read() -> list[str]:
            request = RelayRequest(task_id=task, logs=ALL)
            async with asked.dispatcher.relays.open("n1", request) as relay:
                return text([f async for f in relay.frames()])

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        assert not reading.done()
        holder.dispatcher._sessions["n1"].end(Goodbye(reason="rebalance"))
        assert await asyncio.wait_for(reading, 5) == ["one"]


@pytest.mark.parametrize("how", ["killed", "gone from the log only"])
async def test_manager_that_dies_while_it_forwards_is_an_error_within_seconds(
    tmp_path: Path, how: str
) -> None:
    async with running(tmp_path) as (asked, holder, agent, task):
        agent.runtime.say(task, "one")
        async with asked.dispatcher.relays.open("n1", RelayRequest(task_id=task, logs=FOLLOW)) as r:
            frames = r.frames()
            await anext(frames)
            if how == "killed":
                await holder.kill()
            else:
                assert holder._log is not None
                holder._log.leave("m1")
            with pytest.raises(errors.Unavailable):
                await asyncio.wait_for(anext(frames), 3)
            with pytest.raises(errors.Unavailable, match="has ended"):
                await r.send(RelayFrame(input=ExecInput(stdin=b"x")))


async def test_followed_logs_go_on_when_the_node_moves_to_another_manager(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, holder, agent, task):
        request = LogsRequest(tasks=(task,), options=LogOptions(tail=-1, follow=True))
        reader = LogReader(asked.store, asked.dispatcher.relays, request)
        got: list[str] = []
        problems: list[str] = []

        async def read() -> None:
            async for response in reader.read():
                got.extend(line.data.decode() for line in response.lines)
                problems.extend(response.problems)

        reading = asyncio.create_task(read())
        said = 0
        try:
            for manager in (holder, asked, holder):
                for _ in range(20):
                    agent.runtime.say(task, str(said))
                    said += 1
                await until(lambda n=said: len(got) == n, what=lambda: (got, problems))  # type: ignore[misc]
                session = manager.dispatcher._sessions.get("n1")
                if session is not None:
                    session.end(Goodbye(reason="rebalance"))
                await until(lambda s=session: _elsewhere(holder, asked, s), what=lambda: problems)  # type: ignore[misc]
            agent.runtime.say(task, "last")
            await until(lambda: got[-1:] == ["last"], what=lambda: (got, problems))
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        assert got == [*(str(n) for n in range(said)), "last"]
        assert problems == []


def _elsewhere(one: Manager, other: Manager, session: object) -> bool:
    """Whether the node has another session."""
    found = [m.dispatcher._sessions.get("n1") for m in (one, other)]
    return any(s is not None and s is not session and s.entered for s in found)


async def test_agent_whose_manager_is_killed_has_another_within_a_second(tmp_path: Path) -> None:
    async with running(tmp_path) as (asked, holder, agent, task):
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        await holder.kill()
        await until(lambda: asked.node_status("n1").manager_id == "m2", timeout_s=3)
        await agent.connected()
        assert loop.time() - begun_s < 1.5
        assert asked.state(task) == TaskState.RUNNING
        assert agent.runtime.starts[task] == 1
