"""depends_on: what holds first tasks, roll-outs and replacements back, and what lets them go."""

from __future__ import annotations

import pytest
from msgspec import structs

from swarm.v1 import (
    Availability,
    Dependency,
    NodeState,
    Placement,
    RestartPolicy,
    Service,
    ServiceSpec,
    Task,
    UpdateConfig,
    UpdateState,
    UpdateStatus,
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

SOON = RestartPolicy(delay_ns=SECOND // 5)
ONCE = RestartPolicy(condition="none")
QUICK = UpdateConfig(parallelism=0, monitor_ns=SECOND)


def gate(service: str, condition: str = "service_healthy", *, required: bool = True) -> Dependency:
    return Dependency(service=service, condition=condition, required=required)


def spec(name: str, *gates: Dependency, version: int = 1, **more: object) -> ServiceSpec:
    more.setdefault("restart", SOON)
    more.setdefault("update", QUICK)
    return make_spec(name, image=f"{name}:{version}", depends_on=gates, **more)  # type: ignore[arg-type]


def web_behind_db(nodes: int = 2) -> World:
    world = World(nodes)
    world.create(spec("db"))
    world.create(spec("web", gate("db"), replicas=2))
    world.pass_time(5)
    assert world.status("s-web").running == 2
    return world


def images(world: World, service_id: str) -> list[str]:
    return sorted(world.image(t) for t in world.running(service_id))


def deploy(world: World, *specs: ServiceSpec) -> None:
    """Several services in one transaction."""
    before = world.put
    objects: list[object] = []
    world.put = lambda *o: objects.extend(o)  # type: ignore[method-assign]
    for s in specs:
        world.update(f"s-{s.name}", s)
    world.put = before  # type: ignore[method-assign]
    world.put(*objects)


# ---------------------------------------------------------------- roll-outs


def test_a_roll_out_waits_until_the_new_migration_has_completed() -> None:
    world = World(2)
    done = gate("migrate", "service_completed_successfully")
    world.create(spec("migrate", mode=job(1)))
    world.create(spec("web", done, replicas=2))
    world.settle()
    world.report(world.running("s-migrate")[0], S.COMPLETE)
    world.pass_time(5)
    deploy(world, spec("migrate", mode=job(1), version=2), spec("web", done, replicas=2, version=2))
    world.settle()
    assert images(world, "s-web") == ["web:1"] * 2, "the old tasks serve meanwhile"
    status = world.service("s-web").update_status
    assert status is not None
    assert (status.state, status.message) == (
        UpdateState.UPDATING,
        "update waits until service migrate has completed",
    )
    answer = world.status("s-web")
    assert not answer.converged
    assert not answer.stuck
    assert answer.reasons[0] == "2 of 2 replicas are not yet on the current version"
    assert (
        "the update waits until service migrate has completed (0 of 1 task so far)"
        in answer.reasons
    )
    world.controller.reset(world.tables)  # a new leader waits on
    world.settle()
    assert images(world, "s-web") == ["web:1"] * 2
    (task,) = world.running("s-migrate")
    assert world.image(task) == "migrate:2"
    world.report(task, S.COMPLETE)
    world.pass_time(3)
    assert images(world, "s-web") == ["web:2"] * 2
    status = world.service("s-web").update_status
    assert status is not None
    assert status.message == "update completed"


def test_of_two_services_changed_together_the_dependent_follows() -> None:
    world = web_behind_db()
    world.frozen |= {"n1", "n2"}
    deploy(world, spec("db", version=2), spec("web", gate("db"), replicas=2, version=2))
    world.settle()
    assert all(world.image(t) == "web:1" for t in world.live("s-web"))
    world.frozen.clear()
    db: list[str] = []
    for _ in range(50):
        world.clock.advance(seconds=0.001)
        if world.controller.has_work(world.clock.now_ns()):
            world.tick()
        if any(world.image(t) == "web:2" for t in world.live("s-web")):
            db = images(world, "s-db")
            break
        world.agents()
    assert db == ["db:2"], "the new database runs when the first new task is made"
    world.pass_time(3)
    assert images(world, "s-web") == ["web:2"] * 2


def test_a_change_of_the_other_service_alone_moves_nothing() -> None:
    world = web_behind_db()
    before = {t.id for t in world.running("s-web")}
    world.update("s-db", spec("db", version=2))
    world.pass_time(5)
    assert {t.id for t in world.running("s-web")} == before
    assert world.at_rest("s-web").converged


def test_scaling_up_does_not_slip_past_a_waiting_roll_out() -> None:
    world = web_behind_db()
    world.failing.add("db:2")
    deploy(world, spec("db", version=2), spec("web", gate("db"), replicas=4, version=2))
    world.settle()
    assert [world.image(t) for t in world.live("s-web")] == ["web:1"] * 2


def test_a_rollback_does_not_wait_for_what_fails_beside_it() -> None:
    """The database's own update is paused half way, so that a strict gate stays closed."""
    world = World(2)
    back = structs.replace(QUICK, failure_action="rollback")
    step = UpdateConfig(parallelism=1, monitor_ns=SECOND)
    world.create(spec("db", replicas=2, update=step))
    world.create(spec("web", gate("db"), replicas=2, update=back))
    world.pass_time(5)
    world.failing |= {"web:2", "db:2"}
    world.update("s-web", spec("web", gate("db"), replicas=2, version=2, update=back))
    world.tick()
    world.update("s-db", spec("db", replicas=2, version=2, update=step))
    world.pass_time(5)
    assert world.service("s-db").update_status.state == UpdateState.PAUSED  # type: ignore[union-attr]
    assert images(world, "s-web") == ["web:1"] * 2


def test_the_same_template_again_waits_as_a_new_one_does() -> None:
    """History of an earlier time with this template does not count as begun."""
    world = web_behind_db()
    world.update("s-web", spec("web", gate("db"), replicas=2, version=2))
    world.pass_time(5)
    world.failing.add("db:3")
    deploy(world, spec("db", version=3), spec("web", gate("db"), replicas=2, version=1))
    world.pass_time(1)
    assert images(world, "s-web") == ["web:2"] * 2


# ---------------------------------------------------------------- replacements


def test_when_both_are_lost_with_a_host_the_dependent_comes_back_second() -> None:
    world = World(1)
    world.create(spec("db"))
    world.create(spec("web", gate("db")))
    world.pass_time(2)
    world.put(make_node("n2"))
    world.frozen.add("n2")
    world.set_state("n1", NodeState.DOWN)
    world.settle()
    (db,) = world.live("s-db")
    (web,) = world.live("s-web")
    assert db.node_id == "n2"
    assert (state_of(web), web.node_id, web.desired_state) == (S.PENDING, "", S.READY)
    assert web.status is not None
    assert web.status.err == "waits until a task of service db runs and is healthy"
    assert world.status("s-web").reasons == (
        "1 of 1 replica is held back: the service waits until a task of service db runs and is "
        "healthy",
    )
    world.controller.reset(world.tables)
    world.settle()
    assert world.live("s-web")[0].node_id == ""
    world.frozen.clear()
    world.settle()
    assert images(world, "s-web") == ["web:1"]
    assert world.at_rest("s-web").converged


def test_held_tasks_leave_the_room_to_what_they_wait_for() -> None:
    """With room for one of them only, the database gets it."""
    world = World(1)
    world.create(spec("db", cpu=4 * CPU), "z-db")  # looked at after the other
    world.create(spec("web", gate("db"), cpu=CPU), "a-web")
    world.settle()
    world.put(make_node("n2", cpu=8 * CPU))
    world.settle()
    assert world.running("a-web")
    world.remove_node("n2")
    world.put(make_node("n3"))
    world.set_state("n1", NodeState.DOWN)
    world.settle()
    assert [t.node_id for t in world.running("z-db")] == ["n3"]
    (web,) = world.live("a-web")
    assert state_of(web) == S.PENDING


def test_a_crashed_task_waits_for_the_database_but_not_for_all_of_it() -> None:
    world = World(2)
    world.label("n1", zone="a")
    limit = Placement(max_replicas=1, constraints=("node.labels.zone == a",))
    world.create(spec("db", replicas=1, placement=limit))
    world.create(spec("web", gate("db"), replicas=2))
    world.pass_time(2)
    world.scale("s-db", 3)  # two of them find no place
    world.settle()
    crashed = world.running("s-web")[0]
    world.report(crashed, S.FAILED)
    world.pass_time(2)
    assert len(world.running("s-web")) == 2
    world.report(world.running("s-db")[0], S.FAILED)
    world.frozen.add("n1")  # its replacement does not come up
    node = next(t for t in world.running("s-web") if t.node_id == "n2")
    world.report(node, S.FAILED)
    world.pass_time(2)
    assert len(world.running("s-web")) == 1
    world.frozen.clear()
    world.pass_time(2)
    assert len(world.running("s-web")) == 2


def test_a_drained_node_keeps_its_tasks_until_the_gate_lets_others_start() -> None:
    world = web_behind_db()
    (db,) = world.running("s-db")
    other = next(n for n in ("n1", "n2") if n != db.node_id)
    world.set_state(db.node_id, NodeState.DOWN)
    world.frozen.add(other)
    world.settle()
    world.put(make_node("n3"))
    world.set_availability(other, Availability.DRAIN)
    world.settle()
    here = [t for t in world.tasks("s-web") if t.node_id == other]
    assert here and all(t.desired_state == state_of(t) == S.RUNNING for t in here)
    world.frozen.clear()
    world.pass_time(3)
    assert [t.node_id for t in world.running("s-web")] == ["n3", "n3"]


def test_a_completion_is_not_asked_for_again() -> None:
    """A new iteration forgets the completed tasks of the last one."""
    world = World(1)
    done = gate("migrate", "service_completed_successfully")
    world.create(spec("migrate", mode=job(1)))
    world.create(spec("web", done))
    world.settle()
    world.report(world.running("s-migrate")[0], S.COMPLETE)
    world.pass_time(2)
    world.update("s-migrate", spec("migrate", mode=job(1), version=2))
    world.settle()
    assert all(state_of(t) != S.COMPLETE for t in world.tasks("s-migrate"))
    world.report(world.running("s-web")[0], S.FAILED)
    world.pass_time(2)
    assert images(world, "s-web") == ["web:1"]


def test_scaling_up_waits_for_one_task_of_the_other() -> None:
    world = web_behind_db()
    world.report(world.running("s-db")[0], S.FAILED)
    world.scale("s-web", 3)
    world.tick()
    assert len(world.live("s-web")) == 2
    assert (
        world.status("s-web")
        .reasons[0]
        .endswith("waits until a task of service db runs and is healthy")
    )
    world.pass_time(2)
    assert len(world.running("s-web")) == 3


# ---------------------------------------------------------------- who waits for whom


@pytest.mark.parametrize("condition", ["service_started", "service_healthy"])
def test_a_service_of_no_replicas_holds_nothing_back(condition: str) -> None:
    world = World(1)
    world.create(spec("db", replicas=0))
    world.create(spec("web", gate("db", condition)))
    world.settle()
    assert len(world.running("s-web")) == 1


def test_a_global_service_waits_and_is_waited_for() -> None:
    world = World(2)
    world.frozen |= {"n1", "n2"}
    world.create(spec("agent", mode=GLOBAL))
    world.create(spec("web", gate("agent")))
    world.create(spec("side", gate("web", "service_started"), mode=GLOBAL))
    world.settle()
    assert not world.tasks("s-web")
    world.frozen = {"n2"}
    world.settle()
    assert not world.tasks("s-web"), "each node counts"
    world.set_state("n2", NodeState.DOWN)  # it is not wanted there any more
    world.settle()
    assert len(world.running("s-web")) == 1
    assert {t.node_id for t in world.running("s-side")} == {"n1"}
    world.frozen.clear()
    world.set_state("n2", NodeState.READY)
    world.settle()
    assert {t.node_id for t in world.running("s-side")} == {"n1", "n2"}


def test_a_service_waits_for_a_global_job_on_every_node() -> None:
    world = World(2)
    world.create(spec("prepare", mode=GLOBAL_JOB))
    world.create(spec("web", gate("prepare", "service_completed_successfully")))
    world.settle()
    first, second = world.running("s-prepare")
    world.report(first, S.COMPLETE)
    world.settle()
    assert not world.tasks("s-web")
    world.report(second, S.COMPLETE)
    world.settle()
    assert len(world.running("s-web")) == 1


def test_a_job_waits_anew_with_each_iteration() -> None:
    world = World(1)
    world.create(spec("db"))
    world.create(spec("load", gate("db"), mode=job(2, 1)))
    world.settle()
    for _ in range(2):
        world.report(world.running("s-load")[0], S.COMPLETE)
        world.settle()
    assert world.status("s-load").converged
    deploy(world, spec("db", version=2), spec("load", gate("db"), mode=job(2, 1), version=2))
    world.tick()
    assert not world.live("s-load")
    world.settle()
    assert images(world, "s-load") == ["load:2"]


def test_a_job_that_runs_in_turns_has_started_with_its_first_turn() -> None:
    world = World(1)
    world.create(spec("load", mode=job(10, 2)))
    world.create(spec("meter", gate("load", "service_started")))
    world.settle()
    assert len(world.running("s-meter")) == 1


def test_a_task_that_ended_well_for_good_counts_as_started_but_one_that_restarts_does_not() -> None:
    for policy, waits in ((ONCE, False), (RestartPolicy(delay_ns=60 * SECOND), True)):
        world = World(1)
        world.create(spec("init", restart=policy))
        world.settle()
        world.report(world.running("s-init")[0], S.COMPLETE)
        world.settle()
        world.create(spec("web", gate("init", "service_started")))
        world.settle()
        assert bool(world.tasks("s-web")) is not waits


def test_only_the_waiting_services_are_looked_at_when_a_gate_opens() -> None:
    world = World(1)
    world.frozen.add("n1")
    world.create(spec("db"))
    for name in ("web", "api"):
        world.create(spec(name, gate("db")))
    world.create(spec("other"))
    world.settle()
    assert world.controller.dirty == set()
    (db,) = world.tasks("s-db")
    world.report(db, S.RUNNING)
    assert world.controller.dirty == {"s-web", "s-api"}
    world.tick()
    world.report(world.tasks("s-db")[0], S.FAILED)
    assert world.controller.dirty == {"s-db"}, "an open gate wakes nobody"


def test_who_found_no_place_is_told_when_a_gate_closes() -> None:
    world = World(1)
    world.set_state("n1", NodeState.DOWN)
    world.create(spec("db", replicas=0))
    world.create(spec("web", gate("db")))
    world.settle()
    assert [t.status.err for t in world.tasks("s-web") if t.status] == [
        "no suitable node (1 node down)"
    ]
    world.scale("s-db", 1)
    world.settle()
    assert ["waits until" in t.status.err for t in world.tasks("s-web") if t.status] == [True]


def test_a_missing_service_that_is_not_required_is_waited_for_once_it_exists() -> None:
    world = World(1)
    world.frozen.add("n1")
    world.create(spec("db"))
    world.create(spec("web", gate("db", required=False)))
    world.settle()
    assert not world.tasks("s-web")
    draft = world.draft()
    for task in world.tasks("s-db"):
        draft.delete(Task, task.id)
    draft.delete(Service, "s-db")
    world.commit(draft)
    world.settle()
    assert len(world.live("s-web")) == 1


def test_a_paused_update_is_not_begun_by_a_gate() -> None:
    world = web_behind_db()
    service = world.service("s-web")
    world.update("s-web", spec("web", gate("db"), replicas=2, version=2))
    paused = UpdateStatus(state=UpdateState.PAUSED, message="update paused", started_at_ns=1)
    world.put(structs.replace(world.service("s-web"), update_status=paused))
    world.settle()
    assert images(world, "s-web") == ["web:1"] * 2
    assert service.spec is not None
