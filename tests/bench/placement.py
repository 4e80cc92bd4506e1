"""Placement: how many tasks a second get a node, and how long one whole tick of the control loop takes.

    python -m tests.bench.placement --nodes 1000 --tasks 100000 --services 1

`tasks_per_s`: the decision alone (the groups placed on a fresh node table, explanations not needed).
`tick_ms`: one tick that makes, places and writes into its draft all the tasks; nothing is committed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

from manager.control import Controller
from manager.scheduler import Group, NodeTable, place, requirement_of
from manager.store import Draft, Tables
from swarm.ids import seeded_rng
from swarm.v1 import (
    Availability,
    ContainerSpec,
    Kind,
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


def cluster(nodes: int, tasks: int, services: int) -> Tables:
    """Nodes with room for all tasks and a tenth more, and services that share the tasks."""
    each = tasks // services
    room = (tasks * 11 // 10) // nodes + 2
    rows: list[tuple[Kind, str, object]] = []
    for i in range(nodes):
        node = Node(
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
            ),
            status=NodeStatus(state=NodeState.READY),
        )
        rows.append((Kind.NODE, node.id, node))
    for i in range(services):
        spec = ServiceSpec(
            name=f"service{i:05}",
            task=TaskSpec(
                container=ContainerSpec(image="image"),
                resources=ResourceRequirements(
                    reservations=Resources(cpu_nano=CPU // 10, memory_bytes=64 * MIB)
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
    tables = Tables()
    tables.apply(1, rows)  # type: ignore[arg-type]  # each row has its kind's object
    return tables


def decide(tables: Tables) -> tuple[int, float]:
    """Tasks placed, and the seconds it took."""
    table = NodeTable.build(tables)
    groups = []
    for service in sorted(tables.all(Service), key=lambda s: s.id):
        assert service.spec and service.spec.mode and service.spec.mode.replicated
        status = TaskStatus(state=TaskState.PENDING)
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
        need = requirement_of(service.spec)
        groups.append(Group(service_id=service.id, spec_version=1, requirement=need, tasks=tasks))
    started = time.perf_counter()
    placed = sum(len(place(table, group, tables, NOW_NS).placed) for group in groups)
    return placed, time.perf_counter() - started


def tick(tables: Tables, tasks: int) -> tuple[int, float]:
    """Tasks placed by one tick of the control loop, and its seconds."""
    controller = Controller(seeded_rng(1), created_max=tasks)
    controller.reset(tables)
    draft = Draft(tables, now_ns=NOW_NS)
    started = time.perf_counter()
    result = controller.tick(draft)
    return result.placed, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--services", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    tables = cluster(given.nodes, given.tasks, given.services)
    expected = given.tasks // given.services * given.services
    rates, ticks = [], []
    for _ in range(given.repeat):
        gc.collect()
        placed, seconds = decide(tables)
        if placed != expected:
            raise SystemExit(f"{placed} of {expected} tasks placed")
        rates.append(placed / seconds)
        gc.collect()
        placed, seconds = tick(tables, given.tasks)
        if placed != expected:
            raise SystemExit(f"{placed} of {expected} tasks placed by the tick")
        ticks.append(seconds * 1000)
    spread = f"{min(rates):.0f}..{max(rates):.0f} tasks/s, {min(ticks):.0f}..{max(ticks):.0f} ms"
    print(f"{given.repeat} runs: {spread}")
    print(f"tasks_per_s={statistics.median(rates):.0f} tick_ms={statistics.median(ticks):.0f}")


if __name__ == "__main__":
    main()
