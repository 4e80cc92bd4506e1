"""Real etcds, and stores of managers on them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from manager.store import Store
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from swarm.clock import SystemClock
from tests.etcd import Etcd
from tests.integration.store.stores import Managers


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """One etcd for the tests that leave it alone; each has its own prefix."""
    etcd = Etcd(tmp_path_factory.mktemp("etcd"))
    etcd.start()
    yield etcd
    etcd.kill()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd to be ill-treated."""
    etcd = Etcd(tmp_path)
    etcd.start()
    yield etcd
    etcd.kill()


_prefixes = itertools.count()


@pytest.fixture
async def managers() -> AsyncIterator[Managers]:
    """Makes open stores on an etcd; they are checked and closed in the end."""
    async with AsyncExitStack() as stack:
        numbers = itertools.count()

        async def make(etcd: Etcd, prefix: str, **settings: Any) -> Store:
            engine = EtcdEngine(
                EtcdClient([etcd.endpoint]),
                clock=SystemClock(),
                writer=f"m{next(numbers)}",
                prefix=prefix,
                **settings,
            )
            store = Store(engine, SystemClock())
            await store.open()
            stack.push_async_callback(store.close)
            stack.callback(store.check_invariants)
            return store

        yield make


@pytest.fixture
def prefix() -> str:
    return f"/t{next(_prefixes)}"
