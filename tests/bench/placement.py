"""Placement: how many tasks a second get a node, what it takes of memory, and what a tick costs.

    python -m tests.bench.placement --nodes 1000 --tasks 100000 --services 1
    python -m tests.bench.placement --nodes 1000 --tasks 8000 --services 8000 --gpus-per-node 8
    python -m tests.bench.placement --tasks 100000 --commit

The last line is `tasks_per_s=… rss_mib=… tick_ms=…`:

- `tasks_per_s`: the decisions alone, groups placed on a fresh node table (median of the rounds).
  With --commit: placed, committed to an embedded store on this disk in portions as large as a
  tick's, and observed. A line before tells the same of tasks that the control loop makes as well.
- `rss_mib`: the most memory the process had, the cluster and both states of all tasks included.
- `tick_ms`: one tick of the control loop after one node has changed (a label; what was observed of it
  included), on the cluster where all the tasks are placed: the larger of the medians with nothing
  waiting and with as many services waiting as there are. Lines before tell of other changes.

With --gpus-per-node each task asks for one GPU, and there are as many GPUs as given.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import resource
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from manager.control import Controller
from manager.control.controller import CREATED_MAX
from manager.scheduler import Group, NodeTable, place
from manager.store import Change, Draft, Store, Tables, View, Watch
from manager.store.engines.embedded import EmbeddedEngine
from swarm.clock import SystemClock
from swarm.ids import seeded_rng
from swarm.v1 import (
    Availability,
    ContainerSpec,
    DeviceRequest,
    Gpu,
    Kind,
    Message,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Platform,
    Replicated,
    ResourceRequirements,
    Resources,
    Service,
    ServiceMode,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)

CPU = 1_000_000_000
MIB = 1 << 20
NOW_NS = 1_700_000_000 * CPU
WAITING_MAX = 100_000  # tasks
ROUNDS_S = 3.0  # for one sort of change
Rows = list[tuple[Kind, str, Message | None]]


def make_nodes(nodes: int, tasks: int, gpus: int) -> list[Node]:
    """Nodes with room for all tasks and a tenth more."""
    room = (tasks * 11 // 10) // nodes + 2
    return [
        Node(
            id=f"node{i:06}",
            spec=NodeSpec(
                role=NodeRole.WORKER,
                availability=Availability.ACTIVE,
                labels={"zone": f"z{i % 3}"},
            ),
            description=NodeDescription(
                hostname=f"host{i:06}",
                platform=Platform(os="linux", architecture="x86_64"),
                resources=Resources(cpu_nano=room * CPU // 10, memory_bytes=room * 64 * MIB),
                runtimes=("docker",),
                gpus=tuple(
                    Gpu(
                        uuid=f"GPU-{i:06}-{k}",
                        index=k,
                        model="NVIDIA A100-SXM4-40GB",
                        memory_bytes=40 << 30,
                        numa_node=k // 4,
                        healthy=True,
                    )
                    for k in range(gpus)
                ),
            ),
            status=NodeStatus(state=NodeState.READY),
        )
        for i in range(nodes)
    ]


def make_services(first: int, services: int, each: int, gpus: int) -> Rows:
    """Services that are alike, with their first versions."""
    devices = (DeviceRequest(capabilities=("gpu",), count=1),) if gpus else ()
    rows: Rows = []
    for i in range(first, first + services):
        spec = ServiceSpec(
            name=f"service{i:05}",
            task=TaskSpec(
                container=ContainerSpec(image="image"),
                resources=ResourceRequirements(
                    reservations=Resources(
                        cpu_nano=CPU // 10, memory_bytes=64 * MIB, devices=devices
                    )
                ),
            ),
            mode=ServiceMode(replicated=Replicated(replicas=each)),
        )
        service = Service(id=f"service{i:05}", spec=spec, spec_version=1, task_version=1)
        revision = ServiceRevision(
            id=f"{service.id}.1", service_id=service.id, spec_version=1, spec=spec
        )
        rows += [
            (Kind.SERVICE, service.id, service),
            (Kind.SERVICE_REVISION, revision.id, revision),
        ]
    return rows


def cluster(nodes: int, tasks: int, services: int, gpus: int = 0) -> Tables:
    """The cluster before anything is placed; the services share the tasks."""
    tables = Tables()
    rows: Rows = [(Kind.NODE, n.id, n) for n in make_nodes(nodes, tasks, gpus)]
    tables.apply(1, rows + make_services(0, services, tasks // services, gpus))
    return tables


# ------------------------------------------------------------------ decisions


def make_groups(table: NodeTable, view: View) -> list[Group]:
    """All the services' tasks, waiting for a node."""
    status = TaskStatus(state=TaskState.PENDING)
    groups = []
    for service in sorted(view.all(Service), key=lambda s: s.id):
        assert service.spec and service.spec.mode and service.spec.mode.replicated
        tasks = [
            Task(
                id=f"{service.id}.{slot}",
                service_id=service.id,
                spec_version=1,
                slot=slot,
                desired_state=TaskState.RUNNING,
                status=status,
            )
            for slot in range(1, (service.spec.mode.replicated.replicas or 0) + 1)
        ]
        need = table.requirement_of_version(service.id, 1, view)
        groups.append(Group(service_id=service.id, spec_version=1, requirement=need, tasks=tasks))
    return groups


