"""What tables say of nodes and tasks whose runtime or clock is not well."""

from __future__ import annotations

import pytest

from cli import docker_json
from cli.commands.node import node_row
from cli.tasks import current_state
from swarm.v1 import (
    Availability,
    Meta,
    Node,
    NodeDescription,
    NodeSpec,
    NodeState,
    NodeStatus,
    RuntimeProblem,
    Task,
    TaskState,
    TaskStatus,
)

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
NOW = 10**18


@pytest.mark.parametrize(
    ("causes", "shown"),
    [
        ((), "Active"),
        (("engine_unresponsive",), "Active (docker: not answering)"),
        (("disk_full",), "Active (docker: disk full)"),
        (("engine_unresponsive", "disk_full"), "Active (docker: not answering, docker: disk full)"),
        (("some_thing",), "Active (docker: some thing)"),
    ],
)
def test_a_node_with_a_runtime_that_takes_no_tasks_is_seen_at_once(
    causes: tuple[str, ...], shown: str
) -> None:
    problems = tuple(
        RuntimeProblem(runtimes=("docker", "runc"), message=f"{c} it is", cause=c) for c in causes
    )
    node = Node(
        id="n1",
        spec=NodeSpec(availability=Availability.ACTIVE),
        description=NodeDescription(hostname="n1", runtime_problems=problems),
        status=NodeStatus(state=NodeState.READY),
    )
    row = node_row(node, "", (0, 0))
    assert (row["Status"], row["Availability"], row["_Availability"]) == ("Ready", "Active", shown)
    assert row["RuntimeProblems"] == "; ".join(f"{c} it is" for c in causes)
    told = docker_json.node(node)["Description"].get("RuntimeProblems", [])
    assert [(p["Runtimes"], p["Cause"]) for p in told] == [(["docker", "runc"], c) for c in causes]


@pytest.mark.parametrize("skew_ns", [-5 * HOUR, 0, 5 * HOUR])
def test_how_long_a_task_runs_is_not_told_by_its_node_s_clock(skew_ns: int) -> None:
    status = TaskStatus(state=TaskState.RUNNING, timestamp_ns=NOW - 60 * SECOND + skew_ns)
    task = Task(
        status=status,
        running_since_ns=NOW - 60 * SECOND,
        meta=Meta(updated_at_ns=NOW - SECOND),
    )
    assert current_state(task, NOW) == "Running about a minute ago"


def test_a_job_s_failed_task_says_when_the_next_attempt_is_due() -> None:
    task = Task(
        status=TaskStatus(state=TaskState.FAILED, timestamp_ns=NOW),
        desired_state=TaskState.COMPLETE,
        start_after_ns=NOW + 38 * SECOND,
        meta=Meta(updated_at_ns=NOW - 3 * SECOND),
    )
    assert current_state(task, NOW) == "Failed 3 seconds ago, next try in 38s"
