"""A cluster that is lost and comes back from its backup, and the trail of who did what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from swarm.rpc import Channel
from swarm.v1 import RestoreRequest, RestoreStart
from swarm.v1.services import LocalClient
from tests.e2e.cluster import wait_for
from tests.e2e.local import BIN, Node
from tests.e2e.test_membership import processes

# Told apart from the tasks of other tests by how long they sleep.
SECONDS = f"77{os.getpid()}"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, "m", "127.0.0.1")
    with contextlib.closing(node):
        node.start()
        node.init()
        yield node


@pytest.fixture
def worker(tmp_path: Path, manager: Node) -> Iterator[Node]:
    node = Node(tmp_path, "w", "127.0.0.2")
    with contextlib.closing(node):
        node.start()
        node.join(manager)
        yield node


def run_tasks(manager: Node, replicas: int, *more: str) -> None:
    manager.ok(
        *("service", "create", "--runtime", "process", "--name", "web"),
        *("--replicas", str(replicas), *more, "sleep", SECONDS),
    )


def tasks(manager: Node) -> set[str]:
    words = ("service", "ps", "-q", "--no-trunc", "--filter", "desired-state=running", "web")
    return set(manager.ok(*words).split())


def address(node: Node) -> tuple[str, ...]:
    where = f"{node.address}:{node.port}"
    return ("--listen-addr", where, "--advertise-addr", where)


def lose(manager: Node) -> None:
    """The machine's disk is gone; what ran on it as well."""
    manager.run("swarm", "leave", "--force")
    manager.stop(signal.SIGKILL)
    shutil.rmtree(manager.folder / "state")
    manager.start()


def all_running(manager: Node, count: int) -> bool:
    lines = manager.run("service", "ps", "--format", "{{.CurrentState}}", "web").stdout.splitlines()
    return sum(line.startswith("Running") for line in lines) == count


