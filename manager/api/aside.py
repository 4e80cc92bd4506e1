"""Questions that cost a look at the whole cluster, answered beside the event loop.

Each gets the tables as they are when its turn comes, in a thread of its own. A cancelled call
leaves its thread to come to its end; nobody hears of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from manager.store import Store, View

# At the same time; each holds the tables of its time, and they share the interpreter with the event
# loop, so that more of them would only be slower.
AT_ONCE_MAX = 2

T = TypeVar("T")


class Aside:
    """Where they wait for their turn."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._room = asyncio.Semaphore(AT_ONCE_MAX)

    async def ask(self, question: Callable[[View], T]) -> T:
        """What `question` makes of the state. Raises as it does."""
        async with self._room:
            return await asyncio.to_thread(question, self._store.freeze())
