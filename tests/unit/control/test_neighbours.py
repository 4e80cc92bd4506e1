"""Conditions on who else is on a node: they choose places, and make no task leave one."""

from __future__ import annotations

import pytest
from msgspec import structs

from manager.scheduler import FOR_EVER
from swarm.v1 import Placement, PlacementPreference, Task, TaskState
from tests.unit.control.world import CPU, World, make_spec

STACK = "com.docker.stack.namespace"


def nodes_of(world: World, service_id: str) -> list[str]:
    found = world.tables.by(Task, "service", service_id)
    return sorted(t.node_id for t in found if t.desired_state == TaskState.RUNNING)


def apart(name: str, replicas: int = 3) -> Placement:
    return Placement(constraints=(f"service.name != {name}",))


def test_replicas_that_keep_apart_land_on_different_nodes() -> None:
    world = World(3)
    sid = world.create(make_spec("web", replicas=4, placement=apart("web")))
    world.settle()
    assert nodes_of(world, sid) == ["", "n1", "n2", "n3"]
    [waiting] = [t for t in world.tables.by(Task, "service", sid) if not t.node_id]
    assert waiting.status is not None
    assert waiting.status.err == ("no suitable node (3 nodes do not satisfy service.name != web)")
    assert FOR_EVER not in waiting.status.err


def test_what_may_change_is_named_before_what_nodes_are() -> None:
    world = World(3)
    world.create(make_spec("db", replicas=3))
    world.settle()
    apart_on_n1 = Placement(constraints=("node.id == n1", "service.name != db"))
    sid = world.create(make_spec("web", placement=apart_on_n1))
    world.settle()
    [waiting] = world.tables.by(Task, "service", sid)
    assert waiting.status is not None
    assert waiting.status.err == (
        "no suitable node (1 node does not satisfy service.name != db; "
        "2 nodes do not satisfy node.id == n1)"
    )


def test_a_service_goes_where_the_one_that_it_names_is() -> None:
    world = World(3)
    db = world.create(make_spec("db", placement=Placement(constraints=("node.id == n2",))))
    world.settle()
    near = world.create(
        make_spec("app", replicas=3, placement=Placement(constraints=("service.name == db",)))
    )
    far = world.create(
        make_spec("batch", replicas=4, placement=Placement(constraints=("service.name != db",)))
    )
    world.settle()
    assert nodes_of(world, db) == ["n2"]
    assert nodes_of(world, near) == ["n2"] * 3
    assert nodes_of(world, far) == ["n1", "n1", "n3", "n3"]


def test_a_service_waits_for_the_one_that_it_names() -> None:
    world = World(2)
    sid = world.create(make_spec("app", placement=Placement(constraints=("stack.name == shop",))))
    world.settle()
    assert nodes_of(world, sid) == [""]
    db = world.create(make_spec("shop_db", labels={STACK: "shop"}))
    world.settle()
    assert nodes_of(world, sid) == nodes_of(world, db) != [""]


def test_tasks_stay_when_their_neighbours_come_and_go() -> None:
    world = World(3)
    db = world.create(make_spec("db", placement=Placement(constraints=("node.id == n2",))))
    sid = world.create(
        make_spec("app", replicas=2, placement=Placement(constraints=("service.name == db",)))
    )
    other = world.create(make_spec("lone", placement=Placement(constraints=("service.name != x",))))
    world.settle()
    before = {t.id for i in (sid, other) for t in world.tables.by(Task, "service", i)}
    world.remove(db)
    world.create(make_spec("x", replicas=3))
    world.settle()
    assert {t.id for i in (sid, other) for t in world.tables.by(Task, "service", i)} == before
    assert nodes_of(world, sid) == ["n2", "n2"]


@pytest.mark.parametrize(
    "placement",
    [
        Placement(constraints=("service.name != db",)),
        Placement(preferences=(PlacementPreference(affinity="node.id == n1", weight=5),)),
        Placement(strategy="binpack"),
    ],
    ids=["services", "affinity", "strategy"],
)
def test_another_placement_alone_makes_no_new_tasks(placement: Placement) -> None:
    world = World(2)
    world.create(make_spec("db", replicas=2))
    sid = world.create(make_spec("web", replicas=2))
    world.settle()
    before = {t.id for t in world.tables.by(Task, "service", sid)}
    old = world.service(sid).spec
    assert old is not None and old.task is not None
    task = structs.replace(old.task, placement=placement)
    world.update(sid, structs.replace(old, task=task))
    world.settle()
    assert {t.id for t in world.tables.by(Task, "service", sid)} == before


def test_an_affinity_is_no_condition() -> None:
    world = World(3)
    prefer = (PlacementPreference(affinity="node.id == n3", weight=10),)
    sid = world.create(
        make_spec("web", replicas=3, cpu=2 * CPU, placement=Placement(preferences=prefer))
    )
    world.settle()
    assert nodes_of(world, sid).count("n3") == 2
    assert "" not in nodes_of(world, sid)


def test_weights_add_up_and_may_be_negative() -> None:
    world = World(3)
    prefer = (
        PlacementPreference(affinity="node.id in (n1, n2)", weight=10),
        PlacementPreference(affinity="node.id == n1", weight=-11),
    )
    sid = world.create(make_spec("web", replicas=2, placement=Placement(preferences=prefer)))
    world.settle()
    assert nodes_of(world, sid) == ["n2", "n2"]


def test_a_service_that_may_be_anywhere_with_itself_finds_its_first_place() -> None:
    world = World(3)
    sid = world.create(
        make_spec("web", replicas=3, placement=Placement(constraints=("service.name == web",)))
    )
    world.settle()
    assert len(set(nodes_of(world, sid))) == 1
    assert nodes_of(world, sid) != [""] * 3
