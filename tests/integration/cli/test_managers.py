"""One channel to several managers: which of them is asked, and what is asked twice."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from cli.managers import NEXT_S, Managers
from swarm import errors
from swarm.rpc import Channel, NoAnswer
from swarm.v1 import (
    ConfigSpec,
    CreateRequest,
    Event,
    GetInfoRequest,
    GetInfoResponse,
    Kind,
    ListRequest,
    Spec,
    WatchRequest,
)
from swarm.v1.services import ControlClient
from tests.integration.cli.fake import FakeCluster, FakeServer

CONNECT_S = 5.0
CREATE = CreateRequest(spec=Spec(config=ConfigSpec(name="c", data=b"x")))


class Manager:
    """One of several, which can be stopped."""

    def __init__(self, folder: Path, name: str) -> None:
        self.cluster = FakeCluster()
        self.cluster.info = GetInfoResponse(node_id=name)
        self.address = str(folder / name)
        self._server: FakeServer | None = None

    def start(self) -> None:
        self._server = FakeServer(self.cluster, Path(self.address))
        self._server.__enter__()

    def stop(self) -> None:
        if self._server is not None:
            self._server.__exit__()
            self._server = None


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Manager]]:
    made = [Manager(tmp_path, name) for name in ("a", "b", "c")]
    for manager in made:
        manager.start()
    yield made
    for manager in made:
        manager.stop()


@contextmanager
def silent(path: Path) -> Iterator[str]:
    """A machine that is gone: connections to it are neither taken nor refused."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()
        yield str(path)


def over(*addresses: str, connect_s: float = CONNECT_S) -> Managers:
    return Managers(addresses, Channel.unix, connect_s=connect_s)


async def asked(control: ControlClient) -> str:
    """Who answers."""
    return (await control.get_info(GetInfoRequest())).node_id


async def test_the_one_that_answered_is_asked_again(three: list[Manager]) -> None:
    async with over(*(m.address for m in three)) as channel:
        control = ControlClient(channel)
        assert [await asked(control) for _ in range(3)] == ["a", "a", "a"]
        three[0].stop()
        assert [await asked(control) for _ in range(2)] == ["b", "b"]
        three[0].start()
        assert await asked(control) == "b"


async def test_one_that_refuses_connections_costs_no_time(
    three: list[Manager], tmp_path: Path
) -> None:
    begun_s = monotonic()
    async with over(str(tmp_path / "nobody"), three[1].address) as channel:
        assert await asked(ControlClient(channel)) == "b"
    assert monotonic() - begun_s < NEXT_S / 2


async def test_one_that_is_gone_is_waited_for_a_second(
    three: list[Manager], tmp_path: Path
) -> None:
    begun_s = monotonic()
    with silent(tmp_path / "gone") as gone:
        async with over(gone, three[1].address) as channel:
            assert await asked(ControlClient(channel)) == "b"
    assert NEXT_S * 0.9 < monotonic() - begun_s < NEXT_S * 2


async def test_a_manager_that_starts_late_is_waited_for(three: list[Manager]) -> None:
    for manager in three:
        manager.stop()
    async with over(*(m.address for m in three)) as channel, asyncio.TaskGroup() as group:
        answer = group.create_task(asked(ControlClient(channel)))
        await asyncio.sleep(0.3)
        three[2].start()
        assert await answer == "c"


async def test_when_nobody_answers_all_are_named(tmp_path: Path) -> None:
    addresses = [str(tmp_path / name) for name in "ab"]
    async with over(*addresses, connect_s=0.5) as channel:
        with pytest.raises(NoAnswer, match=f"at {addresses[0]} or {addresses[1]} within 0.5 s"):
            await asked(ControlClient(channel))


async def test_a_read_goes_on_where_a_manager_does_not_serve(three: list[Manager]) -> None:
    three[0].cluster.failures["list"] = [errors.Unavailable("no quorum")]
    three[1].cluster.failures["list"] = [errors.NotManager("a worker")]
    async with over(*(m.address for m in three)) as channel:
        control = ControlClient(channel)
        await control.list(ListRequest(kind=Kind.NODE))
        assert await asked(control) == "c"


