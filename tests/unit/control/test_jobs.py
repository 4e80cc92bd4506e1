"""Jobs: attempts, gangs, timeouts, cancelling, what they are told as, and their end."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from manager.control import controller, job_book
from swarm.v1 import (
    Availability,
    ContainerStatus,
    Dependency,
    JobSpec,
    JobState,
    JobStatus,
    NodeState,
    RestartPolicy,
    Service,
    ServiceRevision,
    ServiceSpec,
    StopCause,
    Task,
    TaskState,
)
from tests.unit.control.world import (
    CPU,
    GLOBAL_JOB,
    SECOND,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)

FAST = RestartPolicy(condition="on-failure", delay_ns=SECOND)
MINUTE = 60 * SECOND


def spec_of(total: int = 1, at_once: int | None = None, **changes: Any) -> ServiceSpec:
    """A job with a JobSpec; `gang`, `timeout_ns`, `keep_ns`, `queue` go into it."""
    names = JobSpec.__struct_fields__
    given = {k: changes.pop(k) for k in list(changes) if k in names}
    changes.setdefault("restart", FAST)
    return make_spec("batch", mode=job(total, at_once), job=JobSpec(**given), **changes)


def respec(world: World, sid: str, **changes: Any) -> None:
    """Another JobSpec, for the same iteration."""
    service = world.service(sid)
    assert service.spec is not None
    assert service.spec.job is not None
    spec = structs.replace(service.spec, job=structs.replace(service.spec.job, **changes))
    number = service.spec_version + 1
    service = structs.replace(
        service, spec=spec, spec_version=number, previous_spec_version=service.spec_version
    )
    revision = ServiceRevision(
        id=f"{sid}.{number}", service_id=sid, spec_version=number, spec=service.spec
    )
    world.put(service, revision)


def told(world: World, sid: str) -> JobStatus:
    status = world.service(sid).job_status
    assert status is not None
    return status


def end(world: World, task: Task, code: int = 0) -> None:
    """The task exits with the code."""
    container = ContainerStatus(container_id="c", exit_code=code)
    if code:
        err = f"task: non-zero exit ({code})"
        world.report(task, S.FAILED, err=err, container=container)
    else:
        world.report(task, S.COMPLETE, container=container)


def finish(world: World, sid: str) -> None:
    """All that runs completes, until nothing does."""
    for _ in range(1000):
        world.settle()
        running = world.running(sid)
        if not running:
            return
        for task in running:
            end(world, task)
    raise AssertionError("it never ends")


def slot(world: World, sid: str, number: int) -> list[Task]:
    return [t for t in world.tasks(sid) if t.slot == number]


# ---------------------------------------------------------------- what it is told as


def test_a_job_is_queued_runs_and_completes() -> None:
    world = World(1)
    world.set_availability("n1", Availability.PAUSE)
    sid = world.create(spec_of(2))
    world.settle()
    begun_ns = world.clock.now_ns()
    assert told(world, sid).state == JobState.QUEUED
    assert begun_ns - told(world, sid).queued_at_ns < SECOND
    assert told(world, sid).started_at_ns == 0
    world.set_availability("n1", Availability.ACTIVE)
    world.settle()
    assert told(world, sid).state == JobState.RUNNING
    assert told(world, sid).started_at_ns >= begun_ns
    finish(world, sid)
    status = told(world, sid)
    assert (status.state, status.exit_code, status.completed, status.failed) == (
        JobState.COMPLETE, 0, 2, 0,
    )  # fmt: skip
    assert status.ended_at_ns >= status.started_at_ns


def test_the_service_is_written_when_its_state_changes_and_not_with_each_task() -> None:
    world = World(2)
    sid = world.create(spec_of(20, 2))
    versions = set()
    for _ in range(21):
        world.settle()
        meta = world.service(sid).meta
        assert meta is not None
        versions.add(meta.version)
        for task in world.running(sid)[:1]:
            end(world, task)
    assert told(world, sid).completed == 20
    # Running, and complete; queued is gone before the first look.
    assert len(versions) == 2


def test_another_iteration_is_told_anew() -> None:
    world = World(1)
    sid = world.create(spec_of(1))
    finish(world, sid)
    world.update(sid, spec_of(1))
    world.settle()
    status = told(world, sid)
    assert (status.iteration, status.state, status.ended_at_ns) == (1, JobState.RUNNING, 0)
    assert [t.job_iteration for t in world.tasks(sid)] == [1]


def test_a_job_that_lost_its_only_node_is_queued_again() -> None:
    world = World(1)
    sid = world.create(spec_of(1))
    world.settle()
    world.set_state("n1", NodeState.DOWN)
    world.settle()
    assert told(world, sid).state == JobState.QUEUED
    assert told(world, sid).started_at_ns > 0


# ---------------------------------------------------------------- attempts


def test_the_delay_before_an_attempt_doubles_up_to_five_minutes() -> None:
    world = World(1)
    policy = RestartPolicy(condition="on-failure", delay_ns=40 * SECOND)
    sid = world.create(spec_of(1, restart=policy))
    waits = []
    for _ in range(6):
        world.settle()
        end(world, world.running(sid)[0], 1)
        failed_ns = world.clock.now_ns()
        while not world.running(sid):
            world.pass_time(1, step=1)
        waits.append((world.clock.now_ns() - failed_ns) // SECOND)
    assert waits == [41, 81, 161, 301, 301, 301] or waits == [40, 80, 160, 300, 300, 300]


def test_the_delay_of_a_docker_job_stays_the_same() -> None:
    world = World(1)
    sid = world.create(make_spec(mode=job(1), restart=FAST))
    for _ in range(5):
        world.settle()
        end(world, world.running(sid)[0], 1)
        world.pass_time(1.2)
        assert world.running(sid)


def test_nothing_has_a_place_while_an_attempt_waits() -> None:
    """The next task is made when it is due; meanwhile its place is anybody's."""
    world = World(1)
    sid = world.create(spec_of(2, 1))
    world.settle()
    end(world, world.running(sid)[0], 1)
    world.settle()
    assert [t.slot for t in world.live(sid)] == [2]
    world.pass_time(5)
    # Only one at a time: the first slot waits until the second has ended.
    assert [t.slot for t in world.live(sid)] == [2]
    end(world, world.running(sid)[0])
    world.settle()
    assert [t.slot for t in world.live(sid)] == [1]
    finish(world, sid)
    assert told(world, sid).state == JobState.COMPLETE


