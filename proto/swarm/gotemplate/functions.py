"""The functions that every Go template has. Source: Go's text/template documentation.

`and` and `or` are listed here for their names; execution.py evaluates them, for they look at no
more arguments than they need. Messages hold no values, which may be secret.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from swarm.gotemplate.formatting import sprintf
from swarm.gotemplate.values import Fault, Missing, kind_of, text_of, truth

__all__ = ["BUILTINS"]


def data_of(text: str) -> bytes:
    """The bytes of a string; Go's strings are bytes, and count and cut as such."""
    return text.encode(errors="surrogateescape")


def _of_data(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


# ------------------------------------------------------------------ lists, objects, strings


def _length(value: Any) -> int:
    match value:
        case Missing():
            return 0
        case str():
            return len(data_of(value))
        case Mapping() | list() | tuple():
            return len(value)
    raise Fault(f"len: {kind_of(value)} has no length")


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = _item(value, key)
    return value


def _item(value: Any, key: Any) -> Any:
    match value:
        case Missing():
            return value
        case Mapping():
            if not isinstance(key, str):
                raise Fault(f"index: the keys of an object are strings, this is {kind_of(key)}")
            if key in value:
                return value[key]
            # What Go has for a key that is not there: the empty value of its type.
            return "" if all(isinstance(v, str) for v in value.values()) else Missing("")
        case str() | list() | tuple():
            items = data_of(value) if isinstance(value, str) else value
            number = _position(key, "index")
            if number >= len(items):
                raise Fault(f"index: out of range: there are {len(items)} items")
            return items[number]
    raise Fault(f"index: {kind_of(value)} has no items")


def _position(value: Any, function: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Fault(f"{function}: a position is a whole number, this is {kind_of(value)}")
    if value < 0:
        raise Fault(f"{function}: out of range: a position is not negative")
    return value


def _slice(value: Any, *bounds: Any) -> Any:
    if isinstance(value, Missing):
        return ""
    if not isinstance(value, (str, list, tuple)):
        raise Fault(f"slice: {kind_of(value)} cannot be cut")
    if len(bounds) > (2 if isinstance(value, str) else 3):
        raise Fault(f"slice: too many positions for {kind_of(value)}")
    items = data_of(value) if isinstance(value, str) else value
    places = [_position(bound, "slice") for bound in bounds]
    start, end = places[0] if places else 0, places[1] if len(places) > 1 else len(items)
    if end > len(items) or (len(places) > 2 and not end <= places[2] <= len(items)):
        raise Fault(f"slice: out of range: there are {len(items)} items")
    if start > end:
        raise Fault("slice: out of range: the start is behind the end")
    part = items[start:end]
    return _of_data(part) if isinstance(part, bytes) else part


# ------------------------------------------------------------------ comparison


def _basic(value: Any) -> str:
    """The kind of a value that may be compared."""
    match value:
        case None:
            return "nil"
        case Missing():
            return "string"
        case bool():
            return "truth value"
        case int() | float():
            return "number"
        case str():
            return "string"
    raise Fault(f"{kind_of(value)} cannot be compared")


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, Missing) else value


def _same(first: Any, other: Any) -> bool:
    kinds = {_basic(first), _basic(other)}
    if len(kinds) == 1:
        return bool(_plain(first) == _plain(other))
    if "nil" in kinds:
        return False
    raise Fault(f"{kind_of(first)} and {kind_of(other)} cannot be compared; convert with printf")


def _equal(first: Any, *others: Any) -> bool:
    if not others:
        raise Fault("eq: needs two or more values")
    return any(_same(first, other) for other in others)


def _less(first: Any, second: Any) -> bool:
    kinds = {_basic(first), _basic(second)}
    if len(kinds) > 1 or kinds & {"nil", "truth value"}:
        raise Fault(f"{kind_of(first)} and {kind_of(second)} have no order")
    return bool(_plain(first) < _plain(second))


# ------------------------------------------------------------------ text


def _print(*values: Any) -> str:
    """As Go's Sprint: a space between two values neither of which is a string."""
    out: list[str] = []
    for number, value in enumerate(values):
        if number and not any(isinstance(v, (str, Missing)) for v in (values[number - 1], value)):
            out.append(" ")
        out.append(text_of(value))
    return "".join(out)


def _println(*values: Any) -> str:
    return " ".join(map(text_of, values)) + "\n"


def _printf(form: Any, *values: Any) -> str:
    if not isinstance(form, (str, Missing)):
        raise Fault(f"printf: the format is a string, this is {kind_of(form)}")
    return sprintf(_plain(form), *values)


_HTML = str.maketrans(
    {"\0": "\ufffd", '"': "&#34;", "'": "&#39;", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
)
_JS = {
    "\\": "\\\\",
    "'": "\\'",
    '"': '\\"',
    "<": "\\u003C",
    ">": "\\u003E",
    "&": "\\u0026",
    "=": "\\u003D",
}


def _one_text(values: tuple[Any, ...]) -> str:
    return text_of(values[0]) if len(values) == 1 else _print(*values)


def _html(*values: Any) -> str:
    return _one_text(values).translate(_HTML)


# Besides what has an escape, all that may not be printable.
_JS_SPECIAL = re.compile(r"[^ -~]|[\\'\"<>&=]")


def _js(*values: Any) -> str:
    def one(match: re.Match[str]) -> str:
        letter = match[0]
        if letter in _JS:
            return _JS[letter]
        return letter if letter.isprintable() else f"\\u{ord(letter):04X}"

    return _JS_SPECIAL.sub(one, _one_text(values))


def _urlquery(*values: Any) -> str:
    return urllib.parse.quote_plus(data_of(_one_text(values)), safe="-_.~")


# ------------------------------------------------------------------ calls


def _call(function: Any, *arguments: Any) -> Any:
    if not callable(function):
        raise Fault(f"call: {kind_of(function)} is no function")
    return function(*arguments)


def _and(*values: Any) -> Any:
    return next((value for value in values if not truth(value)), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if truth(value)), values[-1])


BUILTINS: Mapping[str, Callable[..., Any]] = {
    "and": _and,
    "call": _call,
    "html": _html,
    "index": _index,
    "slice": _slice,
    "js": _js,
    "len": _length,
    "not": lambda value: not truth(value),
    "or": _or,
    "print": _print,
    "printf": _printf,
    "println": _println,
    "urlquery": _urlquery,
    "eq": _equal,
    "ne": lambda first, second: not _same(first, second),
    "lt": _less,
    "le": lambda first, second: _less(first, second) or _same(first, second),
    "gt": lambda first, second: _less(second, first),
    "ge": lambda first, second: _less(second, first) or _same(first, second),
}
