"""Whose place a task may take: victims of a lower priority. Pure; tried out on the table.

For a task that fits nowhere, each node that could take it is asked what would have to go there:

1. Tasks that are stopping count as gone, and reservations of others as filled. If the task fits
   then, nobody has to go: it waits for them.
2. Otherwise all tasks of a lower priority are taken out. If the task does not fit even so, the node
   is none.
3. Then they are let back in, one by one, as long as the task still fits: highest priority first,
   then smallest, then longest running. What stays out are the victims; so none is stopped that
   would not help. A gang's task costs its whole gang, and is let in or not with all of it.

The node with the cheapest victims wins: lowest priority of the dearest, then fewest, then least
time that they have run together, then the node's id. Method: Kubernetes' preemption (dry run on
each node, reprieve in order of priority; pkg/scheduler/framework/preemption), with the number of
victims before their times and gangs whole.

Cost: nodes in order of the lowest priority that runs there, at most NODES_MAX of them; two changes
of the table for each task of a lower priority on them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from manager.scheduler.filters import barred, unavailable
from manager.scheduler.placement import Group
from manager.scheduler.table import Claim, NodeInfo, NodeTable
from manager.scheduler.trial import Trial, part_of
from manager.store import View
from swarm.v1 import Task, TaskState

# So many nodes are asked for one need. Those left out have nothing cheaper by priority, though they
# may have fewer or younger tasks of the same.
NODES_MAX = 100


@dataclass(frozen=True, slots=True)
class Choice:
    """A node, and who has to go there and elsewhere (the rest of their gangs); nobody: those that
    are stopping already will do.
    """

    node_id: str
    victims: tuple[Task, ...] = ()
    # Members of the victims' gangs, on whatever node.
    gangs: tuple[Task, ...] = ()


class Facts:
    """What the search has to know beyond the table; answers are those of one tick."""

    def __init__(
        self,
        view: View,
        now_ns: int,
        *,
        priority: Callable[[str], int],
        gang: Callable[[str], Sequence[Task]],
        reserved: Callable[[str], Sequence[Group]],
    ) -> None:
        """`priority` of a service by id; `gang`: the tasks of a service that stop with any of them,
        empty where it is no gang; `reserved`: what is to find room on a node before others do.
        """
        self.view = view
        self.now_ns = now_ns
        self.priority = priority
        self.gang = gang
        self.reserved = reserved


Cost = tuple[int, int, int, str]
_NOBODY = -(10**9)


class Search:
    """Finds place after place for tasks of one need, and remembers what nodes have said."""

    def __init__(self, table: NodeTable, facts: Facts, group: Group, priority: int) -> None:
        self._table = table
        self._facts = facts
        self._group = group
        self._priority = priority
        self._left = self._nodes()
        self._asked = 0
        self._found: list[tuple[Cost, Choice]] = []
        self.asked = 0  # nodes, for whoever bounds the work

    def next(self) -> Choice | None:
        """The cheapest choice now; None: there is none. It is for the caller to carry it out before
        he asks again: to stop the victims, and to reserve the place.
        """
        while True:
            self._ask_more()
            # What was found earlier may not hold any more: places were taken since.
            while self._found:
                cost, choice = heapq.heappop(self._found)
                again = self._on_node(self._table.nodes[choice.node_id])
                if again is None:
                    continue
                if again[0] <= cost or not self._found or again[0] <= self._found[0][0]:
                    # It may have room for another one.
                    heapq.heappush(self._found, again)
                    return again[1]
                heapq.heappush(self._found, again)
            if self._asked >= NODES_MAX:
                return self._more()
            # Dearer nodes were left out for the sake of one that will not do any more.
            candidate = next(self._left, None)
            if candidate is None:
                return None
            self._left = _first(candidate, self._left)

    def _ask_more(self) -> None:
        """Asks nodes until none of the others can be cheaper than what was found."""
        while self._asked < NODES_MAX:
            best = self._found[0][0] if self._found else None
            candidate = next(self._left, None)
            if candidate is None:
                return
            lowest, info = candidate
            if best is not None and lowest > best[0]:
                self._left = _first(candidate, self._left)
                return
            self._asked += 1
            self._ask(info)

    def _more(self) -> Choice | None:
        """None of the nodes asked will do (any more): the others are asked until one does."""
        for _, info in self._left:
            found = self._on_node(info)
            if found is not None:
                heapq.heappush(self._found, found)
                return found[1]
        return None

    def _ask(self, info: NodeInfo) -> None:
        found = self._on_node(info)
        if found is not None:
            heapq.heappush(self._found, found)

    def _nodes(self) -> Iterator[tuple[int, NodeInfo]]:
        """Nodes that could take the task and have something that could go, most promising first:
        by the lowest priority there; where something stops already, before all.
        """
        group, table = self._group, self._table
        if group.node_id:
            own = table.nodes.get(group.node_id)
            infos = [own] if own is not None else []
        else:
            infos = list(table.nodes.values())
        found = []
        lower: dict[str, int | None] = {}
        for info in infos:
            lowest = None
            for service_id in info.by_service:
                if service_id not in lower:
                    priority = self._facts.priority(service_id)
                    lower[service_id] = priority if priority < self._priority else None
                here = lower[service_id]
                if here is not None and (lowest is None or here < lowest):
                    lowest = here
            if len(table.claims_on(info.id)) > info.active:
                lowest = _NOBODY
            if lowest is None or unavailable(info.node) is not None:
                continue
            if barred(info.node, group.requirement) is None:
                found.append((lowest, info.id, info))
        found.sort(key=lambda f: f[:2])
        return iter([(lowest, info) for lowest, _, info in found])

    def _on_node(self, info: NodeInfo) -> tuple[Cost, Choice] | None:
        """Who would have to go from the node, and what that costs; None: it does not help."""
        self.asked += 1
        facts = self._facts
        claims = sorted(self._table.claims_on(info.id).values(), key=lambda c: c.task_id)
        lower = [c for c in claims if c.active and facts.priority(c.service_id) < self._priority]
        with Trial(self._table, facts.view, facts.now_ns) as trial:
            for claim in claims:
                if not claim.active:
                    trial.out(claim.task_id)
            for group in facts.reserved(info.id):
                trial.place(group)
            if trial.fits(info, self._group):
                return (_NOBODY, 0, 0, info.id), Choice(info.id)
            if not lower:
                return None
            for claim in lower:
                trial.out(claim.task_id)
            if not trial.fits(info, self._group):
                return None
            units = self._units(info, lower)
            out = []
            for unit in units:
                trial.back(unit.here)
                if not trial.fits(info, self._group):
                    for task_id in unit.here:
                        trial.out(task_id)
                    out.append(unit)
        victims = tuple(t for u in out for i in u.here if (t := facts.view.get(Task, i)))
        gangs = tuple(t for u in out for t in u.others)
        cost = (
            max(u.priority for u in out),
            sum(len(u.here) + len(u.others) for u in out),
            sum(u.run_ns for u in out),
            info.id,
        )
        return cost, Choice(info.id, victims, gangs)

    def _units(self, info: NodeInfo, lower: list[Claim]) -> list[_Unit]:
        """The tasks, those of one gang together, in the order in which they are let in again."""
        facts = self._facts
        by_unit: dict[str, list[Claim]] = {}
        others: dict[str, tuple[Task, ...]] = {}
        for claim in lower:
            if claim.service_id not in others:
                members = facts.gang(claim.service_id)
                others[claim.service_id] = tuple(t for t in members if t.node_id != info.id)
                if members:
                    by_unit.setdefault(claim.service_id, [])
            whole = claim.service_id if claim.service_id in by_unit else claim.task_id
            by_unit.setdefault(whole, []).append(claim)
        units = []
        for claims in by_unit.values():
            service_id = claims[0].service_id
            rest = others[service_id]
            ran = sum(facts.now_ns - self._started_ns(c.task_id) for c in claims)
            ran += sum(facts.now_ns - self._started_ns(t.id) for t in rest)
            units.append(
                _Unit(
                    priority=facts.priority(service_id),
                    size=sum(part_of(info, c) for c in claims),
                    run_ns=ran,
                    here=tuple(c.task_id for c in claims),
                    others=rest,
                )
            )
        return sorted(units, key=lambda u: (-u.priority, -len(u.others), u.size, -u.run_ns, u.here))

    def _started_ns(self, task_id: str) -> int:
        """Since when the task runs; one that does not yet loses nothing."""
        task = self._facts.view.get(Task, task_id)
        status = task.status if task is not None else None
        if task is None or status is None or status.state != TaskState.RUNNING:
            return self._facts.now_ns
        # Not the status' time: that is on the node's clock.
        return task.running_since_ns or (task.meta.updated_at_ns if task.meta else 0)


@dataclass(frozen=True, slots=True)
class _Unit:
    """What stops together: a task, or a gang's tasks on the node and its others."""

    priority: int
    size: float
    run_ns: int
    here: tuple[str, ...]
    others: tuple[Task, ...]


def _first(
    candidate: tuple[int, NodeInfo], rest: Iterator[tuple[int, NodeInfo]]
) -> Iterator[tuple[int, NodeInfo]]:
    yield candidate
    yield from rest
