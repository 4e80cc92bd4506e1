"""Deadlines of nodes, and how often they have to be heard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.dispatcher.liveness import HEARTBEATS_PER_S_MAX, Liveness, period_s


@pytest.mark.parametrize(
    ("sessions", "configured_ns", "expected_s"),
    [(0, 0, 1.0), (3, 0, 1.0), (300, 0, 1.0), (1500, 0, 5.0), (3, 2 * 10**9, 2.0)],
)
def test_period_is_a_second_until_heartbeats_are_too_many(
    sessions: int, configured_ns: int, expected_s: float
) -> None:
    assert period_s(sessions, configured_ns) == expected_s


def test_all_agents_together_keep_to_the_limit() -> None:
    for sessions in (1, 299, 301, 1000, 50_000):
        assert sessions / period_s(sessions, 0) <= HEARTBEATS_PER_S_MAX


def test_silent_node_is_told_once() -> None:
    liveness = Liveness()
    liveness.expect("a", 3.0)
    assert liveness.expired(2.9) == []
    assert liveness.expired(3.0) == ["a"]
    assert liveness.expired(9.0) == []


def test_heartbeat_moves_the_deadline() -> None:
    liveness = Liveness()
    liveness.expect("a", 3.0)
    liveness.expect("a", 5.0)
    assert liveness.expired(4.0) == []
    assert liveness.expired(5.0) == ["a"]


def test_deadline_may_come_nearer() -> None:
    liveness = Liveness()
    liveness.expect("a", 30.0)
    liveness.expect("a", 3.0)
    assert liveness.expired(4.0) == ["a"]
    assert liveness.expired(40.0) == []


def test_forgotten_node_is_not_missed() -> None:
    liveness = Liveness()
    liveness.expect("a", 3.0)
    liveness.forget("a")
    assert liveness.expired(9.0) == []


def test_managers_own_standstill_is_not_the_nodes_silence() -> None:
    liveness = Liveness()
    liveness.expect("a", 3.0)
    liveness.postpone(10.0)
    assert liveness.expired(12.0) == []
    assert liveness.expired(13.0) == ["a"]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["expect", "forget", "expired"]),
        st.sampled_from("abc"),
        st.integers(0, 20),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_a_node_is_told_exactly_when_its_latest_deadline_has_passed(
    operations: list[tuple[str, str, int]],
) -> None:
    liveness = Liveness()
    deadlines: dict[str, float] = {}
    now_s = 0.0
    for operation, node, number in operations:
        if operation == "expect":
            liveness.expect(node, now_s + number)
            deadlines[node] = now_s + number
        elif operation == "forget":
            liveness.forget(node)
            deadlines.pop(node, None)
        else:
            now_s += number
            due = {n for n, d in deadlines.items() if d <= now_s}
            assert set(liveness.expired(now_s)) == due
            for node_ in due:
                del deadlines[node_]


def test_own_stall_moves_deadlines_to_no_earlier_than_a_nodes_way_back() -> None:
    liveness = Liveness()
    liveness.expect("a", 3.0)
    liveness.expect("b", 30.0)
    liveness.postpone(20.0, at_least_s=28.0)
    assert liveness.expired(27.9) == []
    assert liveness.expired(28.0) == ["a"]
    assert liveness.expired(49.9) == []
    assert liveness.expired(50.0) == ["b"]
