"""Roll-outs that cannot hang: deadlines, the way from start-first to stop-first, pauses for people."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from swarm.v1 import (
    Endpoint,
    EndpointSpec,
    HealthConfig,
    NodeState,
    Placement,
    PortConfig,
    RestartPolicy,
    ServiceSpec,
    UpdateConfig,
    UpdateState,
    UpdateStatus,
)
from tests.unit.control.world import (
    CPU,
    GIB,
    GLOBAL,
    SECOND,
    S,
    World,
    make_node,
    make_spec,
    state_of,
)

U = UpdateState
SOON = RestartPolicy(delay_ns=SECOND // 5)
HOST_PORT = EndpointSpec(
    ports=(PortConfig(target_port=80, published_port=8080, publish_mode="host"),)
)


def config(**changes: Any) -> UpdateConfig:
    return structs.replace(UpdateConfig(parallelism=1, monitor_ns=2 * SECOND), **changes)


def spec(replicas: int = 3, image: str = "web:1", **more: Any) -> ServiceSpec:
    more.setdefault("restart", SOON)
    more.setdefault("update", config())
    return make_spec(replicas=replicas, image=image, **more)


def started(replicas: int = 3, *, nodes: int = 3, **more: Any) -> tuple[World, str]:
    world = World(nodes)
    sid = world.create(spec(replicas, **more))
    world.settle()
    world.pass_time(10)
    return world, sid


def status(world: World, sid: str) -> UpdateStatus:
    found = world.service(sid).update_status
    assert found is not None
    return found


def images(world: World, sid: str) -> list[str]:
    return sorted(world.image(t) for t in world.running(sid))


def watched(world: World, sid: str, seconds: float, step: float = 0.1) -> tuple[int, int]:
    """The fewest and the most that run while the time goes by, the loop made anew each time."""
    least = most = len(world.running(sid))
    for _ in range(int(seconds / step)):
        world.clock.advance(seconds=step)
        for _ in range(4):
            world.clock.advance(seconds=0.001)
            world.controller.reset(world.tables)
            world.tick()
            least, most = min(least, len(world.running(sid))), max(most, len(world.running(sid)))
            world.agents()
            least, most = min(least, len(world.running(sid))), max(most, len(world.running(sid)))
    return least, most


# ---------------------------------------------------------------- deadlines


def test_what_no_node_could_ever_take_fails_soon_and_stops_nothing() -> None:
    world, sid = started()
    before = {t.id for t in world.running(sid)}
    world.update(sid, spec(image="web:2", memory=100 * GIB))
    world.pass_time(29)
    assert status(world, sid).state == U.UPDATING
    world.pass_time(3)
    said = status(world, sid)
    assert said.state == U.PAUSED
    assert said.message.startswith(
        "update paused: no progress for 30s: the new version can never be placed: "
    )
    assert "memory" in said.message
    assert {t.id for t in world.running(sid)} == before
    answer = world.status(sid)
    assert answer.stuck
    assert answer.reasons[0] == said.message


def test_a_node_that_joins_in_time_lets_it_go_on() -> None:
    world, sid = started(1, nodes=1)
    world.update(sid, spec(1, image="web:2", memory=10 * GIB))
    world.pass_time(20)
    world.put(make_node("n9", memory=16 * GIB))
    world.pass_time(20)
    assert status(world, sid).state == U.COMPLETED
    assert images(world, sid) == ["web:2"]


def test_a_roll_out_without_progress_fails_with_what_it_lacks() -> None:
    world, sid = started(3)
    world.create(make_spec("filler", mode=GLOBAL, memory=5 * GIB))
    world.settle()
    deadline = config(deadline_ns=60 * SECOND)
    world.update(sid, spec(image="web:2", memory=4 * GIB, update=deadline))
    world.pass_time(55)
    assert status(world, sid).state == U.UPDATING
    world.controller.reset(world.tables)  # a new leader keeps the time
    world.pass_time(6)
    said = status(world, sid)
    assert said.state == U.PAUSED
    assert said.message.startswith(
        "update paused: no progress for 1m0s: 1 of 3 replicas of the new version has no place: "
    )
    assert images(world, sid) == ["web:1"] * 2


@pytest.mark.parametrize("action", ["rollback", "continue"])
def test_what_follows_is_what_failure_action_says(action: str) -> None:
    settings = config(deadline_ns=30 * SECOND, failure_action=action)
    world, sid = started(3, update=settings)
    world.create(make_spec("filler", mode=GLOBAL, memory=5 * GIB))
    world.settle()
    world.update(sid, spec(image="web:2", memory=4 * GIB, update=settings))
    world.pass_time(32)
    said = status(world, sid)
    if action == "continue":
        assert said.state == U.PAUSED
        return
    assert said.state == U.ROLLBACK_STARTED
    assert said.message.startswith("update rolled back: no progress for 30s: 1 of 3 replicas")
    world.pass_time(10)
    assert images(world, sid) == ["web:1"] * 3
    assert status(world, sid).state == U.ROLLBACK_COMPLETED


def test_a_deadline_of_zero_waits_for_ever() -> None:
    world, sid = started()
    world.update(sid, spec(image="web:2", memory=100 * GIB, update=config(deadline_ns=0)))
    world.pass_time(3_600, step=60)
    assert status(world, sid).state == U.UPDATING


def test_delay_and_monitor_do_not_count_as_lack_of_progress() -> None:
    settings = config(deadline_ns=10 * SECOND, delay_ns=60 * SECOND, monitor_ns=30 * SECOND)
    world, sid = started(3, update=settings)
    world.update(sid, spec(image="web:2", update=settings))
    world.pass_time(240)
    assert status(world, sid).state == U.COMPLETED


def test_a_task_that_does_not_get_ready_fails_it_by_its_name() -> None:
    settings = config(deadline_ns=20 * SECOND)
    world, sid = started(2, nodes=2, update=settings)
    world.frozen = {"n1", "n2"}
    world.update(sid, spec(2, image="web:2", update=settings))
    world.pass_time(25)
    assert status(world, sid).message == (
        "update paused: no progress for 20s: 1 of 2 replicas of the new version is assigned"
    )


def test_slots_that_come_and_go_are_no_progress() -> None:
    settings = config(
        deadline_ns=60 * SECOND, max_failure_ratio=1.0, failure_action="continue", parallelism=1
    )
    world, sid = started(3, update=settings)
    world.update(sid, spec(image="web:2", update=settings))
    for _ in range(400):
        world.pass_time(1)
        for task in world.running(sid):
            if world.image(task) == "web:2":
                world.report(task, S.FAILED, err="exit code 1")
        world.settle()
        if status(world, sid).state != U.UPDATING:
            break
    assert status(world, sid).state == U.PAUSED
    assert "no progress for 1m0s" in status(world, sid).message


def test_the_time_in_which_a_healthcheck_may_fail_is_added_where_no_deadline_is_given() -> None:
    check = HealthConfig(test=("CMD", "true"), start_period_ns=600 * SECOND)
    world, sid = started(1, nodes=1)
    later = spec(1, image="web:2")
    assert later.task is not None and later.task.container is not None
    container = structs.replace(later.task.container, healthcheck=check)
    later = structs.replace(later, task=structs.replace(later.task, container=container))
    world.frozen = {"n1"}
    world.update(sid, later)
    world.pass_time(1_190, step=10)
    assert status(world, sid).state == U.UPDATING
    world.pass_time(30, step=10)
    assert status(world, sid).state == U.PAUSED


def test_a_rollback_that_makes_no_progress_is_paused() -> None:
    both = {
        "update": config(failure_action="rollback", deadline_ns=20 * SECOND),
        "rollback": config(deadline_ns=20 * SECOND),
    }
    world, sid = started(2, nodes=2, **both)
    world.frozen = {"n1", "n2"}
    world.update(sid, spec(2, image="web:2", **both))
    world.pass_time(60)
    said = status(world, sid)
    assert said.state == U.ROLLBACK_PAUSED
    assert said.message.startswith("rollback paused: no progress for 20s: ")


# ---------------------------------------------------------------- rollbacks by failure


def test_a_rollback_by_failure_leads_before_an_update_that_was_scaled_meanwhile() -> None:
    settings = config(failure_action="rollback", delay_ns=5 * SECOND)
    world, sid = started(3, update=settings)
    world.update(sid, spec(image="web:2", update=settings))
    world.pass_time(4)
    world.scale(sid, 5)
    world.settle()
    world.failing.add("web:2")
    world.pass_time(60)
    assert images(world, sid) == ["web:1"] * 5
    assert status(world, sid).state == U.ROLLBACK_COMPLETED


def test_a_rollback_that_cannot_be_done_says_why_and_pauses() -> None:
    settings = config(failure_action="rollback")
    world, sid = started(2, update=settings, endpoint=None)
    port = EndpointSpec(ports=(PortConfig(target_port=80, published_port=8080),))
    old = world.service(sid)
    assert old.spec is not None
    # Its previous version had a port that another service has by now.
    world.update(sid, spec(2, update=settings, endpoint=port))
    world.pass_time(20)
    world.failing.add("web:2")
    world.update(sid, spec(2, image="web:2", update=settings))
    other = make_spec("other", replicas=0, endpoint=port)
    world.create(other)
    taken = world.service("s-other")
    world.put(structs.replace(taken, endpoint=Endpoint(spec=port, ports=port.ports)))
    world.pass_time(10)
    said = status(world, sid)
    assert said.state == U.PAUSED
    assert said.message.startswith("update paused due to failure or early termination of task ")
    assert said.message.endswith(
        'it cannot be rolled back: service "web" cannot go back to version 2: '
        'port 8080/tcp is already in use by service "other" (s-other)'
    )


# ---------------------------------------------------------------- from start-first to stop-first

START = config(order="start-first")


def test_start_first_with_a_host_port_on_full_nodes_goes_stop_first_and_says_so() -> None:
    world, sid = started(3, update=START, endpoint=HOST_PORT)
    world.update(sid, spec(image="web:2", update=START, endpoint=HOST_PORT))
    least, most = watched(world, sid, 30)
    assert (least, most) == (2, 3)
    said = status(world, sid)
    assert (said.state, said.stopped_first) == (U.COMPLETED, 3)
    assert "host" in said.stopped_first_reason and "port" in said.stopped_first_reason
    assert images(world, sid) == ["web:2"] * 3


def test_a_spare_node_is_enough_to_start_first() -> None:
    two = config(order="start-first", parallelism=2)
    world, sid = started(3, nodes=4, update=two, endpoint=HOST_PORT)
    world.update(sid, spec(image="web:2", update=two, endpoint=HOST_PORT))
    least, _ = watched(world, sid, 30)
    assert least == 3
    assert (status(world, sid).state, status(world, sid).stopped_first) == (U.COMPLETED, 0)


@pytest.mark.parametrize(
    "more",
    [{"cpu": 3 * CPU}, {"placement": Placement(max_replicas=1)}],
    ids=["full nodes", "max replicas"],
)
def test_full_nodes_go_stop_first_within_parallelism(more: dict[str, Any]) -> None:
    two = config(order="start-first", parallelism=2)
    world, sid = started(3, update=two, **more)
    world.update(sid, spec(image="web:2", update=two, **more))
    least, _ = watched(world, sid, 30)
    assert least >= 1
    assert (status(world, sid).state, status(world, sid).stopped_first) == (U.COMPLETED, 3)


def test_global_services_go_stop_first_as_well() -> None:
    world = World(3)
    sid = world.create(make_spec(mode=GLOBAL, update=START, endpoint=HOST_PORT))
    world.settle()
    world.update(sid, make_spec(mode=GLOBAL, update=START, endpoint=HOST_PORT, image="web:2"))
    least, _ = watched(world, sid, 30)
    assert least == 2
    assert (status(world, sid).state, status(world, sid).stopped_first) == (U.COMPLETED, 3)


def test_nothing_is_stopped_for_a_task_that_would_not_fit_afterwards_either() -> None:
    world, sid = started(3, update=START, cpu=CPU)
    world.create(make_spec("filler", mode=GLOBAL, cpu=2 * CPU))
    world.settle()
    slow = config(order="start-first", deadline_ns=60 * SECOND)
    world.update(sid, spec(image="web:2", update=slow, cpu=3 * CPU))
    least, _ = watched(world, sid, 70)
    assert least == 3
    assert status(world, sid).state == U.PAUSED
    assert "has no place" in status(world, sid).message


def test_nobody_takes_the_place_meanwhile() -> None:
    world, sid = started(2, nodes=2, update=START, cpu=3 * CPU)
    # It waits for longer, and wants the same place.
    rival = world.create(make_spec("rival", replicas=2, cpu=3 * CPU))
    world.pass_time(5)
    assert not world.running(rival)
    world.update(sid, spec(2, image="web:2", update=START, cpu=3 * CPU))
    watched(world, sid, 30)
    assert images(world, sid) == ["web:2"] * 2
    assert status(world, sid).state == U.COMPLETED
    assert not world.running(rival)


def test_a_place_that_is_lost_meanwhile_holds_nobody_up() -> None:
    world, sid = started(2, nodes=2, update=START, cpu=3 * CPU)
    world.update(sid, spec(2, image="web:2", update=START, cpu=3 * CPU))
    for _ in range(400):
        world.clock.advance(seconds=0.01)
        world.tick()
        pinned = next((t for t in world.live(sid) if t.node_id and state_of(t) < S.ASSIGNED), None)
        if pinned is not None:
            break
        world.agents()
    assert pinned is not None
    world.set_state(pinned.node_id, NodeState.DOWN)
    world.put(make_node("n3"))
    world.pass_time(60)
    assert images(world, sid) == ["web:2"] * 2
    assert pinned.node_id not in {t.node_id for t in world.running(sid)}


# ---------------------------------------------------------------- pausing for a person


def asked(world: World, sid: str, later: ServiceSpec, after: int) -> None:
    world.update(sid, later)
    begun = UpdateStatus(
        state=U.UPDATING,
        started_at_ns=world.clock.now_ns(),
        message="update in progress",
        pause_after=after,
    )
    world.put(structs.replace(world.service(sid), update_status=begun))


def resume(world: World, sid: str, after: int = 0) -> None:
    going = structs.replace(
        status(world, sid),
        state=U.UPDATING,
        awaits_resume=False,
        pause_after=after,
        resumed_at_ns=world.clock.now_ns(),
        progress_at_ns=0,
        done=0,
    )
    world.put(structs.replace(world.service(sid), update_status=going))


@pytest.mark.parametrize("parallelism", [1, 2, 3, 0])
def test_it_pauses_after_so_many_slots_and_goes_on_when_it_is_told(parallelism: int) -> None:
    settings = config(parallelism=parallelism)
    world, sid = started(5, update=settings)
    asked(world, sid, spec(5, image="web:2", update=settings), 2)
    world.pass_time(20)
    said = status(world, sid)
    assert (said.state, said.awaits_resume) == (U.PAUSED, True)
    assert said.message == ("update paused after 2 of 5 replicas, as asked: resume it or roll back")
    assert images(world, sid) == ["web:1"] * 3 + ["web:2"] * 2
    answer = world.at_rest(sid)
    assert not answer.converged
    assert not answer.stuck
    assert answer.reasons[0] == said.message
    resume(world, sid, 4)
    world.pass_time(20)
    assert status(world, sid).message.startswith("update paused after 4 of 5 replicas")
    resume(world, sid)
    world.pass_time(20)
    assert status(world, sid).state == U.COMPLETED
    assert images(world, sid) == ["web:2"] * 5


def test_a_pause_at_or_beyond_the_last_slot_is_none() -> None:
    world, sid = started(3)
    asked(world, sid, spec(image="web:2"), 3)
    world.pass_time(30)
    assert status(world, sid).state == U.COMPLETED


def test_those_that_fail_while_they_are_watched_before_the_pause_count() -> None:
    world, sid = started(4)
    world.failing.add("web:2")
    asked(world, sid, spec(4, image="web:2"), 2)
    world.pass_time(10)
    said = status(world, sid)
    assert (said.state, said.awaits_resume) == (U.PAUSED, False)
    assert "due to failure" in said.message


def test_what_failed_before_a_resume_does_not_count_after_it() -> None:
    world, sid = started(3)
    world.failing.add("web:2")
    world.update(sid, spec(image="web:2"))
    world.pass_time(10)
    assert status(world, sid).state == U.PAUSED
    world.failing.clear()
    resume(world, sid)
    world.pass_time(60)
    assert status(world, sid).state == U.COMPLETED
    assert images(world, sid) == ["web:2"] * 3


def test_one_that_is_resumed_and_fails_again_pauses_again() -> None:
    world, sid = started(3)
    world.failing.add("web:2")
    world.update(sid, spec(image="web:2"))
    world.pass_time(10)
    resume(world, sid)
    world.pass_time(60)
    assert status(world, sid).state == U.PAUSED


def test_a_rollback_from_a_pause_changes_back_only_what_was_changed() -> None:
    world, sid = started(5)
    asked(world, sid, spec(5, image="web:2"), 2)
    world.pass_time(20)
    kept = {t.id for t in world.running(sid) if world.image(t) == "web:1"}
    world.update(sid, spec(5))
    world.pass_time(30)
    assert images(world, sid) == ["web:1"] * 5
    assert kept < {t.id for t in world.running(sid)}


# ---------------------------------------------------------------- the budget


def test_no_more_is_stopped_while_others_are_down() -> None:
    world, sid = started(4, nodes=4, placement=Placement(max_replicas=1))
    world.update(sid, spec(4, image="web:2", placement=Placement(max_replicas=1)))
    world.frozen = {"n1", "n2", "n3", "n4"}
    world.tick()
    assert len(world.live(sid)) == 4
    down = next(t for t in world.running(sid) if world.image(t) == "web:1")
    world.report(down, S.FAILED, err="exit code 1")
    for _ in range(20):
        world.clock.advance(seconds=0.2)
        world.tick()
    assert len(world.running(sid)) == 2
    world.frozen = set()
    world.pass_time(60)
    assert images(world, sid) == ["web:2"] * 4


def test_a_service_that_never_ran_is_mended_by_an_update() -> None:
    world = World(2)
    world.failing.add("web:1")
    sid = world.create(spec(3))
    world.pass_time(30)
    assert not world.running(sid)
    world.update(sid, spec(3, image="web:2"))
    world.pass_time(60)
    assert images(world, sid) == ["web:2"] * 3
    assert status(world, sid).state == U.COMPLETED


def test_without_a_task_history_the_pace_is_kept_as_well() -> None:
    world = World(3, history=0)
    sid = world.create(spec(3))
    world.settle()
    world.pass_time(5)
    world.create(make_spec("filler", mode=GLOBAL, memory=5 * GIB))
    world.settle()
    world.update(sid, spec(image="web:2", memory=4 * GIB))
    world.pass_time(60)
    assert len(world.running(sid)) == 2


def test_a_task_that_starts_first_does_not_run_beside_two_others() -> None:
    """The present one, and the one of an update that was superseded and has not stopped yet."""
    first = config(order="start-first", monitor_ns=0)
    world, sid = started(1, nodes=3, update=first)
    (old,) = world.running(sid)
    world.update(sid, spec(1, "web:2", update=first))
    world.tick()
    (second,) = (t for t in world.tasks(sid) if t.id != old.id)
    assert second.node_id != old.node_id
    world.report(second, S.STARTING)
    world.frozen.add(second.node_id)  # it takes its time to stop
    world.update(sid, spec(1, "web:3", update=first))
    world.settle()
    (third,) = (t for t in world.tasks(sid) if t.id not in (old.id, second.id))
    assert third.desired_state == S.READY
    world.frozen.clear()
    world.settle()
    assert images(world, sid) == ["web:3"]
