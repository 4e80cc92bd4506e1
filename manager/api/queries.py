"""Reading: the cluster in numbers, one object, lists, explanations. Pure functions of a view."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from manager.api.filters import candidates, compile_filters
from manager.api.lookup import find, name_of, served
from manager.api.present import present, present_revision
from manager.api.roles import is_reachable
from manager.api.services import previous_revision
from manager.ca import manager_addrs
from manager.control import Causes, service_status, standing
from manager.scheduler import NodeTable, explain
from manager.store import EngineFacts, View
from swarm.v1 import (
    Cluster,
    ExplainTaskResponse,
    GetInfoResponse,
    GetRequest,
    GetResponse,
    Kind,
    ListRequest,
    ListResponse,
    Node,
    NodeState,
    Service,
    ServiceRevision,
    ServiceStatus,
    Stack,
    Task,
    TaskState,
)


def info(view: View, *, node_id: str, version: str, engine: EngineFacts | None) -> GetInfoResponse:
    """The cluster in numbers. Cost: its nodes and tasks. `engine`: None: unknown."""
    cluster = next(iter(view.all(Cluster)), Cluster())
    nodes = list(view.all(Node))
    leader = [n.id for n in nodes if n.manager_status is not None and n.manager_status.leader]
    running = sum(
        t.status is not None and t.status.state == TaskState.RUNNING for t in view.all(Task)
    )
    return GetInfoResponse(
        cluster_id=cluster.id,
        node_id=node_id,
        version=version,
        store_engine=cluster.store_engine,
        revision=view.revision,
        nodes=len(nodes),
        nodes_ready=sum(n.status is not None and n.status.state == NodeState.READY for n in nodes),
        managers=sum(n.manager_status is not None for n in nodes),
        services=view.count(Service),
        tasks=view.count(Task),
        tasks_running=running,
        stacks=view.count(Stack),
        leader_node_id=leader[0] if leader else "",
        manager_addrs=manager_addrs(view),
        root_ca_pem=cluster.root_ca_pem,
        store_version=engine.version if engine is not None else "",
        store_bytes=engine.bytes if engine is not None else 0,
        store_bytes_used=engine.bytes_used if engine is not None else 0,
        managers_reachable=sum(is_reachable(n) for n in nodes),
    )


def get(view: View, request: GetRequest, *, now_ns: int) -> GetResponse:
    """One object with what belongs to it. Raises NotFound, Invalid (ambiguous)."""
    o: Any = find(view, served(request.kind), request.ref)
    revision: ServiceRevision | None = None
    status = None
    if isinstance(o, Task):
        revision = view.get(ServiceRevision, f"{o.service_id}.{o.spec_version}")
    if isinstance(o, Service):
        revision = previous_revision(view, o)
        status = service_status(view, o, now_ns)
    return GetResponse(
        object=present(o),
        revision=present_revision(revision) if revision is not None else None,
        service_status=status,
    )


def list_objects(view: View, request: ListRequest, *, now_ns: int) -> ListResponse:
    """All objects of a kind that pass the filters, in order. Raises Invalid, NotFound."""
    cls = served(request.kind)
    test = compile_filters(view, request.kind, request.filters)
    found = [o for o in candidates(view, request.kind, cls, request.filters) if test(o)]
    found.sort(key=_task_order(view) if request.kind == Kind.TASK else _order)
    statuses: tuple[ServiceStatus, ...] = ()
    if request.with_status and request.kind == Kind.SERVICE:
        causes = Causes(view, now_ns)
        statuses = tuple(service_status(view, s, now_ns, causes) for s in found)
    return ListResponse(
        objects=tuple(present(o) for o in found),
        service_statuses=statuses,
        revision=view.revision,
    )


def explain_task(view: View, ref: str, *, now_ns: int) -> ExplainTaskResponse:
    """Why a task is where it is, or nowhere. Raises NotFound, Invalid."""
    task = find(view, Task, ref)
    table = NodeTable.build(view)
    found = explain(table, view, task)
    place = standing(view, table, task, now_ns=now_ns)
    held = place.held_back
    if held:
        found = structs.replace(found, summary=f"{found.summary}; {held[0]}", hint=place.hint)
    return structs.replace(found, queue=place.queue, queue_position=place.position, held_back=held)


def _order(o: Any) -> tuple[str, int, str]:
    return name_of(o), o.meta.created_at_ns if o.meta else 0, o.id


def _task_order(view: View) -> Any:
    """Service, slot (in global services the node), then creation."""
    names = {s.id: name_of(s) for s in view.all(Service)}
    nodes = {n.id: name_of(n) for n in view.all(Node)}

    def key(t: Task) -> tuple[str, int, str, int, str]:
        created_ns = t.meta.created_at_ns if t.meta else 0
        node = "" if t.slot else nodes.get(t.node_id, t.node_id)
        return names.get(t.service_id, t.service_id), t.slot, node, created_ns, t.id

    return key
