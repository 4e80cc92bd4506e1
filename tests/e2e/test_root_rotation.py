"""The root CA is replaced while everything goes on: real daemons on this machine's loopback."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from agent import identity as ids
from swarm import tls
from swarm.clock import SystemClock
from tests.e2e.cluster import wait_for
from tests.e2e.local import BIN, Node

SLEEP_S = str(200_000 + os.getpid())


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[int], list[Node]]]:
    """Makes a manager with so many workers, each on an address of its own."""
    made: list[Node] = []

    def nodes(workers: int) -> list[Node]:
        for number in range(workers + 1):
            node = Node(tmp_path, f"n{number}", f"127.0.9.{number + 1}")
            made.append(node)
            node.start()
            if number:
                node.join(made[0])
            else:
                node.init()
        return made

    yield nodes
    for node in reversed(made):
        with contextlib.suppress(subprocess.SubprocessError):
            node.close()


def roots(node: Node) -> tuple[str, ...]:
    """The roots that the cluster trusts now."""
    return tls.split_pem(node.ok("swarm", "ca"))


def identity(node: Node) -> ids.Identity:
    found = ids.load(node.folder / "state")
    assert found is not None
    return found


def token(node: Node) -> str:
    return node.ok("swarm", "join-token", "-q", "worker").strip()


def sleepers() -> set[int]:
    """The tasks' processes."""
    out = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"sleep\0" + SLEEP_S.encode() in (entry / "cmdline").read_bytes():
                out.add(int(entry.name))
    return out


def run_tasks(manager: Node) -> None:
    manager.ok(
        *("service", "create", "--name", "web", "--mode", "global", "--runtime", "process"),
        *("sh", "-c", f"echo begun; exec sleep {SLEEP_S}"),
    )


