"""What is said when the managers have no quorum, and that watches do not go silent with it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from msgspec import structs

from manager.api import quorum
from swarm import errors
from swarm.v1 import (
    Cluster,
    Kind,
    ListRequest,
    ManagerStatus,
    Node,
    WatchRequest,
    WatchServicesRequest,
)
from tests.unit.api.conftest import opened
from tests.unit.api.harness import CONTEXT, Api, node, service

STALE = dataclasses.replace(CONTEXT, stale=True)
DEADLINE_S = 10
# Reachable are those at these addresses.
UP = {"n2:2377"}


class Log:
    """Whether the log of changes is reached."""

    def __init__(self) -> None:
        self.reached = True

    async def barrier(self) -> None:
        if not self.reached:
            raise errors.Unavailable("etcd does not answer")


async def answers(address: str) -> bool:
    return address in UP


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def api(log: Log, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    monkeypatch.setattr(quorum, "TOUCH_CHECK_S", 0.01)
    async with opened(barrier=log.barrier, answers=answers) as made:
        await made.put(
            *(
                structs.replace(
                    node(name, name.upper()), manager_status=ManagerStatus(addr=f"{name}:2377")
                )
                for name in ("m", "n2", "n3", "n4")
            )
        )
        yield made


def lose(api: Api, log: Log, error: type[errors.SwarmError] = errors.Unavailable) -> None:
    log.reached = False
    api.engine.in_touch = False
    api.engine.failing = error("etcd does not answer")


async def test_a_lost_quorum_is_explained_with_numbers_names_and_what_to_do(
    api: Api, log: Log
) -> None:
    lose(api, log)
    with pytest.raises(errors.Unavailable) as caught:
        await api.list(Kind.NODE)
    said = caught.value.message
    assert "does not have a leader: too few managers are online" in said
    assert "2 of 4 can be reached from here, and it takes 3" in said
    assert "gone: N3 at n3:2377, N4 at n4:2377" in said
    assert "swarmctl swarm init --force-new-cluster" in said


async def test_where_enough_can_be_reached_it_is_an_election(api: Api, log: Log) -> None:
    for name in ("n3", "n4"):
        await api.drop(api.stored(Node, name))
    lose(api, log)
    with pytest.raises(errors.Unavailable, match=r"2 of the 2 managers can be reached .* \(2\)"):
        await api.list(Kind.NODE)


@pytest.mark.parametrize("error", [errors.Unavailable, errors.TimedOut])
async def test_a_write_without_a_quorum_says_so_and_what_is_known_of_it(
    api: Api, log: Log, error: type[errors.SwarmError]
) -> None:
    lose(api, log, error)
    log.reached = True  # it went between the barrier and the commit
    with pytest.raises(error, match="too few managers are online") as caught:
        await api.create(service=service("web"))
    if error is errors.TimedOut:
        assert caught.value.message.startswith("etcd does not answer; ")


async def test_a_full_disk_is_no_lost_quorum(api: Api) -> None:
    api.engine.failing = errors.Unavailable("the disk is full")
    with pytest.raises(errors.Unavailable, match="^the disk is full$"):
        await api.create(service=service("web"))


async def test_one_manager_alone_speaks_of_no_other(log: Log) -> None:
    async with opened(barrier=log.barrier, answers=answers) as made:
        lose(made, log)
        with pytest.raises(errors.Unavailable, match="^etcd does not answer$"):
            await made.list(Kind.NODE)


async def test_what_the_manager_knew_last_is_still_read(api: Api, log: Log) -> None:
    lose(api, log)
    found = await api.control.list(ListRequest(kind=Kind.NODE), STALE)
    assert len(found.objects) == 4


async def test_a_watch_ends_when_its_manager_is_out_of_touch(api: Api, log: Log) -> None:
    await api.create(service=service("web"))
    control = api.control
    watches: list[Any] = [
        control.watch(WatchRequest(), CONTEXT),
        control.watch_services(WatchServicesRequest(services=("web",)), CONTEXT),
    ]
    async with asyncio.timeout(DEADLINE_S):
        for watch in watches:
            await anext(watch)
        lose(api, log)
        for watch in watches:
            with pytest.raises(errors.Unavailable, match="too few managers are online"):
                await anext(watch)


async def test_a_stale_watch_goes_on(api: Api, log: Log) -> None:
    async with aclosing(api.control.watch(WatchRequest(), STALE)) as watch:
        await anext(watch)
        lose(api, log)
        following = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.05)
        assert not following.done()
        api.engine.failing = None
        await api.put(structs.replace(api.stored(Cluster, "c"), subnet_size=25))
        async with asyncio.timeout(DEADLINE_S):
            assert (await following).events


async def test_who_listens_answers() -> None:
    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await quorum.answers(f"127.0.0.1:{port}")
    server.close()
    await server.wait_closed()
    assert not await quorum.answers(f"127.0.0.1:{port}")
