"""What the tests of stores on a real etcd share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from manager.store import Draft, Store
from manager.store.engines.etcd import EtcdEngine

Managers = Callable[..., Any]

WAIT_S = 15.0


def engine_of(store: Store) -> EtcdEngine:
    assert isinstance(store.engine, EtcdEngine)
    return store.engine


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not check():
            await asyncio.sleep(0.01)


def put(*objects: Any) -> Callable[[Draft], None]:
    def write(draft: Draft) -> None:
        for o in objects:
            draft.put(o)

    return write
