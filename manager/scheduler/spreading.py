"""How many tasks go to each of many nodes, and in which order: spread and binpack on whole columns.

Method: water-filling. Greedy spreading gives each task to the node that is lowest by (tasks of the
service, tasks, share claimed, id). Each node's own sequence of such keys grows with every task it
gets, so the greedy order is the merge of the nodes' sequences: the first n keys of all. Their first
component is a level that rises by one a task, so the nodes are filled up to one level (found from
sums over the nodes, as water finds its level), the last incomplete level goes to the lowest by the
rest of the key, and one sort gives the order. The result is the same as placing one task after
another with a heap, for O(nodes log nodes + tasks log tasks) in whole-column operations.

For spread preferences the same is done with the branches of a preference in place of nodes, from
the top down: the branch that has the fewest tasks of the service is next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manager.scheduler.masks import Bools, Ints

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes that can take tasks, as columns: `index` is theirs in the caller's order. `room`: how
    many each can take. `place`: what decides before counts, lower first (failures, affinity).
    """

    index: Ints
    room: Ints
    place: Ints
    tasks: Ints  # of the service
    active: Ints
    cpu_used: Ints
    cpu_total: Ints
    memory_used: Ints
    memory_total: Ints
    rank: Ints  # by id
    # GPU that a task without GPUs takes the use of (see placement.py), compared after the service's
    # tasks and taken as constant; None: there are no GPUs.
    strands: Ints | None = None

    def only(self, keep: Bools | Ints) -> Nodes:
        """Some of them."""
        return Nodes(
            self.index[keep],
            self.room[keep],
            self.place[keep],
            self.tasks[keep],
            self.active[keep],
            self.cpu_used[keep],
            self.cpu_total[keep],
            self.memory_used[keep],
            self.memory_total[keep],
            self.rank[keep],
            None if self.strands is None else self.strands[keep],
        )

    def share(self, cpu: int | Ints, memory: int | Ints) -> Floats:
        """The larger share claimed of CPU and memory, once so much more is."""
        return np.maximum(
            (self.cpu_used + cpu) / np.maximum(self.cpu_total, 1) * (self.cpu_total > 0),
            (self.memory_used + memory)
            / np.maximum(self.memory_total, 1)
            * (self.memory_total > 0),
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """How nodes are chosen. `cpu`, `memory`: what one task takes."""

    cpu: int
    memory: int
    binpack: bool = False


def sequence(nodes: Nodes, count: int, rule: Rule) -> Ints:
    """The nodes of the next tasks, by their place in `nodes`, at most `count` of them: as many as
    there is room for.
    """
    if count == 1 and len(nodes.index):
        return _one(nodes, rule)
    if not len(nodes.index) or count <= 0:
        return np.zeros(0, np.int64)
    place = nodes.place
    if (place == place[0]).all():
        return _class(nodes, count, rule)
    parts = []
    for value in np.unique(place):
        inside = np.flatnonzero(place == value)
        found = inside[_class(nodes.only(inside), count, rule)]
        parts.append(found)
        count -= len(found)
        if not count:
            break
    return np.concatenate(parts)


def _one(nodes: Nodes, rule: Rule) -> Ints:
    """The best node, without ordering all."""
    rows = np.flatnonzero(nodes.room > 0)
    if not len(rows):
        return rows
    strands = [] if nodes.strands is None else [nodes.strands]
    keys = [nodes.place, *strands]
    if not rule.binpack:
        keys = [nodes.place, nodes.tasks, *strands, nodes.active]
    for key in keys:
        if len(rows) == 1:
            return rows
        values = key[rows]
        rows = rows[values == values.min()]
    if len(rows) > 1:
        left = nodes.only(rows)
        share = left.share(0, 0)
        best = share == (share.max() if rule.binpack else share.min())
        if rule.binpack:
            active = np.where(best, left.active, -1)
            best = active == active.max()
        rank = np.where(best, left.rank, np.iinfo(np.int64).max)
        rows = rows[rank.argmin() : rank.argmin() + 1]
    return rows


def _class(nodes: Nodes, count: int, rule: Rule) -> Ints:
    """Of nodes that are equal in `place`."""
    return _packed(nodes, count) if rule.binpack else _level(nodes, count, rule)


def _packed(nodes: Nodes, count: int) -> Ints:
    """The fullest first, each until it is full: it is then fuller still."""
    order = _sorted(nodes, (nodes.rank, -nodes.active, -nodes.share(0, 0)))
    room = np.minimum(nodes.room[order], count)
    before = np.cumsum(room) - room
    take = np.clip(count - before, 0, room)
    return np.repeat(order, take)


def _level(nodes: Nodes, count: int, rule: Rule) -> Ints:
    start, room = nodes.tasks, np.minimum(nodes.room, count)
    level = _water(start, room, count)
    take = np.clip(level - start, 0, room)
    rest = count - int(take.sum())
    if rest > 0:
        # The level that not all can have: whoever is next there.
        open_ = np.flatnonzero((start + take == level) & (room > take))
        some = nodes.only(open_)
        more = take[open_]
        share = some.share(more * rule.cpu, more * rule.memory)
        order = _sorted(some, (some.rank, share, some.active + more))
        take[open_[order[:rest]]] += 1
    total = int(take.sum())
    index = np.repeat(np.arange(len(take)), take)
    turn = np.arange(total) - np.repeat(np.cumsum(take) - take, take)
    some = nodes.only(index)
    share = some.share(turn * rule.cpu, turn * rule.memory)
    order = _sorted(some, (some.rank, share, some.active + turn), some.tasks + turn)
    return index[order]


def _sorted(nodes: Nodes, keys: tuple[npt.NDArray[Any], ...], *first: Ints) -> Ints:
    """The order by these keys, the last one first; `first` before all, GPU use before `keys`."""
    strands = () if nodes.strands is None else (nodes.strands,)
    return np.asarray(np.lexsort((*keys, *strands, *first)), np.int64)


def _water(start: Ints, room: Ints, count: int) -> int:
    """The highest level to which all can be filled with no more than `count`."""
    order = np.sort(start)
    # Without bounds: at level L the first k nodes (by start) hold k * L - their sum.
    sums = np.cumsum(order)
    sizes = np.arange(1, len(order) + 1)
    level = 0
    need = sizes * order - sums  # to bring the first k up to the level of the k-th
    k = int(np.searchsorted(need, count, side="right"))
    level = (count + int(sums[k - 1])) // k
    if (room >= np.maximum(level + 1 - start, 0)).all():
        return level
    low, high = level, int((start + room).max())
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.clip(middle - start, 0, room).sum()) <= count:
            low = middle
        else:
            high = middle - 1
    return low


