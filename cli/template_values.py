"""Values in Go templates: how they print, what counts as true, and the functions that templates
call.

Source: Go's text/template and fmt documentation; Docker's "Format command and log output" page.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from swarm.errors import Invalid

__all__ = ["FUNCTIONS", "Missing", "Record", "call", "fail", "pairs", "show", "to_json", "truth"]


class Record(dict[str, Any]):
    """A row whose fields are all there are: another name in a template is an error. A value that is
    callable is a method.
    """


class Missing:
    """What an absent field is: false, empty, and printed as given."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __bool__(self) -> bool:
        return False


def fail(message: str) -> Invalid:
    return Invalid(f"--format: {message}")


def pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    """Index and item of a list, key and value of a map in order of its keys."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield key, value[key]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from enumerate(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from ((number, number) for number in range(value))
    elif truth(value):
        raise fail(f"range needs a list or an object, not {show(value)!r}")


def truth(value: Any) -> bool:
    """Go's truth: false, 0, nil and what is empty are false."""
    return bool(value)


def show(value: Any) -> str:
    """A value as Go's %v prints it."""
    match value:
        case None:
            return "<no value>"
        case Missing():
            return value.text
        case bool():
            return "true" if value else "false"
        case str():
            return value
        case float():
            return f"{value:g}"
        case Mapping():
            return "map[" + " ".join(f"{k}:{show(value[k])}" for k in sorted(value)) + "]"
        case list() | tuple():
            return "[" + " ".join(map(show, value)) + "]"
    return str(value)


# ------------------------------------------------------------------ functions


def call(name: str, arguments: list[Any]) -> Any:
    function = FUNCTIONS.get(name)
    if function is None:
        near = difflib.get_close_matches(name, FUNCTIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise fail(
            f"there is no function {name!r}{hint} (functions: {', '.join(sorted(FUNCTIONS))})"
        )
    try:
        return function(*arguments)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise fail(f"{name}: {error}") from None


def _plain(value: Any) -> Any:
    """The value for JSON: what is absent is null, methods are left out."""
    if isinstance(value, Missing):
        return None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def to_json(value: Any) -> str:
    """Compact JSON as Go's encoder writes it."""
    return json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key, Missing(""))
        elif isinstance(value, Missing):
            continue
        elif not isinstance(key, int) or not 0 <= key < len(value):
            raise IndexError(f"{show(key)} is out of range: there are {len(value)} items")
        else:
            value = value[key]
    return value


_VERB = re.compile(r"%([-+# 0]*)(\d+)?(?:\.(\d+))?([a-zA-Z%])")


def _printf(form: str, *values: Any) -> str:
    rest = list(values)

    def one(match: re.Match[str]) -> str:
        flags, width, precision, verb = match.groups()
        if verb == "%":
            return "%"
        if not rest:
            return f"%!{verb}(MISSING)"
        value = rest.pop(0)
        width, point = width or "", f".{precision}" if precision else ""
        match verb:
            case "s" | "v":
                return str(f"%{flags.replace('0', '')}{width}{point}s" % show(value))
            case "q":
                return f"%{flags}{width}s" % json.dumps(show(value), ensure_ascii=False)
            case "t":
                return f"%{flags}{width}s" % show(value)
            case "d" | "x" | "X" | "o" | "f" | "e" | "g":
                if isinstance(value, str) and verb in "xX":
                    return value.encode().hex()
                if not isinstance(value, (int, float)):
                    return f"%!{verb}({type(value).__name__}={show(value)})"
                return str(f"%{flags}{width}{point}{verb}" % value)
        raise ValueError(f"%{verb} is not offered")

    text = _VERB.sub(one, form)
    if rest:
        text += "%!(EXTRA " + ", ".join(map(show, rest)) + ")"
    return text


def _title(text: str) -> str:
    return re.sub(r"(?<!\S)\S", lambda match: match[0].upper(), show(text))


def _pad(text: str, before: int, after: int) -> str:
    return " " * before + show(text) + " " * after if text else show(text)


def _truncate(text: str, length: int) -> str:
    return show(text)[: max(length, 0)]


def _equal(first: Any, *others: Any) -> bool:
    def comparable(value: Any) -> Any:
        return value.text if isinstance(value, Missing) else value

    return any(comparable(first) == comparable(other) for other in others)


def _and(*values: Any) -> Any:
    return next((value for value in values if not truth(value)), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if truth(value)), values[-1])


def _join(items: Any, separator: str = "") -> str:
    if isinstance(items, Missing):
        return ""
    return separator.join(show(item) for item in items)


def _print(*values: Any) -> str:
    return "".join(map(show, values))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": to_json,
    "join": _join,
    "split": lambda text, separator: show(text).split(separator),
    "lower": lambda text: show(text).lower(),
    "upper": lambda text: show(text).upper(),
    "title": _title,
    "pad": _pad,
    "truncate": _truncate,
    "print": _print,
    "println": lambda *values: " ".join(map(show, values)) + "\n",
    "printf": _printf,
    "len": lambda value: 0 if isinstance(value, Missing) else len(value),
    "index": _index,
    "slice": lambda value, start=0, end=None: value[start:end],
    "not": lambda value: not truth(value),
    "and": _and,
    "or": _or,
    "eq": _equal,
    "ne": lambda first, second: not _equal(first, second),
    "lt": lambda first, second: first < second,
    "le": lambda first, second: first <= second,
    "gt": lambda first, second: first > second,
    "ge": lambda first, second: first >= second,
}
