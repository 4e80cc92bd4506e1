"""How good a node is for a task: the selectable scores. Lower is better.

A score depends on the state of the node alone (and on the weights in force), so the account keeps
it until the node changes. Integers, so that equal means equal and ties are decided by rule.

- fgd: how much the value of fragmentation.py grows, stranded GPU included. The default.
- fgd-paper: the same without stranded GPU: the method as published.
- best-fit: least free of all dimensions together once the task is there.
- dot-product: smallest product of what is free and what is asked (Weng et al., section 6).
- packing: a GPU in use before a free GPU of a node in use, before a free node; then the fullest.
- spread: the lowest share claimed, of the dimension claimed most, once the task is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from manager.scheduler.gpus.fragmentation import Ints, Valuation
from manager.scheduler.gpus.needs import GpuNeed
from swarm.gpus import WHOLE

Bools = npt.NDArray[np.bool_]
_FINE = 1_000_000_000  # steps of a share that is compared
NOT_ONE = -1  # in place of a GPU's index: whole GPUs, taken in order, or none


@dataclass(frozen=True, slots=True)
class States:
    """Nodes a task fits on, a row each: what is free, in all, and per GPU. `suits`: GPUs it may
    have; `whole`: those it takes where it takes whole ones. `largest`: the most any node of the
    cluster has (CPU, memory, shares), at least 1.
    """

    cpu: Ints
    memory: Ints
    cpu_total: Ints
    memory_total: Ints
    gpu: Ints
    gpu_total: Ints
    gpu_model: Ints
    gpu_memory: Ints
    suits: Bools
    whole: Bools
    largest: tuple[int, int, int]


Scores = tuple[Ints, Ints]
"""By row: the score, and the GPU to share (NOT_ONE where whole ones are taken)."""

Policy = Callable[[States, GpuNeed, Valuation], Scores]


def first_whole(suits: Bools, count: int) -> Bools:
    """The GPUs taken by a task that asks for whole ones where nothing is known of how they are
    joined (links.py): the first that suit, in node order.
    """
    return suits & (np.cumsum(suits, axis=1) <= count)


def fragmentation_growth(states: States, need: GpuNeed, valuation: Valuation) -> Scores:
    """Weng et al., section 5: for a part of a GPU, each device of a node is tried."""
    before = valuation.of(
        states.cpu,
        states.memory,
        valuation.pack(states.gpu, states.gpu_model, states.gpu_memory),
    )
    if need.count != 1 or need.share == WHOLE:
        taken = states.whole
        packed = valuation.pack(
            np.where(taken, states.gpu - need.share, states.gpu),
            states.gpu_model,
            np.where(taken, states.gpu_memory - need.gpu_memory_bytes, states.gpu_memory),
        )
        after = valuation.of(states.cpu - need.cpu, states.memory - need.memory, packed)
        return after - before, np.full(len(before), NOT_ONE, np.int64)
    row, device = np.nonzero(_distinct(states))
    gpu, gpu_memory = states.gpu[row], states.gpu_memory[row]
    at = np.arange(len(row))
    gpu[at, device] -= need.share
    gpu_memory[at, device] -= need.gpu_memory_bytes
    packed = valuation.pack(gpu, states.gpu_model[row], gpu_memory)
    after = valuation.of(states.cpu[row] - need.cpu, states.memory[row] - need.memory, packed)
    growth = after - before[row]
    # Equal growth: the GPU with the least left, then the first of the node.
    best = np.lexsort((device, gpu[at, device], growth, row))
    first = best[np.unique(row[best], return_index=True)[1]]
    return growth[first], device[first]


def _distinct(states: States) -> Bools:
    """The GPUs that suit, of equal ones on a node the first only."""
    gpu, model, memory, suits = states.gpu, states.gpu_model, states.gpu_memory, states.suits
    out = suits.copy()
    for later in range(1, gpu.shape[1]):
        for earlier in range(later):
            out[:, later] &= ~(
                suits[:, earlier]
                & (gpu[:, earlier] == gpu[:, later])
                & (model[:, earlier] == model[:, later])
                & (memory[:, earlier] == memory[:, later])
            )
    return out


def _one(states: States, need: GpuNeed, *, fullest: bool) -> Ints:
    """The GPU to share: of those that suit the one with the least, or most, left; ties: first."""
    if need.count != 1 or need.share == WHOLE or not states.gpu.shape[1]:
        return np.full(len(states.cpu), NOT_ONE, np.int64)
    free = states.gpu if fullest else -states.gpu
    return np.asarray(np.argmin(np.where(states.suits, free, 1 << 40), axis=1), np.int64)


def _fine(amount: Ints, of: Ints | int) -> Ints:
    return np.asarray(np.floor(amount / np.maximum(of, 1) * _FINE), np.int64)


def best_fit(states: States, need: GpuNeed, _: Valuation) -> Scores:
    """Least left."""
    cpu, memory, shares = states.largest
    left = _fine(states.cpu - need.cpu, cpu) + _fine(states.memory - need.memory, memory)
    left += _fine(states.gpu.sum(axis=1) - need.asked, shares)
    return left, _one(states, need, fullest=True)


def dot_product(states: States, need: GpuNeed, _: Valuation) -> Scores:
    """Smallest product of free and asked."""
    cpu, memory, shares = states.largest
    product = _fine(states.cpu, cpu) * (need.cpu / cpu)
    product += _fine(states.memory, memory) * (need.memory / memory)
    product += _fine(states.gpu.sum(axis=1), shares) * (need.asked / shares)
    return np.asarray(np.floor(product), np.int64), _one(states, need, fullest=True)


def packing(states: States, need: GpuNeed, _: Valuation) -> Scores:
    """GPUs in use first, then nodes in use."""
    one = _one(states, need, fullest=True)
    free = states.gpu.sum(axis=1)
    idle = (states.cpu == states.cpu_total) & (free == states.gpu_total.sum(axis=1))
    grade = np.where(idle, 2, 1)
    at = np.flatnonzero(one != NOT_ONE)
    grade[at] = np.where(states.gpu[at, one[at]] < WHOLE, 0, grade[at])
    return grade * (1 << 40) + free, one


def spread(states: States, need: GpuNeed, _: Valuation) -> Scores:
    """Lowest share claimed."""
    shares = states.gpu_total.sum(axis=1)
    used = shares - states.gpu.sum(axis=1) + need.asked
    claimed = np.maximum(
        _fine(states.cpu_total - states.cpu + need.cpu, states.cpu_total),
        _fine(states.memory_total - states.memory + need.memory, states.memory_total),
    )
    return np.maximum(claimed, _fine(used, shares)), _one(states, need, fullest=False)


FGD = "fgd"
FGD_PAPER = "fgd-paper"
POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        FGD: fragmentation_growth,
        FGD_PAPER: fragmentation_growth,
        "best-fit": best_fit,
        "dot-product": dot_product,
        "packing": packing,
        "spread": spread,
    }
)
