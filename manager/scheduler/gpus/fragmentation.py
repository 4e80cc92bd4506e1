"""The value of what is free on a node: its fragmentation, for the typical workload.

Method: Weng et al., "Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation
Gradient Descent", USENIX ATC 2023, section 4. For a task of kind m, the fragmentation of a node is
all its free GPU where the task does not fit, else the free GPU of those devices that are too small
for it; over the workload, the mean by the kinds' frequency. A task goes where it makes the
fragmentation of the node grow least.

Beyond the paper, `stranded`: fragmentation asks whether the *next* task fits, so it notices that
CPU runs out only when the last task has taken it, and leaves whole GPUs on nodes without CPU. The
stranded GPU of a node is what is left of its free GPU when its free CPU (or memory) is shared out
at the workload's mean CPU (memory) per GPU. It is added with weight 1; and once more with weight
0.3 at the mean that includes tasks without GPU, which matters where CPU is short on the whole
cluster.

All values are integers in units of one share times the workload's count times SCALE, computed
without floating-point sums: the same state has the same value whatever it is computed along with.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from manager.scheduler.gpus.needs import ANY_KIND, GpuDevice, Kind
from manager.scheduler.gpus.workload import Workload
from swarm.gpus import capability_holds, model_matches

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SCALE = 10
_STRANDED = 10  # weight of stranded GPU in SCALE: 1
_STRANDED_ALL = 3  # 0.3
_KINDS_MAX = 1024  # whose answers are kept
_MEMO_MAX = 1 << 18  # states remembered; then all are forgotten
# A GPU's state in one integer: free memory in MiB, model, free shares.
_SHARE_BITS, _MODEL_BITS = 20, 16
_SHARE_MASK, _MODEL_MASK = (1 << _SHARE_BITS) - 1, (1 << _MODEL_BITS) - 1
_MIB = 1 << 20


class Models:
    """What GPUs are (model, compute capability, vendor) as small numbers; 0 is the absent GPU."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, str, str], int] = {}
        self._allowed: dict[Kind, Bools] = {}

    def code(self, gpu: GpuDevice) -> int:
        """The number of what a GPU is, given at first sight. Compared for equality only."""
        key = (gpu.model, gpu.capability, gpu.vendor)
        found = self._codes.get(key)
        if found is None:
            found = self._codes[key] = len(self._codes) + 1
            self._allowed.clear()
        return found

    def allowed(self, kind: Kind) -> Bools:
        """By code, whether a task takes such a GPU."""
        found = self._allowed.get(kind)
        if found is None:
            if len(self._allowed) > _KINDS_MAX:
                self._allowed.clear()
            found = np.array([False, *(_takes(kind, *code) for code in self._codes)], np.bool_)
            self._allowed[kind] = found
        return found

    def ranks(self) -> Ints:
        """By code, its place among those seen: unlike the code, it does not depend on which was
        seen first.
        """
        ranks = np.zeros(len(self._codes) + 1, np.int64)
        for rank, key in enumerate(sorted(self._codes), 1):
            ranks[self._codes[key]] = rank
        return ranks

    def __len__(self) -> int:
        return len(self._codes)


def _takes(kind: Kind, model: str, capability: str, vendor: str) -> bool:
    models, asked, wanted = kind
    return (
        (not models or any(model_matches(m, model) for m in models))
        and (not asked or capability_holds(asked, capability))
        and (not wanted or wanted == vendor)
    )


