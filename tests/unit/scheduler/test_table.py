"""Strategies, affinities, conditions on services, GPUs and explanations."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.scheduler import (
    NodeTable,
    account,
    explain,
)
from swarm.v1 import (
    Availability,
    Cluster,
    ClusterSpec,
    GenericResource,
    Gpu,
    Kind,
    Node,
    SchedulingConfig,
    Service,
)
from tests.unit.control.world import CPU, GIB, make_node
from tests.unit.scheduler.case import (
    Bench,
    affinity,
    gpu,
    gpu_node,
    spec,
    spread,
)

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
    answer = explain(NodeTable.build(bench.tables), bench.tables, two)
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
    text = explain(NodeTable.build(bench.tables), bench.tables, first).decision
    assert text == (
        "spread: its node comes first of the 2 that fit now (0 of the service, 0 tasks, 0% claimed)"
        "; next n2 (1 of the service, 1 task, 25% claimed)"
    )
    gpus = Bench([gpu_node("g", 2)], spec(devices=(gpu(),)))
    (task,) = gpus.place("web")
    assert explain(NodeTable.build(gpus.tables), gpus.tables, task).decision.startswith(
        "it would go to the same node now: fgd: "
    )
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
