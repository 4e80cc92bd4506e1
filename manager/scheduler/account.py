"""The filters' account over all nodes: how many fell out where, by how much, and whether for ever.

Each node is counted once, at the filter where it falls out first; with those that fit the counts
add up to all nodes. It is worked out from whole columns, and remembered as long as the table does
not change: thousands of services that wait for the same thing cost one account.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from manager.scheduler.filters import (
    FILTERS,
    Rejection,
    gpu_shortage,
    port_conflict,
    unavailable,
    unseen,
)
from manager.scheduler.masks import Bools, Ints
from manager.scheduler.nodeinfo import NodeInfo
from manager.scheduler.requirement import Requirement
from manager.scheduler.table import NodeTable


@dataclass(slots=True)
class Fallen:
    """The nodes that fell out at one filter with one detail. `needed` and `best` for amounts; of
    several nodes with the best amount the one with the last id. `also`: what else they are short
    of, with how many of them.
    """

    filter: str
    detail: str
    rows: Ints
    never: int = 0
    needed: int = 0
    best: int = 0
    best_node: str = ""
    also: list[Fallen] = field(default_factory=list)

    @property
    def nodes(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Counts:
    """An account in numbers. `fallen` in the filters' order, then most nodes first."""

    total: int
    fit: int
    fallen: tuple[Fallen, ...]
    # No node could take the task even if nothing ran on it and every node were ready; nobody knows
    # of one that was never heard.
    never: bool


def count_nodes(table: NodeTable, need: Requirement, service_id: str, node_id: str = "") -> Counts:
    """Asks all nodes, or the one named."""
    work = _Counting(table, need, service_id)
    if node_id:
        info = table.nodes.get(node_id)
        there = np.array([info.row] if info is not None else [], np.int64)
    else:
        there = np.flatnonzero(table.columns.there)
    for variant, some in table.columns.variants(need):
        work.count(variant, there if some is None else there[some[there]])
    order = sorted(
        work.fallen.values(), key=lambda f: (FILTERS.index(f.filter), -f.nodes, f.detail)
    )
    never = bool(len(there)) and work.never_all
    return Counts(len(there), work.fit, tuple(order), never)


class _Counting:
    """One account while it is made."""

    def __init__(self, table: NodeTable, need: Requirement, service_id: str) -> None:
        self.table = table
        self.need = need
        self.service_id = service_id
        self.fallen: dict[tuple[str, str], Fallen] = {}
        self.fit = 0
        self.never_all = True

    def count(self, need: Requirement, rows: Ints) -> None:
        """Takes the rows to which the requirement is this one."""
        if not len(rows):
            return
        table, columns = self.table, self.table.columns
        lacks = columns.masks.lacks(need.static)
        codes = lacks.codes[rows]
        shorts: list[_Short | _Things] = [*_amounts(table, need, rows), *_things(table, need, rows)]
        never = codes > 0
        for short in shorts:
            never |= short.never
        never &= ~columns.masks.true_of(unseen)[rows]
        self.never_all &= bool(never.all())
        left = np.ones(len(rows), np.bool_)

        def fall(which: Bools, kind: str, detail: str) -> Fallen | None:
            out = left & which
            left[out] = False
            return self._fall(rows[out], never[out], kind, detail) if out.any() else None

        closed = ~columns.open[rows]
        for why, which in _closed(table, rows, closed).items():
            fall(which, *why)
        for code in np.unique(codes[left]).tolist():
            if code:
                found = lacks.values[code]
                assert isinstance(found, tuple)
                fall(codes == code, *found)
        hinders = columns.masks.hinders(need.static.hindrance)
        hindered = hinders.codes[rows]
        for code in np.unique(hindered[left]).tolist():
            if code:
                fall(hindered == code, "runtime", str(hinders.values[code]))
        for i, short in enumerate(shorts):
            for detail in short.details():
                which = short.of(detail)
                mine = left & which
                out = fall(which, "resources", detail)
                if out is not None:
                    short.measure(table, rows, mine, out)
                    for other in shorts[i + 1 :]:
                        _also(table, rows, mine, other, out)
        self._ports(need, rows, left, fall)
        if need.max_replicas:
            here = table.services.get(self.service_id, {})
            full = np.array([here.get(r, 0) >= need.max_replicas for r in rows.tolist()], np.bool_)
            if (most := fall(full, "max_replicas", "")) is not None:
                most.needed = need.max_replicas
        for constraint in need.among:
            off = left.copy()
            for i in np.flatnonzero(left).tolist():
                info = columns.infos[int(rows[i])]
                off[i] = info is not None and not table.may_join(info, constraint, self.service_id)
            fall(off, "affinity", constraint.text)
        self.fit += int(left.sum())

    def _fall(self, rows: Ints, never: Bools, kind: str, detail: str) -> Fallen:
        found = self.fallen.get((kind, detail))
        if found is None:
            found = self.fallen[kind, detail] = Fallen(kind, detail, rows)
        else:
            found.rows = np.concatenate((found.rows, rows))
        found.never += int(never.sum())
        return found

    def _ports(
        self,
        need: Requirement,
        rows: Ints,
        left: Bools,
        fall: Callable[[Bools, str, str], Fallen | None],
    ) -> None:
        taken: dict[str, list[int]] = {}
        for i in np.flatnonzero(left).tolist() if need.host_ports else ():
            info = self.table.columns.infos[int(rows[i])]
            port = port_conflict(info, need) if info is not None and info.ports else None
            if port is not None:
                taken.setdefault(f"{port[0]}/{port[1]}", []).append(i)
        for detail, indices in taken.items():
            which = np.zeros(len(rows), np.bool_)
            which[indices] = True
            fall(which, "host_port", detail)


