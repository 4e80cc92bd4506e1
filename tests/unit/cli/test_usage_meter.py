"""From measurements to figures."""

from __future__ import annotations

from typing import Any

from cli.usage.meter import Flow, Inventory, Meter
from swarm.v1 import (
    GpuLoad,
    Node,
    NodeDescription,
    NodeState,
    NodeStatus,
    NodeUsage,
    ResourceRequirements,
    Resources,
    Service,
    ServiceSpec,
    ServiceStatus,
    StatsResponse,
    TaskSpec,
    TaskStats,
)

SECOND = 1_000_000_000
GIB = 1 << 30


def usage(
    at_s: float, cpu_s: float, *tasks: TaskStats, node: str = "n1", **more: Any
) -> StatsResponse:
    settings = {"cpus": 4, "memory_bytes": GIB, "memory_total_bytes": 4 * GIB, **more}
    measured = NodeUsage(
        node_id=node,
        node_name=f"host-{node}",
        timestamp_ns=round(at_s * SECOND),
        cpu_total_ns=round(cpu_s * SECOND),
        tasks=tasks,
        **settings,
    )
    return StatsResponse(nodes=(measured,))


def task(id_: str, at_s: float, cpu_s: float, **more: Any) -> TaskStats:
    settings = {"service_name": "web", "slot": 1, "pids": 2, "memory_bytes": 1 << 20, **more}
    return TaskStats(
        task_id=id_,
        timestamp_ns=round(at_s * SECOND),
        cpu_total_ns=round(cpu_s * SECOND),
        **settings,
    )


def node(id_: str, state: NodeState = NodeState.READY) -> Node:
    return Node(
        id=id_,
        description=NodeDescription(hostname=f"host-{id_}"),
        status=NodeStatus(state=state),
    )


def test_rates_are_differences_over_the_time_on_the_node_s_clock() -> None:
    meter = Meter(1.0)
    meter.take(usage(100, 50, task("a", 100, 7, network_in_bytes=1000, network_out_bytes=0)), 0.0)
    first = meter.figures(0.0)
    assert not meter.complete()
    assert first.tasks[0].cpu_percent is None and first.nodes[0].cpu_percent is None
    # The message comes late; two seconds have passed on the node.
    meter.take(usage(102, 54, task("a", 102, 8, network_in_bytes=5000, network_out_bytes=0)), 9.0)
    figures = meter.figures(9.0)
    assert meter.complete()
    (shown,) = figures.tasks
    assert (shown.name, shown.node, shown.cpu_percent) == ("web.1", "host-n1", 50.0)
    assert shown.network == Flow(5000, 0, 2000.0, 0.0)
    assert shown.disk == Flow(), "the runtime does not tell"
    assert shown.memory_limit_bytes == 4 * GIB, "without a limit: all of the node's"
    assert figures.nodes[0].cpu_percent == 50.0, "2 of 4 CPUs"
    assert figures.cluster.cpus_used == 2.0


def test_a_counter_that_went_back_gives_no_rate() -> None:
    meter = Meter(1.0)
    meter.take(usage(100, 50, task("a", 100, 7, disk_read_bytes=9, disk_written_bytes=9)), 0.0)
    meter.take(usage(101, 1, task("a", 101, 0.5, disk_read_bytes=1, disk_written_bytes=19)), 1.0)
    figures = meter.figures(1.0)
    assert figures.tasks[0].cpu_percent is None and figures.nodes[0].cpu_percent is None
    assert figures.tasks[0].disk == Flow(1, 19, None, 10.0)
    assert figures.cluster.cpus_used is None
    meter.take(usage(102, 3, task("a", 102, 1.0)), 2.0)
    assert meter.figures(2.0).tasks[0].cpu_percent == 50.0


def test_a_clock_that_was_set_back_and_a_measurement_told_twice_give_no_rate() -> None:
    meter = Meter(1.0)
    meter.take(usage(100, 50), 0.0)
    meter.take(usage(100, 50), 1.0)
    assert not meter.complete()
    meter.take(usage(90, 51), 2.0)
    assert meter.figures(2.0).nodes[0].cpu_percent is None