class Valuation:
    """Values of node states for the weights in force of one workload."""

    def __init__(self, workload: Workload, models: Models, *, stranded: bool = True) -> None:
        self._workload = workload
        self._models = models
        self._with_stranded = stranded
        self._memo: dict[bytes, int] = {}
        self._version = (-1, -1)
        self.total = 0  # of the workload's counts: value / (total * SCALE) is in shares

    def refresh(self) -> bool:
        """Takes the weights in force; True: values computed before no longer hold."""
        version = (self._workload.version, len(self._models))
        if version == self._version:
            return False
        self._version = version
        self._memo.clear()
        kinds = self._workload.kinds
        self.total = sum(count for _, count in kinds)
        # What kinds ask of a single device, each once.
        asks = sorted(
            {(n.share, n.kind, n.gpu_memory_bytes) for n, _ in kinds},
        )
        row = {ask: i for i, ask in enumerate(asks)}
        self._share = np.array([a[0] for a in asks], np.int64)
        self._allowed = np.array([self._models.allowed(a[1]) for a in asks], np.bool_).reshape(
            len(asks), len(self._models) + 1
        )
        self._any_model = all(a[1] == ANY_KIND for a in asks)
        self._gpu_memory_mib = np.array([-(-a[2] // _MIB) for a in asks], np.int64)
        self._any_memory = not any(a[2] for a in asks)
        self._ask = np.array([row[n.share, n.kind, n.gpu_memory_bytes] for n, _ in kinds], np.int64)
        self._count = np.array([n.count for n, _ in kinds], np.int64)[:, None]
        self._cpu = np.array([n.cpu for n, _ in kinds], np.int64)[:, None]
        self._memory = np.array([n.memory for n, _ in kinds], np.int64)[:, None]
        self._weight = np.array([count for _, count in kinds], np.int64)
        return True

    def pack(self, free: Ints, model: Ints, memory_bytes: Ints) -> Ints:
        """GPUs' states as integers. What no kind asks about is left out, so that states that are
        alike to the workload are the same.
        """
        packed = np.maximum(free, 0) | (0 if self._any_model else model << _SHARE_BITS)
        if not self._any_memory:
            mib = np.maximum(memory_bytes, 0) // _MIB
            packed = packed | mib << (_SHARE_BITS + _MODEL_BITS)
        return np.asarray(packed, np.int64)

    def of(self, cpu: Ints, memory: Ints, packed: Ints) -> Ints:
        """The value of each state: a row of `packed` with what CPU and memory is free beside."""
        rows = np.empty((len(cpu), packed.shape[1] + 2), np.int64)
        rows[:, 0] = cpu
        rows[:, 1] = memory
        rows[:, 2:] = np.sort(packed, axis=1)
        data, width, memo = rows.tobytes(), rows.shape[1] * 8, self._memo
        keys = [data[a:b] for a, b in pairwise(range(0, len(data) + 1, width))]
        known = [memo.get(key) for key in keys]
        if None in known:
            if len(memo) > _MEMO_MAX:
                memo.clear()
            new = {key: i for i, (key, v) in enumerate(zip(keys, known, strict=True)) if v is None}
            values = self.compute(rows[list(new.values())]).tolist()
            fresh = dict(zip(new, values, strict=True))
            memo.update(fresh)
            known = [fresh[k] if v is None else v for k, v in zip(keys, known, strict=True)]
        return np.array(known, np.int64)

    def compute(self, rows: Ints) -> Ints:
        """The values from scratch. A row: CPU, memory, the packed GPUs."""
        cpu, memory, packed = rows[:, 0], rows[:, 1], rows[:, 2:]
        free = packed & _SHARE_MASK
        total = free.sum(axis=1)
        value = SCALE * self.fragmentation(cpu, memory, packed)
        if self._with_stranded:
            load = self._workload
            limit = _bound(cpu, load.cpu_per_share)
            limit = np.minimum(limit, _bound(memory, load.memory_per_share))
            value += _STRANDED * self.total * np.maximum(total - limit, 0)
            limit = _bound(cpu, load.all_cpu_per_share)
            value += _STRANDED_ALL * self.total * np.maximum(total - limit, 0)
        return value

    def fragmentation(self, cpu: Ints, memory: Ints, packed: Ints) -> Ints:
        """The paper's measure, times the workload's count: shares that tasks cannot use."""
        free = packed & _SHARE_MASK
        fits = free >= self._share[:, None, None]  # what is asked x state x GPU
        if not self._any_model:
            fits &= self._allowed[:, packed >> _SHARE_BITS & _MODEL_MASK]
        if not self._any_memory:
            fits &= packed >> (_SHARE_BITS + _MODEL_BITS) >= self._gpu_memory_mib[:, None, None]
        devices = fits.sum(axis=2)[self._ask]  # kind x state
        usable = np.where(fits, free, 0).sum(axis=2)[self._ask]
        hosted = (devices >= self._count) & (cpu >= self._cpu) & (memory >= self._memory)
        used = self._weight @ np.where(hosted, usable, 0)
        return np.asarray(self.total * free.sum(axis=1) - used, np.int64)


def _bound(free: Ints, per_share: float | None) -> Ints:
    """Shares of GPU that the free amount suffices for at the workload's mean."""
    if not per_share:
        return np.full(len(free), 1 << 40, np.int64)
    return np.floor(np.minimum(np.maximum(free, 0) / per_share, float(1 << 40))).astype(np.int64)
