"""Moving tasks so that nodes are loaded evenly: which moves would be better, and doing them.

What is better is what the scheduler would have done: a service's tasks are to be spread evenly over
the branches of each of its spread preferences, outermost first; then be where its affinities are;
then be spread evenly over nodes; and where that makes no difference, nodes are to have equally many
tasks. Each tier is a number of the whole service: the sum of the squares of the counts, or of the
affinities' weights. A move is planned only if the first tier that it changes gets better, so plans
come to an end: the tiers, taken over all services, get smaller with each move (an affinity to other
services' tasks alone can follow these around, see below). Services placed by binpack, and tasks
with GPUs, whose place the GPU policy chose, move for preferences and affinities alone.

`plan_moves` is pure and shows all moves that would follow; the stage `rebalance` takes them a step
at a time (moves.py does the moving) and plans anew at each, for the world goes on meanwhile. Each
slot moves once in a rebalance, and one whose new task failed is left alone, so that it ends,
whatever happens. `Service.rebalance_status` is all that is remembered.

Nodes that failed tasks of the service lately are no targets.

Method: steepest descent by single moves. Nodes of one branch and affinity differ in two counts
only, so the fullest that has a task to give and the emptiest that can take one stand for all.
Cost of a step: all nodes once; a plan looks again only at what changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from msgspec import structs

from manager.control.moves import begin, failed_after, movable, room, update_goes_on
from manager.control.nodes import is_drained
from manager.control.slots import is_live, slot_of
from manager.control.template import mode_of, state_of
from manager.control.work import Work
from manager.scheduler import (
    Constraint,
    Group,
    NodeInfo,
    NodeTable,
    Requirement,
    rejection,
)
from manager.scheduler.requirement import BINPACK
from manager.scheduler.trial import Trial
from manager.store import View
from swarm.clock import SECOND_NS
from swarm.v1 import RebalanceStatus, Service, Task, TaskState, TaskStatus

# Of branches and affinities, so many of each side are compared; more there are only with a spread
# over something that each node has a value of its own of, and then the tops are the right ones.
CLASSES_MAX = 128
# How long a task that was made for one node may wait for its place there.
PLACED_AFTER_NS = SECOND_NS
BALANCED = "no move makes it better"

_Class = tuple[tuple[str, ...], int]
"""Values of the spread preferences, and the sum of the affinities' weights."""
_Key = tuple[int, int, str]
"""Of a node: tasks of the service, tasks, its id."""


@dataclass(frozen=True, slots=True)
class Move:
    """One task that would be better off on another node."""

    service_id: str
    task_id: str
    slot: int
    from_node_id: str
    to_node_id: str


def plan_moves(
    view: View,
    table: NodeTable,
    service_ids: Iterable[str],
    *,
    now_ns: int,
    node_id: str = "",
    limit: int = 0,
) -> tuple[Move, ...]:
    """All moves that a rebalance of these services would make, one service after the other, in
    order. `node_id`: only of tasks on this node. `limit`: no more than so many; 0: all of them. The
    table is the view's, and is the same afterwards.
    """
    moves: list[Move] = []
    with Trial(table, view, now_ns) as trial:
        for service_id in service_ids:
            service = view.get(Service, service_id)
            if service is None or service.pending_delete or not can_move(service):
                continue
            tasks = view.by(Task, "service", service_id)
            board = _Board(trial, table, view, service, tasks, now_ns=now_ns, node_id=node_id)
            moves += board.moves(limit - len(moves) if limit else 0)
            if limit and len(moves) >= limit:
                break
    return tuple(moves)


def can_move(service: Service) -> bool:
    """Whether tasks of the service are ever moved: those of jobs run to their end where they are,
    and one task a node belongs there.
    """
    mode = mode_of(service.spec)
    return not mode.job and not mode.per_node


