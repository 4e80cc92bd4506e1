"""Whose a node is, and who may call it down."""

from __future__ import annotations

import asyncio
import random

import pytest
from msgspec import structs

from swarm import errors
from swarm.v1 import AgentMessage, Heartbeat, Leaving, Node, NodeDescription, NodeState
from tests.unit.dispatcher.managers import Managers, Raw, address, cluster, within

pytestmark = pytest.mark.looptime

SILENT_S = 3.0
GRACE_S = 8.0
CALM_GRACE_S = 4.0  # where the others have been running for a while
SLACK_S = 0.5


async def entered(c: Managers, node_id: str, manager_id: str) -> None:
    await within(2, lambda: c.status(node_id).manager_id == manager_id, lambda: c.status(node_id))


async def down(c: Managers, node_id: str, after_s: float) -> None:
    """It goes down then, not earlier."""
    took_s = await within(
        after_s + SLACK_S, lambda: c.status(node_id).state == NodeState.DOWN, c.summary
    )
    assert took_s >= after_s - SLACK_S


async def test_store_names_the_manager_that_holds_the_session() -> None:
    async with cluster(2, 1) as c:
        await c.agents["n1"].start("m2")
        await within(1, c.settled, c.summary)
        assert c.status("n1").manager_id == "m2"


# ------------------------------------------------------------------ moves


async def test_node_that_moved_is_not_down_and_its_old_session_ends() -> None:
    async with cluster(2, 1) as c:
        old = await Raw(c, "m1", "n1").open()
        await entered(c, "n1", "m1")
        new = await Raw(c, "m2", "n1").open()
        await within(1, lambda: old.goodbye == "moved")
        for number in range(6):
            new.say(AgentMessage(heartbeat=Heartbeat(sequence=number)))
            await asyncio.sleep(1)
        assert c.downs("n1") == []
        assert not new.ended()
        new.say(AgentMessage(heartbeat=Heartbeat(sequence=9)))
        await asyncio.sleep(0.1)
        await new.close()
        await down(c, "n1", SILENT_S)
        assert c.status("n1").manager_id == "m2"


async def test_judgement_that_is_committed_after_the_node_has_moved_is_not_entered() -> None:
    async with cluster(2, 1) as c:
        old = await Raw(c, "m1", "n1").open()
        await entered(c, "n1", "m1")
        c.managers["m1"].engine.hold_commits()
        await old.close()
        await asyncio.sleep(4)  # m1 has judged, and cannot write it
        new = await Raw(c, "m2", "n1").open()
        await entered(c, "n1", "m2")
        c.managers["m1"].engine.let_commits()
        await asyncio.sleep(2)
        assert c.downs("n1") == []
        assert not new.ended()


async def test_judgement_that_waits_is_dropped_when_the_node_is_heard_again() -> None:
    async with cluster(2, 1) as c:
        old = await Raw(c, "m1", "n1").open()
        await entered(c, "n1", "m1")
        c.log.inner.failing = errors.Unavailable("the disk is full")
        await old.close()
        await asyncio.sleep(4)
        again = await Raw(c, "m1", "n1").open()
        await asyncio.sleep(1)
        c.log.inner.failing = None
        again.say(AgentMessage(heartbeat=Heartbeat(sequence=1)))
        await asyncio.sleep(2.5)
        assert c.downs("n1") == []
        assert not again.ended()


async def test_judgement_of_the_leader_is_dropped_when_the_manager_is_back() -> None:
    async with cluster(2, 1) as c:
        c.managers["m2"].dispatcher.lead(True)
        session = await Raw(c, "m1", "n1").open()
        await entered(c, "n1", "m1")
        c.log.leave("m1")  # though it is there
        c.log.inner.failing = errors.Unavailable("the disk is full")
        for number in range(10):
            session.say(AgentMessage(heartbeat=Heartbeat(sequence=number)))
            await asyncio.sleep(1)
        c.log.arrive("m1")
        await asyncio.sleep(0.1)
        c.log.inner.failing = None
        session.say(AgentMessage(heartbeat=Heartbeat(sequence=99)))
        await asyncio.sleep(2.5)
        assert c.downs("n1") == []


