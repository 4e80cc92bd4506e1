"""Problems of a request, gathered so that all are told at once.

One `Problems` per request; `of(subject)` gives a `Finder` that notes problems of one object under
its name and field. The message stays below what gRPC carries in its trailers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

from swarm import errors

# gRPC sends the message percent-encoded in trailers, of which 8 KiB are safe.
MESSAGE_CHARS_MAX = 4000
SHOWN_MAX = 25


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, where. `subject` names the object: `service "web"`."""

    subject: str
    field: str
    message: str

    def __str__(self) -> str:
        where = f"{self.subject}: {self.field}" if self.field else self.subject
        return f"{where}: {self.message}"


@dataclass(slots=True)
class Problems:
    """All problems of one request, in the order in which they were found."""

    found: list[Problem] = field(default_factory=list)

    def of(self, subject: str) -> Finder:
        return Finder(self, subject)

    def raise_any(self) -> None:
        """Raises Invalid with everything that was found; nothing was found: returns."""
        if self.found:
            raise errors.Invalid(self.message())

    def message(self) -> str:
        lines = [str(p) for p in self.found]
        if len(lines) == 1:
            return lines[0][:MESSAGE_CHARS_MAX]
        shown: list[str] = []
        size = 0
        for line in lines[:SHOWN_MAX]:
            size += len(line) + 3
            if size > MESSAGE_CHARS_MAX:
                break
            shown.append(line)
        rest = len(lines) - len(shown)
        if rest:
            shown.append(f"and {rest} more")
        return f"{len(lines)} problems:\n  " + "\n  ".join(shown)


@dataclass(frozen=True, slots=True)
class Finder:
    """Notes problems of one object; the `prefix` is put before each field."""

    problems: Problems
    subject: str
    prefix: str = ""

    def at(self, prefix: str) -> Finder:
        """The same object, one level deeper."""
        return Finder(self.problems, self.subject, f"{self.prefix}{prefix}.")

    def add(self, field: str, message: str) -> None:
        self.problems.found.append(Problem(self.subject, self.prefix + field, message))

    def one_of(self, field: str, value: str, accepted: Iterable[str]) -> bool:
        """Notes a value that is not accepted. Empty stands for the default and is accepted."""
        words = tuple(accepted)
        if not value or value in words:
            return True
        self.add(field, f"{value!r} is not one of {', '.join(words)}{nearest(value, words)}")
        return False

    def not_negative(self, field: str, value: float | None, what: str) -> None:
        if value is not None and value < 0:
            self.add(field, f"{what} cannot be negative ({value})")


def nearest(value: str, words: Iterable[str]) -> str:
    """`; did you mean x?`, or nothing when no accepted word is near."""
    close = difflib.get_close_matches(value.lower(), tuple(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
