"""The node table and its sleepers at random, against plain ways of working them out."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.scheduler import (
    Group,
    account,
    place,
    rejection,
    requirement_of,
)
from manager.scheduler.sleeping import Sleepers
from manager.store import Draft, Tables
from swarm.gpus import WHOLE
from swarm.v1 import (
    Availability,
    GenericResource,
    Kind,
    Node,
    PortConfig,
    Service,
    Task,
    TaskState,
)
from tests.unit.control.world import CPU, GIB, make_node
from tests.unit.scheduler.case import (
    NOW,
    Bench,
    affinity,
    gpu,
    gpu_node,
    spec,
    spread,
)

# ---------------------------------------------------------------- properties

PORT = PortConfig(target_port=80, published_port=80, publish_mode="host")
SPECS = st.fixed_dictionaries(
    {},
    optional={
        "cpu_nano": st.sampled_from([CPU // 2, CPU]),
        "memory_bytes": st.sampled_from([GIB, 3 * GIB]),
        "pids": st.just(10),
        "generic": st.sampled_from(
            [
                (GenericResource(kind="k", count=1),),
                (GenericResource(kind="gpu", count=1),),
            ]
        ),
        "devices": st.sampled_from(
            [
                (gpu(),),
                (gpu(2),),
                (gpu(-1),),
                (gpu(ids=("1",)),),
                (gpu(fraction="0.3", memory="15GiB"),),
                (gpu(fraction="0.5"),),
                (gpu(model="A100"),),
            ]
        ),
        "constraints": st.sampled_from(
            [
                ("node.labels.zone == a",),
                ("service.name != s0",),
                ("service.name == s1",),
                ("node.labels.zone in (a, b)", "service.name != s1"),
            ]
        ),
        "preferences": st.sampled_from(
            [
                (spread("node.labels.zone"),),
                (affinity("node.labels.zone == b", 3),),
                (affinity("service.name == s0", -2), spread("node.labels.zone")),
            ]
        ),
        "strategy": st.sampled_from(["spread", "binpack"]),
        "max_replicas": st.integers(1, 3),
        "ports": st.just((PORT,)),
    },
)


@st.composite
def some_nodes(draw: st.DrawFn) -> list[Node]:
    out = []
    for i in range(draw(st.integers(1, 5))):
        generic: tuple[GenericResource, ...] = ()
        if draw(st.booleans()):
            generic = (GenericResource(kind="k", count=2),)
        if draw(st.integers(0, 4)) == 0:
            generic = (*generic, GenericResource(kind="gpu", count=1))
        out.append(
            gpu_node(
                f"n{i}",
                draw(st.integers(0, 4)),
                model=draw(st.sampled_from(["NVIDIA A100-SXM4-40GB", "T4"])),
                cpu=draw(st.integers(0, 4)) * CPU,
                memory=draw(st.integers(1, 8)) * GIB,
                labels={"zone": draw(st.sampled_from("abc"))},
                availability=draw(
                    st.sampled_from([Availability.ACTIVE] * 4 + [Availability.DRAIN])
                ),
                generic=generic,
                peers={0: (1,), 1: (0,)} if draw(st.booleans()) else {},
            )
        )
    return out


def check_nothing_is_oversubscribed(tables: Tables) -> None:
    """Counted from the tasks alone."""
    used: dict[str, Counter[Any]] = defaultdict(Counter)
    for task in tables.all(Task):
        if not task.node_id or task.status is None or task.status.state != TaskState.ASSIGNED:
            continue
        service = tables.get(Service, task.service_id)
        assert service is not None
        need = requirement_of(service.spec)
        here = used[task.node_id]
        here["cpu"] += need.cpu
        here["memory"] += need.memory
        for g in task.assigned_generic:
            here["generic", g.kind] += g.count or 1
        for uuid in task.assigned_gpus:
            assert need.gpus is not None
            here["share", uuid] += need.gpus.share
            if need.gpus.shared:
                here["bytes", uuid] += need.gpus.memory_bytes
        for port in need.host_ports:
            here["port", port] += 1
        if need.max_replicas and task.desired_state == TaskState.RUNNING:
            here["of", task.service_id, need.max_replicas] += 1
    for node_id, here in used.items():
        node = tables.get(Node, node_id)
        assert node is not None and node.description is not None
        resources = node.description.resources
        assert resources is not None
        assert here["cpu"] <= resources.cpu_nano and here["memory"] <= resources.memory_bytes
        totals = Counter({g.kind: g.count or 1 for g in resources.generic})
        for key, amount in here.items():
            if not isinstance(key, tuple):
                continue
            match key[0]:
                case "generic":
                    assert amount <= totals[key[1]]
                case "share":
                    assert amount <= WHOLE and any(g.uuid == key[1] for g in node.description.gpus)
                case "bytes":
                    assert amount <= 40 * GIB
                case "port":
                    assert amount == 1
                case "of":
                    assert amount <= key[2]


@settings(max_examples=150, deadline=None)
@given(some_nodes(), st.lists(SPECS, min_size=1, max_size=3), st.data())
def test_whatever_comes_and_goes_the_table_is_right(
    nodes: list[Node], wanted: list[dict[str, Any]], data: st.DataObject
) -> None:
    specs = [spec(f"s{i}", **more) for i, more in enumerate(wanted)]
    bench = Bench(nodes, *specs)
    names = st.sampled_from([s.name for s in specs])
    by_id = {n.id: n for n in nodes}
    for _ in range(data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["place", "place", "end", "stop", "node", "gone"])):
            case "place":
                name = data.draw(names)
                count = data.draw(st.integers(1, 5))
                placed = bench.place(name, count)
                result = account(bench.table, bench.need(name), name)
                fell = sum(f.nodes for f in result.filters)
                assert fell + result.nodes_fit == result.nodes_total == len(bench.table.nodes)
                if len(placed) < count:
                    assert result.nodes_fit == 0
            case "end" | "stop" as what:
                tasks = sorted(bench.tables.all(Task), key=lambda t: t.id)
                if tasks and (task := data.draw(st.sampled_from(tasks))):
                    if what == "end":
                        bench.end(task)
                    else:
                        stopped = structs.replace(task, desired_state=TaskState.SHUTDOWN)
                        bench.change((Kind.TASK, task.id, stopped))
            case "node":
                node = by_id[data.draw(st.sampled_from(sorted(by_id)))]
                assert node.spec is not None
                spec_ = structs.replace(
                    node.spec,
                    labels={"zone": data.draw(st.sampled_from("abc"))},
                    availability=data.draw(
                        st.sampled_from([Availability.ACTIVE, Availability.PAUSE])
                    ),
                )
                by_id[node.id] = structs.replace(node, spec=spec_)
                bench.change((Kind.NODE, node.id, by_id[node.id]))
            case "gone":
                node_id = data.draw(st.sampled_from(sorted(by_id)))
                if bench.tables.get(Node, node_id) and not bench.tables.by(Task, "node", node_id):
                    bench.change((Kind.NODE, node_id, None))
        bench.table.check_invariants(bench.tables)
        check_nothing_is_oversubscribed(bench.tables)


@settings(max_examples=100, deadline=None)
@given(
    some_nodes(),
    st.lists(st.tuples(SPECS, st.integers(1, 6)), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_the_order_of_nodes_makes_no_difference(
    nodes: list[Node], wanted: list[tuple[dict[str, Any], int]], shuffle: random.Random
) -> None:
    specs = [spec(f"s{i}", **more) for i, (more, _) in enumerate(wanted)]
    mixed = list(nodes)
    shuffle.shuffle(mixed)
    one, other = Bench(nodes, *specs), Bench(mixed, *specs)
    # Rows that were used before.
    for node in mixed:
        other.change((Kind.NODE, node.id, None))
    shuffle.shuffle(mixed)
    other.change(*((Kind.NODE, n.id, n) for n in mixed))
    for i, (_, count) in enumerate(wanted):
        mine, theirs = one.place(f"s{i}", count), other.place(f"s{i}", count)
        assert [(t.node_id, t.assigned_gpus) for t in mine] == [
            (t.node_id, t.assigned_gpus) for t in theirs
        ]
        assert account(one.table, one.need(f"s{i}"), f"s{i}") == account(
            other.table, other.need(f"s{i}"), f"s{i}"
        )


@settings(max_examples=150, deadline=None)
@given(some_nodes(), SPECS)
def test_the_account_says_of_each_node_what_one_look_at_it_says(
    nodes: list[Node], more: dict[str, Any]
) -> None:
    more.pop("preferences", None)
    bench = Bench(nodes, spec("s0", **more), spec("s1"))
    bench.place("s1", 2)
    bench.place("s0", 2)
    need = bench.need("s0")
    found: Counter[tuple[str, str]] = Counter()
    for info in bench.table.nodes.values():
        why = rejection(info, need, "s0")
        if why is not None:
            found[why.filter, why.detail] += 1
        else:
            off = [c for c in need.among if not bench.table.may_join(info, c, "s0")]
            if off:
                found["affinity", off[0].text] += 1
    result = account(bench.table, need, "s0")
    assert {(f.filter, f.detail): f.nodes for f in result.filters} == found
    assert all(0 <= f.never_nodes <= f.nodes for f in result.filters)


# ---------------------------------------------------------------- sleepers


def asleep(bench: Bench, sleepers: Sleepers, service: str, order: int, tasks: int = 1) -> None:
    sleepers.sleep(
        (service, 1, ""),
        bench.need(service),
        terms=None,
        order=order,
        tasks=tasks,
        told=bench.table.changes,
    )
    sleepers.check_invariants()


def test_a_change_wakes_only_whom_it_could_help_and_no_more_than_fit() -> None:
    specs = [spec(f"s{i}", cpu_nano=2 * CPU) for i in range(4)]
    other = spec("far", cpu_nano=CPU, constraints=("node.labels.zone == b",))
    bench = Bench([make_node("n", cpu=0), make_node("m", cpu=0)], *specs, other)
    sleepers = Sleepers(bench.table)
    for i in (3, 1, 2, 0):
        asleep(bench, sleepers, f"s{i}", i)
    asleep(bench, sleepers, "far", 9)
    assert sleepers.wake().keys == []
    bench.change((Kind.NODE, "n", make_node("n", cpu=4 * CPU)))
    sleepers.stir("n")
    woken = sleepers.wake()
    assert woken.keys == [("s0", 1, ""), ("s1", 1, "")]
    # Both found a place: the others may look at what is left.
    for key in woken.keys:
        sleepers.forget(key)
        bench.place(key[0])
    sleepers.settle(woken, [])
    assert sleepers.stirred
    again = sleepers.wake()
    assert again.keys == []
    sleepers.settle(again, [])
    assert not sleepers.stirred
    assert len(sleepers) == 3


def test_who_stays_stuck_lets_its_bed_sleep() -> None:
    bench = Bench([make_node("n", cpu=CPU)], spec("a", cpu_nano=CPU), spec("b", cpu_nano=CPU))
    sleepers = Sleepers(bench.table)
    asleep(bench, sleepers, "a", 1)
    asleep(bench, sleepers, "b", 2)
    sleepers.stir("n")
    woken = sleepers.wake()
    assert woken.keys == [("a", 1, "")]
    asleep(bench, sleepers, "a", 1)
    sleepers.settle(woken, [("a", 1, "")])
    assert not sleepers.stirred


def test_tasks_of_a_service_wake_those_with_a_condition_on_it() -> None:
    bench = Bench([make_node("n")], spec("db"), spec("near", constraints=("service.name == db",)))
    sleepers = Sleepers(bench.table)
    asleep(bench, sleepers, "near", 1)
    sleepers.stir("n")
    sleepers.settle(sleepers.wake(), [("near", 1, "")])
    bench.place("db")
    sleepers.stir_service("db")
    assert sleepers.wake().keys == [("near", 1, "")]


@settings(max_examples=100, deadline=None)
@given(some_nodes(), st.lists(SPECS, min_size=1, max_size=4), st.data())
def test_whoever_fits_after_a_change_is_woken(
    nodes: list[Node], wanted: list[dict[str, Any]], data: st.DataObject
) -> None:
    specs = [spec(f"s{i}", **more) for i, more in enumerate(wanted)]
    bench = Bench(nodes, *specs)
    sleepers = Sleepers(bench.table)
    held = [t for s in specs for t in bench.place(s.name, 4)]
    for i, s in enumerate(specs):
        if not account(bench.table, bench.need(s.name), s.name).nodes_fit:
            asleep(bench, sleepers, s.name, i)
    if held:
        task = data.draw(st.sampled_from(held))
        bench.end(task)
        sleepers.stir(task.node_id)
        sleepers.stir_service(task.service_id)
    woken = {key[0] for key in sleepers.wake().keys}
    alike = [bench.need(name) for name in woken]
    for s in specs:
        if (s.name, 1, "") in sleepers and bench.need(s.name) not in alike:
            assert not account(bench.table, bench.need(s.name), s.name).nodes_fit


def test_a_draft_places_as_the_tables_do() -> None:
    bench = Bench([make_node("n1"), make_node("n2")], spec(cpu_nano=CPU))
    draft = Draft(bench.tables, now_ns=NOW)
    group = Group("web", 1, bench.need("web"), bench.new("web", 3))
    placed = place(bench.table, group, draft, NOW).placed
    assert [t.node_id for t in placed] == ["n1", "n2", "n1"]
    for task in placed:
        bench.table.sync_task(task.id, None, draft)
    bench.table.check_invariants(bench.tables)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_many_at_once_are_placed_as_one_by_one(count: int) -> None:
    nodes = [make_node(f"n{i}", cpu=(i + 1) * CPU, memory=GIB * (9 - i)) for i in range(6)]
    specs = (spec(cpu_nano=CPU // 2, memory_bytes=GIB // 2), spec("other", cpu_nano=CPU))
    together, single = Bench(nodes, *specs), Bench(nodes, *specs)
    for bench in (together, single):
        bench.place("other", 3)
    one_by_one = [node for _ in range(count) for node in single.nodes_of("web")]
    assert together.nodes_of("web", count) == one_by_one