async def test_session_that_is_gone_before_its_commit_is_not_entered() -> None:
    async with cluster(2, 1) as c:
        first = await Raw(c, "m1", "n1").open()
        await entered(c, "n1", "m1")
        await first.close()
        c.managers["m2"].engine.hold_commits()
        between = await Raw(c, "m2", "n1").open()
        await asyncio.sleep(0.2)
        await between.close()
        last = await Raw(c, "m1", "n1").open()
        await asyncio.sleep(0.5)
        c.managers["m2"].engine.let_commits()
        await asyncio.sleep(1)
        assert c.status("n1").manager_id == "m1"
        assert not last.ended()
        await last.close()
        await down(c, "n1", SILENT_S - 1)


async def test_agent_that_came_back_while_the_other_manager_was_late_settles_with_one() -> None:
    """A, then B whose commit is late and whose end is not noticed, then A again."""
    async with cluster(2, 1) as c:
        first = await Raw(c, "m1", "n1").open()
        await entered(c, "n1", "m1")
        await first.close()
        c.managers["m2"].engine.hold_commits()
        half_open = await Raw(c, "m2", "n1").open()
        last = await Raw(c, "m1", "n1").open()
        await asyncio.sleep(0.5)
        c.managers["m2"].engine.let_commits()
        await within(1, lambda: last.goodbye == "moved")  # once, for the agent to come anew
        assert not half_open.ended()
        await c.agents["n1"].start("m1")
        await within(1, lambda: half_open.goodbye == "moved")
        await within(1, c.settled, c.summary)
        assert c.downs("n1") == []


async def test_news_of_an_older_move_do_not_end_a_session_that_is_not_entered_yet() -> None:
    async with cluster(2, 1) as c:
        first = await Raw(c, "m1", "n1").open()
        await entered(c, "n1", "m1")
        await first.close()
        c.managers["m1"].engine.lag()
        between = await Raw(c, "m2", "n1").open()
        await entered(c, "n1", "m2")
        await between.close()
        last = await Raw(c, "m1", "n1").open()
        last.say(AgentMessage(description=NodeDescription(hostname="changed")))
        await asyncio.sleep(0.2)  # its commit is on its way, and goes nowhere
        c.managers["m1"].engine.heal()
        await entered(c, "n1", "m1")
        await asyncio.sleep(1)
        assert not last.ended()
        assert c.downs("n1") == []


async def test_what_is_said_of_a_node_in_a_session_that_ended_is_not_entered_late() -> None:
    async with cluster(2, 1) as c:
        old = await Raw(c, "m1", "n1").open()
        await entered(c, "n1", "m1")
        c.managers["m1"].engine.hold_commits()
        old.say(AgentMessage(description=NodeDescription(hostname="old news")))
        await asyncio.sleep(0.1)
        await old.close()
        await Raw(c, "m2", "n1").open()
        await entered(c, "n1", "m2")
        c.managers["m1"].engine.let_commits()
        await asyncio.sleep(1)
        node = c.store.get(Node, "n1")
        assert node is not None and node.description is not None
        assert node.description.hostname == "n1"


async def test_node_that_leaves_is_down_at_once_and_stays_so() -> None:
    async with cluster(2, 1) as c:
        session = await Raw(c, "m1", "n1").open()
        await entered(c, "n1", "m1")
        session.say(AgentMessage(leaving=Leaving()))
        session.say(AgentMessage(description=NodeDescription(hostname="x")))
        await down(c, "n1", 0)
        await asyncio.sleep(1)
        assert c.status("n1").message == "the node left the cluster"
        assert c.status("n1").state == NodeState.DOWN


async def test_node_that_was_called_down_while_its_session_lives_is_ready_again() -> None:
    async with cluster(2, 1) as c:
        await c.agents["n1"].start("m1")
        await within(1, c.settled, c.summary)

        def call_down() -> None:
            node = c.store.get(Node, "n1")
            assert node is not None and node.status is not None
            draft = c.store.draft()
            draft.put(
                structs.replace(node, status=structs.replace(node.status, state=NodeState.DOWN))
            )
            asyncio.get_running_loop()
            calls.append(asyncio.ensure_future(c.store.commit(draft)))

        calls: list[asyncio.Future[int]] = []
        call_down()
        await asyncio.gather(*calls)
        assert c.status("n1").state == NodeState.DOWN
        await within(1, c.settled, c.summary)


