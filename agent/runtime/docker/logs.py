"""An engine's log stream, cut into lines. Pure.

Without a TTY the stream comes in frames: one byte for the stream (1 stdout, 2 stderr), three zero
bytes, the length as 32 bits big-endian, and the payload (Docker Engine API, "Stream format"). Each
message begins with its time, as asked for with timestamps=1. The engine cuts lines at 16 KiB; the
pieces come as messages without a line's end, each with a time of its own, and are joined here.
With a TTY there are no frames: all is stdout, and lines end in CR LF.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from swarm.v1 import LogStream

PIECE_BYTES = 16 * 1024  # where the engine cuts a line
# A line that goes on for ever is given out in parts of this size.
LINE_BYTES_MAX = 1024 * 1024
_HEADER = 8
_STREAMS = {1: LogStream.STDOUT, 2: LogStream.STDERR}
_TIME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ")
_TIME_BYTES_MAX = 37


@dataclass(frozen=True, slots=True)
class Line:
    stream: LogStream
    timestamp_ns: int
    data: bytes


@dataclass(slots=True)
class _Open:
    """A line whose end has not come yet."""

    timestamp_ns: int = 0
    data: bytearray = field(default_factory=bytearray)
    begun: bool = False


class LogParser:
    """Fed with bytes as they come; gives whole lines."""

    def __init__(self, *, tty: bool) -> None:
        self._tty = tty
        self._buffer = bytearray()
        self._open = {stream: _Open() for stream in _STREAMS.values()}

    def feed(self, data: bytes) -> Iterator[Line]:
        """The lines that this completes."""
        self._buffer += data
        yield from self._raw() if self._tty else self._framed()

    def flush(self) -> Iterator[Line]:
        """What is left at the end of the stream."""
        if self._tty and self._buffer:
            yield from self._message(LogStream.STDOUT, bytes(self._buffer))
        self._buffer.clear()
        for stream, line in self._open.items():
            if line.begun:
                yield self._close(stream, line)

    def _framed(self) -> Iterator[Line]:
        while len(self._buffer) >= _HEADER:
            size = int.from_bytes(self._buffer[4:_HEADER], "big")
            if len(self._buffer) < _HEADER + size:
                return
            stream = _STREAMS.get(self._buffer[0], LogStream.STDOUT)
            payload = bytes(self._buffer[_HEADER : _HEADER + size])
            del self._buffer[: _HEADER + size]
            yield from self._message(stream, payload)

    def _raw(self) -> Iterator[Line]:
        """Finds messages by their ends: a line feed, or the size at which the engine cuts."""
        while True:
            time = _TIME.match(self._buffer)
            begin = time.end() if time else 0
            end = self._buffer.find(b"\n", begin)
            cut = begin + PIECE_BYTES
            if (end < 0 or end >= cut) and len(self._buffer) >= cut + _TIME_BYTES_MAX:
                # A piece, if another message's time follows; else a line that is just long.
                size = cut if _TIME.match(self._buffer, cut) else end + 1
                if size == 0:
                    if len(self._buffer) < LINE_BYTES_MAX:
                        return
                    size = len(self._buffer)
            elif end < 0:
                return
            else:
                size = end + 1
            payload = bytes(self._buffer[:size])
            del self._buffer[:size]
            yield from self._message(LogStream.STDOUT, payload)

    def _message(self, stream: LogStream, payload: bytes) -> Iterator[Line]:
        line = self._open[stream]
        time = _TIME.match(payload)
        if time:
            payload = payload[time.end() :]
        if not line.begun:
            line.begun = True
            line.timestamp_ns = _nanoseconds(time) if time else 0
        ended = payload.endswith(b"\n")
        line.data += payload
        if ended or len(line.data) >= LINE_BYTES_MAX:
            yield self._close(stream, line)

    def _close(self, stream: LogStream, line: _Open) -> Line:
        data = bytes(line.data)
        if data.endswith(b"\n"):
            data = data[:-1]
        if self._tty and data.endswith(b"\r"):
            data = data[:-1]
        out = Line(stream, line.timestamp_ns, data)
        self._open[stream] = _Open()
        return out


def _nanoseconds(time: re.Match[bytes]) -> int:
    zone = time[3].decode().replace("Z", "+00:00")
    moment = datetime.datetime.fromisoformat(time[1].decode() + zone)
    fraction = (time[2] or b"").ljust(9, b"0")
    return int(moment.timestamp()) * 1_000_000_000 + int(fraction)


def parse_time(text: str) -> int:
    """An RFC 3339 time as the engine writes it, in Unix nanoseconds; 0 when it is none."""
    time = _TIME.match(text.encode() + b" ")
    return _nanoseconds(time) if time and not text.startswith("0001-") else 0


def query(
    *, follow: bool, tail: int, since_ns: int, until_ns: int, stdout: bool, stderr: bool
) -> dict[str, str]:
    """The parameters of the engine's log call. With neither stream named, both are meant."""
    both = not stdout and not stderr
    out = {
        "timestamps": "1",
        "follow": "1" if follow else "0",
        "stdout": "1" if stdout or both else "0",
        "stderr": "1" if stderr or both else "0",
        "tail": "all" if tail < 0 else str(tail),
    }
    for name, time_ns in (("since", since_ns), ("until", until_ns)):
        if time_ns:
            out[name] = seconds(time_ns)
    return out


def seconds(time_ns: int) -> str:
    """A time as the engine takes it in queries: seconds with nine digits behind the point."""
    return f"{time_ns // 1_000_000_000}.{time_ns % 1_000_000_000:09d}"
