"""What is wrong with a compose file, and where: problems, warnings, the error with all of them.

All problems of a load are gathered in one Report, so that a user sees them at once and not one per
run. Nothing here knows what a compose file means.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from swarm import errors

SNIPPET_WIDTH = 96  # columns of a source line that are shown
PROBLEMS_SHOWN = 50  # in the message of one error; the rest is counted


class Source:
    """One text that was read: a file, standard input, or an env file."""

    __slots__ = ("_lines", "name", "order", "text")

    def __init__(self, name: str, text: str, *, order: int = 0) -> None:
        self.name = name
        self.text = text
        self.order = order
        self._lines: list[str] | None = None

    def line(self, number: int) -> str:
        """The line with that number, from 1; empty past the end."""
        if self._lines is None:
            self._lines = self.text.splitlines()
        return self._lines[number - 1] if 0 < number <= len(self._lines) else ""


class Mark(NamedTuple):
    """A place in a source; line and column count from 1."""

    source: Source
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `hint` says what to do about it."""

    message: str
    file: str
    line: int
    column: int
    snippet: str
    hint: str = ""

    def render(self) -> str:
        """For a terminal: the place, the line with a caret below, and the hint."""
        text = [f"{self.file}:{self.line}:{self.column}: {self.message}"]
        if self.snippet.strip():
            start = max(0, self.column - SNIPPET_WIDTH * 3 // 4) if self.column else 0
            shown = self.snippet.replace("\t", " ")[start : start + SNIPPET_WIDTH].rstrip()
            caret = min(max(self.column - 1 - start, 0), len(shown))
            gutter = f"{self.line:>5} | "
            text += [gutter + shown, " " * (len(gutter) - 2) + "| " + " " * caret + "^"]
        if self.hint:
            text.append(f"      {self.hint}")
        return "\n".join(text)


class ComposeError(errors.Invalid):
    """A compose file cannot be used; `problems` is never empty and stands in order of place."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        parts = [problem.render() for problem in self.problems[:PROBLEMS_SHOWN]]
        if len(self.problems) > PROBLEMS_SHOWN:
            parts.append(f"and {len(self.problems) - PROBLEMS_SHOWN} more problems")
        super().__init__("\n".join(parts))


class Report:
    """Gathers what is wrong or doubtful during one load; the only mutable state of a load."""

    def __init__(self, *, lenient: bool = False) -> None:
        """`lenient`: what only a deploy refuses becomes a warning, for who just looks at files."""
        self.lenient = lenient
        self._problems: dict[tuple[int, int, int, str], Problem] = {}
        self._warnings: dict[str, None] = {}
        self._misspelt: set[Mark] = set()

    def error(self, mark: Mark, message: str, hint: str = "") -> None:
        """Records a problem; the same one at the same place counts once (anchors are read more than
        once).
        """
        source, line, column = mark
        key = (source.order, line, column, message)
        if key not in self._problems:
            self._problems[key] = Problem(
                message, source.name, line, column, source.line(line), hint
            )

    def refuse(self, mark: Mark, message: str, hint: str = "") -> None:
        """Records what is well said but nothing that a cluster can do."""
        if self.lenient:
            self.warn(mark, f"a deploy refuses this: {message}" + (f"; {hint}" if hint else ""))
        else:
            self.error(mark, message, hint)

    def misspelt(self, mapping: Mark) -> None:
        """Remembers a mapping that has an unknown key: what it lacks may be what was meant."""
        self._misspelt.add(mapping)

    def is_misspelt(self, mapping: Mark) -> bool:
        return mapping in self._misspelt

    def warn(self, mark: Mark, message: str) -> None:
        self._warnings[f"{mark}: {message}"] = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(self._problems[key] for key in sorted(self._problems))

    @property
    def failed(self) -> bool:
        return bool(self._problems)

    @property
    def count(self) -> int:
        return len(self._problems)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._warnings)

    def check(self) -> None:
        """Raises ComposeError if anything was wrong so far."""
        if self._problems:
            raise ComposeError(self.problems)


def nearest(word: str, accepted: Iterable[str]) -> str:
    """The accepted word that was most likely meant; empty when none is near."""
    found = difflib.get_close_matches(word.lower(), list(accepted), n=1, cutoff=0.6)
    return found[0] if found else ""


def listed(words: Iterable[str], conjunction: str = "or") -> str:
    """ "a, b or c" """
    *rest, last = words
    return f"{', '.join(rest)} {conjunction} {last}" if rest else last
