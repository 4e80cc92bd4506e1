"""Variables in values: ${A}, ${A:-b}, ${A-b}, ${A:?e}, ${A?e}, ${A:+c}, ${A+c}, nested, and $$.

The grammar is the Compose Specification's. A `-`, `?` or `+` with a colon counts an empty variable
as unset. What stands after it may hold variables itself and is evaluated only when it is used.
Values are replaced, keys never. A variable that is not set and has no default becomes the empty
text, and the report is warned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cli.compose.problems import Mark, Report
from cli.compose.tree import FAILED_TAG, LITERAL_TAG, Node

NESTING_MAX = 20
_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_NAME = _FIRST | frozenset("0123456789")


class BadTemplate(ValueError):
    """A value's variables cannot be filled in. `offset` is where in the text."""

    def __init__(self, message: str, hint: str, offset: int) -> None:
        super().__init__(message)
        self.hint = hint
        self.offset = offset


def substitute(text: str, variables: Mapping[str, str], unset: Callable[[str, int], None]) -> str:
    """The text with its variables filled in. `unset` is told the name and offset of each variable
    that is not set and has no default. Raises BadTemplate.
    """
    return _Template(text, variables, unset).run()


class _Template:
    def __init__(
        self, text: str, variables: Mapping[str, str], unset: Callable[[str, int], None]
    ) -> None:
        self.text = text
        self.variables = variables
        self.unset = unset

    def run(self) -> str:
        result, position = self.until(0, end="", used=True, depth=0)
        assert position == len(self.text)
        return result

    def until(self, position: int, *, end: str, used: bool, depth: int) -> tuple[str, int]:
        """Text up to the `end` character or the end of all. Unused parts are only skipped: their
        variables may be unset or required.
        """
        text = self.text
        parts: list[str] = []
        start = position
        braces = 0
        while position < len(text):
            char = text[position]
            if char == "$":
                parts.append(text[start:position])
                value, position = self.dollar(position, used=used, depth=depth)
                parts.append(value)
                start = position
                continue
            if end:
                # Braces of a default such as {"a": {}} belong to it as long as they are paired.
                if char == "{":
                    braces += 1
                elif char == end:
                    if not braces:
                        break
                    braces -= 1
            position += 1
        parts.append(text[start:position])
        return "".join(parts), position

    def dollar(self, position: int, *, used: bool, depth: int) -> tuple[str, int]:
        text = self.text
        after = text[position + 1 : position + 2]
        if after == "$":
            return "$", position + 2
        if after == "{":
            return self.braced(position, used=used, depth=depth)
        if after in _FIRST and after:
            end = position + 2
            while end < len(text) and text[end] in _NAME:
                end += 1
            return self.lookup(text[position + 1 : end], position, used=used), end
        raise BadTemplate(
            f"{text[position : position + 2]!r} begins no variable",
            "write $$ for a dollar sign, or ${NAME} for a variable",
            position,
        )

    def braced(self, start: int, *, used: bool, depth: int) -> tuple[str, int]:
        text = self.text
        if depth >= NESTING_MAX:
            raise BadTemplate(
                f"variables are nested deeper than {NESTING_MAX} levels", "make it simpler", start
            )
        position = start + 2
        while position < len(text) and text[position] in _NAME:
            position += 1
        name = text[start + 2 : position]
        if not name or name[0] not in _FIRST:
            raise BadTemplate(
                f"{text[start : start + 20]!r}: a variable's name begins with a letter or _",
                "write ${NAME}, or $$ for a dollar sign",
                start,
            )
        colon = text[position : position + 1] == ":"
        operator = text[position + colon : position + colon + 1]
        if not colon and operator == "}":
            return self.lookup(name, start, used=used), position + 1
        if operator not in ("-", "?", "+") or not operator:
            self.unclosed(start, position, colon=colon)
        value = self.variables.get(name)
        is_set = value is not None and (value != "" or not colon)
        takes_rest = used and is_set == (operator == "+")
        rest, end = self.until(position + colon + 1, end="}", used=takes_rest, depth=depth + 1)
        if end >= len(text):
            self.unclosed(start, end, colon=False)
        if operator == "?" and takes_rest:
            state = "empty" if value == "" else "not set"
            said = f": {rest}" if rest else ""
            raise BadTemplate(
                f"the variable {name} is {state}, and it is required{said}",
                f"set it in the environment or in .env: {name}=...",
                start,
            )
        if operator == "+":
            return rest if takes_rest else "", end + 1
        return rest if takes_rest else value or "", end + 1

    def unclosed(self, start: int, position: int, *, colon: bool) -> None:
        text, brace, _ = self.text[start : start + 30].partition("}")
        shown = text.split("\n")[0] + brace
        if position >= len(self.text):
            raise BadTemplate(
                f"{shown!r} has no closing brace", "write } where the variable ends", start
            )
        found = self.text[position : position + 1 + colon]
        raise BadTemplate(
            f"{shown!r}: {found!r} cannot follow a variable's name",
            "known are }, :-default, -default, :?message, ?message, :+text and +text; "
            "write $$ for a dollar sign",
            start,
        )

    def lookup(self, name: str, offset: int, *, used: bool) -> str:
        value = self.variables.get(name)
        if value is None:
            if used:
                self.unset(name, offset)
            return ""
        return value