def test_a_node_that_falls_silent_has_no_figures_but_a_sentence() -> None:
    meter = Meter(1.0)
    meter.know(Inventory.of([node("n1"), node("n2"), node("n3", NodeState.DOWN)], []))
    assert meter.figures(0.0).problems == (), "nothing was asked yet"
    meter.take(usage(1, 1, task("a", 1, 1)), 0.0)
    meter.take(usage(1, 1, task("b", 1, 1), node="n2"), 4.0)
    figures = meter.figures(6.0)
    assert [(n.name, n.measured, n.state) for n in figures.nodes] == [
        ("host-n1", False, "Ready"),
        ("host-n2", True, "Ready"),
        ("host-n3", False, "Down"),
    ]
    assert [t.id for t in figures.tasks] == ["b"]
    assert figures.problems == (
        "not ready, so not measured: host-n3",
        "no measurement comes from host-n1",
    )
    assert (figures.cluster.nodes, figures.cluster.nodes_measured) == (3, 1)


def test_what_the_manager_says_of_a_node_is_not_said_again() -> None:
    meter = Meter(1.0)
    meter.know(Inventory.of([node("n1"), node("n2")], []))
    meter.take(usage(1, 1), 0.0)
    meter.take(StatsResponse(problems=("node host-n2 has no session",)), 0.0)
    assert meter.figures(0.0).problems == ("node host-n2 has no session",)
    meter.take(usage(30, 1), 29.0)
    assert meter.figures(30.0).problems == ("no measurement comes from host-n2",)


def test_services_are_sums_and_a_shared_gpu_counts_once() -> None:
    gpus = (GpuLoad(uuid="g1", percent=80), GpuLoad(uuid="g2", percent=20), GpuLoad(uuid="g3"))
    tasks = (
        task("a", 1, 1, gpus=("g1",)),
        task("b", 1, 1, slot=2, gpus=("g1", "g2")),
        task("c", 1, 1, service_name="db", slot=10),
        task("d", 1, 1, service_name="db", slot=9),
    )
    meter = Meter(1.0)
    asked = Resources(cpu_nano=1_500_000_000, memory_bytes=GIB)
    spec = ServiceSpec(
        name="web", task=TaskSpec(resources=ResourceRequirements(reservations=asked))
    )
    status = ServiceStatus(running=2, desired=3, states={"running": 2, "pending": 1}, stopping=1)
    meter.know(Inventory.of([node("n1")], [(Service(id="s", spec=spec), status)]))
    meter.take(usage(1, 1, *tasks, gpus=gpus), 0.0)
    meter.take(
        usage(
            2,
            2,
            *(
                task(t.task_id, 2, 1.5, service_name=t.service_name, slot=t.slot, gpus=t.gpus)
                for t in tasks
            ),
            gpus=gpus,
        ),
        1.0,
    )
    figures = meter.figures(1.0)
    assert [t.name for t in figures.tasks] == ["db.9", "db.10", "web.1", "web.2"]
    db, web = figures.services
    assert (db.name, db.running, db.gpu_percent, db.gpus) == ("db", None, None, 0)
    assert (web.running, web.desired, web.tasks, web.pids) == (2, 3, 2, 4)
    assert (web.cpu_percent, web.memory_bytes, web.gpus) == (100.0, 2 << 20, 2)
    cluster = figures.cluster
    assert (cluster.gpus, cluster.gpus_held, cluster.gpu_percent) == (3, 2, 50.0)
    assert (cluster.cpus_reserved, cluster.memory_reserved_bytes) == (4.5, 3 * GIB)


def test_only_what_was_named_is_expected() -> None:
    meter = Meter(1.0)
    meter.know(Inventory.of([node("n1"), node("n2")], [], expected=False))
    meter.take(usage(1, 1), 0.0)
    figures = meter.figures(0.0)
    assert [n.name for n in figures.nodes] == ["host-n1"] and figures.problems == ()
    meter.take(StatsResponse(problems=tuple(f"p{n}" for n in range(100))), 0.0)
    assert len(meter.figures(0.0).problems) == 20, "memory has an end"
