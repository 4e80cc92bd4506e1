"""The typical workload: how often tasks of each kind arrive. Given, or learned from arrivals.

Fragmentation is measured against it. What has arrived is counted at once; the weights that are in
force change only when the number of arrivals has doubled (and on every halving later), because a
change makes all values computed so far worthless. Counts are halved at FORGET arrivals, so a
workload that changes is followed. Integers only: the same arrivals in any order that crosses the
same doublings give the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from manager.scheduler.gpus.needs import GpuNeed

FORGET = 1 << 17  # arrivals; then all counts are halved
CLASSES_MAX = 512  # kinds in force, the most frequent ones


class Workload:
    """Counts of needs; `version` says which weights are in force."""

    def __init__(self, given: Iterable[GpuNeed] = ()) -> None:
        self._counts: dict[GpuNeed, int] = {}
        self._seen = 0
        self._refresh_at = 1
        self.version = 0
        # In force: kinds that ask for GPUs with their counts, in an order of their own.
        self.kinds: tuple[tuple[GpuNeed, int], ...] = ()
        # CPU and memory per share of a GPU: of tasks with GPUs, and of all tasks. None: unknown.
        self.cpu_per_share: float | None = None
        self.memory_per_share: float | None = None
        self.all_cpu_per_share: float | None = None
        for need in given:
            self._counts[need] = self._counts.get(need, 0) + 1
            self._seen += 1
        if self._seen:
            self._refresh()

    def learn(self, need: GpuNeed) -> None:
        """Counts one arrival: once a task, not once an attempt to place it."""
        self._counts[need] = self._counts.get(need, 0) + 1
        self._seen += 1
        if self._seen >= self._refresh_at:
            if self._seen >= FORGET:
                self._counts = {n: c // 2 for n, c in self._counts.items() if c > 1}
                self._seen = sum(self._counts.values())
            self._refresh()

    def _refresh(self) -> None:
        self._refresh_at = min(2 * self._seen, max(FORGET, self._seen + 1))
        self.version += 1
        asking = sorted(
            ((n, c) for n, c in self._counts.items() if n.count),
            key=lambda item: (-item[1], item[0].order),
        )
        self.kinds = tuple(asking[:CLASSES_MAX])
        shares = sum(need.asked * count for need, count in asking)
        if not shares:
            self.cpu_per_share = self.memory_per_share = self.all_cpu_per_share = None
            return
        self.cpu_per_share = sum(n.cpu * c for n, c in asking) / shares
        self.memory_per_share = sum(n.memory * c for n, c in asking) / shares
        self.all_cpu_per_share = sum(n.cpu * c for n, c in self._counts.items()) / shares
