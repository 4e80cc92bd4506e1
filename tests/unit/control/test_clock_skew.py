"""Nodes' clocks decide nothing: with clocks that are hours off all comes to the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.control import Controller
from swarm.clock import ManualClock
from swarm.ids import seeded_rng
from swarm.v1 import (
    Availability,
    JobSpec,
    NodeState,
    RestartPolicy,
    Service,
    Task,
    UpdateConfig,
    UpdateState,
)
from tests.unit.control.world import CPU, SECOND, S, World, job, make_spec

HOUR = 3600 * SECOND
SKEWS = st.sampled_from([-30 * HOUR, -5 * SECOND, 0, 5 * SECOND, 30 * HOUR])
EVENTS = st.tuples(
    st.sampled_from(["update", "crash", "down", "up", "drain", "urgent", "scale", "leader"]),
    st.integers(1, 3),
    st.sampled_from([0.3, 4, 70]),
)
POLICY = RestartPolicy(delay_ns=SECOND, max_attempts=4, window_ns=60 * SECOND)


def begin(skews: dict[str, int]) -> World:
    world = World(3)
    world.skew_ns = skews
    config = UpdateConfig(parallelism=1, failure_action="rollback", monitor_ns=3 * SECOND)
    world.create(make_spec("web", replicas=3, restart=POLICY, update=config))
    batch = make_spec("batch", mode=job(6, 3), cpu=2 * CPU, restart=POLICY)
    timed = JobSpec(timeout_ns=20 * SECOND)
    world.create(structs.replace(batch, job=timed, priority=-5))
    gang = JobSpec(gang=True, timeout_ns=30 * SECOND)
    world.create(structs.replace(make_spec("gang", mode=job(2), cpu=3 * CPU), job=gang))
    world.settle()
    return world


def happen(world: World, number: int, event: str, which: int) -> None:
    node_id = f"n{which}"
    match event:
        case "update":
            spec = world.service("s-web").spec
            assert spec is not None and spec.task is not None and spec.task.container is not None
            container = structs.replace(spec.task.container, image=f"web:{number + 2}")
            if which == 3:
                world.failing.add(container.image)
            task = structs.replace(spec.task, container=container)
            world.update("s-web", structs.replace(spec, task=task))
        case "crash":
            for task_ in [*world.running("s-web"), *world.running("s-batch")][:which]:
                world.report(task_, S.FAILED, err="no")
        case "down":
            world.set_state(node_id, NodeState.DOWN)
        case "up":
            world.set_state(node_id, NodeState.READY)
            world.set_availability(node_id, Availability.ACTIVE)
        case "drain":
            world.set_availability(node_id, Availability.DRAIN)
        case "urgent":
            if not world.tables.by(Service, "name", f"urgent{number}"):
                spec = make_spec(f"urgent{number}", replicas=which, cpu=3 * CPU)
                world.create(structs.replace(spec, priority=10))
        case "scale":
            world.scale("s-web", which)
        case _:
            world.controller = Controller(seeded_rng(100 + number))
            world.controller.reset(world.tables)


def story(world: World) -> list[Any]:
    tasks = sorted(world.tables.all(Task), key=lambda t: t.id)
    shown = [
        structs.replace(t, status=structs.replace(t.status, timestamp_ns=0))
        for t in tasks
        if t.status is not None
    ]
    services = sorted(world.tables.all(Service), key=lambda s: s.id)
    return [shown, services, [world.status(s.id) for s in services]]


@settings(max_examples=40, deadline=None)
@given(st.tuples(SKEWS, SKEWS, SKEWS), st.lists(EVENTS, max_size=8))
def test_with_wrong_clocks_all_comes_to_the_same(
    skews: tuple[int, int, int], events: list[tuple[str, int, float]]
) -> None:
    right = begin({})
    wrong = begin({f"n{i}": skew for i, skew in enumerate(skews, start=1)})
    for number, (event, which, seconds) in enumerate(events):
        for world in (right, wrong):
            happen(world, number, event, which)
            world.pass_time(seconds, step=max(0.5, seconds / 8))
        assert story(wrong) == story(right)


# ---------------------------------------------------------------- leaders' clocks


def other_leader(world: World, ahead_ns: int) -> None:
    """One whose clock is so far ahead of the last one's takes over."""
    world.clock = ManualClock(world.clock.now_ns() + ahead_ns)
    world.controller = Controller(seeded_rng(9))
    world.controller.reset(world.tables)


def test_no_attempt_waits_for_the_time_that_another_leader_took_it_to_be() -> None:
    world = World(1)
    world.failing.add("web:1")
    sid = world.create(make_spec(restart=RestartPolicy(delay_ns=SECOND)))
    world.pass_time(10)
    world.failing.clear()
    other_leader(world, -5 * HOUR)
    world.pass_time(25)
    assert len(world.running(sid)) == 1


@pytest.mark.parametrize("before_s", [0, 0.5, 1.5, 4])
@pytest.mark.parametrize("delay_s", [0, 2])
def test_a_roll_out_does_not_wait_for_the_time_that_another_leader_took_it_to_be(
    before_s: float, delay_s: int
) -> None:
    config = UpdateConfig(parallelism=1, monitor_ns=2 * SECOND, delay_ns=delay_s * SECOND)
    world = World(2)
    sid = world.create(make_spec(replicas=4, update=config))
    world.pass_time(10)
    world.update(sid, make_spec(replicas=4, update=config, image="web:2"))
    world.tick()
    world.pass_time(before_s)
    other_leader(world, -5 * HOUR)
    world.pass_time(30)
    status = world.service(sid).update_status
    assert status is not None
    assert (status.state, status.message) == (UpdateState.COMPLETED, "update completed")


def test_what_fails_under_another_leader_fails_the_roll_out() -> None:
    config = UpdateConfig(parallelism=1, failure_action="pause", deadline_ns=20 * SECOND)
    world = World(1)
    sid = world.create(make_spec(update=config))
    world.pass_time(10)
    world.frozen.add("n1")
    world.update(sid, make_spec(update=config, image="web:2"))
    world.pass_time(2)
    other_leader(world, -5 * HOUR)
    world.pass_time(2)
    world.failing.add("web:2")
    world.frozen.clear()
    world.pass_time(5)
    status = world.service(sid).update_status
    assert status is not None and status.state == UpdateState.PAUSED


def test_a_roll_out_without_progress_ends_under_another_leader() -> None:
    config = UpdateConfig(parallelism=1, deadline_ns=20 * SECOND, delay_ns=2 * SECOND)
    world = World(1)
    sid = world.create(make_spec(update=config))
    world.pass_time(10)
    world.frozen.add("n1")
    world.update(sid, make_spec(update=config, image="web:2"))
    world.pass_time(5)
    other_leader(world, -5 * HOUR)
    world.pass_time(40)
    status = world.service(sid).update_status
    assert status is not None and status.state == UpdateState.PAUSED