@pytest.mark.parametrize("limit", [1, 3])
def test_attempts_are_bounded_and_then_the_job_has_failed(limit: int) -> None:
    world = World(1)
    policy = RestartPolicy(condition="on-failure", delay_ns=SECOND, max_attempts=limit)
    sid = world.create(spec_of(2, restart=policy))
    runs = 0
    for _ in range(200):
        world.settle()
        for task in world.running(sid):
            runs += task.slot == 1
            end(world, task, 7 if task.slot == 1 else 0)
        world.pass_time(1)
    assert runs == 1 + limit
    status = told(world, sid)
    assert (status.state, status.exit_code) == (JobState.FAILED, 7)
    assert (status.completed, status.failed) == (1, 1)
    assert "exited with code 7" in status.message
    assert world.live(sid) == []


def test_the_other_tasks_of_a_job_that_fails_go_on() -> None:
    world = World(1)
    sid = world.create(spec_of(3, 1, restart=RestartPolicy(condition="none")))
    world.settle()
    end(world, world.running(sid)[0], 2)
    world.settle()
    assert told(world, sid).state == JobState.RUNNING
    finish(world, sid)
    status = told(world, sid)
    assert (status.state, status.completed, status.failed) == (JobState.FAILED, 2, 1)


def test_more_attempts_bring_a_failed_job_back_to_life() -> None:
    world = World(1)
    sid = world.create(spec_of(1, restart=RestartPolicy(condition="none")))
    world.settle()
    end(world, world.running(sid)[0], 2)
    world.settle()
    assert told(world, sid).state == JobState.FAILED
    service = world.service(sid)
    assert service.spec is not None
    assert service.spec.task is not None
    again = structs.replace(service.spec, task=structs.replace(service.spec.task, restart=FAST))
    world.put(structs.replace(service, spec=again, spec_version=2))
    world.pass_time(2)
    assert told(world, sid).state == JobState.RUNNING
    assert told(world, sid).ended_at_ns == 0


def test_a_task_that_was_preempted_is_replaced_without_counting() -> None:
    world = World(1)
    sid = world.create(spec_of(1, restart=RestartPolicy(condition="none")))
    world.settle()
    for _ in range(3):
        task = world.running(sid)[0]
        stopped = structs.replace(
            task, desired_state=S.SHUTDOWN, stop_cause=StopCause.PREEMPTED, stop_message="for web"
        )
        world.put(stopped)
        world.report(world.tasks(sid)[-1], S.FAILED, err="task: non-zero exit (143)")
        world.settle()
        assert world.running(sid)[0].restarts_ns == ()
    finish(world, sid)
    assert told(world, sid).state == JobState.COMPLETE


