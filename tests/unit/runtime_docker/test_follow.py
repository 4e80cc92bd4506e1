"""Following logs when the engine ends the stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent.runtime.docker import DockerRuntime
from agent.runtime.docker.watch import Watched
from swarm.clock import SystemClock
from swarm.errors import Unavailable
from swarm.v1 import LogLine, LogOptions

TEXT = b"2026-11-21T09:44:52.946163064Z one\n"
FRAME = b"\1\0\0\0" + len(TEXT).to_bytes(4, "big") + TEXT


class Engine:
    """Gives one line and ends the stream; the container goes through the states."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.parts = [FRAME, b""]

    @contextlib.asynccontextmanager
    async def stream(self, *_: object, **__: object) -> AsyncIterator[None]:
        yield None

    async def read(self, _: object) -> bytes:
        return self.parts.pop(0)

    async def call(self, *_: object, **__: object) -> dict[str, Any]:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return {"State": {"Status": state}}


async def follow(engine: Engine, until_ns: int = 0) -> list[LogLine]:
    runtime = DockerRuntime(socket="none", node_id="n", cluster_id="c", clock=SystemClock())
    runtime._engine = engine  # type: ignore[assignment]  # as much of one as is needed
    runtime._watchlist.add(Watched("t1", "c1"))
    options = LogOptions(follow=True, tail=-1, until_ns=until_ns)
    return [line async for line in runtime.logs("t1", options)]


async def test_the_end_of_the_stream_of_a_task_that_runs_on_is_no_end() -> None:
    with pytest.raises(Unavailable, match="runs on"):
        await follow(Engine("running"))


async def test_the_end_of_a_task_ends_the_following() -> None:
    for engine in (Engine("exited"), Engine("running", "running", "exited")):
        assert [line.data for line in await follow(engine)] == [b"one"]


async def test_what_is_followed_to_a_time_ends_there() -> None:
    assert [line.data for line in await follow(Engine("running"), until_ns=2**62)] == [b"one"]
