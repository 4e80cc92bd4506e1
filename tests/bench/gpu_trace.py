"""A production GPU cluster's trace, replayed: how much of the GPUs the placement hands out.

    python -m tests.bench.gpu_trace --trace default --seeds 42-43 [--data DIR] [--policy fgd]

Tasks arrive one by one and stay; one that fits nowhere is turned away. Each is a service of its own
and goes the scheduler's whole way: spec, requirement, node table, `place`. `gpu_share`: percent of the
cluster's GPUs handed out when 130 % has been asked for: the mean over the arrivals whose asked
share rounds to that percent (the 1 % bin), the mean over the seeds. `ms_per_task`: wall time of a
decision and its claim, learning included. Orders of arrival come from the data where it has them,
else they are derived (gpu_orders.py). The data's protocol decides equal scores by node order; here
that is the last rule, after the account's own.

The workload is learned from the arrivals; `--workload given` takes it from the whole trace, as the
paper does. `--window N` is look-ahead: N tasks wait together and the largest is placed first. Tasks
without GPUs go by `--strategy`.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from manager.scheduler import Group, NodeTable, place
from manager.scheduler.gpus import (
    FGD,
    POLICIES,
    WHOLE,
    GpuDevice,
    GpuHold,
    GpuNeed,
    GpuNode,
    largest_first,
)
from manager.scheduler.requirement import STRATEGIES
from manager.store import Tables
from swarm.gpus import format_share
from swarm.v1 import (
    Availability,
    Cluster,
    ClusterSpec,
    ContainerSpec,
    DeviceRequest,
    Gpu,
    Kind,
    Message,
    Node,
    NodeDescription,
    NodeSpec,
    NodeState,
    NodeStatus,
    Placement,
    Platform,
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
from tests.bench.gpu_orders import orders

ROOT = Path(__file__).parents[2]
DATA = "data/alibaba-gpu-2023"
MILLI = 1_000_000  # nano CPUs
MIB = 1 << 20
AT = 130  # percent of the cluster's GPUs asked for


@dataclass(frozen=True, slots=True)
class Row:
    """A task of the trace."""

    name: str
    num_gpu: int
    gpu_milli: int
    need: GpuNeed


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one replay."""

    share: float
    ms_per_task: float
    cpu_ms_per_task: float
    tasks: int
    turned_away: int


def folder(given: str | None) -> Path:
    """Where the data is: as told, or in a folder `shared` in or beside the tree."""
    places = [Path(given)] if given else []
    if not given:
        places += [ROOT / "shared" / DATA, ROOT.parent / "shared" / DATA]
    for path in places:
        if (path / "openb_node_list_gpu_node.csv").is_file():
            return path
    raise SystemExit(f"no trace in {', '.join(map(str, places))}: name its folder with --data")


