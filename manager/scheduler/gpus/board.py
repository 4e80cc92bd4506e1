"""What is free on nodes with GPUs, as arrays, and how good each node is for a task.

`GpuBoard` has one row a node and is told what is free there; it knows no claims. Scores are kept
per need and worked out again only for nodes that changed since, and of these only for states that
were not met before: nodes that are alike are scored once.

The same nodes with the same free amounts give the same decision, whatever the order in which they
came: equal scores are decided by what is free there, and by node id last. A task with several whole
GPUs goes where they are joined by NVLink before one NUMA node before anywhere else, before the
score decides; a node that does not say how its GPUs are joined counts as the last of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manager.scheduler.gpus.fragmentation import SCALE, Ints, Models, Valuation
from manager.scheduler.gpus.links import APART, JOINED, choose
from manager.scheduler.gpus.needs import GpuNeed, GpuNode, Links
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
from swarm.gpus import WHOLE

FAR = 1 << 62  # the score of a node that the task does not fit on
_APART_BITS = 58  # how well the GPUs are joined stands above the score
_CACHES_MAX = 1024  # needs whose scores are kept
_MEMO_MAX = 1 << 16  # states whose score is kept, of one need
_FEW = 16  # rows that are looked up one by one
_LOG_MAX = 4_096  # changes remembered beyond one a row
DIMENSIONS = ("excluded", "model", "gpu", "gpu_memory", "cpu", "memory")


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
        nodes = "1 node that fits" if self.fitting == 1 else f"{self.fitting} nodes that fit"
        line = f"{self.policy}: {what} {self.score:.3f}, best of {nodes}"
        if not self.runner_up:
            return line
        if self.ties:
            return f"{line}, the same as {self.ties} more (next {self.runner_up}): fullest first"
        return f"{line}; next {self.runner_up} with {self.runner_up_score:.3f}"


class _Scores:
    """Scores of one need by row, as of a place in the log of changes."""

    __slots__ = ("at", "gpu", "memo", "score", "taken")

    def __init__(self, rows: int) -> None:
        self.at = -1
        self.score = np.full(rows, FAR, np.int64)
        self.gpu = np.full(rows, NOT_ONE, np.int64)
        self.memo: dict[bytes, tuple[int, int]] = {}
        self.taken: dict[bytes, tuple[int, ...]] = {}  # whole GPUs, by state


class GpuBoard:
    """Nodes, what is free on them, and the policy that chooses."""

    def __init__(self, policy: str = FGD, workload: Workload | None = None) -> None:
        if policy not in POLICIES:
            raise errors.Invalid(
                f'unknown policy "{policy}" for GPUs: use one of {", ".join(POLICIES)}'
            )
        self.policy = policy
        self.workload = workload if workload is not None else Workload()
        self.nodes: dict[str, GpuNode] = {}
        self.row: dict[str, int] = {}
        self.ids: list[str] = []  # by row; "" free
        self.changes = 0  # of who is there: counts up when a row gets or loses its node
        self._models = Models()
        # With stranded GPU, and as published.
        self._whole_value = Valuation(self.workload, self._models)
        self._paper_value = Valuation(self.workload, self._models, stranded=False)
        self._links: dict[Links, int] = {(): 0}
        self._links_by_code: list[Links] = [()]
        self._free_rows: list[int] = []
        self._log: list[int] = []
        self._dropped = 0
        self._caches: dict[tuple[str, GpuNeed], _Scores] = {}
        self._largest = (1, 1, 1)
        self._id_rank: Ints | None = None
        self._shape(0, 0)

    def use_policy(self, policy: str) -> None:
        """Chooses by another policy from now on."""
        if policy != self.policy and policy in POLICIES:
            self.policy = policy
            self._caches.clear()

    def _shape(self, rows: int, gpus: int) -> None:
        """Arrays of another size, with the old ones' content. All of a node's state is one row, so
        that its bytes tell whether two nodes are alike.
        """
        old: Ints = getattr(self, "_state", np.zeros((0, 6), np.int64))
        had = (old.shape[1] - 6) // 4
        state = np.zeros((rows, 6 + 4 * gpus), np.int64)
        n = min(rows, old.shape[0])
        state[:n, :6] = old[:n, :6]
        for i in range(4):
            state[:n, 6 + i * gpus : 6 + i * gpus + had] = old[:n, 6 + i * had : 6 + (i + 1) * had]
        self._state = state
        self._gpus = gpus
        self._cpu, self._memory = state[:, 0], state[:, 1]
        self._cpu_total, self._memory_total = state[:, 2], state[:, 3]
        self._there, self._link = state[:, 4], state[:, 5]
        parts = [state[:, 6 + i * gpus : 6 + (i + 1) * gpus] for i in range(4)]
        self._gpu, self._gpu_memory, self._gpu_model, self._gpu_total = parts
        total = np.zeros(rows, np.int64)
        total[:n] = getattr(self, "_gpu_sum", total)[:n]
        self._gpu_sum = total
        self._caches.clear()

    _state: Ints
    _gpu_sum: Ints

    # Nodes.

    def update(self, node: GpuNode) -> bool:
        """Takes a new node or a new version of one, with nothing claimed on it; False: it is as it
        was, and so is what is free there.
        """
        if self.nodes.get(node.id) == node:
            return False
        row = self.row.get(node.id)
        if row is None:
            self.changes += 1
            self._id_rank = None
            if self._free_rows:
                row = self._free_rows.pop()
            else:
                row = len(self.ids)
                self.ids.append("")
        rows, gpus = self._gpu.shape
        if row >= rows or len(node.gpus) > gpus:
            self._shape(
                max(rows, 16, row + 1 if row < rows else 2 * rows), max(gpus, len(node.gpus))
            )
        self.nodes[node.id] = node
        self.row[node.id] = row
        self.ids[row] = node.id
        self._reset(row, node, there=1)
        self._measure()
        return True

    def remove(self, node_id: str) -> None:
        """Forgets a node."""
        if node_id in self.nodes:
            self.changes += 1
            self._id_rank = None
            del self.nodes[node_id]
            row = self.row.pop(node_id)
            self.ids[row] = ""
            self._free_rows.append(row)
            self._reset(row, GpuNode(id=node_id), there=0)
            self._measure()

    def _reset(self, row: int, node: GpuNode, *, there: int) -> None:
        self._state[row] = 0
        self._there[row] = there
        self._cpu[row] = self._cpu_total[row] = node.cpu
        self._memory[row] = self._memory_total[row] = node.memory
        code = self._links.setdefault(node.links, len(self._links))
        if code == len(self._links_by_code):
            self._links_by_code.append(node.links)
        self._link[row] = code
        for i, gpu in enumerate(node.gpus):
            self._gpu[row, i] = self._gpu_total[row, i] = WHOLE
            self._gpu_model[row, i] = self._models.code(gpu)
            self._gpu_memory[row, i] = gpu.memory_bytes
        self._gpu_sum[row] = len(node.gpus) * WHOLE
        self._note(row)

    def _note(self, row: int) -> None:
        self._log.append(row)
        if len(self._log) > len(self.ids) + _LOG_MAX:
            half = len(self._log) // 2
            del self._log[:half]
            self._dropped += half

    def _measure(self) -> None:
        largest = (
            max(1, int(self._cpu_total.max(initial=0))),
            max(1, int(self._memory_total.max(initial=0))),
            max(1, int(self._gpu_total.sum(axis=1).max(initial=0))),
        )
        if largest != self._largest:
            self._largest = largest
            self._caches.clear()

    @property
    def rows(self) -> int:
        """The length of columns of scores: rows without a node have FAR."""
        return len(self._cpu)

    # What is free.

    def set_free(
        self, node_id: str, cpu: int, memory: int, shares: Sequence[int], bytes_: Sequence[int]
    ) -> None:
        """What is free on a node: CPU, memory, and by GPU in the node's order shares and memory."""
        row = self.row[node_id]
        self._cpu[row] = cpu
        self._memory[row] = memory
        self._gpu[row, : len(shares)] = shares
        self._gpu_memory[row, : len(bytes_)] = bytes_
        self._gpu_sum[row] = sum(shares)
        self._note(row)

    def change(self, node_id: str, need: GpuNeed, gpus: Sequence[str], sign: int) -> int:
        """Takes (-1) or gives back (1) what a task holds; returns the least that is free of any
        dimension now.
        """
        row = self.row.get(node_id)
        if row is None:
            return 0
        self._cpu[row] += sign * need.cpu
        self._memory[row] += sign * need.memory
        for i, gpu in enumerate(self.nodes[node_id].gpus):
            if gpu.uuid in gpus:
                self._gpu[row, i] += sign * need.share
                self._gpu_memory[row, i] += sign * need.gpu_memory_bytes
                self._gpu_sum[row] += sign * need.share
        self._note(row)
        lowest = min(self._gpu[row].min(initial=0), self._gpu_memory[row].min(initial=0))
        return int(min(self._cpu[row], self._memory[row], lowest))

    def free(self, node_id: str) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        """What `set_free` was told, or follows from changes."""
        row, width = self.row[node_id], len(self.nodes[node_id].gpus)
        return (
            int(self._cpu[row]),
            int(self._memory[row]),
            tuple(self._gpu[row, :width].tolist()),
            tuple(self._gpu_memory[row, :width].tolist()),
        )

    # Decisions.

    def best(self, need: GpuNeed, keep: Bools | None = None) -> GpuDecision | None:
        """The best place of a task now; None: it fits nowhere. `keep`: rows in question."""
        score = self.scores(need, keep)
        row = self.lowest(score)
        if row is None:
            return None
        lowest = int(score[row])
        others = score < FAR
        others[row] = False
        next_row = -1
        if others.any():
            second = score[others].min()
            next_row = self.first(np.flatnonzero(others & (score == second)))
        return GpuDecision(
            node_id=self.ids[row],
            gpus=self.chosen(row, need),
            policy=self.policy,
            score=self._in_gpus(lowest),
            fitting=int(others.sum()) + 1,
            ties=int((score == lowest).sum()) - 1,
            runner_up=self.ids[next_row] if next_row >= 0 else "",
            runner_up_score=self._in_gpus(int(score[next_row])) if next_row >= 0 else 0.0,
        )

    def scores(self, need: GpuNeed, keep: Bools | None = None) -> Ints:
        """The score of each row, FAR where the task does not fit; not to be written to."""
        score = self._scores(need).score
        return score if keep is None else np.where(keep, score, FAR)

    def strands(self, need: GpuNeed) -> Ints:
        """How much GPU of each row a task takes the use of, whatever the policy is: how much the
        fragmentation grows. FAR where it does not fit.
        """
        return self._scores(need, FGD).score

    def _value(self, policy: str) -> Valuation:
        return self._paper_value if policy == FGD_PAPER else self._whole_value

    def lowest(self, score: Ints) -> int | None:
        """The row of the best node by these scores; None: it fits nowhere."""
        lowest = score.min(initial=FAR)
        if lowest == FAR:
            return None
        return self.first((score == lowest).nonzero()[0])

    def first(self, rows: Ints) -> int:
        """Of rows with equal scores the one to take: the least free GPU, then CPU, then memory;
        then by the rest of their state, so that what the cluster can take next does not depend on
        names; then the id.
        """
        for free in (self._gpu_sum, self._cpu, self._memory):
            if len(rows) == 1:
                return int(rows[0])
            amount = free[rows]
            rows = rows[amount == amount.min()]
        if len(rows) == 1:
            return int(rows[0])
        state = self._state[rows]
        if (state != state[0]).any():
            rows = self._least_state(rows)
        ranks = self._ranks()[rows]
        return int(rows[int(ranks.argmin())])

    def _least_state(self, rows: Ints) -> Ints:
        rank = self._models.ranks()[self._gpu_model[rows]]
        tables = [self._gpu[rows], rank, self._gpu_memory[rows]]
        order = np.lexsort(tables[::-1], axis=1)
        columns = [np.take_along_axis(table, order, axis=1) for table in tables]
        columns += [self._cpu_total[rows, None], self._memory_total[rows, None]]
        state = np.concatenate(columns, axis=1)
        for column in np.flatnonzero((state != state[0]).any(axis=0)):
            keep = state[:, column] == state[:, column].min()
            rows, state = rows[keep], state[keep]
        return rows

    def _ranks(self) -> Ints:
        """By row, the place of its id among all."""
        if self._id_rank is None or len(self._id_rank) < len(self.ids):
            order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
            ranks = np.zeros(len(order), np.int64)
            ranks[order] = np.arange(len(order))
            self._id_rank = ranks
        return self._id_rank

    def _in_gpus(self, score: int) -> float:
        score -= (score + (1 << _APART_BITS - 1) >> _APART_BITS) << _APART_BITS
        if self.policy in (FGD, FGD_PAPER):
            return score / (max(1, self._value(self.policy).total) * SCALE * WHOLE)
        return float(score)

    def suits(self, need: GpuNeed, rows: Ints) -> Bools:
        """By row and GPU: whether the task may have it now."""
        return self._suits(need, self._state[rows])

    def _suits(self, need: GpuNeed, state: Ints) -> Bools:
        g = self._gpus
        if not need.count:
            return np.zeros((len(state), g), np.bool_)
        suits = state[:, 6 : 6 + g] >= need.share
        if need.kind != ((), "", ""):
            suits &= self._models.allowed(need.kind)[state[:, 6 + 2 * g : 6 + 3 * g]]
        if need.gpu_memory_bytes:
            suits &= state[:, 6 + g : 6 + 2 * g] >= need.gpu_memory_bytes
        return np.asarray(suits, np.bool_)

    def _scores(self, need: GpuNeed, policy: str = "") -> _Scores:
        """The scores of all nodes, worked out for those that changed."""
        policy = policy or self.policy
        if self._value(policy).refresh():
            self._caches.clear()
        scores = self._caches.get((policy, need))
        if scores is None:
            while len(self._caches) >= _CACHES_MAX:
                del self._caches[next(iter(self._caches))]
            scores = self._caches[policy, need] = _Scores(len(self._cpu))
        now = self._dropped + len(self._log)
        if scores.at != now:
            if scores.at < self._dropped or now - scores.at > len(self.ids):
                rows = [*range(len(self.ids))]
            else:
                rows = [*dict.fromkeys(self._log[scores.at - self._dropped :])]
            self._rate(need, policy, rows, scores)
            scores.at = now
        return scores

    def _rate(self, need: GpuNeed, policy: str, rows: list[int], scores: _Scores) -> None:
        memo, state = scores.memo, self._state
        unknown: dict[bytes, list[int]] = {}
        if len(rows) > _FEW:
            # On a full cluster most nodes are out of the question; that is seen for all at once.
            at = np.array(rows)
            fits = self._fits(need, state[at])
            scores.score[at] = FAR
            rows = at[fits].tolist()
        data, width = state[rows].tobytes(), state.shape[1] * 8
        for i, row in enumerate(rows):
            key = data[i * width : (i + 1) * width]
            found = memo.get(key)
            if found is not None:
                scores.score[row], scores.gpu[row] = found
            else:
                unknown.setdefault(key, []).append(row)
        if not unknown:
            return
        if len(memo) > _MEMO_MAX:
            memo.clear()
            scores.taken.clear()
        score, gpu = self._rated(need, policy, state[[same[0] for same in unknown.values()]])
        for (key, same), s, g in zip(unknown.items(), score.tolist(), gpu.tolist(), strict=True):
            memo[key] = (s, g)
            scores.score[same] = s
            scores.gpu[same] = g

    def _rated(self, need: GpuNeed, policy: str, state: Ints) -> tuple[Ints, Ints]:
        """Scores of these states from scratch, and the GPUs to share."""
        score = np.full(len(state), FAR, np.int64)
        gpu = np.full(len(state), NOT_ONE, np.int64)
        rows = np.flatnonzero(self._fits(need, state))
        if not len(rows):
            return score, gpu
        state, g = state[rows], self._gpus
        suits = self._suits(need, state)
        whole, apart = self._whole(need, state, suits)
        states = States(
            cpu=state[:, 0],
            memory=state[:, 1],
            cpu_total=state[:, 2],
            memory_total=state[:, 3],
            gpu=state[:, 6 : 6 + g],
            gpu_total=state[:, 6 + 3 * g :],
            gpu_model=state[:, 6 + 2 * g : 6 + 3 * g],
            gpu_memory=state[:, 6 + g : 6 + 2 * g],
            suits=suits,
            whole=whole,
            largest=self._largest,
        )
        score[rows], gpu[rows] = POLICIES[policy](states, need, self._value(policy))
        score[rows] += apart << _APART_BITS
        return score, gpu

    def _fits(self, need: GpuNeed, state: Ints) -> Bools:
        """By state, whether the task fits there."""
        fits = (state[:, 4] > 0) & (state[:, 0] >= need.cpu) & (state[:, 1] >= need.memory)
        if need.count:
            fits &= self._suits(need, state).sum(axis=1) >= need.count
        return fits

    def _whole(self, need: GpuNeed, state: Ints, suits: Bools) -> tuple[Bools, Ints]:
        """By state the GPUs that a task with whole ones takes, and how far apart they are."""
        whole = first_whole(suits, need.count)
        apart = np.full(len(state), APART if need.count > 1 else JOINED, np.int64)
        if need.count and need.share == WHOLE:
            for i in np.flatnonzero(state[:, 5]).tolist():
                free = tuple(np.flatnonzero(suits[i]).tolist())
                taken, far = choose(self._links_by_code[int(state[i, 5])], free, need.count)
                whole[i] = False
                whole[i, list(taken)] = True
                apart[i] = far
        return whole, apart

    def chosen(self, row: int, need: GpuNeed) -> tuple[str, ...]:
        """The GPUs of the node that the task gets, where it fits."""
        gpus = self.nodes[self.ids[row]].gpus
        scores = self._scores(need)
        one = int(scores.gpu[row])
        if one != NOT_ONE:
            return (gpus[one].uuid,)
        state = self._state[row : row + 1]
        key = state.tobytes()
        taken = scores.taken.get(key)
        if taken is None:
            whole = self._whole(need, state, self._suits(need, state))[0][0]
            taken = scores.taken[key] = tuple(np.flatnonzero(whole).tolist())
        return tuple(gpus[i].uuid for i in taken)

    def rejected(self, need: GpuNeed, chosen: set[str] | None = None) -> dict[str, int]:
        """How many nodes fall out at each of DIMENSIONS, each counted once, at the first; with
        those that fit (key "") they add up to all nodes.
        """
        n = len(self.ids)
        allowed = self._models.allowed(need.kind)[self._gpu_model]
        tests: tuple[Bools, ...] = (
            np.array([chosen is None or node_id in chosen for node_id in self.ids], np.bool_),
            allowed.sum(axis=1) >= need.count,
            (allowed & (self._gpu >= need.share)).sum(axis=1) >= need.count,
            self._suits(need, self._state).sum(axis=1) >= need.count,
            self._cpu >= need.cpu,
            self._memory >= need.memory,
        )
        left = np.array([bool(node_id) for node_id in self.ids], np.bool_)
        out = {}
        for name, test in zip(DIMENSIONS, tests, strict=True):
            out[name] = int((left & ~test[:n]).sum())
            left &= test[:n]
        out[""] = int(left.sum())
        return out

    def fragmentation(self) -> float:
        """Free GPUs of the cluster that the typical workload cannot use, by the paper's measure."""
        valuation = self._whole_value
        valuation.refresh()
        if not valuation.total or not len(self._cpu):
            return 0.0
        packed = valuation.pack(self._gpu, self._gpu_model, self._gpu_memory)
        value = valuation.fragmentation(self._cpu, self._memory, packed)
        return int(value.sum()) / (valuation.total * WHOLE)

    # Checks.

    def check_invariants(self) -> None:
        """Kept scores are those worked out anew, and kept sums are sums."""
        fresh = GpuBoard(self.policy, self.workload)
        for node in self.nodes.values():
            fresh.update(node)
            fresh.set_free(node.id, *self.free(node.id))
        for node_id, row in self.row.items():
            same = int(self._gpu[row].sum()) == int(self._gpu_sum[row])
            invariant(same, f"the sum of free GPUs of {node_id} is off")
        for policy, need in [*self._caches]:
            kept, anew = self._scores(need, policy), fresh._scores(need, policy)
            for node_id, row in self.row.items():
                same = kept.score[row] == anew.score[fresh.row[node_id]]
                invariant(bool(same), f"the kept score of {node_id} for {need} is off")
