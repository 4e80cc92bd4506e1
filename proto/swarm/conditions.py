"""Conditions on nodes and on what runs there, as written in constraints and affinities.

    KEY == VALUE      KEY != VALUE      KEY in (A, B)      KEY not in (A, B)
    KEY < NUMBER      <=   >   >=       KEY =~ PATTERN

What SwarmKit takes (manager/constraint/constraint.go: `==` and `!=`) is taken here and means the
same: keys, and the values compared, ignore case, the names of labels do not; a label that is absent
compares as the empty string; `node.ip` takes an address or a network. Departures, so that a mistake
shows where it is made and not as a task that waits for ever: a key that nothing can have is refused
(in SwarmKit it matches nothing), and an architecture may have either of its names.

| key | has | compared as |
|---|---|---|
| node.id, node.hostname, node.role, node.platform.os | one value | text |
| node.platform.arch | one value | text, under both names (amd64, x86_64) |
| node.ip | one value | address within a network |
| node.labels.X, engine.labels.X | one value | text; by < as numbers |
| node.runtime | any number | text |
| node.gpu.model | one a GPU | whole words of the name, more of them separated by a bar |
| node.gpu.memory | one a GPU | size, with units as in 40GiB |
| node.gpu.capability | one a GPU | version |
| node.gpu.count | one value | number |
| service.name, stack.name | one a service that has a task on the node | text |
| service.labels.X | the same | text; by < as numbers |

Where a key has several values a condition holds if it holds for any of them; `!=` and `not in` hold
if `==` and `in` do not, so for none of them. Numbers are decimal (`-1`, `2.5`): a label whose value
is no number is neither less nor greater than any. Patterns describe the whole value, ignoring case
(swarm/patterns.py); a node without the label has the empty value.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from swarm import errors
from swarm.gpus import model_matches, parse_models
from swarm.patterns import Pattern, PatternError
from swarm.quantities import parse_bytes

NODE_LABELS: Final = "node.labels."
ENGINE_LABELS: Final = "engine.labels."
SERVICE_LABELS: Final = "service.labels."
VALUES_MAX = 256  # of one `in`
_ORDERED_VALUE_CHARS_MAX = 64
_SHOWN_CHARS_MAX = 120

ORDERS: Final = ("<=", ">=", "<", ">")
OPERATORS_FOR_PEOPLE = "==, !=, in (A, B), not in (A, B), <, <=, >, >=, =~"
_OPERATOR = re.compile(
    r"==|!=|=~|<=|>=|<|>|(?<=\s)not\s+in(?=[\s(])|(?<=\s)in(?=[\s(])", re.IGNORECASE
)
_KEY = re.compile(r"[a-z_][a-z0-9\-_.]+", re.IGNORECASE | re.ASCII)
_VALUE = re.compile(r"[a-z0-9:\-_\s.*()?+\[\]\\^$|/]+", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,30}(?:\.\d{1,30})?", re.ASCII)
_COUNT = re.compile(r"\d{1,9}", re.ASCII)
_VERSION = re.compile(r"(\d{1,4})(?:\.(\d{1,4}))?", re.ASCII)

# Go's names on the right, the kernel's on the left; both are in use in images and in constraints.
_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "armhf": "arm",
    "i386": "386",
    "i686": "386",
}

Version = tuple[int, int]
Test = Callable[[Any], bool]


def normal_arch(name: str) -> str:
    """One spelling for each architecture: Go's."""
    lower = name.lower()
    return _ARCHITECTURES.get(lower, lower)