def read(data: Path, trace: str) -> tuple[dict[str, GpuNode], list[Row]]:
    """The nodes by name, and the tasks."""
    nodes = {}
    for row in _rows(data / "openb_node_list_gpu_node.csv"):
        gpus = tuple(GpuDevice(f"{row['sn']}/{i}", row["model"]) for i in range(int(row["gpu"])))
        nodes[row["sn"]] = GpuNode(row["sn"], int(row["cpu_milli"]), int(row["memory_mib"]), gpus)
    tasks = []
    for row in _rows(data / f"openb_pod_list_{trace}.csv"):
        count, milli = int(row["num_gpu"]), int(row["gpu_milli"])
        models = frozenset(filter(None, (row.get("gpu_spec") or "").split("|")))
        need = GpuNeed(
            cpu=int(row["cpu_milli"]),
            memory=int(row["memory_mib"]),
            count=count,
            share=milli * (WHOLE // 1000) if count else WHOLE,
            models=models if count else frozenset(),
        )
        tasks.append(Row(row["name"], count, milli, need))
    return nodes, tasks


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise SystemExit(f"no file {path}: is the trace's name right?") from None


def arrange(
    data: Path, trace: str, seed: int, nodes: dict[str, GpuNode], tasks: list[Row]
) -> tuple[list[Row], list[str]]:
    """Arrivals and node order: read where given, else derived."""
    given = data / f"arrivals_{trace}_seed{seed}.csv"
    node_order = data / f"node_order_{trace}_seed{seed}.csv"
    if given.is_file() and node_order.is_file():
        by_name = {task.name: task for task in tasks}
        arrivals = [by_name[row["name"]] for row in _rows(given)]
        return arrivals, [row["sn"] for row in _rows(node_order)]
    return orders(tasks, list(nodes), sum(len(n.gpus) for n in nodes.values()), seed)


def cluster(
    nodes: dict[str, GpuNode], order: list[str], arrivals: list[Row], *, policy: str, strategy: str
) -> Tables:
    """The nodes, named by their place in the order, so that it decides last; and a service for each
    task that comes.
    """
    config = SchedulingConfig(gpu_policy=policy, strategy=strategy)
    rows: list[tuple[Kind, str, Message | None]] = [
        (Kind.CLUSTER, "c", Cluster(id="c", spec=ClusterSpec(scheduling=config)))
    ]
    for rank, name in enumerate(order):
        node = make_node(f"{rank:05}", nodes[name])
        rows.append((Kind.NODE, node.id, node))
    for i, task in enumerate(arrivals):
        service_id = f"{i:06}"
        spec = make_spec(task)
        revision = ServiceRevision(
            id=f"{service_id}.1", service_id=service_id, spec_version=1, spec=spec
        )
        rows += [
            (Kind.SERVICE, service_id, Service(id=service_id, spec=spec, spec_version=1)),
            (Kind.SERVICE_REVISION, revision.id, revision),
        ]
    tables = Tables()
    tables.apply(1, rows)
    return tables


def make_node(name: str, node: GpuNode) -> Node:
    """A node of the trace as the scheduler knows nodes."""
    return Node(
        id=name,
        spec=NodeSpec(availability=Availability.ACTIVE),
        status=NodeStatus(state=NodeState.READY),
        description=NodeDescription(
            hostname=node.id,
            runtimes=("docker",),
            platform=Platform(os="linux", architecture="x86_64"),
            resources=Resources(cpu_nano=node.cpu * MILLI, memory_bytes=node.memory * MIB),
            gpus=tuple(
                Gpu(uuid=g.uuid, index=i, model=g.model, numa_node=-1, healthy=True)
                for i, g in enumerate(node.gpus)
            ),
        ),
    )


def make_spec(task: Row) -> ServiceSpec:
    """A task of the trace as a service."""
    need, options = task.need, {}
    if need.models:
        options["model"] = "|".join(sorted(need.models))
    if need.count and need.share < WHOLE:
        options["fraction"] = format_share(need.share)
    request = DeviceRequest(capabilities=("gpu",), count=need.count, options=options)
    reserved = Resources(
        cpu_nano=need.cpu * MILLI,
        memory_bytes=need.memory * MIB,
        devices=(request,) if need.count else (),
    )
    return ServiceSpec(
        name=task.name,
        task=TaskSpec(
            container=ContainerSpec(image="image"),
            resources=ResourceRequirements(reservations=reserved),
            placement=Placement(),
        ),
    )


def replay(
    nodes: dict[str, GpuNode],
    order: list[str],
    tasks: list[Row],
    arrivals: list[Row],
    *,
    policy: str,
    strategy: str,
    given: bool,
) -> Outcome:
    """One run."""
    tables = cluster(nodes, order, arrivals, policy=policy, strategy=strategy)
    table = NodeTable.build(tables)
    ground = Ground()
    for rank, name in enumerate(order):
        node = GpuNode(f"{rank:05}", nodes[name].cpu, nodes[name].memory, nodes[name].gpus)
        ground.nodes[node.id] = node
    if given:
        for task in tasks:
            table.columns.board.workload.learn(
                replace(task.need, cpu=task.need.cpu * MILLI, memory=task.need.memory * MIB)
            )
    total = sum(len(n.gpus) for n in nodes.values()) * 1000
    used = asked = away = 0
    in_bin: list[float] = []
    spent = spent_cpu = 0.0
    waiting = TaskStatus(state=TaskState.PENDING)
    for i, task in enumerate(arrivals):
        service_id = f"{i:06}"
        one = Task(
            id=service_id,
            service_id=service_id,
            spec_version=1,
            slot=1,
            desired_state=TaskState.RUNNING,
            status=waiting,
        )
        began, began_cpu = time.perf_counter(), time.process_time()
        need = table.requirement_of_version(service_id, 1, tables)
        if not given:
            table.learn(need)
        placed = place(table, Group(service_id, 1, need, (one,)), tables, 1).placed
        spent += time.perf_counter() - began
        spent_cpu += time.process_time() - began_cpu
        asked += task.num_gpu * task.gpu_milli
        if not placed:
            away += 1
        else:
            (got,) = placed
            ground.place(task.need, GpuHold(task.need, got.node_id, got.assigned_gpus))
            used += task.num_gpu * task.gpu_milli
        if round(100 * asked / total) == AT:
            in_bin.append(100 * used / total)
    table.columns.board.check_invariants()
    if not in_bin:
        raise SystemExit(f"no arrival in the {AT} % bin: {100 * asked / total:.1f} % was asked for")
    n = len(arrivals)
    return Outcome(statistics.fmean(in_bin), 1e3 * spent / n, 1e3 * spent_cpu / n, n, away)


class Ground:
    """What is really taken, counted apart from the account: every claim is checked against it."""

    def __init__(self) -> None:
        self.nodes: dict[str, GpuNode] = {}
        self._cpu: dict[str, int] = {}
        self._memory: dict[str, int] = {}
        self._gpu: dict[str, int] = {}

    def place(self, need: GpuNeed, held: GpuHold) -> None:
        """Counts a claim; fails where a dimension is oversubscribed or a GPU is not as asked."""
        node = self.nodes[held.node_id]
        models = {gpu.uuid: gpu.model for gpu in node.gpus}
        self._cpu[node.id] = self._cpu.get(node.id, 0) + need.cpu
        self._memory[node.id] = self._memory.get(node.id, 0) + need.memory
        assert self._cpu[node.id] <= node.cpu, f"CPU of {node.id} oversubscribed"
        assert self._memory[node.id] <= node.memory, f"memory of {node.id} oversubscribed"
        assert len(set(held.gpus)) == need.count, f"{need.count} GPUs asked, given {held.gpus}"
        for uuid in held.gpus:
            assert uuid in models, f"GPU {uuid} is not on {node.id}"
            assert not need.models or models[uuid] in need.models, f"GPU {uuid}: wrong type"
            self._gpu[uuid] = self._gpu.get(uuid, 0) + need.share
            assert self._gpu[uuid] <= WHOLE, f"GPU {uuid} oversubscribed"


def _seeds(text: str) -> list[int]:
    out: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        out += range(int(first), int(last or first) + 1)
    return out


def main() -> None:
    """Reads the arguments, replays, prints."""
    parser = argparse.ArgumentParser(description="Replay of a GPU cluster's trace.")
    parser.add_argument("--trace", default="default")
    parser.add_argument("--seeds", type=_seeds, default=[42, 43], help="42-43 or 42,45")
    parser.add_argument("--data", help="folder of the trace")
    parser.add_argument("--policy", choices=sorted(POLICIES), default=FGD)
    parser.add_argument("--strategy", choices=STRATEGIES, default=STRATEGIES[0])
    parser.add_argument("--workload", choices=("learned", "given"), default="learned")
    parser.add_argument("--window", type=int, default=1, help="tasks that wait together")
    args = parser.parse_args()
    data = folder(args.data)
    nodes, tasks = read(data, args.trace)
    outcomes = []
    for seed in args.seeds:
        arrivals, order = arrange(data, args.trace, seed, nodes, tasks)
        arrivals = [
            task
            for start in range(0, len(arrivals), args.window)
            for task in sorted(
                arrivals[start : start + args.window],
                key=lambda task: largest_first(task.need),
                reverse=True,
            )
        ]
        outcome = replay(
            nodes,
            order,
            tasks,
            arrivals,
            policy=args.policy,
            strategy=args.strategy,
            given=args.workload == "given",
        )
        outcomes.append(outcome)
        print(
            f"seed={seed} share={outcome.share:.2f} tasks={outcome.tasks} "
            f"turned_away={outcome.turned_away} ms={outcome.ms_per_task:.3f} "
            f"cpu_ms={outcome.cpu_ms_per_task:.3f}",
            flush=True,
        )
    share = statistics.fmean(o.share for o in outcomes)
    ms = statistics.fmean(o.ms_per_task for o in outcomes)
    print(f"gpu_share={share:.2f} ms_per_task={ms:.3f}")


if __name__ == "__main__":
    main()
