"""Streams are taken up again when the manager they come from goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from cli import following
from cli.following import follow_logs, watch
from swarm.errors import Exhausted, NotManager, SwarmError, Unavailable
from swarm.v1 import (
    Event,
    Kind,
    ListRequest,
    ListResponse,
    LogLine,
    LogOptions,
    LogsRequest,
    LogsResponse,
    LogStream,
    Object,
    Service,
    WatchRequest,
    WatchResponse,
)

SECOND = 1_000_000_000
GONE = Unavailable("the manager went")


class Control:
    """Answers from scripts: each call takes the next list, in which an error is raised."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.asked: list[Any] = []

    async def list(self, request: ListRequest) -> ListResponse:
        return ListResponse(revision=40)

    async def watch(self, request: WatchRequest) -> AsyncIterator[WatchResponse]:
        async for item in self._next(request):
            yield item

    async def logs(self, request: LogsRequest) -> AsyncIterator[LogsResponse]:
        async for item in self._next(request):
            yield item

    async def _next(self, request: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        for item in self.scripts.pop(0):
            if isinstance(item, SwarmError):
                raise item
            yield item


class Connection:
    def __init__(self, control: Control) -> None:
        self.control = control


def over(*scripts: list[Any]) -> Any:
    return Connection(Control(*scripts))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "RETRY_S", 0.0)


def changed(*pairs: tuple[int, str]) -> WatchResponse:
    return WatchResponse(
        events=tuple(
            Event(
                action="update",
                kind=Kind.SERVICE,
                revision=revision,
                object=Object(service=Service(id=id_)),
            )
            for revision, id_ in pairs
        )
    )


async def ids(connection: Any, request: WatchRequest = WatchRequest()) -> list[str]:  # noqa: B008
    """What was told until the watch ended, "-" for each time that it stood."""
    out = []
    async for answer in watch(connection, request):
        out += [_id(e) for e in answer.events] or ["-"]
    return out


def _id(event: Event) -> str:
    assert event.object is not None and event.object.service is not None
    return f"{event.object.service.id}{event.revision}"


async def test_a_watch_goes_on_without_a_gap_and_without_a_repetition() -> None:
    connection = over(
        [WatchResponse(), changed((41, "a"), (42, "a")), GONE],
        [WatchResponse(), changed((42, "a"), (42, "b"), (43, "a"))],
    )
    assert await ids(connection) == ["-", "a41", "a42", "-", "b42", "a43"]
    assert [r.from_revision for r in connection.control.asked] == [41, 42]


async def test_a_watch_that_has_seen_nothing_goes_on_where_it_began() -> None:
    connection = over([GONE], [WatchResponse(), GONE], [WatchResponse(), changed((41, "a"))])
    assert await ids(connection) == ["-", "-", "a41"]
    assert [r.from_revision for r in connection.control.asked] == [41, 41, 41]


async def test_a_watch_of_the_past_goes_on_by_revision() -> None:
    connection = over([WatchResponse(), changed((7, "a")), GONE], [WatchResponse()])
    await ids(connection, WatchRequest(since_ns=5))
    assert [(r.from_revision, r.since_ns) for r in connection.control.asked] == [(0, 5), (7, 0)]


@pytest.mark.parametrize("error", [NotManager("a worker"), Exhausted("no longer kept")])
async def test_what_no_waiting_helps_with_is_told_at_once(error: SwarmError) -> None:
    with pytest.raises(type(error)):
        await ids(over([WatchResponse(), GONE], [error]))


async def test_waiting_for_a_manager_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LOST_S", 0.05)
    monkeypatch.setattr(following, "RETRY_S", 0.02)
    with pytest.raises(Unavailable, match="the manager went"):
        await ids(over(*([[GONE]] * 100)))


def lines(*texts: str) -> LogsResponse:
    """ "a1x": task a, second 1, text x."""
    return LogsResponse(
        lines=tuple(
            LogLine(
                task_id=text[0],
                timestamp_ns=int(text[1]) * SECOND,
                data=text[2:].encode(),
                stream=LogStream.STDOUT,
            )
            for text in texts
        )
    )


async def test_logs_go_on_without_a_line_told_twice() -> None:
    connection = over(
        # The same line twice at the same moment is two lines.
        [lines("a1x", "b2x", "a3x", "a3x"), lines("b3y"), GONE],
        [lines("a1x", "b2x", "a3x", "b3y", "a3x", "b3z", "a3x", "a4x")],
    )
    request = LogsRequest(
        services=("web",), options=LogOptions(follow=True, tail=5, since_ns=SECOND)
    )
    told = []
    async for answer in follow_logs(connection, request):
        told += [
            f"{line.task_id}{line.timestamp_ns // SECOND}{line.data.decode()}"
            for line in answer.lines
        ]
    assert told == ["a1x", "b2x", "a3x", "a3x", "b3y", "b3z", "a3x", "a4x"]
    again = connection.control.asked[1].options
    assert (again.tail, again.since_ns, again.follow) == (-1, SECOND, True)
