"""Rolling updates and rollbacks: pace, order, failure, and what Docker says about them."""

from __future__ import annotations

import pytest
from msgspec import structs

from swarm import states
from swarm.v1 import (
    Driver,
    EndpointSpec,
    NodeState,
    Placement,
    PortConfig,
    RestartPolicy,
    ServiceSpec,
    Task,
    UpdateConfig,
    UpdateState,
    UpdateStatus,
)
from tests.unit.control.world import (
    CPU,
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


def config(**changes: object) -> UpdateConfig:
    base = UpdateConfig(parallelism=1, monitor_ns=2 * SECOND)
    return structs.replace(base, **changes)


def started(replicas: int = 4, *, nodes: int = 2, **spec: object) -> tuple[World, str]:
    world = World(nodes)
    spec.setdefault("update", config())
    sid = world.create(make_spec(replicas=replicas, restart=SOON, **spec))  # type: ignore[arg-type]
    world.settle()
    world.pass_time(10)
    return world, sid


def new(replicas: int = 4, **spec: object) -> ServiceSpec:
    spec.setdefault("update", config())
    spec.setdefault("image", "web:2")
    return make_spec(replicas=replicas, restart=SOON, **spec)  # type: ignore[arg-type]


def images(world: World, tasks: list[Task]) -> list[str]:
    return sorted(world.image(t) for t in tasks)


def update_state(world: World, sid: str) -> UpdateState | None:
    status = world.service(sid).update_status
    return status.state if status else None


def test_one_slot_at_a_time_stop_first() -> None:
    world, sid = started()
    world.update(sid, new())
    least = most = len(world.running(sid))
    for _ in range(200):
        world.clock.advance(seconds=0.001)
        if world.controller.has_work(world.clock.now_ns()):
            world.tick()
        least = min(least, len(world.running(sid)))
        most = max(most, len(world.running(sid)))
        world.agents()
    assert (least, most) == (3, 4)
    assert images(world, world.running(sid)) == ["web:2"] * 4
    assert update_state(world, sid) == U.UPDATING
    assert not world.status(sid).converged
    world.pass_time(3)
    status = world.service(sid).update_status
    assert status is not None
    assert (status.state, status.message) == (U.COMPLETED, "update completed")
    assert status.completed_at_ns >= status.started_at_ns
    assert world.at_rest(sid).converged


def test_start_first_never_runs_fewer_than_wanted() -> None:
    world, sid = started(update=config(order="start-first"))
    world.update(sid, new(update=config(order="start-first")))
    least = 4
    for _ in range(200):
        world.clock.advance(seconds=0.001)
        if world.controller.has_work(world.clock.now_ns()):
            world.tick()
        least = min(least, len(world.running(sid)))
        world.agents()
    assert least == 4
    assert images(world, world.running(sid)) == ["web:2"] * 4


def test_parallelism_zero_changes_all_at_once() -> None:
    world, sid = started()
    world.update(sid, new(update=config(parallelism=0)))
    world.tick()
    assert images(world, world.live(sid)) == ["web:2"] * 4


def test_a_batch_waits_for_the_delay_after_the_last_one_runs() -> None:
    settings = config(parallelism=2, delay_ns=10 * SECOND)
    world, sid = started(update=settings)
    world.update(sid, new(update=settings))
    world.settle()
    assert images(world, world.running(sid)) == ["web:1", "web:1", "web:2", "web:2"]
    status = world.service(sid).update_status
    assert status is not None and status.next_batch_at_ns > world.clock.now_ns()
    world.controller.reset(world.tables)  # a new leader keeps the pace
    world.pass_time(9)
    assert images(world, world.running(sid)).count("web:2") == 2
    world.pass_time(2)
    assert images(world, world.running(sid)).count("web:2") == 4


def test_labels_and_scale_restart_nothing() -> None:
    world, sid = started()
    before = {t.id for t in world.running(sid)}
    world.update(sid, structs.replace(new(image="web:1"), labels={"a": "b"}))
    world.scale(sid, 5)
    world.settle()
    assert before < {t.id for t in world.running(sid)}
    assert update_state(world, sid) is None
    assert world.at_rest(sid).converged


def test_constraints_that_hold_already_restart_nothing_others_move_tasks() -> None:
    world, sid = started(nodes=2)
    for node_id, zone in (("n1", "a"), ("n2", "b")):
        world.label(node_id, zone=zone)
    before = {t.id for t in world.running(sid) if t.node_id == "n1"}
    placement = Placement(constraints=("node.labels.zone == a",))
    world.update(sid, new(image="web:1", placement=placement))
    world.pass_time(30)
    after = world.running(sid)
    assert {t.node_id for t in after} == {"n1"}
    assert before < {t.id for t in after}
    assert world.at_rest(sid).converged


def test_a_published_ingress_port_restarts_nothing_a_host_port_does() -> None:
    world, sid = started(replicas=1)
    before = world.running(sid)[0].id
    ingress = EndpointSpec(ports=(PortConfig(target_port=80, published_port=8000),))
    world.update(sid, new(1, image="web:1", endpoint=ingress))
    world.pass_time(5)
    second = world.running(sid)[0].id
    assert second != before, "a target port more is another task"
    moved = EndpointSpec(ports=(PortConfig(target_port=80, published_port=9000),))
    world.update(sid, new(1, image="web:1", endpoint=moved))
    world.pass_time(5)
    assert world.running(sid)[0].id == second


def test_a_newer_spec_supersedes_a_running_update() -> None:
    settings = config(delay_ns=5 * SECOND)
    world, sid = started(update=settings)
    world.update(sid, new(update=settings))
    world.pass_time(6)
    assert set(images(world, world.running(sid))) == {"web:1", "web:2"}
    world.update(sid, new(update=config(), image="web:3"))
    world.pass_time(5)
    assert images(world, world.running(sid)) == ["web:3"] * 4
    assert update_state(world, sid) == U.COMPLETED


# ---------------------------------------------------------------- failure


@pytest.mark.parametrize("order", ["stop-first", "start-first"])
def test_a_failing_update_pauses_with_docker_s_words(order: str) -> None:
    world, sid = started(update=config(order=order))
    world.failing.add("web:2")
    restart = RestartPolicy(delay_ns=60 * SECOND)
    spec = make_spec(replicas=4, restart=restart, update=config(order=order), image="web:2")
    world.update(sid, spec)
    world.settle()
    status = world.service(sid).update_status
    assert status is not None and status.state == U.PAUSED
    failed = [t for t in world.tasks(sid) if state_of(t) == S.FAILED]
    assert status.message == (
        f"update paused due to failure or early termination of task {failed[0].id}: exit code 1"
    )
    still = 4 if order == "start-first" else 3
    assert images(world, world.running(sid)) == ["web:1"] * still
    answer = world.status(sid)
    assert not answer.converged
    assert answer.reasons[0] == status.message


def test_a_paused_update_keeps_replacing_with_what_was_there() -> None:
    world, sid = started(nodes=3)
    world.failing.add("web:2")
    world.update(sid, new())
    world.pass_time(1)
    assert update_state(world, sid) == U.PAUSED
    old = next(t for t in world.running(sid) if world.image(t) == "web:1")
    world.report(old, S.FAILED)
    world.pass_time(2)
    (again,) = [t for t in world.running(sid) if t.slot == old.slot]
    assert world.image(again) == "web:1"


def test_failures_up_to_the_ratio_are_borne() -> None:
    settings = config(max_failure_ratio=0.3, parallelism=1)
    world, sid = started(update=settings)
    world.update(sid, new(update=settings))
    world.failing.add("web:2")
    while not any(state_of(t) == S.FAILED for t in world.tasks(sid)):
        world.clock.advance(seconds=0.001)
        world.tick()
        world.agents()
    world.failing.clear()
    world.pass_time(10)
    assert update_state(world, sid) == U.COMPLETED
    assert images(world, world.running(sid)) == ["web:2"] * 4


def test_continue_goes_on_whatever_fails() -> None:
    settings = config(failure_action="continue", parallelism=4)
    world, sid = started(update=settings)
    world.failing.add("web:2")
    restart = RestartPolicy(condition="none")
    world.update(sid, make_spec(replicas=4, restart=restart, update=settings, image="web:2"))
    world.pass_time(10)
    assert update_state(world, sid) == U.COMPLETED
    assert world.running(sid) == []


def test_a_failing_update_rolls_back_by_itself() -> None:
    settings = config(failure_action="rollback")
    world, sid = started(update=settings)
    world.failing.add("web:2")
    world.update(sid, new(update=settings))
    world.settle()
    status = world.service(sid).update_status
    assert status is not None and status.state == U.ROLLBACK_STARTED
    assert status.message.startswith(
        "update rolled back due to failure or early termination of task "
    )
    world.pass_time(10)
    service = world.service(sid)
    assert service.update_status is not None
    assert service.update_status.state == U.ROLLBACK_COMPLETED
    assert service.update_status.message == f"rollback completed; {status.message}"
    assert service.update_status.message.endswith(": exit code 1")
    assert images(world, world.running(sid)) == ["web:1"] * 4
    assert (service.spec_version, service.previous_spec_version) == (3, 0)
    answer = world.status(sid)
    assert not answer.converged
    assert answer.reasons == ("the update failed and was rolled back to the previous version",)


def test_slots_not_yet_changed_keep_their_tasks_through_a_rollback() -> None:
    settings = config(failure_action="rollback")
    world, sid = started(update=settings)
    before = {t.id for t in world.running(sid)}
    world.failing.add("web:2")
    world.update(sid, new(update=settings))
    world.pass_time(10)
    assert len(before & {t.id for t in world.running(sid)}) == 3


def test_a_failing_rollback_pauses() -> None:
    settings = config(failure_action="rollback")
    world, sid = started(update=settings)
    world.failing |= {"web:1", "web:2"}
    world.update(sid, new(update=settings))
    world.pass_time(10)
    status = world.service(sid).update_status
    assert status is not None and status.state == U.ROLLBACK_PAUSED
    assert status.message.startswith("rollback paused due to failure or early termination of")


def test_a_manual_rollback_is_converged_when_complete() -> None:
    world, sid = started()
    world.update(sid, new())
    world.pass_time(10)
    service = world.service(sid)
    world.update(sid, new(image="web:1"))
    service = world.service(sid)
    asked = UpdateStatus(
        state=U.ROLLBACK_STARTED,
        started_at_ns=world.clock.now_ns(),
        message="manually requested rollback",
    )
    world.put(structs.replace(service, update_status=asked))
    world.pass_time(10)
    assert update_state(world, sid) == U.ROLLBACK_COMPLETED
    assert images(world, world.running(sid)) == ["web:1"] * 4
    assert world.at_rest(sid).converged


def test_a_failure_after_the_monitor_period_does_not_count() -> None:
    settings = config(delay_ns=5 * SECOND, monitor_ns=1 * SECOND)
    world, sid = started(update=settings)
    world.update(sid, new(update=settings))
    world.pass_time(3)
    (early,) = [t for t in world.running(sid) if world.image(t) == "web:2"]
    world.report(early, S.FAILED)
    world.pass_time(40)
    assert update_state(world, sid) == U.COMPLETED
    assert images(world, world.running(sid)) == ["web:2"] * 4


def test_an_update_of_a_full_cluster_stop_first_goes_through() -> None:
    world, sid = started(replicas=2, nodes=2, cpu=4 * CPU)
    world.update(sid, new(2, cpu=4 * CPU))
    world.pass_time(10)
    assert images(world, world.running(sid)) == ["web:2"] * 2
    assert world.at_rest(sid).converged


def test_global_services_are_updated_node_by_node() -> None:
    world = World(3)
    spec = make_spec(mode=GLOBAL, restart=SOON, update=config())
    sid = world.create(spec)
    world.settle()
    assert spec.task is not None
    world.update(sid, make_spec(mode=GLOBAL, restart=SOON, update=config(), image="web:2"))
    least = 3
    for _ in range(60):
        world.clock.advance(seconds=0.001)
        world.tick()
        least = min(least, len(world.running(sid)))
        world.agents()
    assert least == 2
    assert images(world, world.running(sid)) == ["web:2"] * 3
    assert {t.node_id for t in world.running(sid)} == {"n1", "n2", "n3"}


def test_the_default_is_one_at_a_time_stop_first_pause() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=3, restart=SOON))
    world.settle()
    world.failing.add("web:2")
    world.update(sid, make_spec(replicas=3, restart=SOON, image="web:2"))
    world.pass_time(2)
    assert update_state(world, sid) == U.PAUSED
    assert images(world, world.running(sid)) == ["web:1"] * 2
    assert all(states.wanted(t.desired_state) for t in world.live(sid))


