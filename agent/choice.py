"""Which manager to talk to next. Pure.

A random one, so that the agents of a cluster spread; one that has just failed only once all others
have failed as well. Then a round is over, and it is time for a pause before the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from swarm import errors
from swarm.ids import Rng


class Choice:
    """The managers that are known, and those that have failed in this round."""

    def __init__(self, managers: Sequence[str], rng: Rng) -> None:
        self._managers = tuple(managers)
        self._rng = rng
        self._failed: list[str] = []
        self._hint = ""

    def learn(self, managers: Sequence[str]) -> None:
        """All managers' addresses, as one of them says."""
        self._managers = tuple(managers)

    @property
    def several(self) -> bool:
        return len(self._managers) > 1

    def next(self) -> str:
        """The manager to ask. Raises Invalid when none is known."""
        if not self._managers:
            raise errors.Invalid("no manager's address is known; join the cluster again")
        left = self._left() or self._managers
        hint, self._hint = self._hint, ""
        return hint if hint in left else left[int(self._rng.random() * len(left))]

    def failed(self, manager: str, *, hint: str = "") -> bool:
        """The manager could not be reached, or has ended the session; `hint`: whom it said to ask
        first. Whether the round is over: all have failed.
        """
        self._failed.append(manager)
        self._hint = hint
        if self._left():
            return False
        self._failed.clear()
        return True

    def stood(self) -> None:
        """A session has lasted: what failed before it is over."""
        self._failed.clear()

    def _left(self) -> tuple[str, ...]:
        return tuple(m for m in self._managers if m not in self._failed)
