"""Placing a group of alike tasks.

The tasks of a group have the same service and version, so all have the same need: nodes are
filtered once for all of them, as columns (columns.py, masks.py), and ranked by

    not refusing it lately > spread preferences > not failing lately > affinity > the strategy > id

- nodes that have refused the version lately (refusals.py) take what the others have no room for;
- spread preferences: the branch with the fewest of the service's tasks, for each preference in turn
  (SwarmKit's decision tree);
- affinity: the sum of the weights of the conditions that hold on the node;
- strategy spread: fewest tasks of the service, fewest tasks, lowest share of CPU or memory claimed;
  binpack: the highest share claimed, most tasks. On nodes with GPUs the CPU and memory of a task
  without any can make GPUs useless for others: where it does so least (as fgd sees it) comes
  after the tasks of the service and before the rest. Without that the trace's GPU share falls by a
  point (README);
- tasks with GPUs: the cluster's GPU policy in place of the strategy (gpus/), task by task.

Each task goes to the best node as it is once those before it are placed. For tasks without GPUs
that is worked out for all at once (spreading.py; SwarmKit's scheduleTaskGroup comes to the same
order in rounds). A service that has a condition on itself (`service.name != web` in web: no two on
a node) changes with each task what holds where; such groups are placed in rounds, in each of which
nothing changes.

Deterministic: neither the order of dictionaries nor rows matter; ties end at a branch's value or a
node's id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from msgspec import structs

from manager.scheduler.constraints import Constraint
from manager.scheduler.filters import (
    barred,
    choose_generic,
    choose_gpus,
    fits,
    gpu_room,
    named_there,
)
from manager.scheduler.gpus import FAR
from manager.scheduler.masks import Bools, Ints
from manager.scheduler.nodeinfo import FAILURES_MAX, NodeInfo
from manager.scheduler.requirement import BINPACK, Requirement
from manager.scheduler.spreading import Nodes, Rule, branched, sequence
from manager.scheduler.table import NodeTable
from manager.store import View
from swarm.v1 import Task, TaskState, TaskStatus

ASSIGNED_MESSAGE = "scheduler assigned task to node"
_FAILURES_BIT = 32  # failures stand above all sums of weights


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks of one service version that wait for a node, in the order in which they get one.
    `node_id` set: they may go to this node only (global services). `without`: nodes that they may
    not go to, for these are kept for others.
    """

    service_id: str
    spec_version: int
    requirement: Requirement
    tasks: Sequence[Task]
    node_id: str = ""
    without: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Placement:
    """What became of a group: tasks with their node, and those that found none, in order."""

    placed: tuple[Task, ...]
    left: tuple[Task, ...]


def place(table: NodeTable, group: Group, view: View, now_ns: int) -> Placement:
    """Gives each task of the group a node as long as nodes fit, and claims it in the table.

    The placed tasks have node, assigned resources and state ASSIGNED; the others are as given.
    """
    work = _Work(table, group, now_ns, view)
    if group.node_id:
        work.on_one_node()
    else:
        for need, some in table.columns.variants(group.requirement):
            if not work.left:
                break
            work.on(need, some)
    return Placement(tuple(work.placed), tuple(work.left))


def ranked(table: NodeTable, group: Group) -> list[NodeInfo]:
    """The nodes that could take one task of the group, best first, GPUs left out of the ranking:
    for telling how a node compares. Spread preferences come first, by branch.
    """
    work = _Work(table, group, now_ns=0)
    found: list[NodeInfo] = []
    for need, some in table.columns.variants(group.requirement):
        keep = work.keep(need, some)
        if keep is not None:
            found += work.ranked(need, keep)
    return found


def others_left(table: NodeTable, group: Group, now_ns: int) -> bool:
    """Whether a node that has not refused the group's version lately could take one of its tasks
    now. Some operations on columns.
    """
    work = _Work(table, group, now_ns)
    for need, some in table.columns.variants(group.requirement):
        keep = work.keep(need, some)
        if keep is not None:
            willing = work.willing(keep)
            if work.fits_on(need, keep if willing is None else willing):
                return True
    return False


