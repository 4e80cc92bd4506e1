"""The node table as arrays: a row a node, a column a dimension.

NodeInfo holds a node's amounts as plain integers, and is the truth; the columns here are made from
it when they are asked for, for the nodes that changed since. So one claim costs one row, and a
group is placed by operations on whole columns. Rows are given out as nodes come and used again when
they go: nothing may depend on a row's number (`rank` is a node's place by id).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from manager.scheduler.gpus import GpuBoard, GpuDevice, GpuNode, Workload, links_of
from manager.scheduler.masks import Bools, Ints, Masks
from manager.scheduler.nodeinfo import NodeInfo
from manager.scheduler.requirement import Requirement
from swarm.gpus import vendor_of

UNLIMITED = 1 << 40
_AMOUNTS = 8  # columns of `_amounts`


class Columns:
    """See above. `open`: ready, active and not removed; `there`: the row has a node."""

    def __init__(self, workload: Workload | None = None) -> None:
        self.infos: list[NodeInfo | None] = []  # by row
        self.masks = Masks()
        self.board = GpuBoard(workload=workload)
        self._free_rows: list[int] = []
        self._dirty: set[int] = set()
        self._kinds: dict[str, int] = {}
        self._declared: dict[frozenset[str], set[int]] = {}
        self._rank: Ints | None = None
        self._board_rows: Ints = np.zeros(0, np.int64)
        self._board_changes = -1
        self._amounts = np.zeros((_AMOUNTS, 0), np.int64)
        self._generic = np.zeros((0, 0), np.int64)
        self._generic_total = np.zeros((0, 0), np.int64)
        self._open = np.zeros(0, np.bool_)

    def _shape(self, rows: int) -> None:
        self._amounts = _grown(self._amounts, (_AMOUNTS, rows))
        self._generic = _grown(self._generic, (len(self._kinds), rows))
        self._generic_total = _grown(self._generic_total, (len(self._kinds), rows))
        opened = np.zeros(rows, np.bool_)
        opened[: len(self._open)] = self._open
        self._open = opened

    # ------------------------------------------------------------------ rows

    def add(self, info: NodeInfo) -> None:
        """Gives the node a row."""
        if self._free_rows:
            info.row = self._free_rows.pop()
            self.infos[info.row] = info
        else:
            info.row = len(self.infos)
            self.infos.append(info)
        if info.row >= self._amounts.shape[1]:
            self._shape(max(16, 2 * self._amounts.shape[1]))
        self._rank = None
        self.node_changed(info)

    def remove(self, info: NodeInfo) -> None:
        """Takes the node's row back."""
        row = info.row
        self.infos[row] = None
        self._free_rows.append(row)
        self._dirty.discard(row)
        self._amounts[:, row] = 0
        self._generic[:, row] = 0
        self._generic_total[:, row] = 0
        self._open[row] = False
        self._rank = None
        self.masks.set(row, None)
        self.board.remove(info.id)
        self._undeclare(row)

    def node_changed(self, info: NodeInfo) -> None:
        """The node's object is another."""
        self.masks.set(info.row, info.node)
        self._undeclare(info.row)
        if info.declared:
            self._declared.setdefault(info.declared, set()).add(info.row)
        if info.gpus:
            self.board.update(gpu_node(info))
        else:
            self.board.remove(info.id)
        self._dirty.add(info.row)

    def _undeclare(self, row: int) -> None:
        for rows in self._declared.values():
            rows.discard(row)

    def touch(self, info: NodeInfo) -> None:
        """What is claimed on the node has changed."""
        self._dirty.add(info.row)

    def flush(self) -> None:
        """Brings the columns up to date."""
        if not self._dirty:
            return
        for row in self._dirty:
            info = self.infos[row]
            if info is not None:
                self._fill(row, info)
        self._dirty.clear()

    def _fill(self, row: int, info: NodeInfo) -> None:
        self._amounts[:, row] = (
            info.cpu_total,
            info.cpu_used,
            info.memory_total,
            info.memory_used,
            info.pids_total,
            info.pids_used,
            info.active,
            1,
        )
        self._open[row] = info.open
        if info.declared or info.generic_used or info.named_used:
            kinds = info.declared | info.generic_used.keys()
            if any(kind not in self._kinds for kind in kinds):
                for kind in kinds:
                    self._kinds.setdefault(kind, len(self._kinds))
                self._shape(self._amounts.shape[1])
        if self._kinds:
            self._generic[:, row] = [info.generic_free(kind) for kind in self._kinds]
            self._generic_total[:, row] = [
                info.generic_total.get(kind, 0) + len(info.named_total.get(kind, ()))
                for kind in self._kinds
            ]
        if info.gpus:
            self.board.set_free(
                info.id,
                info.cpu_total - info.cpu_used,
                info.memory_total - info.memory_used,
                *info.gpu_free(),
            )

    # ------------------------------------------------------------------ columns

    @property
    def n(self) -> int:
        """Rows in use, those given up between them included."""
        return len(self.infos)

    def column(self, index: int) -> Ints:
        self.flush()
        return np.asarray(self._amounts[index, : self.n], np.int64)

    @property
    def cpu_total(self) -> Ints:
        return self.column(0)

    @property
    def cpu_used(self) -> Ints:
        return self.column(1)

    @property
    def memory_total(self) -> Ints:
        return self.column(2)

    @property
    def memory_used(self) -> Ints:
        return self.column(3)

    @property
    def pids_total(self) -> Ints:
        """0: the node does not say, which is no limit."""
        return self.column(4)

    @property
    def pids_used(self) -> Ints:
        return self.column(5)

    @property
    def active(self) -> Ints:
        """Tasks that should run."""
        return self.column(6)

    @property
    def there(self) -> Bools:
        return np.asarray(self.column(7) > 0, np.bool_)

    @property
    def open(self) -> Bools:
        self.flush()
        return np.asarray(self._open[: self.n], np.bool_)

    @property
    def rank(self) -> Ints:
        """The node's place among all, by id."""
        if self._rank is None:
            order = sorted(
                (i for i, info in enumerate(self.infos) if info is not None),
                key=lambda i: self.infos[i].id,  # type: ignore[union-attr]  # None left out
            )
            self._rank = np.zeros(self.n, np.int64)
            self._rank[order] = np.arange(len(order))
        return self._rank

    def generic(self, kind: str, *, empty: bool = False) -> Ints:
        """What is free of a kind, named instances included; `empty`: if nothing were claimed."""
        self.flush()
        index = self._kinds.get(kind)
        if index is None:
            return np.zeros(self.n, np.int64)
        return np.asarray((self._generic_total if empty else self._generic)[index, : self.n])

    def of_board(self, values: Bools) -> Bools:
        """A column by the board's rows."""
        return np.asarray(values[self.board_rows], np.bool_)

    @property
    def board_rows(self) -> Ints:
        """By the board's rows, the table's; where there is no node, any."""
        board = self.board
        if self._board_changes != board.changes or len(self._board_rows) != board.rows:
            rows = np.zeros(board.rows, np.int64)
            for info in self.infos:
                if info is not None and info.id in board.row:
                    rows[board.row[info.id]] = info.row
            self._board_rows, self._board_changes = rows, board.changes
        return self._board_rows

    # ------------------------------------------------------------------ rooms

    def variants(self, need: Requirement) -> Iterator[tuple[Requirement, Bools | None]]:
        """The requirement as the nodes see it, and which nodes; None: all. Nodes differ where
        some declare a kind of generic resources that means GPUs, and others do not.
        """
        kinds = need.gpu_kinds
        own: dict[Requirement, set[int]] = {}
        for declared, rows in self._declared.items() if kinds else ():
            variant = need.on(declared)
            if variant is not need and rows:
                own.setdefault(variant, set()).update(rows)
        if not own:
            yield need, None
            return
        others = np.ones(self.n, np.bool_)
        masks = []
        for variant, rows in own.items():
            mask = np.zeros(self.n, np.bool_)
            mask[sorted(rows)] = True
            others &= ~mask
            masks.append((variant, mask))
        yield need, others
        yield from sorted(masks, key=lambda m: (m[0].generic, m[0].generic_named))

    def room(self, need: Requirement, rows: Ints, most: int) -> Ints:
        """How many tasks each of the rows can take by CPU, memory, processes and generic
        resources, counted no further than `most`. What else counts is not looked at.
        """
        room = np.full(len(rows), most, np.int64)
        self.flush()
        amounts = self._amounts
        for amount, total, used in ((need.cpu, 0, 1), (need.memory, 2, 3)):
            if amount:
                free = amounts[total, rows] - amounts[used, rows]
                np.minimum(room, free >= amount if most == 1 else free // amount, out=room)
        if need.pids:
            total = amounts[4, rows]
            free = (total - amounts[5, rows]) // need.pids
            np.minimum(room, np.where(total > 0, free, UNLIMITED), out=room)
        for kind, count in need.generic:
            np.minimum(room, (self.generic(kind)[rows] - need.named_of(kind)) // count, out=room)
        return room


def _grown(old: Ints, shape: tuple[int, int]) -> Ints:
    new = np.zeros(shape, np.int64)
    new[: old.shape[0], : old.shape[1]] = old
    return new


def gpu_node(info: NodeInfo) -> GpuNode:
    """The node as the placement of GPUs sees it: what can be had of it at all."""
    gpus = info.usable_gpus
    return GpuNode(
        id=info.id,
        cpu=info.cpu_total,
        memory=info.memory_total,
        gpus=tuple(
            GpuDevice(g.uuid, g.model, g.memory_bytes, g.compute_capability, vendor_of(g))
            for g in gpus
        ),
        links=links_of(gpus) if len(gpus) > 1 else (),
    )
