"""Dispatcher, session and worker together: what they promise each other over a real stream."""

from __future__ import annotations

from pathlib import Path

from swarm.v1 import NodeState, TaskState
from tests.integration.dispatcher.harness import cluster

S = TaskState


async def test_task_runs_and_its_states_reach_the_store(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.RUNNING, task)
        assert manager.node_status("n1").state == NodeState.READY
        work = agent.runtime.containers[task].work
        assert work.assignment.name == f"web.1.{task}"
        assert work.assignment.service_labels == {"tier": "front"}
