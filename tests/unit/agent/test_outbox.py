"""Reports on their way to a manager."""

from __future__ import annotations

from agent.outbox import BATCH_MAX, Outbox
from swarm.v1 import TaskReport, TaskState, TaskStatus


def report(task_id: str, state: TaskState = TaskState.RUNNING) -> TaskReport:
    return TaskReport(task_id=task_id, status=TaskStatus(state=state))


def outbox() -> Outbox:
    return Outbox(lambda: None)


def test_one_batch_is_under_way_at_a_time() -> None:
    box = outbox()
    box.put(report("a"))
    first = box.take()
    assert first is not None
    box.put(report("b"))
    assert box.take() is None
    box.acknowledged(first.sequence)
    second = box.take()
    assert second is not None
    assert [r.task_id for r in second.reports] == ["b"]
    assert second.sequence == first.sequence + 1


def test_only_the_latest_state_of_a_task_is_told_in_order_of_change() -> None:
    box = outbox()
    box.put(report("a", TaskState.PREPARING))
    box.put(report("b"))
    box.put(report("a", TaskState.RUNNING))
    batch = box.take()
    assert batch is not None
    assert [(r.task_id, r.status and r.status.state) for r in batch.reports] == [
        ("b", TaskState.RUNNING),
        ("a", TaskState.RUNNING),
    ]


def test_what_changed_while_its_batch_was_under_way_is_told_again() -> None:
    box = outbox()
    box.put(report("a", TaskState.RUNNING))
    batch = box.take()
    assert batch is not None
    box.put(report("a", TaskState.FAILED))
    box.acknowledged(batch.sequence)
    again = box.take()
    assert again is not None
    assert again.reports == (report("a", TaskState.FAILED),)


def test_unacknowledged_batch_is_sent_again_in_the_next_session() -> None:
    box = outbox()
    box.put(report("a"))
    first = box.take()
    assert first is not None
    box.restart()
    again = box.take()
    assert again is not None
    assert again.reports == first.reports
    box.acknowledged(first.sequence)  # a late answer to the lost one counts for nothing
    assert len(box) == 1
    box.acknowledged(again.sequence)
    assert len(box) == 0


def test_large_backlog_goes_out_in_parts() -> None:
    box = outbox()
    for number in range(BATCH_MAX + 5):
        box.put(report(str(number)))
    first = box.take()
    assert first is not None and len(first.reports) == BATCH_MAX
    box.acknowledged(first.sequence)
    rest = box.take()
    assert rest is not None and len(rest.reports) == 5


def test_owner_hears_when_there_is_something_to_send() -> None:
    calls: list[None] = []
    box = Outbox(lambda: calls.append(None))
    box.put(report("a"))
    assert len(calls) == 1