def test_all_nodes_move_to_the_new_root_and_nothing_is_interrupted(
    make: Callable[[int], list[Node]],
) -> None:
    manager, *workers = nodes = make(2)
    # Nodes that are started anew take their time on a busy machine.
    manager.ok("swarm", "update", "--dispatcher-heartbeat", "20s")
    run_tasks(manager)
    pids = sleepers()
    assert len(pids) == 3
    old_roots, old_token = roots(manager), token(manager)
    states: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            states.update(manager.ok("node", "ls", "--format", "{{.Status}}").split())

    watching = threading.Thread(target=watch)
    following = subprocess.Popen(
        [BIN / "swarmctl", "--host", f"unix://{manager.socket}", "service", "logs", "-f", "web"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    assert "begun" in following.stdout.readline()
    watching.start()
    try:
        rotated = manager.run("swarm", "ca", "--rotate", "--timeout", "30s")
    finally:
        done.set()
        watching.join()
    assert rotated.returncode == 0, rotated.stderr
    assert "3 of 3 nodes have a certificate of the new root" in rotated.stderr
    new_roots = roots(manager)
    assert tls.split_pem(rotated.stdout) == new_roots
    assert len(new_roots) == 1
    assert new_roots != old_roots
    assert states == {"Ready"}, "no node was down at any time"
    assert sleepers() == pids, "no task was touched"
    assert following.poll() is None, "the stream of logs stands"
    following.terminate()
    following.wait(timeout=10)
    following.stdout.close()
    assert "session_ended" not in manager.log.read_text()

    def dropped(node: Node) -> bool:
        return tls.split_pem(identity(node).root_ca_pem) == new_roots

    for node in nodes:
        wait_for(f"{node.name} has dropped the old root", partial(dropped, node))
        assert not identity(node).outdated
    # Connections that are made from now on.

    def connected(node: Node) -> bool:
        return "Connected: true" in node.ok("info")

    for worker in workers:
        worker.stop()
        worker.start()
        wait_for("the session stands", partial(connected, worker))
    assert sleepers() == pids
    # Old tokens are void, new ones work.
    fresh = token(manager)
    assert fresh != old_token
    workers[0].ok("swarm", "leave")
    refused = workers[0].run(
        "swarm", "join", "--token", old_token, f"{manager.address}:{manager.port}"
    )
    assert refused.returncode != 0
    assert "root certificate was rotated" in refused.stderr
    workers[0].join(manager)


def test_node_that_is_down_holds_up_the_end_until_it_is_back_or_removed(
    make: Callable[[int], list[Node]],
) -> None:
    manager, back, gone = make(2)
    first = roots(manager)
    for node in (back, gone):
        node.stop()
    down = ("node", "ls", "--format", "{{.Hostname}} {{.Status}}")
    wait_for("both are down", lambda: manager.ok(*down).count("Down") == 2)
    begun = manager.run("swarm", "ca", "--rotate", "--timeout", "2s")
    assert begun.returncode == 6, begun.stderr
    assert "1 of 3 nodes have a certificate of the new root; waiting for n1 (down), n2 (down)" in (
        begun.stderr
    )
    second = roots(manager)
    assert second[1:] == first
    manager.stop()
    manager.start()
    wait_for("the manager serves", lambda: manager.run("node", "ls").returncode == 0)
    assert roots(manager) == second, "a restart forgets nothing of it"
    again = manager.run("swarm", "ca", "--rotate", "--timeout", "2s")
    assert again.returncode == 6, again.stderr
    third = roots(manager)
    assert third[0] not in second
    assert third[1:2] == first, "what every node trusts is kept"
    # Knows the first root only, and gets on by way of the cross-signed one.
    assert tls.split_pem(identity(back).root_ca_pem) == first
    back.start()
    wait_for("n1 has moved", lambda: not identity(back).outdated and manager_of(back) == third[0])
    assert len(roots(manager)) > 1
    gone_id = manager.ok("node", "inspect", "n2", "--format", "{{.ID}}").strip()
    manager.ok("node", "rm", gone_id)
    wait_for("the rotation is over", lambda: roots(manager) == third[:1])
    gone.start()
    why = "was rotated, and this side missed it; leave the swarm and join"
    wait_for("n2 says why it is not let in", lambda: why in gone.ok("info"))


def manager_of(node: Node) -> str:
    """The root that signs, as the node knows it."""
    return tls.split_pem(identity(node).root_ca_pem)[0]


def test_root_of_ones_own_becomes_the_clusters(
    make: Callable[[int], list[Node]], tmp_path: Path
) -> None:
    (manager,) = make(0)
    pem, key = tls.new_root(now_ns=SystemClock().now_ns(), cluster_id="ours")
    other = tls.new_key_pem()
    for name, text in (("ca.pem", pem), ("ca.key", key), ("other.key", other)):
        (tmp_path / name).write_text(text)
    words = ("swarm", "ca", "--rotate", "--ca-cert", tmp_path / "ca.pem", "--ca-key")
    refused = manager.run(*words, tmp_path / "other.key")
    assert refused.returncode == 2
    assert "the private key is not that of the certificate" in refused.stderr
    manager.ok(*words, tmp_path / "ca.key")
    assert roots(manager) == tls.split_pem(pem)
    assert "PRIVATE KEY" not in manager.ok("swarm", "ca")
    manager.ok("swarm", "ca", "--rotate")
    assert roots(manager) != tls.split_pem(pem), "and can be rotated away"


def test_contexts_follow_the_root_and_those_that_cannot_say_what_to_do(
    make: Callable[[int], list[Node]], tmp_path: Path
) -> None:
    (manager,) = make(0)
    env = {"SWARM_CONFIG": str(tmp_path / "config"), "SWARM_HOST": ""}
    host = f"tcp://{manager.address}:{manager.port}"
    for name in ("used", "forgotten"):
        done = manager.run("context", "create", name, "--host", host, env=env)
        assert done.returncode == 0, done.stderr
    used, forgotten = ({**env, "SWARM_CONTEXT": name} for name in ("used", "forgotten"))
    rotated = manager.run_bare("swarm", "ca", "--rotate", env=used)
    assert rotated.returncode == 0, rotated.stderr
    for _ in range(2):
        done = manager.run_bare("node", "ls", env=used)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    kept = json.loads((tmp_path / "config/contexts/used.json").read_text())
    assert tls.split_pem(kept["credentials"]["root_ca_pem"]) == roots(manager)
    refused = manager.run_bare("node", "ls", env=forgotten)
    assert refused.returncode == 8
    assert "was rotated, and this side missed it" in refused.stderr
    assert "swarmctl context create forgotten" in refused.stderr
