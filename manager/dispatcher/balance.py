"""When a manager holds too many of the cluster's sessions, and where some had better be. Pure.

Agents choose a manager at random and stay, so after a manager has come or has been away, sessions
lie unevenly. Each manager looks at its own share only: with more than `share_max` of them for
REBALANCE_AFTER_S it tells some agents to go to managers that hold few. One above the even share is
left alone, and together managers never send away more than others have room for, so this comes to
an end. An agent is sent away once in REBALANCE_AGAIN_S at most: one that comes back cannot reach
the others, and would only be driven round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

REBALANCE_AFTER_S = 10.0
REBALANCE_AGAIN_S = 600.0
# One in so many of the surplus goes at a time, once in REBALANCE_EVERY_S: each costs its new
# manager what any new session costs.
REBALANCE_PART = 8
REBALANCE_EVERY_S = 1.0


def share_max(sessions: int, managers: int) -> int:
    """The most that one of several managers may hold of all sessions."""
    return -(-sessions // managers) + 1


def targets(held: Mapping[str, int], mine: str, count: int) -> list[str]:
    """For so many sessions the managers to go to: each time the one that then has the fewest."""
    others = {manager: n for manager, n in sorted(held.items()) if manager != mine}
    out = []
    for _ in range(count):
        target = min(others, key=lambda m: (others[m], m))
        others[target] += 1
        out.append(target)
    return out


class Balance:
    """One manager's judgement of its share. Times are seconds on the caller's monotonic clock."""

    def __init__(self) -> None:
        self._above_since_s: float | None = None
        self._sent: dict[str, float] = {}  # nodes that were sent away, and when

    def surplus(self, held: Mapping[str, int], mine: str, now_s: float) -> int:
        """How many sessions are to go now. `held`: sessions of each manager that is there."""
        over = held[mine] - share_max(sum(held.values()), len(held)) if len(held) > 1 else 0
        if over <= 0:
            self._above_since_s = None
            return 0
        if self._above_since_s is None:
            self._above_since_s = now_s
        if now_s < self._above_since_s + REBALANCE_AFTER_S:
            return 0
        return -(-over // REBALANCE_PART)

    def movable(self, node_ids: Iterable[str], now_s: float) -> list[str]:
        """Those of the nodes that were not sent away before."""
        since_s = now_s - REBALANCE_AGAIN_S
        self._sent = {n: at_s for n, at_s in self._sent.items() if at_s > since_s}
        return [n for n in node_ids if n not in self._sent]

    def moved(self, node_id: str, now_s: float) -> None:
        """The node's agent was told to go."""
        self._sent[node_id] = now_s
