"""Who is connected to the tasks of this node through its proxy, so that a task which is to stop can
first finish its answers.

All connections that come through published ports reach a task through its own node: from its
listeners, or through its relay. A task whose target has been taken away gets no new one; `finished`
waits for those it has. A connection is at work until its answer has come: while it is being opened,
while the client was the last to say something, and for a moment after the task was, since an answer
comes in pieces. One that just stays open, as HTTP clients keep them, does not count. UDP is not
followed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from agent.proxy.splice import Side

POLL_S = 0.02
QUIET_S = 0.3  # after the task's last bytes its answer is taken for complete


@dataclass(slots=True, eq=False)
class Guest:
    """One connection to a task; without sides while it is being opened."""

    task_id: str
    client: Side | None = None
    backend: Side | None = None

    def opened(self, client: Side, backend: Side) -> None:
        self.client, self.backend = client, backend

    @property
    def seen(self) -> tuple[int, int]:
        """Changes with all that is said."""
        if self.client is None or self.backend is None:
            return (0, 0)
        return (self.client.chunks, self.backend.chunks)

    @property
    def answered(self) -> bool:
        """Whether the task was the last to say something."""
        return self.backend is not None and self.backend.spoke_last


class Guests:
    """All of them, by task."""

    def __init__(self) -> None:
        self._of: dict[str, set[Guest]] = {}

    def enter(self, task_id: str) -> Guest:
        """A connection to the task is about to be opened."""
        guest = Guest(task_id)
        self._of.setdefault(task_id, set()).add(guest)
        return guest

    def leave(self, guest: Guest) -> None:
        """It is over, or never came about."""
        here = self._of.get(guest.task_id, set())
        here.discard(guest)
        if not here:
            self._of.pop(guest.task_id, None)

    def count(self, task_id: str) -> int:
        return len(self._of.get(task_id, ()))

    async def finished(self, task_id: str, *, timeout_s: float) -> bool:
        """Waits until no connection to the task is at work; False: some still were when the time
        was over.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        changed: dict[Guest, tuple[tuple[int, int], float]] = {}  # what was seen, since when
        while self._of.get(task_id):
            now_s = loop.time()
            at_work = False
            for guest in self._of[task_id]:
                seen = guest.seen
                since_s = changed.get(guest, ((-1, -1), now_s))
                if since_s[0] != seen:
                    since_s = changed[guest] = (seen, now_s)
                at_work |= not guest.answered or now_s < since_s[1] + QUIET_S
            if not at_work:
                return True
            if now_s >= until_s:
                return False
            await asyncio.sleep(min(POLL_S, until_s - now_s))
        return True
