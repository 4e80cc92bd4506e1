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
        # By place and words; the paths that it was found at, for an anchor stands in many.
        self._problems: dict[tuple[int, int, int, str, str], tuple[Source, dict[str, None]]] = {}
        self._warnings: dict[str, None] = {}
        self._half_known: set[Mark] = set()
        self._unset: dict[Mark, dict[str, None]] = {}

    def error(self, mark: Mark, message: str, hint: str = "", *, path: str = "") -> None:
        """Records a problem of the value at `path`. The same one at the same place counts once:
        many services may have what one anchor says.
        """
        source, line, column = mark
        if names := self._unset.get(mark):
            subject = "variables {} are" if len(names) > 1 else "variable {} is"
            message += f" (the {subject.format(listed(names, 'and'))} not set)"
        key = (source.order, line, column, message, hint)
        self._problems.setdefault(key, (source, {}))[1][path] = None

    def refuse(self, mark: Mark, message: str, hint: str = "", *, path: str = "") -> None:
        """Records what is well said but nothing that a cluster can do."""
        if self.lenient:
            text = f"{path}: {message}" if path else message
            self.warn(mark, f"a deploy refuses this: {text}" + (f"; {hint}" if hint else ""))
        else:
            self.error(mark, message, hint, path=path)

    def unset(self, mark: Mark, variable: str) -> None:
        """Remembers a value that a variable left empty, for problems with it."""
        self._unset.setdefault(mark, {})[variable] = None

    def unset_too(self, mark: Mark, like: Mark) -> None:
        """The same for a value that is a copy of another."""
        if names := self._unset.get(like):
            self._unset.setdefault(mark, {}).update(names)

    def half_known(self, mapping: Mark) -> None:
        """Remembers a mapping that has an unknown key, which may be what it lacks, or that extends
        what could not be read.
        """
        self._half_known.add(mapping)

    def is_half_known(self, mapping: Mark) -> bool:
        return mapping in self._half_known

    def warn(self, mark: Mark, message: str) -> None:
        self._warnings[f"{mark}: {message}"] = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(
            Problem(
                _placed(message, tuple(paths)), source.name, line, column, source.line(line), hint
            )
            for (_, line, column, message, hint), (source, paths) in sorted(
                self._problems.items(), key=lambda item: item[0]
            )
        )

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


def _placed(message: str, paths: tuple[str, ...]) -> str:
    """The message with the paths that it is about."""
    first, *others = paths
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        message += f" (the same for {others[0]}{more})"
    return f"{first}: {message}" if first else message


def nearest(word: str, accepted: Iterable[str]) -> str:
    """The accepted word that was most likely meant; empty when none is near."""
    found = difflib.get_close_matches(word.lower(), list(accepted), n=1, cutoff=0.6)
    return found[0] if found else ""


def listed(words: Iterable[str], conjunction: str = "or") -> str:
    """ "a, b or c" """
    *rest, last = words
    return f"{', '.join(rest)} {conjunction} {last}" if rest else last
