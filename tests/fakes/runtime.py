"""A runtime in memory that does as it is told, and that notices when it is used against its
contract (agent/runtime/base.py).

The fake is the host at the same time: it outlives the worker that uses it, so that a new worker
over the same fake is an agent after a restart. `script` says how each task behaves; `exit`,
`become_healthy` and the like make things happen at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from agent.ingress import LocalTarget
from agent.runtime.base import (
    Description,
    Event,
    EventKind,
    Failed,
    Found,
    Phase,
    Rejected,
    Started,
    Work,
)
from swarm import errors
from swarm.v1 import (
    ContainerStatus,
    EngineDescription,
    ExecInput,
    ExecOutput,
    ExecStart,
    FileStat,
    IngressService,
    LogLine,
    LogOptions,
    LogStream,
    NetworkAttachment,
    Resources,
    TaskStats,
)

GIB = 1 << 30
PIECE_BYTES = 1000
LOGS_BEGIN_NS = 1_700_000_000 * 10**9


@dataclass(frozen=True, slots=True)
class Script:
    """How one task behaves. Times in seconds."""

    prepare_s: float = 0.0
    start_s: float = 0.0
    stop_s: float = 0.0
    remove_s: float = 0.0
    prepare_error: errors.SwarmError | None = None
    start_error: errors.SwarmError | None = None
    # Ends by itself this long after its start.
    exit_after_s: float | None = None
    exit_code: int = 0
    # It has a healthcheck that passes this long after the start; None: no healthcheck.
    healthy_after_s: float | None = None
    # Its end when it is asked to stop.
    stop_code: int = 143


@dataclass(slots=True)
class Container:
    """What the host has of one task."""

    work: Work
    script: Script
    phase: Phase = Phase.CREATED
    started: Started | None = None
    exit_code: int = 0
    message: str = ""
    lines: list[LogLine] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    files: dict[str, bytes] = field(default_factory=dict)


class FakeRuntime:
    """See the module. Implements agent.runtime.base.Runtime."""

    def __init__(
        self,
        name: str = "docker",
        *,
        runtimes: tuple[str, ...] = ("docker",),
        script: Callable[[Work], Script] = lambda _: Script(),
    ) -> None:
        self.name = name
        self.script = script
        self.containers: dict[str, Container] = {}
        self.networks: set[str] = set()
        self.released: list[str] = []
        # Not empty: the runtime does not answer, and this is why.
        self.down = ""
        # Questions for what tasks use are not answered.
        self.stats_hang = False
        # Real starts of each task: more than one is an error of the worker.
        self.starts: Counter[str] = Counter()
        self.calls: list[tuple[str, str]] = []
        self.in_flight = 0
        self.in_flight_most = 0
        self._description = Description(
            runtimes=runtimes,
            resources=Resources(cpu_nano=4 * 10**9, memory_bytes=8 * GIB),
            engine=EngineDescription(name="docker", version="fake") if name == "docker" else None,
        )
        self._busy: dict[str, str] = {}
        self._subscribers: list[asyncio.Queue[Event | None]] = []
        self._timers: list[asyncio.TimerHandle] = []

    # -------------------------------------------------------------- the contract

    async def connect(self) -> None:
        self._check_up()

    async def ping(self) -> None:
        self._check_up()

    async def describe(self) -> Description:
        self._check_up()
        return self._description

    async def adopt(self) -> tuple[Found, ...]:
        self._check_up()
        self._busy.clear()  # whoever was at work is gone
        self._subscribers.append(asyncio.Queue())
        return tuple(
            Found(id_, c.phase, c.started, c.exit_code, c.message)
            for id_, c in self.containers.items()
        )

    async def events(self) -> AsyncIterator[Event]:
        queue = self._subscribers[-1]
        while (event := await queue.get()) is not None:
            yield event

    async def prepare(self, work: Work) -> None:
        with self._using("prepare", work.task_id):
            script = self.script(work)
            await asyncio.sleep(script.prepare_s)
            if script.prepare_error is not None:
                raise script.prepare_error
            if work.task_id in self.containers:
                raise Failed(f"the name of task {work.task_id} is taken")
            self.containers[work.task_id] = Container(work, script)
            self.networks.update(work.networks)

    async def start(self, work: Work) -> Started:
        with self._using("start", work.task_id):
            container = self.containers.get(work.task_id)
            if container is None:
                raise Failed(f"task {work.task_id} was not prepared")
            script = container.script
            await asyncio.sleep(script.start_s)
            if script.start_error is not None:
                raise script.start_error
            if container.phase == Phase.CREATED:
                self._begin(work, container)
            assert container.started is not None
            return container.started

    def _begin(self, work: Work, container: Container) -> None:
        script = container.script
        self.starts[work.task_id] += 1
        number = sum(self.starts.values())
        container.phase = Phase.RUNNING
        container.started = Started(
            container=ContainerStatus(container_id=f"c-{work.task_id}", pid=1000 + number),
            address=f"172.17.{number // 250}.{number % 250 + 2}",
            networks=tuple(
                NetworkAttachment(network_id=n, addresses=(f"10.0.0.{number % 250 + 2}/24",))
                for n in work.networks
            ),
            healthy=script.healthy_after_s is None,
        )
        if script.healthy_after_s is not None:
            self._later(script.healthy_after_s, self.become_healthy, work.task_id)
        if script.exit_after_s is not None:
            self._later(script.exit_after_s, self.exit, work.task_id)

    async def stop(self, task_id: str, *, signal: str, grace_s: float) -> int | None:
        with self._using("stop", task_id):
            container = self.containers.get(task_id)
            if container is None:
                return None
            if container.phase == Phase.RUNNING:
                await asyncio.sleep(min(container.script.stop_s, grace_s))
            if container.phase == Phase.RUNNING:
                killed = container.script.stop_s > grace_s
                self._end(task_id, 137 if killed else container.script.stop_code, "")
            return container.exit_code if container.phase == Phase.EXITED else None

    async def remove(self, task_id: str) -> None:
        with self._using("remove", task_id):
            container = self.containers.get(task_id)
            if container is not None:
                await asyncio.sleep(container.script.remove_s)
                del self.containers[task_id]
                container.changed.set()

    async def release_network(self, network_id: str) -> None:
        users = [i for i, c in self.containers.items() if network_id in c.work.networks]
        assert not users, f"network {network_id} released while {users} use it"
        self.networks.discard(network_id)
        self.released.append(network_id)

    async def logs(self, task_id: str, options: LogOptions) -> AsyncIterator[LogLine]:
        container = self._container(task_id)
        at = 0 if options.tail < 0 else max(0, len(container.lines) - options.tail)
        while True:
            while at < len(container.lines):
                if container.lines[at].timestamp_ns >= options.since_ns:
                    yield container.lines[at]
                at += 1
            if not options.follow or container.phase == Phase.EXITED:
                return
            container.changed.clear()
            await container.changed.wait()

    async def exec(
        self,
        task_id: str,
        start: ExecStart,
        stdin: AsyncIterator[ExecInput],
        left: asyncio.Event | None = None,
    ) -> AsyncGenerator[ExecOutput]:
        """`exit N` ends with N; `cat` gives its input back; anything else is said once."""
        self._container(task_id)
        yield ExecOutput(started=True)
        if start.command[0] == "exit":
            yield ExecOutput(exit_code=int(start.command[1]))
            return
        if start.command[0] == "missing":
            raise Rejected("missing: executable file not found")
        if start.command[0] == "cat":
            async for message in stdin:
                if message.stdin_closed:
                    break
                if message.stdin is not None:
                    yield ExecOutput(stdout=message.stdin)
        else:
            yield ExecOutput(stdout=" ".join(start.command).encode())
        yield ExecOutput(exit_code=0)

    async def stats(self, task_id: str) -> TaskStats:
        self._container(task_id)
        if self.stats_hang:
            await asyncio.Event().wait()
        return TaskStats(task_id=task_id, memory_bytes=1024, pids=1)

    async def file_stat(self, task_id: str, path: str) -> FileStat | None:
        data = self._container(task_id).files.get(path)
        if data is None:
            return None
        return FileStat(name=path.rpartition("/")[2], size_bytes=len(data), mode=0o100644)

    async def archive(self, task_id: str, path: str) -> AsyncIterator[bytes]:
        """Not a tar: the file's data as it is, in pieces of PIECE_BYTES."""
        data = self._container(task_id).files[path]
        for at in range(0, len(data), PIECE_BYTES):
            yield data[at : at + PIECE_BYTES]

    async def extract(
        self,
        task_id: str,
        path: str,
        data: AsyncIterator[bytes],
        *,
        keep_kind: bool,
        keep_owner: bool,
    ) -> None:
        """Not a tar: what comes becomes the file's data, part by part."""
        container = self._container(task_id)
        if path.startswith("/nowhere"):
            raise Failed(f"{path}: no such folder")
        container.files[path] = b""
        async for part in data:
            container.files[path] += part

    async def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for queue in self._subscribers:
            queue.put_nowait(None)

    # -------------------------------------------------------------- making things happen

    def exit(self, task_id: str, code: int | None = None, message: str = "") -> None:
        """The task ends by itself."""
        container = self.containers.get(task_id)
        if container is None or container.phase != Phase.RUNNING:
            return
        self._end(task_id, container.script.exit_code if code is None else code, message)

    def become_healthy(self, task_id: str) -> None:
        """The task's healthcheck passes."""
        container = self.containers.get(task_id)
        if container is not None and container.phase == Phase.RUNNING:
            assert container.started is not None
            self._tell(Event(task_id, EventKind.HEALTHY))

    def become_unhealthy(self, task_id: str, message: str = "probe failed") -> None:
        """The task's healthcheck has failed too often."""
        self._tell(Event(task_id, EventKind.UNHEALTHY, message=message))

    def vanish(self, task_id: str) -> None:
        """Somebody removes the task behind the agent's back, without an event."""
        del self.containers[task_id]

    def say(self, task_id: str, text: str) -> None:
        """The task writes a line."""
        container = self._container(task_id)
        line = LogLine(
            task_id=task_id,
            stream=LogStream.STDOUT,
            timestamp_ns=LOGS_BEGIN_NS + len(container.lines),
            data=text.encode(),
        )
        container.lines.append(line)
        container.changed.set()

    def running(self) -> set[str]:
        """The tasks that run."""
        return {i for i, c in self.containers.items() if c.phase == Phase.RUNNING}

    def _end(self, task_id: str, code: int, message: str) -> None:
        container = self.containers[task_id]
        container.phase = Phase.EXITED
        container.exit_code, container.message = code, message
        container.changed.set()
        self._tell(Event(task_id, EventKind.EXITED, exit_code=code, message=message))

    def _tell(self, event: Event) -> None:
        if self._subscribers:
            self._subscribers[-1].put_nowait(event)

    def _later(self, delay_s: float, call: Callable[[str], None], task_id: str) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, call, task_id))

    def _container(self, task_id: str) -> Container:
        container = self.containers.get(task_id)
        if container is None:
            raise Failed(f"task {task_id} has no container")
        return container

    def _check_up(self) -> None:
        if self.down:
            raise errors.Unavailable(self.down)

    @contextmanager
    def _using(self, operation: str, task_id: str) -> Iterator[None]:
        self._check_up()
        self.calls.append((operation, task_id))
        other = self._busy.get(task_id)
        assert other is None, f"{operation} of {task_id} during its {other}"
        self._busy[task_id] = operation
        self.in_flight += 1
        self.in_flight_most = max(self.in_flight_most, self.in_flight)
        try:
            yield
        finally:
            self._busy.pop(task_id, None)
            self.in_flight -= 1


class FakeIngress:
    """Remembers what it was told. Implements agent.ingress.Ingress."""

    def __init__(self) -> None:
        self.key = b""
        self.services: dict[str, IngressService] = {}
        self.targets: dict[str, LocalTarget] = {}
        self.problems: tuple[str, ...] = ()
        self.applied = 0
        self.finishing: list[tuple[str, float]] = []

    async def start(self) -> None: ...

    def set_key(self, relay_key: bytes) -> None:
        self.key = relay_key

    async def apply(self, services: object) -> tuple[str, ...]:
        assert isinstance(services, list | tuple)
        self.services = {s.service_id: s for s in services}
        self.applied += 1
        return self.problems

    def set_target(self, task_id: str, target: LocalTarget | None) -> None:
        if target is None:
            self.targets.pop(task_id, None)
        else:
            self.targets[task_id] = target

    async def finished(self, task_id: str, *, timeout_s: float) -> bool:
        self.finishing.append((task_id, timeout_s))
        return True

    async def close(self) -> None: ...
