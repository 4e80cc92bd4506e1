"""Which replica gets the next connection. Pure: no clock, no sockets.

Least open connections, ties to the one that was used longest ago: with short connections that is
round robin, with long ones it fills up evenly. A backend that refused is put off for a while that
doubles, and is then tried last, not never: when all refuse, the one that recovers is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.v1 import Backend

BACKOFF_S = 0.5
BACKOFF_S_MAX = 15.0


@dataclass(slots=True)
class Slot:
    """One backend of one service and what is known of it on this node."""

    backend: Backend
    open: int = 0
    used: int = 0  # the balancer's count when it was last chosen
    failures: int = 0
    put_off_until_s: float = 0.0


@dataclass(slots=True)
class Balancer:
    """The backends of one service, in the state that `update` last gave."""

    _slots: dict[str, Slot] = field(default_factory=dict)
    _count: int = 0

    def update(self, backends: Sequence[Backend]) -> None:
        """What is gone gets no new connections; what stays keeps its counts."""
        known = self._slots
        self._slots = {}
        for backend in backends:
            slot = known.get(backend.task_id)
            if slot is None:
                slot = Slot(backend)
            slot.backend = backend
            self._slots[backend.task_id] = slot

    def has(self, slot: Slot) -> bool:
        """Whether the slot's backend is still one of the service's."""
        return self._slots.get(slot.backend.task_id) is slot

    def order(self, now_s: float) -> list[Slot]:
        """All backends, best first."""
        return sorted(
            self._slots.values(),
            key=lambda s: (s.put_off_until_s > now_s, s.open, s.used, s.backend.task_id),
        )

    def chosen(self, slot: Slot) -> None:
        """A connection is tried there; it counts as open until `closed`."""
        self._count += 1
        slot.used = self._count
        slot.open += 1

    def succeeded(self, slot: Slot) -> None:
        slot.failures = 0
        slot.put_off_until_s = 0.0

    def failed(self, slot: Slot, now_s: float) -> None:
        """It did not take a connection."""
        slot.put_off_until_s = now_s + min(BACKOFF_S * 2 ** min(slot.failures, 8), BACKOFF_S_MAX)
        slot.failures += 1

    def closed(self, slot: Slot) -> None:
        slot.open -= 1

    def check_invariants(self) -> None:
        assert all(slot.open >= 0 for slot in self._slots.values())
        assert all(slot.used <= self._count for slot in self._slots.values())
