"""How fast an agent has another session, and that it tires nobody: in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from swarm.v1 import Goodbye
from tests.unit.dispatcher.managers import Agent, Managers, address, cluster, within

pytestmark = pytest.mark.looptime


async def settled(c: Managers, seconds: float) -> float:
    return await within(seconds, c.settled, c.summary)


async def test_manager_whose_machine_is_gone_costs_a_second_at_the_start() -> None:
    async with cluster(2, 8) as c:
        c.wire.vanish(address("m1"))
        for agent in c.agents.values():
            await agent.start()
        assert await settled(c, 1.2) > 0.9
        assert len(c.wire.connects) > 8  # some had tried m1 first


async def test_manager_that_refuses_costs_nothing() -> None:
    async with cluster(3, 8) as c:
        c.wire.kill(address("m1"))
        for agent in c.agents.values():
            await agent.start()
        await settled(c, 0.2)


@pytest.mark.parametrize(
    "reason", ["shutdown", "silent", "rebalance", "out of touch", "moved", "something new"]
)
async def test_goodbye_of_any_kind_sends_the_agent_to_another_at_once(reason: str) -> None:
    async with cluster(2, 1) as c:
        await c.agents["n1"].start("m1")
        await settled(c, 1)
        await asyncio.sleep(10)
        c.managers["m1"].dispatcher._sessions["n1"].end(Goodbye(reason=reason))
        await within(0.2, lambda: c.status("n1").manager_id == "m2", c.summary)
        assert c.downs("n1") == []


async def test_goodbye_that_names_a_manager_is_followed() -> None:
    async with cluster(5, 1) as c:
        for name in ("m4", "m2", "m5"):
            if not c.agents["n1"].running:
                await c.agents["n1"].start("m1")
            await settled(c, 1)
            await asyncio.sleep(10)
            session = c.managers[c.holder("n1") or ""].dispatcher._sessions["n1"]
            session.end(Goodbye(reason="rebalance", manager=address(name)))
            await within(0.2, lambda n=name: c.status("n1").manager_id == n, c.summary)  # type: ignore[misc]


async def test_managers_that_all_refuse_are_asked_ever_more_slowly() -> None:
    async with cluster(3, 1) as c:
        for name in c.managers:
            c.wire.kill(address(name))
        await c.agents["n1"].start()
        await asyncio.sleep(60)
        asked = len(c.wire.connects)
        assert 3 * 8 < asked < 3 * 30
        c.wire.serve(address("m2"), c.managers["m2"].dispatcher)
        await settled(c, 20)


async def test_agent_of_the_only_manager_pauses_before_it_comes_back() -> None:
    async with cluster(1, 1) as c:
        await c.agents["n1"].start()
        await settled(c, 1)
        c.wire.drop(address("m1"), "n1")
        assert await within(0.5, lambda: len(c.wire.connects) == 2) >= 0.1


async def test_manager_that_ends_each_session_at_once_is_not_asked_without_pause() -> None:
    async with cluster(2, 1) as c:
        await c.agents["n1"].start()
        await settled(c, 1)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + 30
        before = len(c.wire.connects)
        while loop.time() < until_s:
            for manager in c.managers.values():
                for session in manager.dispatcher._sessions.values():
                    session.end(Goodbye(reason="rebalance"))
            await asyncio.sleep(0.02)
        assert len(c.wire.connects) - before < 30 * 2 / 0.1 + 2


async def test_two_agents_with_one_identity_do_not_fight_without_pause() -> None:
    async with cluster(3, 1) as c:
        await c.agents["n1"].start()
        await settled(c, 1)
        copy = Agent(c, "n1")
        await copy.start()
        await asyncio.sleep(5)
        before = len(c.wire.connects)
        await asyncio.sleep(60)
        assert len(c.wire.connects) - before < 60
        problems = c.agents["n1"].session.problem + copy.session.problem
        assert "state folder was not copied" in problems
        await copy.stop()
