"""Shares of the sessions: when one is too large, and that all come to an end."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.dispatcher.balance import (
    REBALANCE_AFTER_S,
    REBALANCE_AGAIN_S,
    Balance,
    share_max,
    targets,
)
from tests.unit.dispatcher.managers import Managers, Raw, cluster, within


@pytest.mark.parametrize(
    ("sessions", "managers", "expected"),
    [(30, 3, 11), (31, 3, 12), (1, 3, 2), (0, 3, 1), (10, 1, 11)],
)
def test_share_is_one_above_the_even_one(sessions: int, managers: int, expected: int) -> None:
    assert share_max(sessions, managers) == expected


def test_who_holds_too_many_waits_before_it_sends_some_away() -> None:
    balance = Balance()
    held = {"a": 30, "b": 0, "c": 0}
    assert balance.surplus(held, "a", 100.0) == 0
    assert balance.surplus(held, "a", 100.0 + REBALANCE_AFTER_S - 0.1) == 0
    assert balance.surplus(held, "a", 100.0 + REBALANCE_AFTER_S) == 3  # of 19, a few at a time


def test_share_that_was_fair_in_between_is_waited_for_anew() -> None:
    balance = Balance()
    assert balance.surplus({"a": 30, "b": 0}, "a", 0.0) == 0
    assert balance.surplus({"a": 15, "b": 15}, "a", 5.0) == 0
    assert balance.surplus({"a": 30, "b": 0}, "a", 11.0) == 0


def test_manager_alone_keeps_all() -> None:
    balance = Balance()
    for now_s in (0.0, 20.0):
        assert balance.surplus({"a": 30}, "a", now_s) == 0


def test_node_is_not_sent_away_twice_in_a_row() -> None:
    balance = Balance()
    balance.moved("n1", 0.0)
    assert balance.movable(["n1", "n2"], 1.0) == ["n2"]
    assert balance.movable(["n1", "n2"], REBALANCE_AGAIN_S + 1) == ["n1", "n2"]


def test_who_is_sent_goes_where_the_fewest_are() -> None:
    assert targets({"a": 9, "b": 2, "c": 0}, "a", 4) == ["c", "c", "b", "c"]


@given(st.lists(st.integers(0, 60), min_size=2, max_size=5))
def test_any_shares_become_fair_and_then_rest(counts: list[int]) -> None:
    """All look at the same moment, and so do not know of each other's moves."""
    held = {f"m{i}": n for i, n in enumerate(counts)}
    judges = {m: Balance() for m in held}
    moved = 0
    for now_s in range(400):
        seen = dict(held)
        for manager, judge in judges.items():
            for target in targets(seen, manager, judge.surplus(seen, manager, float(now_s))):
                held[manager] -= 1
                held[target] += 1
                moved += 1
    assert max(held.values()) <= share_max(sum(counts), len(counts))
    assert moved <= 2 * sum(counts)


# ------------------------------------------------------------------ with agents, in virtual time


def shares(c: Managers) -> Counter[str]:
    return Counter({m.id: len(m.held()) for m in c.managers.values()})


STARTS = {
    "all at one": ("m1",),
    "at two": ("m1", "m2"),
    "anywhere": (),
}


@pytest.mark.looptime
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
async def test_thirty_agents_spread_over_three_managers_and_stay(start: tuple[str, ...]) -> None:
    async with cluster(3, 30) as c:
        for agent in c.agents.values():
            await agent.start(*start)
        await within(2, c.settled, c.summary)
        await asyncio.sleep(60)
        assert max(shares(c).values()) <= 11, shares(c)
        assert c.settled()
        connects = len(c.wire.connects)
        await asyncio.sleep(60)
        assert len(c.wire.connects) == connects
        assert not any(c.downs(n) for n in c.agents)


@pytest.mark.looptime
async def test_manager_that_comes_back_gets_its_share() -> None:
    async with cluster(3, 30) as c:
        for agent in c.agents.values():
            await agent.start()
        await within(2, c.settled, c.summary)
        await c.managers["m3"].stop()
        await within(2, c.settled, c.summary)
        assert shares(c)["m3"] == 0
        await c.managers["m3"].start()
        await asyncio.sleep(60)
        assert shares(c)["m3"] >= 8
        assert c.settled()


@pytest.mark.looptime
async def test_agents_that_cannot_reach_the_others_are_sent_away_once() -> None:
    async with cluster(3, 9) as c:
        for agent in c.agents.values():
            await agent.start()
        for name in ("m2", "m3"):  # they are there, and no agent gets to them
            c.wire.kill(f"{name}:2377")
        await within(10, c.settled, c.summary)
        assert shares(c)["m1"] == 9
        await asyncio.sleep(60)
        connects = len(c.wire.connects)
        await asyncio.sleep(60)
        assert len(c.wire.connects) == connects
        assert c.settled()


@pytest.mark.looptime
async def test_node_with_an_open_stream_is_not_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(2, 6) as c:
        sessions = [await Raw(c, "m1", f"n{i + 1}").open() for i in range(6)]
        monkeypatch.setattr(
            c.managers["m1"].dispatcher._custody, "_busy", lambda: {f"n{i + 1}" for i in range(6)}
        )
        custody = c.managers["m1"].dispatcher._custody
        for _ in range(30):
            for session in c.managers["m1"].dispatcher._sessions.values():
                custody.heard(session)
            await asyncio.sleep(1)
        assert not any(s.ended() for s in sessions)
