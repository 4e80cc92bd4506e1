"""Values in Go templates: what an absent one is, how they print, what counts as true."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

FIELDS_SHOWN_MAX = 30


class Fault(Exception):
    """What is wrong with a template or its use of a value. `at` is an offset in the text; None:
    where the evaluation stands. Never holds a value of the data.
    """

    def __init__(self, message: str, at: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.at = at


class UnknownField(Fault):
    """A field that the value can never have, whatever its content."""


class Record(dict[str, Any]):
    """A value whose fields are all there are: another name in a template is an error. A field that
    is callable is a method.
    """


class Struct(Record):
    """A record that prints as Go prints a struct."""


class Missing:
    """What an absent field is: false, empty, and printed as given."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __bool__(self) -> bool:
        return False


def no_value(mapping: Mapping[str, Any], name: str) -> Missing:
    """What Go makes of a key that a map does not have."""
    return Missing("<no value>")


def unknown_field(name: str, names: Iterable[str], *, among: Iterable[str] = ()) -> UnknownField:
    """The error for a field that does not exist; names the nearest one and `among`, or all."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, 1) or [
        other for other in known if other.lower() == name.lower()
    ]
    text = f"there is no field {name!r}"
    if near:
        text += f"; did you mean {near[0]!r}?"
    fields = sorted(among) or known
    if not fields:
        return UnknownField(text)
    listed = ", ".join(fields[:FIELDS_SHOWN_MAX])
    more = ", …" if len(fields) > FIELDS_SHOWN_MAX else ""
    return UnknownField(f"{text} (fields here: {listed}{more})")


def kind_of(value: Any) -> str:
    """What a value is, for error messages, which must not hold the value itself."""
    match value:
        case None:
            return "nil"
        case Missing():
            return "an absent value"
        case bool():
            return "a truth value"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case Mapping():
            return "an object"
        case Sequence():
            return "a list"
    return "a function" if callable(value) else "a value"


def truth(value: Any) -> bool:
    """Go's truth: false, 0, nil and what is empty are false."""
    return bool(value)


def pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    """Index and item of a list, key and value of a map in order of its keys, numbers below one."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield key, value[key]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from enumerate(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from ((number, number) for number in range(value))
    elif value is not None and not isinstance(value, Missing):
        raise Fault(f"range needs a list, an object or a whole number, not {kind_of(value)}")


def show(value: Any) -> str:
    """A value as Go's %v prints it, and nil as templates do."""
    return "<no value>" if value is None else text_of(value)


def text_of(value: Any) -> str:
    """A value as Go's %v prints it."""
    match value:
        case None:
            return "<nil>"
        case Missing():
            return value.text
        case bool():
            return "true" if value else "false"
        case str():
            return value
        case float():
            return shortest(value)
        case Struct():
            return "{" + " ".join(map(text_of, value.values())) + "}"
        case Mapping():
            return "map[" + " ".join(f"{k}:{text_of(value[k])}" for k in sorted(value)) + "]"
        case list() | tuple():
            return "[" + " ".join(map(text_of, value)) + "]"
    return str(value)


def shortest(value: float) -> str:
    """A float with as few digits as tell it from all others, as Go's %v and %g."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    digits, _, exponent = f"{value!r}".lstrip("-").partition("e")
    whole, _, fraction = digits.partition(".")
    # The number as 0.DIGITS times ten to the power of `point`.
    significant = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0)
    if significant:
        point -= len(whole + fraction) - len(significant)
    significant = significant.rstrip("0") or "0"
    sign = "-" if f"{value!r}".startswith("-") else ""
    if value == 0:
        return f"{sign}0"
    if not -4 <= point - 1 < 6:
        rest = f".{significant[1:]}" if len(significant) > 1 else ""
        return f"{sign}{significant[0]}{rest}e{point - 1:+03d}"
    if point <= 0:
        return f"{sign}0.{'0' * -point}{significant}"
    if point >= len(significant):
        return sign + significant + "0" * (point - len(significant))
    return f"{sign}{significant[:point]}.{significant[point:]}"
