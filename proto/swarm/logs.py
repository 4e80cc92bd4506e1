"""structlog as this project uses it: an event name and fields; JSON for machines, aligned text for
people.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
FORMATS = ("auto", "json", "text")


class _Steadfast:
    """A stream whose writes never fail. A full disk or a reader that has gone must not end what
    only wanted to say something; the line is lost, for there is nowhere to say so.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def configure(*, level: str = "info", form: str = "auto", stream: TextIO | None = None) -> None:
    """Sets logging up for the process. `auto` is text on a terminal and JSON elsewhere."""
    stream = stream or sys.stderr
    terminal = stream.isatty()
    steadfast = cast(TextIO, _Steadfast(stream))
    text = form == "text" or (form == "auto" and terminal)
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(
            colors=terminal,
            exception_formatter=structlog.dev.RichTracebackFormatter(show_locals=False)
            if terminal
            else structlog.dev.plain_traceback,
        )
        if text
        else structlog.processors.JSONRenderer(default=str)
    )
    # Without the values of variables: keys and secrets are among them.
    tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    exceptions: list[structlog.types.Processor] = (
        [] if text else [structlog.processors.ExceptionRenderer(tracebacks)]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *exceptions,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(steadfast),
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard module; only what somebody should look at comes through.
    logging.basicConfig(level=max(LEVELS[level], logging.WARNING), stream=steadfast, force=True)