def decide(tables: Tables) -> tuple[list[Task], float]:
    """The placed tasks, and the seconds it took."""
    table = NodeTable.build(tables)
    groups = make_groups(table, tables)
    placed: list[Task] = []
    started = time.perf_counter()
    for group in groups:
        placed.extend(place(table, group, tables, NOW_NS).placed)
    return placed, time.perf_counter() - started


# ------------------------------------------------------------------ ticks


class Loop:
    """The control loop's pure part on tables in memory."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.controller = Controller(seeded_rng(1), created_max=1 << 30)
        self.controller.reset(tables)
        self.now_ns = NOW_NS

    def change(self, rows: Rows, *, own: bool = False) -> None:
        """Commits and observes."""
        for change in self.tables.apply(self.tables.revision + 1, rows):
            self.controller.observe(change, self.tables, own=own)

    def tick(self) -> tuple[int, float]:
        """One tick; the tasks it placed and its seconds. Its commit is not in them."""
        self.now_ns += CPU // 1000
        started = time.perf_counter()
        draft = Draft(self.tables, now_ns=self.now_ns)
        placed = self.controller.tick(draft).placed
        seconds = time.perf_counter() - started
        rows = [(c.kind, c.id, c.new) for c in draft.changes()]
        self.controller.done()
        self.change(rows, own=True)
        return placed, seconds

    def settle(self) -> None:
        while self.controller.has_work(self.now_ns):
            self.tick()

    def changed(self, node_id: str, edit: Callable[[Node], Node]) -> float:
        """Milliseconds of observing one changed node and of the tick after it."""
        node = self.tables.get(Node, node_id)
        assert node is not None
        new = edit(node)
        (change,) = self.tables.apply(self.tables.revision + 1, [(Kind.NODE, node_id, new)])
        gc.collect()
        started = time.perf_counter()
        self.controller.observe(change, self.tables)
        observed = time.perf_counter() - started
        _, seconds = self.tick()
        self.settle()
        return (observed + seconds) * 1000


def _labelled(node: Node) -> Node:
    assert node.spec is not None
    labels = {**node.spec.labels, "round": str(int(node.spec.labels.get("round", "0")) + 1)}
    return structs.replace(node, spec=structs.replace(node.spec, labels=labels))


def _shrunk(node: Node) -> Node:
    assert node.description is not None and node.description.resources is not None
    less = structs.replace(
        node.description.resources, memory_bytes=node.description.resources.memory_bytes - MIB
    )
    return structs.replace(node, description=structs.replace(node.description, resources=less))


def _turned(node: Node) -> Node:
    down = node.status is not None and node.status.state == NodeState.READY
    state = NodeState.DOWN if down else NodeState.READY
    return structs.replace(node, status=NodeStatus(state=state))


def ticks(tables: Tables, placed: list[Task], given: argparse.Namespace) -> float:
    """The cost of a changed node once all is placed, with nothing waiting and with much."""
    tables.apply(tables.revision + 1, [(Kind.TASK, t.id, t) for t in placed])
    loop = Loop(tables)
    loop.settle()
    worst = 0.0
    for waiting in (False, True):
        if waiting:
            each = max(1, min(given.tasks, WAITING_MAX) // given.services)
            rows = make_services(given.services, given.services, each, given.gpus_per_node)
            # A need that nothing has room for, as far as the nodes go.
            loop.change([_huge(row) for row in rows] if not given.gpus_per_node else rows)
            placed_now, seconds = loop.tick()
            loop.settle()
            print(
                f"{given.services} services more: placed {placed_now}, waiting "
                f"{loop.controller.pending}, first tick {seconds * 1000:.0f} ms"
            )
        found = {}
        pending = loop.controller.pending
        for name, edit in (("label", _labelled), ("memory", _shrunk), ("down and up", _turned)):
            found[name] = _median(loop, given.nodes, edit)
        what = ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items())
        print(f"a node changed while {pending} tasks wait: {what}", flush=True)
        worst = max(worst, found["label"])
    return worst


def _median(loop: Loop, nodes: int, edit: Callable[[Node], Node]) -> float:
    """Of some nodes, each changed twice: at most 15, fewer where that takes long."""
    times: list[float] = []
    started = time.monotonic()
    for i in range(15):
        times += [loop.changed(f"node{7 * i % nodes:06}", edit) for _ in range(2)]
        if time.monotonic() - started > ROUNDS_S:
            break
    return statistics.median(times)


def _huge(row: tuple[Kind, str, Message | None]) -> tuple[Kind, str, Message | None]:
    kind, id_, value = row
    assert isinstance(value, Service | ServiceRevision)
    assert value.spec is not None and value.spec.task is not None
    huge = ResourceRequirements(reservations=Resources(cpu_nano=1 << 50))
    spec = structs.replace(value.spec, task=structs.replace(value.spec.task, resources=huge))
    return kind, id_, structs.replace(value, spec=spec)


# ------------------------------------------------------------------ commits


async def committed(given: argparse.Namespace, *, whole: bool) -> float:
    """Tasks a second placed, committed to an embedded store and observed; `whole`: made and placed
    by ticks of the control loop, all of its stages included.
    """
    clock = SystemClock()
    with tempfile.TemporaryDirectory() as folder:
        engine = EmbeddedEngine(Path(folder) / "store.db", clock)
        store = Store(engine, clock)
        await store.open()
        try:
            base = cluster(given.nodes, given.tasks, given.services, given.gpus_per_node)
            draft = store.draft()
            for cls in (Node, Service, ServiceRevision):
                for o in base.all(cls):
                    draft.put(o)
            await store.commit(draft)
            with store.watch(("all",)) as watch:
                if whole:
                    placed, seconds = await _run_loop(store, watch, clock)
                else:
                    placed, seconds = await _place_all(store, watch)
        finally:
            await store.close()
    expected = given.tasks // given.services * given.services
    if placed != expected:
        raise SystemExit(f"{placed} of {expected} tasks placed and committed")
    return placed / seconds


async def _place_all(store: Store, watch: Watch) -> tuple[int, float]:
    """Groups in portions such as one tick has, each committed before the next."""
    table = NodeTable.build(store)
    groups = make_groups(table, store)
    placed = 0
    started = time.perf_counter()
    queue = deque(
        replace(group, tasks=group.tasks[i : i + CREATED_MAX])
        for group in groups
        for i in range(0, len(group.tasks), CREATED_MAX)
    )
    while queue:
        draft = store.draft()
        count = 0
        while queue and count + len(queue[0].tasks) <= CREATED_MAX:
            group = queue.popleft()
            for task in place(table, group, draft, draft.now_ns).placed:
                draft.put(task)
                count += 1
        await store.commit(draft)
        await _observe(watch, lambda change: table.apply(change, store))
        placed += count
    return placed, time.perf_counter() - started


async def _run_loop(store: Store, watch: Watch, clock: SystemClock) -> tuple[int, float]:
    controller = Controller(seeded_rng(1))
    controller.reset(store)
    placed = 0
    started = time.perf_counter()
    while controller.has_work(clock.now_ns()):
        draft = store.draft()
        tick = controller.tick(draft)
        await store.commit(draft)
        controller.done()
        await _observe(watch, lambda change: controller.observe(change, store, own=True))
        placed += tick.placed
    return placed, time.perf_counter() - started


async def _observe(watch: Watch, observe: Callable[[Change], None]) -> None:
    while watch.pending:
        batch = await anext(watch)
        for change in batch.changes:
            observe(change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--services", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--commit", action="store_true", help="commit to an embedded store")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    expected = given.tasks // given.services * given.services
    rates = []
    placed: list[Task] = []
    tables = cluster(given.nodes, given.tasks, given.services, given.gpus_per_node)
    for _ in range(given.repeat):
        placed = []
        gc.collect()
        placed, seconds = decide(tables)
        if len(placed) != expected:
            raise SystemExit(f"{len(placed)} of {expected} tasks placed")
        rates.append(expected / seconds)
    print(
        f"decisions, {given.repeat} rounds: {min(rates):.0f}..{max(rates):.0f} tasks/s", flush=True
    )
    rate = statistics.median(rates)
    if given.commit:
        rates = []
        for _ in range(given.repeat):
            gc.collect()
            rates.append(asyncio.run(committed(given, whole=False)))
        low, high = min(rates), max(rates)
        print(f"committed, {given.repeat} rounds: {low:.0f}..{high:.0f} tasks/s", flush=True)
        rate = statistics.median(rates)
        gc.collect()
        whole = asyncio.run(committed(given, whole=True))
        print(f"made by the control loop, placed and committed: {whole:.0f} tasks/s", flush=True)
    gc.collect()
    tick_ms = ticks(tables, placed, given)
    rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"tasks_per_s={rate:.0f} rss_mib={rss_mib} tick_ms={tick_ms:.2f}")


if __name__ == "__main__":
    main()
