"""When a silent node counts as down, and how often nodes have to be heard.

A heap of deadlines with lazy removal: a heartbeat moves a deadline in constant time, and the heap
is touched once a period for each node. Times are seconds on the caller's monotonic clock.
"""

from __future__ import annotations

import heapq

from swarm.clock import SECOND_NS

PERIOD_S_MIN = 1.0
# All agents together send at most about this many a second: each costs some 0.3 ms of one core.
HEARTBEATS_PER_S_MAX = 300
MISSED_MAX = 3


def period_s(sessions: int, configured_ns: int) -> float:
    """How often each agent sends a heartbeat; what the cluster's spec says goes first."""
    if configured_ns > 0:
        return configured_ns / SECOND_NS
    return max(PERIOD_S_MIN, sessions / HEARTBEATS_PER_S_MAX)


class Liveness:
    """The deadline of each node."""

    def __init__(self) -> None:
        self._deadlines: dict[str, float] = {}
        # Each node has at least one entry at or before its deadline.
        self._heap: list[tuple[float, str]] = []
        self._silent: set[str] = set()

    def expect(self, node_id: str, deadline_s: float) -> None:
        """The node must be heard before this time."""
        self._silent.discard(node_id)
        before = self._deadlines.get(node_id)
        self._deadlines[node_id] = deadline_s
        if before is None or deadline_s < before:
            heapq.heappush(self._heap, (deadline_s, node_id))

    def forget(self, node_id: str) -> None:
        """Nothing is expected of the node any more."""
        self._deadlines.pop(node_id, None)
        self._silent.discard(node_id)

    def clear(self) -> None:
        """Nothing is expected of any node."""
        self._deadlines.clear()
        self._heap.clear()
        self._silent.clear()

    def knows(self, node_id: str) -> bool:
        """Whether the node is expected, or was told as silent and nothing was heard since."""
        return node_id in self._deadlines or node_id in self._silent

    def silent(self, node_id: str) -> bool:
        """Whether its time was up, and it was neither heard nor forgotten since."""
        return node_id in self._silent

    def expired(self, now_s: float) -> list[str]:
        """The nodes whose time is up, each told once."""
        out = []
        while self._heap and self._heap[0][0] <= now_s:
            _, node_id = heapq.heappop(self._heap)
            deadline_s = self._deadlines.get(node_id)
            if deadline_s is None:
                continue
            if deadline_s <= now_s:
                del self._deadlines[node_id]
                self._silent.add(node_id)
                out.append(node_id)
            else:
                heapq.heappush(self._heap, (deadline_s, node_id))
        return out

    def postpone(self, by_s: float, *, at_least_s: float = 0.0) -> None:
        """Moves all deadlines, it was we who did not listen, to no earlier than `at_least_s`.
        Cost: the number of nodes.
        """
        self._deadlines = {n: max(d + by_s, at_least_s) for n, d in self._deadlines.items()}
        self._heap = [(d, n) for n, d in self._deadlines.items()]
        heapq.heapify(self._heap)
