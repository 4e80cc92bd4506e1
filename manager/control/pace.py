"""How often a large service is looked at: so seldom that it takes a share of the time at most.

A look costs all tasks of the service, and while it rolls out or loses nodes nearly every report of
one of its tasks asks for one. What has changed while it rests is worked off by the next look, so
that a roll-out of n tasks costs n times the time that it takes, and not n times the reports. What
a look costs is reckoned from the tasks, not measured: the same changes at the same times come to
the same. Small services do not rest.
"""

from __future__ import annotations

from collections.abc import Iterable

from swarm.clock import SECOND_NS

TASK_NS = 12_000  # what one task costs in a look
SHARE = 5  # a service is looked at for one part of so many
SMALL = 500  # tasks of a service that is looked at whenever something has changed
REST_NS_MAX = 2 * SECOND_NS


def rest_ns(tasks: int) -> int:
    """How long a service of so many tasks rests after a look; 0: it does not."""
    return 0 if tasks < SMALL else min(REST_NS_MAX, (SHARE - 1) * TASK_NS * tasks)


class Rests:
    """Which services rest, and until when."""

    def __init__(self) -> None:
        self._until: dict[str, int] = {}

    def begin(self, service_id: str, until_ns: int) -> None:
        """The service was looked at; 0: it need not rest."""
        if until_ns:
            self._until[service_id] = until_ns
        else:
            self._until.pop(service_id, None)

    def over(self, service_id: str, now_ns: int) -> bool:
        """Whether the service may be looked at."""
        return self._until.get(service_id, 0) <= now_ns

    def next_ns(self, service_ids: Iterable[str]) -> int | None:
        """When the first of these has rested; None: none of them rests."""
        return min((self._until[i] for i in service_ids if i in self._until), default=None)
