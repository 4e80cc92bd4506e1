"""The control loop on a real store: it follows changes, keeps to its fence, and survives the store's
errors. Time is real; every wait has a condition and a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from msgspec import structs

from manager.control import ControlLoop, metrics, service_status
from manager.control.scale import scale as scale_as_ever
from manager.control.work import Work
from manager.store import Fence, Store
from manager.store.engines.memory import MemoryEngine
from swarm import errors
from swarm.clock import SECOND_NS, SystemClock
from swarm.ids import seeded_rng
from swarm.v1 import (
    RestartPolicy,
    Service,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskState,
    TaskStatus,
)
from tests.unit.control.world import make_node, make_spec, state_of

DEADLINE_S = 10.0


class Bench:
    """A store with a leader's loop running on it."""

    def __init__(self, store: Store, engine: MemoryEngine, fence: Fence) -> None:
        self.store = store
        self.engine = engine
        self.fence = fence

    async def create(self, spec: ServiceSpec) -> Service:
        service = Service(id=f"s-{spec.name}", spec=spec, spec_version=1, task_version=1)
        revision = ServiceRevision(
            id=f"{service.id}.1", service_id=service.id, spec_version=1, spec=spec
        )
        await self.store.update(lambda draft: (draft.put(service), draft.put(revision)))
        return service

    async def report(self, task_id: str, state: TaskState) -> None:
        def fn(draft):
            task = draft.get(Task, task_id)
            draft.put(structs.replace(task, status=TaskStatus(state=state)))

        await self.store.update(fn)

    def tasks(self) -> list[Task]:
        return sorted(self.store.all(Task), key=lambda t: (t.slot, t.id))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            with self.store.watch(("all",)) as watch:
                while not condition():
                    await anext(watch)


@asynccontextmanager
async def opened() -> AsyncIterator[Bench]:
    clock = SystemClock()
    engine = MemoryEngine(clock)
    store = Store(engine, clock)
    await store.open()
    fence = await engine.campaign("m1")
    loop = ControlLoop(store, clock, seeded_rng(1), fence=fence)
    running = asyncio.create_task(loop.run())
    try:
        yield Bench(store, engine, fence)
    finally:
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await store.close()


async def test_changes_lead_to_tasks_and_delays_pass() -> None:
    async with opened() as bench:
        await bench.store.update(lambda draft: draft.put(make_node("n1")))
        policy = RestartPolicy(delay_ns=SECOND_NS // 5)
        service = await bench.create(make_spec(replicas=2, restart=policy))
        await bench.until(lambda: len(bench.tasks()) == 2)
        for task in bench.tasks():
            await bench.report(task.id, TaskState.RUNNING)
        status = service_status(bench.store, service, SystemClock().now_ns())
        assert status.up_to_date == 2 and 0 < status.settles_in_ns <= 5 * SECOND_NS
        await bench.report(bench.tasks()[0].id, TaskState.FAILED)
        await bench.until(
            lambda: (
                len(bench.tasks()) == 3
                and all(
                    t.desired_state == TaskState.RUNNING
                    for t in bench.tasks()
                    if state_of(t) == TaskState.ASSIGNED
                )
            )
        )


async def test_commits_that_lose_a_race_are_made_again() -> None:
    async with opened() as bench:
        await bench.store.update(lambda draft: draft.put(make_node("n1")))
        service = await bench.create(make_spec(replicas=20))
        await bench.until(lambda: len(bench.tasks()) == 20)

        # Without task_writer: each of these races with the loop's reaction to the one before.
        async def fail(task: Task) -> None:
            await bench.report(task.id, TaskState.FAILED)

        await asyncio.gather(*(fail(t) for t in bench.tasks()))
        await bench.until(lambda: len(bench.tasks()) == 40)
        assert service_status(bench.store, service, SystemClock().now_ns()).desired == 20


@pytest.mark.parametrize("error", [errors.Unavailable("no quorum"), errors.TimedOut("unknown")])
async def test_the_loop_waits_out_a_store_that_does_not_answer(error: errors.SwarmError) -> None:
    def metric() -> float:
        return float(metrics.COMMITS.labels("unavailable")._value.get())

    async with opened() as bench:
        await bench.store.update(lambda draft: draft.put(make_node("n1")))
        await bench.create(make_spec(replicas=1))
        await bench.until(lambda: len(bench.tasks()) == 1)
        (task,) = bench.tasks()
        await bench.report(task.id, TaskState.RUNNING)
        await bench.report(task.id, TaskState.FAILED)
        bench.engine.failing = error
        failed = metric()
        async with asyncio.timeout(DEADLINE_S):
            while metric() < failed + 2:
                await asyncio.sleep(0.005)
        assert len(bench.tasks()) == 1
        bench.engine.failing = None
        await bench.until(lambda: len(bench.tasks()) == 2)


async def test_a_deposed_leader_writes_nothing() -> None:
    async with opened() as bench:
        await bench.store.update(lambda draft: draft.put(make_node("n1")))
        await bench.create(make_spec("a", replicas=1))
        await bench.until(lambda: len(bench.tasks()) == 1)
        await bench.engine.campaign("m2")
        await bench.create(make_spec("b", replicas=1))
        before = bench.store.revision
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await bench.until(lambda: bench.store.revision > before)
        assert [t.service_id for t in bench.tasks()] == ["s-a"]


async def test_a_service_that_cannot_be_worked_out_stops_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scale(work: Work) -> None:
        if work.service.id == "s-bad":
            raise ZeroDivisionError
        scale_as_ever(work)

    monkeypatch.setattr("manager.control.controller.scale", scale)
    before = metrics.DEFECTS._value.get()
    async with opened() as bench:
        await bench.store.update(lambda draft: draft.put(make_node("n1")))
        await bench.create(make_spec(name="bad", replicas=1))
        await bench.create(make_spec(name="good", replicas=1))
        await bench.until(lambda: [t.service_id for t in bench.tasks()] == ["s-good"])
        await bench.until(lambda: state_of(bench.tasks()[0]) == TaskState.ASSIGNED)
    assert metrics.DEFECTS._value.get() > before