class _Board:
    """One service's tasks on the nodes, as a plan moves them about."""

    def __init__(
        self,
        trial: Trial,
        table: NodeTable,
        view: View,
        service: Service,
        tasks: Iterable[Task],
        *,
        now_ns: int,
        node_id: str = "",
        since_ns: int | None = None,
    ) -> None:
        self._trial = trial
        self._table = table
        self._view = view
        self._service = service
        self._now_ns = now_ns
        self._need = table.requirement_of_version(service.id, service.spec_version, view)
        self._evens = _evens(table, self._need)
        self._free: dict[str, bool] = {}  # what is known of nodes: whether they take one more
        self._movable: dict[str, list[Task]] = {}
        slots: dict[int | str, list[Task]] = {}
        for task in tasks:
            slots.setdefault(slot_of(task), []).append(task)
        for slot in sorted(slots, key=str):
            mine = sorted(slots[slot], key=lambda t: t.meta.created_at_ns if t.meta else now_ns)
            live = [t for t in mine if is_live(t)]
            for leaver in live[:-1]:
                trial.out(leaver.id)  # on its way
            if len(live) == 1 and self._may_move(live[0], mine, node_id, since_ns):
                self._movable.setdefault(live[0].node_id, []).append(live[0])
        for here in self._movable.values():
            here.sort(key=lambda t: t.slot)  # the last goes first
        self._paths = {
            i: tuple(spread.of(info.node) for spread in self._need.spreads)
            for i, info in table.nodes.items()
        }
        self._branches: Counter[tuple[str, ...]] = Counter()
        for i, info in table.nodes.items():
            self._count(i, info.by_service.get(service.id, 0))

    def _may_move(self, task: Task, slot: list[Task], node_id: str, since_ns: int | None) -> bool:
        info = self._table.nodes.get(task.node_id)
        if info is None or state_of(task) != TaskState.RUNNING or is_drained(info.node):
            return False
        if node_id and task.node_id != node_id:
            return False
        if since_ns is not None and task.meta and task.meta.created_at_ns >= since_ns:
            return False
        return not failed_after(slot, task)

    def moves(self, limit: int = 0) -> list[Move]:
        """The next moves, all where `limit` is 0."""
        out: list[Move] = []
        while self._movable and (not limit or len(out) < limit):
            found = self._best()
            if found is None:
                break
            out.append(self._take(*found))
        return out

    def _take(self, source: NodeInfo, target: NodeInfo) -> Move:
        """Makes the move on the board."""
        here = self._movable[source.id]
        task = here.pop()
        if not here:
            del self._movable[source.id]
        version = task.spec_version
        need = self._table.requirement_of_version(task.service_id, version, self._view)
        self._trial.out(task.id)
        waiting = structs.replace(
            task, node_id=target.id, status=TaskStatus(state=TaskState.PENDING)
        )
        self._trial.place(Group(task.service_id, version, need, (waiting,), node_id=target.id))
        self._count(source.id, -1)
        self._count(target.id, 1)
        self._free.pop(source.id, None)
        self._free.pop(target.id, None)
        return Move(task.service_id, task.id, task.slot, source.id, target.id)

    def _count(self, node_id: str, tasks: int) -> None:
        path = self._paths[node_id]
        for depth in range(len(path)):
            self._branches[path[: depth + 1]] += tasks

    def _best(self) -> tuple[NodeInfo, NodeInfo] | None:
        """The move that makes the most of the first tier; None: none makes it better."""
        sources: dict[_Class, _Key] = {}
        targets: dict[_Class, _Key] = {}
        service_id = self._service.id
        for node_id, info in self._table.nodes.items():
            tasks = info.by_service.get(service_id, 0)
            key = (tasks, info.active, node_id) if self._evens else (0, 0, node_id)
            path = self._paths[node_id]
            if node_id in self._movable:
                group = path, self._affinity(info, leaves=True)
                if group not in sources or sources[group] < key:
                    sources[group] = key
            if self._takes(info):
                group = path, self._affinity(info)
                if group not in targets or key < targets[group]:
                    targets[group] = key
        found = None
        for source in self._tops(sources, fullest=True):
            for target in self._tops(targets, fullest=False):
                change = self._change(source, sources[source], target, targets[target])
                rank = (change, sources[source], targets[target])
                if any(change) and change < (0,) * len(change) and (found is None or rank < found):
                    found = rank
        if found is None:
            return None
        return self._table.nodes[found[1][2]], self._table.nodes[found[2][2]]

    def _tops(self, classes: dict[_Class, _Key], *, fullest: bool) -> list[_Class]:
        if len(classes) <= CLASSES_MAX:
            return sorted(classes)

        def rank(group: _Class) -> tuple[list[int], int, _Key]:
            path, affinity = group
            counts = [self._branches[path[: d + 1]] for d in range(len(path))]
            return counts, -affinity, classes[group]

        return sorted(classes, key=rank, reverse=fullest)[:CLASSES_MAX]

    def _change(self, source: _Class, from_: _Key, target: _Class, to: _Key) -> tuple[int, ...]:
        """What the move does to each tier, up to a factor: below 0 is better. Taking one from a
        count of a and adding it to one of b changes the sum of the squares by 2 (b - a + 1).
        """
        out = []
        for depth in range(len(source[0])):
            a, b = source[0][: depth + 1], target[0][: depth + 1]
            out.append(0 if a == b else self._branches[b] - self._branches[a] + 1)
        out.append(source[1] - target[1])
        if self._evens:
            out += [to[0] - from_[0] + 1, to[1] - from_[1] + 1]
        return tuple(out)

    def _takes(self, info: NodeInfo) -> bool:
        """Whether the node has room for one more and has not been failing the service."""
        known = self._free.get(info.id)
        if known is None:
            version = (self._service.id, self._service.spec_version)
            known = self._free[info.id] = (
                rejection(info, self._need, self._service.id) is None
                and all(self._table.may_join(info, c, self._service.id) for c in self._need.among)
                and not info.recent_failures(version, self._now_ns)
            )
        return known

    def _affinity(self, info: NodeInfo, *, leaves: bool = False) -> int:
        """The weights of the affinities that hold on the node; `leaves`: for a task of the service
        that is there, so without itself.
        """
        return sum(
            weight
            for constraint, weight in self._need.affinities
            if (
                self._near(info, constraint, leaves=leaves)
                if constraint.of_tasks
                else constraint.matches(info.node)
            )
        )

    def _near(self, info: NodeInfo, constraint: Constraint, *, leaves: bool) -> bool:
        meant = self._table.meaning(constraint)
        own = self._service.id if leaves and info.by_service.get(self._service.id) == 1 else ""
        there = any(i in info.by_service and i != own for i in meant)
        return there != constraint.negated