def _closed(table: NodeTable, rows: Ints, closed: Bools) -> dict[tuple[str, str], Bools]:
    """By filter and detail the nodes that take no tasks at all."""
    out: dict[tuple[str, str], Bools] = {}
    for i in np.flatnonzero(closed).tolist():
        info = table.columns.infos[int(rows[i])]
        why = unavailable(info.node) if info is not None else None
        if why is not None:
            key = (why.filter, why.detail)
            if key not in out:
                out[key] = np.zeros(len(rows), np.bool_)
            out[key][i] = True
    return out


# ------------------------------------------------------------------ amounts


class _Short:
    """One dimension over all rows: where it does not suffice now, and never."""

    def __init__(self, detail: str, needed: int, free: Ints, never: Bools) -> None:
        self.detail = detail
        self.needed = needed
        self.free = free
        self.short = free < needed
        self.never = never

    def details(self) -> Sequence[str]:
        return (self.detail,) if self.short.any() else ()

    def of(self, detail: str) -> Bools:
        return self.short

    def measure(self, table: NodeTable, rows: Ints, which: Bools, into: Fallen) -> None:
        """Notes the best free amount among these rows."""
        at = np.flatnonzero(which)
        free = self.free[at]
        best = at[free == free.max()]
        ranks = table.columns.rank[rows[best]]
        index = int(best[int(ranks.argmax())])
        _note(into, table, int(rows[index]), self.needed, int(self.free[index]))


def _note(into: Fallen, table: NodeTable, row: int, needed: int, best: int) -> None:
    info = table.columns.infos[row]
    if info is None:
        return
    if not into.best_node or (best, info.name) > (into.best, into.best_node):
        into.needed, into.best, into.best_node = needed, best, info.name


class _Things:
    """What has to be looked at node by node: named instances, devices, GPUs. Each row has the first
    of them that it lacks.
    """

    def __init__(self, found: list[Rejection | None], never: Bools) -> None:
        self.found = found
        self.never = never

    def details(self) -> Sequence[str]:
        return sorted({r.detail for r in self.found if r is not None})

    def of(self, detail: str) -> Bools:
        return np.array([r is not None and r.detail == detail for r in self.found], np.bool_)

    def measure(self, table: NodeTable, rows: Ints, which: Bools, into: Fallen) -> None:
        ranks = table.columns.rank

        def worth(i: int) -> tuple[int, int]:
            found = self.found[i]
            return (found.best if found is not None else -1, int(ranks[rows[i]]))

        i = max(np.flatnonzero(which).tolist(), key=worth)
        found = self.found[i]
        if found is not None:
            _note(into, table, int(rows[i]), found.needed, found.best)


def _also(table: NodeTable, rows: Ints, mine: Bools, other: _Short | _Things, into: Fallen) -> None:
    for detail in other.details():
        which = mine & other.of(detail)
        if which.any():
            also = Fallen("resources", detail, rows[which])
            other.measure(table, rows, which, also)
            into.also.append(also)


def _amounts(table: NodeTable, need: Requirement, rows: Ints) -> list[_Short]:
    columns = table.columns
    out = []
    for detail, amount, total, used in (
        ("cpu", need.cpu, columns.cpu_total, columns.cpu_used),
        ("memory", need.memory, columns.memory_total, columns.memory_used),
    ):
        if amount:
            have = total[rows]
            out.append(_Short(detail, amount, have - used[rows], have < amount))
    if need.pids:
        have = columns.pids_total[rows]
        free = np.where(have > 0, have - columns.pids_used[rows], need.pids)
        out.append(_Short("pids", need.pids, free, (have > 0) & (have < need.pids)))
    for kind, count in need.generic:
        named = need.named_of(kind)
        free = columns.generic(kind)[rows] - named
        never = columns.generic(kind, empty=True)[rows] - named < count
        out.append(_Short(kind, count, free, never))
    return out


def _things(table: NodeTable, need: Requirement, rows: Ints) -> list[_Things]:
    infos = [table.columns.infos[row] for row in rows.tolist()]
    out = []
    for kind, name in need.generic_named:
        lost = Rejection("resources", f"{kind}={name}", 1, 0)
        never = np.array(
            [i is None or name not in i.named_total.get(kind, ()) for i in infos], np.bool_
        )
        taken = [
            lost if i is None or gone or (kind, name) in i.named_used else None
            for i, gone in zip(infos, never.tolist(), strict=True)
        ]
        out.append(_Things(taken, never))
    if need.unknown_devices:
        lost = Rejection("resources", f"device {need.unknown_devices[0]}", 1, 0)
        out.append(_Things([lost] * len(rows), np.ones(len(rows), np.bool_)))
    if need.gpus is not None:
        out.append(_gpus(need, infos))
    return out


def _gpus(need: Requirement, infos: Sequence[NodeInfo | None]) -> _Things:
    """Nodes that are alike, and of whose GPUs as much is free, are asked once."""
    ask = need.gpus
    assert ask is not None
    now: dict[object, Rejection | None] = {}
    ever: dict[object, bool] = {}
    found: list[Rejection | None] = []
    never = np.zeros(len(infos), np.bool_)
    for i, info in enumerate(infos):
        if info is None:
            found.append(None)
            continue
        kind: object = info.gpu_kinds if not ask.ids else info.id
        if kind not in ever:
            ever[kind] = gpu_shortage(info, ask, empty=True) is not None
        never[i] = ever[kind]
        free, memory = info.gpu_free()
        key = (kind, *free, *memory)
        if key not in now:
            now[key] = gpu_shortage(info, ask, empty=False)
        found.append(now[key])
    return _Things(found, never)
