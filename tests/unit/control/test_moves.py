"""Leaving drained nodes: start first, within the budget, and what may come between."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from msgspec import structs

from swarm import states
from swarm.v1 import (
    Availability,
    Endpoint,
    EndpointSpec,
    NodeState,
    Placement,
    PortConfig,
    RestartPolicy,
    StopCause,
    Task,
    UpdateConfig,
    UpdateState,
)
from tests.unit.control.world import (
    CPU,
    GLOBAL,
    SECOND,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)

DRAIN, ACTIVE = Availability.DRAIN, Availability.ACTIVE


def step(world: World) -> None:
    """One tick, and one step of all nodes."""
    world.clock.advance(seconds=0.001)
    world.tick()
    world.agents()


def on(world: World, sid: str) -> Counter[str]:
    """Running tasks by node."""
    return Counter(t.node_id for t in world.running(sid))


def stopped(world: World, sid: str, node_id: str) -> list[Task]:
    return [t for t in world.tasks(sid) if t.node_id == node_id and t.desired_state == S.SHUTDOWN]


def test_a_task_runs_on_until_another_runs_in_its_place() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    world.frozen.add("n2")
    world.set_availability("n1", DRAIN)
    world.settle()
    (old,) = [t for t in world.tasks(sid) if t.node_id == "n1"]
    (new,) = [t for t in world.live(sid) if t.slot == old.slot and t.id != old.id]
    assert (old.desired_state, state_of(old)) == (S.RUNNING, S.RUNNING)
    assert (new.desired_state, new.node_id) == (S.RUNNING, "n2")
    world.frozen.clear()
    world.settle()
    assert on(world, sid) == {"n2": 2}
    (gone,) = stopped(world, sid, "n1")
    assert (gone.stop_cause, gone.stop_message) == (StopCause.MOVED, "moved to n2")


def test_a_task_that_has_moved_is_not_moved_again_in_the_tick_that_ends_its_move() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=1))
    world.settle()
    (old,) = world.live(sid)
    world.set_availability(old.node_id, DRAIN)
    made: set[str] = set()
    for _ in range(20):
        step(world)
        made.update(t.id for t in world.tasks(sid))
    assert len(made) == 2


@pytest.mark.parametrize(
    ("replicas", "parallelism", "at_once"), [(4, 1, 1), (4, 2, 2), (4, 0, 4), (12, 1, 3)]
)
def test_so_many_slots_move_at_once_as_parallelism_says_or_a_quarter(
    replicas: int, parallelism: int, at_once: int
) -> None:
    world = World(1)
    sid = world.create(make_spec(replicas=replicas, update=UpdateConfig(parallelism=parallelism)))
    world.settle()
    world.put(make_node("n2"))
    world.set_availability("n1", DRAIN)
    seen = 0
    for _ in range(60):
        step(world)
        per_slot = Counter(t.slot for t in world.live(sid))
        seen = max(seen, sum(1 for n in per_slot.values() if n > 1))
        assert len({t.slot for t in world.running(sid)}) == replicas
    assert seen == at_once
    assert on(world, sid) == {"n2": replicas}


def test_stop_first_prepares_the_new_task_and_keeps_the_budget() -> None:
    world = World(1)
    update = UpdateConfig(parallelism=2, order="stop-first")
    sid = world.create(make_spec(replicas=5, update=update))
    world.settle()
    world.put(make_node("n2"))
    world.set_availability("n1", DRAIN)
    least, most = 5, 0
    for _ in range(100):
        step(world)
        least = min(least, len(world.running(sid)))
        wanted = Counter(t.slot for t in world.live(sid) if t.desired_state == S.RUNNING)
        most = max(most, max(wanted.values()))
    assert least == 3
    assert most == 1, "two tasks of a slot were told to run"
    assert on(world, sid) == {"n2": 5}


def test_stop_first_waits_while_too_few_others_run() -> None:
    world = World(2)
    update = UpdateConfig(parallelism=1, order="stop-first")
    sid = world.create(make_spec(replicas=4, update=update))
    world.settle()
    world.put(make_node("n3"))
    world.frozen.add("n3")
    (gone, *_) = [t for t in world.running(sid) if t.node_id == "n2"]
    world.report(gone, S.FAILED)
    world.pass_time(6)
    assert len(world.running(sid)) == 3, "its successor cannot start on n3"
    world.set_availability("n1", DRAIN)
    world.pass_time(5)
    assert on(world, sid) == {"n1": 2, "n2": 1}
    world.frozen.clear()
    least = 4
    world.settle()
    for _ in range(20):
        step(world)
        least = min(least, len(world.running(sid)))
    assert least >= 3
    assert on(world, sid)["n1"] == 0


def test_stop_first_does_not_wait_for_what_has_no_place() -> None:
    world = World(1)
    update = UpdateConfig(parallelism=1, order="stop-first")
    sid = world.create(make_spec(replicas=3, update=update, cpu=3 * CPU))
    world.settle()
    assert on(world, sid) == {"n1": 1}
    world.put(make_node("n2", cpu=2 * CPU))
    world.set_availability("n1", DRAIN)
    world.settle()
    assert on(world, sid) == {"n1": 1}
    world.put(make_node("n3"), make_node("n4"))
    world.settle()
    assert on(world, sid) == {"n3": 1, "n4": 1}


def test_a_task_that_fits_nowhere_else_stays_and_the_reason_is_shown() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2, cpu=3 * CPU))
    world.settle()
    world.set_availability("n1", DRAIN)
    world.pass_time(30)
    assert on(world, sid) == {"n1": 1, "n2": 1}
    (waiting,) = [t for t in world.live(sid) if not t.node_id]
    assert waiting.status is not None
    assert "insufficient" in waiting.status.err or "short" in waiting.status.err, waiting.status.err
    world.put(make_node("n3"))
    world.settle()
    assert on(world, sid) == {"n2": 1, "n3": 1}


@pytest.mark.parametrize(
    "placement",
    [Placement(max_replicas=1), None],
    ids=["max-replicas", "host-port"],
)
def test_one_task_a_node_moves_when_a_node_is_free(placement: Placement | None) -> None:
    port = PortConfig(target_port=80, published_port=80, publish_mode="host")
    endpoint = EndpointSpec(ports=(port,)) if placement is None else None
    world = World(2)
    sid = world.create(make_spec(replicas=2, placement=placement, endpoint=endpoint))
    world.settle()
    world.set_availability("n1", DRAIN)
    world.settle()
    assert on(world, sid) == {"n1": 1, "n2": 1}
    world.put(make_node("n3"))
    world.settle()
    assert on(world, sid) == {"n2": 1, "n3": 1}


def test_drain_of_all_nodes_stops_nothing_and_gives_way_as_soon_as_one_is_back() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=6))
    world.settle()
    for i in (1, 2, 3):
        world.set_availability(f"n{i}", DRAIN)
    world.pass_time(20)
    assert on(world, sid) == {"n1": 2, "n2": 2, "n3": 2}
    world.set_availability("n2", ACTIVE)
    world.pass_time(20)
    assert on(world, sid) == {"n2": 6}


@pytest.mark.parametrize("order", ["", "stop-first"])
@pytest.mark.parametrize("steps", range(7))
def test_a_node_that_is_active_again_keeps_what_has_not_left(order: str, steps: int) -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=4, update=UpdateConfig(parallelism=2, order=order)))
    world.settle()
    world.set_availability("n1", DRAIN)
    for _ in range(steps):
        step(world)
    world.set_availability("n1", ACTIVE)
    world.settle()
    assert len(world.running(sid)) == len(world.live(sid)) == 4
    if steps < 3:
        assert on(world, sid) == {"n1": 2, "n2": 2}, "nothing had started elsewhere"
        assert not stopped(world, sid, "n1")


def test_a_node_that_goes_down_while_it_is_drained_loses_no_slot() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=6))
    world.settle()
    world.set_availability("n1", DRAIN)
    step(world)
    world.set_state("n1", NodeState.DOWN)
    world.settle()
    assert on(world, sid) == {"n2": 3, "n3": 3}
    assert len(world.live(sid)) == 6


def test_the_new_node_may_go_down_before_the_new_task_runs() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=1))
    world.settle()
    (task,) = world.running(sid)
    other = "n2" if task.node_id == "n1" else "n1"
    world.frozen.add(other)
    world.set_availability(task.node_id, DRAIN)
    world.settle()
    world.set_state(other, NodeState.DOWN)
    world.put(make_node("n3"))
    world.settle()
    assert on(world, sid) == {"n3": 1}


def test_a_new_task_that_fails_is_tried_again_more_and_more_slowly() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=1, restart=RestartPolicy(delay_ns=1 * SECOND)))
    world.settle()
    (task,) = world.running(sid)
    world.failing.add("web:1")
    world.set_availability(task.node_id, DRAIN)
    world.pass_time(100)
    assert [t.id for t in world.running(sid)] == [task.id]
    tries = [t for t in world.tasks(sid) if state_of(t) == S.FAILED]
    assert len(tries) <= 6
    made = sorted(t.meta.created_at_ns for t in tries if t.meta)
    gaps = [b - a for a, b in itertools.pairwise(made)]
    assert gaps == sorted(gaps)
    world.failing.clear()
    world.pass_time(60)
    assert task.id not in {t.id for t in world.running(sid)}
    assert len(world.running(sid)) == 1


def test_failures_are_waited_for_though_no_history_is_kept() -> None:
    world = World(2, history=0)
    sid = world.create(make_spec(replicas=1, restart=RestartPolicy(delay_ns=2 * SECOND)))
    world.settle()
    (task,) = world.running(sid)
    world.failing.add("web:1")
    world.set_availability(task.node_id, DRAIN)
    seen = set()
    for _ in range(20):
        world.pass_time(0.5)
        seen |= {t.id for t in world.tasks(sid)}
    assert len(seen) <= 7
    assert [t.id for t in world.running(sid)] == [task.id]


def test_a_leaver_that_crashes_is_followed_by_the_task_that_was_to_take_its_place() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=1, cpu=3 * CPU))
    world.settle()
    (task,) = world.running(sid)
    other = "n2" if task.node_id == "n1" else "n1"
    world.frozen.add(other)
    world.set_availability(task.node_id, DRAIN)
    world.settle()
    world.report(task, S.FAILED)
    world.frozen.clear()
    world.settle()
    assert on(world, sid) == {other: 1}


def test_a_task_that_completes_for_good_is_not_run_again() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=1, restart=RestartPolicy(condition="on-failure")))
    world.settle()
    (task,) = world.running(sid)
    other = "n2" if task.node_id == "n1" else "n1"
    world.frozen.add(other)
    world.set_availability(task.node_id, DRAIN)
    world.settle()
    world.report(task, S.COMPLETE)
    world.frozen.clear()
    world.pass_time(20)
    assert not world.live(sid)
    assert all(state_of(t) != S.RUNNING for t in world.tasks(sid))


def test_tasks_that_do_not_run_yet_leave_at_once() -> None:
    world = World(2)
    world.frozen.add("n1")
    sid = world.create(make_spec(replicas=2))
    world.settle()
    world.set_availability("n1", DRAIN)
    world.tick()
    (old,) = [t for t in world.tasks(sid) if t.node_id == "n1"]
    assert (old.desired_state, old.stop_cause) == (S.SHUTDOWN, StopCause.MOVED)
    world.frozen.clear()
    world.settle()
    assert on(world, sid) == {"n2": 2}


def test_global_tasks_just_stop() -> None:
    world = World(2)
    sid = world.create(make_spec(mode=GLOBAL))
    world.settle()
    world.set_availability("n1", DRAIN)
    world.settle()
    assert on(world, sid) == {"n2": 1}
    (gone,) = stopped(world, sid, "n1")
    assert (gone.stop_cause, gone.stop_message) == (StopCause.MOVED, "its node is being drained")


def test_a_job_s_tasks_are_stopped_and_run_elsewhere_without_counting_as_failed() -> None:
    world = World(2)
    policy = RestartPolicy(condition="on-failure", max_attempts=1, delay_ns=0)
    sid = world.create(make_spec(mode=job(2), restart=policy))
    world.settle()
    assert on(world, sid) == {"n1": 1, "n2": 1}
    world.set_availability("n1", DRAIN)
    world.pass_time(5)
    assert on(world, sid) == {"n2": 2}
    (gone,) = stopped(world, sid, "n1")
    assert gone.stop_cause == StopCause.MOVED
    new = next(t for t in world.running(sid) if t.slot == gone.slot)
    assert new.restarts_ns == ()


# ---------------------------------------------------------------- roll-outs


def test_a_roll_out_has_the_right_of_way_and_takes_drained_nodes_first() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=6, update=UpdateConfig(parallelism=1, delay_ns=0)))
    world.settle()
    world.update(
        sid, make_spec(replicas=6, image="web:2", update=UpdateConfig(parallelism=1, monitor_ns=0))
    )
    world.set_availability("n3", DRAIN)
    order: list[str] = []
    for _ in range(200):
        before = {t.id: t.node_id for t in world.live(sid)}
        step(world)
        order += [n for i, n in before.items() if i not in {t.id for t in world.live(sid)}]
    assert set(order[:2]) == {"n3"}
    assert len(order) == 6, "a slot was replaced twice"
    assert on(world, sid) == {"n1": 3, "n2": 3}
    assert {world.image(t) for t in world.running(sid)} == {"web:2"}


def test_tasks_of_a_paused_update_move_with_the_version_that_they_have() -> None:
    world = World(3)
    config = UpdateConfig(parallelism=1, failure_action="pause", monitor_ns=5 * SECOND)
    sid = world.create(make_spec(replicas=3, update=config))
    world.settle()
    world.failing.add("web:2")
    world.update(sid, make_spec(replicas=3, image="web:2", update=config))
    world.pass_time(3)
    status = world.service(sid).update_status
    assert status is not None
    assert status.state == UpdateState.PAUSED
    old = {t.node_id for t in world.running(sid)}
    assert len(old) == 2
    node_id = sorted(old)[0]
    world.set_availability(node_id, DRAIN)
    world.pass_time(3)
    runs = world.running(sid)
    assert len(runs) == 2
    assert node_id not in {t.node_id for t in runs}
    assert {world.image(t) for t in runs} == {"web:1"}


def test_an_update_in_the_middle_of_a_move_replaces_both() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2, update=UpdateConfig(monitor_ns=0)))
    world.settle()
    world.frozen.add("n2")
    world.set_availability("n1", DRAIN)
    world.settle()
    world.update(sid, make_spec(replicas=2, image="web:2", update=UpdateConfig(monitor_ns=0)))
    world.frozen.clear()
    world.settle()
    assert on(world, sid) == {"n2": 2}
    assert {world.image(t) for t in world.running(sid)} == {"web:2"}
    assert len(world.live(sid)) == 2


# ---------------------------------------------------------------- published ports


def test_behind_a_published_port_both_run_until_all_nodes_know_the_new_task() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=1))
    port = PortConfig(target_port=80, published_port=8080)
    world.put(structs.replace(world.service(sid), endpoint=Endpoint(ports=(port,))))
    world.settle()
    (task,) = world.running(sid)
    world.set_availability(task.node_id, DRAIN)
    world.settle()
    assert len(world.running(sid)) == 2
    world.pass_time(0.8)
    assert len(world.running(sid)) == 2
    world.pass_time(0.5)
    assert len(world.running(sid)) == 1
    assert not any(
        t.node_id == task.node_id and not states.ended(state_of(t)) for t in world.tasks(sid)
    )


def test_a_new_leader_goes_on_in_the_middle() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=6))
    world.settle()
    world.set_availability("n1", DRAIN)
    for _ in range(30):
        world.controller.reset(world.tables)
        step(world)
        assert len({t.slot for t in world.running(sid)}) == 6
    assert on(world, sid) == {"n2": 3, "n3": 3}
    assert len(world.live(sid)) == 6


def test_the_service_counts_as_converged_while_a_task_that_fits_nowhere_else_stays() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2, cpu=3 * CPU))
    world.settle()
    world.set_availability("n1", DRAIN)
    world.settle()
    status = world.at_rest(sid)
    assert status.converged, status.reasons
    assert (status.running, status.desired) == (2, 2)
