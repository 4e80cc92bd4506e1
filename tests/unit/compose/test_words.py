"""Command lines fall into the words that the docker CLI makes of them."""

from __future__ import annotations

import pytest

from cli.compose.words import split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a"b c"d', ["ab cd"]),
        (r"'a\nb'", [r"a\nb"]),
        (r'"a\nb\"c\\d"', ['anb"c\\d']),
        (r"a\ b", ["a b"]),
        (r"a\nb", ["anb"]),
        ("a#b", ["a#b"]),
        ("a #b\nc", ["a", "c"]),
        ("# a b", []),
        ("a '#b'", ["a", "#b"]),
        ("''", [""]),
        ('a "" b', ["a", "", "b"]),
        ("a\tb\u00a0c", ["a", "b\u00a0c"]),
        ("a;b|c && d", ["a;b|c", "&&", "d"]),
        (r"sh -c \"x\"", ["sh", "-c", '"x"']),
        ("a\nb \\\n  c", ["a", "b", "\n", "c"]),
        ("", []),
    ],
)
def test_a_line_is_split_as_docker_splits_it(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize("text", ["a 'b", 'a "b', "a\\", '"a\\'])
def test_a_quote_or_escape_that_is_not_ended_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not closed|no character follows"):
        split_words(text)
