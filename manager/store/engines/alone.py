"""Who is present where one manager has the log to itself: itself, while it is announced.

What the engines without a server of their own share; see Engine for what the methods promise.
"""

from __future__ import annotations

import asyncio


class Alone:
    """The presence of one manager."""

    def __init__(self) -> None:
        self._present: frozenset[str] = frozenset()
        self._changed = asyncio.Event()

    async def announce(self, node_id: str) -> None:
        """See Engine."""
        self._show(frozenset((node_id,)))
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._show(frozenset())

    def present(self) -> frozenset[str]:
        """See Engine."""
        return self._present

    async def present_changed(self, known: frozenset[str]) -> frozenset[str]:
        """See Engine."""
        while self._present == known:
            await self._changed.wait()
        return self._present

    async def forget(self, node_id: str) -> None:
        """Nothing is kept of managers here."""

    def _show(self, present: frozenset[str]) -> None:
        self._present = present
        self._changed.set()
        self._changed = asyncio.Event()
