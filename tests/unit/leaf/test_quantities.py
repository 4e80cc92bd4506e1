import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import quantities as q


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("50M", 50 << 20),
        ("50m", 50 << 20),
        ("50MB", 50 << 20),
        ("50 MiB", 50 << 20),
        ("1.5g", 3 << 29),
        ("1024", 1024),
        ("10b", 10),
        ("1e9", 10**9),
        ("1_000M", 1000 << 20),
        (".5g", 1 << 29),
        ("1.g", 1 << 30),
        ("1 gb", 1 << 30),
    ],
)
def test_sizes(text, expected):
    assert q.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "5Q", "1e", "_1", "1e99", "1 2", "9999999p", "٣M"])
def test_bad_sizes_say_what_to_write(text):
    with pytest.raises(ValueError, match="size|larger"):
        q.parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "nano"),
    [("0.5", 500_000_000), ("2", 2 * q.NANO), (".1", 100_000_000), ("3/4", 750_000_000)],
)
def test_cpus(text, nano):
    assert q.parse_cpus(text) == nano


@pytest.mark.parametrize(
    "text", ["", "abc", "-1", "inf", "nan", "0.0000000001", "1e99", "1/0", "1/3"]
)
def test_bad_cpus(text):
    with pytest.raises(ValueError, match="CPU"):
        q.parse_cpus(text)


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("10s", 10 * q.NANO),
        ("1m30s", 90 * q.NANO),
        ("500ms", 500_000_000),
        ("0", 0),
        ("1.5h", 5400 * q.NANO),
    ],
)
def test_durations(text, ns):
    assert q.parse_duration(text) == ns


@pytest.mark.parametrize("text", ["", "10", "tens", "5 s", "s", "1x", "-1s", "99999999999h"])
def test_bad_durations(text):
    with pytest.raises(ValueError, match="duration|longer"):
        q.parse_duration(text)


@given(st.integers(min_value=0, max_value=2**62))
def test_a_duration_survives_printing_and_parsing(ns):
    assert q.parse_duration(q.format_duration(ns)) == ns


@given(st.integers(min_value=0, max_value=1_000_000 * q.NANO))
def test_cpus_survive_printing_and_parsing(nano):
    assert q.parse_cpus(q.format_cpus(nano)) == nano


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0s"),
        (90 * q.NANO, "1m30s"),
        (3600 * q.NANO, "1h0m0s"),
        (1_500_000, "1.5ms"),
        (-q.NANO, "-1s"),
    ],
)
def test_durations_look_like_gos(ns, text):
    assert q.format_duration(ns) == text
