"""Relays: logs, exec and stats from a client of the manager to a task's node and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from manager.dispatcher.relays import BYTES_MAX
from swarm import errors
from swarm.v1 import (
    ExecInput,
    ExecStart,
    LogOptions,
    RelayFrame,
    RelayRequest,
    TaskState,
)
from tests.fakes.waiting import until
from tests.integration.dispatcher.harness import Agent, Manager, cluster

ALL = LogOptions(tail=-1, stdout=True, stderr=True)
FOLLOW = LogOptions(tail=-1, stdout=True, stderr=True, follow=True)


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[Manager, Agent, str]]:
    async with cluster(folder, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(TaskState.RUNNING, task)
        yield manager, agent, task


def text(frames: list[RelayFrame]) -> list[str]:
    return [line.data.decode() for f in frames if f.logs for line in f.logs.lines]


async def test_logs_come_whole_and_in_order(tmp_path: Path) -> None:
    async with running(tmp_path) as (manager, agent, task):
        for number in range(3000):
            agent.runtime.say(task, str(number))
        request = RelayRequest(task_id=task, logs=ALL)
        async with manager.dispatcher.relays.open("n1", request) as relay:
            frames = [f async for f in relay.frames()]
        assert text(frames) == [str(n) for n in range(3000)]
        assert frames[-1].end
        assert len(frames) < 100


async def test_followed_logs_come_as_they_are_written(tmp_path: Path) -> None:
    async with running(tmp_path) as (manager, agent, task):
        agent.runtime.say(task, "one")
        request = RelayRequest(task_id=task, logs=FOLLOW)
        async with manager.dispatcher.relays.open("n1", request) as relay:
            frames = relay.frames()
            assert text([await anext(frames)]) == ["one"]
            agent.runtime.say(task, "two")
            assert text([await anext(frames)]) == ["two"]
        # The client went away: the agent's side ends too.
        await until(lambda: not agent.session.relays)


async def test_slow_reader_holds_up_the_log_reader_and_not_the_memory(tmp_path: Path) -> None:
    async with running(tmp_path) as (manager, agent, task):
        agent.runtime.say(task, "x" * 10_000)
        agent.runtime.containers[task].lines *= 10_000  # 100 MB, far more than all buffers
        request = RelayRequest(task_id=task, logs=ALL)
        async with manager.dispatcher.relays.open("n1", request) as relay:
            first = await anext(relay.frames())
            assert first.logs is not None
            # While nobody reads, heartbeats and tasks go on.
            service = await manager.add_service("other")
            (other,) = await manager.add_tasks(service, "n1")
            await manager.reach(TaskState.RUNNING, other)
            assert relay._incoming._weight <= BYTES_MAX


async def test_exec_carries_input_output_and_exit_code(tmp_path: Path) -> None:
    async with running(tmp_path) as (manager, _, task):
        request = RelayRequest(task_id=task, exec=ExecStart(task=task, command=("cat",)))
        async with manager.dispatcher.relays.open("n1", request) as relay:
            await relay.send(RelayFrame(input=ExecInput(stdin=b"hello")))
            await relay.send(RelayFrame(input=ExecInput(stdin_closed=True)))
            outputs = [f.output async for f in relay.frames() if f.output]
        assert [o.stdout for o in outputs if o.stdout is not None] == [b"hello"]
        assert outputs[0].started
        assert outputs[-1].exit_code == 0
        request = RelayRequest(task_id=task, exec=ExecStart(task=task, command=("exit", "7")))
        async with manager.dispatcher.relays.open("n1", request) as relay:
            outputs = [f.output async for f in relay.frames() if f.output]
        assert outputs[-1].exit_code == 7


async def test_input_that_nobody_reads_does_not_keep_a_finished_command(tmp_path: Path) -> None:
    async with running(tmp_path) as (manager, _, task):
        request = RelayRequest(task_id=task, exec=ExecStart(task=task, command=("exit", "0")))
        async with manager.dispatcher.relays.open("n1", request) as relay:

            async def feed() -> None:
                while True:
                    await relay.send(RelayFrame(input=ExecInput(stdin=b"x" * 1000)))

            feeding = asyncio.create_task(feed())
            frames = [f async for f in relay.frames()]
            assert frames[-1].end
            with pytest.raises(errors.Unavailable, match="has ended"):
                await asyncio.wait_for(feeding, 10)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (RelayRequest(task_id="nope", logs=ALL), "task nope is not on this node"),
        (RelayRequest(task_id=""), "is not on this node"),
    ],
    ids=["unknown task", "no task"],
)
async def test_what_the_agent_cannot_do_comes_back_as_the_reason(
    tmp_path: Path, request_: RelayRequest, reason: str
) -> None:
    async with running(tmp_path) as (manager, _, _task):
        async with manager.dispatcher.relays.open("n1", request_) as relay:
            frames = [f async for f in relay.frames()]
        assert frames[-1].error is not None
        assert reason in frames[-1].error


async def test_command_that_cannot_run_comes_back_as_the_reason(tmp_path: Path) -> None:
    async with running(tmp_path) as (manager, _, task):
        request = RelayRequest(task_id=task, exec=ExecStart(task=task, command=("missing",)))
        async with manager.dispatcher.relays.open("n1", request) as relay:
            frames = [f async for f in relay.frames()]
        assert frames[-1].error == "missing: executable file not found"


async def test_relay_to_a_node_without_session_is_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1", start=False) as (manager, _):
        with pytest.raises(errors.Unavailable, match="node n1 has no session"):
            async with manager.dispatcher.relays.open("n1", RelayRequest(task_id="t", logs=ALL)):
                pass
        assert manager.dispatcher._local._open == {}


async def test_node_lost_in_the_middle_ends_the_relay_with_an_error(tmp_path: Path) -> None:
    async with running(tmp_path) as (manager, agent, task):
        agent.runtime.say(task, "one")
        request = RelayRequest(task_id=task, logs=FOLLOW)
        async with manager.dispatcher.relays.open("n1", request) as relay:
            frames = relay.frames()
            await anext(frames)
            await agent.stop()
            with pytest.raises(errors.Unavailable, match="broke off"):
                await asyncio.wait_for(anext(frames), 10)
