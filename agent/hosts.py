"""One runtime as the worker uses it: found on the host, described, and asked for a bounded number
of things at once.

It also knows whether the runtime answers. One that does not stays what it was: its tasks and what
it offers are as they were last seen, and only `problem` says that nobody knows how they are now.
Once it answers again it is looked at anew, and so it is after an operation whose outcome is not
known.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog
from prometheus_client import Histogram

from agent.runtime.base import Description, Event, Failed, Found, Rejected, Runtime, Started, Work
from swarm import errors
from swarm.clock import Clock
from swarm.v1 import Resources

log = structlog.get_logger("worker")
R = TypeVar("R")

OPERATIONS = Histogram(
    "swarm_agent_operation_seconds",
    "Time that a runtime took for one operation, without waiting for its turn",
    ("operation", "outcome"),
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120),
)

# Docker Engine works on about this many starts before more only wait inside it (each start takes
# locks for network and cgroup set-up); fewer leave its CPUs idle.
STARTS_MAX = 8
# Preparations are mostly waits for a registry; one slow image must not hold up all other tasks.
PREPARES_MAX = 16
# A stop is mostly the wait for the task's own end.
STOPS_MAX = 64
REMOVES_MAX = 8
RETRY_S_MIN, RETRY_S_MAX = 1.0, 30.0
# A runtime that is away is asked for this often at least, so that its tasks are known again soon.
CONNECT_S_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Looking:
    """The runtime is asked what it holds; a Snapshot follows unless it does not answer."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a runtime said when it was last connected to."""

    description: Description
    found: dict[str, Found]


