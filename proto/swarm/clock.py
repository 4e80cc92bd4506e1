"""The only place that reads the machine's clocks. Decisions get times as arguments; edges get a
Clock.
"""

from __future__ import annotations

import time
from typing import Protocol

SECOND_NS = 1_000_000_000
MILLISECOND_NS = 1_000_000


class Clock(Protocol):
    """Wall time for what people and objects see, monotonic time for measuring."""

    def now_ns(self) -> int:
        """Unix time in nanoseconds."""
        ...

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary point; never goes back."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that stands still until it is moved; for tests and simulation."""

    def __init__(self, now_ns: int = 1_700_000_000 * SECOND_NS) -> None:
        self._now_ns = now_ns
        self._start_ns = now_ns

    def now_ns(self) -> int:
        return self._now_ns

    def monotonic_s(self) -> float:
        return (self._now_ns - self._start_ns) / SECOND_NS

    def advance(self, *, seconds: float) -> None:
        self._now_ns += round(seconds * SECOND_NS)
