"""Waiting for a condition with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

POLL_S = 0.005


async def until(
    condition: Callable[[], object], *, timeout_s: float = 10.0, what: Callable[[], object] = str
) -> None:
    """Returns once the condition holds; fails with `what()` when the time is up."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while not condition():
        assert loop.time() < deadline_s, f"not within {timeout_s:g} s: {what()}"
        await asyncio.sleep(POLL_S)
