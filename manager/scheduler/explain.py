"""Why a task is nowhere, or where it is: the filters' account in words.

`account` counts each node once, where it falls out first (account.py). `reason` is that in one
line, `pending_reason` what stands in a pending task's status; `explain` is the whole answer for one
task, worked out from a view on demand: of a placed task also how its node compares with the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from manager.scheduler.account import Fallen, count_nodes
from manager.scheduler.decision import decision
from manager.scheduler.filters import FILTERS, fits, unseen, unsuitable
from manager.scheduler.nodeinfo import NodeInfo
from manager.scheduler.refusals import said
from manager.scheduler.requirement import Requirement
from manager.scheduler.table import NodeTable
from manager.store import View
from swarm import states
from swarm.gpus import format_share
from swarm.quantities import format_bytes, format_cpus
from swarm.v1 import ExplainTaskResponse, FilterResult, Node, Service, Task, TaskState

_DIMENSION_NAMES = {
    "cpu": "CPU",
    "memory": "memory",
    "pids": "processes",
    "gpu": "GPUs",
    "gpu_share": "a GPU to share",
    "gpu_memory": "GPU memory",
}

FOR_EVER = "; no node could take it even if empty"
"""What a pending task's reason ends with where waiting does not help."""


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
    key = (need, service_id if need.of_service else "", node_id)
    kept = table.accounts.get(key)
    if isinstance(kept, Account):
        return kept
    counts = count_nodes(table, need, service_id, node_id)
    results = tuple(_result(fallen, counts.total, need) for fallen in counts.fallen)
    made = Account(counts.total, counts.fit, results, counts.never)
    table.accounts[key] = made
    return made


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


def _result(fallen: Fallen, total: int, need: Requirement) -> FilterResult:
    return FilterResult(
        filter=fallen.filter,
        detail=fallen.detail,
        nodes=fallen.nodes,
        needed=fallen.needed if fallen.filter == "resources" else 0,
        best=fallen.best,
        best_node=fallen.best_node,
        message=_message(fallen, total, need),
        never_nodes=fallen.never,
    )


def _message(fallen: Fallen, total: int, need: Requirement) -> str:
    if fallen.filter != "resources":
        return _sentence(fallen.filter, fallen.detail, fallen.nodes, need)
    of = f"{fallen.nodes} of {_nodes(total)}"
    if fallen.detail.startswith("device "):
        return f"{of} without a {fallen.detail}; nodes offer GPUs only"
    text = f"{of} {_short(fallen)}"
    for also in fallen.also:
        who = "which is" if fallen.nodes == 1 else f"{also.nodes} of them"
        text += f" ({who} also {_short(also)})"
    return text


def _short(fallen: Fallen) -> str:
    detail = fallen.detail
    if _is_thing(fallen):
        return f"without {detail} free"
    if detail.startswith("gpu "):
        kind = "GPU" if fallen.needed == 1 else "GPUs"
        free = f"best {fallen.best} on {fallen.best_node}"
        return f"without {kind} {detail.removeprefix('gpu ')}: need {fallen.needed}, {free}"
    amount = f"need {_amount(detail, fallen.needed)}"
    free = f"best free {_amount(detail, fallen.best)} on {fallen.best_node}"
    return f"short of {_DIMENSION_NAMES.get(detail, detail)}: {amount}, {free}"


def _is_thing(fallen: Fallen) -> bool:
    """Whether it is one thing with a name: an instance of a kind, or a GPU by its id."""
    detail = fallen.detail
    if detail.startswith("gpu "):
        return not detail.startswith(("gpu of ", "gpu with "))
    return "=" in detail


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
            return f"{count} of another platform than {detail}"
        case "runtime" if is_hindrance(detail):
            return f"{count} {'takes' if nodes == 1 else 'take'} no new tasks now ({detail})"
        case "runtime":
            return f"{count} without {f'runtime {detail}' if detail else 'a container engine'}"
        case "host_port":
            return f"{count} {'has' if nodes == 1 else 'have'} host port {detail} taken"
        case "affinity":
            verb = "does" if nodes == 1 else "do"
            return f"{count} {verb} not satisfy {detail}"
        case _:
            verb = "runs" if nodes == 1 else "run"
            return f"{count} {verb} the service's {need.max_replicas} replicas per node already"


def is_hindrance(detail: str) -> bool:
    """Whether the runtimes are there and take no new tasks (Hindrance.of); no runtime's name has a
    colon.
    """
    return ": " in detail


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


def _amount(dimension: str, value: int) -> str:
    if dimension == "cpu":
        return format_cpus(value)
    if dimension in ("memory", "gpu_memory"):
        return format_bytes(value)
    if dimension == "gpu_share":
        return format_share(value)
    return str(value)


