"""Every stack of the corpus: what it is read as, told by golden files."""

from __future__ import annotations

import pytest

from tests.corpus.cases import BY_NAME as CASES
from tests.corpus.cases import CORPUS, check_golden, dump, loaded, names, readable

CASES_MIN = 48


def test_the_corpus_is_whole() -> None:
    """A folder without compose.yml would be left out without a word."""
    folders = {p.name for p in CORPUS.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))}
    assert folders == set(CASES)
    assert len(CASES) >= CASES_MIN


@pytest.mark.parametrize("name", names())
def test_a_stack_is_read_as_its_golden_spec(name: str) -> None:
    case, found = CASES[name], loaded(name)
    check_golden(case, "spec.yml", dump(readable(found.spec)))


@pytest.mark.parametrize("name", names())
def test_a_stack_gives_its_golden_warnings(name: str) -> None:
    """What is read differently from how it looks is told, and nothing else is."""
    check_golden(CASES[name], "warnings.txt", "".join(f"{w}\n" for w in loaded(name).warnings))
