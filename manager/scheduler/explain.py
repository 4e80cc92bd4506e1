"""Why a task is nowhere: the filters' account over all nodes, in numbers and in words.

`account` counts each node once, where it falls out first. `reason` is the one line that stands in a
pending task's status; `explain` is the whole answer for one task, worked out from a view on demand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from manager.scheduler.filters import (
    FILTERS,
    Rejection,
    fits,
    platforms_text,
    rejection,
    shortage,
    unseen,
    unsuitable,
)
from manager.scheduler.requirement import Requirement
from manager.scheduler.table import NodeInfo, NodeTable
from manager.store import View
from swarm import states
from swarm.quantities import format_bytes, format_cpus
from swarm.v1 import ExplainTaskResponse, FilterResult, Node, Service, Task, TaskState

_DIMENSION_NAMES = {"cpu": "CPU", "memory": "memory", "gpu": "GPUs"}


@dataclass(frozen=True, slots=True)
class Account:
    """What the filters did; nodes_fit and the counts of `filters` add up to nodes_total."""

    nodes_total: int
    nodes_fit: int
    filters: tuple[FilterResult, ...]
    # No node could take the task even if nothing ran on it and every node were ready; nobody knows
    # of one that was never heard.
    never: bool


def account(table: NodeTable, need: Requirement, service_id: str, node_id: str = "") -> Account:
    """Asks every node, or the one named, and counts."""
    infos = _candidates(table, node_id)
    fit = 0
    never = True
    found: dict[tuple[str, str], list[tuple[Rejection, NodeInfo]]] = {}
    for info in infos:
        never = never and not _may_ever(info, need)
        rejected = rejection(info, need, service_id)
        if rejected is None:
            fit += 1
        else:
            found.setdefault((rejected.filter, rejected.detail), []).append((rejected, info))
    order = sorted(found, key=lambda k: (FILTERS.index(k[0]), -len(found[k]), k[1]))
    results = tuple(_result(key, found[key], len(infos), need) for key in order)
    return Account(len(infos), fit, results, never and bool(infos))


def _may_ever(info: NodeInfo, need: Requirement) -> bool:
    if unseen(info.node):
        return True
    return unsuitable(info.node, need) is None and shortage(info, need, empty=True) is None


def ceiling(nodes: Iterable[Node], need: Requirement, *, enough: int) -> int:
    """How many tasks with this need the nodes could hold if nothing else ran on them and every one
    were ready, but not those that were removed; counted no further than `enough`. One that was
    never heard might hold any number. O(nodes).
    """
    count = 0
    for node in nodes:
        if count >= enough:
            break
        if node.revoked:
            continue
        if unseen(node):
            return enough
        if unsuitable(node, need) is None:
            count += fits(NodeInfo(node), need, "")
    return min(count, enough)


def _candidates(table: NodeTable, node_id: str) -> list[NodeInfo]:
    if not node_id:
        return [info for _, info in sorted(table.nodes.items())]
    info = table.nodes.get(node_id)
    return [info] if info is not None else []


def _result(
    key: tuple[str, str],
    rejected: list[tuple[Rejection, NodeInfo]],
    total: int,
    need: Requirement,
) -> FilterResult:
    kind, detail = key
    result = FilterResult(filter=kind, detail=detail, nodes=len(rejected))
    if kind != "resources":
        return _with(result, _sentence(kind, detail, len(rejected), need))
    best, where = max(rejected, key=lambda pair: (pair[0].best, pair[1].id))
    of = f"{len(rejected)} of {_nodes(total)}"
    if detail.startswith("device "):
        message = f"{of} without a {detail}; nodes offer GPUs only"
    elif best.best == 0 and best.needed == 1 and ("=" in detail or " " in detail):
        message = f"{of} without {detail} free"
    else:
        amount = f"need {_amount(detail, best.needed)}"
        free = f"best free {_amount(detail, best.best)} on {where.name}"
        message = f"{of} short of {_DIMENSION_NAMES.get(detail, detail)}: {amount}, {free}"
    return FilterResult(
        filter=kind,
        detail=detail,
        nodes=len(rejected),
        needed=best.needed,
        best=best.best,
        best_node=where.name,
        message=message,
    )


def _with(result: FilterResult, message: str) -> FilterResult:
    return FilterResult(
        filter=result.filter, detail=result.detail, nodes=result.nodes, message=message
    )


def _sentence(kind: str, detail: str, nodes: int, need: Requirement) -> str:
    count = _nodes(nodes)
    match kind:
        case "ready":
            return f"{count} {'not seen yet' if detail == 'unknown' else detail}"
        case "availability":
            return f"{count} {'drained' if detail == 'drain' else 'paused'}"
        case "revoked":
            return f"{count} removed from the cluster"
        case "constraint":
            verb = "does" if nodes == 1 else "do"
            return f"{count} {verb} not satisfy {detail}"
        case "platform":
            return f"{count} of another platform than {platforms_text(need)}"
        case "runtime":
            return f"{count} without {f'runtime {detail}' if detail else 'a container engine'}"
        case "host_port":
            return f"{count} {'has' if nodes == 1 else 'have'} host port {detail} taken"
        case _:
            verb = "runs" if nodes == 1 else "run"
            return f"{count} {verb} the service's {need.max_replicas} replicas per node already"


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


def _amount(dimension: str, value: int) -> str:
    if dimension == "cpu":
        return format_cpus(value)
    if dimension == "memory":
        return format_bytes(value)
    return str(value)


def reason(account: Account) -> str:
    """The account in one line, for a pending task's status.err."""
    if not account.nodes_total:
        return "no suitable node (the cluster has no nodes)"
    if account.nodes_fit:
        return ""
    # What an operator can most likely do something about comes first: amounts, then the rest.
    parts: Iterable[FilterResult] = sorted(
        account.filters, key=lambda f: (f.filter != "resources", FILTERS.index(f.filter), -f.nodes)
    )
    return f"no suitable node ({'; '.join(f.message for f in parts)})"


