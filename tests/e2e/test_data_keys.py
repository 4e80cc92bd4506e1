"""Data keys of a real manager: replaced while tasks run, killed in between, read by new tasks."""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import wait_for
from tests.e2e.local import Node

pytestmark = pytest.mark.root  # secrets are files in a task's own mount namespace


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path, "m", "127.0.0.61")
    with contextlib.closing(made):
        yield made


def tasks(node: Node) -> list[str]:
    lines = node.ok("service", "ps", "web", "--filter", "desired-state=running", "-q").split()
    return sorted(lines)


def made_keys(node: Node) -> list[int]:
    entries = [json.loads(line) for line in node.log.read_text().splitlines() if line[:1] == "{"]
    return [e["key_id"] for e in entries if e["event"] == "data_key_made"]


def dropped(node: Node) -> list[list[int]]:
    entries = [json.loads(line) for line in node.log.read_text().splitlines() if line[:1] == "{"]
    return [e["kept"] for e in entries if e["event"] == "data_keys_dropped"]


def test_secret_outlives_the_key_that_sealed_it_and_its_task_runs_on(node: Node) -> None:
    node.start()
    node.ok("swarm", "init", "--store", "embedded", "--data-key-lifetime", "1000h", *node.at)
    wait_for("the first key is there", lambda: made_keys(node) == [1])
    assert node.run("secret", "create", "treasure", "-", stdin="gold").returncode == 0
    node.ok(
        *("service", "create", "-q", "--name", "web", "--runtime", "process"),
        *(
            "--secret",
            "treasure",
            "sh",
            "-c",
            "echo found $(cat /run/secrets/treasure); sleep 9999",
        ),
    )
    before, shown = tasks(node), node.ok("secret", "inspect", "treasure")
    assert len(before) == 1
    node.ok("swarm", "update", "--rotate-data-key")
    wait_for("the old key is dropped", lambda: dropped(node) == [[2]])
    assert tasks(node) == before
    assert node.ok("secret", "inspect", "treasure") == shown
    node.ok("swarm", "update", "--rotate-data-key")
    node.stop(signal.SIGKILL)  # before, within or after what follows from it
    node.start()
    wait_for("the older keys are dropped", lambda: dropped(node)[-1] == [3], timeout_s=60)
    assert tasks(node) == before
    node.ok("service", "update", "-q", "--force", "web")
    (after,) = tasks(node)
    assert [after] != before
    wait_for("the new task has it", lambda: "found gold" in node.ok("service", "logs", after))
    assert "gold" not in node.log.read_text()
