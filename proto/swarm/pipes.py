"""A bounded queue between two coroutines that either side may end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Pipe(Generic[T]):
    """Up to `limit` items wait; then `put` waits. Iteration ends once it is closed and drained.

    With `weigh`, what waits together weighs up to `weight_max`, or is one item.
    """

    def __init__(
        self, limit: int, *, weigh: Callable[[T], int] | None = None, weight_max: int = 0
    ) -> None:
        self._limit = limit
        self._weigh = weigh
        self._weight_max = weight_max
        self._weight = 0
        self._items: deque[T] = deque()
        self._closed = False
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: T) -> bool:
        """Waits for room; False when the pipe is closed, the item is dropped then."""
        weight = self._weigh(item) if self._weigh is not None else 0
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._fits(weight))
            if self._closed:
                return False
            self._items.append(item)
            self._weight += weight
            self._changed.notify_all()
            return True

    def _fits(self, weight: int) -> bool:
        if len(self._items) >= self._limit:
            return False
        return not self._items or not self._weigh or self._weight + weight <= self._weight_max

    async def take(self, limit: int) -> list[T]:
        """At least one and up to `limit` items; none when it is closed and drained."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or bool(self._items))
            out = [self._items.popleft() for _ in range(min(limit, len(self._items)))]
            if self._weigh is not None:
                self._weight -= sum(self._weigh(item) for item in out)
            self._changed.notify_all()
            return out

    async def close(self, *, drop: bool = False) -> None:
        """Nothing more is taken in; what waits is still given out unless it is to be dropped."""
        async with self._changed:
            self._closed = True
            if drop:
                self._items.clear()
                self._weight = 0
            self._changed.notify_all()

    async def __aiter__(self) -> AsyncIterator[T]:
        while items := await self.take(1):
            yield items[0]
