"""What waits while the store cannot write, however much agents say: in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from manager.dispatcher.session import BATCHES_MAX, REPORTS_MAX
from swarm.v1 import (
    AgentMessage,
    Heartbeat,
    NodeDescription,
    NodeState,
    StatusBatch,
    Task,
    TaskReport,
    TaskState,
    TaskStatus,
)
from tests.unit.dispatcher.managers import Managers, Raw, cluster, within

pytestmark = pytest.mark.looptime


def report(number: int, task_id: str = "t") -> TaskReport:
    status = TaskStatus(state=TaskState.RUNNING, timestamp_ns=2**61 + number)
    return TaskReport(task_id=task_id, status=status)


def batch(number: int, reports: int = 1) -> AgentMessage:
    return AgentMessage(
        statuses=StatusBatch(
            sequence=number, reports=tuple(report(number, f"t{i}") for i in range(reports))
        )
    )


def waiting(c: Managers) -> tuple[int, int]:
    """Reports and node changes that wait."""
    intake = c.managers["m1"].dispatcher._intake
    reports = sum(len(b.reports) for batches in intake._batches.values() for b in batches)
    return reports, len(intake._nodes)


def acknowledged(session: Raw) -> list[int]:
    return [m.statuses.sequence for m in session.heard if m.statuses is not None]


async def test_agent_that_does_not_wait_is_not_read_on_until_there_is_room() -> None:
    async with cluster(1, 1) as c:
        session = await Raw(c, "m1", "n1").open()
        await within(1, lambda: c.status("n1").state == NodeState.READY)
        c.managers["m1"].engine.hold_commits()
        for number in range(100):
            session.say(batch(number))
            session.say(AgentMessage(heartbeat=Heartbeat(sequence=number)))
        await asyncio.sleep(1)
        assert waiting(c)[0] <= BATCHES_MAX
        c.managers["m1"].engine.let_commits()
        await within(5, lambda: len(acknowledged(session)) == 100)
        assert acknowledged(session) == list(range(100))
        assert not session.ended()


async def test_large_batches_are_counted_by_their_reports() -> None:
    async with cluster(1, 1) as c:
        session = await Raw(c, "m1", "n1").open()
        await within(1, lambda: c.status("n1").state == NodeState.READY)
        c.managers["m1"].engine.hold_commits()
        session.say(AgentMessage(description=NodeDescription(hostname="x")))
        await asyncio.sleep(0.1)  # a commit is under way
        for number in range(6):
            session.say(batch(number, REPORTS_MAX // 2))
        await asyncio.sleep(1)
        assert waiting(c)[0] == REPORTS_MAX


async def test_agent_that_comes_again_and_again_leaves_nothing_behind() -> None:
    async with cluster(1, 1) as c:
        await c.store.update(
            lambda d: d.put(Task(id="t", node_id="n1", desired_state=TaskState.RUNNING))
        )
        c.managers["m1"].engine.hold_commits()
        first = await Raw(c, "m1", "n1").open()
        await asyncio.sleep(0.1)  # its commit is under way
        await first.close()
        for number in range(50):
            session = await Raw(c, "m1", "n1").open(*(report(number, "t") for _ in range(20)))
            for again in range(5):
                session.say(batch(again))
                session.say(AgentMessage(description=NodeDescription(hostname=f"{again}")))
            await asyncio.sleep(0.05)
            await session.close()
        last = await Raw(c, "m1", "n1").open(report(99))
        await asyncio.sleep(0.1)
        assert waiting(c) == (1, 1)
        c.managers["m1"].engine.let_commits()
        await within(5, lambda: c.status("n1").state == NodeState.READY)

        def entered() -> bool:
            task = c.store.get(Task, "t")
            return task is not None and task.status == report(99).status

        await within(5, entered)
        assert not last.ended()