def _evens(table: NodeTable, need: Requirement) -> bool:
    """Whether the tasks are to be spread evenly over nodes."""
    return need.gpus is None and (need.strategy or table.strategy) != BINPACK


# ------------------------------------------------------------------ the stage


def rebalance(work: Work) -> None:
    """One step of the service's rebalance, if there is one."""
    status = work.service.rebalance_status
    if status is None or not status.running:
        return
    status = structs.replace(status, moved=status.moved + work.moved)
    if not can_move(work.service):
        _finish(work, status, "its tasks do not move")
    elif work.refused is not None:
        node = _name(work, work.refused.node_id)
        why = work.refused.status.err if work.refused.status else ""
        _finish(work, status, f"{node} had no room any more{f': {why}' if why else ''}")
    elif update_goes_on(work):
        _set(work, structs.replace(status, message="waits until the update is over"))
    else:
        _step(work, status)


def _step(work: Work, status: RebalanceStatus) -> None:
    begun = _begin(work, status)
    under_way = [slot for slot in work.used_slots() if len(work.live(slot)) > 1]
    if under_way or work.unfinished:
        work.moving = True
        if begun:
            work.wake(work.now_ns + PLACED_AFTER_NS)
            status = structs.replace(status, message=_moving(work, begun))
        _set(work, status)
    else:
        _finish(work, status, BALANCED)


def _begin(work: Work, status: RebalanceStatus) -> list[Move]:
    """Begins as many moves as the budget allows."""
    allowed = room(work)
    if allowed <= 0:
        return []
    # The stages before have changed tasks that the table does not know of yet.
    changed = {t.id: t for t in work.changed()}
    ids = [*changed, *work.deleted()]
    for task_id in ids:
        work.table.sync_task(task_id, changed.get(task_id), work.draft)
    try:
        with Trial(work.table, work.draft, work.now_ns) as trial:
            board = _Board(
                trial,
                work.table,
                work.draft,
                work.service,
                work.tasks.values(),
                now_ns=work.now_ns,
                node_id=status.node_id,
                since_ns=status.started_at_ns,
            )
            moves = board.moves(allowed)
    finally:
        for task_id in ids:
            work.table.sync_task(task_id, work.draft.get(Task, task_id), work.draft)
    begun = []
    for planned in moves:
        leaver = movable(work, planned.slot)
        if leaver is not None and begin(work, leaver, node_id=planned.to_node_id):
            begun.append(planned)
    return begun


def _moving(work: Work, begun: list[Move]) -> str:
    first = begun[0]
    name = work.service.spec.name if work.service.spec else work.service.id
    more = f" and {len(begun) - 1} more" if len(begun) > 1 else ""
    from_, to = _name(work, first.from_node_id), _name(work, first.to_node_id)
    return f"moving {name}.{first.slot} from {from_} to {to}{more}"


def _name(work: Work, node_id: str) -> str:
    info = work.table.nodes.get(node_id)
    return info.name if info is not None else node_id


def _finish(work: Work, status: RebalanceStatus, why: str) -> None:
    _set(work, structs.replace(status, running=False, ended_at_ns=work.now_ns, message=why))


def _set(work: Work, status: RebalanceStatus) -> None:
    if status != work.service.rebalance_status:
        work.use(work.draft.put(structs.replace(work.service, rebalance_status=status)))
