"""Objects that the tests of lists and inspections show."""

from __future__ import annotations

import time
from typing import Any

from swarm.v1 import (
    Availability,
    ContainerSpec,
    Endpoint,
    EndpointSpec,
    EngineDescription,
    Global,
    ManagerStatus,
    Meta,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Placement,
    PortConfig,
    Reachability,
    Replicated,
    Service,
    ServiceMode,
    ServiceSpec,
    ServiceStatus,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)

IMAGE = "nginx:1.27@sha256:" + "a" * 64
SECOND_NS = 1_000_000_000


def ago_ns(seconds: float) -> int:
    """A time so long before now."""
    return time.time_ns() - round(seconds * SECOND_NS)


def service(
    name: str,
    *,
    id_: str = "",
    replicas: int | None = 3,
    image: str = IMAGE,
    ports: tuple[PortConfig, ...] = (),
    labels: dict[str, str] | None = None,
    max_replicas: int = 0,
    **more: Any,
) -> Service:
    mode = ServiceMode(replicated=Replicated(replicas=replicas))
    if replicas is None:
        mode = ServiceMode(global_service=Global())
    return Service(
        id=id_ or (name.replace("_", "") + "0" * 25)[:25],
        meta=Meta(version=5, created_at_ns=ago_ns(3600), updated_at_ns=ago_ns(60)),
        spec=ServiceSpec(
            name=name,
            labels=labels or {},
            task=TaskSpec(
                container=ContainerSpec(image=image),
                placement=Placement(max_replicas=max_replicas) if max_replicas else None,
            ),
            mode=mode,
            endpoint=EndpointSpec(ports=ports) if ports else None,
        ),
        spec_version=2,
        endpoint=Endpoint(ports=ports),
        **more,
    )


def status(of: Service, running: int, desired: int, **more: Any) -> ServiceStatus:
    assert of.spec is not None
    more.setdefault("up_to_date", running)
    more.setdefault("converged", running == desired)
    return ServiceStatus(
        service_id=of.id, name=of.spec.name, running=running, desired=desired, **more
    )


def node(
    name: str,
    *,
    id_: str,
    leader: bool | None = None,
    state: NodeState = NodeState.READY,
    availability: Availability = Availability.ACTIVE,
) -> Node:
    manager = None
    if leader is not None:
        manager = ManagerStatus(
            leader=leader, reachability=Reachability.REACHABLE, addr="10.0.0.1:2377"
        )
    role = NodeRole.WORKER if leader is None else NodeRole.MANAGER
    return Node(
        id=id_,
        meta=Meta(version=4, created_at_ns=ago_ns(86400)),
        spec=NodeSpec(role=role, availability=availability),
        description=NodeDescription(
            hostname=name,
            engine=EngineDescription(version="20.10.24", name="docker"),
            runtimes=("docker", "process"),
        ),
        status=NodeStatus(state=state, addr="10.0.0.1"),
        manager_status=manager,
    )


def task(
    of: Service,
    id_: str,
    *,
    slot: int,
    node_id: str = "",
    state: TaskState = TaskState.RUNNING,
    desired: TaskState = TaskState.RUNNING,
    seconds: float = 60,
    err: str = "",
    spec_version: int = 2,
    host_ports: tuple[PortConfig, ...] = (),
) -> Task:
    return Task(
        id=id_,
        meta=Meta(version=9, created_at_ns=ago_ns(seconds + 5)),
        service_id=of.id,
        spec_version=spec_version,
        slot=slot,
        node_id=node_id,
        desired_state=desired,
        status=TaskStatus(state=state, timestamp_ns=ago_ns(seconds), err=err),
        host_ports=host_ports,
    )