@dataclass(slots=True)
class _Work:
    """One group on its way."""

    table: NodeTable
    group: Group
    now_ns: int
    view: View | None = None
    left: list[Task] = field(init=False)
    placed: list[Task] = field(default_factory=list)
    status: TaskStatus = field(init=False)

    def __post_init__(self) -> None:
        self.left = list(self.group.tasks)
        self.status = TaskStatus(
            state=TaskState.ASSIGNED, timestamp_ns=self.now_ns, message=ASSIGNED_MESSAGE
        )

    # ------------------------------------------------------------------ one node

    def on_one_node(self) -> None:
        group, need = self.group, self.group.requirement
        info = self.table.nodes.get(group.node_id)
        if info is None or info.id in group.without or barred(info.node, need) is not None:
            return
        while self.left and self._may_have(info, need):
            self._claim(info, need)

    def _may_have(self, info: NodeInfo, need: Requirement) -> bool:
        return fits(info, need, self.group.service_id) > 0 and all(
            self.table.may_join(info, c, self.group.service_id) for c in need.among
        )

    def _claim(self, info: NodeInfo, need: Requirement, gpus: tuple[str, ...] = ()) -> None:
        """Gives the next task the node; `gpus` empty: those that are first there."""
        need = need.on(info.declared)
        task = self.left.pop(0)
        if need.gpus is not None and not gpus:
            gpus = self._gpus_there(info, need)
        if need.generic or need.generic_named or gpus:
            task = structs.replace(
                task,
                node_id=info.id,
                status=self.status,
                assigned_generic=choose_generic(info, need),
                assigned_gpus=gpus,
            )
        else:
            task = structs.replace(task, node_id=info.id, status=self.status)
        assert self.view is not None
        self.table.sync_task(task.id, task, self.view)
        self.placed.append(task)

    def _gpus_there(self, info: NodeInfo, need: Requirement) -> tuple[str, ...]:
        ask = need.gpus
        assert ask is not None
        if ask.ids or ask.all:
            return choose_gpus(info, ask)
        columns = self.table.columns
        columns.flush()
        board = columns.board
        return board.chosen(board.row[info.id], need.gpu_need)

    # ------------------------------------------------------------------ all nodes

    def on(self, need: Requirement, some: Bools | None) -> None:
        """Places on nodes to which the requirement is this one; `some`: which, None: all."""
        while self.left:
            before = len(self.left)
            keep = self.keep(need, some)
            if keep is None:
                return
            willing = self.willing(keep)
            self._on(need, keep if willing is None else willing)
            if willing is not None and len(self.left) == before:
                self._on(need, keep)
            if len(self.left) == before or not (self._about_itself(need) or willing is not None):
                return

    def _on(self, need: Requirement, keep: Bools) -> None:
        if not keep.any():
            return
        if need.gpus is None:
            self._by_columns(need, keep)
        elif need.gpus.ids or need.gpus.all:
            self._by_names(need, keep.copy())
        else:
            self._by_policy(need, keep.copy())

    def willing(self, keep: Bools) -> Bools | None:
        """Of these rows those that have not refused the version lately; None: none has."""
        version = (self.group.service_id, self.group.spec_version)
        refusing = self.table.refusing(version, self.now_ns)
        if not refusing:
            return None
        willing = keep.copy()
        willing[[info.row for info in refusing]] = False
        return willing

    def fits_on(self, need: Requirement, keep: Bools) -> bool:
        """Whether one of these rows could take a task now."""
        rows = np.flatnonzero(keep)
        rows = rows[self._room(need, rows, 1) > 0]
        if need.gpus is None:
            return bool(len(rows))
        infos = (self.table.columns.infos[row] for row in rows.tolist())
        return any(info is not None and gpu_room(info, need.gpus) > 0 for info in infos)

    def keep(self, need: Requirement, some: Bools | None) -> Bools | None:
        """The rows that pass all filters but amounts; None: there is none."""
        table, columns, group = self.table, self.table.columns, self.group
        if need.unknown_devices:
            return None
        keep = columns.open & columns.masks.suits(need.static)[: columns.n]
        if some is not None:
            keep &= some
        for node_id in group.without:
            if (info := table.nodes.get(node_id)) is not None:
                keep[info.row] = False
        for constraint in need.among:
            keep &= self._near(constraint, hard=True)
        for port, protocol, address in need.host_ports:
            for node_id in table.ports.get((port, protocol), ()):
                info = table.nodes[node_id]
                clash = (
                    p[:2] == (port, protocol) and (not address or not p[2] or address == p[2])
                    for p in info.ports
                )
                if any(clash):
                    keep[info.row] = False
        return keep if keep.any() else None

    def _near(self, constraint: Constraint, *, hard: bool) -> Bools:
        """Rows where a condition on services holds; `hard`: it is a constraint (see
        NodeTable.may_join).
        """
        table = self.table
        meant = table.meaning(constraint)
        there = np.zeros(table.columns.n, np.bool_)
        if hard and not constraint.negated and table.is_first(constraint, self.group.service_id):
            return ~there
        for service_id in meant:
            there[[*table.services.get(service_id, ())]] = True
        return ~there if constraint.negated else there

    def _means_itself(self, constraint: Constraint) -> bool:
        return constraint.of_tasks and self.group.service_id in self.table.meaning(constraint)

    def _about_itself(self, need: Requirement) -> bool:
        """Whether placing a task changes which nodes the next may go to, or come first."""
        if not need.among and not need.affinities:
            return False
        conditions = (*need.among, *(c for c, _ in need.affinities))
        return any(self._means_itself(c) for c in conditions)

    def _limited(self, need: Requirement) -> bool:
        """Whether more than CPU, memory and GPUs bounds how many tasks a node can take."""
        return bool(
            need.pids or need.generic or need.generic_named or need.host_ports or need.max_replicas
        )

    def _room(self, need: Requirement, rows: Ints, most: int) -> Ints:
        """How many tasks each row can take, GPUs left out."""
        columns = self.table.columns
        room = columns.room(need, rows, most)
        if need.max_replicas:
            np.minimum(room, need.max_replicas - self._tasks()[rows], out=room)
        if need.host_ports:
            np.minimum(room, 1, out=room)
        if need.generic_named:
            for i in np.flatnonzero(room > 0).tolist():
                info = columns.infos[int(rows[i])]
                named = info is not None and named_there(info, need)
                room[i] = 1 if named else 0
        return room

    def _tasks(self) -> Ints:
        """The service's tasks by row."""
        here = self.table.services.get(self.group.service_id)
        tasks = np.zeros(self.table.columns.n, np.int64)
        if here:
            tasks[[*here]] = [*here.values()]
        return tasks

    def _nodes(self, need: Requirement, rows: Ints, most: int) -> Nodes:
        """The rows with room, with all that they are ranked by."""
        columns = self.table.columns
        room = self._room(need, rows, most)
        some = room > 0
        if not some.all():
            rows, room = rows[some], room[some]
        if self._has_place(need):
            place = self._place(need)[rows]
        else:
            place = np.zeros(len(rows), np.int64)
        return Nodes(
            index=rows,
            room=room,
            place=place,
            tasks=self._tasks()[rows],
            active=columns.active[rows],
            cpu_used=columns.cpu_used[rows],
            cpu_total=columns.cpu_total[rows],
            memory_used=columns.memory_used[rows],
            memory_total=columns.memory_total[rows],
            rank=columns.rank[rows],
            strands=self._strands(need, rows),
        )

    def _strands(self, need: Requirement, rows: Ints) -> Ints | None:
        """How much GPU of each row a task without GPUs takes the use of, as the group begins."""
        columns = self.table.columns
        board = columns.board
        if not board.nodes or need.gpus is not None:
            return None
        score = np.zeros(columns.n, np.int64)
        columns.flush()
        there = [*board.row.values()]
        score[columns.board_rows[there]] = board.strands(need.gpu_need)[there]
        return score[rows]

    def _has_place(self, need: Requirement) -> bool:
        version = (self.group.service_id, self.group.spec_version)
        return bool(need.affinities) or version in self.table.failing

    def _place(self, need: Requirement) -> Ints:
        """By row, what decides first; lower is better: failures, then affinity."""
        table, columns = self.table, self.table.columns
        place = np.zeros(columns.n, np.int64)
        for constraint, weight in need.affinities:
            holds = (
                self._near(constraint, hard=False)
                if constraint.of_tasks
                else columns.masks.holds(constraint)[: columns.n]
            )
            place -= weight * holds
        version = (self.group.service_id, self.group.spec_version)
        for node_id in table.failing.get(version, ()):
            info = table.nodes[node_id]
            failures = info.recent_failures(version, self.now_ns)
            if failures >= FAILURES_MAX:
                place[info.row] += failures << _FAILURES_BIT
            if (refusal := info.refusal(version, self.now_ns)) is not None:
                place[info.row] += refusal.count << _FAILURES_BIT
        return place

    # ------------------------------------------------------------------ by strategy

    def _by_columns(self, need: Requirement, keep: Bools) -> None:
        columns = self.table.columns
        count = len(self.left)
        nodes = self._nodes(need, np.flatnonzero(keep), count)
        if self._about_itself(need) and len(nodes.index):
            nodes, count = self._round(need, nodes, count)
        found = self._choose(need, nodes, count, self._rule(need))
        rows = nodes.index[found]
        infos = columns.infos
        where = [info for row in rows.tolist() if (info := infos[row]) is not None]
        if need.counts_only:
            self._claim_many(where, need)
        else:
            for info in where:
                self._claim(info, need)

    def ranked(self, need: Requirement, keep: Bools) -> list[NodeInfo]:
        """Of these rows the nodes with room, in order."""
        infos = self.table.columns.infos
        left = self._nodes(need, np.flatnonzero(keep), 1)
        rule = self._rule(need)
        out: list[NodeInfo] = []
        while len(left.index):
            found = self._choose(need, left, 1, rule)
            if not len(found):
                break
            at = int(found[0])
            info = infos[int(left.index[at])]
            if info is not None and (need.gpus is None or gpu_room(info, need.gpus)):
                out.append(info)
            left = left.only(np.arange(len(left.index)) != at)
        return out

    def _choose(self, need: Requirement, nodes: Nodes, count: int, rule: Rule) -> Ints:
        """The next nodes, by their place in `nodes`."""
        if not need.spreads:
            return sequence(nodes, count, rule)
        running = self.table.services.get(self.group.service_id, {})
        return branched(
            nodes,
            count,
            [self.table.columns.masks.values(attribute) for attribute in need.spreads],
            (
                np.fromiter(running.keys(), np.int64, len(running)),
                np.fromiter(running.values(), np.int64, len(running)),
            ),
            lambda some, n: sequence(some, n, rule),
        )

    def _rule(self, need: Requirement) -> Rule:
        strategy = need.strategy or self.table.strategy
        return Rule(need.cpu, need.memory, binpack=strategy == BINPACK)

    def _round(self, need: Requirement, nodes: Nodes, count: int) -> tuple[Nodes, int]:
        """What can be placed before a condition on the service itself holds on other nodes: one
        task a node where it has none yet, of those that come first; and where tasks attract each
        other, the first alone.
        """
        fresh = nodes.tasks == 0
        if need.spreads:
            return nodes, 1  # which branch comes first is known for one task only
        first = nodes.place == nodes.place.min()
        nodes, fresh = nodes.only(first), fresh[first]
        conditions = (*((c, 1) for c in need.among), *need.affinities)
        draws = any(self._means_itself(c) and c.negated == (w < 0) for c, w in conditions)
        if draws and fresh.any():
            count = 1
        return replace(nodes, room=np.where(fresh, 1, nodes.room)), count

    def _claim_many(self, where: list[NodeInfo], need: Requirement) -> None:
        """Gives the next tasks these nodes, in order."""
        status = self.status
        changed: Callable[..., Task] = structs.replace
        placed = [
            changed(task, node_id=info.id, status=status)
            for task, info in zip(self.left, where, strict=False)
        ]
        del self.left[: len(placed)]
        assert self.view is not None
        self.table.take_many(placed, where, self.group.requirement, self.view)
        self.placed.extend(placed)

    # ------------------------------------------------------------------ by the GPU policy

    def _by_policy(self, need: Requirement, keep: Bools) -> None:
        """Task by task: what a place is worth changes with each claim."""
        table, columns = self.table, self.table.columns
        board = columns.board
        place = self._place(need) if self._has_place(need) else None
        itself = self._about_itself(need)
        if self._limited(need):
            rows = np.flatnonzero(keep)
            keep[rows[self._room(need, rows, 1) <= 0]] = False
        while self.left:
            columns.flush()
            score = board.scores(need.gpu_need, columns.of_board(keep))
            if place is not None or need.spreads:
                rows = self._first(need, columns.board_rows[score < FAR], place)
                score = board.scores(need.gpu_need, columns.of_board(_mask(rows, columns.n)))
            row = board.lowest(score)
            if row is None:
                return
            info = table.nodes[board.ids[row]]
            self._claim(info, need, board.chosen(row, need.gpu_need))
            if itself:
                return
            if self._limited(need) and not self._may_have(info, need):
                keep[info.row] = False

    def _by_names(self, need: Requirement, keep: Bools) -> None:
        """Tasks that name their GPUs, or want all of a node: the policy has none to choose. Where
        the fewest GPUs are, and of those the least CPU is free.
        """
        columns = self.table.columns
        place = self._place(need) if self._has_place(need) else None
        itself = self._about_itself(need)
        infos = {
            row: info
            for row in np.flatnonzero(keep).tolist()
            if (info := columns.infos[row]) is not None and info.usable_gpus
        }
        while self.left:
            infos = {row: info for row, info in infos.items() if self._may_have(info, need)}
            rows = np.array(sorted(infos), np.int64)
            if not len(rows):
                return
            if place is not None or need.spreads:
                rows = self._first(need, rows, place)
            info = min((infos[row] for row in rows.tolist()), key=_fullest)
            self._claim(info, need)
            if itself:
                return

    def _first(self, need: Requirement, rows: Ints, place: Ints | None) -> Ints:
        """Of these rows those that come first before the policy is asked."""
        running = self.table.services.get(self.group.service_id, {})
        for attribute in need.spreads if len(rows) else ():
            codes, values = self.table.columns.masks.values(attribute)
            tasks = dict.fromkeys(codes[rows].tolist(), 0)
            for row, count in running.items():
                if (code := int(codes[row])) in tasks:
                    tasks[code] += count
            best = min(tasks, key=lambda code: (tasks[code], values[code]))
            inside = codes == best
            rows = rows[inside[rows]]
            running = {row: count for row, count in running.items() if inside[row]}
        if place is not None and len(rows):
            rows = rows[place[rows] == place[rows].min()]
        return rows


def _mask(rows: Ints, n: int) -> Bools:
    mask = np.zeros(n, np.bool_)
    mask[rows] = True
    return mask


def _fullest(info: NodeInfo) -> tuple[int, int, str]:
    return (len(info.gpus), info.cpu_total - info.cpu_used, info.id)
