"""When and where a job that is first in order but fits nowhere will fit, and who may go before it.
Pure; tried out on the table.

Method: EASY backfill (Lifka, "The ANL/IBM SP Scheduling System", 1995): the first job that is
blocked, and only it, has a reservation: the nodes where it fits soonest, and that time. Others may
have what is free there if they end before that time, or if the first job still fits beside them. So
it never starts later than it was told, whatever is filled in.

When tasks end: those of a job with a timeout at the latest at its end; those that are stopping at
the end of their grace period. Of other jobs' tasks it is not known, so the nodes are preferred
where fewest of them have to end, and only what fits beside the first job goes before it. Services
do not end: a job that fits only where a service would have to go has no reservation, for it would
keep nodes empty for nothing. What it takes a task to start is taken as nothing.

Cost: two changes of the table for each task of a job that is looked at, at most CLAIMS_MAX of them;
once for each job that becomes the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from manager.scheduler.filters import barred, fits
from manager.scheduler.placement import Group
from manager.scheduler.table import Claim, NodeInfo, NodeTable
from manager.scheduler.trial import Trial, part_of
from manager.store import View
from swarm.v1 import Task

# A time that is not known: later than all that are.
UNKNOWN_NS = 1 << 62
CLAIMS_MAX = 20_000


@dataclass(frozen=True, slots=True)
class Spot:
    """So many tasks on one node, once these have ended (task ids)."""

    tasks: int
    leaving: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Reservation:
    """`at_ns`: when it will be met at the latest; UNKNOWN_NS: nobody knows."""

    at_ns: int
    spots: Mapping[str, Spot] = field(default_factory=dict)


# When, how many tasks of unknown end have to go, and how many tasks more the node can take then.
_Step = tuple[int, int, int]


def soonest(
    table: NodeTable,
    view: View,
    now_ns: int,
    group: Group,
    wanted: int,
    ends_ns: Callable[[Claim], int | None],
) -> Reservation | None:
    """Where and when `wanted` tasks of the group will fit at once. `ends_ns` of a claim: when it is
    given up at the latest, UNKNOWN_NS, or None for never. None: not before something ends that has
    no end.
    """
    steps: list[tuple[int, int, str, int, frozenset[str]]] = []
    budget = CLAIMS_MAX
    best: tuple[int, int] | None = None  # with one task wanted: the best so far
    for info in _nodes(table, group):
        if budget <= 0:
            break
        leaving = _leaving(table, info, ends_ns)
        found, used = _curve(table, view, now_ns, group, info, leaving, wanted, best)
        budget -= used
        before = 0
        for at_ns, gone, room in found:
            ids = frozenset(i for _, _, i in leaving[:gone])
            unknown = sum(1 for end, _, _ in leaving[:gone] if end == UNKNOWN_NS)
            steps.append((at_ns, unknown, info.id, room - before, ids))
            before = room
        if wanted == 1 and found:
            at_ns, unknown = steps[-1][0], steps[-1][1]
            best = min(best or (at_ns, unknown), (at_ns, unknown))
    return _combined(steps, wanted)


def _nodes(table: NodeTable, group: Group) -> list[NodeInfo]:
    """Nodes that could take the group's tasks, those with the fewest tasks first."""
    if group.node_id:
        own = table.nodes.get(group.node_id)
        infos = [own] if own is not None else []
    else:
        infos = sorted(table.nodes.values(), key=lambda n: (len(table.claims_on(n.id)), n.id))
    need = group.requirement
    return [n for n in infos if barred(n.node, need) is None]


def _leaving(
    table: NodeTable, info: NodeInfo, ends_ns: Callable[[Claim], int | None]
) -> list[tuple[int, float, str]]:
    """The claims on the node that are given up some time: when, and those of unknown end largest
    first, so that few have to go.
    """
    out = []
    for claim in table.claims_on(info.id).values():
        end = ends_ns(claim)
        if end is not None:
            size = part_of(info, claim)
            out.append((end, -size if end == UNKNOWN_NS else 0.0, claim.task_id))
    return sorted(out)


def _curve(
    table: NodeTable,
    view: View,
    now_ns: int,
    group: Group,
    info: NodeInfo,
    leaving: list[tuple[int, float, str]],
    wanted: int,
    best: tuple[int, int] | None,
) -> tuple[list[_Step], int]:
    """How many tasks the node can take as its claims end: (when, claims gone, tasks); and how many
    changes of the table it took. It ends where all that is wanted fits.
    """
    steps: list[_Step] = []
    room = min(wanted, fits(info, group.requirement, group.service_id))
    if room > 0:
        steps.append((now_ns, 0, room))
    unknown = used = 0
    with Trial(table, view, now_ns) as trial:
        for gone, (end, _, task_id) in enumerate(leaving, start=1):
            unknown += end == UNKNOWN_NS
            if room >= wanted or (best is not None and (end, unknown) >= best):
                break
            trial.out(task_id)
            used += 2
            now = min(wanted, fits(info, group.requirement, group.service_id))
            if now > room:
                room = now
                steps.append((end, gone, room))
    return steps, used


def _combined(
    steps: list[tuple[int, int, str, int, frozenset[str]]], wanted: int
) -> Reservation | None:
    """The first steps that suffice together."""
    spots: dict[str, Spot] = {}
    at_ns = 0
    left = wanted
    for end, _, node_id, tasks, ids in sorted(steps, key=lambda s: s[:4]):
        if left <= 0:
            break
        taken = min(tasks, left)
        left -= taken
        at_ns = max(at_ns, end)
        before = spots.get(node_id)
        spots[node_id] = Spot(taken + (before.tasks if before else 0), ids)
    return Reservation(at_ns, spots) if left <= 0 else None


def all_fit(
    table: NodeTable,
    view: View,
    now_ns: int,
    node_id: str,
    owners: Sequence[tuple[Spot, Group]],
) -> bool:
    """Whether all that have a spot on the node will fit there as it is in the table now, once what
    was to leave has left. Each group has the tasks (or `ghosts`) of its spot.
    """
    leaving = frozenset[str]().union(*(spot.leaving for spot, _ in owners))
    with Trial(table, view, now_ns) as trial:
        here = table.claims_on(node_id)
        for task_id in sorted(i for i, c in here.items() if i in leaving or not c.active):
            trial.out(task_id)
        return all(len(trial.place(group)) == len(group.tasks) for _, group in owners)


def ghosts(key: str, template: Task, count: int) -> list[Task]:
    """Tasks that stand in for a group's in a trial."""
    return [
        Task(
            id=f"reserved/{key}/{i}",
            service_id=template.service_id,
            spec_version=template.spec_version,
            slot=template.slot,
            node_id="",
            status=template.status,
            desired_state=template.desired_state,
        )
        for i in range(count)
    ]
