"""A manager whose keys at rest need the unlock key: real daemons on this machine's loopback."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import identity as ids
from swarm import tls
from tests.e2e.cluster import wait_for
from tests.e2e.local import BIN, Node

SLEEP_S = str(300_000 + os.getpid())
LOCKED = (
    "Swarm is encrypted and needs to be unlocked before it can be used. "
    'Please use "swarmctl swarm unlock" to unlock it.'
)
KEY = re.compile(r"SWMKEY-1-[A-Za-z0-9+/]{43}")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path, "m", "127.0.9.11")
    made.start()
    yield made
    with contextlib.suppress(subprocess.SubprocessError):
        made.close()


def init(node: Node, *words: str) -> str:
    where = f"{node.address}:{node.port}"
    return node.ok("swarm", "init", "--listen-addr", where, "--advertise-addr", where, *words)


def key_in(text: str) -> str:
    found = KEY.search(text)
    assert found, text
    return found[0]


def state(node: Node) -> str:
    return node.ok("info", "--format", "{{.Swarm.LocalNodeState}}").strip()


def restart(node: Node, number: int = signal.SIGKILL) -> None:
    node.stop(number)
    node.start()


def unlock(node: Node, key: str) -> subprocess.CompletedProcess[str]:
    return node.run("swarm", "unlock", stdin=key + "\n")


def pem_body(pem: str) -> bytes:
    """The longest line of a key in PEM."""
    return max(pem.encode().splitlines(), key=len)


def holders(folder: Path, *secrets: bytes) -> list[tuple[str, bytes]]:
    """Files below the folder that hold one of the secrets, as it is, in base 64 or in hex."""
    forms = [f for s in secrets for f in (s, base64.b64encode(s), s.hex().encode())]
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            found += [(path.name, form) for form in forms if form in data]
    return found


def test_manager_is_locked_after_a_restart_until_it_is_given_the_key(node: Node) -> None:
    key = key_in(init(node, "--autolock"))
    node.ok(
        *("service", "create", "--name", "web", "--runtime", "process", "sleep", SLEEP_S),
    )
    done = node.run("secret", "create", "hush", "-", stdin="the secret itself")
    assert done.returncode == 0, done.stderr
    restart(node)
    assert state(node) == "locked"
    for words in (("node", "ls"), ("service", "ls"), ("swarm", "join-token", "worker")):
        refused = node.run(*words)
        assert (refused.returncode, refused.stderr) == (9, f"Error: {LOCKED}\n")
    assert node.run("swarm", "init").returncode == 5
    leaving = node.run("swarm", "leave")
    assert "Please unlock it first or use `--force`" in leaving.stderr
    wrong = unlock(node, "SWMKEY-1-" + "A" * 43)
    assert wrong.returncode == 8
    assert "swarm could not be unlocked: invalid key provided" in wrong.stderr
    assert unlock(node, "nonsense").returncode == 8
    assert state(node) == "locked"
    assert unlock(node, key).returncode == 0
    assert "Ready" in node.ok("node", "ls")
    assert "swarm is not locked" in unlock(node, key).stderr
    wait_for(
        "the task is found again",
        lambda: "Running" in node.ok("service", "ps", "web", "--format", "{{.CurrentState}}"),
    )
    assert node.ok("swarm", "unlock-key", "-q").strip() == key


def test_nothing_secret_lies_in_the_state_folder_while_locked(node: Node) -> None:
    init(node)
    folder = node.folder / "state"
    node_key = pem_body((ids.load(folder) or pytest.fail("no identity")).key_pem)
    tokens = [node.ok("swarm", "join-token", "-q", role).strip() for role in ("worker", "manager")]
    assert node.run("secret", "create", "hush", "-", stdin="the secret itself").returncode == 0
    own_pem, own_key = tls.new_root(now_ns=time.time_ns(), cluster_id="x")
    for name, text in (("ca.pem", own_pem), ("ca.key", own_key)):
        (node.folder / name).write_text(text)
    node.ok(
        "swarm",
        "ca",
        "--rotate",
        "--ca-cert",
        node.folder / "ca.pem",
        "--ca-key",
        node.folder / "ca.key",
    )
    after = (ids.load(folder) or pytest.fail("no identity")).key_pem
    known = [
        *(node_key, pem_body(after), pem_body(own_key), b"the secret itself"),
        *(tls.JoinToken.parse(t).secret.encode() for t in tokens),
        tls.JoinToken.parse(node.ok("swarm", "join-token", "-q", "worker")).secret.encode(),
    ]
    node.ok("service", "create", "--name", "web", "--runtime", "process", "sleep", SLEEP_S)
    assert holders(folder, *known) == [], "sealed even before it is locked"
    key = key_in(node.ok("swarm", "update", "--autolock"))
    vault_key = base64.b64decode(key.removeprefix("SWMKEY-1-") + "=")
    for number in (signal.SIGKILL, signal.SIGTERM):
        restart(node, number)
        assert state(node) == "locked"
        assert holders(folder, *known, key.encode(), vault_key) == []
        assert '"key"' not in (folder / "node.key").read_text()
        assert b"PRIVATE KEY" not in b"".join(
            p.read_bytes() for p in folder.rglob("*") if p.is_file()
        )
        assert unlock(node, key).returncode == 0
    node.ok("swarm", "update", "--autolock=false")
    restart(node)
    assert state(node) in ("active", "pending")
    wait_for("the manager serves", lambda: node.run("node", "ls").returncode == 0)


def test_a_new_key_is_the_only_one_once_it_was_shown(node: Node) -> None:
    first = key_in(init(node, "--autolock"))
    refused = node.run("swarm", "update", "--autolock=false")
    assert refused.returncode == 0
    assert "cannot rotate because autolock is not turned on" in (
        node.run("swarm", "unlock-key", "--rotate").stderr
    )
    assert "no unlock key is set" in node.run("swarm", "unlock-key").stderr
    second = key_in(node.ok("swarm", "update", "--autolock"))
    assert second != first
    third = key_in(node.ok("swarm", "unlock-key", "--rotate"))
    restart(node)
    for old in (first, second):
        assert unlock(node, old).returncode == 8
    assert unlock(node, third).returncode == 0


def test_a_key_that_nobody_was_given_locks_nobody_out(node: Node) -> None:
    """As when swarmctl is killed before it has shown the key."""
    first = key_in(init(node, "--autolock"))
    calls = (
        "import asyncio, sys\n"
        "from swarm.rpc import Channel\n"
        "from swarm.v1 import GetUnlockKeyRequest\n"
        "from swarm.v1.services import ControlClient\n"
        "async def main():\n"
        f"    async with Channel.unix({str(node.socket)!r}) as channel:\n"
        "        await ControlClient(channel).get_unlock_key(GetUnlockKeyRequest(rotate=True))\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([BIN / "python", "-c", calls], check=True, timeout=30)
    restart(node)
    assert unlock(node, first).returncode == 0
    second = node.ok("swarm", "unlock-key", "-q").strip()
    assert second != first
    restart(node)
    assert unlock(node, first).returncode == 8, "the second was shown"
    assert unlock(node, second).returncode == 0


def test_a_worker_needs_no_key(node: Node, tmp_path: Path) -> None:
    init(node, "--autolock")
    worker = Node(tmp_path, "w", "127.0.9.12")
    worker.start()
    try:
        worker.join(node)
        restart(worker)
        wait_for("it is back", lambda: "Connected: true" in worker.ok("info"))
        assert not (worker.folder / "state/node.key").exists()
    finally:
        worker.close()


def test_a_locked_manager_can_be_left_by_force(node: Node) -> None:
    init(node, "--autolock")
    restart(node)
    node.ok("swarm", "leave", "--force")
    assert state(node) == "inactive"
    assert not (node.folder / "state/node.key").exists()
    init(node)
    assert "Ready" in node.ok("node", "ls")


@pytest.mark.long
def test_killed_at_any_moment_some_key_that_was_shown_unlocks(node: Node) -> None:
    """kill -9 in the midst of turning autolock on and off and of changing the key, AUTOLOCK_TURNS
    times.
    """
    init(node)
    rng = random.Random(7)
    shown = [""]
    for turn in range(int(os.environ.get("AUTOLOCK_TURNS", "6"))):
        words = rng.choice(
            (
                ("swarm", "update", "--autolock"),
                ("swarm", "unlock-key", "--rotate"),
                ("swarm", "update", "--autolock=false"),
            )
        )
        command = subprocess.Popen(
            [BIN / "swarmctl", "--host", f"unix://{node.socket}", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        # The command takes some 0.3 s to start; the calls themselves a few milliseconds.
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(timeout=rng.uniform(0.2, 0.7))
        restart(node)
        shown += KEY.findall(command.communicate(timeout=30)[0])
        if state(node) == "locked":
            fits = [k for k in reversed(shown) if k and unlock(node, k).returncode == 0]
            assert fits, f"turn {turn}: {words}: none of the keys that were shown unlocks"
        wait_for("the manager serves", lambda: node.run("node", "ls").returncode == 0)
