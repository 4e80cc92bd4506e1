"""A node whose membership fails says so, comes back when it can, and can be left at all times."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import identity as ids
from agent.managing import found
from agent.options import Settings
from swarm.clock import SECOND_NS, ManualClock, SystemClock
from swarm.ids import seeded_rng
from swarm.v1 import InitRequest
from swarm.vault import Vault
from tests.e2e.cluster import wait_for
from tests.e2e.local import Node
from tests.ports import free_port


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, "n1", "127.0.0.1")
    node.start()
    node.init()
    yield node
    node.close()


def run_task(node: Node, seconds: str) -> None:
    node.ok("service", "create", "--runtime", "process", "--name", "web", "sleep", seconds)


def processes(seconds: str) -> list[int]:
    """Processes `sleep SECONDS`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", seconds.encode()]:
            found.append(int(folder.name))
    return found


def test_manager_whose_port_was_taken_comes_up_once_it_is_free(node: Node) -> None:
    node.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((node.address, node.port))
        other.listen()
        node.start()
        wait_for("the error is told", lambda: "cannot listen on" in node.run("info").stdout)
        refused = node.run("service", "ls")
        assert refused.returncode == 9 and "cannot listen on" in refused.stderr
    wait_for("the manager serves", lambda: node.run("node", "ls").returncode == 0)
    assert "Swarm: active" in node.ok("info")


def test_node_with_damaged_state_can_be_left_and_its_tasks_end(node: Node) -> None:
    seconds = f"88{os.getpid()}"
    run_task(node, seconds)
    assert processes(seconds)
    node.stop()
    (node.folder / "state/manager/store.db").write_bytes(b"nonsense")
    node.start()
    wait_for("the error is told", lambda: "is damaged" in node.run("info").stdout)
    assert processes(seconds)
    node.ok("swarm", "leave", "--force")
    assert not processes(seconds)
    assert "Swarm: inactive" in node.ok("info")


def test_node_whose_task_records_cannot_be_read_can_be_left_by_force(node: Node) -> None:
    node.stop()
    worker = node.folder / "state/worker"
    (node.folder / "state/manager/store.db").write_bytes(b"nonsense")
    worker.rename(worker.with_name("kept"))
    worker.write_text("not a folder")
    node.start()
    wait_for("the error is told", lambda: "cannot be opened" in node.run("info").stdout)
    node.ok("swarm", "leave", "--force")
    assert "Swarm: inactive" in node.ok("info")
    worker.unlink()


async def test_manager_that_was_off_past_its_certificates_end_issues_itself_a_new_one(
    tmp_path: Path,
) -> None:
    node = Node(tmp_path, "n1", "127.0.0.1")
    state, address = node.folder / "state", f"{node.address}:{node.port}"
    state.mkdir()
    long_ago = ManualClock(SystemClock().now_ns() - 100 * 86400 * SECOND_NS)
    identity = await found(
        Settings(state, "n1", "", ("process",), free_port(node.address), {}),
        InitRequest(),
        listen_addr=address,
        advertise_addr=address,
        clock=long_ago,
        rng=seeded_rng(1),
        vault=(vault := Vault(state / "node.key")),
    )
    ids.save(state, identity, vault)
    try:
        node.start()
        wait_for("the node is ready", lambda: "Ready" in node.run("node", "ls").stdout)
        renewed = ids.load(state)
        assert renewed is not None and renewed.certificate_pem != identity.certificate_pem
    finally:
        node.close()
