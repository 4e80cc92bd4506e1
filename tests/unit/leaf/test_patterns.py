"""Patterns: what Python's `re` makes of the whole text, in time that no expression can spoil."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.patterns import PATTERN_CHARS_MAX, Pattern, PatternError

ALPHABET = "abAB01-."

CLASSES = st.sampled_from(
    ["[ab]", "[^a]", "[a-b0]", "[^0-9]", "[]a]", "[\\d-]", "[^\\w]", ".", "\\d", "\\D", "\\w"]
)
ATOMS = st.sampled_from(["a", "B", "0", "\\.", "-"]) | CLASSES
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(
            inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,1}", "{1,}", "*?"])
        ).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@given(PATTERNS, st.lists(st.text(ALPHABET, max_size=8), min_size=1, max_size=5))
def test_matches_what_re_matches(text: str, candidates: list[str]) -> None:
    pattern = Pattern(text)
    for candidate in candidates:
        expected = re.fullmatch(text, candidate, re.IGNORECASE) is not None
        assert pattern.matches(candidate) is expected, (text, candidate)


@given(
    st.text(max_size=300) | st.text("ab()[]{}|*+?^$\\-,:0123", max_size=30), st.text(max_size=20)
)
def test_any_text_is_a_pattern_or_refused(text: str, candidate: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternError:
        return
    pattern.matches(candidate)


@given(st.text("aA0-_ /:é", max_size=20))
def test_an_escaped_text_is_itself(text: str) -> None:
    assert Pattern(re.escape(text)).matches(text.swapcase())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(a", "a ( is not closed"),
        ("a)", "closes nothing"),
        ("[a", "a [ is not closed"),
        ("[z-a]", "ends before it begins"),
        ("*a", "repeats nothing"),
        ("a**", "repeats a repetition"),
        ("a*+", "repeats a repetition"),
        ("a{2}{3}", "repeats a repetition"),
        ("a{,3}", "begins a number of times"),
        ("a{3,2}", "less than the first"),
        ("a^b", "at the beginning"),
        ("(?=a)", "only (?: is offered"),
        ("(?P<x>a)", "only (?: is offered"),
        ("\\b", "is not offered"),
        ("(a)\\1", "is not offered"),
        ("a\\", "is not offered"),
        ("a{257}", "more than 256 parts"),
        ("((){200}){200}", "more than 256 parts"),
        ("a" * (PATTERN_CHARS_MAX + 1), "more than the limit of 256"),
        ("(" * 40 + ")" * 40, "nested deeper"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, says: str) -> None:
    with pytest.raises(PatternError, match=re.escape(says)):
        Pattern(text)


def test_whole_value_and_no_case() -> None:
    assert Pattern("web-[0-9]+").matches("WEB-12")
    assert not Pattern("web").matches("web-1")
    assert Pattern("^web.*$").matches("web-1")


@pytest.mark.parametrize(
    "text", ["(a|a)*b", "(a*)*b", "(.*)*(.*)*x", "a?" * 80 + "a" * 80, "(a?){120}"]
)
def test_no_pattern_takes_long(text: str) -> None:
    started = time.process_time()
    assert not Pattern(text).matches("a" * 20_000)
    assert time.process_time() - started < 1
