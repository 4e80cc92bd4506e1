"""Reads wait for what other managers have acknowledged, unless the caller is content with less."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from swarm import errors, rpc
from swarm.rpc import STALE_KEY, Channel, Identity, Method
from swarm.v1 import (
    Caller,
    CreateRequest,
    GetInfoRequest,
    Kind,
    ListRequest,
    Spec,
    WatchRequest,
)
from swarm.v1.services import CONTROL_METHODS, ControlClient
from tests.unit.api.harness import Api, config


class Lost:
    """A barrier that is never reached."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self) -> None:
        self.asked += 1
        raise errors.Unavailable("no quorum")


@pytest.fixture
def lost() -> Lost:
    return Lost()


@pytest.fixture
async def socket(lost: Lost, tmp_path: Path) -> AsyncIterator[str]:
    api = Api(barrier=lost)
    await api.open()
    server = rpc.server()

    def authorize(method: Method, context: dict[str, list[bytes]]) -> Identity:
        return Identity(Caller.LOCAL)

    server.add_generic_rpc_handlers((rpc.handler(CONTROL_METHODS, api.control, authorize),))
    path = tmp_path / "s"
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    yield str(path)
    await server.stop(0)
    await api.store.close()


async def test_a_read_waits_for_the_barrier(socket: str, lost: Lost) -> None:
    async with Channel.unix(socket) as channel:
        control = ControlClient(channel)
        with pytest.raises(errors.Unavailable, match="no quorum"):
            await control.list(ListRequest(kind=Kind.NODE))
        with pytest.raises(errors.Unavailable, match="no quorum"):
            async for _ in control.watch(WatchRequest()):
                pass
    assert lost.asked == 2


async def test_a_stale_read_is_answered_without_the_barrier(socket: str, lost: Lost) -> None:
    async with Channel.unix(socket, metadata=((STALE_KEY, "1"),)) as channel:
        control = ControlClient(channel)
        assert (await control.list(ListRequest(kind=Kind.NODE))).objects == ()
        assert (await control.get_info(GetInfoRequest())).cluster_id == "c"
        async with aclosing(control.watch(WatchRequest())) as watch:  # type: ignore[type-var]
            assert (await anext(watch)).events == ()
    assert lost.asked == 0


async def test_a_write_is_never_stale(socket: str) -> None:
    async with Channel.unix(socket, metadata=((STALE_KEY, "1"),)) as channel:
        with pytest.raises(errors.Unavailable, match="no quorum"):
            await ControlClient(channel).create(CreateRequest(spec=Spec(config=config())))
