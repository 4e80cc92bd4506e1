"""The rules of the control loop, one by one, in a cluster that does as it is told."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec import structs

from swarm import states
from swarm.v1 import (
    Availability,
    Dependency,
    Network,
    NetworkAttachmentSpec,
    NetworkSpec,
    NodeState,
    Placement,
    RestartPolicy,
    Service,
    ServiceRevision,
    Task,
)
from tests.unit.control.world import (
    CPU,
    GLOBAL,
    GLOBAL_JOB,
    SECOND,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)

ONCE = RestartPolicy(condition="none")
QUICK = RestartPolicy(condition="any", delay_ns=1 * SECOND)


# ---------------------------------------------------------------- replicated


def test_replicas_fill_slots_one_to_n_spread_over_the_nodes() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=6))
    world.settle()
    assert [t.slot for t in world.running(sid)] == [1, 2, 3, 4, 5, 6]
    assert Counter(t.node_id for t in world.running(sid)) == {"n1": 2, "n2": 2, "n3": 2}
    assert world.at_rest(sid).converged


def test_a_task_is_placed_in_the_tick_that_makes_it() -> None:
    world = World(1)
    sid = world.create(make_spec())
    world.tick()
    (task,) = world.tasks(sid)
    assert (state_of(task), task.node_id, task.desired_state) == (S.ASSIGNED, "n1", S.RUNNING)


def test_scaling_up_fills_the_lowest_free_slots() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=6))
    world.settle()
    world.scale(sid, 3)
    world.settle()
    left = {t.slot for t in world.running(sid)}
    world.scale(sid, 5)
    world.settle()
    assert {t.slot for t in world.running(sid)} >= left
    assert max(t.slot for t in world.running(sid)) <= 5


def test_scaling_down_keeps_the_spread_and_leaves_no_history() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=9))
    world.settle()
    world.scale(sid, 3)
    world.settle()
    assert Counter(t.node_id for t in world.tasks(sid)) == {"n1": 1, "n2": 1, "n3": 1}


def test_scaling_down_takes_slots_that_do_not_run_first() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=3))
    world.settle()
    first = world.running(sid)[0]
    world.report(first, S.FAILED)
    world.tick()
    world.scale(sid, 2)
    world.settle()
    assert {t.slot for t in world.running(sid)} == {2, 3}


def test_zero_replicas_is_converged_once_nothing_runs() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    world.scale(sid, 0)
    assert not world.status(sid).converged
    world.settle()
    assert world.tasks(sid) == []
    assert world.at_rest(sid).converged


def test_a_second_tick_changes_nothing() -> None:
    world = World(2)
    world.create(make_spec(replicas=5, cpu=3 * CPU))
    assert world.tick() > 0
    world.controller.dirty.update(s.id for s in world.tables.all(Service))
    assert world.tick() == 0


def test_one_tick_creates_no_more_than_its_limit_and_the_next_goes_on() -> None:
    world = World(2)
    world.controller._created_max = 10
    sid = world.create(make_spec(replicas=25))
    world.tick()
    assert len(world.tasks(sid)) == 10
    world.settle()
    assert len(world.running(sid)) == 25


def test_a_task_without_room_is_pending_with_the_reason_and_placed_when_there_is_room() -> None:
    world = World(1)
    sid = world.create(make_spec(replicas=2, cpu=3 * CPU))
    world.settle()
    pending = [t for t in world.tasks(sid) if state_of(t) == S.PENDING]
    assert len(pending) == 1
    assert pending[0].status is not None
    assert pending[0].status.err == (
        "no suitable node (1 of 1 node short of CPU: need 3, best free 1 on n1)"
    )
    status = world.status(sid)
    assert not status.converged
    assert status.stuck
    assert status.reasons == (
        "no more than 1 of 2 replicas can ever be placed: no suitable node (1 of 1 node short of "
        "CPU: need 3, best free 1 on n1)",
    )
    world.put(make_node("n2"))
    world.settle()
    assert len(world.running(sid)) == 2


def test_a_removed_service_leaves_no_task_and_no_version() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=4))
    world.settle()
    world.remove(sid)
    world.settle()
    assert world.tables.get(Service, sid) is None
    assert world.tables.count(Task) == 0
    assert world.tables.count(ServiceRevision) == 0


def test_a_removed_service_does_not_wait_for_a_node_that_is_down() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    world.set_state("n1", NodeState.DOWN)
    world.remove(sid)
    world.settle()
    assert world.tables.get(Service, sid) is None
    (task,) = world.tables.all(Task)
    assert task.desired_state == S.REMOVE
    world.set_state("n1", NodeState.READY)
    world.settle()
    assert world.tables.count(Task) == 0
    assert world.tables.count(ServiceRevision) == 0


def test_only_versions_in_use_are_kept() -> None:
    world = World(1)
    sid = world.create(make_spec(replicas=1))
    world.settle()
    for replicas in (2, 3, 2, 4):
        world.scale(sid, replicas)
        world.settle()
    versions = {r.spec_version for r in world.tables.all(ServiceRevision)}
    used = {t.spec_version for t in world.tasks(sid)}
    assert versions == used | {4, 5}


# ---------------------------------------------------------------- restart


def test_a_failed_task_is_replaced_after_the_delay() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=RestartPolicy(delay_ns=5 * SECOND)))
    world.settle()
    (task,) = world.running(sid)
    world.clock.advance(seconds=1)
    world.report(task, S.FAILED, err="exit code 1")
    world.tick()
    old, new = world.tasks(sid)
    assert (old.id, old.desired_state) == (task.id, S.SHUTDOWN)
    assert (new.slot, new.desired_state) == (1, S.READY)
    assert new.start_after_ns == world.clock.now_ns() + 5 * SECOND
    assert state_of(new) == S.ASSIGNED, "it is prepared while it waits"
    world.pass_time(4.5)
    assert world.running(sid) == []
    world.pass_time(1)
    assert [t.id for t in world.running(sid)] == [new.id]


def test_a_replacement_that_fails_to_get_ready_is_not_replaced_before_it_was_due() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=RestartPolicy(delay_ns=5 * SECOND, max_delay_ns=0)))
    world.settle()
    world.report(world.running(sid)[0], S.FAILED, err="exit code 1")
    world.tick()
    failures = 0
    for _ in range(200):
        (newest,) = [t for t in world.tasks(sid) if t.desired_state == S.READY]
        if state_of(newest) != S.REJECTED:
            world.report(newest, S.REJECTED, err="the image cannot be pulled")
            failures += 1
        world.clock.advance(seconds=0.1)
        world.tick()
    assert failures == 4, "20 s at a restart delay of 5 s"


def test_a_new_spec_does_not_wait_for_the_delay_of_a_failed_one() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=RestartPolicy(delay_ns=5 * SECOND)))
    world.settle()
    world.report(world.running(sid)[0], S.FAILED, err="exit code 1")
    world.tick()
    (newest,) = [t for t in world.tasks(sid) if t.desired_state == S.READY]
    world.report(newest, S.REJECTED, err="the image cannot be pulled")
    world.tick()
    world.update(sid, make_spec(image="web:2", restart=RestartPolicy(delay_ns=5 * SECOND)))
    world.tick()
    assert [world.image(t) for t in world.live(sid)] == ["web:2"]


def test_tasks_left_of_a_removed_service_only_get_fewer() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=4))
    world.settle()
    world.remove(sid)
    left = [world.status(sid)]
    world.tick()
    left.append(world.status(sid))
    assert [(status.desired, status.stopping) for status in left] == [(0, 4), (0, 4)]


@pytest.mark.parametrize(
    ("condition", "end", "again"),
    [
        ("any", S.COMPLETE, True),
        ("", S.COMPLETE, True),
        ("any", S.FAILED, True),
        ("on-failure", S.COMPLETE, False),
        ("on-failure", S.FAILED, True),
        ("on-failure", S.REJECTED, True),
        ("none", S.COMPLETE, False),
        ("none", S.FAILED, False),
    ],
)
def test_restart_condition(condition: str, end: S, again: bool) -> None:
    world = World(1)
    sid = world.create(make_spec(restart=RestartPolicy(condition=condition, delay_ns=0)))
    world.tick()
    (task,) = world.tasks(sid)
    world.report(task, end)
    world.settle()
    assert len(world.running(sid)) == (1 if again else 0)
    world.controller.dirty.add(sid)
    assert world.tick() == 0, "a slot that came to its end stays as it is"


def test_a_completed_task_that_is_not_restarted_counts_as_converged_a_failed_one_not() -> None:
    for end, converged in ((S.COMPLETE, True), (S.FAILED, False)):
        world = World(1)
        sid = world.create(make_spec(restart=ONCE))
        world.settle()
        world.report(world.running(sid)[0], end, err="" if converged else "exit code 3")
        world.settle()
        assert world.at_rest(sid).converged is converged
    assert world.status(sid).reasons == (
        "1 of 1 replica ended and will not be restarted: exit code 3",
    )


@pytest.mark.parametrize("window_s", [0, 2, 3600])
def test_max_attempts_ends_a_crash_loop_whatever_the_window(window_s: int) -> None:
    world = World(1)
    policy = RestartPolicy(delay_ns=5 * SECOND, max_attempts=3, window_ns=window_s * SECOND)
    world.failing.add("web:1")
    sid = world.create(make_spec(restart=policy))
    world.pass_time(120, step=0.25)
    assert world.live(sid) == []
    assert len([t for t in world.tasks(sid) if state_of(t) == S.FAILED]) == 4


@pytest.mark.parametrize("kind", ["service", "job"])
def test_a_slow_start_is_no_part_of_the_window(kind: str) -> None:
    """Else what takes long to start and then crashes at once would be tried for ever."""
    world = World(1)
    policy = RestartPolicy(delay_ns=SECOND, max_attempts=3, window_ns=2 * SECOND)
    sid = world.create(make_spec(restart=policy, mode=job(1) if kind == "job" else None))
    world.failing.add("web:1")
    for _ in range(12):
        world.frozen.add("n1")
        world.pass_time(20)
        world.frozen.clear()
        world.settle()
    assert world.live(sid) == []
    assert len([t for t in world.tasks(sid) if state_of(t) == S.FAILED]) == 4


def test_restarts_outside_the_window_do_not_count() -> None:
    world = World(1)
    policy = RestartPolicy(delay_ns=1 * SECOND, max_attempts=1, window_ns=10 * SECOND)
    sid = world.create(make_spec(restart=policy))
    world.settle()
    for _ in range(4):
        world.report(world.running(sid)[0], S.FAILED)
        world.pass_time(30)
        assert len(world.running(sid)) == 1


def test_a_new_template_brings_a_slot_that_gave_up_back() -> None:
    world = World(1)
    world.failing.add("web:1")
    sid = world.create(make_spec(restart=ONCE))
    world.settle()
    assert world.live(sid) == []
    world.update(sid, make_spec(restart=ONCE, image="web:2"))
    world.settle()
    assert len(world.running(sid)) == 1


@pytest.mark.parametrize("limit", [0, 2, 5])
def test_history_keeps_the_newest_ended_tasks_of_a_slot(limit: int) -> None:
    world = World(1, history=limit)
    sid = world.create(make_spec(restart=RestartPolicy(delay_ns=0, max_delay_ns=0)))
    world.settle()
    for _ in range(8):
        world.report(world.running(sid)[0], S.FAILED)
        world.pass_time(1)
    ended = [t for t in world.tasks(sid) if states.ended(state_of(t))]
    assert len(ended) == limit
    assert len(world.running(sid)) == 1


def test_without_history_a_slot_that_gave_up_is_not_begun_anew() -> None:
    world = World(1, history=0)
    world.failing.add("web:1")
    sid = world.create(make_spec(restart=ONCE))
    world.pass_time(5)
    assert len(world.tasks(sid)) == 1


# ---------------------------------------------------------------- nodes


def test_a_lost_node_s_tasks_are_replaced_at_once_and_stop_when_it_is_back() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=3))
    world.settle()
    world.set_state("n1", NodeState.DOWN)
    world.tick()
    (lost,) = [t for t in world.tasks(sid) if t.node_id == "n1"]
    assert (lost.desired_state, state_of(lost)) == (S.SHUTDOWN, S.RUNNING)
    new = world.live(sid)[0]
    assert (new.slot, new.desired_state, new.start_after_ns) == (lost.slot, S.RUNNING, 0)
    world.settle()
    assert len(world.running(sid)) == 3
    assert world.at_rest(sid).converged, "nobody waits for a node that is down"
    world.set_state("n1", NodeState.READY)
    world.settle()
    assert state_of(next(t for t in world.tasks(sid) if t.id == lost.id)) == S.SHUTDOWN
    assert len(world.running(sid)) == 3


def test_an_unknown_node_keeps_its_tasks_and_gets_none() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    world.set_state("n1", NodeState.UNKNOWN)
    world.scale(sid, 4)
    world.settle()
    assert Counter(t.node_id for t in world.running(sid)) == {"n1": 1, "n2": 3}


def test_a_replacement_waits_for_the_stop_but_not_for_ever() -> None:
    world = World(2)
    world.label("n1", zone="a")
    placement = Placement(constraints=("node.labels.zone != b",))
    sid = world.create(make_spec(replicas=2, placement=placement))
    world.settle()
    world.frozen.add("n1")
    world.label("n1", zone="b")
    world.settle()
    (old,) = [t for t in world.tasks(sid) if t.node_id == "n1"]
    (new,) = [t for t in world.live(sid) if t.slot == old.slot]
    assert (old.desired_state, new.desired_state, new.node_id) == (S.SHUTDOWN, S.READY, "n2")
    world.pass_time(60)
    assert len(world.running(sid)) == 1
    world.pass_time(15)
    assert len(world.running(sid)) == 2


def test_pause_keeps_tasks_and_gives_none() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    world.set_availability("n1", Availability.PAUSE)
    world.scale(sid, 4)
    world.settle()
    assert Counter(t.node_id for t in world.running(sid)) == {"n1": 1, "n2": 3}


def test_removing_a_node_orphans_its_tasks() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    world.set_state("n1", NodeState.DOWN)
    world.remove_node("n1")
    world.settle()
    gone = [t for t in world.tasks(sid) if t.node_id == "n1"]
    assert [state_of(t) for t in gone] == [S.ORPHANED]
    assert Counter(t.node_id for t in world.running(sid)) == {"n2": 2}
    world.remove(sid)
    world.settle()
    assert world.tables.count(Task) == 0


def test_tasks_of_a_node_that_is_down_for_a_day_are_given_up() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    world.set_state("n1", NodeState.DOWN)
    world.pass_time(24 * 3600 + 60, step=1800)
    assert [state_of(t) for t in world.tasks(sid) if t.node_id == "n1"] == [S.ORPHANED]


def test_a_task_leaves_a_node_that_no_longer_satisfies_the_constraints() -> None:
    world = World(2)
    for node_id in ("n1", "n2"):
        world.label(node_id, zone="a")
    placement = Placement(constraints=("node.labels.zone == a",))
    sid = world.create(make_spec(replicas=2, placement=placement))
    world.settle()
    world.label("n1", zone="b")
    world.settle()
    assert Counter(t.node_id for t in world.running(sid)) == {"n2": 2}


# ---------------------------------------------------------------- global


def test_global_runs_one_task_on_each_eligible_node_as_nodes_come_and_go() -> None:
    world = World(3)
    world.label("n3", disk="hdd")
    placement = Placement(constraints=("node.labels.disk != hdd",))
    sid = world.create(make_spec(mode=GLOBAL, placement=placement))
    world.settle()
    assert {t.node_id for t in world.running(sid)} == {"n1", "n2"}
    world.put(make_node("n4"))
    world.set_availability("n2", Availability.DRAIN)
    world.settle()
    assert {t.node_id for t in world.running(sid)} == {"n1", "n4"}
    assert world.at_rest(sid).converged
    world.set_availability("n2", Availability.ACTIVE)
    world.label("n3", disk="ssd")
    world.settle()
    assert {t.node_id for t in world.running(sid)} == {"n1", "n2", "n3", "n4"}


def test_global_task_comes_back_with_its_node() -> None:
    world = World(2)
    sid = world.create(make_spec(mode=GLOBAL))
    world.settle()
    world.set_state("n1", NodeState.DOWN)
    world.settle()
    assert {t.node_id for t in world.live(sid)} == {"n2"}
    world.set_state("n1", NodeState.READY)
    world.settle()
    assert {t.node_id for t in world.running(sid)} == {"n1", "n2"}
    assert len(world.running(sid)) == 2


def test_a_global_task_without_room_waits_on_its_own_node() -> None:
    world = World(1)
    big = world.create(make_spec("big", replicas=1, cpu=3 * CPU))
    world.settle()
    sid = world.create(make_spec("agent", mode=GLOBAL, cpu=2 * CPU))
    world.settle()
    (task,) = world.tasks(sid)
    assert (state_of(task), task.node_id) == (S.PENDING, "n1")
    assert task.status is not None and "short of CPU" in task.status.err
    world.scale(big, 0)
    world.settle()
    assert [t.node_id for t in world.running(sid)] == ["n1"]


def test_removing_a_node_forgets_its_global_slot() -> None:
    world = World(2)
    sid = world.create(make_spec(mode=GLOBAL))
    world.settle()
    world.remove_node("n2")
    world.settle()
    assert [t.node_id for t in world.tasks(sid)] == ["n1"]


# ---------------------------------------------------------------- jobs


def test_a_job_runs_so_many_at_a_time_until_enough_completed() -> None:
    world = World(2)
    sid = world.create(make_spec(mode=job(5, 2), restart=RestartPolicy(delay_ns=0)))
    done = 0
    while done < 5:
        world.settle()
        running = world.running(sid)
        assert 1 <= len(running) <= 2
        world.report(running[0], S.COMPLETE)
        done += 1
    world.settle()
    status = world.status(sid)
    assert (status.completed, status.desired, status.converged) == (5, 5, True)
    assert world.live(sid) == []


def test_a_failed_job_task_is_tried_again_in_its_slot() -> None:
    world = World(1)
    sid = world.create(make_spec(mode=job(1), restart=QUICK))
    world.settle()
    world.report(world.running(sid)[0], S.FAILED)
    world.pass_time(2)
    world.report(world.running(sid)[0], S.COMPLETE)
    world.pass_time(2)
    assert world.at_rest(sid).converged
    assert world.live(sid) == []


def test_a_new_iteration_runs_the_job_again() -> None:
    world = World(1)
    spec = make_spec(mode=job(1), restart=QUICK)
    sid = world.create(spec)
    world.settle()
    world.report(world.running(sid)[0], S.COMPLETE)
    world.settle()
    world.update(sid, spec)
    world.settle()
    assert len(world.running(sid)) == 1
    assert not world.status(sid).converged


def test_a_global_job_completes_once_on_each_node() -> None:
    world = World(2)
    sid = world.create(make_spec(mode=GLOBAL_JOB, restart=QUICK))
    world.settle()
    for task in world.running(sid):
        world.report(task, S.COMPLETE)
    world.pass_time(3)
    assert world.live(sid) == []
    assert world.at_rest(sid).converged


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("condition", ["service_started", "service_healthy"])
def test_a_service_waits_for_what_it_depends_on(condition: str) -> None:
    world = World(1)
    world.frozen.add("n1")
    gate = Dependency(service="db", condition=condition, required=True)
    sid = world.create(make_spec("web", depends_on=(gate,)))
    world.settle()
    assert world.tasks(sid) == []
    assert world.status(sid).reasons == ("the service waits for service db, which does not exist",)
    world.create(make_spec("db"))
    world.settle()
    assert world.tasks(sid) == []
    assert world.status(sid).reasons[0].startswith("the service waits until service db ")
    world.frozen.clear()
    world.settle()
    assert len(world.running(sid)) == 1
    assert world.at_rest(sid).converged


def test_a_service_waits_until_a_job_has_completed() -> None:
    world = World(1)
    gate = Dependency(service="init", condition="service_completed_successfully", required=True)
    init = world.create(make_spec("init", mode=job(1)))
    sid = world.create(make_spec("web", depends_on=(gate,)))
    world.settle()
    assert world.tasks(sid) == []
    world.report(world.running(init)[0], S.COMPLETE)
    world.settle()
    assert len(world.running(sid)) == 1


def test_a_missing_service_that_is_not_required_holds_nothing_back() -> None:
    world = World(1)
    gate = Dependency(service="db", condition="service_started", required=False)
    sid = world.create(make_spec(depends_on=(gate,)))
    world.settle()
    assert len(world.running(sid)) == 1


# ---------------------------------------------------------------- a new leader


def test_a_new_leader_finds_nothing_to_do_where_all_is_done() -> None:
    world = World(3)
    world.create(make_spec(replicas=5))
    world.create(make_spec("agent", mode=GLOBAL))
    world.settle()
    world.controller.reset(world.tables)
    assert world.tick() == 0


def test_a_new_leader_keeps_a_restart_delay() -> None:
    world = World(1)
    sid = world.create(make_spec())
    world.settle()
    world.report(world.running(sid)[0], S.FAILED)
    world.settle()
    world.pass_time(3)
    world.controller.reset(world.tables)
    world.pass_time(1.5)
    assert world.running(sid) == []
    world.pass_time(1)
    assert len(world.running(sid)) == 1


def test_a_tick_that_was_not_committed_leaves_no_trace() -> None:
    world = World(2)
    world.create(make_spec(replicas=4, cpu=CPU))
    draft = world.draft()
    world.controller.tick(draft)
    world.controller.undo(world.tables)
    world.controller.check_invariants(world.tables)
    world.settle()
    world.controller.check_invariants(world.tables)
    assert world.at_rest("s-web").converged


def test_a_task_whose_service_is_gone_is_removed() -> None:
    world = World(1)
    sid = world.create(make_spec())
    world.settle()
    draft = world.draft()
    draft.delete(Service, sid)
    world.commit(draft)
    world.settle()
    assert world.tables.count(Task) == 0


def test_networks_are_named_by_id_with_the_service_as_alias() -> None:
    world = World(1)
    world.put(Network(id="net1", spec=NetworkSpec(name="front")))
    spec = make_spec()
    assert spec.task is not None
    wanted = NetworkAttachmentSpec(target="front", aliases=("www",))
    spec = structs.replace(spec, task=structs.replace(spec.task, networks=(wanted,)))
    sid = world.create(spec)
    world.tick()
    (task,) = world.tasks(sid)
    assert [(n.network_id, n.aliases) for n in task.networks] == [("net1", ("web", "www"))]
