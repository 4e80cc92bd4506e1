"""Whether the engine itself has gone and come back, and what that means for containers that ended
meanwhile.

An engine without live-restore takes its containers with it: at its end, or, if it was killed, when
it starts again. Their exit codes then say nothing about them, not even 0, for many programs end so
when they are asked to. An engine that only hung, or that keeps containers alive, tells true codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.runtime.base import ENGINE_FAILED, Phase
from agent.runtime.docker.inspection import End, end_of
from agent.runtime.docker.watch import Watched

_WENT = "its container ended with the container engine, which was restarted without live-restore"


class Outage:
    """Of one engine. `live_restore` is what the engine says of itself."""

    def __init__(self) -> None:
        self.live_restore = False
        self._lost = False

    def began(self) -> None:
        """The connection was lost, or refused."""
        self._lost = True

    def ended(self) -> None:
        """All containers were looked at since."""
        self._lost = False

    def end_of(self, container: Mapping[str, Any], entry: Watched) -> End:
        """How a container that is looked at now has ended; `entry` is what was known before."""
        end = end_of(container, oom=entry.oom)
        ran = entry.phase is not Phase.EXITED and not entry.stopping
        if self._lost and not self.live_restore and ran and not end.cause:
            return End(end.code, _WENT, ENGINE_FAILED, forced=True)
        return end
