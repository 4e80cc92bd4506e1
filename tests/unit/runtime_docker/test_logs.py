"""Lines from an engine's log stream, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.runtime.docker.logs import PIECE_BYTES, Line, LogParser, parse_time, query, seconds
from swarm.v1 import LogStream

TIME = b"2026-11-21T12:05:08.191446986Z "
TIME_NS = 1_795_262_708_191_446_986
LATER = b"2026-11-21T12:05:09.000000001Z "
OUT, ERR = LogStream.STDOUT, LogStream.STDERR


def frame(kind: int, payload: bytes) -> bytes:
    return bytes([kind, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload


def parse(data: bytes, *, tty: bool = False, cuts: tuple[int, ...] = ()) -> list[Line]:
    parser = LogParser(tty=tty)
    out: list[Line] = []
    begin = 0
    for end in (*sorted(c for c in cuts if c < len(data)), len(data)):
        out += parser.feed(data[begin:end])
        begin = end
    return [*out, *parser.flush()]


def test_frames_become_lines_with_stream_and_time() -> None:
    data = frame(1, TIME + b"a b\n") + frame(2, LATER + b"\n") + frame(1, TIME + b"end")
    assert parse(data) == [
        Line(OUT, TIME_NS, b"a b"),
        Line(ERR, 1_795_262_709_000_000_001, b""),
        Line(OUT, TIME_NS, b"end"),
    ]


def test_pieces_of_a_long_line_are_joined_though_streams_alternate() -> None:
    data = (
        frame(1, TIME + b"x" * PIECE_BYTES)
        + frame(2, TIME + b"err\n")
        + frame(1, LATER + b"rest\n")
    )
    assert parse(data) == [
        Line(ERR, TIME_NS, b"err"),
        Line(OUT, TIME_NS, b"x" * PIECE_BYTES + b"rest"),
    ]


def test_a_terminals_lines_lose_their_carriage_return() -> None:
    data = TIME + b"one\r\n" + TIME + b"\r\n" + TIME + b"last"
    assert [line.data for line in parse(data, tty=True)] == [b"one", b"", b"last"]


def test_pieces_of_a_terminals_long_line_are_joined() -> None:
    data = TIME + b"x" * PIECE_BYTES + LATER + b"y" * 5 + b"\r\n" + TIME + b"z\r\n"
    assert parse(data, tty=True) == [
        Line(OUT, TIME_NS, b"x" * PIECE_BYTES + b"y" * 5),
        Line(OUT, TIME_NS, b"z"),
    ]


@given(
    texts=st.lists(
        st.tuples(
            st.sampled_from([1, 2]), st.binary(max_size=40).map(lambda b: b.replace(b"\n", b""))
        ),
        max_size=8,
    ),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_how_the_bytes_arrive_does_not_matter(
    texts: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    data = b"".join(frame(kind, TIME + text + b"\n") for kind, text in texts)
    found = parse(data, cuts=tuple(cuts))
    assert [(line.stream, line.data) for line in found] == [
        (LogStream(kind), text) for kind, text in texts
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-21T12:05:08.191446986Z", TIME_NS),
        ("2026-11-21T13:05:08+01:00", 1_795_262_708_000_000_000),
        ("0001-01-01T00:00:00Z", 0),
        ("nonsense", 0),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert parse_time(text) == expected


def test_query_says_what_is_asked_for() -> None:
    assert query(
        follow=True, tail=-1, since_ns=1_500_000_000, until_ns=0, stdout=True, stderr=False
    ) == {
        "timestamps": "1",
        "follow": "1",
        "stdout": "1",
        "stderr": "0",
        "tail": "all",
        "since": "1.500000000",
    }
    neither = query(follow=False, tail=3, since_ns=0, until_ns=5, stdout=False, stderr=False)
    assert (neither["stdout"], neither["stderr"], neither["tail"]) == ("1", "1", "3")
    assert neither["until"] == seconds(5) == "0.000000005"
