"""What is known of this node's containers, and the events that follow from changes. No call to the
engine is made here.

Two sources tell of the same change: the engine's event stream and listings (after a reconnect, for
the engine forgets events when it restarts). Both go through `Watched`, whose state only grows, so
each exit and each change of health is told once. Exits that a stop asked for are not told. Until
`start` has returned, events are held back: nobody should hear of a task's end before its start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from agent.runtime.base import Event, EventKind, Phase
from agent.runtime.docker.inspection import End
from agent.runtime.docker.spec import LABEL_TASK

GONE = 255  # the container was removed by somebody else, so its exit code is lost


@dataclass(slots=True, eq=False)
class Watched:
    """One container of ours."""

    task_id: str
    container_id: str
    phase: Phase = Phase.CREATED
    # The healthcheck's last verdict; None: there was none yet. A check that has not passed and one
    # that has failed are not the same: the second is news after the first.
    healthy: bool | None = None
    end: End = field(default_factory=lambda: End(0))
    stopping: bool = False
    # A start of ours is under way.
    starting: bool = False
    # Somebody sent it a signal that is to end it, and it was not this runtime.
    killed: bool = False
    # The worker knows that it runs; before, events wait in `held`.
    told: bool = False
    held: list[Event] = field(default_factory=list)
    # As in agent.runtime.base.Started; lost with the agent.
    note: str = ""
    stop_signal: str = ""
    # What the engine grants it when it stops it by itself.
    grace_s: float = 10.0
    tty: bool = False
    oom: bool = False


class Watchlist:
    """All containers of this node by task id, and the queue of their events. `on_end` is called
    with the task's id whenever one has ended, for whatever reason.
    """

    def __init__(self, on_end: Callable[[str], None] = lambda _: None) -> None:
        self._on_end = on_end
        self._by_task: dict[str, Watched] = {}
        # Not taken yet, in order; of one task and kind only the newest counts, so there are at
        # most three per container.
        self._pending: dict[tuple[str, EventKind], Event] = {}
        self.ready = asyncio.Event()

    def get(self, task_id: str) -> Watched | None:
        return self._by_task.get(task_id)

    def of_container(self, attributes: dict[str, Any], container_id: str) -> Watched | None:
        """The entry that an engine's event is about; None: not ours, or an older container's."""
        entry = self._by_task.get(str(attributes.get(LABEL_TASK, "")))
        return entry if entry is not None and entry.container_id == container_id else None

    def add(self, entry: Watched) -> Watched:
        self._by_task[entry.task_id] = entry
        return entry

    def drop(self, task_id: str) -> None:
        self._by_task.pop(task_id, None)
        self.forget_events(task_id)

    def __iter__(self) -> Iterator[Watched]:
        return iter(list(self._by_task.values()))

    # -------------------------------------------------------------- changes

    def runs(self, entry: Watched) -> None:
        """It was started; not yet told."""
        if entry.phase is Phase.CREATED:
            entry.phase = Phase.RUNNING

    def tell(self, entry: Watched) -> None:
        """The worker hears of the start now; what was held back follows."""
        entry.told = True
        held, entry.held = entry.held, []
        for event in held:
            self._emit(entry, event)

    def exit(self, entry: Watched, end: End) -> None:
        """It ended."""
        if entry.phase is Phase.EXITED:
            return
        asked = entry.stopping
        never_ran = entry.phase is Phase.CREATED
        entry.phase, entry.end = Phase.EXITED, end
        self._on_end(entry.task_id)
        if not asked and not never_ran:
            self._emit(
                entry,
                Event(
                    entry.task_id,
                    EventKind.EXITED,
                    end.code,
                    end.message,
                    cause=end.cause,
                    forced=end.forced,
                ),
            )

    def health(self, entry: Watched, message: str, *, healthy: bool) -> None:
        """The engine's word on its healthcheck."""
        if entry.phase is not Phase.RUNNING or entry.healthy is healthy:
            return
        entry.healthy = healthy
        kind = EventKind.HEALTHY if healthy else EventKind.UNHEALTHY
        if not entry.stopping:
            self._emit(entry, Event(entry.task_id, kind, message=message))

    def _emit(self, entry: Watched, event: Event) -> None:
        if not entry.told:
            entry.held.append(event)
            return
        self._pending.pop((event.task_id, event.kind), None)
        self._pending[event.task_id, event.kind] = event
        self.ready.set()

    def take(self) -> Event | None:
        """The oldest event that waits; `ready` is set while there are any."""
        if not self._pending:
            self.ready.clear()
            return None
        return self._pending.pop(next(iter(self._pending)))

    def forget_events(self, task_id: str) -> None:
        """What waits about a task is not news any more."""
        for kind in EventKind:
            self._pending.pop((task_id, kind), None)
