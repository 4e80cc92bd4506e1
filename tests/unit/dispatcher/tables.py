"""A view for pure tests: a draft over empty tables."""

from __future__ import annotations

from manager.store import Draft, Tables
from swarm.v1 import (
    ContainerSpec,
    Endpoint,
    Message,
    Node,
    NodeDescription,
    PortConfig,
    Service,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)

NOW_NS = 1_700_000_000 * 10**9
S = TaskState


def view(*objects: Message) -> Draft:
    draft = Draft(Tables(), now_ns=NOW_NS)
    for o in objects:
        draft.put(o)
    return draft


def node(node_id: str, *, addr: str = "10.0.0.1", port: int = 7946) -> Node:
    return Node(
        id=node_id,
        description=NodeDescription(hostname=node_id, data_path_addr=addr, data_path_port=port),
    )


def service(
    service_id: str = "s", spec: TaskSpec | None = None, *, ports: tuple[PortConfig, ...] = ()
) -> tuple[Service, ServiceRevision]:
    service_spec = ServiceSpec(
        name=service_id, task=spec or TaskSpec(container=ContainerSpec(image="i"))
    )
    return (
        Service(id=service_id, spec=service_spec, spec_version=1, endpoint=Endpoint(ports=ports)),
        ServiceRevision(
            id=f"{service_id}.1", service_id=service_id, spec_version=1, spec=service_spec
        ),
    )


def task(
    task_id: str,
    *,
    service_id: str = "s",
    node_id: str = "n",
    state: TaskState = S.ASSIGNED,
    desired: TaskState = S.RUNNING,
) -> Task:
    return Task(
        id=task_id,
        service_id=service_id,
        spec_version=1,
        slot=1,
        node_id=node_id,
        desired_state=desired,
        status=TaskStatus(state=state, timestamp_ns=NOW_NS),
    )
