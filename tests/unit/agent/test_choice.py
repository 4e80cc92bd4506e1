"""Which manager is asked next."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.choice import Choice
from swarm import errors
from swarm.ids import seeded_rng


def choice(*managers: str, seed: int = 1) -> Choice:
    return Choice(managers, seeded_rng(seed))


def test_agents_spread_over_the_managers() -> None:
    first = Counter(choice("a", "b", "c", seed=seed).next() for seed in range(300))
    assert min(first.values()) > 70


@given(st.integers(0, 1000), st.integers(1, 5))
def test_each_manager_is_asked_once_a_round(seed: int, count: int) -> None:
    managers = [f"m{i}" for i in range(count)]
    made = choice(*managers, seed=seed)
    for _ in range(3):
        asked = []
        over = False
        while not over:
            asked.append(made.next())
            over = made.failed(asked[-1])
        assert sorted(asked) == managers


def test_hint_is_followed_unless_it_has_failed_or_is_nobody() -> None:
    made = choice("a", "b", "c")
    assert not made.failed("a", hint="c")
    assert made.next() == "c"
    assert not made.failed("c", hint="a")
    assert made.next() == "b"
    assert made.failed("b", hint="elsewhere")
    assert made.next() in ("a", "b", "c")


def test_session_that_stood_ends_the_round() -> None:
    made = choice("a", "b")
    assert not made.failed("a")
    made.stood()
    assert not made.failed("b")
    assert made.next() == "a"


def test_managers_that_are_gone_are_not_asked() -> None:
    made = choice("a", "b")
    made.learn(("b", "c"))
    assert not made.failed("b")
    assert made.next() == "c"


def test_no_manager_at_all_is_said() -> None:
    with pytest.raises(errors.Invalid, match="no manager's address is known"):
        choice().next()
