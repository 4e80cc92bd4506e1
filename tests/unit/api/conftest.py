"""The control service, open, with an empty cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.unit.api.harness import Api


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with opened(removal_wait_s=30.0) as made:
        yield made


@pytest.fixture
async def hasty() -> AsyncIterator[Api]:
    """One that does not wait for removals at all."""
    async with opened(removal_wait_s=0.0) as made:
        yield made


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[Api]:
    made = Api(**options)
    await made.open()
    yield made
    made.store.check_invariants()
    await made.store.close()
