"""Planted bugs are found: some in each run, all of them with `-m long`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sim import planted
from tests.sim.rules import RULES

QUICK = ("predecessor_not_awaited", "fence_skipped", "parallelism_one_more", "ready_starts")
README = Path(__file__).with_name("README.md")


@pytest.mark.parametrize("name", sorted(planted.BUGS))
def test_a_planted_bug_still_fits_the_code(name: str) -> None:
    bug = planted.BUGS[name]
    planted.mutated(bug)
    assert set(bug.rules) <= RULES.keys()


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_found(name: str) -> None:
    assert planted.search(name, seeds_max=10) is not None


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(planted.BUGS))
def test_each_planted_bug_is_found(name: str) -> None:
    assert planted.search(name) is not None


def test_the_table_names_all_planted_bugs_and_all_rules() -> None:
    text = README.read_text()
    for name, bug in planted.BUGS.items():
        assert f"| `{name}` | {bug.what} |" in text
    for rule, meaning in RULES.items():
        assert f"| `{rule}` | {meaning} |" in text
