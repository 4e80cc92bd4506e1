"""What is free on nodes with GPUs, and the best place for a task.

`GpuAccount` holds arrays with one row a node and keeps them up to date claim by claim; scores are
kept per need and worked out again only for nodes that changed since. It is the counterpart of
NodeTable for everything that the placement of GPUs looks at; it knows no services and no filters:
the caller says which nodes come into question (`among`).

Invariants:
- `claim` never takes more of a dimension than is free: CPU, memory, GPU shares, GPU memory.
- Several GPUs are whole ones of one node; a part comes from one GPU; models are respected.
- A release gives back exactly what the claim took.
- The same nodes and claims, in whatever order they came, give the same decision: equal scores are
  decided by what is free once the task is there, and by node id last.

A claim made elsewhere (`take`: read from the store) is a fact and counts even where it does not
fit; what is free is then negative, and nothing is placed there until it is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from manager.scheduler.gpus.fragmentation import SCALE, Ints, Models, Valuation
from manager.scheduler.gpus.needs import WHOLE, GpuNeed, GpuNode
from manager.scheduler.gpus.policies import (
    FGD,
    FGD_PAPER,
    NOT_ONE,
    POLICIES,
    Bools,
    States,
    first_whole,
)
from manager.scheduler.gpus.workload import Workload
from swarm import errors
from swarm.errors import invariant

_FAR = 1 << 62  # the score of a node that the task does not fit on
_CACHES_MAX = 1024  # needs whose scores are kept
DIMENSIONS = ("excluded", "model", "gpu", "gpu_memory", "cpu", "memory")


@dataclass(frozen=True, slots=True)
class GpuHold:
    """What one task holds: the node, and the uuids of its GPUs."""

    need: GpuNeed
    node_id: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GpuDecision:
    """The best place, and why. Scores as the policy has them, for fgd in GPUs; lower is better.
    `ties`: other nodes with the same score; `fitting`: nodes the task fits on.
    """

    node_id: str
    gpus: tuple[str, ...]
    policy: str
    score: float
    fitting: int
    ties: int
    runner_up: str = ""
    runner_up_score: float = 0.0

    @property
    def reason(self) -> str:
        """One line for people."""
        what = "fragmentation grows by" if self.policy in (FGD, FGD_PAPER) else "score"
        line = f"{self.policy}: {what} {self.score:.3f}, best of {self.fitting} nodes that fit"
        if not self.runner_up:
            return line
        if self.ties:
            return f"{line}, the same as {self.ties} more (next {self.runner_up}): fullest first"
        return f"{line}; next {self.runner_up} with {self.runner_up_score:.3f}"


class _Scores:
    """Scores of one need by row, and the version of each row that they hold for."""

    __slots__ = ("gpu", "score", "version")

    def __init__(self, rows: int) -> None:
        self.version = np.full(rows, -1, np.int64)
        self.score = np.full(rows, _FAR, np.int64)
        self.gpu = np.full(rows, NOT_ONE, np.int64)


class GpuAccount:
    """Nodes, claims, and the policy that chooses."""

    def __init__(self, policy: str = FGD, workload: Workload | None = None) -> None:
        if policy not in POLICIES:
            raise errors.Invalid(
                f'unknown policy "{policy}" for GPUs: use one of {", ".join(POLICIES)}'
            )
        self.policy = policy
        self.workload = workload if workload is not None else Workload()
        self._models = Models()
        self._valuation = Valuation(self.workload, self._models, stranded=policy != FGD_PAPER)
        self._nodes: dict[str, GpuNode] = {}
        self._row: dict[str, int] = {}
        self._ids: list[str] = []  # by row; "" free
        self._free_rows: list[int] = []
        self._claims: dict[str, GpuHold] = {}
        self._on: dict[str, set[str]] = {}  # claims by node id, also of nodes not (yet) there
        self._caches: dict[GpuNeed, _Scores] = {}
        self._largest = (1, 1, 1)
        self._shape(0, 0)

    def _shape(self, rows: int, gpus: int) -> None:
        """Arrays of another size, with the old ones' content."""
        old = getattr(self, "_gpu", np.zeros((0, 0), np.int64))
        have = (min(rows, old.shape[0]), min(gpus, old.shape[1]))
        for name in ("_cpu", "_memory", "_cpu_total", "_memory_total", "_version"):
            array = np.zeros(rows, np.int64)
            array[: have[0]] = getattr(self, name, array)[: have[0]]
            setattr(self, name, array)
        there = np.zeros(rows, np.bool_)
        there[: have[0]] = getattr(self, "_there", there)[: have[0]]
        self._there = there
        for name in ("_gpu", "_gpu_total", "_gpu_model", "_gpu_memory"):
            table = np.zeros((rows, gpus), np.int64)
            table[: have[0], : have[1]] = getattr(self, name, table)[: have[0], : have[1]]
            setattr(self, name, table)
        self._caches.clear()

    _cpu: Ints
    _memory: Ints
    _cpu_total: Ints
    _memory_total: Ints
    _version: Ints
    _there: Bools
    _gpu: Ints
    _gpu_total: Ints
    _gpu_model: Ints
    _gpu_memory: Ints

    # Nodes.

    def update(self, node: GpuNode) -> None:
        """Takes a new node or a new version of one; its claims stay."""
        if self._nodes.get(node.id) == node:
            return
        row = self._row.get(node.id)
        rows, gpus = self._gpu.shape
        if row is None and self._free_rows:
            row = self._free_rows.pop()
        elif row is None:
            row = len(self._ids)
            self._ids.append("")
        if row >= rows or len(node.gpus) > gpus:
            self._shape(
                max(rows, 16, row + 1 if row < rows else 2 * rows), max(gpus, len(node.gpus))
            )
        self._nodes[node.id] = node
        self._row[node.id] = row
        self._ids[row] = node.id
        self._there[row] = True
        self._reset(row, node)
        for task_id in sorted(self._on.get(node.id, ())):
            self._add(self._claims[task_id], 1)
        self._measure()

    def remove(self, node_id: str) -> None:
        """Forgets a node. Its claims count again when it comes back."""
        if node_id in self._nodes:
            del self._nodes[node_id]
            row = self._row.pop(node_id)
            self._ids[row] = ""
            self._there[row] = False
            self._free_rows.append(row)
            self._reset(row, GpuNode(id=node_id))
            self._measure()

    def _reset(self, row: int, node: GpuNode) -> None:
        self._cpu[row] = self._cpu_total[row] = node.cpu
        self._memory[row] = self._memory_total[row] = node.memory
        for table in (self._gpu, self._gpu_total, self._gpu_model, self._gpu_memory):
            table[row] = 0
        for i, gpu in enumerate(node.gpus):
            self._gpu[row, i] = self._gpu_total[row, i] = WHOLE
            self._gpu_model[row, i] = self._models.code(gpu.model)
            self._gpu_memory[row, i] = gpu.memory_bytes
        self._version[row] += 1

    def _measure(self) -> None:
        largest = (
            max(1, int(self._cpu_total.max(initial=0))),
            max(1, int(self._memory_total.max(initial=0))),
            max(1, int(self._gpu_total.sum(axis=1).max(initial=0))),
        )
        if largest != self._largest:
            self._largest = largest
            self._caches.clear()

    # Claims.

    def claim(
        self, task_id: str, need: GpuNeed, among: Iterable[str] | None = None
    ) -> GpuHold | None:
        """Takes the best place for a task; None: there is none."""
        found = self._lowest(need, among)
        if found is None:
            return None
        claim = GpuHold(need, self._ids[found[0]], self._chosen(found[0], need))
        self.take(task_id, claim)
        row = self._row[claim.node_id]
        lowest = min(
            int(self._cpu[row]), int(self._memory[row]), int(self._gpu[row].min(initial=0))
        )
        invariant(lowest >= 0, f"node {claim.node_id} is oversubscribed by task {task_id}")
        return claim

    def take(self, task_id: str, claim: GpuHold) -> None:
        """Counts a claim that was decided elsewhere; the same one twice is once."""
        if self._claims.get(task_id) == claim:
            return
        self.release(task_id)
        self._claims[task_id] = claim
        self._on.setdefault(claim.node_id, set()).add(task_id)
        self._add(claim, 1)

    def release(self, task_id: str) -> bool:
        """Gives back what a task holds; False: it held nothing."""
        claim = self._claims.pop(task_id, None)
        if claim is None:
            return False
        held = self._on[claim.node_id]
        held.discard(task_id)
        if not held:
            del self._on[claim.node_id]
        self._add(claim, -1)
        return True

    def held(self, task_id: str) -> GpuHold | None:
        """What a task holds."""
        return self._claims.get(task_id)

    def _add(self, claim: GpuHold, sign: int) -> None:
        row = self._row.get(claim.node_id)
        if row is None:
            return
        need = claim.need
        self._cpu[row] -= sign * need.cpu
        self._memory[row] -= sign * need.memory
        for i, gpu in enumerate(self._nodes[claim.node_id].gpus):
            if gpu.uuid in claim.gpus:
                self._gpu[row, i] -= sign * need.share
                self._gpu_memory[row, i] -= sign * need.gpu_memory_bytes
        self._version[row] += 1

    # Decisions.

    def best(self, need: GpuNeed, among: Iterable[str] | None = None) -> GpuDecision | None:
        """The best place of a task now; None: it fits nowhere. Takes nothing."""
        found = self._lowest(need, among)
        if found is None:
            return None
        row, score = found
        lowest = int(score[row])
        others = score < _FAR
        others[row] = False
        next_row = -1
        if others.any():
            second = score[others].min()
            next_row = self._first(np.flatnonzero(others & (score == second)))
        return GpuDecision(
            node_id=self._ids[row],
            gpus=self._chosen(row, need),
            policy=self.policy,
            score=self._in_gpus(lowest),
            fitting=int(others.sum()) + 1,
            ties=int((score == lowest).sum()) - 1,
            runner_up=self._ids[next_row] if next_row >= 0 else "",
            runner_up_score=self._in_gpus(int(score[next_row])) if next_row >= 0 else 0.0,
        )

    def _lowest(self, need: GpuNeed, among: Iterable[str] | None) -> tuple[int, Ints] | None:
        """The row of the best node, and all scores."""
        score = self._scores(need).score
        if among is not None:
            keep = np.zeros(len(score), np.bool_)
            keep[[self._row[i] for i in among if i in self._row]] = True
            score = np.where(keep, score, _FAR)
        lowest = score.min(initial=_FAR)
        if lowest == _FAR:
            return None
        return self._first(np.flatnonzero(score == lowest)), score

    def rejected(self, need: GpuNeed, among: Iterable[str] | None = None) -> dict[str, int]:
        """How many nodes fall out at each of DIMENSIONS, each counted once, at the first; with
        those that fit (key "") they add up to all nodes.
        """
        chosen = None if among is None else set(among)
        allowed = self._models.allowed(need.models)[self._gpu_model]
        tests: tuple[Bools, ...] = (
            np.array([chosen is None or node_id in chosen for node_id in self._ids], np.bool_),
            allowed.sum(axis=1) >= need.count,
            (allowed & (self._gpu >= need.share)).sum(axis=1) >= need.count,
            self._suits(need, np.arange(len(self._cpu))).sum(axis=1) >= need.count,
            self._cpu >= need.cpu,
            self._memory >= need.memory,
        )
        left = np.array([bool(node_id) for node_id in self._ids], np.bool_)
        out = {}
        for name, test in zip(DIMENSIONS, tests, strict=True):
            test = test[: len(left)]
            out[name] = int((left & ~test).sum())
            left &= test
        out[""] = int(left.sum())
        return out

    def fragmentation(self) -> float:
        """Free GPUs of the cluster that the typical workload cannot use, by the paper's measure."""
        valuation = self._valuation
        valuation.refresh()
        if not valuation.total or not len(self._cpu):
            return 0.0
        packed = valuation.pack(self._gpu, self._gpu_model, self._gpu_memory)
        rows = np.column_stack((self._cpu, self._memory, packed))
        value = valuation.fragmentation(rows[:, 0], rows[:, 1], rows[:, 2:])
        return int(value.sum()) / (valuation.total * WHOLE)

    def _in_gpus(self, score: int) -> float:
        if self.policy in (FGD, FGD_PAPER):
            return score / (max(1, self._valuation.total) * SCALE * WHOLE)
        return float(score)

    def _first(self, rows: Ints) -> int:
        """Of rows with equal scores the one to take: the least free GPU, then CPU, then memory;
        then by the rest of their state, so that what the cluster can take next does not depend on
        names; then the id.
        """
        if len(rows) > 1:
            amount = self._gpu[rows].sum(axis=1)
            rows = rows[amount == amount.min()]
        for free in (self._cpu, self._memory):
            if len(rows) > 1:
                amount = free[rows]
                rows = rows[amount == amount.min()]
        if len(rows) == 1:
            return int(rows[0])
        rank = self._models.ranks()[self._gpu_model[rows]]
        tables = [self._gpu[rows], rank, self._gpu_memory[rows]]
        order = np.lexsort(tables[::-1], axis=1)
        columns = [np.take_along_axis(table, order, axis=1) for table in tables]
        columns += [self._cpu_total[rows, None], self._memory_total[rows, None]]
        state = np.concatenate(columns, axis=1)
        for column in np.flatnonzero((state != state[0]).any(axis=0)):
            keep = state[:, column] == state[:, column].min()
            rows, state = rows[keep], state[keep]
        ids = self._ids
        return self._row[min(ids[row] for row in rows.tolist())]

    def _suits(self, need: GpuNeed, rows: Ints) -> Bools:
        """By row and GPU: whether the task may have it now."""
        if not need.count:
            return np.zeros((len(rows), self._gpu.shape[1]), np.bool_)
        suits = self._gpu[rows] >= need.share
        if need.models:
            suits &= self._models.allowed(need.models)[self._gpu_model[rows]]
        if need.gpu_memory_bytes:
            suits &= self._gpu_memory[rows] >= need.gpu_memory_bytes
        return np.asarray(suits, np.bool_)

    def _scores(self, need: GpuNeed) -> _Scores:
        """The scores of all nodes, worked out for those that changed."""
        if self._valuation.refresh() and self.policy in (FGD, FGD_PAPER):
            self._caches.clear()
        scores = self._caches.get(need)
        if scores is None:
            while len(self._caches) >= _CACHES_MAX:
                del self._caches[next(iter(self._caches))]
            scores = self._caches[need] = _Scores(len(self._cpu))
        changed = np.flatnonzero(scores.version != self._version)
        if len(changed):
            scores.version[changed] = self._version[changed]
            self._rate(need, changed, scores)
        return scores

    def _rate(self, need: GpuNeed, changed: Ints, scores: _Scores) -> None:
        scores.score[changed] = _FAR
        room = (self._cpu[changed] >= need.cpu) & (self._memory[changed] >= need.memory)
        rows = changed[room & self._there[changed]]
        suits = self._suits(need, rows)
        fits = suits.sum(axis=1) >= need.count
        rows, suits = rows[fits], suits[fits]
        if not len(rows):
            return
        states = States(
            cpu=self._cpu[rows],
            memory=self._memory[rows],
            cpu_total=self._cpu_total[rows],
            memory_total=self._memory_total[rows],
            gpu=self._gpu[rows],
            gpu_total=self._gpu_total[rows],
            gpu_model=self._gpu_model[rows],
            gpu_memory=self._gpu_memory[rows],
            suits=suits,
            largest=self._largest,
        )
        scores.score[rows], scores.gpu[rows] = POLICIES[self.policy](states, need, self._valuation)

    def _chosen(self, row: int, need: GpuNeed) -> tuple[str, ...]:
        """The GPUs of the node that the task gets, by the score just worked out."""
        gpus = self._nodes[self._ids[row]].gpus
        one = int(self._caches[need].gpu[row])
        if one != NOT_ONE:
            return (gpus[one].uuid,)
        taken = first_whole(self._suits(need, np.array([row])), need.count)[0]
        return tuple(gpus[i].uuid for i in np.flatnonzero(taken))

    # Checks.

    def check_invariants(self) -> None:
        """Free is total less claims, everywhere, and kept scores are those worked out anew."""
        fresh = GpuAccount(self.policy, self.workload)
        for node in self._nodes.values():
            fresh.update(node)
        for task_id, claim in self._claims.items():
            fresh.take(task_id, claim)
        for node_id, row in self._row.items():
            other = fresh._row[node_id]
            width = len(self._nodes[node_id].gpus)
            invariant(self._cpu[row] == fresh._cpu[other], f"free CPU of {node_id} is off")
            invariant(self._memory[row] == fresh._memory[other], f"memory of {node_id} is off")
            for mine, theirs in (
                (self._gpu, fresh._gpu),
                (self._gpu_memory, fresh._gpu_memory),
            ):
                same = np.array_equal(mine[row, :width], theirs[other, :width])
                invariant(bool(same), f"the free GPUs of {node_id} are off")
        for need in [*self._caches]:
            kept, anew = self._scores(need), fresh._scores(need)
            for node_id, row in self._row.items():
                same = kept.score[row] == anew.score[fresh._row[node_id]]
                invariant(bool(same), f"the kept score of {node_id} for {need} is off")
