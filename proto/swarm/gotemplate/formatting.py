"""printf as Go's fmt has it: verbs, flags, width, precision, argument indexes, and its notes of
what does not fit, such as `%!d(string=x)`. Source: the documentation of Go's fmt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from swarm.gotemplate.values import Fault, Missing, Struct, shortest, text_of

# Go's own limit is a million; here nobody pads that far in earnest.
WIDTH_MAX = 100_000
OUTPUT_CHARS_MAX = 8 << 20

_VERB = re.compile(
    r"%(?P<flags>[-+# 0]*)"
    r"(?P<windex>\[[^\]%]*\])?(?P<width>\*|\d+)?"
    r"(?:(?P<point>\.)(?P<pindex>\[[^\]%]*\])?(?P<precision>\*|\d+)?)?"
    r"(?P<index>\[[^\]%]*\])?(?P<verb>.)?",
    re.DOTALL,
)


def sprintf(form: str, *values: Any) -> str:
    """The text. Raises Fault where it would be too long."""
    return _Formatter(form, values).text()


class _Formatter:
    def __init__(self, form: str, values: Sequence[Any]) -> None:
        self._form = form
        self._values = values
        self._next = 0
        # With explicit indexes nobody can say which values are left over.
        self._reordered = False

    def text(self) -> str:
        out: list[str] = []
        size = position = 0
        while (start := self._form.find("%", position)) >= 0:
            out.append(self._form[position:start])
            match = _VERB.match(self._form, start)
            assert match is not None
            piece = self._one(match)
            out.append(piece)
            size += len(piece)
            if size > OUTPUT_CHARS_MAX:
                raise Fault(f"printf: the text would be longer than {OUTPUT_CHARS_MAX} characters")
            position = match.end()
        out.append(self._form[position:])
        rest = self._values[self._next :]
        if rest and not self._reordered:
            out.append(f"%!(EXTRA {', '.join(_noted(value) for value in rest)})")
        return "".join(out)

    def _one(self, match: re.Match[str]) -> str:
        verb = match["verb"]
        if verb is None:
            return "%!(NOVERB)"
        notes = ""
        width = precision = None
        flags = match["flags"]
        good = self._seek(match["windex"])
        if match["width"] == "*":
            width = self._star()
            if width is None:
                notes += "%!(BADWIDTH)"
            elif width < 0:
                flags, width = flags + "-", -width
        elif match["width"]:
            width = int(match["width"]) if len(match["width"]) < 8 else WIDTH_MAX + 1
            if match["windex"]:
                good = False
        if match["point"]:
            good = self._seek(match["pindex"]) and good
            if match["precision"] == "*":
                precision = self._star()
                if precision is None:
                    notes += "%!(BADPREC)"
                elif precision < 0:
                    precision = None
            else:
                text = match["precision"] or "0"
                precision = int(text) if len(text) < 8 else WIDTH_MAX + 1
                if match["pindex"]:
                    good = False
        good = self._seek(match["index"]) and good
        if max(width or 0, precision or 0) > WIDTH_MAX:
            raise Fault(f"printf: a width or precision is at most {WIDTH_MAX}")
        if verb == "%":
            return notes + "%"
        if not good:
            return f"{notes}%!{verb}(BADINDEX)"
        if self._next >= len(self._values):
            return f"{notes}%!{verb}(MISSING)"
        value = self._values[self._next]
        self._next += 1
        return notes + _format(value, verb, flags, width or 0, precision)

    def _seek(self, index: str | None) -> bool:
        """Takes an argument index such as [2]; whether it is good."""
        if index is None:
            return True
        self._reordered = True
        digits = index[1:-1]
        if not digits.isascii() or not digits.isdigit() or len(digits) > 7:
            return False
        if not 1 <= int(digits) <= len(self._values):
            return False
        self._next = int(digits) - 1
        return True

    def _star(self) -> int | None:
        if self._next >= len(self._values):
            return None
        value = self._values[self._next]
        self._next += 1
        fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= WIDTH_MAX
        return value if fits else None


def _format(value: Any, verb: str, flags: str, width: int, precision: int | None) -> str:
    """One value. Lists and maps take the verb for each of their items."""
    if isinstance(value, Missing):
        value = value.text
    if verb == "v" and not isinstance(value, (Mapping, list, tuple)):
        flags = flags.replace("+", "")  # there it says how structs print
        if "#" in flags and isinstance(value, str):
            return _pad(_quote(value, ascii_only=False), flags, width)
        flags = flags.replace("#", "")
    if verb == "T":
        return _pad(_type(value), flags, width)
    match value:
        case None:
            return _pad("<nil>", flags, width) if verb == "v" else f"%!{verb}(<nil>)"
        case bool():
            text = ("true" if value else "false") if verb in "tv" else None
        case int():
            text = _integer(value, verb, flags, width, precision)
        case float():
            text = _float(value, verb, flags, width, precision)
        case str():
            text = _string(value, verb, flags, precision)
        case Mapping() | list() | tuple():
            return _compound(value, verb, flags, width, precision)
        case _:
            text = str(value) if verb in "sv" else None
    if text is None:
        said = _format(value, "v", flags, width, precision)
        return f"%!{verb}({_type(value)}={said})"
    return _pad(text, flags, width)


def _compound(value: Any, verb: str, flags: str, width: int, precision: int | None) -> str:
    def item(part: Any) -> str:
        return _format(part, verb, flags, width, precision)

    sharp = verb == "v" and "#" in flags
    if isinstance(value, Mapping):
        keys = list(value) if isinstance(value, Struct) else sorted(value)
        if sharp:
            inner = ", ".join(f"{item(k)}:{item(value[k])}" for k in keys)
            return f"{_type(value)}{{{inner}}}"
        if isinstance(value, Struct):
            named = "+" in flags and verb == "v"
            return (
                "{"
                + " ".join(f"{k}:{item(value[k])}" if named else item(value[k]) for k in keys)
                + "}"
            )
        return "map[" + " ".join(f"{item(k)}:{item(value[k])}" for k in keys) + "]"
    if sharp:
        return f"{_type(value)}{{{', '.join(map(item, value))}}}"
    return "[" + " ".join(map(item, value)) + "]"


def _pad(text: str, flags: str, width: int) -> str:
    missing = width - len(text)
    if missing <= 0:
        return text
    if "-" in flags:
        return text + " " * missing
    return ("0" if "0" in flags else " ") * missing + text


def _string(value: str, verb: str, flags: str, precision: int | None) -> str | None:
    if verb in "sv":
        return value if precision is None else value[:precision]
    if verb == "q":
        value = value if precision is None else value[:precision]
        if "#" in flags and "`" not in value and all(c == "\t" or _printable(c) for c in value):
            return f"`{value}`"
        return _quote(value, ascii_only="+" in flags)
    if verb in "xX":
        data = value.encode(errors="surrogateescape")
        data = data if precision is None else data[:precision]
        lead = "0x" if "#" in flags else ""
        if " " in flags:
            text = " ".join(f"{lead}{byte:02x}" for byte in data)
        else:
            text = lead + data.hex() if data else ""
        return text.upper() if verb == "X" else text
    return None


_BASES = {"d": "d", "v": "d", "b": "b", "o": "o", "O": "o", "x": "x", "X": "X"}
_PREFIXES = {"b": "0b", "o": "0", "O": "0o", "x": "0x", "X": "0X"}


def _integer(value: int, verb: str, flags: str, width: int, precision: int | None) -> str | None:
    if verb in "cqU":
        return _character(value, verb, flags)
    if verb not in _BASES:
        return None
    digits = format(abs(value), _BASES[verb])
    sign = "-" if value < 0 else "+" if "+" in flags else " " if " " in flags else ""
    prefix = _PREFIXES.get(verb, "") if "#" in flags or verb == "O" else ""
    if precision is not None:
        digits = "" if precision == 0 and value == 0 else digits.rjust(precision, "0")
    elif "0" in flags and "-" not in flags:
        digits = digits.rjust(width - len(sign), "0")
    return sign + prefix + digits


def _character(value: int, verb: str, flags: str) -> str:
    known = 0 <= value <= 0x10FFFF and not 0xD800 <= value < 0xE000
    letter = chr(value) if known else "\ufffd"
    if verb == "c":
        return letter
    if verb == "q":
        body = _quote(letter, ascii_only="+" in flags)[1:-1].replace('\\"', '"')
        return "'" + body.replace("'", "\\'") + "'"
    text = f"U+{value:04X}"
    return f"{text} '{letter}'" if "#" in flags and _printable(letter) else text


def _float(value: float, verb: str, flags: str, width: int, precision: int | None) -> str | None:
    if verb == "v" or (verb in "gG" and precision is None):
        text = shortest(value) if precision is None else f"{value:.{max(precision, 1)}g}"
    elif verb in "eEfFgG":
        text = f"{value:.{6 if precision is None else precision}{verb.lower()}}"
    else:
        return None
    if verb in "EG":
        text = text.upper()
    if value != value or value in (float("inf"), float("-inf")):
        text = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(text.lower(), text)
        flags = flags.replace("0", "")
        return text if "+" in flags or text == "-Inf" else text.lstrip("+")
    sign = "-" if text.startswith("-") else "+" if "+" in flags else " " if " " in flags else ""
    digits = text.lstrip("-")
    if "0" in flags and "-" not in flags:
        digits = digits.rjust(width - len(sign), "0")
    return sign + digits


def _noted(value: Any) -> str:
    """A value where it does not fit: type and text."""
    return "<nil>" if value is None else f"{_type(value)}={text_of(value)}"


def _type(value: Any) -> str:
    """The Go type that a value would have."""
    match value:
        case None:
            return "<nil>"
        case bool():
            return "bool"
        case int():
            return "int"
        case float():
            return "float64"
        case str() | Missing():
            return "string"
        case Struct():
            return "struct"
        case Mapping():
            kinds = {_type(item) for item in value.values()}
            return f"map[string]{kinds.pop() if kinds == {'string'} else 'interface {}'}"
        case list() | tuple():
            kinds = {_type(item) for item in value}
            return f"[]{kinds.pop() if kinds == {'string'} else 'interface {}'}"
    return "func()" if callable(value) else type(value).__name__


_ESCAPED = {
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
    "\\": "\\\\",
    '"': '\\"',
}


def _printable(letter: str) -> bool:
    return letter == " " or (letter.isprintable() and not letter.isspace())


# All but the printable ASCII that is written as it is.
_NOT_PLAIN = re.compile(r"[^ !#-\[\]-~]")


def _quote(text: str, *, ascii_only: bool) -> str:
    """A string literal of Go."""

    def one(match: re.Match[str]) -> str:
        letter = match[0]
        code = ord(letter)
        if letter in _ESCAPED:
            return _ESCAPED[letter]
        if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
            return f"\\x{code - 0xDC00:02x}"
        if _printable(letter) and not ascii_only:
            return letter
        if code < 0x20 or code == 0x7F:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return '"' + _NOT_PLAIN.sub(one, text) + '"'