def test_a_drained_node_stops_a_task_and_the_next_one_starts_when_it_has() -> None:
    world = World(2)
    sid = world.create(spec_of(1))
    world.settle()
    first = world.running(sid)[0]
    world.frozen.add(first.node_id)
    world.set_availability(first.node_id, Availability.DRAIN)
    world.settle()
    (stopping,) = world.tasks(sid)
    assert (stopping.desired_state, stopping.stop_cause) == (S.SHUTDOWN, StopCause.MOVED)
    world.frozen.clear()
    world.settle()
    assert [t.node_id for t in world.running(sid)] != [first.node_id]


def test_a_slot_that_completes_after_all_runs_no_second_time() -> None:
    world = World(2)
    sid = world.create(spec_of(1))
    world.settle()
    first = world.running(sid)[0]
    world.set_state(first.node_id, NodeState.DOWN)
    world.settle()
    assert len(world.running(sid)) == 1
    # The node is back, and the task had completed before it heard of anything.
    (lost,) = (t for t in world.tasks(sid) if t.id == first.id)
    world.frozen = {"n1", "n2"}
    world.set_state(first.node_id, NodeState.READY)
    end(world, lost)
    world.frozen.clear()
    world.settle()
    assert world.live(sid) == []
    assert told(world, sid).state == JobState.COMPLETE


def test_a_new_leader_tries_again_when_the_old_one_would_have() -> None:
    world = World(1)
    sid = world.create(spec_of(1, restart=RestartPolicy(condition="", delay_ns=10 * SECOND)))
    world.settle()
    end(world, world.running(sid)[0], 1)
    world.pass_time(6)
    world.controller.reset(world.tables)
    world.pass_time(3)
    assert not world.live(sid)
    world.pass_time(2)
    assert world.running(sid)


# ---------------------------------------------------------------- timeouts


def test_a_task_that_runs_for_too_long_is_stopped_and_has_failed() -> None:
    world = World(1)
    sid = world.create(spec_of(2, 1, timeout_ns=MINUTE))
    world.settle()
    world.pass_time(58, step=2)
    assert len(world.running(sid)) == 1
    world.pass_time(4)
    first = slot(world, sid, 1)[-1]
    assert (first.stop_cause, state_of(first)) == (StopCause.TIMED_OUT, S.SHUTDOWN)
    finish(world, sid)
    status = told(world, sid)
    assert (status.state, status.completed, status.failed) == (JobState.FAILED, 1, 1)
    assert status.exit_code is None
    assert "1m" in status.message


def test_a_new_leader_keeps_the_time_of_tasks_that_run() -> None:
    world = World(1)
    sid = world.create(spec_of(1, timeout_ns=MINUTE))
    world.settle()
    world.pass_time(40, step=5)
    world.controller.reset(world.tables)
    world.pass_time(21, step=1)
    assert slot(world, sid, 1)[-1].stop_cause == StopCause.TIMED_OUT


def test_failures_too_old_to_count_are_forgotten() -> None:
    world = World(1)
    sid = world.create(spec_of(1, restart=RestartPolicy(condition="none")))
    world.settle()
    end(world, world.running(sid)[0], 1)
    world.settle()
    assert world.controller.table.failing
    world.pass_time(700, step=50)
    world.create(make_spec("other"))
    world.settle()
    assert not world.controller.table.failing
    assert not world.controller.table.nodes["n1"].failures


def test_a_global_job_tries_again_on_one_node_while_others_still_run() -> None:
    world = World(3)
    sid = world.create(make_spec("batch", mode=GLOBAL_JOB, job=JobSpec(), restart=FAST))
    world.settle()
    end(world, world.running(sid)[0], 1)
    world.pass_time(3)
    assert len(world.running(sid)) == 3


# ---------------------------------------------------------------- gangs


def test_a_gang_starts_together_when_all_are_ready() -> None:
    world = World(3)
    world.frozen.add("n3")
    sid = world.create(spec_of(3, gang=True))
    world.settle()
    assert {t.desired_state for t in world.live(sid)} == {S.READY}
    assert world.running(sid) == []
    world.frozen.clear()
    world.settle()
    assert len(world.running(sid)) == 3