def _hint(account: Account, *, gone: bool) -> str:
    """What could be done, by what rejects the most nodes."""
    if gone:
        return "wait: the task is placed when the control loop comes to it"
    if not account.nodes_total:
        return "join a node"
    worst = max(account.filters, key=lambda f: f.nodes)
    return {
        "ready": "bring the nodes that are down back, or join another",
        "availability": "set a node's availability to active",
        "revoked": "join another node",
        "constraint": "label a node so that it satisfies the constraints, or relax them",
        "platform": "join a node of the platform, or use an image for several platforms",
        "runtime": "join a node that offers the runtime, or choose another",
        "resources": f"lower reservations of {worst.detail}, free some, or add a node",
        "host_port": "publish the port in ingress mode, choose another, or add a node",
        "max_replicas": "raise max_replicas_per_node, lower the replicas, or add a node",
    }[worst.filter]


def explain(view: View, task: Task) -> ExplainTaskResponse:
    """Why the task is where it is, or why it is nowhere. Works out the whole table: O(cluster).

    For a task that has a node, the account says where else it would fit, without its own claim.
    """
    table = NodeTable.build(view)
    table.sync_task(task.id, None, view)
    need = table.requirement(task, view)
    state = task.status.state if task.status else TaskState.NEW
    waiting = state < TaskState.ASSIGNED
    only = task.node_id if waiting else ""
    result = account(table, need, task.service_id, only)
    service = view.get(Service, task.service_id)
    name = service.spec.name if service and service.spec else task.service_id
    subject = f"task {name}.{task.slot or task.node_id}"
    if states.ended(state):
        err = task.status.err if task.status else ""
        summary = f"{subject} has ended: {states.label(state)}{f' ({err})' if err else ''}"
        hint = ""
    elif not waiting:
        info = table.nodes.get(task.node_id)
        where = f"node {info.name if info else task.node_id}"
        summary = f"{subject} is on {where}: {states.label(state)}"
        hint = ""
    elif result.nodes_fit:
        summary = f"{subject} waits to be placed; {_nodes(result.nodes_fit)} can take it"
        hint = _hint(result, gone=True)
    else:
        tail = "; no node could take it even if empty" if result.never else ""
        summary = f"{subject} waits: {reason(result)}{tail}"
        hint = _hint(result, gone=False)
    return ExplainTaskResponse(
        summary=summary,
        nodes_total=result.nodes_total,
        nodes_fit=result.nodes_fit,
        filters=result.filters,
        never=result.never,
        hint=hint,
    )
