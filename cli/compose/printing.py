"""How values are printed: what a Table is, and the ways that its fields name.

`docker stack config` decodes a file into Go structs and prints these: fields in their order, maps
sorted, what is zero left out unless the field is a pointer. A Table is such a struct: its fields
name how a value is written and whether its zero is. The tables themselves are in shapes.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cli.compose.at import At, go_float
from cli.compose.scalars import go_time
from cli.compose.tree import LITERAL_TAG, Node
from swarm.quantities import format_duration


@dataclass(frozen=True, slots=True)
class Style:
    """What the form is for. `exact`: to be deployed again, so nothing is left out."""

    exact: bool


Write = Callable[[At, Style], object]


@dataclass(frozen=True, slots=True)
class Field:
    """How one key is written. `zero`: its zero is printed too. `beyond`: not in Docker's form."""

    write: Write
    zero: bool = False
    beyond: bool = False


Table = Mapping[str, Field]


def record(at: At, table: Table, style: Style, *, own: bool = True) -> dict[str, object]:
    """A mapping in the table's order, then the user's own keys (x-) if `own`."""
    found: dict[str, object] = {}
    for key, field in table.items():
        value_at = at.set_at(key)
        if value_at is None:
            continue
        value = written(value_at, field.write, style)
        if value is None:
            continue
        if not value and not field.zero and not style.exact:
            continue
        if field.beyond and not style.exact:
            value_at.warn(
                "a deploy honours this, but the form that Docker prints has no place for it; "
                "the exact form has"
            )
            continue
        found[key] = value
    return {**found, **own_keys(at)} if own else found


def own_keys(at: At) -> dict[str, object]:
    """The keys that begin with x-, sorted."""
    return {key: plain(each.node) for key, each in sorted(at.items()) if key.startswith("x-")}


def written(at: At, write: Write, style: Style) -> object:
    """A value; what holds variables that were not filled in stays as it is."""
    if at.node.tag == LITERAL_TAG and isinstance(at.node.value, str):
        return at.node.value
    return write(at, style)


# ------------------------------------------------------------------ values


def plain(node: Node) -> object:
    """A value whose type nobody knows: as Go reads and prints it."""
    value = node.value
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str) and node.plain and (stamp := go_time(value)) is not None:
        day, time, zone, _ = stamp.split()
        return datetime.fromisoformat(f"{day}T{time}{zone[:3]}:{zone[3:]}")
    return value


def _number(value: float) -> int | float:
    """1.0 is printed as 1, and so read as a whole number."""
    text = go_float(value)
    return int(text) if text.lstrip("-").isdigit() else value


def anything(at: At, style: Style) -> object:
    del style
    return plain(at.node)


def text(at: At, style: Style) -> object:
    del style
    return at.text()


def truth(at: At, style: Style) -> object:
    del style
    return at.truth()


def integer(at: At, style: Style) -> object:
    del style
    return at.integer()


def integer_or_text(at: At, style: Style) -> object:
    """A published port, which may be a range; a number of devices, which may be all."""
    value = at.node.value
    if isinstance(value, str) and not value.strip().lstrip("-").isdigit():
        return value
    if value == -1:
        return "all"
    return integer(at, style)


def single(at: At, style: Style) -> object:
    """A number of 32 bits, whose digits are the fewest that tell it from others."""
    value = at.number()
    if style.exact:
        return _number(value)
    near = struct.unpack("f", struct.pack("f", value))[0]
    for digits in range(1, 10):
        shorter = float(f"{near:.{digits}g}")
        if struct.unpack("f", struct.pack("f", shorter))[0] == near:
            return _number(shorter)
    return _number(near)


def duration(at: At, style: Style) -> object:
    del style
    return format_duration(at.duration())


def duration_or_none(at: At, style: Style) -> object:
    """A duration whose zero says as little as its absence."""
    value = at.duration()
    return format_duration(value) if value or style.exact else ""


def size(at: At, style: Style) -> object:
    """Bytes, as text; 0 says as little as its absence."""
    value = at.size()
    return str(value) if value or style.exact else ""


def size_or_unlimited(at: At, style: Style) -> object:
    return "-1" if str(at.node.value) == "-1" else size(at, style)


def size_number(at: At, style: Style) -> object:
    del style
    return at.size()


def mode_bits(at: At, style: Style) -> object:
    del style
    return at.mode_bits()


def strings(at: At, style: Style) -> object:
    if not isinstance(at.node.value, list):
        return [at.text()]
    return [written(each, text, style) for each in at.elements()]


def mapping(at: At, style: Style) -> object:
    """Strings by name; a name alone has the empty one."""
    del style
    if not at.is_map():
        return {}
    return {key: _value(each) for key, each in sorted(at.items())}


def variables(at: At, style: Style) -> object:
    """Strings by name; a name alone has none."""
    del style
    if not at.is_map():
        return {}
    return {
        key: None if each.node.value is None else _value(each) for key, each in sorted(at.items())
    }


def _value(at: At) -> str:
    return str(at.node.value) if at.node.tag == LITERAL_TAG else at.value_text()


def records(table: Table) -> Write:
    def write(at: At, style: Style) -> object:
        if not at.is_list():
            return []
        return [record_or_text(each, table, style) for each in at.elements()]

    return write


def record_or_text(at: At, table: Table, style: Style) -> object:
    """Short forms that hold variables could not be written out."""
    if at.node.tag == LITERAL_TAG:
        return at.node.value
    return record(at, table, style) if at.is_map() else {}


def one(table: Table) -> Write:
    def write(at: At, style: Style) -> object:
        return record(at, table, style) if at.is_map() else {}

    return write


def mount_options(table: Table) -> Write:
    """Options of a mount. Those that a short form was given (its node has no keys of a file) are
    nothing where Docker knows none of them.
    """

    def write(at: At, style: Style) -> object:
        found = record(at, table, style) if at.is_map() else {}
        return found if found or at.node.keys is not None else None

    return write


def named(table: Table) -> Write:
    def write(at: At, style: Style) -> object:
        if not at.is_map():
            return {}
        return {
            key: None if each.node.value is None else record(each, table, style)
            for key, each in sorted(at.items())
        }

    return write
