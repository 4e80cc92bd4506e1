"""What the API does about scheduling beyond specs: queues as they stand, and asking for tasks to be
moved.

The control loop moves the tasks (manager/control/rebalance.py): what is written here is the wish,
`Service.rebalance_status`, and only on services whose tasks can move.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from manager.api.lookup import find, name_of, quoted, spec_of
from manager.api.services import RemovalPending
from manager.api.validate import mode_name
from manager.store import Draft, View
from swarm import errors, states
from swarm.v1 import (
    Kind,
    Node,
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
    """What was asked to be rebalanced, for the answer and the audit line."""

    kind: Kind
    id: str
    name: str
    response: RebalanceResponse


def rebalance(draft: Draft, request: RebalanceRequest) -> Asked:
    """Asks the control loop to move tasks of a service, or away from a node; a dry run writes
    nothing. Raises NotFound, Invalid, Conflict (the service is being removed).
    """
    if bool(request.service) == bool(request.node):
        raise errors.Invalid("name either a service or a node to rebalance")
    if request.service:
        service = find(draft, Service, request.service)
        _check_movable(service)
        asked = [service]
        kind, id_, name, node_id = Kind.SERVICE, service.id, name_of(service), ""
    else:
        node = find(draft, Node, request.node)
        asked = movable_on(draft, node.id)
        kind, id_, name, node_id = Kind.NODE, node.id, name_of(node), node.id
    if request.dry_run:
        raise errors.Unsupported("a rebalance cannot be tried without doing it yet")
    for service in asked:
        status = RebalanceStatus(running=True, started_at_ns=draft.now_ns, node_id=node_id)
        draft.put(structs.replace(service, rebalance_status=status))
    response = RebalanceResponse(service_ids=tuple(s.id for s in asked))
    return Asked(kind, id_, name, response)


def movable_on(view: View, node_id: str) -> list[Service]:
    """The services with tasks on a node that can go elsewhere, by name."""
    ids = {t.service_id for t in view.by(Task, "node", node_id) if states.wanted(t.desired_state)}
    found = [s for s in (view.get(Service, i) for i in ids) if s is not None]
    return sorted(
        (s for s in found if _movable(s) and not s.pending_delete), key=lambda s: (name_of(s), s.id)
    )


def _mode(service: Service) -> str:
    mode = spec_of(service).mode
    return mode_name(mode) if mode is not None else "replicated"


def _movable(service: Service) -> bool:
    return _mode(service) not in _WHY_NOT


def _check_movable(service: Service) -> None:
    if service.pending_delete:
        raise RemovalPending(f"{quoted(service)} is being removed", {service.id})
    if not _movable(service):
        mode = _mode(service)
        raise errors.Invalid(
            f"{quoted(service)} is a {mode.replace('-', ' ')}{'' if 'job' in mode else ' service'} "
            f"and cannot be rebalanced: {_WHY_NOT[mode]}"
        )
