"""Files of variables: .env and env_file.

Two formats exist. `dotenv` is docker compose's: quotes, escapes, comments after a value, variables.
`raw` is the docker CLI's: everything after the first = belongs to the value. `docker stack deploy`
reads env_file as raw, so its short form does too; the long form has `format`, dotenv unless it says
raw, as the Compose Specification has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cli.compose.interpolate import BadTemplate, substitute
from cli.compose.problems import Mark, Report, Source

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$$"}


def read_text(path: Path) -> str:
    """A text file. Raises OSError, or ValueError when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None


def _lines(text: str) -> list[str]:
    """Lines that end as in the docker CLI; other separators belong to the values."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_raw(source: Source, environment: Mapping[str, str], report: Report) -> dict[str, str]:
    """The docker CLI's format. A name without = takes the caller's value, and is left out if there
    is none.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(source.text), 1):
        stripped = line.lstrip()
        if not stripped or stripped.startswith("#"):
            continue
        name, equals, value = stripped.partition("=")
        if not name or re.search(r"\s", name):
            report.error(
                Mark(source, number, 1),
                f"{name!r} is not the name of a variable" if name else "a name is missing before =",
                "write NAME=value",
            )
        elif equals:
            found[name] = value
            if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
                report.warn(
                    Mark(source, number, 1),
                    f"the quotes are part of the value of {name}, as with docker stack deploy; "
                    "remove them, or use the long form of env_file (path: ...)",
                )
        elif name in environment:
            found[name] = environment[name]
    return found


def parse_dotenv(source: Source, environment: Mapping[str, str], report: Report) -> dict[str, str]:
    """Docker compose's format. Variables in values see the environment first, then the lines
    above.
    """
    return _Dotenv(source, environment, report).run()


class _Dotenv:
    def __init__(self, source: Source, environment: Mapping[str, str], report: Report) -> None:
        self.source = source
        self.environment = environment
        self.report = report
        self.found: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        lines = _lines(self.source.text)
        index = 0
        while index < len(lines):
            index = self.entry(lines, index)
        return self.found

    def entry(self, lines: list[str], index: int) -> int:
        """Reads one entry; returns the index of the line after it (quoted values span lines)."""
        line = lines[index].strip()
        if not line or line.startswith("#"):
            return index + 1
        mark = Mark(self.source, index + 1, len(lines[index]) - len(lines[index].lstrip()) + 1)
        line = line.removeprefix("export ").lstrip()
        match = _NAME.match(line)
        if match is None:
            self.report.error(mark, "a line must begin with the name of a variable", "NAME=value")
            return index + 1
        name, rest = match[0], line[match.end() :].lstrip()
        if not rest or rest.startswith("#"):
            if name in self.environment:
                self.found[name] = self.environment[name]
            return index + 1
        if rest[0] not in "=:":
            self.report.error(
                mark, f"{rest[0]!r} cannot follow the name {name}", f"write {name}=value"
            )
            return index + 1
        value = rest[1:].lstrip()
        quote = value[:1]
        if quote not in ('"', "'") or not quote:
            value = re.sub(r"(^|\s+)#.*", "", value).rstrip()
            self.found[name] = self.filled(value, mark)
            return index + 1
        parts, last, end = [], value[1:], index + 1
        while (close := _closing(last, quote)) < 0:
            if end >= len(lines):
                self.report.error(mark, f"the value of {name} has no closing {quote}")
                return end
            parts.append(last)
            last, end = lines[end], end + 1
        after = last[close + 1 :].strip()
        if after and not after.startswith("#"):
            self.report.error(mark, f"{after!r} follows the closing quote of {name}")
        body = "\n".join((*parts, last[:close]))
        if quote == "'":
            body = body.replace("\\'", "'")
        else:
            body = re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), body, flags=re.DOTALL)
            body = self.filled(body, mark)
        self.found[name] = body
        return end

    def filled(self, value: str, mark: Mark) -> str:
        def unset(name: str, _offset: int) -> None:
            self.report.warn(mark, f"the variable {name} is not set; an empty text is used")

        try:
            return substitute(value, {**self.found, **self.environment}, unset)
        except BadTemplate as error:
            self.report.error(mark, str(error), error.hint)
            return value


def _closing(body: str, quote: str) -> int:
    position = 0
    while position < len(body):
        if body[position] == "\\" and (quote == '"' or body[position + 1 : position + 2] == quote):
            position += 1
        elif body[position] == quote:
            return position
        position += 1
    return -1