# ------------------------------------------------------------------ managers that go


async def test_manager_that_ends_in_order_loses_no_node() -> None:
    async with cluster(3, 6) as c:
        c.managers["m2"].dispatcher.lead(True)
        for agent in c.agents.values():
            await agent.start()
        await within(1, c.settled, c.summary)
        moving = c.managers["m1"].held()
        await c.managers["m1"].stop()
        assert await within(1, c.settled, c.summary) < 1
        assert moving
        await asyncio.sleep(20)
        assert not any(c.downs(n) for n in c.agents)


@pytest.mark.parametrize("end", ["kill", "vanish"])
async def test_agents_of_a_manager_that_is_gone_go_on_elsewhere_without_being_down(
    end: str,
) -> None:
    async with cluster(3, 9) as c:
        c.managers["m2"].dispatcher.lead(True)
        for agent in c.agents.values():
            await agent.start()
        await within(1, c.settled, c.summary)
        moving = sorted(c.managers["m1"].held())
        if end == "kill":
            await c.managers["m1"].kill()
            await within(1, c.settled, c.summary)
        else:
            await c.managers["m1"].vanish()
            c.managers["m1"].dispatcher._sessions.clear()
            await within(SILENT_S + 2.5, c.settled, c.summary)
        assert moving
        await asyncio.sleep(20)
        assert not any(c.downs(n) for n in c.agents)


async def test_node_lost_with_its_manager_is_called_down_by_the_leader_after_the_grace() -> None:
    async with cluster(3, 2) as c:
        c.managers["m3"].dispatcher.lead(True)
        await c.agents["n1"].start("m1")
        await c.agents["n2"].start("m2")
        await within(1, c.settled, c.summary)
        await c.agents["n1"].stop()
        await c.managers["m1"].kill()
        await down(c, "n1", 3.0 + GRACE_S)
        assert c.status("n1").message == "its manager is gone, and it came to no other"
        assert c.downs("n2") == []


async def test_who_does_not_lead_calls_no_other_managers_nodes_down() -> None:
    async with cluster(3, 1) as c:
        c.managers["m2"].dispatcher.lead(True)
        c.managers["m2"].dispatcher.lead(False)
        await c.agents["n1"].start("m1")
        await within(1, c.settled, c.summary)
        await c.agents["n1"].stop()
        await c.managers["m1"].kill()
        await asyncio.sleep(60)
        assert c.downs("n1") == []
        c.managers["m3"].dispatcher.lead(True)
        await down(c, "n1", CALM_GRACE_S)


async def test_manager_that_is_back_judges_its_nodes_itself() -> None:
    async with cluster(2, 1) as c:
        c.managers["m2"].dispatcher.lead(True)
        await c.agents["n1"].start("m1")
        await within(1, c.settled, c.summary)
        await c.agents["n1"].stop()
        await c.managers["m1"].kill()
        await asyncio.sleep(3 + GRACE_S - 2)
        await c.managers["m1"].start()
        await down(c, "n1", GRACE_S)
        assert c.status("n1").message == "3 heartbeats were missed"


async def test_nodes_that_no_manager_ever_held_are_the_leaders() -> None:
    async with cluster(2, 2) as c:
        for node_id, state in (("n1", NodeState.READY), ("n2", NodeState.UNKNOWN)):
            node = c.store.get(Node, node_id)
            assert node is not None and node.status is not None
            status = structs.replace(node.status, state=state)
            draft = c.store.draft()
            draft.put(structs.replace(node, status=status))
            await c.store.commit(draft)
        await asyncio.sleep(30)
        assert c.status("n1").state == NodeState.READY
        c.managers["m1"].dispatcher.lead(True)
        await down(c, "n1", GRACE_S)
        await down(c, "n2", 0)
        assert c.status("n1").message == "it did not come"


# ------------------------------------------------------------------ out of touch


