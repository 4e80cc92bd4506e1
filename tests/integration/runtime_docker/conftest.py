"""A docker runtime on a test host's engine, and tasks for it; everything is gone afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.gpus import HandOver, as_claimed
from agent.runtime.base import Event, EventKind, Started, TaskFile, Work
from agent.runtime.docker import DockerRuntime
from deploy.testbed import Bed, Host
from swarm.clock import SystemClock
from swarm.ids import new_id, system_rng
from swarm.v1 import (
    Assignment,
    ContainerSpec,
    ExecInput,
    ExecStart,
    LogLine,
    LogOptions,
    Network,
    NetworkAttachmentSpec,
    PortConfig,
    Task,
    TaskSpec,
)
from tests.fakes.waiting import until

DEADLINE_S = 30.0
CLUSTER = "c" * 25


class Harness:
    """One node's runtime, its events, and what it has made."""

    def __init__(self, host: Host, node_id: str, gpus: HandOver = as_claimed) -> None:
        self._gpus = gpus
        self.host = host
        self.node_id = node_id
        self.runtime = self._make()
        self.heard: list[Event] = []
        self.networks: dict[str, Network] = {}
        self._listener: asyncio.Task[None] | None = None

    def _make(self) -> DockerRuntime:
        return DockerRuntime(
            socket=str(self.host.docker_socket),
            node_id=self.node_id,
            cluster_id=CLUSTER,
            clock=SystemClock(),
            gpus=self._gpus,
        )

    async def open(self) -> None:
        await self.runtime.connect()
        await self.runtime.adopt()
        self.listen()

    def listen(self) -> None:
        async def listen() -> None:
            async for event in self.runtime.events():
                self.heard.append(event)

        self._listener = asyncio.create_task(listen())

    async def listened(self) -> BaseException | None:
        """Waits until the events end; why they did."""
        assert self._listener is not None
        await asyncio.wait({self._listener}, timeout=DEADLINE_S)
        assert self._listener.done()
        return self._listener.exception()

    async def restart(self) -> DockerRuntime:
        """A new runtime in the place of the old one, as after a restart of the agent."""
        await self.close()
        self.runtime = self._make()
        await self.runtime.connect()
        return self.runtime

    async def close(self) -> None:
        await self.runtime.close()
        if self._listener is not None:
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None

    async def clean(self) -> None:
        await self.close()
        self.drop_containers()
        self.runtime._files.keep(())
        for network_id in self.networks:
            label = f"label=swarm-py.network.id={network_id}"
            if ids := self.host.docker("network", "ls", "-q", "--filter", label).split():
                self.host.docker("network", "rm", *ids)

    def drop_containers(self) -> None:
        label = f"label=swarm-py.node.id={self.node_id}"
        if ids := self.host.docker("ps", "-aq", "--filter", label).split():
            self.host.docker("rm", "-f", "-v", *ids)

    # -------------------------------------------------------------- tasks

    def work(
        self,
        *args: str,
        container: ContainerSpec | None = None,
        spec: TaskSpec | None = None,
        ports: Sequence[PortConfig] = (),
        files: Sequence[TaskFile] = (),
        networks: Sequence[NetworkAttachmentSpec] = (),
        auth: str = "",
    ) -> Work:
        """A task of busybox with these arguments; the image is not asked for at a registry."""
        container = container or ContainerSpec()
        container = replace(
            container,
            image=container.image or "busybox:latest",
            args=args or container.args,
            pull_policy=container.pull_policy or "missing",
        )
        task_id = new_id(system_rng())
        return Work(
            Assignment(
                task=Task(id=task_id, service_id="s" * 25, slot=1, node_id=self.node_id),
                service_name="app_web",
                name=f"app_web.1.{task_id}",
                spec=replace(spec or TaskSpec(), container=container, networks=tuple(networks)),
                ports=tuple(ports),
                registry_auth=auth,
                node_name=self.host.name,
            ),
            files=tuple(files),
            networks=self.networks,
        )

    async def start(self, work: Work) -> Started:
        await self.runtime.prepare(work)
        return await self.runtime.start(work)

    async def run(self, *args: str, **options: Any) -> tuple[Work, Started]:
        work = self.work(*args, **options)
        return work, await self.start(work)

    def inspect(self, work: Work) -> dict[str, Any]:
        assert work.assignment.name
        return dict(json.loads(self.host.docker("inspect", work.assignment.name))[0])

    async def event(self, work: Work, kind: EventKind) -> Event:
        """The first event of this kind about the task."""

        def found() -> list[Event]:
            return [e for e in self.heard if e.task_id == work.task_id and e.kind is kind]

        await until(found, timeout_s=DEADLINE_S, what=lambda: f"{kind} among {self.heard}")
        return found()[0]

    def events_of(self, work: Work) -> list[EventKind]:
        return [e.kind for e in self.heard if e.task_id == work.task_id]

    async def lines(self, work: Work, **options: Any) -> list[LogLine]:
        options = {"tail": -1, **options}
        async with asyncio.timeout(DEADLINE_S):
            return [line async for line in self.runtime.logs(work.task_id, LogOptions(**options))]

    async def output(self, *args: str, **options: Any) -> str:
        """What a task says that runs to its end."""
        work, _ = await self.run(*args, **options)
        lines = await self.lines(work, follow=True)
        return "\n".join(line.data.decode() for line in lines)

    async def inside(
        self, work: Work, *command: str, stdin: bytes = b"", **options: Any
    ) -> tuple[int, str]:
        """Runs a command in the task; exit code and output."""

        async def feed() -> AsyncIterator[ExecInput]:
            if stdin:
                yield ExecInput(stdin=stdin)
            yield ExecInput(stdin_closed=True)

        said = b""
        start = ExecStart(command=command, **options)
        async with asyncio.timeout(DEADLINE_S):
            async for output in self.runtime.exec(work.task_id, start, feed()):
                said += (output.stdout or b"") + (output.stderr or b"")
                if output.exit_code is not None:
                    return output.exit_code, said.decode()
        raise AssertionError(f"no exit code after {said!r}")

    def cgroup(self, started: Started, controller: str, v1: str, v2: str) -> str:
        """The content of a control file of the container."""
        groups = {
            line.split(":")[1]: line.split(":")[2]
            for line in Path(f"/proc/{started.container.pid}/cgroup").read_text().splitlines()
        }
        for names, group in groups.items():
            if controller in names.split(","):
                return Path(f"/sys/fs/cgroup/{names}{group}/{v1}").read_text().strip()
        return Path(f"/sys/fs/cgroup{groups['']}/{v2}").read_text().strip()


@pytest.fixture(scope="session")
def host(bed: Bed) -> Host:
    """The first host of the bed, with its engine."""
    return bed.docker_hosts(1)[0]


@pytest.fixture
async def docker(host: Host) -> AsyncIterator[Harness]:
    harness = Harness(host, new_id(system_rng()))
    await harness.open()
    try:
        yield harness
    finally:
        await harness.clean()
