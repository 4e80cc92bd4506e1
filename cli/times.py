"""Times as the CLI shows and reads them: RFC 3339 with nanoseconds as Go prints it, and ages as
Docker's go-units words them.
"""

from __future__ import annotations

import datetime
import re

from swarm.clock import SECOND_NS
from swarm.errors import Invalid
from swarm.quantities import parse_duration

__all__ = ["age", "ago", "human_duration", "parse_time", "rfc3339"]

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d)?)(\.\d{1,9})?)?(Z|[+-]\d\d:\d\d)?", re.IGNORECASE
)
_UNIX = re.compile(r"(\d{1,11})(?:\.(\d{1,9}))?")


def rfc3339(time_ns: int, *, digits: int | None = None) -> str:
    """UTC; "2026-11-21T09:44:52.946163064Z". Zeros at the end of the fraction are left out, unless
    a number of digits is asked for.
    """
    seconds, nanos = divmod(time_ns, SECOND_NS)
    text = (_EPOCH + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f"{nanos:09d}"
    fraction = fraction.rstrip("0") if digits is None else fraction[:digits]
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


def human_duration(nanoseconds: int) -> str:
    """go-units' HumanDuration: "Less than a second", "About a minute", "3 weeks"."""
    seconds = max(nanoseconds, 0) // SECOND_NS
    minutes = seconds // 60
    hours = int(seconds / 3600 + 0.5)
    steps: tuple[tuple[bool, str], ...] = (
        (seconds < 1, "Less than a second"),
        (seconds == 1, "1 second"),
        (seconds < 60, f"{seconds} seconds"),
        (minutes == 1, "About a minute"),
        (minutes < 60, f"{minutes} minutes"),
        (hours == 1, "About an hour"),
        (hours < 48, f"{hours} hours"),
        (hours < 24 * 7 * 2, f"{hours // 24} days"),
        (hours < 24 * 30 * 2, f"{hours // 24 // 7} weeks"),
        (hours < 24 * 365 * 2, f"{hours // 24 // 30} months"),
    )
    return next((text for fits, text in steps if fits), f"{seconds // 3600 // 24 // 365} years")


def ago(time_ns: int, now_ns: int) -> str:
    """ "3 hours ago", as columns of creation times show it."""
    return f"{human_duration(now_ns - time_ns)} ago" if time_ns else ""


def age(time_ns: int, now_ns: int) -> str:
    """As `ago`, in lower case, for use after a state: "Running about a minute ago"."""
    return ago(time_ns, now_ns).lower()


def parse_time(text: str, now_ns: int) -> int:
    """Unix time in ns of "2026-11-21T09:00:00Z", "2026-11-21", "1763715600.5" or "10m" (that long
    ago). A time without a zone is UTC. Raises Invalid.
    """
    stripped = text.strip()
    if match := _UNIX.fullmatch(stripped):
        if stripped == "0":
            return 0
        return int(match[1]) * SECOND_NS + int((match[2] or "0").ljust(9, "0"))
    if match := _RFC3339.fullmatch(stripped):
        day, clock, fraction, zone = match.groups()
        try:
            moment = datetime.datetime.fromisoformat(
                f"{day}T{clock or '00:00'}{(zone or 'Z').upper()}"
            )
        except ValueError as error:
            raise Invalid(f"{text!r} is not a time: {error}") from None
        seconds = round((moment - _EPOCH).total_seconds())
        return seconds * SECOND_NS + int((fraction or ".0")[1:].ljust(9, "0"))
    try:
        return now_ns - parse_duration(stripped)
    except ValueError:
        raise Invalid(
            f"{text!r} is not a time; write 2026-11-21T09:00:00Z, a Unix time, or a duration such "
            "as "
            "10m for that long ago"
        ) from None