def test_when_one_of_a_gang_fails_all_stop_and_try_again() -> None:
    world = World(3)
    policy = RestartPolicy(condition="on-failure", delay_ns=5 * SECOND, max_attempts=2)
    sid = world.create(spec_of(3, gang=True, restart=policy))
    world.settle()
    end(world, world.running(sid)[1], 1)
    world.settle()
    assert world.live(sid) == []
    causes = [t.stop_cause for t in world.tasks(sid)]
    assert sorted(causes) == [StopCause.UNSPECIFIED, StopCause.GANG, StopCause.GANG]
    assert "task 2 of its gang failed: exited with code 1" in {
        t.stop_message for t in world.tasks(sid)
    }
    world.pass_time(6)
    assert len(world.running(sid)) == 3
    assert {len(t.restarts_ns) for t in world.running(sid)} == {1}
    # Another one of it: it counts for the gang.
    end(world, world.running(sid)[0], 1)
    world.pass_time(12)
    end(world, world.running(sid)[2], 1)
    world.pass_time(60)
    assert world.live(sid) == []
    status = told(world, sid)
    assert (status.state, status.exit_code) == (JobState.FAILED, 1)


def test_a_gang_that_runs_again_is_not_looked_at_until_something_changes() -> None:
    world = World(3)
    sid = world.create(spec_of(3, gang=True))
    world.settle()
    end(world, world.running(sid)[0], 1)
    world.pass_time(200)
    assert len(world.running(sid)) == 3
    world.clock.advance(seconds=0.001)
    assert not world.controller.has_work(world.clock.now_ns())
    assert (world.controller.next_wake_ns() or 1 << 62) > world.clock.now_ns() + SECOND


def test_a_gang_that_was_preempted_waits_anew_without_counting() -> None:
    world = World(3)
    sid = world.create(spec_of(3, gang=True, restart=RestartPolicy(condition="none")))
    world.settle()
    task = world.running(sid)[0]
    world.put(
        structs.replace(
            task, desired_state=S.SHUTDOWN, stop_cause=StopCause.PREEMPTED, stop_message="for web"
        )
    )
    world.settle()
    assert len(world.running(sid)) == 3
    assert task.id not in {t.id for t in world.running(sid)}
    finish(world, sid)
    assert told(world, sid).state == JobState.COMPLETE


def test_a_gang_that_loses_a_node_starts_again_elsewhere() -> None:
    world = World(4)
    sid = world.create(spec_of(3, gang=True))
    world.settle()
    lost = world.running(sid)[0].node_id
    world.set_state(lost, NodeState.DOWN)
    world.settle()
    running = world.running(sid)
    assert len(running) == 3
    assert lost not in {t.node_id for t in running}
    assert {t.restarts_ns for t in running} == {()}


def test_what_has_completed_of_a_gang_does_not_run_again() -> None:
    world = World(3)
    sid = world.create(spec_of(3, gang=True))
    world.settle()
    end(world, world.running(sid)[0])
    world.settle()
    assert len(world.running(sid)) == 2
    end(world, world.running(sid)[0], 1)
    world.pass_time(3)
    assert sorted(t.slot for t in world.running(sid)) == [2, 3]
    finish(world, sid)
    assert told(world, sid).state == JobState.COMPLETE


def test_a_gang_larger_than_a_tick_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(3)
    world.controller = controller.Controller(world.rng, created_max=2)
    world.controller.reset(world.tables)
    sid = world.create(spec_of(5, gang=True))
    world.tick()
    assert len(world.tasks(sid)) == 5


# ---------------------------------------------------------------- cancelling, and the end


@pytest.mark.parametrize("gang", [False, True])
def test_a_cancelled_job_ends(gang: bool) -> None:
    world = World(2)
    sid = world.create(spec_of(4, None if gang else 2, gang=gang))
    world.settle()
    world.frozen = {"n1", "n2"}
    respec(world, sid, cancelled=True)
    world.settle()
    assert world.live(sid) == []
    assert {t.stop_cause for t in world.tasks(sid)} == {StopCause.CANCELLED}
    assert told(world, sid).state == JobState.RUNNING
    world.frozen.clear()
    world.settle()
    status = told(world, sid)
    assert (status.state, status.exit_code) == (JobState.CANCELLED, None)
    assert world.tasks(sid), "they stay as history"


def test_a_job_cancelled_before_it_had_a_place_leaves_nothing() -> None:
    world = World(0)
    sid = world.create(spec_of(4))
    world.settle()
    respec(world, sid, cancelled=True)
    world.settle()
    assert world.tasks(sid) == []
    assert told(world, sid).state == JobState.CANCELLED


def test_a_job_that_has_completed_stays_so_when_it_is_cancelled() -> None:
    world = World(1)
    sid = world.create(spec_of(1))
    finish(world, sid)
    respec(world, sid, cancelled=True)
    world.settle()
    assert told(world, sid).state == JobState.COMPLETE