def test_a_global_update_with_a_constraint_leaves_no_old_task_where_nothing_may_follow() -> None:
    world = World(3)
    world.label("n1", zone="a")
    sid = world.create(make_spec(mode=GLOBAL))
    world.settle()
    assert len(world.running(sid)) == 3
    elsewhere = Placement(constraints=("node.labels.zone != a",))
    world.update(sid, make_spec(mode=GLOBAL, image="web:2", placement=elsewhere))
    world.pass_time(30)
    assert sorted(t.node_id for t in world.running(sid)) == ["n2", "n3"]
    assert images(world, world.running(sid)) == ["web:2"] * 2
    assert world.at_rest(sid).converged


# ---------------------------------------------------------------- only what differs is replaced


def changed_task(**changes: object) -> ServiceSpec:
    spec = new(image="web:1")
    assert spec.task is not None
    return structs.replace(spec, task=structs.replace(spec.task, **changes))


KEEPS = {
    "labels": structs.replace(new(image="web:1"), labels={"a": "b"}),
    "update config": new(image="web:1", update=config(parallelism=3, delay_ns=SECOND)),
    "rollback config": new(image="web:1", rollback=config(parallelism=3)),
    "restart policy": changed_task(restart=RestartPolicy(condition="on-failure")),
    "no restart policy": changed_task(restart=None),
    "constraint that holds": changed_task(
        placement=Placement(constraints=("node.platform.os == linux",))
    ),
    "constraint and restart policy": changed_task(
        placement=Placement(constraints=("node.platform.os == linux",)),
        restart=RestartPolicy(max_attempts=3),
    ),
}
REPLACES = {
    "log driver": changed_task(log_driver=Driver(name="json-file", options={"max-size": "1m"})),
    "force": changed_task(force_update=1),
    "max replicas": changed_task(placement=Placement(max_replicas=4)),
    "runtime": changed_task(docker_runtime="runc"),
}