def test_lost_manager_comes_back_and_its_workers_tasks_run_on(
    manager: Node, worker: Node, tmp_path: Path
) -> None:
    manager.run("secret", "create", "s1", "-", stdin="top secret")
    manager.ok("node", "update", "--availability", "drain", "m")
    run_tasks(manager, 3, "--secret", "s1")
    before, pids = tasks(manager), sorted(processes(SECONDS))
    token = manager.ok("swarm", "join-token", "-q", "worker")
    file = tmp_path / "b.swarm"
    manager.ok("swarm", "backup", file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert "The backup is whole" in manager.ok("swarm", "backup", "--verify", file)

    lose(manager)
    answer = manager.ok("swarm", "restore", *address(manager), file)
    assert "this node" in answer and f"{manager.address}:{manager.port}" in answer
    wait_for("the worker is back", lambda: "Connected: true" in worker.ok("info"))
    wait_for("all tasks run", lambda: all_running(manager, 3))
    assert tasks(manager) == before
    assert sorted(processes(SECONDS)) == pids  # adopted, none started twice
    assert manager.ok("swarm", "join-token", "-q", "worker") == token
    # The cluster works: the secret opens, and new tasks are started.
    manager.ok("service", "scale", "web=5")
    assert len(processes(SECONDS)) == 5
    revision = int(json.loads(manager.ok("service", "inspect", "web"))[0]["Version"]["Index"])
    assert revision > 1_000_000_000


def test_damaged_state_is_restored_in_place_and_the_nodes_own_tasks_run_on(
    manager: Node, tmp_path: Path
) -> None:
    run_tasks(manager, 2)
    before, pids = tasks(manager), sorted(processes(SECONDS))
    (tmp_path / "pass").write_text("correct horse\n")
    seal = ("--passphrase-file", tmp_path / "pass")
    file = tmp_path / "b.swarm"
    manager.ok("swarm", "backup", *seal, file)
    assert b"PRIVATE KEY" not in file.read_bytes()
    manager.stop()
    (manager.folder / "state/manager/store.db").write_bytes(b"nonsense")
    manager.start()
    wait_for("the damage is told", lambda: "is damaged" in manager.run("info").stdout)

    refused = manager.run("swarm", "restore", file)
    assert refused.returncode == 8 and "--passphrase-file" in refused.stderr
    manager.ok("swarm", "restore", *seal, file)
    wait_for("all tasks run", lambda: all_running(manager, 2))
    assert tasks(manager) == before
    assert sorted(processes(SECONDS)) == pids
    assert (manager.folder / "state/manager.old-1/store.db").read_bytes() == b"nonsense"
    manager.stop()
    manager.start()
    wait_for("it starts again", lambda: manager.run("node", "ls").returncode == 0)


def test_what_cannot_be_restored_changes_nothing(manager: Node, tmp_path: Path) -> None:
    file = tmp_path / "b.swarm"
    manager.ok("swarm", "backup", file)
    again = manager.run("swarm", "backup", file)
    assert again.returncode == 5 and "--force" in again.stderr

    refused = manager.run("swarm", "restore", file)
    assert refused.returncode == 5 and "already part of a swarm" in refused.stderr

    manager.ok("swarm", "leave", "--force")
    data = file.read_bytes()
    cut, changed = tmp_path / "cut", tmp_path / "changed"
    cut.write_bytes(data[:-20])
    changed.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    for damaged in (cut, changed):
        # The client says so before it sends anything; the daemon, when it is given a pipe.
        for words in ((damaged,), ("-",)):
            with damaged.open() if words == ("-",) else contextlib.nullcontext():
                stdin = damaged.read_bytes().decode("latin-1") if words == ("-",) else None
                done = _restore(manager, words, stdin)
            assert done[0] == 2 and "is damaged at byte" in done[1], done
            assert "Swarm: inactive" in manager.ok("info")
            assert not list((manager.folder / "state").glob("manager*"))

    taken = manager.run("swarm", "restore", "--listen-addr", "192.0.2.1:9", file)
    assert taken.returncode == 9 and "nothing was changed" in taken.stderr
    assert "Swarm: inactive" in manager.ok("info")
    assert not list((manager.folder / "state").glob("manager*"))
    assert not (manager.folder / "state/identity.json").exists()


async def test_client_that_goes_away_in_the_middle_leaves_nothing(
    manager: Node, tmp_path: Path
) -> None:
    file = tmp_path / "b.swarm"
    manager.ok("swarm", "backup", file)
    manager.ok("swarm", "leave", "--force")
    half = file.read_bytes()[:-100]
    making = manager.folder / "state/manager.restoring"
    answered = asyncio.Semaphore(0)

    async def messages() -> AsyncIterator[RestoreRequest]:
        yield RestoreRequest(start=RestoreStart())
        await answered.acquire()
        yield RestoreRequest(data=half)
        await asyncio.Event().wait()

    async with Channel.unix(str(manager.socket)) as channel:
        stream = LocalClient(channel).restore(messages())
        await anext(stream)
        answered.release()
        assert (await anext(stream)).bytes == len(half)
        assert making.exists()
    async with asyncio.timeout(20):
        while making.exists():
            await asyncio.sleep(0.05)
    manager.ok("swarm", "restore", *address(manager), file)


def _restore(node: Node, words: tuple[str | Path, ...], stdin: str | None) -> tuple[int, str]:
    done = subprocess.run(
        [BIN / "swarmctl", "--host", f"unix://{node.socket}", "swarm", "restore", *words],
        input=stdin.encode("latin-1") if stdin is not None else None,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr.decode()


def test_force_new_cluster_says_what_to_do_instead(tmp_path: Path) -> None:
    node = Node(tmp_path, "m", "127.0.0.1")
    with contextlib.closing(node):
        node.start()
        done = node.run("swarm", "init", "--force-new-cluster", *address(node))
        assert done.returncode == 5 and "leave the flag out" in done.stderr
        node.init()
        done = node.run("swarm", "init", "--force-new-cluster")
        assert done.returncode == 5 and "swarmctl swarm restore FILE" in done.stderr
        node.ok("node", "ls")


def test_every_change_is_on_record_with_who_and_where_and_survives_a_crash(
    manager: Node, tmp_path: Path
) -> None:
    run_tasks(manager, 1)
    manager.run("secret", "create", "s1", "-", stdin="top secret")
    assert manager.run("service", "rm", "nothing").returncode == 4
    manager.stop(signal.SIGKILL)
    manager.start()
    wait_for("it answers", lambda: manager.run("node", "ls").returncode == 0)
    form = "{{.Who}}|{{.From}}|{{.What}}|{{.Kind}}|{{.Name}}|{{.Outcome}}"
    lines = manager.ok("swarm", "audit", "--format", form).splitlines()
    assert "local|unix:|create|service|web|done" in lines
    assert "local|unix:|create|secret|s1|done" in lines
    assert "local|unix:|Remove|||failed: NotFound" in lines
    assert lines[0].startswith("local|unix:|init|cluster|")
    files = list((manager.folder / "state/audit").iterdir())
    assert files and not any(b"top secret" in f.read_bytes() for f in files)
    only = manager.ok("swarm", "audit", "--filter", "kind=secret", "--since", "1h", "-n", "5")
    assert "s1" in only and "web" not in only


def test_audit_log_is_copied_and_denied_calls_are_in_it(tmp_path: Path) -> None:
    manager, worker = Node(tmp_path, "m", "127.0.0.1"), Node(tmp_path, "w", "127.0.0.2")
    copy = tmp_path / "audit.jsonl"
    manager.extra = ("--audit-log", str(copy))
    with contextlib.closing(manager), contextlib.closing(worker):
        manager.start()
        worker.start()
        manager.init()
        worker.join(manager)
        # A node that was removed by force goes on asking.
        manager.ok("node", "rm", "--force", "w")
        worker.stop()
        worker.start()

        def denied() -> list[dict[str, str]]:
            records = [json.loads(line) for line in copy.read_text().splitlines()]
            return [r for r in records if r["outcome"] == "denied"]

        wait_for("a denied call is on record", denied)
        record = denied()[0]
        assert record["who"].startswith("worker ") and "was removed" in record["error"]
        assert record["peer"].startswith("ipv4:127.0.0.")
        assert "join-worker" in manager.ok(
            "swarm", "audit", "--filter", "what=join", "--filter", "kind=node"
        )


def test_events_show_the_past_and_who_asked(manager: Node) -> None:
    run_tasks(manager, 1)
    lines = manager.ok("events", "--since", "10m", "--until", "0s", "--no-tasks").splitlines()
    created = [line for line in lines if " service create " in line]
    assert len(created) == 1 and "name=web, who=local)" in created[0]
    assert manager.ok("events", "--since", "10m", "--until", "9m") == ""


def told(node: Node) -> str:
    """What `info` says, warnings as well."""
    done = node.run("info")
    return done.stdout + done.stderr


def test_full_disk_under_the_trail_keeps_no_change_from_being_made(manager: Node) -> None:
    """A file in place of its folder: every write of the trail fails."""
    manager.stop()
    audit = manager.folder / "state/audit"
    shutil.rmtree(audit)
    audit.write_text("not a folder")
    manager.start()
    wait_for("it answers", lambda: manager.run("node", "ls").returncode == 0)
    run_tasks(manager, 1)
    assert all_running(manager, 1)
    wait_for(
        "the problem is told",
        lambda: "audit records cannot be written" in told(manager),
    )
    audit.unlink()
    wait_for("what waited is written", lambda: "web" in manager.run("swarm", "audit").stdout)
    assert "audit records cannot" not in told(manager)
