"""A cursor over the tree: reads values with Docker's leniency and reports what does not fit.

Every reader returns a usable value even after it has reported a problem, so that the rest of the
file is checked in the same run. Where Docker wants a string and finds a number, the number's text
is taken; where it wants a number, text that is one is taken (interpolation makes text).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal

from cli.compose.keys import Key, Support, place_of
from cli.compose.problems import Mark, Report, listed, nearest
from cli.compose.scalars import go_time, resolve
from cli.compose.tree import SILENT_TAGS, Node, Value
from swarm.quantities import parse_bytes, parse_cpus, parse_duration

MEMORY_MIN = 4 * 1024 * 1024  # Docker's least memory limit
CPU_NANO_MIN = 1_000_000  # 0.001 CPU
_TRUE = frozenset(("true", "yes", "on", "y"))
_FALSE = frozenset(("false", "no", "off", "n"))
_INTEGER = re.compile(r"[-+]?[0-9]{1,20}")


class At:
    """A node and the path to it, such as services.web.deploy."""

    __slots__ = ("node", "path", "report")

    def __init__(self, node: Node, path: str, report: Report) -> None:
        self.node = node
        self.path = path
        self.report = report

    # ------------------------------------------------------------------ reporting

    @property
    def mark(self) -> Mark:
        return self.node.mark

    def fail(self, message: str, hint: str = "") -> None:
        if self.node.tag in SILENT_TAGS:
            return
        if self.node.origin is not None:
            anchor, found = self.node.origin
            message = f"{message} (the value of &{anchor} in line {found.line})"
        self.report.error(self.mark, message, hint, path=self.path)

    def fail_key(self, key: str, message: str, hint: str = "") -> None:
        """Like `fail`, at a key of this mapping."""
        self.report.error(self.node.key_mark(key), message, hint, path=self.path)

    def refuse(self, message: str, hint: str = "") -> None:
        """Like `fail`, for what only a deploy refuses."""
        if self.node.tag not in SILENT_TAGS:
            self.report.refuse(self.mark, message, hint, path=self.path)

    def refuse_key(self, key: str, message: str, hint: str = "") -> None:
        """Like `refuse`, at a key of this mapping."""
        self.report.refuse(self.node.key_mark(key), message, hint, path=self.path)

    def lacks(self, key: str, hint: str) -> None:
        """Reports a key that is needed, unless it may be there but for another problem."""
        if not self.report.is_half_known(self.mark):
            self.fail(f"{key} is missing", hint)

    def warn(self, message: str) -> None:
        self.report.warn(self.mark, f"{self.path}: {message}" if self.path else message)

    def shown(self) -> str:
        """The value, as it may stand in a message."""
        value = self.node.value
        if value is None:
            return "nothing"
        if isinstance(value, dict):
            return "a mapping"
        if isinstance(value, list):
            return "a list"
        text = self.node.text if not isinstance(value, str) else value
        text = text if len(text) <= 60 else text[:57] + "..."
        return '"' + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + '"'

    # ------------------------------------------------------------------ collections

    def at(self, key: str) -> At | None:
        """The value of a key; None where it is absent."""
        value = self.node.value
        if isinstance(value, dict) and (node := value.get(key)) is not None:
            return At(node, f"{self.path}.{key}" if self.path else key, self.report)
        return None

    def set_at(self, key: str) -> At | None:
        """The value of a key; None where it is absent or null."""
        found = self.at(key)
        return found if found is not None and found.node.value is not None else None

    def items(self) -> Iterator[tuple[str, At]]:
        """A mapping's entries, in the order of the file."""
        value = self.node.value
        if isinstance(value, dict):
            for key, node in value.items():
                yield key, At(node, f"{self.path}.{key}" if self.path else key, self.report)

    def elements(self) -> Iterator[At]:
        """A list's entries."""
        value = self.node.value
        if isinstance(value, list):
            for index, node in enumerate(value):
                yield At(node, f"{self.path}.{index}", self.report)

    def is_map(self, example: str = "") -> bool:
        """Whether it is a mapping; reports if not."""
        if isinstance(self.node.value, dict):
            return True
        hint = f"write it as {example}" if example else "write `key: value` lines below it"
        self.fail(f"must be a mapping, not {self.shown()}", hint)
        return False

    def is_list(self, example: str = "") -> bool:
        """Whether it is a list; reports if not."""
        if isinstance(self.node.value, list):
            return True
        hint = f"write it as {example}" if example else "write one `- value` line for each below it"
        self.fail(f"must be a list, not {self.shown()}", hint)
        return False

    def check_keys(
        self, known: Mapping[str, Key], *, context: str = "", refused: bool = True
    ) -> bool:
        """Reports unknown and refused keys of a mapping; False if it is no mapping. Keys that begin
        with x- are the user's own. Without `refused` it leaves those to `refuse_keys`.
        """
        if not self.is_map():
            return False
        assert isinstance(self.node.value, dict)
        for name in self.node.value:
            key = known.get(name)
            if key is None:
                if not name.startswith("x-"):
                    self._unknown(name, known, context)
            elif refused and key.support is Support.REFUSED:
                self.refuse_key(name, f'"{name}" is not supported: {key.reason}', key.instead)
        return True

    def refuse_keys(self, known: Mapping[str, Key]) -> None:
        """Reports the refused keys of a mapping; of one that is merged, what is left of them."""
        value = self.node.value
        for name, node in value.items() if isinstance(value, dict) else ():
            key = known.get(name)
            if key is not None and key.support is Support.REFUSED and node.value is not None:
                self.refuse_key(name, f'"{name}" is not supported: {key.reason}', key.instead)

    def _unknown(self, name: str, known: Mapping[str, Key], context: str) -> None:
        usable = [key for key, what in known.items() if what.support is not Support.REFUSED]
        near = nearest(name, usable)
        elsewhere = place_of(name, context)
        if elsewhere and (not near or name.lower() != near):
            hint = f'"{name}" belongs under {elsewhere}'
        elif near:
            hint = f'did you mean "{near}"?'
        elif len(usable) <= 16:
            hint = f"known here: {', '.join(sorted(usable))}"
        else:
            hint = "to keep data of your own here, begin the key with x-"
        self.report.half_known(self.mark)
        self.fail_key(name, f'unknown key "{name}"', hint)

    # ------------------------------------------------------------------ scalars

    def text(self, *, empty: bool = True) -> str:
        """A string; a number is taken as it is written."""
        value = self.node.value
        if isinstance(value, str):
            if not value and not empty:
                self.fail("must not be empty")
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self.node.text
        hint = f'write "{self.node.text}" in quotes' if isinstance(value, bool) else ""
        self.fail(f"must be a string, not {self.shown()}", hint)
        return ""

    def value_text(self) -> str:
        """A value of a map of strings (environment, labels, options), as Docker turns it into one:
        numbers and times lose their spelling, about which a warning tells.
        """
        value = self.node.value
        if value is None:
            return ""
        if isinstance(value, str):
            stamp = go_time(value) if self.node.plain else None
            if stamp is None:
                return value
            self.warn(f'{value} is read as the time {stamp}; write "{value}" in quotes to keep it')
            return stamp
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int | float):
            text = str(value) if isinstance(value, int) else go_float(value)
            if text != self.node.text:
                self.warn(
                    f"{self.node.text} is read as the number {text}; "
                    f'write "{self.node.text}" in quotes to keep it as it is'
                )
            return text
        self.fail(f"must be a string or a number, not {self.shown()}")
        return ""

    def truth(self) -> bool:
        """A boolean; yes, no, on and off count."""
        value = self.node.value
        if isinstance(value, bool):
            return value
        if isinstance(value, str):
            if value.lower() in _TRUE:
                return True
            if value.lower() in _FALSE:
                return False
        self.fail(f"must be true or false, not {self.shown()}")
        return False

    def integer(self, *, least: int | None = None, most: int | None = None, what: str = "") -> int:
        """A whole number within bounds."""
        value = self.node.value
        number: int | None = None
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        elif (isinstance(value, float) and value.is_integer()) or (
            isinstance(value, str) and _INTEGER.fullmatch(value.strip())
        ):
            number = int(value)
        low = -(2**63) if least is None else least
        high = 2**63 - 1 if most is None else most
        if number is not None and low <= number <= high:
            return number
        bounds = ""
        if least is not None and most is not None:
            bounds = f" from {least} to {most}"
        elif least is not None:
            bounds = f", {least} or more"
        example = least if least is not None and least > 1 else max(low, 1)
        self.fail(
            f"must be a whole number{bounds}, not {self.shown()}", what or f"for example {example}"
        )
        return max(low, 0)

    def number(self, *, least: float = 0.0, most: float = math.inf) -> float:
        """A number within bounds."""
        value = self.node.value
        if isinstance(value, str):
            value = resolve(value.strip()) if value.strip() else value
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and least <= value <= most
        ):
            return float(value)
        bounds = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
        self.fail(f"must be a number {bounds}, not {self.shown()}")
        return least

    def mode_bits(self) -> int:
        """Permission bits; an unquoted 0440 is octal as Docker reads it, and so is "0440"."""
        value = self.node.value
        number: int | None = None
        if isinstance(value, float) and value.is_integer():
            number = int(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            number = value
            if self.node.plain and re.fullmatch(r"[1-7][0-7]{2}", self.node.text):
                self.warn(
                    f"{self.node.text} is read as a decimal number, which is 0{value:o}; "
                    f"write 0{self.node.text} for the permission bits"
                )
        elif isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{1,5}", value):
            number = int(value.replace("o", ""), 8)
        if number is not None and 0 <= number <= 0o7777:
            return number
        self.fail(f"must be permission bits, not {self.shown()}", "for example 0440")
        return 0

    def duration(self, *, least_ns: int = 0) -> int:
        """A duration in nanoseconds."""
        value = self.node.value
        if isinstance(value, int | float) and not isinstance(value, bool) and value != 0:
            self.fail(
                f"{self.node.text} has no unit",
                f"write {self.node.text}s for seconds; ns, us, ms, m and h are known too",
            )
            return least_ns
        return self._quantity(parse_duration, least_ns, "the least is 1ms" if least_ns else "")

    def size(self, *, least: int = 0, most: int = 2**63 - 1) -> int:
        """A size in bytes; a bare number is bytes."""
        hint = f"the least is {least // 1024 // 1024}M" if least else ""
        return self._quantity(parse_bytes, least, hint, most)

    def memory(self) -> int:
        """A memory limit or reservation in bytes, at least Docker's least; 0 is none."""
        value = self.size()
        if 0 < value < MEMORY_MIN:
            self.fail(f"{self.shown()} is less than 4 MiB, the least", "for example 64M")
        return value

    def cpus(self) -> int:
        """A number of CPUs in billionths, at least 0.001; 0 is none."""
        value = self._quantity(parse_cpus, 0, "")
        if 0 < value < CPU_NANO_MIN:
            self.fail(f"{self.shown()} is less than 0.001, the least", 'for example "0.25"')
        return value

    def _quantity(
        self, parse: Callable[[str], int], least: int, hint: str, most: int = 2**63 - 1
    ) -> int:
        value = self.node.value
        if value is None or isinstance(value, bool | list | dict):
            self.fail(f"must be a string or a number, not {self.shown()}")
            return least
        text = value if isinstance(value, str) else self.node.text
        if isinstance(value, float) and math.isfinite(value):
            text = f"{Decimal(repr(value)):f}"
        elif isinstance(value, int):
            text = str(value)
        try:
            number = parse(text)
        except ValueError as error:
            self.fail(str(error))
            return least
        if not least <= number <= most:
            self.fail(f"{self.shown()} is out of range", hint)
            return least
        return number

    def choice(self, accepted: Iterable[str], *, fold: bool = False) -> str:
        """One of the accepted words; empty after a problem."""
        words = tuple(accepted)
        value = self.node.value
        text = self.node.text if isinstance(value, bool) else value
        if isinstance(text, str):
            word = text.lower() if fold else text
            if word in words:
                return word
        shown = listed(word for word in words if word)
        near = nearest(text, words) if isinstance(text, str) else ""
        self.fail(f"must be {shown}, not {self.shown()}", f'did you mean "{near}"?' if near else "")
        return ""

    # ------------------------------------------------------------------ lists and maps of scalars

    def texts(self) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(each.text() for each in self.elements()) if self.is_list() else ()

    def mapping(self) -> dict[str, str]:
        """A map of strings, as `value_text` makes them."""
        return {key: each.value_text() for key, each in self.items()} if self.is_map() else {}


def made(like: Node, entries: dict[str, Value | Node]) -> Node:
    """A mapping at the place of `like`."""
    values = {k: v if isinstance(v, Node) else like.made(v) for k, v in entries.items()}
    return like.made(values)


def with_value(at: At, key: str, value: Node) -> Node:
    """The mapping with another value of one key, and its keys where they stood."""
    assert isinstance(at.node.value, dict)
    node = made(at.node, {**at.node.value, key: value})
    node.keys = at.node.keys
    return node


def go_float(value: float) -> str:
    """A float as Go's %g prints it."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    text = "".join(map(str, digits))
    power = len(text) + exponent - 1
    if value == 0:
        return "-0" if sign else "0"
    if power < -4 or power >= 6:
        mantissa = text[0] + ("." + text[1:] if len(text) > 1 else "")
        body = f"{mantissa}e{'-' if power < 0 else '+'}{abs(power):02d}"
    else:
        body = f"{Decimal(repr(abs(value))).normalize():f}"
    return ("-" if sign else "") + body