class Host:
    """A runtime and its limits. `followed` is the only caller of connect, adopt and events."""

    def __init__(self, runtime: Runtime, clock: Clock) -> None:
        self.runtime = runtime
        self.name = runtime.name
        self._clock = clock
        # Before it has answered it offers nothing.
        self.description = Description(runtimes=(), resources=Resources())
        self.ready = False
        # Why it does not answer, and since when, unix time; empty: it does.
        self.problem = ""
        self.since_ns = 0
        # What it holds of tasks that nobody has asked for yet.
        self.found: dict[str, Found] = {}
        self._answers = asyncio.Event()
        self._look = asyncio.Event()
        self._prepares = asyncio.Semaphore(PREPARES_MAX)
        self._starts = asyncio.Semaphore(STARTS_MAX)
        self._stops = asyncio.Semaphore(STOPS_MAX)
        self._removes = asyncio.Semaphore(REMOVES_MAX)

    # -------------------------------------------------------------- following

    async def followed(self) -> AsyncIterator[Looking | Snapshot | Event | None]:
        """Looking and a Snapshot whenever the runtime could be connected to or an outcome is
        unknown, then its events; None when `problem` has changed. Tries for ever.
        """
        delay_s = RETRY_S_MIN
        while True:
            try:
                await self.runtime.connect()
                description = await self.runtime.describe()
                self._look.set()
                while self._look.is_set():
                    self._look.clear()
                    yield Looking()
                    found = {f.task_id: f for f in await self.runtime.adopt()}
                    self.description, self.ready, self.problem = description, True, ""
                    self._answers.set()
                    delay_s = RETRY_S_MIN
                    yield Snapshot(description, found)
                    async for event in self._until_look():
                        yield event
                return  # the runtime was closed
            except errors.SwarmError as error:
                problem = error.message
            except Exception as error:  # a defect in a runtime must not end the agent
                problem = f"internal error: {error!r}"
                log.exception("runtime_defect", runtime=self.name, operation="follow")
            self._answers.clear()
            if problem != self.problem:
                self.since_ns = self.since_ns if self.problem else self._clock.now_ns()
                self.problem = problem
                log.warning("runtime_unavailable", runtime=self.name, reason=problem)
                yield None
            await asyncio.sleep(delay_s)
            delay_s = min(CONNECT_S_MAX, delay_s * 2)

    async def _until_look(self) -> AsyncIterator[Event]:
        """The runtime's events until a look is wanted, or it was closed."""
        wanted = asyncio.create_task(self._look.wait())
        events = aiter(self.runtime.events())
        event: asyncio.Future[Event] | None = None
        try:
            while True:
                event = asyncio.ensure_future(anext(events))
                await asyncio.wait({event, wanted}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    return
                try:
                    yield event.result()
                except StopAsyncIteration:
                    return
        finally:
            left = [f for f in (event, wanted) if f is not None]
            for future in left:
                future.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            if (close := getattr(events, "aclose", None)) is not None:
                await close()

    async def interrupted(self, error: errors.SwarmError) -> bool:
        """Whether nobody knows what became of an operation that ended with this error; a new look
        at the host, as soon as that is possible, will tell.
        """
        match error:
            case Rejected() | Failed():
                return False
            case errors.Unavailable():
                away = True
            case errors.TimedOut():
                away = not await self._pinged()
            case _:
                away = False
        if away:
            self._look.set()
        return away

    async def _pinged(self) -> bool:
        try:
            await self.runtime.ping()
        except errors.SwarmError:
            return False
        return True

    # -------------------------------------------------------------- operations

    async def prepare(self, work: Work) -> None:
        async with self._prepares:
            await _measured("prepare", self.runtime.prepare(work))

    async def start(self, work: Work) -> Started:
        async with self._starts:
            return await _measured("start", self.runtime.start(work))

    async def stop(self, task_id: str, *, signal: str, grace_s: float) -> int | None:
        """Goes on until nothing runs any more, however often the runtime refuses."""

        async def once() -> int | None:
            async with self._stops:
                return await _measured(
                    "stop", self.runtime.stop(task_id, signal=signal, grace_s=grace_s)
                )

        return await self._persistently("stop", task_id, once)

    async def remove(self, task_id: str) -> None:
        """Goes on until nothing is left, however often the runtime refuses."""

        async def once() -> None:
            async with self._removes:
                await _measured("remove", self.runtime.remove(task_id))

        await self._persistently("remove", task_id, once)

    async def release_network(self, network_id: str) -> None:
        """Once: what is left of a network harms nobody and is found again by its next user."""
        try:
            await _measured("release_network", self.runtime.release_network(network_id))
        except errors.SwarmError as error:
            log.warning("network_not_released", network_id=network_id, reason=error.message)

    async def _persistently(
        self, operation: str, task_id: str, once: Callable[[], Awaitable[R]]
    ) -> R:
        delay_s = RETRY_S_MIN
        while True:
            try:
                return await once()
            except errors.SwarmError as error:
                log.warning(
                    "operation_to_be_repeated",
                    operation=operation,
                    task_id=task_id,
                    reason=error.message,
                    retry_s=delay_s,
                )
            if self._answers.is_set():
                await asyncio.sleep(delay_s)
                delay_s = min(RETRY_S_MAX, delay_s * 2)
            else:  # at once when it is back, and not only after the pause of its last refusal
                await self._answers.wait()


async def _measured(operation: str, call: Awaitable[R]) -> R:
    """Counts how long it took and how it ended. What is no operating error becomes Failed, so that
    a defect in a runtime costs one task and not the agent.
    """
    loop = asyncio.get_running_loop()
    begin_s, outcome = loop.time(), "ok"
    try:
        return await call
    except Rejected:
        outcome = "rejected"
        raise
    except errors.SwarmError:
        outcome = "failed"
        raise
    except Exception as error:
        outcome = "failed"
        log.exception("runtime_defect", operation=operation)
        raise Failed(f"internal error of the agent in {operation}: {error!r}") from error
    except BaseException:
        outcome = "cancelled"
        raise
    finally:
        OPERATIONS.labels(operation, outcome).observe(loop.time() - begin_s)
