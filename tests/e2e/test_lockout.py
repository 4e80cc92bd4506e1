"""A node that was removed is out at once: its session, its streams, and every further call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import identity as ids
from swarm import errors
from swarm.rpc import Method
from swarm.v1 import services as sv
from tests.e2e.cluster import wait_for
from tests.e2e.local import BIN, Node
from tests.integration.ca.test_authority import call

SLEEP_S = str(400_000 + os.getpid())
METHODS = tuple(
    method
    for table in (sv.DISPATCHER_METHODS, sv.CERTIFICATES_METHODS, sv.CONTROL_METHODS)
    for method in table
)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    made = tuple(Node(tmp_path, name, f"127.0.9.{n}") for n, name in ((21, "m"), (22, "w")))
    manager, worker = made
    for node in made:
        node.start()
    manager.init()
    worker.join(manager)
    yield manager, worker
    for node in (worker, manager):
        with contextlib.suppress(subprocess.SubprocessError):
            node.close()


async def refusal(identity: ids.Identity, address: str, method: Method) -> errors.SwarmError:
    """What the manager answers to a call with this node's certificate."""
    with pytest.raises(errors.SwarmError) as caught:
        await call(identity.channel(address), method)
    return caught.value


def test_removed_node_is_locked_out_at_once(nodes: tuple[Node, Node]) -> None:
    manager, worker = nodes
    where = f"{manager.address}:{manager.port}"
    manager.ok(
        *("service", "create", "--name", "web", "--constraint", "node.role==worker"),
        *("--stop-grace-period", "500ms"),
        *("--runtime", "process", "sh", "-c", f"echo begun; exec sleep {SLEEP_S}"),
    )
    following = subprocess.Popen(
        [BIN / "swarmctl", "--host", f"unix://{manager.socket}", "service", "logs", "-f", "web"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert following.stdout is not None
    assert "begun" in following.stdout.readline()
    identity = ids.load(worker.folder / "state")
    assert identity is not None
    manager.ok("node", "rm", "--force", "w")
    for method in METHODS:
        answer = asyncio.run(refusal(identity, where, method))
        assert isinstance(answer, errors.Denied), (method.path, answer)
    wait_for("its session has ended", lambda: "removed from the cluster" in worker.ok("info"))
    wait_for("its tasks have ended", lambda: not sleeping())
    following.terminate()
    following.wait(timeout=10)
    following.stdout.close()
    assert "w" not in manager.ok("node", "ls", "--format", "{{.Hostname}}").split()
    worker.stop()
    worker.start()
    wait_for("it stays out", lambda: "removed from the cluster" in worker.ok("info"))
    worker.ok("swarm", "leave")
    worker.join(manager)
    listed = ("node", "ls", "--format", "{{.Hostname}} {{.Status}}")
    wait_for("it is back as a new node", lambda: "w Ready" in manager.ok(*listed))


def sleeping() -> bool:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes() == f"sleep\0{SLEEP_S}\0".encode():
                return True
    return False