Branches = Sequence[tuple[Ints, Sequence[str]]]
"""By preference: a code of each node's value by row, and the values by code."""


def branched(
    nodes: Nodes,
    count: int,
    branches: Branches,
    running: tuple[Ints, Ints],
    leaf: Callable[[Nodes, int], Ints],
) -> Ints:
    """As `sequence`, spread over the values of each preference in turn. `running`: rows of nodes
    with tasks of the service, whether or not they can take more, and how many; within the last
    branch `leaf` chooses.
    """
    if not branches or not len(nodes.index):
        return leaf(nodes, count)
    codes, values = branches[0]
    mine = codes[nodes.index]
    present, branch = np.unique(mine, return_inverse=True)
    names = [values[code] for code in present.tolist()]
    by_name = np.empty(len(names), np.int64)
    by_name[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    rows, counts = running
    theirs = codes[rows]
    tasks = np.zeros(len(names), np.int64)
    at = np.searchsorted(present, theirs)
    known = (at < len(present)) & (present[np.minimum(at, len(present) - 1)] == theirs)
    np.add.at(tasks, at[known], counts[known])
    room = np.zeros(len(names), np.int64)
    np.add.at(room, branch, np.minimum(nodes.room, count))
    turns = _turns(tasks, np.minimum(room, count), by_name, count)
    out = np.empty(len(turns), np.int64)
    per_branch = np.bincount(turns, minlength=len(names))
    for i in np.flatnonzero(per_branch).tolist():
        inside = np.flatnonzero(branch == i)
        if len(inside) == 1:
            out[turns == i] = inside[0]
            continue
        here = theirs == present[i]
        found = branched(
            nodes.only(inside),
            int(per_branch[i]),
            branches[1:],
            (rows[here], counts[here]),
            leaf,
        )
        slots = np.flatnonzero(turns == i)[: len(found)]
        out[slots] = inside[found]
    return out


def _turns(tasks: Ints, room: Ints, by_name: Ints, count: int) -> Ints:
    """Whose turn it is, task by task: the branch with the fewest tasks, then by name."""
    level = _water(tasks, room, count)
    take = np.clip(level - tasks, 0, room)
    rest = count - int(take.sum())
    if rest > 0:
        open_ = np.flatnonzero((tasks + take == level) & (room > take))
        take[open_[np.argsort(by_name[open_])[:rest]]] += 1
    index = np.repeat(np.arange(len(take)), take)
    turn = np.arange(len(index)) - np.repeat(np.cumsum(take) - take, take)
    return index[np.lexsort((by_name[index], tasks[index] + turn))]
