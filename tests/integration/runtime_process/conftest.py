"""A process runtime in a folder of its own, and tasks for it; everything is gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.gpus import HandOver, as_claimed
from agent.runtime.base import Event, EventKind, Started, TaskFile, Work
from agent.runtime.process import HostPorts, ProcessRuntime
from swarm.clock import SystemClock
from swarm.ids import new_id, system_rng
from swarm.v1 import (
    Assignment,
    ContainerSpec,
    ExecInput,
    ExecStart,
    LogOptions,
    PortConfig,
    Task,
    TaskSpec,
)

DEADLINE_S = 20.0


def work(
    *command: str,
    container: ContainerSpec | None = None,
    spec: TaskSpec | None = None,
    ports: Sequence[PortConfig] = (),
    files: Sequence[TaskFile] = (),
    task_id: str = "",
) -> Work:
    """One task that runs the command."""
    from msgspec.structs import replace

    task_id = task_id or new_id(system_rng())
    container = replace(container or ContainerSpec(), command=command)
    return Work(
        assignment=Assignment(
            task=Task(id=task_id, slot=1, service_id="svc", node_id="n1"),
            service_name="web",
            spec=replace(spec or TaskSpec(runtime="process"), container=container),
            ports=tuple(ports),
            name=f"web.1.{task_id}",
            node_name="node-one",
        ),
        files=tuple(files),
    )


@dataclass
class Harness:
    """A runtime that can be replaced by a new one on the same folder, as an agent's restart does."""

    runtime: ProcessRuntime
    make: Callable[[], Awaitable[ProcessRuntime]]
    folder: Path

    async def restart(self) -> None:
        await self.runtime.close()
        self.runtime = await self.make()

    async def run(self, job: Work) -> Started:
        await self.runtime.prepare(job)
        return await self.runtime.start(job)

    async def event(self) -> Event:
        async with asyncio.timeout(DEADLINE_S):
            return await anext(self.runtime.events())

    async def finish(self, job: Work) -> tuple[int, str]:
        """Runs a task to its end: exit code and output."""
        await self.run(job)
        event = await self.event()
        assert (event.task_id, event.kind) == (job.task_id, EventKind.EXITED)
        return event.exit_code, await self.output(job)

    async def output(self, job: Work, **options: object) -> str:
        lines = self.runtime.logs(job.task_id, LogOptions(**{"tail": -1, **options}))  # type: ignore[arg-type]  # checked by the struct
        return "\n".join([line.data.decode() async for line in lines])

    async def execute(self, job: Work, *command: str, **options: object) -> tuple[int, str]:
        out, code = b"", -1
        start = ExecStart(command=command, **options)  # type: ignore[arg-type]  # checked by the struct
        async for output in self.runtime.exec(job.task_id, start, silent()):
            out += output.stdout or output.stderr or b""
            code = code if output.exit_code is None else output.exit_code
        return code, out.decode()


async def silent() -> AsyncIterator[ExecInput]:
    yield ExecInput(stdin_closed=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def harness(
    folder: Path,
    *,
    isolate: bool,
    host_ports: HostPorts | None = None,
    cgroup_root: Path = Path("/sys/fs/cgroup"),
    gpus: HandOver = as_claimed,
) -> AsyncIterator[Harness]:
    node_id = new_id(system_rng())

    async def make() -> ProcessRuntime:
        runtime = ProcessRuntime(
            folder=folder,
            node_id=node_id,
            bind_address="127.0.0.2",
            clock=SystemClock(),
            isolate=isolate,
            host_ports=host_ports,
            cgroup_root=cgroup_root,
            gpus=gpus,
        )
        await runtime.connect()
        return runtime

    held = Harness(await make(), make, folder)
    try:
        yield held
    finally:
        for path in (folder / "tasks").iterdir():
            if path.name not in held.runtime._tasks:
                await held.restart()
                await held.runtime.adopt()
                break
        for path in list((folder / "tasks").iterdir()):
            await held.runtime.remove(path.name)
        await held.runtime.close()


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[Harness]:
    """Without namespaces and cgroups: what an unprivileged user has."""
    async with harness(tmp_path / "p", isolate=False, cgroup_root=tmp_path / "none") as held:
        yield held


@pytest.fixture
async def isolated(tmp_path: Path) -> AsyncIterator[Harness]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    async with harness(tmp_path / "p", isolate=True) as held:
        if not held.runtime._powers.isolated:
            pytest.skip(f"needs namespaces: {held.runtime._warnings}")
        yield held
