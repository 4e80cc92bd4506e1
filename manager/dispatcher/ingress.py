"""The services that every node listens for, with where their replicas are.

One table for all sessions, kept up from the store's changes: each service's entry is built once per
change and the same frozen object goes to every agent.
"""

from __future__ import annotations

from collections.abc import Iterable

from manager.store import View
from swarm.v1 import Backend, IngressService, Node, PortConfig, Service, Task, TaskState

# As in TaskStatus.cause: its healthcheck has failed and it is being stopped.
UNHEALTHY = "unhealthy"


class IngressTable:
    """Built from a view; `rebuild` after changes."""

    def __init__(self) -> None:
        self.services: dict[str, IngressService] = {}

    def load(self, view: View) -> set[str]:
        """Builds everything anew; returns the ids of the services that differ from before."""
        ids = {s.id for s in view.all(Service)} | set(self.services)
        return self.rebuild(view, ids)

    def rebuild(self, view: View, service_ids: Iterable[str]) -> set[str]:
        """Builds these anew; returns the ids of those that differ from before."""
        out = set()
        for service_id in service_ids:
            new = _build(view, service_id)
            if new == self.services.get(service_id):
                continue
            out.add(service_id)
            if new is None:
                del self.services[service_id]
            else:
                self.services[service_id] = new
        return out

    def on_node(self, node_id: str) -> set[str]:
        """The services with a backend on a node."""
        return {
            s.service_id
            for s in self.services.values()
            if any(b.node_id == node_id for b in s.backends)
        }


def published(service: Service | None) -> tuple[PortConfig, ...]:
    """The ports that every node listens on."""
    if service is None or service.pending_delete or service.endpoint is None:
        return ()
    return tuple(
        p for p in service.endpoint.ports if p.publish_mode != "host" and p.published_port > 0
    )


def serves(task: Task | None) -> bool:
    """Whether connections may be sent to the task: it runs, is healthy, and is to stay."""
    return (
        task is not None
        and task.status is not None
        and task.status.state == TaskState.RUNNING
        and task.status.cause != UNHEALTHY
        and task.desired_state in (TaskState.RUNNING, TaskState.COMPLETE)
    )


def data_path(node: Node | None) -> tuple[str, int]:
    """Where a node's relay is."""
    if node is None or node.description is None:
        return "", 0
    return node.description.data_path_addr, node.description.data_path_port


def _build(view: View, service_id: str) -> IngressService | None:
    service = view.get(Service, service_id)
    ports = published(service)
    if service is None or not ports:
        return None
    backends = []
    for task in sorted(view.by(Task, "service", service_id), key=lambda t: t.id):
        if not serves(task):
            continue
        addr, port = data_path(view.get(Node, task.node_id))
        if addr and port:
            backends.append(
                Backend(task_id=task.id, node_id=task.node_id, relay_addr=addr, relay_port=port)
            )
    return IngressService(
        service_id=service_id,
        service_name=service.spec.name if service.spec else "",
        ports=ports,
        backends=tuple(backends),
    )
