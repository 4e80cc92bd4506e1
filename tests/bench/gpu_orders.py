"""The arrival orders of the Alibaba GPU trace, for any trace file and seed.

The published experiments (Weng et al., USENIX ATC 2023; hkust-adsl/kubernetes-scheduler-simulator,
pkg/simulator: Simulate, SortClusterPods, TunePodsByNodeTotalResource, syncClusterResourceList)
draw from Go's math/rand, seeded with the seed, in this order:

1. one number for a log line;
2. a shuffle of the tasks, sorted by name;
3. up to 130 % of the cluster's GPUs: tasks drawn from the sorted list are appended until one would
   go beyond (of a task of several GPUs only one counts for that test); or, where the trace asks for
   more, tasks are drawn and dropped until no more than 130 % is left;
4. ten numbers by the ten watches that start with the scheduler;
5. a permutation of the nodes: the node that gets 0 is the first among equals.

`Source` is that generator: y[n] = y[n-607] + y[n-273] mod 2^64, seeded with a Lehmer generator and
a table. Go prints the table in its source; here it is worked out as Go's own gen_cooked.go defines
it, the state after 7.8e12 steps, with a jump by x^N modulo the recurrence's polynomial.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from functools import cache
from typing import Protocol, TypeVar

import numpy as np

_LENGTH, _TAP = 607, 273
_STEPS = 7_800_000_000_000
_M64, _M63 = (1 << 64) - 1, (1 << 63) - 1
_LEHMER_A, _LEHMER_M = 48271, (1 << 31) - 1
_WATCHES = 10
_Row = TypeVar("_Row", bound="Asks")


class Asks(Protocol):
    """A task of the trace, as far as orders are concerned."""

    @property
    def name(self) -> str: ...
    @property
    def num_gpu(self) -> int: ...
    @property
    def gpu_milli(self) -> int: ...


def _lehmer(seed: int, shift: int) -> list[int]:
    x = seed % _LEHMER_M or 89482311
    out = []
    for i in range(-20, _LENGTH):
        x = _LEHMER_A * x % _LEHMER_M
        if i >= 0:
            y = _LEHMER_A * x % _LEHMER_M
            z = _LEHMER_A * y % _LEHMER_M
            out.append(x << 2 * shift ^ y << shift ^ z)
            x = z
    return out


def _times(a: list[int], b: list[int]) -> list[int]:
    """A product of polynomials modulo x^607 = x^334 + 1 and 2^64."""
    right = np.array(b, np.uint64)
    product = np.zeros(2 * _LENGTH - 1, np.uint64)
    for i, factor in enumerate(np.array(a, np.uint64)):
        product[i : i + _LENGTH] += factor * right
    out = [int(c) for c in product]
    for k in range(2 * _LENGTH - 2, _LENGTH - 1, -1):
        out[k - _TAP] += out[k]
        out[k - _LENGTH] += out[k]
    return [c & _M64 for c in out[:_LENGTH]]


@cache
def _table() -> tuple[int, ...]:
    start = _lehmer(1, 10)
    terms = [start[(_LENGTH - _TAP - n) % _LENGTH] for n in range(1, _LENGTH + 1)]
    for i in range(_LENGTH, 2 * _LENGTH):
        terms.append((terms[i - _LENGTH] + terms[i - _TAP]) & _M64)
    power = [1] + [0] * (_LENGTH - 1)
    for bit in f"{_STEPS:b}":
        power = _times(power, power)
        if bit == "1":
            power = [power[-1], *power[:-1]]
            power[_LENGTH - _TAP] = (power[_LENGTH - _TAP] + power[0]) & _M64
    out = [0] * _LENGTH
    for j in range(_LENGTH):
        value = sum(c * t for c, t in zip(power, terms[j : j + _LENGTH], strict=True)) & _M64
        out[(2 * _LENGTH - _TAP - 1 - _STEPS - j) % _LENGTH] = value
    return tuple(out)


class Source:
    """Go's math/rand, seeded."""

    def __init__(self, seed: int) -> None:
        self._state = [a ^ b for a, b in zip(_lehmer(seed, 20), _table(), strict=True)]
        self._tap, self._feed = 0, _LENGTH - _TAP

    def int63(self) -> int:
        """The next number."""
        self._tap = (self._tap - 1) % _LENGTH
        self._feed = (self._feed - 1) % _LENGTH
        value = (self._state[self._feed] + self._state[self._tap]) & _M64
        self._state[self._feed] = value
        return value & _M63

    def below(self, n: int) -> int:
        """Intn."""
        if n & (n - 1) == 0:
            return self.int63() >> 32 & n - 1
        most = (1 << 31) - 1 - (1 << 31) % n
        value = self.int63() >> 32
        while value > most:
            value = self.int63() >> 32
        return value % n

    def shuffle(self, items: MutableSequence[_Row]) -> None:
        """Shuffle: with Lemire's reduction, unlike Intn."""
        for i in range(len(items) - 1, 0, -1):
            n = i + 1
            product = (self.int63() >> 31) * n
            while product & 0xFFFFFFFF < (1 << 32) % n:
                product = (self.int63() >> 31) * n
            j = product >> 32
            items[i], items[j] = items[j], items[i]

    def permutation(self, n: int) -> list[int]:
        """Perm."""
        out = [0] * n
        for i in range(n):
            j = self.below(i + 1)
            out[i] = out[j]
            out[j] = i
        return out


def orders(
    tasks: Sequence[_Row], nodes: Sequence[str], gpus: int, seed: int, ratio: float = 1.3
) -> tuple[list[_Row], list[str]]:
    """The tasks in the order of arrival, repeats included, and the nodes, first among equals
    first. `gpus`: of the cluster.
    """
    source = Source(seed)
    source.int63()
    by_name = sorted(tasks, key=lambda task: task.name)
    arrivals = list(by_name)
    source.shuffle(arrivals)
    asked = sum(task.num_gpu * task.gpu_milli for task in tasks)
    target = ratio * float(gpus * 1000)
    if asked > target:
        while asked > target:
            task = arrivals.pop(source.below(len(arrivals)))
            asked -= task.num_gpu * task.gpu_milli
    elif asked < target:
        while True:
            task = by_name[source.below(len(by_name))]
            if asked + task.gpu_milli > target:
                break
            asked += task.num_gpu * task.gpu_milli
            arrivals.append(task)
    for _ in range(_WATCHES):
        source.int63()
    ranks = source.permutation(len(nodes))
    return arrivals, [name for _, name in sorted(zip(ranks, sorted(nodes), strict=True))]
