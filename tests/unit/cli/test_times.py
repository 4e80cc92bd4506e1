"""Ages and times as Docker's CLI words them."""

from __future__ import annotations

import pytest

from cli.times import ago, human_duration, parse_time, rfc3339
from swarm.clock import SECOND_NS
from swarm.errors import Invalid

MINUTE, HOUR, DAY = 60, 3600, 86400
NOW_NS = 1_795_254_292 * SECOND_NS


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "Less than a second"),
        (0.9, "Less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (MINUTE, "About a minute"),
        (2 * MINUTE - 1, "About a minute"),
        (59 * MINUTE, "59 minutes"),
        (HOUR, "About an hour"),
        (1.6 * HOUR, "2 hours"),
        (47 * HOUR, "47 hours"),
        (2 * DAY, "2 days"),
        (13 * DAY, "13 days"),
        (14 * DAY, "2 weeks"),
        (59 * DAY, "8 weeks"),
        (60 * DAY, "2 months"),
        (729 * DAY, "24 months"),
        (730 * DAY, "2 years"),
        (-5, "Less than a second"),
    ],
)
def test_durations_are_worded_as_by_go_units(seconds: float, text: str) -> None:
    assert human_duration(round(seconds * SECOND_NS)) == text


def test_a_time_that_is_not_known_is_empty() -> None:
    assert ago(0, NOW_NS) == ""
    assert ago(NOW_NS - 3 * HOUR * SECOND_NS, NOW_NS) == "3 hours ago"


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_795_254_292_946_163_064, "2026-11-21T09:44:52.946163064Z"),
        (1_795_254_292_900_000_000, "2026-11-21T09:44:52.9Z"),
    ],
)
def test_rfc3339_leaves_zeros_of_the_fraction_out(time_ns: int, text: str) -> None:
    assert rfc3339(time_ns) == text
    assert parse_time(text, NOW_NS) == time_ns


def test_a_fixed_number_of_digits_keeps_lines_aligned() -> None:
    assert rfc3339(NOW_NS, digits=9) == "2026-11-21T09:44:52.000000000Z"


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("10m", NOW_NS - 600 * SECOND_NS),
        ("1h30m", NOW_NS - 5400 * SECOND_NS),
        ("0", 0),
        ("1763715600", 1_763_715_600 * SECOND_NS),
        ("1763715600.5", 1_763_715_600 * SECOND_NS + SECOND_NS // 2),
        ("2025-11-21", 1_763_683_200 * SECOND_NS),
        ("2025-11-21T10:00:00+01:00", 1_763_715_600 * SECOND_NS),
        ("2025-11-21 09:00", 1_763_715_600 * SECOND_NS),
    ],
)
def test_since_takes_dockers_forms(text: str, time_ns: int) -> None:
    assert parse_time(text, NOW_NS) == time_ns


@pytest.mark.parametrize("text", ["", "yesterday", "2025-13-01", "10", "-5m", "10 m o"])
def test_what_is_no_time_is_refused_with_the_accepted_forms(text: str) -> None:
    if text == "10":
        assert parse_time(text, NOW_NS) == 10 * SECOND_NS  # a Unix time
        return
    with pytest.raises(Invalid, match="is not a time"):
        parse_time(text, NOW_NS)