@pytest.mark.parametrize("name", KEEPS)
def test_what_a_task_is_not_made_of_replaces_none(name: str) -> None:
    world, sid = started()
    before = {t.id for t in world.running(sid)}
    world.update(sid, KEEPS[name])
    world.pass_time(10)
    assert {t.id for t in world.running(sid)} == before
    assert update_state(world, sid) is None
    assert world.at_rest(sid).converged


@pytest.mark.parametrize("name", REPLACES)
def test_what_a_task_is_made_of_replaces_all(name: str) -> None:
    world, sid = started()
    before = {t.id for t in world.running(sid)}
    world.update(sid, REPLACES[name])
    world.pass_time(30)
    assert not before & {t.id for t in world.running(sid)}
    assert update_state(world, sid) == U.COMPLETED


def test_another_restart_policy_counts_at_once_for_what_runs() -> None:
    world, sid = started()
    world.update(sid, changed_task(restart=RestartPolicy(condition="none")))
    world.report(world.running(sid)[0], S.FAILED, err="exit code 1")
    world.pass_time(30)
    assert len(world.live(sid)) == 3


# ---------------------------------------------------------------- what comes in between


def test_a_newer_spec_supersedes_a_paused_update_and_a_rollback() -> None:
    world, sid = started()
    world.failing |= {"web:2"}
    world.update(sid, new())
    world.pass_time(5)
    assert update_state(world, sid) == U.PAUSED
    world.update(sid, new(image="web:3", update=config(failure_action="rollback")))
    world.pass_time(30)
    assert update_state(world, sid) == U.COMPLETED
    world.update(sid, new(update=config(failure_action="rollback")))
    while update_state(world, sid) != U.ROLLBACK_STARTED:
        world.clock.advance(seconds=0.001)
        world.tick()
        world.agents()
    world.update(sid, new(image="web:4"))
    world.pass_time(30)
    assert update_state(world, sid) == U.COMPLETED
    assert images(world, world.running(sid)) == ["web:4"] * 4


