"""Roles on the loopback, with real etcd: what a node does when its role changes, when its manager
cannot be, and when it leaves.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.cluster import wait_for
from tests.e2e.local import Node
from tests.ports import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("etcd") is None, reason="needs etcd: deploy/test-tools.sh"),
]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    made = [Node(tmp_path, f"n{i}", f"127.0.0.{10 + i}") for i in (1, 2, 3)]
    try:
        for node in made:
            node.start()
        yield made
    finally:
        for node in reversed(made):
            node.close()


def form(nodes: list[Node], *roles: str, store: str = "etcd") -> None:
    """A cluster of the first node, which the others join."""
    first = nodes[0]
    first.init(store=store)
    # So that a node whose swarmd is away for some seconds is not taken for lost.
    first.ok("swarm", "update", "--dispatcher-heartbeat", "20s")
    for node, role in zip(nodes[1:], roles, strict=False):
        node.join(first, role)
    names = [n.name for n, r in zip(nodes[1:], roles, strict=False) if r == "manager"]
    wait_for("all managers are in", lambda: all(status(first, n) == "Reachable" for n in names))


def status(through: Node, name: str) -> str:
    """A node's manager status as another one sees it; empty for a worker."""
    done = through.run("node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    return lines.get(name, "").strip()


def wait_ready(through: Node, *names: str) -> None:
    def ready() -> bool:
        done = through.run("node", "ls", "--format", "{{.Hostname}} {{.Status}}")
        return {f"{n} Ready" for n in names} <= set(done.stdout.splitlines())

    wait_for(f"{names} are ready", ready)


def info(node: Node) -> dict[str, object]:
    swarm: dict[str, object] = json.loads(node.ok("info", "--format", "{{json .}}"))["Swarm"]
    return swarm


def serves(node: Node) -> bool:
    return info(node)["ControlAvailable"] is True


def identity(node: Node) -> dict[str, object]:
    found: dict[str, object] = json.loads((node.folder / "state/identity.json").read_text())
    return found


class Page:
    """A task on a node, its published port, and one connection to it that stays open."""

    def __init__(self, manager: Node, node: Node) -> None:
        self.port = free_port(node.address)
        server = 'exec python3 -m http.server --protocol HTTP/1.1 --bind "$SWARM_BIND_ADDR" "$PORT"'
        manager.ok(
            *("service", "create", "--name", "page", "--runtime", "process"),
            *("--constraint", f"node.hostname=={node.name}", "--publish", f"{self.port}:80"),
            *("sh", "-c", server),
        )
        self._connection = http.client.HTTPConnection(node.address, self.port, timeout=10)
        wait_for("the page answers", self._answers)
        self.connected_from = self._local()
        self.pid = self._pid()

    def _answers(self) -> bool:
        try:
            self._connection.request("HEAD", "/")
            answer = self._connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return False
        return answer.status == 200

    def _local(self) -> object:
        assert self._connection.sock is not None
        return self._connection.sock.getsockname()

    def _pid(self) -> int:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"http.server" in words and b"HTTP/1.1" in words:
                    return int(entry.name)
            except OSError:
                continue
        return 0

    def close(self) -> None:
        self._connection.close()

    def check_untouched(self) -> None:
        """The same process answers on the same connection."""
        assert self._answers(), "the connection was cut"
        assert self._local() == self.connected_from
        assert self._pid() == self.pid != 0

    def check_runs(self) -> None:
        """The same process answers; swarmd, through which connections go, was away."""
        wait_for("the page answers again", self._answers)
        self.connected_from = self._local()
        self.check_untouched()


@pytest.fixture
def pages() -> Iterator[Callable[[Node, Node], Page]]:
    """Makes a page through the first node, on the second."""
    made: list[Page] = []

    def make(manager: Node, node: Node) -> Page:
        made.append(Page(manager, node))
        return made[-1]

    yield make
    for page in made:
        page.close()


def test_worker_becomes_manager_and_worker_and_manager_and_its_tasks_notice_nothing(
    nodes: list[Node], pages: Callable[[Node, Node], Page]
) -> None:
    first, second, third = nodes
    form(nodes, "manager", "worker")
    page = pages(first, third)
    state = third.folder / "state"
    assert identity(third)["key_pem"] and not (state / "node.key").exists()
    for _ in range(2):
        first.ok("node", "promote", "n3")
        wait_for("n3 is a manager", lambda: status(second, "n3") == "Reachable")
        wait_for("it serves", partial(serves, third))
        assert "n2" in third.ok("node", "ls")
        page.check_untouched()
        assert not identity(third)["key_pem"], "a manager's key lies sealed"
        assert (state / "node.key").exists() and (state / "manager").exists()
        second.ok("node", "demote", "n3")
        wait_for("n3 is a worker", lambda: status(first, "n3") == "")
        wait_for("its state is gone", lambda: not (state / "manager").exists())
        page.check_untouched()
        assert identity(third)["key_pem"] and not (state / "node.key").exists()
        assert info(third)["LocalNodeState"] == "active"
        refused = third.run("node", "ls")
        assert refused.returncode == 9 and "promote the current node" in refused.stderr
    wait_ready(first, "n3")
    page.check_untouched()


@pytest.mark.long  # tests/e2e/test_managers.py asks for much of it
def test_killed_managers_come_back_and_a_demotion_meanwhile_is_made_up_for(
    nodes: list[Node], pages: Callable[[Node, Node], Page]
) -> None:
    first, second, third = nodes
    form(nodes, "manager", "manager")
    page = pages(first, third)
    for node in nodes:
        node.stop(signal.SIGKILL)
        node.start()
        wait_for(f"{node.name} serves", partial(serves, node))
        wait_ready(node, "n1", "n2", "n3")
    page.check_runs()
    third.stop(signal.SIGKILL)
    wait_for("its absence is known", lambda: status(first, "n3") == "Unreachable")
    first.ok("node", "demote", "n3")
    wait_for("it is let go", lambda: status(second, "n3") == "")
    third.start()
    wait_for("n3 is a worker", lambda: not (third.folder / "state/manager").exists())
    wait_ready(first, "n3")
    page.check_runs()


@pytest.mark.long  # tests/e2e/test_managers.py asks for much of it
def test_manager_leaves_by_force_after_it_has_handed_over(nodes: list[Node]) -> None:
    first, second, third = nodes
    form(nodes, "manager", "manager")
    refused = first.run("swarm", "leave")
    assert refused.returncode == 5
    assert "participating as a manager" in refused.stderr
    assert "which leaves 2 managers out of 2" in refused.stderr
    third.stop()
    wait_for("its absence is known", lambda: status(second, "n3") == "Unreachable")
    refused = first.run("swarm", "leave")
    assert "leaves 1 managers out of 2. Without a Raft quorum" in refused.stderr
    third.start()
    wait_for("n3 is back", lambda: status(second, "n3") == "Reachable")
    first.ok("swarm", "leave", "--force")
    assert info(first)["LocalNodeState"] == "inactive"
    assert not (first.folder / "state/manager").exists()
    assert status(second, "n1") == ""
    wait_for("another one leads", lambda: "Leader" in {status(second, n) for n in ("n2", "n3")})
    wait_for("its node is let go", lambda: second.run("node", "rm", "n1").returncode == 0)
    third.stop()
    unable = second.run("swarm", "leave", "--force")
    assert unable.returncode == 0, unable.stderr
    assert "swarmctl node demote n2" in unable.stderr
    third.start()


@pytest.mark.long  # tests/e2e/test_managers.py asks for much of it
def test_the_cluster_goes_on_alone_when_its_other_managers_are_lost(
    nodes: list[Node], pages: Callable[[Node, Node], Page]
) -> None:
    first, second, third = nodes
    form(nodes, "manager", "manager")
    page = pages(first, third)
    refused = third.run("swarm", "init", "--force-new-cluster")
    assert refused.returncode == 5 and "3 of its 3 managers" in refused.stderr
    for node in (first, second):
        node.stop(signal.SIGKILL)
    wait_for("there is no quorum", lambda: third.run("node", "promote", "n1").returncode != 0)
    where = f"{third.address}:{free_port(third.address)}"
    third.ok(
        *("swarm", "init", "--force-new-cluster"),
        *("--listen-addr", where, "--advertise-addr", where),
    )
    assert identity(third)["advertise_addr"] == where
    assert status(third, "n3") == "Leader"
    page.check_runs()
    for node in (first, second):
        node.start()
        node.run("swarm", "leave", "--force")
    wait_ready(third, "n3")
    page.check_untouched()


@pytest.mark.long  # tests/e2e/test_managers.py asks for much of it
def test_manager_that_cannot_serve_leaves_its_worker_alone(
    nodes: list[Node], pages: Callable[[Node, Node], Page]
) -> None:
    first, _, third = nodes
    form(nodes, "manager", "manager")
    page = pages(first, third)
    third.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((third.address, third.port))
        other.listen()
        third.start()
        wait_for("the error is told", lambda: "cannot listen on" in third.run("info").stdout)
        wait_ready(first, "n3")
        told = info(third)
        assert told["ControlAvailable"] is False and told["LocalNodeState"] == "error"
        page.check_runs()
        refused = third.run("service", "ls")
        assert refused.returncode == 9 and "cannot listen on" in refused.stderr
    wait_for("it serves", partial(serves, third), timeout_s=60)
    page.check_untouched()


def test_a_join_goes_on_until_its_manager_can_serve(nodes: list[Node]) -> None:
    first, _, third = nodes
    form(nodes)
    token = first.ok("swarm", "join-token", "-q", "manager").strip()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((third.address, third.port))
        other.listen()
        words = ("swarm", "join", "--token", token, *third.at, f"{first.address}:{first.port}")
        joining = threading.Thread(target=lambda: codes.append(third.run(*words).returncode))
        codes: list[int] = []
        joining.start()
        wait_for("the reason is told", lambda: "cannot listen on" in str(info(third)["Error"]))
        told = info(third)
        assert told["LocalNodeState"] == "pending" and told["ControlAvailable"] is False
        assert joining.is_alive()
    joining.join()
    assert codes == [0]
    assert info(third)["LocalNodeState"] == "active" and serves(third)


def test_node_without_etcd_does_not_come_in_as_a_manager(
    nodes: list[Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, third = nodes
    form(nodes, store="embedded")
    token = first.ok("swarm", "join-token", "-q", "manager").strip()
    third.stop()
    without = tmp_path / "empty"
    without.mkdir()
    hidden = ("unshare", "-m", "sh", "-c", 'mount --bind "$0" /usr/bin/etcd && exec "$@"')
    if os.geteuid() != 0:
        pytest.skip("needs root, to hide etcd from one swarmd")
    (without / "etcd").touch(mode=0o644)
    third.wrapped = (*hidden, str(without / "etcd"))
    third.start()
    refused = third.run(
        "swarm", "join", "--token", token, *third.at, f"{first.address}:{first.port}"
    )
    assert refused.returncode == 12, refused.stderr
    assert "etcd" in refused.stderr and "install" in refused.stderr
    assert "n3" not in first.ok("node", "ls"), "no phantom of it stays behind"
    assert "Swarm: inactive" in third.ok("info")
    assert first.run("node", "ls").returncode == 0
    third.join(first)
    refused = first.run("node", "promote", "n3")
    assert refused.returncode == 12 and "no etcd on n3" in refused.stderr


def test_second_manager_moves_the_state_and_no_task_notices(
    nodes: list[Node], pages: Callable[[Node, Node], Page]
) -> None:
    first, second, _ = nodes
    form(nodes, store="embedded")
    page = pages(first, first)
    second.join(first, "manager")
    wait_for("it is in", lambda: status(first, "n2") == "Reachable")
    page.check_untouched()
    stored = subprocess.run(
        ["ls", first.folder / "state/manager"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "store.db" not in stored and "etcd" in stored
