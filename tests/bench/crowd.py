"""The agents of the benches, all in one process: each has its own session and worker, over real
gRPC, and a runtime in memory that takes its time.

The process is told by lines on standard input and answers with one line of JSON for each: `stats`,
and its end. State files are kept where the caller says: of a thousand agents on one machine they
belong into memory, since in truth each has a disk of its own.
"""

from __future__ import annotations

import asyncio
import functools
import json
import resource
import sys
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Sequence,
)
from contextlib import aclosing
from pathlib import Path
from typing import Any, TextIO, cast

from agent import published
from agent.description import About
from agent.session import Session
from agent.state import StateFile
from agent.worker import Worker
from swarm.clock import SystemClock
from swarm.ids import seeded_rng
from swarm.rpc import Channel, Method
from swarm.v1 import AgentMessage, ClusterInfo, ManagerMessage
from tests.fakes.runtime import FakeIngress, FakeRuntime, Script

# What an image that is there and a container take on a real engine.
PREPARE_S, START_S, STOP_S = 0.1, 0.3, 0.1
LAG_S = 0.05

Connect = Callable[[str], Awaitable[Channel]]


class Pulse:
    """How one process' heartbeats were answered."""

    def __init__(self) -> None:
        self.sent = 0
        # Heartbeats that were not answered before the next one was said.
        self.misses = 0
        self.sessions = 0
        self.answer_s_max = 0.0

    def reset(self) -> None:
        """Counts from now."""
        self.sent = self.misses = self.sessions = 0
        self.answer_s_max = 0.0


class Heard(Channel):
    """A channel that notes when heartbeats of its session are said and answered."""

    def __init__(self, channel: Channel, pulse: Pulse) -> None:
        super().__init__(channel._channel, channel.target)
        self._pulse = pulse
        self._said_s: float | None = None
        self._session = False

    def stream_stream(
        self,
        method: Method,
        response: type[Any],
        request: AsyncIterable[Any],
        timeout_s: float | None,
    ) -> AsyncIterator[Any]:
        if method.name != "session":
            return super().stream_stream(method, response, request, timeout_s)
        return self._answers(
            super().stream_stream(method, response, self._says(request), timeout_s)
        )

    async def _says(self, request: AsyncIterable[AgentMessage]) -> AsyncIterator[AgentMessage]:
        loop = asyncio.get_running_loop()
        async for message in request:
            if message.heartbeat is not None:
                self._pulse.sent += 1
                self._pulse.misses += self._said_s is not None
                self._said_s = loop.time()
            yield message

    async def _answers(
        self, answers: AsyncIterator[ManagerMessage]
    ) -> AsyncIterator[ManagerMessage]:
        loop = asyncio.get_running_loop()
        self._pulse.sessions += 1
        async with aclosing(cast("AsyncGenerator[ManagerMessage]", answers)):
            async for message in answers:
                if message.heartbeat is not None and self._said_s is not None:
                    took_s = loop.time() - self._said_s
                    self._pulse.answer_s_max = max(self._pulse.answer_s_max, took_s)
                    self._said_s = None
                yield message


class Crowd:
    """So many agents."""

    def __init__(self, node_ids: Sequence[str], connector: Callable[[str], Connect]) -> None:
        self._node_ids = node_ids
        self._connector = connector
        self.pulse = Pulse()
        self.runtimes: dict[str, FakeRuntime] = {}
        self.sessions: list[Session] = []

    async def run(self, managers: Sequence[str], folder: Path) -> None:
        """Until cancelled."""
        rng = seeded_rng(7)
        script = Script(prepare_s=PREPARE_S, start_s=START_S, stop_s=STOP_S)

        async def learn(_: ClusterInfo) -> None: ...

        async with asyncio.TaskGroup() as group:
            for node_id in self._node_ids:
                runtime = self.runtimes[node_id] = FakeRuntime(script=lambda _: script)
                worker = Worker(
                    runtimes=[runtime],
                    ingress=FakeIngress(),
                    state=StateFile(folder / node_id),
                    about=About(node_id, "bench", data_path_addr="10.0.0.1", data_path_port=1),
                    clock=SystemClock(),
                )
                group.create_task(worker.run(lambda: None))
                session = Session(
                    worker,
                    connect=self._heard(self._connector(node_id)),
                    managers=managers,
                    rng=rng,
                    on_cluster=learn,
                )
                self.sessions.append(session)
                group.create_task(session.run())

    def _heard(self, connect: Connect) -> Connect:
        async def connect_heard(address: str) -> Channel:
            return Heard(await connect(address), self.pulse)

        return connect_heard

    def stats(self) -> dict[str, Any]:
        """What has become of the agents and their tasks."""
        starts: Counter[str] = Counter()
        for runtime in self.runtimes.values():
            starts.update(runtime.starts)
        return {
            "connected": sum(s.connected for s in self.sessions),
            "running": sum(len(r.running()) for r in self.runtimes.values()),
            "started": sum(starts.values()),
            "started_again": sum(n - 1 for n in starts.values()),
            "heartbeats": self.pulse.sent,
            "misses": self.pulse.misses,
            "sessions": self.pulse.sessions,
            "answer_s_max": self.pulse.answer_s_max,
        }


class Lag:
    """How late this process' event loop is: the longest since `take`."""

    def __init__(self) -> None:
        self._most_s = 0.0

    async def watch(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + LAG_S
            await asyncio.sleep(LAG_S)
            self._most_s = max(self._most_s, loop.time() - due_s)

    def take(self) -> float:
        """The longest, in seconds; it is forgotten."""
        most_s, self._most_s = self._most_s, 0.0
        return most_s


async def answer(stats: Callable[[str], dict[str, Any]], *, out: TextIO = sys.stdout) -> None:
    """Answers each line of standard input with a line of JSON, until it ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        out.write(json.dumps(stats(line.decode().strip())) + "\n")
        out.flush()


def allow_files(count: int) -> None:
    """Connections are files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(hard, count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


async def be_agents(
    node_ids: Sequence[str],
    connector: Callable[[str], Connect],
    managers: Sequence[str],
    folder: Path,
) -> None:
    """The process of these agents. The list of published services is the same for all and read once:
    in truth each agent has a processor of its own for that.
    """
    published.unpacked = functools.lru_cache(maxsize=4)(published.unpacked)
    crowd, lag = Crowd(node_ids, connector), Lag()

    def stats(line: str) -> dict[str, Any]:
        found = crowd.stats() | {"lag_s": lag.take()}
        if line == "reset":
            crowd.pulse.reset()
        return found

    async with asyncio.TaskGroup() as group:
        parts = [
            group.create_task(crowd.run(managers, folder)),
            group.create_task(lag.watch()),
        ]
        await answer(stats)
        for part in parts:
            part.cancel()
