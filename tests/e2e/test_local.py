"""One machine, no engine: what operators rely on beside the tasks themselves."""

import contextlib
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import wait_for
from tests.e2e.local import Node
from tests.ports import free_port


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path, "m", "127.0.0.9")
    with contextlib.closing(made):
        yield made


SHOP = Path(__file__).parents[2] / "deploy/examples/shop.yml"
# Told apart from the tasks of other tests by how long they sleep.
SLEEP_S = str(100_000 + os.getpid())


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def test_metrics_tell_of_nodes_tasks_and_the_loop(node: Node) -> None:
    address = f"127.0.0.9:{free_port('127.0.0.9')}"
    node.extra = ("--metrics-addr", address)
    node.start()
    assert get(f"http://{address}/healthz") == "ok\n"
    node.init()
    node.ok(
        "service",
        "create",
        "--name",
        "web",
        "--replicas",
        "3",
        "--runtime",
        "process",
        "sleep",
        "1000",
    )
    text = get(f"http://{address}/metrics")
    lines = text.splitlines()
    assert 'swarm_cluster_nodes{state="ready"} 1.0' in lines
    assert 'swarm_cluster_tasks{state="running"} 3.0' in lines
    assert "swarm_agent_tasks 3.0" in lines
    assert "swarm_dispatcher_sessions 1.0" in lines
    for family in (
        "swarm_event_loop_lag_seconds_count",
        "swarm_control_tick_seconds_count",
        "swarm_store_commit_seconds_count",
        "swarm_dispatcher_assignments_total",
        "swarm_dispatcher_heartbeats_missed_total",
        "swarm_agent_operation_seconds_count",
        "swarm_api_request_seconds_count",
        "swarm_node_certificate_expiry_seconds",
    ):
        assert family in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_tasks_outlive_the_daemon_and_are_found_again(node: Node, number: int) -> None:
    node.start()
    node.init()
    node.ok(
        "service",
        "create",
        "--name",
        "web",
        "--replicas",
        "4",
        "--runtime",
        "process",
        "sleep",
        SLEEP_S,
    )
    words = ("service", "ps", "web", "--no-trunc", "--format", "{{.ID}} {{.CurrentState}}")
    before = {line.split()[0] for line in node.ok(*words).splitlines()}
    pids = sleepers()
    assert len(pids) == 4
    node.stop(number)
    assert sleepers() == pids
    node.start()
    wait_for("the node is ready again", lambda: "Ready" in node.run("node", "ls").stdout)
    wait_for(
        "all tasks are reported running",
        lambda: [line.split()[1] for line in node.ok(*words).splitlines()] == ["Running"] * 4,
    )
    assert {line.split()[0] for line in node.ok(*words).splitlines()} == before
    assert sleepers() == pids


def test_the_last_manager_takes_its_tasks_along_when_it_leaves(node: Node) -> None:
    node.start()
    node.init()
    node.ok(
        "service",
        "create",
        "--name",
        "web",
        "--replicas",
        "3",
        "--runtime",
        "process",
        "sleep",
        SLEEP_S,
    )
    assert len(sleepers()) == 3
    node.ok("swarm", "leave", "--force")
    assert sleepers() == set()
    assert "tasks_left_behind" not in node.log.read_text()
    assert node.ok("info", "--format", "{{.Swarm.LocalNodeState}}").strip() == "inactive"


def sleepers() -> set[int]:
    """The tasks' processes."""
    out = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes() == f"sleep\0{SLEEP_S}\0".encode():
                out.add(int(entry.name))
    return out


def test_a_person_elsewhere_works_through_a_context(node: Node, tmp_path: Path) -> None:
    node.start()
    node.init()
    env = {"SWARM_CONFIG": str(tmp_path / "config"), "HOME": str(tmp_path)}
    host = f"tcp://{node.address}:{node.port}"
    done = node.run("context", "create", "far", "--host", host, env=env)
    assert done.returncode == 0, done.stderr
    everything = [p for p in (tmp_path / "config").rglob("*") if p.is_file()]
    assert everything
    assert all(p.stat().st_mode & 0o077 == 0 for p in everything), "keys are their owner's alone"
    remote = {**env, "SWARM_CONTEXT": "far", "SWARM_HOST": ""}
    done = node.run_bare("node", "ls", env=remote)
    assert done.returncode == 0, done.stderr
    assert "Leader" in done.stdout
    done = node.run_bare("swarm", "leave", "--force", env=remote)
    assert done.returncode == 2, "what concerns the machine itself is for its own users"
    assert "run it on that node" in done.stderr


def test_exit_codes_come_through(node: Node) -> None:
    node.start()
    node.init()
    done = node.run(
        *("service", "create", "--name", "bad", "--restart-condition", "none", "--timeout", "20s"),
        *("--runtime", "process", "no-such-program"),
    )
    assert done.returncode == 6, done.stderr
    assert "no-such-program" in done.stderr


def test_the_shop_example_starts_in_order_and_rolls_back_what_fails(node: Node) -> None:
    node.start()
    node.init()
    deploy = ("stack", "deploy", "-c", SHOP, "shop")
    done = node.run(*deploy)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    ends = ("db: 1/1 running", "migrate: 1/1 completed", "web: 3/3 running")
    order = [lines.index(f"shop_{end}, converged") for end in ends]
    assert order == sorted(order), done.stderr
    page = f"http://{node.address}:4001"
    assert re.fullmatch(r"Hello from shop_web\.[123] on m\n", get(page))
    done = node.run(*deploy, env={"GREETING": ""})
    assert done.returncode == 7, done.stderr
    assert "Error: stack 'shop': shop_web was rolled back\n" in done.stderr
    assert "    | GREETING is empty\n" in done.stderr
    assert get(page).startswith("Hello")
