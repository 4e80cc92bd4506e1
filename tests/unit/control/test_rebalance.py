"""Rebalancing: which moves are planned, that they are made one by one and come to an end, and the
form that begins by itself.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.control import plan_moves
from manager.control.rebalance import BALANCED
from manager.scheduler import NodeTable
from swarm.v1 import (
    Availability,
    Cluster,
    Node,
    NodeState,
    Placement,
    PlacementPreference,
    RebalanceConfig,
    RebalanceStatus,
    SchedulingConfig,
    Service,
    StopCause,
    UpdateConfig,
    UpdateState,
)
from tests.unit.control.world import (
    CPU,
    GIB,
    GLOBAL,
    SECOND,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)


def spread(*labels: str) -> Placement:
    return Placement(
        preferences=tuple(PlacementPreference(spread=f"node.labels.{label}") for label in labels)
    )


def ask(world: World, sid: str, node_id: str = "") -> None:
    """As the API does."""
    now_ns = world.clock.now_ns()
    status = RebalanceStatus(running=True, started_at_ns=now_ns, node_id=node_id)
    world.put(structs.replace(world.service(sid), rebalance_status=status))


def status(world: World, sid: str) -> RebalanceStatus:
    found = world.service(sid).rebalance_status
    assert found is not None
    return found


def on(world: World, sid: str) -> Counter[str]:
    return Counter(t.node_id for t in world.running(sid))


def step(world: World) -> None:
    world.clock.advance(seconds=0.001)
    world.tick()
    world.agents()


def lopsided(replicas: int = 6, **spec: object) -> tuple[World, str]:
    """All tasks on n1; n2 and n3 came later."""
    world = World(1)
    sid = world.create(make_spec(replicas=replicas, **spec))  # type: ignore[arg-type]
    world.settle()
    world.put(make_node("n2"), make_node("n3"))
    world.settle()
    assert on(world, sid) == {"n1": replicas}
    return world, sid


def test_tasks_are_spread_evenly_over_the_nodes_there_are_now() -> None:
    world, sid = lopsided()
    ask(world, sid)
    world.settle()
    assert on(world, sid) == {"n1": 2, "n2": 2, "n3": 2}
    assert (status(world, sid).running, status(world, sid).moved) == (False, 4)
    assert status(world, sid).message == BALANCED
    assert status(world, sid).ended_at_ns
    moved = [t for t in world.tasks(sid) if t.stop_cause == StopCause.MOVED]
    assert sorted(t.stop_message for t in moved) == ["moved to n2"] * 2 + ["moved to n3"] * 2


def test_one_task_at_a_time_moves_and_all_slots_run_meanwhile() -> None:
    world, sid = lopsided()
    ask(world, sid)
    messages = set()
    for _ in range(80):
        step(world)
        per_slot = Counter(t.slot for t in world.live(sid))
        assert sum(1 for n in per_slot.values() if n > 1) <= 1
        assert {t.slot for t in world.running(sid)} == set(range(1, 7))
        messages.add(status(world, sid).message)
    assert not status(world, sid).running
    assert "moving web.6 from n1 to n2" in messages


def test_what_is_even_stays() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=4))
    world.settle()
    before = {t.id for t in world.tasks(sid)}
    ask(world, sid)
    world.settle()
    assert {t.id for t in world.tasks(sid)} == before
    assert (status(world, sid).running, status(world, sid).moved) == (False, 0)


def test_a_plan_says_what_would_be_done_and_does_nothing() -> None:
    world, sid = lopsided()
    table = NodeTable.build(world.tables)
    before = table.summary()
    moves = plan_moves(world.tables, table, (sid,), now_ns=world.clock.now_ns())
    assert [(m.slot, m.from_node_id, m.to_node_id) for m in moves] == [
        (6, "n1", "n2"),
        (5, "n1", "n3"),
        (4, "n1", "n2"),
        (3, "n1", "n3"),
    ]
    assert table.summary() == before
    table.check_invariants(world.tables)
    ask(world, sid)
    world.settle()
    where = {t.slot: t.node_id for t in world.running(sid)}
    assert {m.slot: m.to_node_id for m in moves}.items() <= where.items()


def test_branches_of_a_preference_come_before_nodes() -> None:
    world = World(0)
    for node_id, zone in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        world.put(make_node(node_id, labels={"zone": zone}))
    sid = world.create(make_spec(replicas=6))
    world.settle()
    assert on(world, sid) == {"a1": 2, "a2": 2, "b1": 2}
    world.update(sid, make_spec(replicas=6, placement=spread("zone")))
    world.settle()
    ask(world, sid)
    world.pass_time(10)
    assert on(world, sid)["b1"] == 3
    assert sorted(on(world, sid).values()) == [1, 2, 3]


def test_only_tasks_of_the_node_move() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=8))
    world.settle()
    world.put(make_node("n3"))
    ask(world, sid, "n1")
    world.settle()
    assert on(world, sid) == {"n1": 2, "n2": 4, "n3": 2}


def test_one_task_services_are_spread_by_the_load_of_nodes() -> None:
    world = World(1)
    sids = [world.create(make_spec(name=f"s{i}")) for i in range(6)]
    world.settle()
    world.put(make_node("n2"))
    table = NodeTable.build(world.tables)
    moves = plan_moves(world.tables, table, sids, now_ns=world.clock.now_ns())
    assert len(moves) == 3
    assert len({m.service_id for m in moves}) == 3


def test_nodes_without_room_or_that_are_not_to_take_tasks_are_no_targets() -> None:
    world, sid = lopsided(cpu=CPU // 2)
    world.put(make_node("n2", cpu=CPU // 4))
    world.set_availability("n3", Availability.PAUSE)
    ask(world, sid)
    world.settle()
    assert on(world, sid) == {"n1": 6}
    assert status(world, sid).message == BALANCED


def test_a_task_whose_move_failed_stays_and_the_rebalance_ends() -> None:
    world, sid = lopsided(replicas=3)
    world.failing.add("web:1")
    ask(world, sid)
    world.pass_time(30)
    assert on(world, sid) == {"n1": 3}
    assert (status(world, sid).running, status(world, sid).moved) == (False, 0)
    assert sum(1 for t in world.tasks(sid) if state_of(t) == S.FAILED) <= 2


def test_the_update_has_the_right_of_way() -> None:
    config = UpdateConfig(parallelism=1, delay_ns=5 * SECOND, monitor_ns=0)
    world, sid = lopsided(update=config)
    world.update(sid, make_spec(replicas=6, image="web:2", update=config))
    ask(world, sid)
    world.settle()
    assert status(world, sid).message == "waits until the update is over"
    world.pass_time(60)
    assert {world.image(t) for t in world.running(sid)} == {"web:2"}
    assert on(world, sid) == {"n1": 2, "n2": 2, "n3": 2}
    assert not status(world, sid).running


def test_tasks_move_with_the_version_that_they_have_while_a_rollback_is_paused() -> None:
    config = UpdateConfig(parallelism=2, delay_ns=100 * SECOND, monitor_ns=0)
    world = World(1)
    sid = world.create(make_spec(replicas=4, update=config))
    world.settle()
    world.update(sid, make_spec(replicas=4, image="web:2", update=config))
    world.settle()
    before = Counter(world.image(t) for t in world.running(sid))
    assert before == {"web:1": 2, "web:2": 2}
    service = world.service(sid)
    assert service.update_status is not None
    paused = structs.replace(service.update_status, state=UpdateState.ROLLBACK_PAUSED)
    world.put(structs.replace(service, update_status=paused))
    world.put(make_node("n2"))
    ask(world, sid)
    world.pass_time(20)
    assert not status(world, sid).running
    assert on(world, sid) == {"n1": 2, "n2": 2}
    assert Counter(world.image(t) for t in world.running(sid)) == before
    assert len(world.live(sid)) == 4


@pytest.mark.parametrize("mode", [GLOBAL, job(3)], ids=["global", "job"])
def test_what_does_not_move_says_so(mode: object) -> None:
    world = World(2)
    sid = world.create(make_spec(mode=mode))  # type: ignore[arg-type]
    world.settle()
    ask(world, sid)
    world.settle()
    if not status(world, sid).running:
        assert status(world, sid).message == "its tasks do not move"
    assert not [t for t in world.tasks(sid) if t.stop_cause == StopCause.MOVED]


def test_a_new_leader_goes_on_with_it() -> None:
    world, sid = lopsided()
    ask(world, sid)
    for _ in range(80):
        world.controller.reset(world.tables)
        step(world)
    assert on(world, sid) == {"n1": 2, "n2": 2, "n3": 2}
    assert (status(world, sid).running, status(world, sid).moved) == (False, 4)


def test_a_target_that_goes_down_is_left_for_another() -> None:
    world, sid = lopsided(replicas=2)
    world.frozen.add("n2")
    ask(world, sid)
    world.settle()
    world.set_state("n2", NodeState.DOWN)
    world.settle()
    assert len(world.running(sid)) == len({t.slot for t in world.running(sid)}) == 2
    assert on(world, sid) == {"n1": 1, "n3": 1}
    assert not status(world, sid).running


def test_stop_first_is_kept_to() -> None:
    world, sid = lopsided(update=UpdateConfig(parallelism=1, order="stop-first"))
    ask(world, sid)
    least = 6
    for _ in range(120):
        step(world)
        assert len({t.slot for t in world.running(sid)}) == len(world.running(sid))
        least = min(least, len(world.running(sid)))
    assert least == 5
    assert on(world, sid) == {"n1": 2, "n2": 2, "n3": 2}
    assert (status(world, sid).running, status(world, sid).moved) == (False, 4)


# ---------------------------------------------------------------- affinities, binpack, GPUs


def near(affinity: str, weight: int = 1) -> Placement:
    return Placement(preferences=(PlacementPreference(affinity=affinity, weight=weight),))


def test_tasks_move_to_where_their_affinity_holds() -> None:
    world, sid = lopsided(replicas=4, placement=near("node.labels.disk == ssd"))
    world.label("n3", disk="ssd")
    ask(world, sid)
    world.pass_time(10)
    assert on(world, sid) == {"n3": 4}


def test_tasks_that_avoid_their_own_kind_part() -> None:
    world, sid = lopsided(replicas=3, placement=near("service.name == web", -10))
    ask(world, sid)
    world.pass_time(10)
    assert on(world, sid) == {"n1": 1, "n2": 1, "n3": 1}
    ask(world, sid)
    world.pass_time(10)
    assert status(world, sid).moved == 0


def test_a_task_follows_the_service_that_it_wants_to_be_near() -> None:
    world, sid = lopsided(replicas=1, placement=near("service.name == db"))
    world.set_availability("n1", Availability.PAUSE)
    db = world.create(make_spec(name="db"))
    world.settle()
    ask(world, sid)
    world.settle()
    assert set(on(world, sid)) == set(on(world, db))


def test_a_node_that_a_constraint_on_services_rules_out_is_no_target() -> None:
    placement = Placement(constraints=("service.name != db",))
    world, sid = lopsided(replicas=4, placement=placement)
    world.create(
        make_spec(name="db", placement=Placement(constraints=("node.hostname == n2",))), "s-db"
    )
    world.settle()
    ask(world, sid)
    world.pass_time(10)
    assert on(world, sid) == {"n1": 2, "n3": 2}


def test_what_is_packed_stays_packed() -> None:
    world, sid = lopsided(placement=Placement(strategy="binpack"))
    ask(world, sid)
    world.settle()
    assert on(world, sid) == {"n1": 6}
    assert status(world, sid).message == BALANCED


# ---------------------------------------------------------------- by itself


def automatic(world: World, quiet_s: float = 60) -> None:
    (cluster,) = world.tables.all(Cluster)
    assert cluster.spec is not None
    config = SchedulingConfig(rebalance=RebalanceConfig(quiet_ns=round(quiet_s * SECOND)))
    world.put(structs.replace(cluster, spec=structs.replace(cluster.spec, scheduling=config)))


def test_nothing_moves_by_itself_unless_told_to() -> None:
    world, sid = lopsided()
    world.pass_time(1000, step=100)
    assert on(world, sid) == {"n1": 6}
    assert world.controller.next_wake_ns() is None


def test_after_a_quiet_time_tasks_are_spread_by_themselves() -> None:
    world, sid = lopsided()
    automatic(world)
    world.pass_time(55, step=5)
    assert on(world, sid) == {"n1": 6}
    world.put(make_node("n4"))  # not quiet any more
    world.pass_time(55, step=5)
    assert on(world, sid) == {"n1": 6}
    world.pass_time(10, step=1)
    assert sorted(on(world, sid).values()) == [1, 1, 2, 2]
    assert not status(world, sid).running
    world.pass_time(300, step=10)
    assert world.controller.next_wake_ns() is None, "it comes to rest"


def test_one_service_at_a_time_is_rebalanced_by_itself() -> None:
    world = World(1)
    sids = [world.create(make_spec(name=f"s{i}", replicas=4)) for i in range(3)]
    world.settle()
    world.put(make_node("n2"))
    automatic(world, 10)
    seen = Counter[int]()
    for _ in range(1500):
        world.clock.advance(seconds=0.02)
        if world.controller.has_work(world.clock.now_ns()):
            world.tick()
        world.agents()
        found = [s.rebalance_status for s in world.tables.all(Service)]
        seen[sum(1 for r in found if r is not None and r.running)] += 1
    assert set(seen) == {0, 1}
    assert all(on(world, sid) == {"n1": 2, "n2": 2} for sid in sids)


def test_a_lost_commit_does_not_lose_a_service() -> None:
    world, sid = lopsided()
    automatic(world, 10)
    world.settle()
    world.clock.advance(seconds=11)
    draft = world.draft()
    world.controller.tick(draft)
    world.controller.undo(world.tables)
    world.pass_time(5)
    assert on(world, sid) == {"n1": 2, "n2": 2, "n3": 2}


# ---------------------------------------------------------------- properties


def tiers(world: World, sids: list[str], zones: bool) -> tuple[int, ...]:
    """What is to get smaller, worked out anew: squares per branch, per node, of all tasks."""
    zone_of = {
        n.id: n.spec.labels.get("zone", "") if n.spec else "" for n in world.tables.all(Node)
    }
    branch = node = 0
    load = Counter[str]()
    for sid in sids:
        nodes = on(world, sid)
        load += nodes
        node += sum(n * n for n in nodes.values())
        counts = Counter[str]()
        for node_id, n in nodes.items():
            counts[zone_of[node_id]] += n
        branch += sum(n * n for n in counts.values())
    return (branch if zones else 0, node, sum(n * n for n in load.values()))


@settings(max_examples=60, deadline=None)
@given(
    start=st.lists(st.sampled_from("abc"), min_size=1, max_size=3),
    later=st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
    replicas=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    zones=st.booleans(),
    small=st.booleans(),
)
def test_a_rebalance_ends_no_move_makes_it_worse_and_the_next_one_moves_nothing(
    start: list[str], later: list[str], replicas: list[int], zones: bool, small: bool
) -> None:
    world = World(0)
    for i, zone in enumerate(start, 1):
        world.put(make_node(f"n{i}", labels={"zone": zone}, cpu=32 * CPU, memory=64 * GIB))
    placement = spread("zone") if zones else None
    sids = [
        world.create(make_spec(name=f"s{i}", replicas=n, cpu=CPU, placement=placement))
        for i, n in enumerate(replicas)
    ]
    world.settle()
    for i, zone in enumerate(later, len(start) + 1):
        cpu = 2 * CPU if small and i % 2 else 32 * CPU
        world.put(make_node(f"n{i}", labels={"zone": zone}, cpu=cpu))
    before = tiers(world, sids, zones)
    for sid in sids:
        planned = plan_moves(
            world.tables, world.controller.table, (sid,), now_ns=world.clock.now_ns()
        )
        world.controller.table.check_invariants(world.tables)
        ask(world, sid)
        world.pass_time(10)
        assert not status(world, sid).running
        assert status(world, sid).moved == len(planned)
        assert len(world.running(sid)) == len(world.live(sid))
        after = tiers(world, sids, zones)
        assert after <= before
        assert after < before or not planned
        before = after
        again = plan_moves(
            world.tables, world.controller.table, (sid,), now_ns=world.clock.now_ns()
        )
        assert not again
        world.controller.check_invariants(world.tables)
