"""A machine's container engine: containers outlive agents, take their time, and behave as their
image says.

An image is `name:VERSION-BEHAVIOUR` (see BEHAVIOURS). What an agent has asked for goes on when the
agent dies. The engine may hang (nothing is answered), restart (all containers end) or lose power
with its machine. It tells of each container that begins and ends to run.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from agent.runtime.base import (
    IMAGE_MISSING,
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
from swarm.v1 import ContainerStatus, EngineDescription, Resources, TaskStats
from tests.sim.loop import SimLoop

GIB = 1 << 30
HANG_S = 20.0  # a call to an engine that hangs fails after this
CREATE_S = 0.2

BEHAVIOURS = {
    "ok": "runs until it is stopped",
    "health": "healthy after a while",
    "sick": "healthy, and at times not any more",
    "crash": "ends with 1 soon after its start",
    "flaky": "ends with 1 at times",
    "missing": "no such image",
    "away": "the registry does not answer at times",
    "slow": "takes long to pull",
    "stubborn": "does not stop before it is killed",
    "job": "ends with 0",
    "jobfail": "ends with 1 at times, else with 0",
    "quit": "ends with 0 at times, though it should go on",
}


@dataclass(slots=True, eq=False)
class Box:
    """A container."""

    work: Work
    behaviour: str
    phase: Phase = Phase.CREATED
    started: Started | None = None
    exit_code: int = 0
    message: str = ""
    timers: list[Any] = field(default_factory=list)


class Host:
    """The engine of one machine, see the module; `runtime` is an agent's way to it."""

    def __init__(
        self,
        loop: SimLoop,
        rng: random.Random,
        name: str,
        *,
        begun: Callable[[Host, Box], None],
        ended: Callable[[Host, Box], None],
    ) -> None:
        self.loop, self.rng, self.name = loop, rng, name
        self.boxes: dict[str, Box] = {}
        self.resources = Resources(cpu_nano=4 * 10**9, memory_bytes=8 * GIB)
        self.hung_until_s = 0.0
        self.slow_s = 0.0  # pulls
        self.runtime: SimRuntime | None = None
        self.starts = 0
        self._begun, self._ended = begun, ended

    def running(self) -> list[Box]:
        return [b for b in self.boxes.values() if b.phase == Phase.RUNNING]

    # -------------------------------------------------------------- calls

    async def ask(self, delay_s: float, effect: Callable[[], Any]) -> Any:
        """A call: the effect comes even when the one who asked is gone."""
        answer = self.loop.create_future()

        def act() -> None:
            if self.loop.now_s < self.hung_until_s:
                self.loop.outside(self.hung_until_s - self.loop.now_s + 0.01, act)
                return
            try:
                result = effect()
            except errors.SwarmError as error:
                if not answer.done():
                    answer.set_exception(error)
            else:
                if not answer.done():
                    answer.set_result(result)

        def give_up() -> None:
            if not answer.done():
                text = "the engine does not answer within 20 s; look at its log, or restart it"
                answer.set_exception(errors.Unavailable(text))

        self.loop.outside(delay_s, act)
        if self.loop.now_s + delay_s < self.hung_until_s:
            self.loop.outside(HANG_S, give_up)
        return await answer

    # -------------------------------------------------------------- containers

    def create(self, work: Work) -> None:
        if work.task_id in self.boxes:
            raise Failed(f"the name of task {work.task_id} is taken")
        self.boxes[work.task_id] = Box(work, behaviour_of(work))

    def start(self, work: Work) -> Started:
        box = self.boxes.get(work.task_id)
        if box is None:
            raise Failed(f"task {work.task_id} was not prepared")
        if box.phase == Phase.CREATED:
            box.work = work  # what the agent was told last
            self._begin(box)
        if box.started is None or box.phase != Phase.RUNNING:
            raise Failed(f"task {work.task_id} has ended already")
        return box.started

    def _begin(self, box: Box) -> None:
        self.starts += 1
        box.phase = Phase.RUNNING
        task = box.work.assignment.task
        endpoint = task.host_ports if task is not None else ()
        box.started = Started(
            container=ContainerStatus(container_id=f"c{self.starts}", pid=self.starts),
            address=f"172.17.0.{self.starts % 250 + 2}",
            host_ports=endpoint,
            healthy=box.behaviour not in ("health", "sick"),
        )
        self._begun(self, box)
        random_, later = self.rng.random, self._later
        match box.behaviour:
            case "health" | "sick":
                later(box, 1 + random_() * 3, self._tell, box, EventKind.HEALTHY)
                if box.behaviour == "sick" and random_() < 0.4:
                    later(box, 5 + random_() * 60, self._tell, box, EventKind.UNHEALTHY)
            case "crash":
                later(box, 0.2 + random_() * 2, self.exit, box, 1)
            case "flaky":
                if random_() < 0.4:
                    later(box, 3 + random_() * 90, self.exit, box, 1)
            case "quit":
                if random_() < 0.4:
                    later(box, 3 + random_() * 90, self.exit, box, 0)
            case "job":
                later(box, 1 + random_() * 30, self.exit, box, 0)
            case "jobfail":
                later(box, 1 + random_() * 20, self.exit, box, int(random_() < 0.3))

    def _later(self, box: Box, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        box.timers.append(self.loop.outside(delay_s, call, *args))

    def exit(self, box: Box, code: int, message: str = "") -> None:
        """The container ends."""
        if box.phase != Phase.RUNNING:
            return
        for timer in box.timers:
            timer.cancel()
        box.phase, box.exit_code, box.message = Phase.EXITED, code, message
        self._ended(self, box)
        self._tell(box, EventKind.EXITED)

    def _tell(self, box: Box, kind: EventKind) -> None:
        if kind != EventKind.EXITED:
            if box.phase != Phase.RUNNING or box.started is None:
                return
            if kind == EventKind.HEALTHY:
                box.started = Started(
                    container=box.started.container,
                    address=box.started.address,
                    host_ports=box.started.host_ports,
                )
        task_id = box.work.task_id
        if self.runtime is not None:
            self.runtime.tell(Event(task_id, kind, exit_code=box.exit_code, message=box.message))

    def stop(self, task_id: str, *, killed: bool) -> int | None:
        box = self.boxes.get(task_id)
        if box is None:
            return None
        if box.phase == Phase.RUNNING:
            self.exit(box, 137 if killed else 143)
        return box.exit_code if box.phase == Phase.EXITED else None

    def remove(self, task_id: str) -> None:
        box = self.boxes.pop(task_id, None)
        if box is not None:
            for timer in box.timers:
                timer.cancel()
            if box.phase == Phase.RUNNING:
                box.phase = Phase.EXITED
                self._ended(self, box)

    def lose_power(self) -> None:
        """All that ran has ended; nobody is told."""
        self.runtime = None
        for box in self.running():
            self.exit(box, 255, "the machine lost power")


class SimRuntime:
    """See agent.runtime.base.Runtime."""

    name = "docker"

    def __init__(self, host: Host) -> None:
        self._host = host
        self._events: asyncio.Queue[Event | None] | None = None
        self._busy: dict[str, str] = {}

    def tell(self, event: Event) -> None:
        if self._events is not None:
            self._events.put_nowait(event)

    async def connect(self) -> None:
        await self._host.ask(0.01, lambda: None)

    async def ping(self) -> None:
        await self._host.ask(0.005, lambda: None)

    async def describe(self) -> Description:
        return Description(
            runtimes=("docker",),
            resources=self._host.resources,
            engine=EngineDescription(name="docker", version="simulated"),
        )

    async def adopt(self) -> tuple[Found, ...]:
        # Events first: what ends while the list is made must not be missed.
        self._events = asyncio.Queue()
        self._host.runtime = self

        def look() -> tuple[Found, ...]:
            return tuple(
                Found(
                    id_,
                    b.phase,
                    b.started if b.phase == Phase.RUNNING else None,
                    b.exit_code,
                    b.message,
                )
                for id_, b in self._host.boxes.items()
            )

        found: tuple[Found, ...] = await self._host.ask(0.02, look)
        return found

    async def events(self) -> AsyncIterator[Event]:
        assert self._events is not None
        while (event := await self._events.get()) is not None:
            yield event

    async def prepare(self, work: Work) -> None:
        host, behaviour = self._host, behaviour_of(work)
        random_ = host.rng.random
        self._enter(work.task_id, "prepare")
        try:
            await asyncio.sleep(
                20 + random_() * 30 if behaviour == "slow" else host.slow_s + random_() * 1.5
            )
            if behaviour == "missing":
                raise Rejected("no such image: manifest unknown", cause=IMAGE_MISSING)
            if behaviour == "away" and random_() < 0.5:
                raise Failed("the registry does not answer")
            await host.ask(random_() * CREATE_S, lambda: host.create(work))
        finally:
            self._busy.pop(work.task_id, None)

    async def start(self, work: Work) -> Started:
        host = self._host
        self._enter(work.task_id, "start")
        try:
            started: Started = await host.ask(0.05 + host.rng.random() * 0.3,
                                              lambda: host.start(work))  # fmt: skip
            return started
        finally:
            self._busy.pop(work.task_id, None)

    async def stop(self, task_id: str, *, signal: str, grace_s: float) -> int | None:
        host = self._host
        self._enter(task_id, "stop")
        try:
            box = host.boxes.get(task_id)
            delay_s, killed = 0.01, False
            if box is not None and box.phase == Phase.RUNNING:
                delay_s = 0.05 + host.rng.random() * 2
                killed = box.behaviour == "stubborn" or delay_s > grace_s
                if killed:
                    delay_s = grace_s
            code: int | None = await host.ask(delay_s, lambda: host.stop(task_id, killed=killed))
            return code
        finally:
            self._busy.pop(task_id, None)

    async def remove(self, task_id: str) -> None:
        host = self._host
        self._enter(task_id, "remove")
        try:
            await host.ask(0.02 + host.rng.random() * 0.1, lambda: host.remove(task_id))
        finally:
            self._busy.pop(task_id, None)

    def _enter(self, task_id: str, operation: str) -> None:
        other = self._busy.get(task_id)
        errors.invariant(other is None, f"{operation} of {task_id} during its {other}")
        self._busy[task_id] = operation

    async def release_network(self, network_id: str) -> None:
        return None

    def logs(self, task_id: str, options: object) -> AsyncIterator[Any]:
        raise errors.Unsupported("no logs are simulated")

    def exec(self, task_id: str, *_: object) -> AsyncGenerator[Any]:
        raise errors.Unsupported("no exec is simulated")

    async def stats(self, task_id: str) -> TaskStats:
        raise errors.Unsupported("no statistics are simulated")

    def __getattr__(self, name: str) -> Any:
        # What runtimes have besides (copies, usage) plays no part here.
        if name.startswith("_"):
            raise AttributeError(name)
        raise errors.Unsupported(f"{name} is not simulated")

    async def close(self) -> None:
        if self._events is not None:
            self._events.put_nowait(None)


def behaviour_of(work: Work) -> str:
    """As the image says; anything else runs."""
    spec = work.assignment.spec
    image = spec.container.image if spec is not None and spec.container is not None else ""
    word = image.rpartition("-")[2]
    return word if word in BEHAVIOURS else "ok"