def interpolate(root: Node, variables: Mapping[str, str], report: Report) -> None:
    """Fills in the variables of all strings below `root`, in place. What several aliases share is
    done once, in the place of the anchor.
    """
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        value = node.value
        if isinstance(value, str):
            if "$" in value and id(node) not in seen:
                seen.add(id(node))
                if node.origin is None:
                    _fill(node, value, variables, report)
                else:
                    _take(node, node.origin[1], variables, report, seen)
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)


def _take(
    node: Node, anchor: Node, variables: Mapping[str, str], report: Report, seen: set[int]
) -> None:
    """Gives an alias the filled in text of its anchor."""
    if id(anchor) not in seen and isinstance(anchor.value, str):
        seen.add(id(anchor))
        _fill(anchor, anchor.value, variables, report)
    node.value, node.text, node.tag = anchor.value, anchor.text, anchor.tag
    node.plain = False
    report.unset_too(node.mark, anchor.mark)


def keep_literal(root: Node) -> None:
    """Marks the strings below `root` that hold variables, which are not filled in."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        value = node.value
        if isinstance(value, str):
            if "$" in value and not node.tag:
                node.tag = LITERAL_TAG
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)


def _fill(node: Node, text: str, variables: Mapping[str, str], report: Report) -> None:
    def unset(name: str, offset: int) -> None:
        report.warn(
            place_in(node, text, offset),
            f"the variable {name} is not set; an empty text is used",
        )
        report.unset(node.mark, name)

    try:
        node.value = substitute(text, variables, unset)
    except BadTemplate as error:
        report.error(place_in(node, text, error.offset), str(error), error.hint)
        node.value = ""
        node.tag = FAILED_TAG
    node.text = node.value
    node.plain = False


def place_in(node: Node, text: str, offset: int) -> Mark:
    """Where a part of a scalar's text stands in its source: found by looking for it, because
    quotes, folding and escapes move it.
    """
    words = text[offset : offset + 24].split()  # folding puts spaces where lines end
    part = words[0].split('"')[0].split("\\")[0] if words else ""
    earlier = text[:offset].count(part) if part else 0
    for line in range(node.line, node.line + text.count("\n") + 3):
        written = node.source.line(line)
        position = node.column - 1 if line == node.line else 0
        while part and (position := written.find(part, position)) >= 0:
            if not earlier:
                return Mark(node.source, line, position + 1)
            earlier -= 1
            position += len(part)
    return node.mark
