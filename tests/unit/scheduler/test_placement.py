"""Filters, spread and accounts, on tables made by hand and at random."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.scheduler import (
    FAILURES_MAX,
    FILTERS,
    Group,
    NodeInfo,
    NodeTable,
    account,
    explain,
    place,
    reason,
    rejection,
    requirement_of,
)
from manager.store import Draft, Tables
from swarm.clock import SECOND_NS
from swarm.v1 import (
    Availability,
    ContainerSpec,
    DeviceRequest,
    EndpointSpec,
    GenericResource,
    Gpu,
    Kind,
    Meta,
    Node,
    NodeState,
    NodeStatus,
    Placement,
    PlacementPreference,
    Platform,
    PortConfig,
    ResourceRequirements,
    Resources,
    Service,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)
from tests.unit.control.world import CPU, GIB, make_node

NOW = 1_700_000_000 * SECOND_NS


def spec(
    *,
    image: str = "web",
    runtime: str = "",
    constraints: tuple[str, ...] = (),
    spreads: tuple[str, ...] = (),
    platforms: tuple[Platform, ...] = (),
    max_replicas: int = 0,
    ports: tuple[PortConfig, ...] = (),
    **reserved: Any,
) -> ServiceSpec:
    return ServiceSpec(
        name="web",
        task=TaskSpec(
            container=ContainerSpec(image=image),
            resources=ResourceRequirements(reservations=Resources(**reserved)),
            placement=Placement(
                constraints=constraints,
                preferences=tuple(PlacementPreference(spread=s) for s in spreads),
                platforms=platforms,
                max_replicas=max_replicas,
            ),
            runtime=runtime,
        ),
        endpoint=EndpointSpec(ports=ports),
    )


class Case:
    """A table with nodes, one service, and some tasks of it placed."""

    def __init__(self, nodes: list[Node], of: ServiceSpec, service_id: str = "s1") -> None:
        self.tables = Tables()
        self.service_id = service_id
        rows: list[Any] = [(Kind.NODE, n.id, n) for n in nodes]
        service = Service(id=service_id, spec=of, spec_version=1)
        revision = ServiceRevision(
            id=f"{service_id}.1", service_id=service_id, spec_version=1, spec=of
        )
        rows += [
            (Kind.SERVICE, service_id, service),
            (Kind.SERVICE_REVISION, revision.id, revision),
        ]
        self.tables.apply(1, rows)
        self.table = NodeTable.build(self.tables)
        self.need = requirement_of(of)
        self._count = 0

    def new(self, count: int) -> list[Task]:
        out = []
        for _ in range(count):
            self._count += 1
            out.append(
                Task(
                    id=f"t{self._count:05}",
                    service_id=self.service_id,
                    spec_version=1,
                    slot=self._count,
                    desired_state=TaskState.RUNNING,
                    status=TaskStatus(state=TaskState.PENDING),
                )
            )
        return out

    def place(self, count: int, **group: Any) -> tuple[list[str], int]:
        """Node ids in order, and how many tasks found none."""
        result = place(
            self.table,
            Group(
                service_id=self.service_id,
                spec_version=1,
                requirement=self.need,
                tasks=self.new(count),
                **group,
            ),
            self.tables,
            NOW,
        )
        rows = [(Kind.TASK, t.id, t) for t in result.placed]
        self.tables.apply(self.tables.revision + 1, rows)
        self.table.check_invariants(self.tables)
        self.placed = result.placed
        return [t.node_id for t in result.placed], len(result.left)

    def why(self) -> str:
        return reason(account(self.table, self.need, self.service_id))


def with_state(node: Node, state: NodeState) -> Node:
    return structs.replace(node, status=NodeStatus(state=state))


HOST_80 = PortConfig(target_port=80, published_port=80, publish_mode="host")
GPU_NODE = make_node(
    "gpu",
    gpus=(
        Gpu(uuid="G0", index=0, healthy=True),
        Gpu(uuid="G1", index=1, healthy=True),
        Gpu(uuid="G2", index=2, healthy=False),
    ),
)


def gpus(**request: Any) -> dict[str, Any]:
    return {"devices": (DeviceRequest(capabilities=("gpu",), **request),)}


# ---------------------------------------------------------------- one filter each


@pytest.mark.parametrize(
    ("node", "of", "kind", "detail", "message"),
    [
        (with_state(make_node("n"), NodeState.DOWN), spec(), "ready", "down", "1 node down"),
        (
            with_state(make_node("n"), NodeState.UNKNOWN),
            spec(),
            "ready",
            "unknown",
            "1 node not seen yet",
        ),
        (
            make_node("n", availability=Availability.DRAIN),
            spec(),
            "availability",
            "drain",
            "1 node drained",
        ),
        (
            make_node("n", availability=Availability.PAUSE),
            spec(),
            "availability",
            "pause",
            "1 node paused",
        ),
        (make_node("n", revoked=True), spec(), "revoked", "", "1 node removed from the cluster"),
        (
            make_node("n"),
            spec(constraints=("node.role == manager",)),
            "constraint",
            "node.role == manager",
            "1 node does not satisfy node.role == manager",
        ),
        (
            make_node("n"),
            spec(constraints=("nonsense",)),
            "constraint",
            "nonsense",
            "1 node does not satisfy nonsense",
        ),
        (
            make_node("n"),
            spec(platforms=(Platform(os="linux", architecture="aarch64"),)),
            "platform",
            "linux/arm64",
            "1 node of another platform than linux/arm64",
        ),
        (
            make_node("n", runtimes=("process",)),
            spec(),
            "runtime",
            "",
            "1 node without a container engine",
        ),
        (
            make_node("n"),
            spec(runtime="nvidia"),
            "runtime",
            "nvidia",
            "1 node without runtime nvidia",
        ),
        (
            make_node("n", cpu=CPU),
            spec(cpu_nano=3 * CPU // 2),
            "resources",
            "cpu",
            "1 of 1 node short of CPU: need 1.5, best free 1 on n",
        ),
        (
            make_node("n", memory=GIB // 2),
            spec(memory_bytes=GIB),
            "resources",
            "memory",
            "1 of 1 node short of memory: need 1 GiB, best free 512 MiB on n",
        ),
        (
            make_node("n"),
            spec(generic=(GenericResource(kind="fpga", count=2),)),
            "resources",
            "fpga",
            "1 of 1 node short of fpga: need 2, best free 0 on n",
        ),
        (
            make_node("n"),
            spec(**gpus(count=1)),
            "resources",
            "gpu",
            "1 of 1 node short of GPUs: need 1, best free 0 on n",
        ),
        (
            GPU_NODE,
            spec(**gpus(count=3)),
            "resources",
            "gpu",
            "1 of 1 node short of GPUs: need 3, best free 2 on gpu",
        ),
        (
            GPU_NODE,
            spec(**gpus(device_ids=("2",))),
            "resources",
            "gpu 2",
            "1 of 1 node without gpu 2 free",
        ),
        (
            make_node("n"),
            spec(devices=(DeviceRequest(capabilities=("tpu",)),)),
            "resources",
            "device tpu",
            "1 of 1 node without a device tpu; nodes offer GPUs only",
        ),
    ],
)
def test_each_filter_rejects_and_says_why(
    node: Node, of: ServiceSpec, kind: str, detail: str, message: str
) -> None:
    case = Case([node], of)
    assert case.place(1) == ([], 1)
    result = account(case.table, case.need, "s1")
    (found,) = result.filters
    assert (found.filter, found.detail, found.nodes, found.message) == (kind, detail, 1, message)
    assert reason(result) == f"no suitable node ({message})"


def test_an_empty_cluster_says_so() -> None:
    assert Case([], spec()).why() == "no suitable node (the cluster has no nodes)"


def test_the_reason_names_amounts_first() -> None:
    nodes = [
        make_node("n1", memory=GIB // 4),
        make_node("n2", memory=GIB // 8),
        make_node("n3", availability=Availability.DRAIN),
    ]
    assert Case(nodes, spec(memory_bytes=GIB // 2)).why() == (
        "no suitable node (2 of 3 nodes short of memory: need 512 MiB, best free 256 MiB on n1, "
        "not even if empty; 1 node drained)"
    )


def test_host_ports_go_to_one_task_a_node() -> None:
    case = Case([make_node("n1"), make_node("n2")], spec(ports=(HOST_80,)))
    assert case.place(3) == (["n1", "n2"], 1)
    assert case.why() == "no suitable node (2 nodes have host port 80/tcp taken)"


def test_host_ports_on_different_addresses_or_protocols_do_not_clash() -> None:
    def port(**changes: Any) -> PortConfig:
        return structs.replace(HOST_80, **changes)

    base = Case([make_node("n1")], spec(ports=(port(host_ip="10.0.0.1"),)))
    base.place(1)
    for changes, clash in (
        ({"host_ip": "10.0.0.2"}, False),
        ({"host_ip": "10.0.0.1"}, True),
        ({}, True),
        ({"protocol": "udp"}, False),
    ):
        need = requirement_of(spec(ports=(port(**changes),)))
        found = account(base.table, need, "other")
        assert (found.nodes_fit == 0) is clash, changes


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param({"pids": (1 << 63) - 1}, id="processes"),
        pytest.param({"max_replicas": (1 << 64) - 1}, id="max_replicas"),
    ],
)
def test_numbers_beyond_all_nodes_stop_nobody(wanted: dict[str, int]) -> None:
    resources = ResourceRequirements(reservations=Resources(pids=wanted.get("pids", 0)))
    placement = Placement(max_replicas=wanted.get("max_replicas", 0))
    need = requirement_of(ServiceSpec(task=TaskSpec(resources=resources, placement=placement)))
    table = NodeTable()
    table.sync_node("n1", make_node("n1"))
    assert table.columns.room(need, np.array([0]), 3).tolist() == [3]
    assert need.max_replicas < 1 << 62


def test_a_node_with_more_of_a_kind_than_can_be_counted_is_one_with_much() -> None:
    node = make_node("n1")
    assert node.description is not None
    most = GenericResource(kind="disk", count=(1 << 63) - 1)
    resources = Resources(generic=(most, most))
    table = NodeTable()
    table.sync_node(
        "n1",
        structs.replace(node, description=structs.replace(node.description, resources=resources)),
    )
    assert table.columns.generic("disk").tolist() == [1 << 62]


def test_max_replicas_per_node() -> None:
    case = Case([make_node("n1"), make_node("n2")], spec(max_replicas=2))
    nodes, left = case.place(5)
    assert (Counter(nodes), left) == ({"n1": 2, "n2": 2}, 1)
    assert case.why() == (
        "no suitable node (2 nodes run the service's 2 replicas per node already)"
    )


@pytest.mark.parametrize(
    ("runtime", "image", "offers", "fits"),
    [
        ("", "web", ("docker",), True),
        ("", "web", ("runc", "process"), True),
        ("", "", ("process",), True),
        ("", "", (), False),
        ("process", "", ("process",), True),
        ("process", "", ("docker",), False),
        ("runsc", "web", ("docker", "runsc"), True),
    ],
)
def test_runtime(runtime: str, image: str, offers: tuple[str, ...], fits: bool) -> None:
    case = Case([make_node("n", runtimes=offers)], spec(runtime=runtime, image=image))
    assert (case.place(1)[1] == 0) is fits


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (Platform(os="linux", architecture="amd64"), True),
        (Platform(os="linux", architecture="x86_64"), True),
        (Platform(os="Linux"), True),
        (Platform(architecture="amd64"), True),
        (Platform(os="windows"), False),
        (Platform(os="linux", architecture="arm64"), False),
    ],
)
def test_platform(wanted: Platform, fits: bool) -> None:
    case = Case([make_node("n")], spec(platforms=(wanted,)))
    assert (case.place(1)[1] == 0) is fits


# ---------------------------------------------------------------- claims


def test_named_and_counted_generic_resources_are_assigned() -> None:
    node = make_node(
        "n",
        generic=(
            GenericResource(kind="ssd", name="s1"),
            GenericResource(kind="ssd", name="s2"),
            GenericResource(kind="lic", count=3),
        ),
    )
    of = spec(generic=(GenericResource(kind="ssd", count=1), GenericResource(kind="lic", count=1)))
    case = Case([node], of)
    assert case.place(3) == (["n", "n"], 1)
    assert [t.assigned_generic for t in case.placed] == [
        (GenericResource(kind="lic", count=1), GenericResource(kind="ssd", name=name))
        for name in ("s1", "s2")
    ]


@pytest.mark.parametrize(
    ("request_", "assigned"),
    [
        ({"count": 1}, [("G0",), ("G1",)]),
        ({}, [("G0",), ("G1",)]),
        ({"count": 2}, [("G0", "G1")]),
        ({"count": -1}, [("G0", "G1")]),
        ({"device_ids": ("1",)}, [("G1",)]),
        ({"device_ids": ("G0", "G1")}, [("G0", "G1")]),
    ],
)
def test_gpus_are_claimed_exactly_and_never_twice(
    request_: dict[str, Any], assigned: list[tuple[str, ...]]
) -> None:
    case = Case([GPU_NODE], spec(**gpus(**request_)))
    _, left = case.place(3)
    assert [t.assigned_gpus for t in case.placed] == assigned
    assert left == 3 - len(assigned)


def test_a_gpu_split_into_instances_is_not_given_as_a_whole() -> None:
    node = make_node(
        "n",
        gpus=(
            Gpu(uuid="G0", healthy=True),
            Gpu(uuid="M0", parent_uuid="G0", healthy=True),
            Gpu(uuid="M1", parent_uuid="G0", healthy=True),
        ),
    )
    case = Case([node], spec(**gpus(count=1)))
    case.place(3)
    assert [t.assigned_gpus for t in case.placed] == [("M0",), ("M1",)]


def test_a_task_holds_its_claim_until_it_has_ended() -> None:
    case = Case([make_node("n", cpu=CPU)], spec(cpu_nano=CPU))
    case.place(1)
    (task,) = case.placed
    stopping = structs.replace(task, desired_state=TaskState.SHUTDOWN)
    case.tables.apply(case.tables.revision + 1, [(Kind.TASK, stopping.id, stopping)])
    case.table.sync_task(task.id, stopping, case.tables)
    assert case.place(1)[1] == 1
    ended = structs.replace(stopping, status=TaskStatus(state=TaskState.SHUTDOWN))
    case.tables.apply(case.tables.revision + 1, [(Kind.TASK, ended.id, ended)])
    case.table.sync_task(task.id, ended, case.tables)
    assert case.place(1) == (["n"], 0)


# ---------------------------------------------------------------- spread


def test_fewest_tasks_of_the_service_first_then_fewest_tasks_then_id() -> None:
    case = Case([make_node(f"n{i}") for i in (3, 1, 2)], spec())
    assert case.place(6)[0] == ["n1", "n2", "n3", "n1", "n2", "n3"]


def test_full_nodes_are_passed_over() -> None:
    case = Case([make_node("n1", cpu=CPU), make_node("n2", cpu=3 * CPU)], spec(cpu_nano=CPU))
    nodes, left = case.place(6)
    assert (Counter(nodes), left) == ({"n1": 1, "n2": 3}, 2)


def test_spread_preferences_even_out_the_branches_first() -> None:
    nodes = [make_node("a1", labels={"zone": "a"})]
    nodes += [make_node(f"b{i}", labels={"zone": "b"}) for i in range(3)]
    case = Case(nodes, spec(spreads=("node.labels.zone",)))
    assert Counter(n[0] for n in case.place(8)[0]) == {"a": 4, "b": 4}


def test_spread_preferences_nest() -> None:
    nodes = [
        make_node(f"{zone}{rack}{i}", labels={"zone": zone, "rack": rack})
        for zone, racks in (("a", "xyz"), ("b", "x"))
        for rack in racks
        for i in range(2)
    ]
    case = Case(nodes, spec(spreads=("node.labels.zone", "node.labels.rack")))
    placed, _ = case.place(12)
    assert Counter(n[:2] for n in placed) == {"ax": 2, "ay": 2, "az": 2, "bx": 6}


def test_a_full_branch_leaves_the_rest_to_the_others() -> None:
    nodes = [
        make_node("a", cpu=CPU, labels={"zone": "a"}),
        make_node("b", cpu=9 * CPU, labels={"zone": "b"}),
    ]
    case = Case(nodes, spec(cpu_nano=CPU, spreads=("node.labels.zone",)))
    assert Counter(case.place(5)[0]) == {"a": 1, "b": 4}


def test_a_node_where_the_service_keeps_failing_comes_last() -> None:
    case = Case([make_node("n1"), make_node("n2")], spec())
    for i in range(5):
        failed = Task(
            id=f"f{i}",
            meta=Meta(updated_at_ns=NOW - 10 * SECOND_NS),
            service_id="s1",
            spec_version=1,
            node_id="n1",
            desired_state=TaskState.SHUTDOWN,
            status=TaskStatus(state=TaskState.FAILED),
        )
        (change,) = case.tables.apply(2 + i, [(Kind.TASK, failed.id, failed)])
        case.table.apply(change, case.tables)
    assert case.place(4)[0] == ["n2"] * 4
    fresh = NodeTable.build(case.tables)
    assert fresh.nodes["n1"].recent_failures(("s1", 1), NOW) == 5
    assert fresh.nodes["n1"].recent_failures(("s1", 1), NOW + 300 * SECOND_NS) == 0


def test_a_group_bound_to_a_node_goes_nowhere_else() -> None:
    case = Case([make_node("n1"), make_node("n2", cpu=0)], spec(cpu_nano=CPU))
    assert case.place(1, node_id="n2") == ([], 1)
    assert case.place(1, node_id="n1") == (["n1"], 0)


# ---------------------------------------------------------------- explanation


def test_never_means_not_even_on_an_empty_node() -> None:
    big = Case([make_node("n", cpu=CPU)], spec(cpu_nano=2 * CPU))
    full = Case([make_node("n", cpu=CPU)], spec(cpu_nano=CPU))
    full.place(1)
    down = Case([with_state(make_node("n"), NodeState.DOWN)], spec())
    assert account(big.table, big.need, "s1").never
    assert not account(full.table, full.need, "s1").never
    assert not account(down.table, down.need, "s1").never


def test_explain_answers_for_waiting_placed_and_ended_tasks() -> None:
    case = Case([make_node("n1", cpu=CPU), make_node("n2", cpu=0)], spec(cpu_nano=CPU))
    case.place(1)
    (placed,) = case.placed
    answer = explain(NodeTable.build(case.tables), case.tables, placed)
    assert answer.summary == "task web.1 is on node n1: assigned"
    assert (answer.nodes_total, answer.nodes_fit) == (2, 1), "its own claim is not in its way"
    (waiting,) = case.new(1)
    answer = explain(NodeTable.build(case.tables), case.tables, waiting)
    assert answer.summary.startswith(
        "task web.2 waits: no suitable node (2 of 2 nodes short of CPU"
    )
    assert answer.hint == "lower reservations of cpu, free some, or add a node"
    ended = structs.replace(placed, status=TaskStatus(state=TaskState.FAILED, err="exit code 1"))
    assert (
        explain(NodeTable.build(case.tables), case.tables, ended).summary
        == "task web.1 has ended: failed (exit code 1)"
    )


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Node], ServiceSpec, int]:
    count = draw(st.integers(0, 6))
    nodes = [
        structs.replace(
            make_node(
                f"n{i}",
                cpu=draw(st.integers(0, 4)) * CPU,
                memory=draw(st.integers(0, 4)) * GIB,
                labels={"zone": draw(st.sampled_from("ab"))},
                availability=draw(st.sampled_from(list(Availability)[1:])),
                generic=(GenericResource(kind="k", count=draw(st.integers(0, 2))),),
            ),
            status=NodeStatus(state=draw(st.sampled_from([NodeState.READY, NodeState.DOWN]))),
        )
        for i in range(count)
    ]
    of = spec(
        cpu_nano=draw(st.integers(0, 2)) * CPU,
        memory_bytes=draw(st.integers(0, 2)) * GIB,
        generic=draw(st.sampled_from([(), (GenericResource(kind="k", count=1),)])),
        constraints=draw(st.sampled_from([(), ("node.labels.zone == a",)])),
        spreads=draw(st.sampled_from([(), ("node.labels.zone",)])),
        max_replicas=draw(st.integers(0, 3)),
        ports=draw(st.sampled_from([(), (HOST_80,)])),
    )
    return nodes, of, draw(st.integers(0, 12))


@settings(max_examples=200, deadline=None)
@given(clusters(), st.randoms(use_true_random=False))
def test_no_dimension_is_exceeded_the_account_adds_up_and_order_does_not_matter(
    cluster: tuple[list[Node], ServiceSpec, int], shuffle: random.Random
) -> None:
    nodes, of, count = cluster
    case = Case(nodes, of)
    placed, left = case.place(count)
    for info in case.table.nodes.values():
        assert info.cpu_used <= info.cpu_total
        assert info.memory_used <= info.memory_total
        assert all(used <= info.generic_total[kind] for kind, used in info.generic_used.items())
        assert all(used == 1 for used in info.ports.values())
        assert not case.need.max_replicas or info.active <= case.need.max_replicas
    result = account(case.table, case.need, "s1")
    assert result.nodes_fit + sum(f.nodes for f in result.filters) == len(nodes)
    assert [f.filter for f in result.filters] == sorted(
        (f.filter for f in result.filters), key=FILTERS.index
    )
    if left:
        assert result.nodes_fit == 0, "what was left out fits nowhere"
    else:
        assert len(placed) == count
    mixed = list(nodes)
    shuffle.shuffle(mixed)
    assert Case(mixed, of).place(count) == (placed, left)


@settings(max_examples=200, deadline=None)
@given(clusters(), st.lists(st.integers(0, 3), max_size=6), st.data())
def test_each_task_goes_to_the_first_node_by_rank_however_few_or_many_come_at_a_time(
    cluster: tuple[list[Node], ServiceSpec, int], groups: list[int], data: st.DataObject
) -> None:
    nodes, of, _ = cluster
    assert of.task is not None and of.task.placement is not None
    of = structs.replace(
        of,
        task=structs.replace(of.task, placement=structs.replace(of.task.placement, preferences=())),
    )
    case, oracle = Case(nodes, of), Case(nodes, of)
    for count in groups:
        others: bool = data.draw(st.booleans())
        if nodes and others:
            # Something else comes, or fails there.
            where = data.draw(st.sampled_from([n.id for n in nodes]))
            state = data.draw(st.sampled_from([TaskState.RUNNING, TaskState.FAILED]))
            for one in (case, oracle):
                other = f"other{one.tables.revision}"
                task = Task(
                    id=other,
                    service_id="s1" if state == TaskState.FAILED else "s2",
                    spec_version=1,
                    node_id=where,
                    meta=Meta(updated_at_ns=NOW),
                    desired_state=TaskState.RUNNING,
                    status=TaskStatus(state=state),
                )
                for change in one.tables.apply(one.tables.revision + 1, [(Kind.TASK, other, task)]):
                    one.table.apply(change, one.tables)
        expected = []
        for _ in range(count):
            fitting = [
                info
                for info in oracle.table.nodes.values()
                if rejection(info, oracle.need, "s1") is None
            ]
            if fitting:
                best = min(fitting, key=rank).id
                assert oracle.place(1, node_id=best) == ([best], 0)
                expected.append(best)
        assert case.place(count) == (expected, count - len(expected))


def rank(info: NodeInfo) -> tuple[Any, ...]:
    """The order that placement.py states."""
    failures = info.recent_failures(("s1", 1), NOW)
    share = max(
        info.cpu_used / info.cpu_total if info.cpu_total else 0.0,
        info.memory_used / info.memory_total if info.memory_total else 0.0,
    )
    return (
        failures if failures >= FAILURES_MAX else 0,
        info.by_service.get("s1", 0),
        info.active,
        share,
        info.id,
    )


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_table_kept_up_to_date_is_the_same_as_one_made_afresh(data: st.DataObject) -> None:
    case = Case([make_node("n1"), make_node("n2")], spec(cpu_nano=CPU, ports=(HOST_80,)))
    for _ in range(data.draw(st.integers(0, 15))):
        draft = Draft(case.tables, now_ns=NOW)
        kind = data.draw(st.sampled_from(["place", "end", "node", "gone"]))
        tasks = sorted(case.tables.all(Task), key=lambda t: t.id)
        node_id = data.draw(st.sampled_from(["n1", "n2", "n3"]))
        if kind == "place":
            (task,) = case.new(1)
            status = TaskStatus(state=TaskState.ASSIGNED)
            draft.put(structs.replace(task, node_id=node_id, status=status))
        elif kind == "end" and tasks:
            task = data.draw(st.sampled_from(tasks))
            state = data.draw(st.sampled_from([TaskState.RUNNING, TaskState.FAILED]))
            draft.put(structs.replace(task, status=TaskStatus(state=state)))
        elif kind == "node":
            draft.put(make_node(node_id, cpu=data.draw(st.integers(0, 8)) * CPU))
        elif kind == "gone" and case.tables.get(Node, node_id):
            draft.delete(Node, node_id)
        rows = [(c.kind, c.id, c.new) for c in draft.changes()]
        for change in case.tables.apply(case.tables.revision + 1, rows):
            case.table.apply(change, case.tables)
            case.table.apply(change, case.tables)
        case.table.check_invariants(case.tables)
