"""Where tasks run and why they do not, from the command line to the node and back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import wait_for
from tests.e2e.local import Node

INVENTORY = """
gpus:
  - {uuid: GPU-a, model: NVIDIA A100-SXM4-40GB, memory: 40GiB, compute_capability: "8.0"}
"""
STACK = """
services:
  db:
    runtime: process
    command: sleep 1000
    deploy:
      placement:
        constraints: ["node.labels.zone in (a, b)", node.gpu.memory >= 40GiB]
  web:
    runtime: process
    command: sleep 1000
    deploy:
      replicas: 3
      placement:
        constraints: [service.name != web]
        preferences: [{affinity: service.name != db, weight: 5}]
        strategy: binpack
  big:
    runtime: process
    command: sleep 1000
    deploy:
      resources: {reservations: {memory: 900G}}
      placement: {constraints: [node.hostname =~ p.*]}
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    (tmp_path / "gpus.yml").write_text(INVENTORY)
    one, two = Node(tmp_path, "p1", "127.0.0.21"), Node(tmp_path, "p2", "127.0.0.22")
    two.extra = ("--gpu-inventory", str(tmp_path / "gpus.yml"))
    with contextlib.closing(one), contextlib.closing(two):
        for node in (one, two):
            node.start()
        one.init()
        two.join(one)
        wait_for("two nodes are ready", lambda: one.ok("node", "ls").count("Ready") == 2)
        one.ok("node", "update", "--label-add", "zone=A", "p2")
        yield one, two


def placed(manager: Node, service: str) -> list[tuple[str, str, str]]:
    rows = manager.ok(
        *("service", "ps", "--format", "{{.Name}}|{{.Node}}|{{.CurrentState}}|{{.Error}}", service)
    )
    found = [row.split("|") for row in rows.splitlines()]
    return [(name, node, error) for name, node, _, error in found]


def test_tasks_go_where_conditions_let_them_and_reasons_say_why_not(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    manager, _ = nodes
    file = tmp_path / "app.yml"
    file.write_text(STACK)
    plan = manager.ok("stack", "deploy", "--dry-run", "-c", file, "app")
    assert "tasks: 1 starts on p2" in plan
    assert "tasks: 2 start on p1, p2" in plan
    assert (
        "! 1 stays without a node: no suitable node (2 nodes do not satisfy service.name != app_web)"
    ) in plan
    assert (
        "! 1 stays without a node, and no node could ever take it: no suitable node (2 of 2" in plan
    )
    manager.ok("stack", "deploy", "-d", "-c", file, "app")
    wait_for("db runs", lambda: placed(manager, "app_db") == [("app_db.1", "p2", "")])
    wait_for("web has two places", lambda: len({n for _, n, _ in placed(manager, "app_web")}) == 3)
    [(name, _, error)] = [row for row in placed(manager, "app_web") if not row[1]]
    assert error == '"no suitable node (2 nodes do not satisfy service.name != app_web)"'
    # Who goes where the other service is not comes first.
    assert placed(manager, "app_web")[0][1] == "p1"
    [(_, _, error)] = placed(manager, "app_big")
    assert error.startswith('"no suitable node (2 of 2 nodes short of memory: need 900 GiB, best')
    assert error.endswith('; no node could take it even if empty"')

    whole = manager.ok("task", "explain", "app_big.1")
    assert "resources (memory)   2           2         900 GiB" in whole
    assert "0 of 2 nodes fit now, and none could later" in whole
    later = manager.ok("task", "explain", name)
    assert "could later" not in later
    assert "affinity" in later

    assert "stays as it is" in manager.ok("stack", "diff", "-c", file, "app")
    file.write_text(STACK.replace("weight: 5", "weight: -5").replace("zone in (a, b)", "zone != x"))
    diff = manager.ok("stack", "diff", "-c", file, "app")
    assert "deploy.placement.constraints: node.labels.zone != x" in diff
    assert "deploy.placement.preferences: [{affinity: service.name != app_db, weight: 5}]" in diff
    assert "kept: no task is touched" in diff


def test_a_label_that_goes_takes_the_tasks_away_that_need_it(nodes: tuple[Node, Node]) -> None:
    manager, _ = nodes
    manager.ok(
        *("service", "create", "-d", "--name", "a", "--constraint", "node.labels.zone =~ [ab]"),
        *("--runtime", "process", "sleep", "1000"),
    )
    wait_for("it runs", lambda: placed(manager, "a") == [("a.1", "p2", "")])
    manager.ok("node", "update", "--label-add", "zone=c", "p2")
    reason = (
        '"no suitable node (2 nodes do not satisfy node.labels.zone =~ [ab]); '
        'no node could take it even if empty"'
    )
    wait_for("it waits", lambda: placed(manager, "a")[0][1:] == ("", reason))
    manager.ok("node", "update", "--label-add", "zone=b", "p1")
    wait_for("it runs again", lambda: placed(manager, "a")[0] == ("a.1", "p1", ""))


def test_the_cluster_s_strategy_is_for_services_that_say_nothing(nodes: tuple[Node, Node]) -> None:
    manager, _ = nodes
    manager.ok("swarm", "update", "--placement-strategy", "binpack")
    [document] = json.loads(manager.ok("swarm", "inspect"))
    assert document["Spec"]["Scheduling"] == {"Strategy": "binpack"}

    def create(name: str, *flags: str) -> set[str]:
        manager.ok(
            *("service", "create", "-d", "--name", name, "--replicas", "4", *flags),
            *("--reserve-cpu", "0.01", "--runtime", "process", "sleep", "1000"),
        )
        wait_for(f"{name} has places", lambda: all(n for _, n, _ in placed(manager, name)))
        return {node for _, node, _ in placed(manager, name)}

    assert len(create("packed")) == 1
    assert create("even", "--placement-strategy", "spread") == {"p1", "p2"}
    refused = manager.run("swarm", "update", "--gpu-policy", "best")
    assert refused.returncode == 2
