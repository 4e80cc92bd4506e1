"""The control service, open, with an empty cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.unit.api.harness import Api


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    made = Api(removal_wait_s=0.2)
    await made.open()
    yield made
    made.store.check_invariants()
    await made.store.close()