@pytest.mark.parametrize("replicas", [2, 7])
def test_replicas_may_change_with_the_template_and_in_its_middle(replicas: int) -> None:
    world, sid = started()
    world.update(sid, new(replicas))
    world.pass_time(1)
    world.scale(sid, 5)
    world.pass_time(40)
    assert images(world, world.running(sid)) == ["web:2"] * 5
    assert update_state(world, sid) == U.COMPLETED
    assert world.at_rest(sid).converged


def test_an_update_of_a_service_without_replicas_is_done_at_once() -> None:
    world, sid = started(0)
    world.update(sid, new(0))
    asked = UpdateStatus(
        state=U.UPDATING,
        started_at_ns=world.clock.now_ns(),
        message="update in progress",
        pause_after=1,
    )
    world.put(structs.replace(world.service(sid), update_status=asked))
    world.pass_time(5)
    assert update_state(world, sid) == U.COMPLETED
    world.scale(sid, 2)
    world.pass_time(5)
    assert images(world, world.running(sid)) == ["web:2"] * 2


def test_nodes_come_and_go_during_the_update_of_a_global_service() -> None:
    settings = config(delay_ns=3 * SECOND)
    world = World(4)
    sid = world.create(make_spec(mode=GLOBAL, update=settings))
    world.settle()
    world.update(sid, make_spec(mode=GLOBAL, update=settings, image="web:2"))
    world.pass_time(4)
    world.set_state("n4", NodeState.DOWN)
    world.put(make_node("n9"))
    world.pass_time(2)
    world.remove_node("n3")
    world.pass_time(30)
    assert update_state(world, sid) == U.COMPLETED
    assert {t.node_id for t in world.running(sid)} == {"n1", "n2", "n9"}
    world.set_state("n4", NodeState.READY)
    world.pass_time(5)
    assert images(world, world.running(sid)) == ["web:2"] * 4
    assert world.at_rest(sid).converged