async def test_the_last_ones_reason_is_told(three: list[Manager]) -> None:
    for manager in three:
        manager.cluster.failures["list"] = [errors.Unavailable(f"no quorum at {manager.address}")]
    async with over(*(m.address for m in three)) as channel:
        with pytest.raises(errors.Unavailable, match=f"no quorum at {three[2].address}"):
            await ControlClient(channel).list(ListRequest(kind=Kind.NODE))


async def test_a_reason_goes_before_silence(three: list[Manager], tmp_path: Path) -> None:
    three[0].cluster.failures["list"] = [errors.Unavailable("no quorum")]
    begun_s = monotonic()
    with silent(tmp_path / "gone") as gone:
        async with over(three[0].address, gone, str(tmp_path / "nobody")) as channel:
            with pytest.raises(errors.Unavailable, match="^no quorum$"):
                await ControlClient(channel).list(ListRequest(kind=Kind.NODE))
    assert monotonic() - begun_s < NEXT_S * 2


async def test_a_write_goes_on_where_nothing_was_done(three: list[Manager]) -> None:
    three[0].stop()
    three[1].cluster.failures["create"] = [errors.Unavailable("no quorum")]
    async with over(*(m.address for m in three)) as channel:
        await ControlClient(channel).create(CREATE)
    assert three[2].cluster.last(CreateRequest) == CREATE


@pytest.mark.parametrize(
    "error", [errors.Conflict("taken"), errors.TimedOut("unknown"), errors.Internal("a defect")]
)
async def test_other_errors_are_the_answer(three: list[Manager], error: errors.SwarmError) -> None:
    three[0].cluster.failures["create"] = [error]
    async with over(*(m.address for m in three)) as channel:
        with pytest.raises(type(error), match=error.message):
            await ControlClient(channel).create(CREATE)
    assert not three[1].cluster.calls


class Breaking(Channel):
    """A connection that stands, as far as anybody knows, and breaks with the next call."""

    def __init__(self) -> None:
        self.target = "breaking"

    async def ready(self, *, timeout_s: float, once: bool = False) -> None:
        """At once."""

    async def unary_unary(self, *args: Any) -> Any:
        raise NoAnswer("the connection broke")

    async def close(self) -> None:
        """Nothing is open."""


async def test_a_write_that_may_have_been_done_is_not_made_again(three: list[Manager]) -> None:
    def make(address: str) -> Channel:
        return Breaking() if address == "first" else Channel.unix(address)

    async with Managers(("first", three[1].address), make, connect_s=CONNECT_S) as channel:
        control = ControlClient(channel)
        with pytest.raises(NoAnswer, match="the connection broke"):
            await control.create(CREATE)
        assert not three[1].cluster.calls
        # But the next call is the other manager's; and a read would have gone on to it.
        assert await asked(control) == "b"
    async with Managers(("first", three[1].address), make, connect_s=CONNECT_S) as channel:
        assert await asked(ControlClient(channel)) == "b"


async def test_a_stream_begins_elsewhere_and_is_taken_up_by_its_reader(
    three: list[Manager],
) -> None:
    three[0].cluster.failures["watch"] = [errors.Unavailable("no quorum")]
    async with over(*(m.address for m in three)) as channel:
        control = ControlClient(channel)
        watch = control.watch(WatchRequest())
        assert (await anext(watch)).events == ()
        assert await asked(control) == "b"
        three[1].stop()
        with pytest.raises(errors.Unavailable):
            await _drain(watch)
        three[2].cluster.watch_events = [Event(action="create")]
        begun = control.watch(WatchRequest())
        await anext(begun)
        assert [e.action for e in (await anext(begun)).events] == ["create"]
        assert await asked(control) == "c"


async def _drain(watch: AsyncIterator[object]) -> None:
    async for _ in watch:
        pass
