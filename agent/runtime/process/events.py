"""The stream of events of one runtime: bounded by keeping one exit and the last health per task."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from agent.runtime.base import Event, EventKind


class Events:
    """Many put, one reads. A slow reader finds a task's newest health, never a stale one."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, bool], Event] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        ended = event.kind is EventKind.EXITED
        if ended:
            self._waiting.pop((event.task_id, False), None)  # health of what has ended
        self._waiting[event.task_id, ended] = event
        self._changed.set()

    def close(self) -> None:
        """Ends the stream once what waits is read."""
        self._closed = True
        self._changed.set()

    async def stream(self) -> AsyncIterator[Event]:
        while True:
            while self._waiting:
                yield self._waiting.pop(next(iter(self._waiting)))
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()
