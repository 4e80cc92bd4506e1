"""A bounded queue between two coroutines that either side may end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Pipe(Generic[T]):
    """Up to `limit` items wait; then `put` waits. Iteration ends once it is closed and drained."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._closed = False
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: T) -> bool:
        """Waits for room; False when the pipe is closed, the item is dropped then."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or len(self._items) < self._limit)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    async def take(self, limit: int) -> list[T]:
        """At least one and up to `limit` items; none when it is closed and drained."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or bool(self._items))
            out = [self._items.popleft() for _ in range(min(limit, len(self._items)))]
            self._changed.notify_all()
            return out

    async def close(self, *, drop: bool = False) -> None:
        """Nothing more is taken in; what waits is still given out unless it is to be dropped."""
        async with self._changed:
            self._closed = True
            if drop:
                self._items.clear()
            self._changed.notify_all()

    async def __aiter__(self) -> AsyncIterator[T]:
        while items := await self.take(1):
            yield items[0]
