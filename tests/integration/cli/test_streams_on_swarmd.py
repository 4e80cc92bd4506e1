"""exec, logs, top and cp in a real terminal, against a swarmd whose tasks are processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import wait_for
from tests.e2e.local import BIN, Node
from tests.integration.cli.screen import ScreenProcess

pytestmark = pytest.mark.slow
SHELL = ("/bin/sh", "-c")
COUNTING = 'n=0; while :; do n=$((n+1)); echo "line $n"; sleep 0.05; done'


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    made = Node(tmp_path_factory.mktemp("streams"), "alpha", "127.0.0.23")
    with contextlib.closing(made):
        made.start()
        made.init()
        create = ("service", "create", "-q", "--runtime", "process")
        made.ok(*create, "--name", "count", *SHELL, COUNTING)
        made.ok(*create, "--name", "idle", "--replicas", "2", "sleep", "100000")
        yield made


def terminal(node: Node, *words: str, rows: int = 24, columns: int = 80) -> ScreenProcess:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [str(BIN / "swarmctl"), "--host", f"unix://{node.socket}", *words]
    return ScreenProcess(command, kept | {"PS1": "ready> "}, rows=rows, columns=columns)


def piped(node: Node, *words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [str(BIN / "swarmctl"), "--host", f"unix://{node.socket}", *words]
    return subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)


def test_exec_is_a_terminal_of_its_own(node: Node) -> None:
    shell = ("exec", "-it", "-e", "PS1=there> ", "-e", "GREETING=hello you", "-w", "/", "idle.1")
    with terminal(node, *shell, "/bin/sh") as process:
        before = process.modes()
        process.see_text("there>")
        process.send(b'echo "$GREETING from $PWD"; stty size\n')
        process.see_text("hello you from /")
        process.see(lambda lines: "24 80" in lines)
        process.resize(40, 132)
        process.send(b"stty size\n")
        process.see(lambda lines: "40 132" in lines)
        process.send(b'echo be""gun; sleep 1000\n')
        process.see_text("begun")
        process.send(b"\x03")  # ends the sleep, neither the shell nor swarmctl
        process.see(lambda lines: [line for line in lines if line][-1] == "there>")
        process.send(b"echo still $((40 + 2))\n")
        process.see_text("still 42")
        process.send(b"exit 7\n")
        assert process.wait() == 7
        assert process.modes() == before


def test_exec_can_be_left(node: Node) -> None:
    # A task of the process runtime has a /tmp of its own.
    with terminal(node, "exec", "-it", "idle.1", "/bin/sh") as process:
        process.see_text("#")
        process.send(b"(sleep 1; echo late; echo done > /tmp/left)\n")
        process.see_text("echo done")
        process.send(b"\x10\x11")
        assert process.wait() == 0
    left = ("exec", "idle.1", "test", "-s", "/tmp/left")
    wait_for("what was left has gone on", lambda: node.run(*left).returncode == 0)
    later = "echo out; sleep 0.5; echo done > /tmp/detached"
    done = piped(node, "exec", "-d", "idle.1", *SHELL, later)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    detached = ("exec", "idle.1", "test", "-s", "/tmp/detached")
    wait_for("what was detached has gone on", lambda: node.run(*detached).returncode == 0)


def test_exec_hands_any_bytes_through_and_reads_no_further_than_it_is_wanted(node: Node) -> None:
    data = os.urandom(5_000_000)
    done = piped(node, "exec", "-i", "idle.1", "cat", data=data)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    done = piped(node, "exec", "-i", "idle", *SHELL, "head -c 3; echo wrong >&2; exit 3", data=data)
    assert (done.returncode, done.stdout, done.stderr) == (3, data[:3], b"wrong\n")


def test_logs_are_followed_until_ctrl_c(node: Node) -> None:
    with terminal(node, "logs", "-f", "--tail", "3", "--no-task-ids", "count") as process:
        lines = process.see(lambda lines: sum("| line" in line for line in lines) > 10)
        shown = [line for line in lines if line]
        numbers = [int(line.rpartition(" ")[2]) for line in shown]
        assert all(line.startswith("count.1@alpha    | line ") for line in shown)
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        process.send(b"\x03")
        assert process.wait() == 0
    host = f"--host unix://{node.socket}"
    script = f"set -o pipefail; {BIN / 'swarmctl'} {host} logs -f --raw count | head -2"
    done = subprocess.run(("/bin/bash", "-c", script), capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"line 1\nline 2\n", b"")


def test_top_shows_what_runs(node: Node) -> None:
    with terminal(node, "top", "--sort", "name") as process:
        before = process.modes()
        lines = process.see(
            lambda lines: sum(line.startswith(("count.1 ", "idle.")) for line in lines) == 3
        )
        assert lines[0].startswith("1 node, 2 services, 3 running tasks")
        process.see(lambda lines: all(line.split()[2].endswith("%") for line in lines[5:8]))
        process.send(b"n")
        process.see(
            lambda lines: any(line.startswith("alpha ") and "Ready" in line for line in lines)
        )
        process.resize(10, 50)
        process.see_text("q quit  h help")
        process.send(b"s/idl")
        process.see(
            lambda lines: (
                any(line.startswith("idle ") and "2/2" in line for line in lines)
                and not any(line.startswith("count") for line in lines)
            )
        )
        process.send(b"\x03")
        assert process.wait() == 0
        assert process.modes() == before and not process.other_screen
    out = node.ok("top", "--no-stream", "--format", "{{.Name}} {{.Node}}", "--sort", "name", "idle")
    assert out == "idle.1 alpha\nidle.2 alpha\n"


def test_files_are_copied_there_and_back(node: Node, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "big").write_bytes(os.urandom(3_000_000))
    (source / "link").symlink_to("sub/big")
    there, back = "/tmp/there", tmp_path / "back"
    node.ok("cp", source, f"idle.1:{there}")
    node.ok("cp", f"idle:{there}", back)
    assert (back / "sub" / "big").read_bytes() == (source / "sub" / "big").read_bytes()
    assert os.readlink(back / "link") == "sub/big"
    done = node.run("cp", source, f"idle:{there}/sub/big")
    assert done.returncode == 2 and "cannot be copied onto it" in done.stderr
    done = node.run("cp", "idle:/tmp/nothing", back)
    assert done.returncode == 4 and "no such file or folder" in done.stderr


def echoes(process: ScreenProcess) -> bool:
    """What is typed is shown, as a shell expects it."""
    flags = process.modes()[3]
    assert isinstance(flags, int)
    return bool(flags & termios.ECHO)


def test_a_daemon_that_dies_leaves_the_terminal_whole(node: Node) -> None:
    with (
        terminal(node, "exec", "-it", "idle.1", "/bin/sh") as shell,
        terminal(node, "top") as top,
    ):
        shell.see_text("#")
        top.see_text("idle.1")
        assert not echoes(shell) and not echoes(top)
        node.stop(signal.SIGKILL)
        try:
            assert shell.wait() == 9
            assert echoes(shell)
            top.see_text("trying again")
            top.send(b"q")
            assert top.wait() == 0
            assert not top.other_screen and echoes(top)
        finally:
            node.start()
