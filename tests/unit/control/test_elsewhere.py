"""Attempts that a node refuses go on at another node at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.control import Controller
from manager.scheduler import NodeTable, explain
from swarm.ids import seeded_rng
from swarm.v1 import (
    JobSpec,
    Placement,
    PlacementPreference,
    RestartPolicy,
    Task,
    UpdateConfig,
    UpdateState,
)
from tests.unit.control.world import (
    CPU,
    GLOBAL,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)

NODE_FAULTS = ("image_unreachable", "disk_full", "engine_failed", "unsupported")
PERHAPS = ("image_missing", "image_denied", "program_missing")
NEVER = RestartPolicy(condition="none")


def refuse(world: World, *nodes: str, cause: str = "image_unreachable") -> None:
    world.refusing.update(dict.fromkeys(nodes, cause))


def attempts(world: World, sid: str) -> list[Task]:
    return sorted(world.tasks(sid), key=lambda t: t.meta.created_at_ns if t.meta else 0)


@pytest.mark.parametrize("cause", NODE_FAULTS + PERHAPS)
@pytest.mark.parametrize("policy", [None, NEVER, RestartPolicy(max_attempts=1)])
def test_a_service_comes_to_rest_on_the_one_node_that_can_run_it(
    cause: str, policy: RestartPolicy | None
) -> None:
    world = World(5)
    refuse(world, "n1", "n2", "n3", "n5", cause=cause)
    sid = world.create(make_spec(replicas=3, restart=policy))
    world.settle()
    assert [t.node_id for t in world.running(sid)] == ["n4"] * 3
    assert all(t.crashes == 0 and not t.restarts_ns for t in world.tasks(sid))
    # Each node was asked for what was put there at first, and none again.
    tried = [t.node_id for t in world.tasks(sid) if state_of(t) == S.REJECTED]
    assert len(tried) <= 6
    assert not world.status(sid).stuck


@pytest.mark.parametrize("cause", ["image_unreachable", "image_missing"])
def test_a_job_does_too_and_the_tries_count_as_no_attempts(cause: str) -> None:
    world = World(4)
    refuse(world, "n1", "n2", "n3", cause=cause)
    spec = make_spec(mode=job(3), restart=NEVER)
    sid = world.create(structs.replace(spec, job=JobSpec()))
    world.settle()
    assert [t.node_id for t in world.running(sid)] == ["n4"] * 3
    assert all(not t.restarts_ns for t in world.running(sid))


def test_where_no_node_can_the_delay_and_the_backoff_hold() -> None:
    world = World(3)
    refuse(world, "n1", "n2", cause="image_unreachable")
    refuse(world, "n3", cause="disk_full")
    sid = world.create(make_spec())
    world.settle()
    # Each has had a try; the next attempt is prepared during its delay.
    assert {t.node_id for t in attempts(world, sid)[:3]} == {"n1", "n2", "n3"}
    assert [t.crashes for t in attempts(world, sid)] == [0, 0, 0, 1]
    assert not world.status(sid).stuck, "a registry may come back"
    assert world.status(sid).reasons == (
        "1 of 1 replica is backing off, next try in 5s: "
        "image_unreachable here (n1, n2); disk_full here (n3), 2 times in a row",
    )
    made = len(world.tasks(sid))
    world.pass_time(4)
    assert len(world.tasks(sid)) == made
    world.pass_time(300, step=5)
    assert world.status(sid).stuck
    assert max(t.crashes for t in world.tasks(sid)) >= 5
    world.refusing.clear()
    world.pass_time(800, step=10)  # an attempt that was prepared for nothing, and the next
    assert world.status(sid).converged


def test_what_the_nodes_said_is_explained() -> None:
    world = World(3)
    refuse(world, "n1", "n2", "n3")
    sid = world.create(make_spec())
    world.settle()
    task = attempts(world, sid)[-1]
    answer = explain(NodeTable.build(world.tables), world.tables, task)
    assert answer.summary.endswith(
        "; nodes that could not run it: image_unreachable here (n1, n2, n3)"
    )


def test_a_typing_error_in_an_image_asks_some_nodes_and_not_all() -> None:
    world = World(40)
    refuse(world, *(f"n{i}" for i in range(1, 41)), cause="image_missing")
    sid = world.create(make_spec())
    world.settle()
    assert len({t.node_id for t in world.tasks(sid)}) <= 11
    status = world.status(sid)
    assert status.stuck
    assert status.reasons[0].startswith("1 of 1 replica cannot run: image_missing here (")


def test_an_update_does_not_fail_for_a_node_that_refuses() -> None:
    world = World(3)
    config = UpdateConfig(parallelism=1, failure_action="rollback")
    sid = world.create(make_spec(replicas=3, update=config))
    world.settle()
    refuse(world, "n2", cause="disk_full")
    world.update(sid, make_spec(replicas=3, update=config, image="web:2"))
    world.pass_time(60)
    status = world.service(sid).update_status
    assert status is not None and status.state == UpdateState.COMPLETED
    assert {t.node_id for t in world.running(sid)} == {"n1", "n3"}


def test_an_update_that_every_node_refuses_fails() -> None:
    world = World(3)
    config = UpdateConfig(parallelism=1, failure_action="rollback")
    sid = world.create(make_spec(replicas=3, update=config))
    world.settle()
    refuse(world, "n1", "n2", "n3", cause="image_missing")
    world.update(sid, make_spec(replicas=3, update=config, image="web:2"))
    world.settle()
    status = world.service(sid).update_status
    assert status is not None
    assert status.state in (UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_PAUSED)
    world.refusing.clear()
    world.pass_time(30)
    assert world.status(sid).running == 3


def test_a_node_that_refuses_comes_last_even_where_the_spread_asks_for_it() -> None:
    world = World(0)
    world.put(make_node("n1", labels={"rack": "a"}))
    world.put(*(make_node(i, labels={"rack": "b"}) for i in ("n2", "n3")))
    refuse(world, "n1")
    spread = Placement(preferences=(PlacementPreference(spread="node.labels.rack"),))
    sid = world.create(make_spec(replicas=4, placement=spread))
    world.settle()
    assert len(world.running(sid)) == 4
    assert all(t.node_id != "n1" for t in world.running(sid))


def test_a_node_without_room_has_no_try_to_wait_for() -> None:
    world = World(2)
    full = world.create(make_spec("full", cpu=4 * CPU))
    world.settle()
    (taken,) = world.running(full)
    other = "n2" if taken.node_id == "n1" else "n1"
    refuse(world, other)
    sid = world.create(make_spec(cpu=CPU))
    world.settle()
    assert [t.crashes for t in attempts(world, sid)][-1] >= 1, "nobody else could take it"
    assert len(world.tasks(sid)) <= 3
    world.remove(full)
    world.pass_time(20)
    assert [t.node_id for t in world.running(sid)] == [taken.node_id]


def test_a_node_is_asked_again_after_a_while() -> None:
    world = World(2)
    refuse(world, "n1")
    sid = world.create(make_spec(replicas=2))
    world.settle()
    assert {t.node_id for t in world.running(sid)} == {"n2"}
    world.refusing.clear()
    world.pass_time(901, step=100)
    world.scale(sid, 3)
    world.settle()
    assert {t.node_id for t in world.running(sid)} == {"n1", "n2"}


def test_in_a_global_service_there_is_no_elsewhere() -> None:
    world = World(2)
    refuse(world, "n1")
    sid = world.create(make_spec(mode=GLOBAL))
    world.settle()
    (waits,) = [t for t in attempts(world, sid) if t.node_id == "n1"][-1:]
    assert waits.crashes >= 1
    world.refusing.clear()
    world.pass_time(11)
    assert {t.node_id for t in world.running(sid)} == {"n1", "n2"}


def test_what_has_run_is_restarted_elsewhere_only_if_it_may_be_restarted() -> None:
    world = World(2)
    for name, policy, count in (("a", NEVER, 1), ("b", None, 2)):
        sid = world.create(make_spec(name, restart=policy))
        world.settle()
        (task,) = world.running(sid)
        world.report(task, S.FAILED, err="the engine is gone", cause="engine_failed")
        world.settle()
        assert len(world.tasks(sid)) == count
        assert all(t.crashes == 0 and t.node_id != task.node_id for t in world.running(sid))


def test_a_new_leader_knows_who_has_refused() -> None:
    world = World(4)
    refuse(world, "n1", "n2", "n3")
    sid = world.create(make_spec(replicas=2))
    for seed in range(60):
        world.clock.advance(seconds=0.001)
        world.controller = Controller(seeded_rng(seed))
        world.controller.reset(world.tables)
        world.tick()
        world.agents()
    assert [t.node_id for t in world.running(sid)] == ["n4"] * 2
    assert len(world.tasks(sid)) <= 6


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.sets(st.integers(1, 6)),
    st.sampled_from(NODE_FAULTS + PERHAPS),
    st.integers(1, 4),
    st.sampled_from([0, 1, 5]),
)
def test_some_node_that_can_is_found_and_nothing_is_tried_at_the_speed_of_failing(
    nodes: int, bad: set[int], cause: str, replicas: int, history: int
) -> None:
    world = World(nodes, history=history)
    refuse(world, *(f"n{i}" for i in bad), cause=cause)
    sid = world.create(make_spec(replicas=replicas))
    made = set()
    for _ in range(200):
        world.clock.advance(seconds=0.001)
        world.tick()
        made |= {t.id for t in world.tasks(sid)}
        world.agents()
    good = {f"n{i}" for i in range(1, nodes + 1)} - world.refusing.keys()
    assert len(made) <= replicas * 3 + nodes
    if good:
        assert len(world.running(sid)) == replicas
        assert {t.node_id for t in world.running(sid)} <= good
    else:
        assert not world.running(sid)