def test_a_job_goes_when_it_was_kept_for_long_enough() -> None:
    world = World(1)
    sid = world.create(spec_of(3, keep_ns=MINUTE))
    finish(world, sid)
    world.pass_time(50, step=5)
    assert world.tables.get(Service, sid)
    world.controller.reset(world.tables)
    world.pass_time(20, step=1)
    assert world.tables.get(Service, sid) is None
    assert not list(world.tables.all(Task))
    assert not list(world.tables.all(ServiceRevision))


def test_a_job_is_removed_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "LOOKED_MAX", 10)
    world = World(2)
    sid = world.create(spec_of(35))
    world.settle()
    world.remove(sid)
    assert world.tick() == 10
    assert world.tick() == 10
    world.settle()
    assert world.tables.get(Service, sid) is None
    assert not list(world.tables.all(Task))


def test_a_job_that_is_removed_does_not_wait_for_a_lost_node() -> None:
    world = World(2)
    sid = world.create(spec_of(4))
    world.settle()
    world.set_state("n2", NodeState.DOWN)
    world.remove(sid)
    world.settle()
    assert world.tables.get(Service, sid) is None
    assert {t.node_id for t in world.tables.all(Task)} == {"n2"}


# ---------------------------------------------------------------- many tasks, others


def test_no_more_tasks_are_made_than_may_find_a_place_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_book, "BACKLOG_MAX", 5)
    monkeypatch.setattr("manager.control.jobs.BACKLOG_MAX", 5)
    world = World(1)
    world.controller = controller.Controller(world.rng, created_max=8)
    world.controller.reset(world.tables)
    sid = world.create(spec_of(100, cpu=CPU))
    world.settle()
    assert len(world.running(sid)) == 4
    assert len(world.live(sid)) <= 4 + 8
    finish(world, sid)
    assert told(world, sid).completed == 100


def test_a_job_waits_for_what_it_depends_on() -> None:
    world = World(1)
    gate = Dependency(service="db", condition="service_started", required=True)
    sid = world.create(spec_of(3, 1, depends_on=(gate,)))
    world.settle()
    assert world.tasks(sid) == []
    world.create(make_spec("db"))
    world.settle()
    finish(world, sid)
    assert told(world, sid).state == JobState.COMPLETE


def test_a_global_job_that_has_ended_runs_on_a_node_that_joins() -> None:
    world = World(2)
    spec = structs.replace(spec_of(), mode=GLOBAL_JOB)
    sid = world.create(spec)
    finish(world, sid)
    assert told(world, sid).state == JobState.COMPLETE
    assert told(world, sid).completed == 2
    world.put(make_node("n9"))
    world.settle()
    assert [t.node_id for t in world.running(sid)] == ["n9"]
    assert told(world, sid).state == JobState.RUNNING
    finish(world, sid)
    assert told(world, sid).completed == 3


def test_nothing_is_done_for_what_only_comes_a_step_further() -> None:
    """A tick of a job does not look at tasks that go on as they should."""
    world = World(4)
    sid = world.create(spec_of(40))
    world.settle()
    for task in world.running(sid)[:20]:
        end(world, task)
        assert world.controller.dirty == {sid}
        book = world.controller._books.by_id[sid]
        assert not book.dirty
        world.tick()
    assert TaskState.COMPLETE in {state_of(t) for t in world.tasks(sid)}


@pytest.mark.parametrize("gang", [False, True])
def test_what_waits_is_told_anew_why_and_nothing_is_done_without_end(gang: bool) -> None:
    world = World(1)
    sid = world.create(spec_of(2, cpu=3 * CPU, gang=gang))
    world.settle()
    for seconds in range(20):
        world.clock.advance(seconds=1)
        if seconds == 7:
            world.put(make_node("small", cpu=CPU))
        for _ in range(5):
            if not world.controller.has_work(world.clock.now_ns()):
                break
            world.tick()
        else:
            raise AssertionError("it looks again and again")
    waiting = [t for t in world.live(sid) if not t.node_id]
    assert waiting
    assert {"2 nodes" in (t.status.err if t.status else "") for t in waiting} == {True} or gang


def test_a_job_that_is_complete_has_converged_wherever_its_nodes_go() -> None:
    world = World(2)
    sid = world.create(make_spec("batch", mode=GLOBAL_JOB, job=JobSpec(), restart=FAST))
    finish(world, sid)
    assert told(world, sid).state == JobState.COMPLETE
    world.set_availability("n2", Availability.DRAIN)
    world.settle()
    status = world.status(sid)
    assert (status.converged, status.reasons, status.completed) == (True, (), 2)
