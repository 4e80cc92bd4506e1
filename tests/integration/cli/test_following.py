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


async def told_lines(connection: Any) -> list[str]:
    """What is told, problems with a "!" before them."""
    request = LogsRequest(services=("web",), options=LogOptions(follow=True, tail=-1))
    told = []
    async for answer in follow_logs(connection, request):
        told += [f"!{problem}" for problem in answer.problems]
        told += [
            f"{line.task_id}{line.timestamp_ns // SECOND}{line.data.decode()}"
            for line in answer.lines
        ]
    return told


async def test_a_node_that_comes_late_to_the_next_manager_loses_no_line() -> None:
    away = LogsResponse(problems=("task a cannot be read: its node has no session",))
    connection = over(
        [lines("a1x", "b1x"), GONE],
        [lines("b1x", "b2x"), away, lines("b3never")],
        [away],
        [lines("a1x", "b1x", "a2x", "b2x", "b3x")],
    )
    assert await told_lines(connection) == ["a1x", "b1x", "b2x", "a2x", "b3x"]
    assert len({r.options.since_ns for r in connection.control.asked[1:]}) == 1


async def test_a_node_that_stays_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SETTLE_S", 0.0)
    away = LogsResponse(problems=("a is away",))
    connection = over([lines("a1x"), away, GONE], [away, lines("b2x")])
    assert await told_lines(connection) == ["a1x", "!a is away", "!a is away", "b2x"]


async def test_a_clock_set_back_after_a_break_hides_no_line() -> None:
    connection = over([lines("a5x"), GONE], [lines("a4w", "a5x", "a6y", "a2z")])
    assert await told_lines(connection) == ["a5x", "a6y", "a2z"]


async def test_what_is_remembered_of_lines_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "STREAMS_MAX", 10)
    shown = following._Shown()
    for number in range(1000):
        line = LogLine(task_id=f"t{number}", timestamp_ns=number * SECOND, data=b"x")
        assert shown.fresh((line,)) == (line,)
    assert len(shown._last) <= 61