def reason(account: Account) -> str:
    """The account in one line."""
    if not account.nodes_total:
        return "no suitable node (the cluster has no nodes)"
    if account.nodes_fit:
        return ""
    # What an operator can most likely do something about comes first: amounts, then what may change
    # by itself, then what nodes are.
    parts = sorted(account.filters, key=_actionable)
    texts = (f.message if account.never else _with_never(f) for f in parts)
    return f"no suitable node ({'; '.join(texts)})"


def _actionable(found: FilterResult) -> tuple[bool, bool, int, int]:
    never = found.never_nodes == found.nodes
    return (found.filter != "resources", never, FILTERS.index(found.filter), -found.nodes)


def pending_reason(account: Account) -> str:
    """The reason, and whether it is for ever: for a pending task's status.err."""
    return reason(account) + (FOR_EVER if account.never else "")


def _with_never(found: FilterResult) -> str:
    """The filter's sentence, and of amounts which nodes would not suffice even if they were empty.
    Of what a node is, the sentence says so by itself.
    """
    if found.filter != "resources" or not found.never_nodes:
        return found.message
    who = "" if found.never_nodes == found.nodes else f"{found.never_nodes} of them "
    return f"{found.message}, {who}not even if empty"


def _hint(account: Account, *, gone: bool) -> str:
    """What could be done, by what rejects the most nodes."""
    if gone:
        return "wait: the task is placed when the control loop comes to it"
    if not account.nodes_total:
        return "join a node"
    worst = max(account.filters, key=lambda f: f.nodes)
    if worst.filter == "runtime" and is_hindrance(worst.detail):
        return "see what is wrong with the runtime on these nodes, or join another node"
    return {
        "ready": "bring the nodes that are down back, or join another",
        "availability": "set a node's availability to active",
        "revoked": "join another node",
        "constraint": "label a node so that it satisfies the constraints, or relax them",
        "platform": "join a node of the platform, or use an image for several platforms",
        "runtime": "join a node that offers the runtime, or choose another",
        "resources": _more_of(worst, never=account.never),
        "host_port": "publish the port in ingress mode, choose another, or add a node",
        "max_replicas": "raise max_replicas_per_node, lower the replicas, or add a node",
        "affinity": "start the service that is asked for, move the one that is not, or relax it",
    }[worst.filter]


def _more_of(worst: FilterResult, *, never: bool) -> str:
    if never:
        return f"lower reservations of {worst.detail}, or add a node that has as much"
    return f"lower reservations of {worst.detail}, free some, or add a node"


def _same_version(one: Task, other: Task) -> bool:
    return one.spec_version == other.spec_version and one.job_iteration == other.job_iteration


def explain(table: NodeTable, view: View, task: Task) -> ExplainTaskResponse:
    """Why the task is where it is, or why it is nowhere. `table`: of the view.

    For a task that has a node, the account says where else it would fit, without its own claim,
    which the table has lost then.
    """
    table.sync_task(task.id, None, view)
    need = table.requirement(task, view)
    state = task.status.state if task.status else TaskState.NEW
    waiting = state < TaskState.ASSIGNED
    only = task.node_id if waiting else ""
    result = account(table, need, task.service_id, only)
    service = view.get(Service, task.service_id)
    name = service.spec.name if service and service.spec else task.service_id
    subject = f"task {name}.{task.slot or task.node_id}"
    why = ""
    if states.ended(state):
        err = task.status.err if task.status else ""
        summary = f"{subject} has ended: {states.label(state)}{f' ({err})' if err else ''}"
        hint = ""
    elif not waiting:
        info = table.nodes.get(task.node_id)
        where = f"node {info.name if info else task.node_id}"
        summary = f"{subject} is on {where}: {states.label(state)}"
        hint = ""
        why = decision(table, task, need) if info is not None else ""
    elif result.nodes_fit:
        summary = f"{subject} waits to be placed; {_nodes(result.nodes_fit)} can take it"
        hint = _hint(result, gone=True)
    else:
        summary = f"{subject} waits: {pending_reason(result)}"
        hint = _hint(result, gone=False)
    others = (t for t in view.by(Task, "service", task.service_id) if _same_version(t, task))
    if refusals := said(view, others):
        if state == TaskState.RUNNING:
            why = f"{why}; nodes that could not run it: {refusals}".removeprefix("; ")
        else:
            summary = f"{summary}; nodes that could not run it: {refusals}"
    return ExplainTaskResponse(
        summary=summary,
        nodes_total=result.nodes_total,
        nodes_fit=result.nodes_fit,
        filters=result.filters,
        never=result.never,
        hint=hint,
        decision=why,
    )
