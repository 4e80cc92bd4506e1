"""Every call is counted once, under the way it ended."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY

from swarm import errors
from swarm.v1 import GetRequest, Kind, WatchRequest
from tests.unit.api.harness import CONTEXT, Api, service


def counted(method: str, result: str) -> float:
    labels = {"method": method, "result": result}
    return REGISTRY.get_sample_value("swarm_api_requests_total", labels) or 0.0


def open_streams() -> float:
    return REGISTRY.get_sample_value("swarm_api_streams", {"method": "Watch"}) or 0.0


async def test_calls_by_result(api: Api):
    before = [counted("Get", r) for r in ("ok", "not_found", "invalid_argument")]
    await api.create(service=service())
    await api.get(Kind.SERVICE, "web")
    with pytest.raises(errors.NotFound):
        await api.get(Kind.SERVICE, "nope")
    with pytest.raises(errors.Invalid):
        await api.control.get(GetRequest(), CONTEXT)
    after = [counted("Get", r) for r in ("ok", "not_found", "invalid_argument")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]
    assert REGISTRY.get_sample_value("swarm_api_request_seconds_count", {"method": "Get"})


async def test_open_streams_are_counted_until_the_caller_leaves(api: Api):
    before, left = open_streams(), counted("Watch", "cancelled")
    stream = api.control.watch(WatchRequest(), CONTEXT)
    await anext(stream)
    assert open_streams() == before + 1
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert open_streams() == before
    assert counted("Watch", "cancelled") == left + 1