def test_a_task_counts_once_it_is_healthy() -> None:
    world, sid = started(2)
    world.frozen = {"n1", "n2"}
    world.update(sid, new(2))
    world.tick()
    (old,) = [t for t in world.tasks(sid) if t.desired_state == S.SHUTDOWN]
    world.report(old, S.SHUTDOWN)
    world.tick()
    (first,) = [t for t in world.live(sid) if t.spec_version == 2]
    for state in (S.PREPARING, S.READY, S.STARTING):
        world.report(world.tables.get(Task, first.id), state)  # type: ignore[arg-type]  # it exists
        world.tick()
    world.pass_time(60)
    assert len([t for t in world.live(sid) if t.spec_version == 2]) == 1, "it is not healthy yet"
    world.report(world.tables.get(Task, first.id), S.FAILED, err="unhealthy")  # type: ignore[arg-type]  # it exists
    world.tick()
    assert update_state(world, sid) == U.PAUSED


def test_a_rollback_without_a_version_to_go_back_to_pauses_and_says_so() -> None:
    settings = config(failure_action="rollback")
    world, sid = started(2, update=settings)
    world.failing |= {"web:1", "web:2"}
    for task in world.running(sid):
        world.report(task, S.FAILED, err="exit code 1")
    world.update(sid, new(2, update=settings))
    world.put(structs.replace(world.service(sid), previous_spec_version=0))
    world.pass_time(10)
    status = world.service(sid).update_status
    assert status is not None and status.state == U.PAUSED
    assert status.message.endswith("it cannot be rolled back: there is no version before it")


@pytest.mark.parametrize("stop", range(0, 60, 3))
def test_a_new_leader_at_any_moment_comes_to_the_same(stop: int) -> None:
    settings = config(failure_action="rollback", delay_ns=SECOND, order="start-first")
    world, sid = started(update=settings)
    world.failing.add("web:2")
    world.update(sid, new(update=settings))
    for i in range(60):
        world.clock.advance(seconds=0.01)
        if i == stop:
            world.controller.reset(world.tables)
        if world.controller.has_work(world.clock.now_ns()):
            world.tick()
        assert len(world.running(sid)) >= 4
        world.agents()
    world.pass_time(30)
    assert update_state(world, sid) == U.ROLLBACK_COMPLETED
    assert images(world, world.running(sid)) == ["web:1"] * 4