@dataclass(frozen=True, slots=True)
class Key:
    """What a condition looks at. `label` is empty unless `name` is a prefix of labels."""

    name: str
    label: str = ""

    @property
    def of_tasks(self) -> bool:
        """Whether it is about what should run on a node, and not about the node."""
        return self.name in _OF_TASKS

    def __str__(self) -> str:
        return self.name + self.label


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition. `text` is what the user wrote; `values` are as written, one unless the
    operator takes a list.
    """

    text: str
    key: Key
    operator: str
    values: tuple[str, ...]
    # Whether the condition without its negation holds for one value that the key has.
    test: Test = field(compare=False, repr=False)

    @property
    def negated(self) -> bool:
        """Whether it holds where no value is as written."""
        return self.operator in ("!=", "not in")

    def holds(self, found: Iterable[Any]) -> bool:
        """Whether it holds where the key has these values: text, or for GPUs' memory and count an
        int, for capability a Version.
        """
        test = self.test
        return any(test(value) for value in found) != self.negated


def parse_condition(text: str, subject: str = "constraint") -> Condition:
    """Raises Invalid, with the accepted forms. `subject` is what people call the text."""
    about = f"{subject} {_shown(text)}"
    match = _OPERATOR.search(text)
    if match is None:
        left, equal, right = (part.strip() for part in text.partition("="))
        hint = 'write it such as "node.role == manager" or "node.labels.zone in (a, b)"'
        if left and equal and right:
            hint = _cut(f"did you mean {left} == {right}?")
        raise errors.Invalid(f"{about}: expected one operator of {OPERATORS_FOR_PEOPLE}; {hint}")
    operator = " ".join(match[0].lower().split())
    value = text[match.end() :].strip()
    if operator in ("in", "not in"):
        values = _list(value, about)
    elif operator in ORDERS or operator == "=~":
        values = (value,)
    else:
        values = (_plain(value, about),)
    key = parse_key(text[: match.start()].strip(), about)
    try:
        test = _test(key, operator, values)
    except ValueError as error:
        raise errors.Invalid(f"{about}: {error}") from None
    return Condition(text=text, key=key, operator=operator, values=values, test=test)


def parse_key(text: str, about: str, *, of_tasks: bool = True) -> Key:
    """The key of this name; `of_tasks` false: only what a node itself has. Raises Invalid."""
    known = tuple(k for k in KEYS_FOR_PEOPLE if of_tasks or k not in _OF_TASKS_FOR_PEOPLE)
    lower = text.lower()
    found = Key(lower) if lower in _READERS and lower not in _PREFIXES else None
    for prefix in _PREFIXES:
        if lower.startswith(prefix) and len(text) > len(prefix) and _KEY.fullmatch(text):
            found = Key(prefix, text[len(prefix) :])
    if found is None or (found.of_tasks and not of_tasks):
        near = difflib.get_close_matches(lower[:64], known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise errors.Invalid(
            f"{about}: unknown key {_shown(text)}; {hint}accepted are {', '.join(known)}"
        )
    return found


def _shown(text: str) -> str:
    return _cut(repr(text))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS_MAX else f"{text[: _SHOWN_CHARS_MAX - 3]}..."


def _plain(value: str, about: str) -> str:
    if not _VALUE.fullmatch(value):
        raise errors.Invalid(
            f"{about}: value {_shown(value)} is empty or has characters other than letters, "
            "digits, spaces and : - _ . * ( ) ? + [ ] \\ ^ $ | /"
        )
    return value


def _list(text: str, about: str) -> tuple[str, ...]:
    if not (text.startswith("(") and text.endswith(")") and len(text) > 1):
        raise errors.Invalid(f"{about}: a list stands in parentheses, such as in (a, b)")
    words = text[1:-1].split(",")
    if len(words) > VALUES_MAX:
        raise errors.Invalid(
            f"{about}: {len(words)} values are more than the limit of {VALUES_MAX}; "
            "give the nodes a label for it"
        )
    return tuple(dict.fromkeys(_plain(word.strip(), about) for word in words))


# ---------------------------------------------------------------- values


def _test(key: Key, operator: str, values: tuple[str, ...]) -> Test:
    """What the operator and these values make of one value that the key has. Raises ValueError."""
    read = _READERS[key.name]
    if operator == "=~":
        return _pattern_test(key, values[0])
    if operator in ORDERS:
        return _order_test(key, operator, values[0])
    tests = [read(value) for value in values]
    if len(tests) == 1:
        return tests[0]
    if read is _text:
        wanted = frozenset(value.casefold() for value in values)
        return lambda found: found.casefold() in wanted
    return lambda found: any(test(found) for test in tests)


def _pattern_test(key: Key, text: str) -> Test:
    if key.name in _ORDERED and key.name not in _PREFIXES:
        raise ValueError(f"{key} is a number; compare it with ==, in, < or >")
    if not text:
        raise ValueError("the pattern is missing; write it such as node.hostname =~ web-.*")
    try:
        return Pattern(text).matches
    except PatternError as error:
        raise ValueError(f"{_shown(text)} is not a regular expression: {error}") from None


def _order_test(key: Key, operator: str, text: str) -> Test:
    read = _ORDERED.get(key.name)
    if read is None:
        ordered = ", ".join(f"{k}X" if k in _PREFIXES else k for k in _ORDERED)
        raise ValueError(f"{operator} compares numbers, which {key} is not; it takes {ordered}")
    if len(text) > _ORDERED_VALUE_CHARS_MAX:
        raise ValueError(f"{_shown(text)} is not a number")
    wanted = read(text)
    compare = _COMPARE[operator]
    if key.name not in _PREFIXES:
        return lambda found: compare(found, wanted)

    def test(found: str) -> bool:
        number = found.strip()
        return bool(_NUMBER.fullmatch(number)) and compare(Decimal(number), wanted)

    return test


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _text(value: str) -> Test:
    wanted = value.casefold()
    return lambda found: found.casefold() == wanted


def _arch(value: str) -> Test:
    wanted = normal_arch(value)
    return lambda found: found == wanted


def _role(value: str) -> Test:
    if value.casefold() not in ("manager", "worker"):
        raise ValueError(f"a role is manager or worker, not {_shown(value)}")
    return _text(value)


def _address(value: str) -> Test:
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError(
            f"{_shown(value)} is neither an address nor a network; "
            "write it such as 10.0.0.7 or 10.0.0.0/24"
        ) from None

    def test(found: str) -> bool:
        try:
            address = ipaddress.ip_address(found)
        except ValueError:
            return False
        return address.version == network.version and address in network

    return test


def _model(value: str) -> Test:
    try:
        models = parse_models(value)
    except errors.Invalid:
        raise ValueError(
            f"{_shown(value)} is no model; write whole words of its name, such as A100"
        ) from None
    return lambda found: any(model_matches(model, found) for model in models)


def _number(value: str) -> Decimal:
    if not _NUMBER.fullmatch(value):
        raise ValueError(f"{_shown(value)} is not a number; write it such as 3 or 2.5")
    return Decimal(value)


def _count(value: str) -> int:
    if not _COUNT.fullmatch(value):
        raise ValueError(f"{_shown(value)} is not a number of GPUs")
    return int(value)


def _version(value: str) -> Version:
    match = _VERSION.fullmatch(value)
    if match is None:
        raise ValueError(f"{_shown(value)} is not a compute capability; write it such as 8.0")
    return int(match[1]), int(match[2] or 0)


def version_of(text: str) -> Version | None:
    """A compute capability as it compares; None: it is none."""
    match = _VERSION.fullmatch(text)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _equal(read: Callable[[str], Any]) -> Callable[[str], Test]:
    def test(value: str) -> Test:
        if len(value) > _ORDERED_VALUE_CHARS_MAX:
            raise ValueError(f"{_shown(value)} is not a number")
        wanted = read(value)
        return lambda found: bool(found == wanted)

    return test


# Key -> from a value as written to the test for being equal to it.
_READERS: dict[str, Callable[[str], Test]] = {
    "node.id": _text,
    "node.hostname": _text,
    "node.ip": _address,
    "node.role": _role,
    "node.platform.os": _text,
    "node.platform.arch": _arch,
    "node.runtime": _text,
    "node.gpu.model": _model,
    "node.gpu.memory": _equal(parse_bytes),
    "node.gpu.count": _equal(_count),
    "node.gpu.capability": _equal(_version),
    NODE_LABELS: _text,
    ENGINE_LABELS: _text,
    "service.name": _text,
    "stack.name": _text,
    SERVICE_LABELS: _text,
}
_PREFIXES = (NODE_LABELS, ENGINE_LABELS, SERVICE_LABELS)
# Keys with an order.
_ORDERED: dict[str, Callable[[str], Any]] = {
    "node.gpu.memory": parse_bytes,
    "node.gpu.count": _count,
    "node.gpu.capability": _version,
    NODE_LABELS: _number,
    ENGINE_LABELS: _number,
    SERVICE_LABELS: _number,
}
_OF_TASKS = frozenset({"service.name", "stack.name", SERVICE_LABELS})
KEYS_FOR_PEOPLE = tuple(f"{key}NAME" if key in _PREFIXES else key for key in _READERS)
_OF_TASKS_FOR_PEOPLE = frozenset({"service.name", "stack.name", f"{SERVICE_LABELS}NAME"})
