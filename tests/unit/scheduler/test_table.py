"""The node table: columns, indexes, sleepers and decisions against plain ways of working them out."""

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
    NodeTable,
    Requirement,
    account,
    explain,
    place,
    reason,
    rejection,
    requirement_of,
)
from manager.scheduler.sleeping import Sleepers
from manager.store import Draft, Tables
from swarm.clock import SECOND_NS
from swarm.gpus import WHOLE
from swarm.v1 import (
    Availability,
    Cluster,
    ClusterSpec,
    ContainerSpec,
    DeviceRequest,
    EndpointSpec,
    GenericResource,
    Gpu,
    Kind,
    Node,
    Placement,
    PlacementPreference,
    PortConfig,
    ResourceRequirements,
    Resources,
    SchedulingConfig,
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


def spec(name: str = "web", *, ports: tuple[PortConfig, ...] = (), **more: Any) -> ServiceSpec:
    names = ("constraints", "preferences", "strategy", "max_replicas")
    placement = Placement(**{k: more.pop(k) for k in names if k in more})
    return ServiceSpec(
        name=name,
        labels=more.pop("labels", {}),
        task=TaskSpec(
            container=ContainerSpec(image="web"),
            resources=ResourceRequirements(reservations=Resources(**more)),
            placement=placement,
        ),
        endpoint=EndpointSpec(ports=ports),
    )


def affinity(text: str, weight: int = 0) -> PlacementPreference:
    return PlacementPreference(affinity=text, weight=weight)


def spread(text: str) -> PlacementPreference:
    return PlacementPreference(spread=text)


def gpu(count: int | None = 1, *, ids: tuple[str, ...] = (), **options: str) -> Any:
    return DeviceRequest(
        capabilities=("gpu",), count=None if ids else count, device_ids=ids, options=options
    )


def gpu_node(name: str, count: int, *, model: str = "NVIDIA A100-SXM4-40GB", **more: Any) -> Node:
    peers = more.pop("peers", {})
    numa = more.pop("numa", {})
    driver = more.pop("driver", "")
    gpus = tuple(
        Gpu(
            uuid=f"{name}-{i}",
            index=i,
            model=model,
            memory_bytes=40 * GIB,
            compute_capability="8.0",
            numa_node=numa.get(i, -1),
            nvlink_peers=tuple(f"{name}-{p}" for p in peers.get(i, ())),
            healthy=True,
            driver=driver,
        )
        for i in range(count)
    )
    return make_node(name, gpus=gpus, **more)


class Bench:
    """Tables and a node table that follows them."""

    def __init__(self, nodes: list[Node], *specs: ServiceSpec, **scheduling: Any) -> None:
        self.tables = Tables()
        rows: list[Any] = [(Kind.NODE, n.id, n) for n in nodes]
        for of in specs:
            service = Service(id=of.name, spec=of, spec_version=1)
            revision = ServiceRevision(
                id=f"{of.name}.1", service_id=of.name, spec_version=1, spec=of
            )
            rows += [
                (Kind.SERVICE, of.name, service),
                (Kind.SERVICE_REVISION, revision.id, revision),
            ]
        if scheduling:
            cluster = Cluster(id="c", spec=ClusterSpec(scheduling=SchedulingConfig(**scheduling)))
            rows.append((Kind.CLUSTER, "c", cluster))
        self.tables.apply(1, rows)
        self.table = NodeTable.build(self.tables)
        self.count = 0

    def change(self, *rows: tuple[Kind, str, Any]) -> None:
        for change in self.tables.apply(self.tables.revision + 1, rows):
            self.table.apply(change, self.tables)

    def need(self, service: str) -> Requirement:
        return self.table.requirement_of_version(service, 1, self.tables)

    def new(self, service: str, count: int) -> list[Task]:
        self.count += count
        first = self.count - count
        return [
            Task(
                id=f"t{first + i:04}",
                service_id=service,
                spec_version=1,
                slot=first + i + 1,
                desired_state=TaskState.RUNNING,
                status=TaskStatus(state=TaskState.PENDING),
            )
            for i in range(count)
        ]

    def place(self, service: str, count: int = 1, **group: Any) -> list[Task]:
        tasks = self.new(service, count)
        result = place(
            self.table,
            Group(service, 1, self.need(service), tasks, **group),
            self.tables,
            NOW,
        )
        assert [*result.placed, *result.left][len(result.placed) :] == tasks[len(result.placed) :]
        self.tables.apply(self.tables.revision + 1, [(Kind.TASK, t.id, t) for t in result.placed])
        self.table.check_invariants(self.tables)
        return list(result.placed)

    def nodes_of(self, service: str, count: int = 1, **group: Any) -> list[str]:
        return [t.node_id for t in self.place(service, count, **group)]

    def end(self, task: Task) -> None:
        ended = structs.replace(task, status=TaskStatus(state=TaskState.COMPLETE))
        self.change((Kind.TASK, task.id, ended))

    def why(self, service: str) -> str:
        return reason(account(self.table, self.need(service), service))


# ---------------------------------------------------------------- strategies and affinity


def test_binpack_fills_the_fullest_node_first() -> None:
    nodes = [make_node(f"n{i}", cpu=4 * CPU) for i in range(3)]
    bench = Bench(nodes, spec("web", cpu_nano=CPU), spec("pack", cpu_nano=CPU, strategy="binpack"))
    assert bench.nodes_of("web", 1, node_id="n1") == ["n1"]
    assert bench.nodes_of("pack", 6) == ["n1", "n1", "n1", "n0", "n0", "n0"]


def test_the_clusters_strategy_counts_where_a_service_has_none() -> None:
    nodes = [make_node("n1"), make_node("n2")]
    bench = Bench(nodes, spec(cpu_nano=CPU), spec("own", strategy="spread"), strategy="binpack")
    assert bench.nodes_of("web", 2) == ["n1", "n1"]
    assert bench.nodes_of("own", 2) == ["n2", "n1"]
    changed = ClusterSpec(scheduling=SchedulingConfig(strategy="spread"))
    bench.change((Kind.CLUSTER, "c", Cluster(id="c", spec=changed)))
    assert bench.nodes_of("web", 2)[0] == "n2"


def test_affinity_comes_before_counts_and_after_spread_preferences() -> None:
    nodes = [
        make_node(f"{zone}{disk}{i}", cpu=2 * CPU, labels={"zone": zone, "disk": disk})
        for zone in "ab"
        for disk in ("hdd", "ssd")
        for i in range(1)
    ]
    fast = affinity("node.labels.disk == ssd", 10)
    one = Bench(nodes, spec(cpu_nano=CPU, preferences=(fast,)))
    assert one.nodes_of("web", 5)[:4] == ["assd0", "bssd0", "assd0", "bssd0"]
    away = affinity("node.labels.disk == ssd", -10)
    assert Bench(nodes, spec(preferences=(away,))).nodes_of("web", 2) == ["ahdd0", "bhdd0"]
    both = Bench(nodes, spec(cpu_nano=CPU, preferences=(fast, spread("node.labels.zone"))))
    assert Counter(n[0] for n in both.nodes_of("web", 6)) == {"a": 3, "b": 3}


# ---------------------------------------------------------------- conditions on services


def test_a_service_goes_where_another_runs_or_where_it_does_not() -> None:
    nodes = [make_node(f"n{i}") for i in range(3)]
    bench = Bench(
        nodes,
        spec("db"),
        spec("near", constraints=("service.name == db",)),
        spec("far", constraints=("service.name != db",)),
    )
    assert bench.nodes_of("near") == []
    assert bench.why("near") == "no suitable node (3 nodes do not satisfy service.name == db)"
    assert bench.nodes_of("db") == ["n0"]
    assert bench.nodes_of("near", 2) == ["n0", "n0"]
    assert set(bench.nodes_of("far", 4)) == {"n1", "n2"}


def test_a_service_that_avoids_itself_has_one_task_a_node() -> None:
    nodes = [make_node(f"n{i}") for i in range(3)]
    bench = Bench(nodes, spec(constraints=("service.name != web",)))
    assert bench.nodes_of("web", 5) == ["n0", "n1", "n2"]
    assert bench.why("web") == "no suitable node (3 nodes do not satisfy service.name != web)"


def test_a_service_that_wants_to_be_with_itself_can_start_and_stays_together() -> None:
    nodes = [make_node(f"n{i}", cpu=3 * CPU) for i in range(3)]
    bench = Bench(nodes, spec(cpu_nano=CPU, constraints=("service.name == web",)))
    assert bench.nodes_of("web", 5) == ["n0", "n0", "n0"]
    soft = Bench(nodes, spec(cpu_nano=CPU, preferences=(affinity("service.name == web"),)))
    assert soft.nodes_of("web", 5) == ["n0", "n0", "n0", "n1", "n1"]


def test_labels_of_services_count_as_they_are_now() -> None:
    nodes = [make_node("n1"), make_node("n2")]
    bench = Bench(nodes, spec("db"), spec("far", constraints=("service.labels.tier != data",)))
    assert bench.nodes_of("db") == ["n1"]
    assert bench.nodes_of("far", 1) == ["n2"]
    data = Service(id="db", spec=spec("db", labels={"tier": "data"}), spec_version=2)
    bench.change((Kind.SERVICE, "db", data))
    assert set(bench.nodes_of("far", 3)) == {"n2"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.integers(1, 12),
    st.sampled_from(
        [
            ("service.name != web", 5),
            ("service.name != web", -5),
            ("service.name == web", 5),
            ("service.name == web", -5),
            ("service.name == other", 3),
        ]
    ),
    st.booleans(),
)
def test_affinity_to_services_is_the_same_one_by_one(
    cpus: list[int], count: int, preference: tuple[str, int], spreads: bool
) -> None:
    nodes = [
        make_node(f"n{i}", cpu=c * CPU, labels={"zone": "ab"[i % 2]}) for i, c in enumerate(cpus)
    ]
    wanted = (affinity(*preference), *((spread("node.labels.zone"),) if spreads else ()))
    specs = (spec("other"), spec(cpu_nano=CPU, preferences=wanted))
    together, single = Bench(nodes, *specs), Bench(nodes, *specs)
    for bench in (together, single):
        bench.place("other")
    one_by_one = [node for _ in range(count) for node in single.nodes_of("web")]
    assert together.nodes_of("web", count) == one_by_one


# ---------------------------------------------------------------- GPUs


def test_fractions_share_a_gpu_and_never_more_than_there_is() -> None:
    bench = Bench(
        [gpu_node("n", 2)],
        spec("half", devices=(gpu(fraction="0.5", memory="10GiB"),)),
        spec("whole", devices=(gpu(),)),
    )
    assert [t.assigned_gpus for t in bench.place("half", 2)] == [("n-0",), ("n-0",)]
    assert [t.assigned_gpus for t in bench.place("whole", 2)] == [("n-1",)]
    assert bench.place("half") == []
    assert bench.why("half") == (
        "no suitable node (1 of 1 node short of a GPU to share: need 0.5, best free 0 on n)"
    )


def test_memory_of_a_shared_gpu_runs_out() -> None:
    bench = Bench([gpu_node("n", 1)], spec(devices=(gpu(fraction="0.1", memory="15GiB"),)))
    assert len(bench.place("web", 5)) == 2
    assert bench.why("web") == (
        "no suitable node (1 of 1 node short of GPU memory: need 15 GiB, best free 10 GiB on n)"
    )


def test_models_memory_and_capability_are_asked_for() -> None:
    nodes = [gpu_node("a", 1), gpu_node("h", 1, model="NVIDIA H100 80GB HBM3")]
    bench = Bench(
        nodes,
        spec("h", devices=(gpu(model="H100"),)),
        spec("t4", devices=(gpu(model="T4"),)),
        spec("big", devices=(gpu(memory="80GiB"),)),
        spec("new", devices=(gpu(capability=">=9.0"),)),
    )
    assert bench.nodes_of("h", 2) == ["h"]
    assert bench.why("t4") == (
        "no suitable node (2 of 2 nodes without GPU of model T4: need 1, best 0 on h)"
    )
    assert "short of GPU memory: need 80 GiB, best free 40 GiB" in bench.why("big")
    assert "without GPU with compute capability >=9.0" in bench.why("new")


def test_several_gpus_are_those_joined_best() -> None:
    pairs = {0: (2,), 2: (0,), 1: (3,), 3: (1,)}
    bench = Bench(
        [gpu_node("n", 4, peers=pairs, numa={0: 0, 1: 0, 2: 1, 3: 1})],
        spec("two", devices=(gpu(2),)),
        spec("one", devices=(gpu(1),)),
    )
    (one,) = bench.place("one")
    (two,) = bench.place("two")
    (other,) = bench.place("one")
    assert set(two.assigned_gpus) in ({"n-0", "n-2"}, {"n-1", "n-3"})
    assert not {*one.assigned_gpus, *other.assigned_gpus} & set(two.assigned_gpus)
    answer = explain(bench.tables, two)
    assert "joined by NVLink" in answer.decision


def test_a_node_whose_gpus_are_joined_comes_before_one_where_they_are_not() -> None:
    apart = gpu_node("a", 2, numa={0: 0, 1: 1})
    joined = gpu_node("b", 4, peers={0: (1,), 1: (0,)}, numa={0: 0, 1: 0, 2: 1, 3: 1})
    bench = Bench([apart, joined], spec(devices=(gpu(2),)))
    assert [t.assigned_gpus for t in bench.place("web", 3)] == [
        ("b-0", "b-1"),
        ("b-2", "b-3"),
        ("a-0", "a-1"),
    ]


def test_a_declared_kind_wins_over_the_gpus_of_its_node() -> None:
    declared = make_node(
        "own",
        gpus=(Gpu(uuid="G", healthy=True),),
        generic=(GenericResource(kind="NVIDIA-GPU", count=1),),
    )
    found = gpu_node("found", 1, driver="nvidia")
    bench = Bench([declared, found], spec(generic=(GenericResource(kind="NVIDIA-GPU", count=1),)))
    placed = {t.node_id: t for t in bench.place("web", 4)}
    assert placed["found"].assigned_gpus == ("found-0",)
    assert placed["own"].assigned_gpus == ()
    assert placed["own"].assigned_generic == (GenericResource(kind="NVIDIA-GPU", count=1),)
    assert len(placed) == 2


def test_gpu_tasks_heed_spread_preferences_failures_and_max_replicas() -> None:
    nodes = [gpu_node(f"{z}{i}", 4, labels={"zone": z}) for z in "ab" for i in range(2)]
    bench = Bench(
        nodes,
        spec("zones", devices=(gpu(),), preferences=(spread("node.labels.zone"),)),
        spec("few", devices=(gpu(),), max_replicas=1),
    )
    assert Counter(n[0] for n in bench.nodes_of("zones", 6)) == {"a": 3, "b": 3}
    assert len(set(bench.nodes_of("few", 9))) == 4


def test_tasks_without_gpus_leave_gpus_usable_but_spread_first() -> None:
    nodes = [gpu_node("a", 4, cpu=4 * CPU), make_node("b", cpu=4 * CPU)]
    train = spec("train", cpu_nano=CPU, devices=(gpu(),))
    bench = Bench(nodes, train, spec("one", cpu_nano=CPU), spec("two", cpu_nano=CPU))
    for _ in range(4):
        bench.table.learn(bench.need("train"))
    assert bench.nodes_of("one") == ["b"]
    assert bench.nodes_of("two") == ["b"], "it would take the CPU that a GPU needs"
    assert bench.nodes_of("two") == ["a"], "replicas are spread before GPUs are spared"


# ---------------------------------------------------------------- explanations


def test_each_dimension_that_is_short_is_named() -> None:
    nodes = [make_node("a", cpu=CPU, memory=GIB), make_node("b", cpu=CPU, memory=8 * GIB)]
    bench = Bench(nodes, spec(cpu_nano=2 * CPU, memory_bytes=2 * GIB))
    (found,) = account(bench.table, bench.need("web"), "web").filters
    assert (found.detail, found.nodes, found.never_nodes) == ("cpu", 2, 2)
    assert "(1 of them also short of memory: need 2 GiB, best free 1 GiB on a)" in found.message


def test_never_is_told_from_not_now_node_by_node() -> None:
    nodes = [
        make_node("small", cpu=CPU),
        make_node("full", cpu=4 * CPU),
        make_node("drained", cpu=4 * CPU, availability=Availability.DRAIN),
        make_node("weak", cpu=CPU, availability=Availability.DRAIN),
    ]
    bench = Bench(nodes, spec(cpu_nano=3 * CPU))
    bench.place("web", 1)
    found = {
        (f.filter, f.detail): (f.nodes, f.never_nodes)
        for f in account(bench.table, bench.need("web"), "web").filters
    }
    assert found == {("availability", "drain"): (2, 1), ("resources", "cpu"): (2, 1)}


def test_a_placed_task_is_told_how_its_node_compares() -> None:
    bench = Bench([make_node("n1"), make_node("n2")], spec(cpu_nano=CPU))
    (first, second) = bench.place("web", 2)
    text = explain(bench.tables, first).decision
    assert text == (
        "spread: its node comes first of the 2 that fit now (0 of the service, 0 tasks, 0% claimed)"
        "; next n2 (1 of the service, 1 task, 25% claimed)"
    )
    gpus = Bench([gpu_node("g", 2)], spec(devices=(gpu(),)))
    (task,) = gpus.place("web")
    assert explain(gpus.tables, task).decision.startswith("it would go to the same node now: fgd: ")
    assert second.node_id == "n2"


def test_processes_are_a_dimension_where_nodes_tell_them() -> None:
    def with_pids(node: Node, pids: int) -> Node:
        assert node.description is not None and node.description.resources is not None
        more = structs.replace(node.description.resources, pids=pids)
        return structs.replace(node, description=structs.replace(node.description, resources=more))

    nodes = [with_pids(make_node("a"), 250), make_node("silent", availability=Availability.DRAIN)]
    bench = Bench(nodes, spec(pids=100))
    assert bench.nodes_of("web", 3) == ["a", "a"]
    assert "1 of 2 nodes short of processes: need 100, best free 50 on a" in bench.why("web")
    assert Bench([make_node("silent")], spec(pids=100)).nodes_of("web", 3) == ["silent"] * 3


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
        if need.max_replicas:
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
