"""Plain scalars, typed as gopkg.in/yaml.v3 types them, which the docker CLI uses: `yes` and `12:30`
are strings, `0777` is octal, `1_000` is a number.
"""

from __future__ import annotations

import re
from datetime import date

_FIXED: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INT = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|(0|[1-9][0-9]*))")
_MAYBE_NUMBER = frozenset("+-.0123456789")
_TIME = re.compile(
    r"(?P<year>\d{4})-(?P<month>\d\d?)-(?P<day>\d\d?)"
    r"(?:(?P<sep>[Tt ])(?P<hour>\d\d?):(?P<minute>\d\d?):(?P<second>\d\d?)(?P<part>\.\d+)?"
    r"(?P<zone>Z|[-+]\d\d:\d\d)?)?"
)


def resolve(text: str) -> bool | int | float | str | None:
    """The value of a plain scalar, as gopkg.in/yaml.v3 decodes it into an `any`."""
    if text in _FIXED:
        return _FIXED[text]
    if text[0] not in _MAYBE_NUMBER:
        return text
    digits = text.replace("_", "")
    match = _INT.fullmatch(digits)
    if match is not None:
        sign, hexadecimal, binary, octal, decimal = match.groups()
        for written, base in ((hexadecimal, 16), (binary, 2), (octal, 8), (decimal, 10)):
            if written is not None:
                if len(written) > 64:  # no 64-bit number is that long
                    break
                value = int(written, base)
                if value < 2**64 and not (sign == "-" and value > 2**63):
                    return -value if sign == "-" else value
    if _FLOAT.fullmatch(digits):
        number = float(digits)
        if number not in (float("inf"), float("-inf")):
            return number
    return text


def go_time(text: str) -> str | None:
    """A plain scalar that yaml.v3 takes for a time, as Go prints that; None for any other."""
    match = _TIME.fullmatch(text) if text[:4].isdigit() else None
    if match is None:
        return None
    got = match.groupdict()
    # With T a zone must follow, with a space it must not.
    if got["sep"] is not None and (got["sep"] == " ") != (got["zone"] is None):
        return None
    hour, minute, second = (int(got[key] or 0) for key in ("hour", "minute", "second"))
    try:
        day = date(int(got["year"]), int(got["month"]), int(got["day"]))
    except ValueError:
        return None
    if hour > 23 or minute > 59 or second > 59:
        return None
    part = (got["part"] or "")[:10].rstrip("0").rstrip(".")
    zone = (got["zone"] or "Z").replace(":", "")
    shown = "+0000 UTC" if zone[1:] in ("", "0000") else f"{zone} {zone}"
    return f"{day.isoformat()} {hour:02}:{minute:02}:{second:02}{part} {shown}"