async def test_manager_out_of_touch_ends_its_sessions_and_its_agents_go_elsewhere() -> None:
    async with cluster(2, 3) as c:
        for agent in c.agents.values():
            await agent.start("m1", "m2")
        await within(1, c.settled, c.summary)
        c.managers["m1"].engine.cut()
        c.log.leave("m1")
        await within(1, lambda: all(c.status(n).manager_id == "m2" for n in c.agents), c.summary)
        await within(1, c.settled, c.summary)
        refused = await Raw(c, "m1", "n1").open()
        assert refused.error is not None
        assert "this manager does not reach the others" in refused.error.message
        await asyncio.sleep(30)
        assert not any(c.downs(n) for n in c.agents)


async def test_manager_back_in_touch_gives_its_nodes_the_grace_of_a_start() -> None:
    async with cluster(2, 1) as c:
        await c.agents["n1"].start("m1")
        await within(1, c.settled, c.summary)
        c.managers["m1"].engine.cut()
        await c.agents["n1"].stop()
        await asyncio.sleep(30)
        assert c.downs("n1") == []
        c.managers["m1"].engine.heal()
        await down(c, "n1", GRACE_S)


async def test_leader_out_of_touch_calls_nobody_down() -> None:
    async with cluster(2, 1) as c:
        c.managers["m2"].dispatcher.lead(True)
        await c.agents["n1"].start("m1")
        await within(1, c.settled, c.summary)
        await c.agents["n1"].stop()
        await c.managers["m1"].kill()
        await asyncio.sleep(5)
        c.managers["m2"].engine.cut()
        await asyncio.sleep(30)
        c.managers["m2"].engine.heal()
        await asyncio.sleep(1)
        assert c.downs("n1") == []
        await down(c, "n1", GRACE_S - 1)


# ------------------------------------------------------------------ anything


@pytest.mark.parametrize("seed", range(6))
async def test_after_any_faults_every_agent_is_ready_at_one_manager(seed: int) -> None:
    rng = random.Random(seed)
    async with cluster(3, 8, seed=seed) as c:
        c.managers["m1"].dispatcher.lead(True)
        lost: dict[str, float] = {}  # nodes and when they were last away
        for agent in c.agents.values():
            await agent.start()
        alive = dict.fromkeys(c.managers, True)
        cut = dict.fromkeys(c.managers, False)
        for _ in range(40):
            name = rng.choice(list(c.managers))
            manager, agent = c.managers[name], c.agents[rng.choice(list(c.agents))]
            match rng.choice(["cut", "heal", "hold", "kill", "start", "agent", "agent", "drop"]):
                case "cut" if alive[name] and not any(cut.values()) and all(alive.values()):
                    manager.engine.cut()
                    c.log.leave(name)
                    cut[name] = True
                case "heal" if cut[name] and alive[name]:
                    manager.engine.heal()
                    c.log.arrive(name)
                    cut[name] = False
                case "hold" if alive[name]:
                    manager.engine.hold_commits()
                    await asyncio.sleep(rng.random())
                    manager.engine.let_commits()
                case "kill" if all(alive.values()) and not any(cut.values()):
                    await manager.kill()
                    alive[name] = False
                case "start" if not alive[name]:
                    await manager.start()
                    alive[name] = True
                case "agent":
                    await agent.stop()
                    lost[agent.id] = c.clock.monotonic_s()
                    if rng.random() < 0.7:
                        await agent.start()
                case "drop" if address(name) in c.wire.addresses():
                    c.wire.drop(address(name), agent.id)
                case _:
                    pass
            await asyncio.sleep(rng.random() * 2)
        for name, manager in c.managers.items():
            if not alive[name]:
                await manager.start()
            elif cut[name]:
                manager.engine.heal()
                c.log.arrive(name)
        for manager in c.managers.values():
            manager.dispatcher.lead(manager.id == "m2")
        await within(30, c.settled, c.summary)
        for node_id in c.agents:
            if node_id not in lost:
                assert c.downs(node_id) == []
        before = len(c.states)
        await asyncio.sleep(60)
        assert len(c.states) == before
        assert c.settled()
