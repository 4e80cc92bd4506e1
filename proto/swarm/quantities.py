"""Amounts as people write them: sizes, CPU counts, durations. Parsing follows Docker's (go-units,
Go's time.ParseDuration).

All raise ValueError with a message that names the accepted forms; the caller adds where the value
stood.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

NANO = 1_000_000_000
_SIZE = re.compile(
    r"(\d[\d_]*(?:\.\d*)?|\.\d+)(?:e\+?(\d{1,2}))?\s*([kmgtp]?)(i?b?)",
    re.IGNORECASE | re.ASCII,
)
_RATIO = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_UNITS_NS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "ms": 1_000_000,
    "s": NANO,
    "m": 60 * NANO,
    "h": 3600 * NANO,
    "d": 86400 * NANO,
}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h|d)")
_INT64_MAX = 2**63 - 1


def parse_bytes(text: str) -> int:
    """A size in bytes; "50M", "1.5GiB", "1024", "1e9". Units are powers of 1024, as in Docker."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a size; write a number with b, k, m, g or t, such as 512M"
        )
    number, exponent, unit, _ = match.groups()
    amount = Decimal(number.replace("_", "")) * 10 ** int(exponent or 0)
    value = int(amount * 1024 ** _POWERS[unit.lower()])
    if value > _INT64_MAX:
        raise ValueError(f"{text!r} is larger than 8 EiB")
    return value


def parse_cpus(text: str) -> int:
    """A number of CPUs in billionths; "0.5", "2", "3/4"."""
    ratio = _RATIO.fullmatch(text.strip())
    if ratio is not None and int(ratio[2]):
        exact = Fraction(int(ratio[1]), int(ratio[2])) * NANO
        if exact.denominator != 1:
            raise ValueError(f"{text!r} is finer than a billionth of a CPU")
        return int(exact)
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a number of CPUs; write one such as 0.5 or 2") from None
    if not value.is_finite() or value < 0 or value > 1_000_000:
        raise ValueError(f"{text!r} is not a number of CPUs from 0 to 1000000")
    nano = value * NANO
    if nano != int(nano):
        raise ValueError(f"{text!r} is finer than a billionth of a CPU")
    return int(nano)


def parse_duration(text: str) -> int:
    """A duration in nanoseconds; "1m30s", "500ms", "1.5h". "0" is allowed, any other bare number is
    not.
    """
    stripped = text.strip().removeprefix("+")
    if stripped == "0":
        return 0
    position, total = 0, Decimal(0)
    while position < len(stripped):
        match = _DURATION.match(stripped, position)
        if match is None:
            break
        total += Decimal(match[1]) * _UNITS_NS[match[2]]
        position = match.end()
    if not stripped or position != len(stripped):
        raise ValueError(
            f"{text!r} is not a duration; write a number with ns, us, ms, s, m or h, "
            "such as 10s or 1m30s"
        )
    if total > _INT64_MAX:
        raise ValueError(f"{text!r} is longer than 292 years")
    return int(total)


def format_bytes(value: int) -> str:
    """A size for people, with at most four significant digits: "512 MiB", "1.5 GiB"."""
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(amount) < 1024 or unit == "PiB":
            break
        amount /= 1024
    return f"{amount:.4g} {unit}"


def format_cpus(nano: int) -> str:
    """CPUs for people: "0.25", "2"."""
    return f"{Decimal(nano) / NANO:.9f}".rstrip("0").rstrip(".") or "0"


def format_duration(nanoseconds: int) -> str:
    """A duration as Go prints it: "1m30s", "500ms", "0s"."""
    if nanoseconds == 0:
        return "0s"
    sign, rest = ("-" if nanoseconds < 0 else ""), abs(nanoseconds)
    if rest < NANO:
        for unit, size in (("ms", 1_000_000), ("µs", 1_000), ("ns", 1)):
            if rest >= size:
                return f"{sign}{_trim(Decimal(rest) / size)}{unit}"
    hours, rest = divmod(rest, 3600 * NANO)
    minutes, rest = divmod(rest, 60 * NANO)
    seconds = f"{_trim(Decimal(rest) / NANO)}s"
    if hours:
        return f"{sign}{hours}h{minutes}m{seconds}"
    return f"{sign}{minutes}m{seconds}" if minutes else f"{sign}{seconds}"


def _trim(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
