"""Tables with services by name, and a node table that follows them; for tests of placement."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from manager.scheduler import (
    Group,
    NodeTable,
    Requirement,
    account,
    place,
    reason,
)
from manager.store import Tables
from swarm.clock import SECOND_NS
from swarm.v1 import (
    Cluster,
    ClusterSpec,
    ContainerSpec,
    DeviceRequest,
    EndpointSpec,
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
from tests.unit.control.world import GIB, make_node

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
