"""Agents and the manager die at random moments; afterwards everything is as it should be."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from swarm.states import ended
from swarm.v1 import Task, TaskState
from tests.fakes.runtime import Script
from tests.fakes.waiting import until
from tests.integration.dispatcher.harness import Agent, Manager, cluster

S = TaskState
STEPS = 40


@pytest.mark.parametrize("seed", range(3))
async def test_after_any_deaths_each_task_was_started_once_and_ends_as_desired(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    async with cluster(tmp_path, "n1", "n2") as (manager, agents):
        for agent in agents:
            agent.runtime.script = lambda _: Script(prepare_s=0.02, start_s=0.02, stop_s=0.02)
        service = await manager.add_service("web")
        for _ in range(STEPS):
            await _step(rng, manager, agents, service)
            await asyncio.sleep(rng.random() * 0.03)  # moments differ with the seed
        for agent in agents:
            await agent.connected()
        await until(lambda: _settled(manager), what=lambda: list(manager.store.all(Task)))
        for agent in agents:
            wanted = {
                t.id
                for t in manager.store.by(Task, "node", agent.node_id)
                if t.status is not None and t.status.state == S.RUNNING
            }
            await until(lambda a=agent, w=wanted: a.runtime.running() == w)  # type: ignore[misc]
            assert max(agent.runtime.starts.values(), default=0) <= 1
            known = {t.id for t in manager.store.by(Task, "node", agent.node_id)}
            assert set(agent.runtime.containers) <= known
        manager.store.check_invariants()


async def _step(rng: random.Random, manager: Manager, agents: list[Agent], service: str) -> None:
    tasks = sorted(t.id for t in manager.store.all(Task))
    match rng.choices(["add", "stop", "remove", "exit", "kill", "restart"], [6, 3, 3, 3, 2, 1])[0]:
        case "add":
            await manager.add_tasks(service, rng.choice(agents).node_id, rng.randint(1, 4))
        case "stop" if tasks:
            await _want(manager, rng.choice(tasks), S.SHUTDOWN)
        case "remove" if tasks:
            await _want(manager, rng.choice(tasks), S.REMOVE)
        case "exit":
            runtime = rng.choice(agents).runtime
            if running := sorted(runtime.running()):
                runtime.exit(rng.choice(running), rng.choice([0, 1]))
        case "kill":
            agent = rng.choice(agents)
            await agent.kill()
            await agent.start()
        case "restart":
            await manager.stop()
            await manager.start()
        case _:
            pass


async def _want(manager: Manager, task_id: str, desired: TaskState) -> None:
    task = manager.store.get(Task, task_id)
    if task is not None and task.desired_state < desired:
        await manager.want(desired, task_id)


def _settled(manager: Manager) -> bool:
    """Whether every task is what it was wanted to be."""
    for task in manager.store.all(Task):
        state = task.status.state if task.status else S.NEW
        if task.desired_state == S.REMOVE:
            return False
        if task.desired_state == S.SHUTDOWN and not ended(state):
            return False
        if task.desired_state == S.RUNNING and state < S.RUNNING:
            return False
    return True
