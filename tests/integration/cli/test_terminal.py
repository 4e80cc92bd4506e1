"""swarmctl as a process: on a terminal, in a pipe, interrupted; and how fast it starts."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import termios

import pytest

from cli.detaching import DetachKeys
from swarm.errors import NotFound
from swarm.v1 import WindowSize
from tests.integration.cli.conftest import COMMAND, Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.pty_process import PtyProcess
from tests.integration.cli.samples import service, status, task

HELP_S, LIST_S = 0.150, 0.400
STARTS = 5  # the fastest of so many counts


def on_terminal(cli: Cli, *arguments: str, columns: int = 80, **environment: str) -> PtyProcess:
    command = [*COMMAND, *arguments]
    return PtyProcess(command, cli.environment(**environment), columns=columns)


# ------------------------------------------------------------------ exec


def test_exec_hands_on_keys_output_size_and_the_exit_code(cli: Cli, cluster: FakeCluster) -> None:
    cluster.exec_reply, cluster.exec_code = b"$ ", 42
    with on_terminal(cli, "exec", "-it", "web.1", "sh") as process:
        before = process.modes()
        process.expect(b"$ ")
        assert not _flag(process, 3, termios.ECHO), "the terminal is raw while the command has it"
        process.send(b"ls\x03")
        process.read_until(lambda screen: b"LS\x03" in screen.replace(b"][", b""))
        process.resize(50, 132)
        process.expect(b"<50x132>")
        process.send(b"\x04")
        assert process.wait() == 42
        assert process.modes() == before, "the terminal is as it was"
    start = cluster.exec_inputs[0].start
    assert start is not None and start.tty
    assert (start.task, start.command) == ("web.1", ("sh",))
    assert start.size == WindowSize(rows=24, columns=80)


def _flag(process: PtyProcess, field: int, flag: int) -> bool:
    value = process.modes()[field]
    assert isinstance(value, int)
    return bool(value & flag)


def test_exec_with_a_pipe_sends_its_content_and_its_end(cli: Cli, cluster: FakeCluster) -> None:
    done = cli.process("exec", "-i", "-e", "A=1", "-u", "me", "web", "cat", "-n", stdin=b"abc")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"[ABC]", b"")
    start = cluster.exec_inputs[0].start
    assert start is not None and start.command == ("cat", "-n")
    assert (start.env, start.user) == (("A=1",), "me")
    assert cluster.exec_inputs[-1].stdin_closed


def test_exec_without_i_reads_nothing(cli: Cli, cluster: FakeCluster) -> None:
    cluster.exec_reply = b"out\n"
    done = cli.process("exec", "web", "true", stdin=b"abc")
    assert (done.returncode, done.stdout) == (0, b"out\n")
    assert [item.stdin for item in cluster.exec_inputs] == [None, None]


def test_exec_tells_why_it_was_refused_whatever_is_typed(cli: Cli, cluster: FakeCluster) -> None:
    cluster.exec_refusal = NotFound("task web not found")
    for _ in range(8):  # input sent into a refused call would hide the reason, but not each time
        done = cli.process("exec", "-i", "web", "cat", stdin=b"abc")
        assert (done.returncode, done.stderr) == (4, b"Error: task web not found\n")
    assert all(item.start for item in cluster.exec_inputs)


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [((), b"a\x10\x10b\x10\x11c"), (("--detach-keys", "ctrl-],q"), b"a\x10b\x1dqc")],
)
def test_keys_that_leave_a_command_leave_it_running(
    cli: Cli, cluster: FakeCluster, arguments: tuple[str, ...], typed: bytes
) -> None:
    cluster.exec_reply = b"$ "
    with on_terminal(cli, "exec", "-it", *arguments, "web.1", "sh") as process:
        before = process.modes()
        process.expect(b"$ ")
        for number in typed:  # as a person types them
            process.send(bytes((number,)))
        assert process.wait() == 0
        assert b"left; the command runs on" in process.screen
        assert process.modes() == before
    sent = b"".join(item.stdin or b"" for item in cluster.exec_inputs)
    assert sent == typed[: typed.index(b"b") + 1], "the keys themselves are not sent"
    assert cluster.exec_inputs[-1].detach


def test_detached_it_says_nothing_and_does_not_wait(cli: Cli, cluster: FakeCluster) -> None:
    cluster.exec_reply, cluster.exec_code = b"output", 3
    done = cli.process("exec", "-d", "-it", "web", "sleep", "9")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [item.detach for item in cluster.exec_inputs] == [None, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_exec_gives_the_terminal_back(
    cli: Cli, cluster: FakeCluster, number: signal.Signals
) -> None:
    cluster.exec_reply = b"$ "
    with on_terminal(cli, "exec", "-it", "web.1", "sh") as process:
        before = process.modes()
        process.expect(b"$ ")
        assert process.modes() != before
        process.kill(number)
        assert process.wait() == -number
        assert process.modes() == before


@pytest.mark.parametrize(
    ("text", "typed", "handed"),
    [
        ("ctrl-p,ctrl-q", (b"\x10", b"\x11"), (b"", None)),
        ("ctrl-p,ctrl-q", (b"\x10", b"x\x10\x11y"), (b"", b"\x10x", None)),
        ("ctrl-p,ctrl-p,a", (b"\x10\x10\x10a",), (b"\x10", None)),
        ("", (b"\x10\x11",), (b"\x10\x11",)),
        ("ctrl-@", (b"a\x00",), (b"a", None)),
    ],
)
def test_keys_are_held_back_only_while_they_may_be_the_sequence(
    text: str, typed: tuple[bytes, ...], handed: tuple[bytes | None, ...]
) -> None:
    keys = DetachKeys(text)
    found: list[bytes | None] = []
    for data in typed:
        out, left = keys.feed(data)
        found += [out] if out or not left else []
        found += [None] if left else []
    assert tuple(found) == handed


def test_keys_that_are_none_are_refused(cli: Cli, cluster: FakeCluster) -> None:
    answer = cli("exec", "-it", "--detach-keys", "ctrl-1", "web", "sh")
    assert answer.code == 2 and "write keys with commas between" in answer.err


# ------------------------------------------------------------------ progress


def test_progress_is_drawn_on_a_terminal_and_answers_stay_apart(
    cli: Cli, cluster: FakeCluster
) -> None:
    web = cluster.add(service("web", id_="w1"))
    cluster.watch_script = [
        [status(web, 1, 4, states={"running": 1, "starting": 3}, reasons=("image is pulled",))],
        0.3,
        [status(web, 4, 4)],
    ]
    with on_terminal(cli, "service", "scale", "web=4", NO_COLOR="1") as process:
        assert process.wait() == 0
        screen = process.screen.decode()
    assert "1/4" in screen and "3 starting" in screen and "image is pulled" in screen
    assert "✓ web" in screen and "4/4" in screen and "converged" in screen
    assert "\x1b[3" not in screen, "no colour"


def test_progress_leaves_room_for_the_echo_of_ctrl_c(cli: Cli, cluster: FakeCluster) -> None:
    web = cluster.add(service("web", id_="w1"))
    cluster.watch_script = [[status(web, 1, 4, reasons=("word " * 40,))], 0.3, [status(web, 4, 4)]]
    with on_terminal(cli, "service", "scale", "web=4", NO_COLOR="1") as process:
        assert process.wait() == 0
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", process.screen.decode()).splitlines()
    assert max(len(line) for line in lines) == 78


def test_colour_only_on_a_terminal(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(service("web"))
    with on_terminal(cli, "service", "ls") as process:
        assert process.wait() == 0
        assert b"\x1b[1m" in process.screen
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        command = [*COMMAND, "service", "ls"]
        with PtyProcess(command, cli.environment(**environment)) as process:
            assert process.wait() == 0
            assert (b"\x1b" in process.screen) == ("TERM" in environment)
    assert b"\x1b" not in cli.process("service", "ls").stdout


def test_a_narrow_terminal_shows_the_whole_reason(cli: Cli, cluster: FakeCluster) -> None:
    web = cluster.add(service("web"))
    error = "no suitable node (2 of 2 nodes short of memory: need 900 GiB, best free 23 GiB on n2)"
    cluster.add(task(web, "t1" + "0" * 23, slot=1, err=error))
    for columns in (80, 120):
        with on_terminal(cli, "service", "ps", "web", columns=columns, NO_COLOR="1") as process:
            assert process.wait() == 0
            lines = process.screen.decode().split("\r\n")
        assert max(map(len, lines)) <= columns
        assert error in " ".join(" ".join(lines).split())


def test_ctrl_c_leaves_the_change_going_and_says_so(cli: Cli, cluster: FakeCluster) -> None:
    web = cluster.add(service("web", id_="w1"))
    cluster.watch_script = [[status(web, 1, 4)]]
    with on_terminal(cli, "service", "scale", "web=4") as process:
        process.expect(b"1/4")
        process.interrupt()
        assert process.wait() == 130
        assert b"The change goes on; `swarmctl service wait web`" in process.screen
        assert b"Traceback" not in process.screen and b"Aborted" not in process.screen


def test_a_reader_that_stops_early_is_no_error(cli: Cli, cluster: FakeCluster) -> None:
    for number in range(3000):
        cluster.add(service(f"s{number}"))
    done = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", f"{sys.executable} -m cli.main service ls | head -1"],
        env=cli.environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith(b"ID ") and (done.returncode, done.stderr) == (0, b"")


# ------------------------------------------------------------------ completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(cli: Cli, shell: str) -> None:
    out = cli.ok("completion", shell)
    assert "_SWARMCTL_COMPLETE" in out and "swarmctl" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("swarmctl se", "service"),
        ("swarmctl service sc", "scale"),
        ("swarmctl service create --repl", "--replicas"),
        ("swarmctl service ps a", "app_web"),
        ("swarmctl top a", "app_web"),
        ("swarmctl top ser", "services"),
        ("swarmctl cp a", "app_web:"),
        ("swarmctl node update --availability dr", "drain"),
    ],
)
def test_commands_flags_and_names_complete(
    cli: Cli, cluster: FakeCluster, words: str, expected: str
) -> None:
    cluster.add(service("app_web"))
    cluster.add(service("db"))
    environment = {
        "_SWARMCTL_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from cli.main import main; main()"],
        env=cli.environment(**environment),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert f"plain,{expected}" in done.stdout.splitlines(), done
    assert "db" not in done.stdout


# ------------------------------------------------------------------ speed


def cpu_s(cli: Cli, *arguments: str) -> float:
    """Processor time of the fastest start. Not the wall's: other tests run beside this one."""
    best = float("inf")
    for _ in range(STARTS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = cli.process(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done
        spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        best = min(best, spent)
    return best


def test_help_and_lists_start_fast(cli: Cli, cluster: FakeCluster) -> None:
    assert cpu_s(cli, "--help") < HELP_S
    cluster.add(service("web"))
    assert cpu_s(cli, "service", "ls") < LIST_S


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (("--help",), ("grpc", "rich", "swarm.v1", "asyncio", "yaml")),
        (("service", "--help"), ("grpc", "rich", "swarm.v1")),
        (("service", "ls"), ("rich", "structlog", "yaml", "cryptography")),
    ],
)
def test_what_is_not_needed_is_not_imported(
    cli: Cli, arguments: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    code = (
        "import sys; from cli.main import run; run(sys.argv[1:]);"
        f"print('LOADED', [n for n in {absent!r} if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=cli.environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stdout[-200:] + done.stderr


def test_the_console_script_is_the_same(cli: Cli) -> None:
    path = os.path.join(os.path.dirname(sys.executable), "swarmctl")
    if not os.path.exists(path):
        pytest.skip("swarmctl is not installed beside this Python")
    done = subprocess.run(
        [path, "version"], env=cli.environment(), capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 0
