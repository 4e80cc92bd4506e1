"""Groups that found no place, and which of them a change could help.

A group that no node could take sleeps, with what it needs. Groups that are alike (the same
requirement, the same terms) lie in one bed: what helps one helps all, so a change is compared with
beds and not with groups, and of a bed only as many groups are woken as there is room for, in their
order. One node that gets free then costs a comparison of columns over all beds, a closer look at
those whose amounts fit, and the turns of who can be helped: not a look at all that wait.

What wakes: a node that changed or on which a claim was given up (`stir`), for beds whose need it
satisfies now; a change of a service's tasks (`stir_service`), for its own groups (max_replicas,
gangs) and those with a condition on it. What wakes for other reasons (quotas, priorities,
reservations) is the caller's to know.

Invariant: a group that sleeps fits on no node, unless one was stirred that was not settled yet.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manager.scheduler.filters import barred, fits, unavailable
from manager.scheduler.masks import Ints
from manager.scheduler.nodeinfo import NodeInfo
from manager.scheduler.ranking import GroupKey
from manager.scheduler.requirement import Requirement
from manager.scheduler.table import NodeTable
from swarm.errors import invariant
from swarm.gpus import WHOLE

_AMOUNTS = 5  # CPU, memory, processes, whole GPUs, the share of one GPU


@dataclass(slots=True)
class _Sleeper:
    key: GroupKey
    order: Any  # sorts groups of a bed; the key last
    tasks: int
    bed: _Bed
    told: int  # the table's changes when it was last told why


@dataclass(slots=True)
class _Bed:
    """Groups that are alike."""

    id: Hashable
    index: int
    need: Requirement
    service_id: str  # of whom max_replicas counts; empty where that does not matter
    node_id: str  # the only node that will do; empty: any
    groups: list[tuple[Any, GroupKey]] = field(default_factory=list)  # in order


@dataclass(slots=True)
class Woken:
    """Who was woken by what; to be settled once it is known what became of it."""

    keys: list[GroupKey] = field(default_factory=list)
    nodes: frozenset[str] = frozenset()
    services: frozenset[str] = frozenset()
    beds: list[Hashable] = field(default_factory=list)


class Sleepers:
    """All groups that sleep."""

    def __init__(self, table: NodeTable) -> None:
        self._table = table
        self._of: dict[GroupKey, _Sleeper] = {}
        self._by_service: dict[str, dict[GroupKey, None]] = {}
        self._beds: dict[Hashable, _Bed] = {}
        self._by_index: list[_Bed | None] = []
        self._free: list[int] = []
        self._bound: dict[str, dict[Hashable, None]] = {}
        self._among: dict[Hashable, None] = {}  # beds with conditions on services
        self._amounts: Ints = np.zeros((_AMOUNTS, 0), np.int64)
        self._nodes: dict[str, None] = {}
        self._services: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, key: GroupKey) -> bool:
        return key in self._of

    # ------------------------------------------------------------------ beds

    def sleep(
        self,
        key: GroupKey,
        need: Requirement,
        *,
        terms: Hashable,
        order: Any,
        tasks: int,
        told: int,
    ) -> None:
        """The group found no place for so many tasks. `terms`: what else makes groups alike;
        `order`: what puts groups of a bed in order; `told`: the table's changes when that was said.
        """
        self.forget(key)
        own = key[0] if need.of_service or need.affinities else ""
        id_ = (need, terms, own, key[2])
        bed = self._beds.get(id_)
        if bed is None:
            bed = self._make(id_, need, own, key[2])
        self._of[key] = _Sleeper(key, order, tasks, bed, told)
        insort(bed.groups, (order, key))
        self._by_service.setdefault(key[0], {})[key] = None

    def _make(self, id_: Hashable, need: Requirement, own: str, node_id: str) -> _Bed:
        if self._free:
            index = self._free.pop()
        else:
            index = len(self._by_index)
            self._by_index.append(None)
            if index >= self._amounts.shape[1]:
                grown = np.zeros((_AMOUNTS, max(64, 2 * index)), np.int64)
                grown[:, :index] = self._amounts[:, :index]
                self._amounts = grown
        bed = self._beds[id_] = _Bed(id_, index, need, own, node_id)
        self._by_index[index] = bed
        ask = need.gpus
        # What may be served by a generic account is not asked of the GPUs here.
        plain = ask is not None and not (ask.generic or ask.generic_named)
        whole = ask.wanted if ask is not None and plain and not ask.shared else 0
        share = ask.share if ask is not None and plain else 0
        self._amounts[:, index] = (need.cpu, need.memory, need.pids, whole, share)
        if node_id:
            self._bound.setdefault(node_id, {})[id_] = None
        if need.among:
            self._among[id_] = None
        return bed

    def forget(self, key: GroupKey) -> None:
        """The group sleeps no more."""
        sleeper = self._of.pop(key, None)
        if sleeper is None:
            return
        bed = sleeper.bed
        at = bisect_left(bed.groups, (sleeper.order, key))
        del bed.groups[at]
        mine = self._by_service[key[0]]
        del mine[key]
        if not mine:
            del self._by_service[key[0]]
        if not bed.groups:
            del self._beds[bed.id]
            self._by_index[bed.index] = None
            self._free.append(bed.index)
            self._among.pop(bed.id, None)
            if bed.node_id:
                here = self._bound[bed.node_id]
                del here[bed.id]
                if not here:
                    del self._bound[bed.node_id]

    def forget_service(self, service_id: str) -> None:
        """Nothing of the service waits any more."""
        for key in list(self._by_service.get(service_id, ())):
            self.forget(key)

    def tasks(self, key: GroupKey) -> int:
        """For how many tasks the group that sleeps found no place."""
        return self._of[key].tasks

    def untold(self) -> Iterator[GroupKey]:
        """Who was told why before the table changed, longest ago first."""
        now = self._table.changes
        for key, sleeper in self._of.items():
            if sleeper.told == now:
                return
            yield key

    def tell(self, key: GroupKey, told: int) -> None:
        """The group was told why as of these changes."""
        sleeper = self._of.pop(key, None)
        if sleeper is not None:
            sleeper.told = told
            self._of[key] = sleeper

    # ------------------------------------------------------------------ waking

    def stir(self, node_id: str) -> None:
        """The node has changed, or has more free than before."""
        self._nodes[node_id] = None

    def stir_service(self, service_id: str) -> None:
        """A task of the service has come or gone, or is to go."""
        if service_id in self._by_service or self._among:
            self._services[service_id] = None

    @property
    def stirred(self) -> bool:
        """Whether something has changed since it was last settled."""
        return bool(self._nodes or self._services)

    def wake(self) -> Woken:
        """Whom what was stirred could help as the table is now; asleep until `settle`."""
        woken = Woken(nodes=frozenset(self._nodes), services=frozenset(self._services))
        room: dict[Hashable, int] = {}
        keys: dict[GroupKey, None] = {}
        if self._of:
            for node_id in self._nodes:
                info = self._table.nodes.get(node_id)
                if info is not None and unavailable(info.node) is None:
                    self._look(info, room)
        for id_, count in room.items():
            woken.beds.append(id_)
            for _, key in self._beds[id_].groups:
                keys[key] = None
                count -= self._of[key].tasks
                if count <= 0:
                    break
        for service_id in self._services:
            keys.update(self._by_service.get(service_id, {}))
            for id_ in self._among:
                bed = self._beds[id_]
                if any(service_id in self._table.meaning(c) for c in bed.need.among):
                    keys.update(dict.fromkeys(key for _, key in bed.groups))
        woken.keys = list(keys)
        return woken

    def _look(self, info: NodeInfo, room: dict[Hashable, int]) -> None:
        """Adds up the room that the node has for each bed."""
        count = len(self._by_index)
        amounts = self._amounts[:, :count]
        free, _ = info.gpu_free()
        pids = info.pids_free()
        could = (amounts[0] <= info.cpu_total - info.cpu_used) & (
            amounts[1] <= info.memory_total - info.memory_used
        )
        if pids is not None:
            could &= amounts[2] <= pids
        could &= amounts[3] <= sum(share >= WHOLE for share in free)
        could &= amounts[4] <= max(free, default=0)
        static: dict[object, bool] = {}
        for index in np.flatnonzero(could).tolist():
            bed = self._by_index[index]
            if bed is None or bed.node_id not in ("", info.id):
                continue
            key = bed.need.static
            suits = static.get(key)
            if suits is None:
                suits = static[key] = barred(info.node, bed.need) is None
            if suits and (found := fits(info, bed.need, bed.service_id)) > 0:
                room[bed.id] = room.get(bed.id, 0) + found

    def settle(self, woken: Woken, left: Iterable[GroupKey]) -> None:
        """What was woken has had its turns. `left`: who was tried and found no place for all; they
        were put to sleep anew. The others that were woken have what they need, or are gone. Where
        a bed has no such one left, more of it may fit: the nodes stay stirred.
        """
        stuck = {sleeper.bed.id for key in left if (sleeper := self._of.get(key)) is not None}
        for node_id in woken.nodes:
            self._nodes.pop(node_id, None)
        for service_id in woken.services:
            self._services.pop(service_id, None)
        again = any(id_ in self._beds and id_ not in stuck for id_ in woken.beds)
        if again:
            self._nodes.update(dict.fromkeys(woken.nodes))

    def check_invariants(self) -> None:
        """The indexes agree; for tests."""
        for key, sleeper in self._of.items():
            invariant((sleeper.order, key) in sleeper.bed.groups, f"{key} is not in its bed")
            invariant(self._by_index[sleeper.bed.index] is sleeper.bed, "a bed has no place")
        total = sum(len(bed.groups) for bed in self._beds.values())
        invariant(total == len(self._of), "a bed holds who does not sleep")
