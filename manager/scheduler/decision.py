"""Why a placed task is where it is: how its node compares with the others that fit now.

Nothing is kept of a decision: what is said here is worked out from the table as it is now, without
the task's own claim, and says so. So it also shows where a task would go if it were placed again.
"""

from __future__ import annotations

from itertools import combinations

from manager.scheduler.gpus import FAR
from manager.scheduler.gpus.links import NUMA, NVLINK, links_of
from manager.scheduler.nodeinfo import NodeInfo
from manager.scheduler.placement import Group, ranked
from manager.scheduler.requirement import BINPACK, Requirement
from manager.scheduler.table import NodeTable
from swarm.v1 import Task


def decision(table: NodeTable, task: Task, need: Requirement) -> str:
    """One or two sentences; empty where the task's node is not known. The table must not have the
    task's claim.
    """
    info = table.nodes.get(task.node_id)
    if info is None:
        return ""
    group = Group(task.service_id, task.spec_version, need, (task,))
    need = need.on(info.declared)
    if need.gpus is not None and not (need.gpus.ids or need.gpus.all):
        text = _by_policy(table, info, need)
    else:
        text = _by_strategy(table, group, info, need)
    joined = _joined(info, task.assigned_gpus)
    return f"{text}; {joined}" if joined else text


def _by_policy(table: NodeTable, info: NodeInfo, need: Requirement) -> str:
    columns = table.columns
    columns.flush()
    board = columns.board
    keep = columns.of_board(columns.open & columns.masks.suits(need.static)[: columns.n])
    best = board.best(need.gpu_need, keep)
    row = board.row.get(info.id)
    if best is None or row is None:
        return "no node could take it if it were placed now"
    score = board.scores(need.gpu_need, keep)
    if best.node_id == info.id:
        return f"it would go to the same node now: {best.reason}"
    other = table.nodes[best.node_id].name
    if score[row] == FAR:
        return f"placed now it would go to {other} ({best.reason}); its node would not take it"
    before = int((score < score[row]).sum())
    return (
        f"{board.policy}: by the score {_nodes(before)} of {best.fitting} that fit would come "
        f"first now, {other} before all"
    )


def _by_strategy(table: NodeTable, group: Group, info: NodeInfo, need: Requirement) -> str:
    order = ranked(table, group)
    if not order:
        return "no node could take it if it were placed now"
    names = [node.id for node in order]
    strategy = need.strategy or table.strategy
    own = _standing(info, group.service_id, strategy)
    if info.id not in names:
        first = order[0]
        return (
            f"placed now it would go to {first.name} "
            f"({_standing(first, group.service_id, strategy)}); its node would not take it"
        )
    place = names.index(info.id)
    others = [node for node in order if node is not info]
    if not others:
        return f"{strategy}: the only node that fits ({own})"
    if not place:
        head = f"{strategy}: its node comes first of the {len(order)} that fit now ({own})"
        return f"{head}; next {others[0].name} ({_standing(others[0], group.service_id, strategy)})"
    first = order[0]
    return (
        f"{strategy}: its node is number {place + 1} of the {len(order)} that fit now ({own}); "
        f"first {first.name} ({_standing(first, group.service_id, strategy)})"
    )


def _standing(info: NodeInfo, service_id: str, strategy: str) -> str:
    """What it is ranked by."""
    active, share, _ = info.load()
    claimed = f"{share:.0%} claimed"
    if strategy == BINPACK:
        return f"{claimed}, {_tasks(active)}"
    own = info.by_service.get(service_id, 0)
    return f"{own} of the service, {_tasks(active)}, {claimed}"


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"


def _nodes(count: int) -> str:
    return f"{count} node{'' if count == 1 else 's'}"


def _joined(info: NodeInfo, gpus: tuple[str, ...]) -> str:
    """How the task's GPUs are joined, where it has several and the node says so."""
    mine = [g for g in info.usable_gpus if g.uuid in gpus]
    links = links_of(mine) if len(mine) > 1 else ()
    if not links:
        return ""
    worst = min(links[a][b] for a, b in combinations(range(len(mine)), 2))
    names = ", ".join(str(g.index) for g in mine)
    if worst >= NVLINK:
        return f"GPUs {names} are joined by NVLink"
    if worst >= NUMA:
        return f"GPUs {names} are under one NUMA node"
    return f"GPUs {names} are joined neither by NVLink nor by a NUMA node"
