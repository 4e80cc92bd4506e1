"""What the API does about scheduling beyond specs: queues as they stand, and asking for tasks to be
moved.

The control loop moves the tasks (manager/control/rebalance.py): what is written here is the wish,
`Service.rebalance_status`, and only on services whose tasks can move. What would move is worked out
by the same functions, on a frozen copy of the tables and in a thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from manager.api.lookup import find, name_of, quoted, spec_of
from manager.api.services import RemovalPending
from manager.api.validate import mode_name
from manager.control import can_move, plan_moves
from manager.scheduler import NodeTable
from manager.store import Draft, View
from swarm import errors, states
from swarm.v1 import (
    Kind,
    Node,
    PlannedMove,
    RebalanceRequest,
    RebalanceResponse,
    RebalanceStatus,
    Service,
    Task,
)

_WHY_NOT = {
    "global": "it has one task on each node, where it belongs",
    "replicated-job": "tasks of jobs run to their end where they are",
    "global-job": "tasks of jobs run to their end where they are",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be rebalanced: a service, or a node; and the services whose tasks would move."""

    kind: Kind
    id: str
    name: str
    services: tuple[Service, ...]

    @property
    def node_id(self) -> str:
        """The node whose tasks may move away; empty: those of all nodes."""
        return self.id if self.kind is Kind.NODE else ""


def plan(view: View, request: RebalanceRequest, *, now_ns: int) -> RebalanceResponse:
    """What would move. Cost: all nodes and tasks once. Raises as `asked_for`."""
    asked = asked_for(view, request)
    ids = tuple(s.id for s in asked.services)
    table = NodeTable.build(view)
    moves = plan_moves(view, table, ids, now_ns=now_ns, node_id=asked.node_id)
    return RebalanceResponse(
        moves=tuple(
            PlannedMove(
                task_id=move.task_id,
                name=_task_name(view, move.task_id),
                from_node_id=move.from_node_id,
                to_node_id=move.to_node_id,
            )
            for move in moves
        ),
        service_ids=ids,
    )


def ask(draft: Draft, request: RebalanceRequest) -> Asked:
    """Asks the control loop to move tasks; a rebalance that goes on begins anew. Raises as
    `asked_for`.
    """
    asked = asked_for(draft, request)
    for service in asked.services:
        status = RebalanceStatus(running=True, started_at_ns=draft.now_ns, node_id=asked.node_id)
        draft.put(structs.replace(service, rebalance_status=status))
    return asked


def asked_for(view: View, request: RebalanceRequest) -> Asked:
    """What the request names. Raises NotFound, Invalid, Conflict (the service is being removed)."""
    if bool(request.service) == bool(request.node):
        raise errors.Invalid("name either a service or a node to rebalance")
    if request.service:
        service = find(view, Service, request.service)
        _check_movable(service)
        return Asked(Kind.SERVICE, service.id, name_of(service), (service,))
    node = find(view, Node, request.node)
    return Asked(Kind.NODE, node.id, name_of(node), _movable_on(view, node.id))


def _movable_on(view: View, node_id: str) -> tuple[Service, ...]:
    """The services with tasks on a node that can go elsewhere, by name."""
    ids = {t.service_id for t in view.by(Task, "node", node_id) if states.wanted(t.desired_state)}
    found = [s for s in (view.get(Service, i) for i in ids) if s is not None]
    movable = (s for s in found if can_move(s) and not s.pending_delete)
    return tuple(sorted(movable, key=lambda s: (name_of(s), s.id)))


def _check_movable(service: Service) -> None:
    if service.pending_delete:
        raise RemovalPending(f"{quoted(service)} is being removed", {service.id})
    if not can_move(service):
        mode = spec_of(service).mode
        word = mode_name(mode) if mode is not None else "replicated"
        raise errors.Invalid(
            f"{quoted(service)} is a {word.replace('-', ' ')}{'' if 'job' in word else ' service'} "
            f"and cannot be rebalanced: {_WHY_NOT[word]}"
        )


def _task_name(view: View, task_id: str) -> str:
    task = view.get(Task, task_id)
    return name_of(task, view) if task is not None else task_id
