"""Logs: each line tells who printed it."""

from __future__ import annotations

import signal
import subprocess

import pytest

from swarm.v1 import LogLine, LogsRequest, LogsResponse, LogStream, Stack, StackSpec
from tests.integration.cli.conftest import COMMAND, Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import service, task
from tests.integration.cli.screen import ScreenProcess

TIME_NS = 1_795_254_292_946_163_064


def line(text: bytes, **more: object) -> LogLine:
    settings = {
        "task_id": "t1" + "x" * 23,
        "stream": LogStream.STDOUT,
        "timestamp_ns": TIME_NS,
        "service_name": "web",
        "slot": 1,
        "node_id": "n1",
        "node_name": "alpha",
        **more,
    }
    return LogLine(data=text, **settings)  # type: ignore[arg-type]  # of these names


@pytest.fixture(autouse=True)
def web(cluster: FakeCluster) -> None:
    of = cluster.add(service("web"))
    cluster.add(task(of, "t1" + "x" * 23, slot=1))
    cluster.log_script = [
        LogsResponse(lines=(line(b"one"), line(b"\xff\x00two", stream=LogStream.STDERR))),
        LogsResponse(lines=(line(b"three", slot=10, node_name="gamma"),)),
    ]


def test_lines_begin_with_service_slot_task_and_node(cli: Cli, cluster: FakeCluster) -> None:
    done = cli.process("service", "logs", "web")
    assert done.returncode == 0
    assert done.stdout == (
        b"web.1.t1xxxxxxxxxx@alpha    | one\nweb.10.t1xxxxxxxxxx@gamma    | three\n"
    )
    assert done.stderr == b"web.1.t1xxxxxxxxxx@alpha    | \xff\x00two\n", "stderr stays stderr"
    request = cluster.last(LogsRequest)
    assert request.services == ("web",) and request.options is not None
    assert (request.options.tail, request.options.follow) == (-1, False)


@pytest.mark.parametrize(
    ("flags", "first"),
    [
        (("--raw",), "one"),
        (("--no-task-ids",), "web.1@alpha    | one"),
        (("--no-trunc", "--no-resolve"), f"web.1.t1{'x' * 23}@n1    | one"),
        (("-t", "--raw"), "2026-11-21T09:44:52.946163064Z one"),
        (("--timestamps",), "2026-11-21T09:44:52.946163064Z web.1.t1xxxxxxxxxx@alpha    | one"),
    ],
)
def test_forms_of_the_prefix(cli: Cli, flags: tuple[str, ...], first: str) -> None:
    done = cli.process("logs", *flags, "web")
    assert done.returncode == 0, done
    assert done.stdout.decode().splitlines()[0] == first


def test_tail_since_and_follow_are_sent(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok("service", "logs", "-f", "-n", "5", "--since", "2026-11-21T09:44:52Z", "web")
    options = cluster.last(LogsRequest).options
    assert options is not None
    assert (options.follow, options.tail, options.since_ns) == (True, 5, TIME_NS - 946_163_064)


def test_a_task_s_logs(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok("task", "logs", "t1")
    assert cluster.last(LogsRequest).tasks == ("t1",)
    cli.ok("service", "logs", "t1")
    assert cluster.last(LogsRequest).tasks == ("t1",)
    assert cli("service", "logs", "nope").err == "Error: no such service or task: nope\n"
    assert cli("task", "logs", "web").code == 4


def test_nodes_that_cannot_be_read_are_told_and_the_rest_is_shown(
    cli: Cli, cluster: FakeCluster
) -> None:
    cluster.log_script.append(LogsResponse(problems=("node gamma is down: its lines are missing",)))
    answer = cli("service", "logs", "web")
    assert answer.code == 1
    assert "Warning: node gamma is down: its lines are missing\n" in answer.err
    assert "| three\n" in answer.out


def test_names_are_aligned_from_the_first_line_on(cli: Cli, cluster: FakeCluster) -> None:
    cluster.log_script = [LogsResponse(lines=(line(b"one"), line(b"two", slot=100)))]
    assert cli.ok("logs", "--no-task-ids", "web") == (
        "web.1@alpha      | one\nweb.100@alpha    | two\n"
    )


def test_several_services_and_tasks_and_a_stack(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(service("db"))
    cli.ok("logs", "web", "t1", "db")
    request = cluster.last(LogsRequest)
    assert (request.services, request.tasks, request.stack) == (("web", "db"), ("t1",), "")
    assert cli("logs", "web", "nope").err == "Error: no such service or task: nope\n"
    cluster.add(Stack(id="s1", spec=StackSpec(name="shop")))
    cli.ok("stack", "logs", "-f", "--tail", "3", "shop")
    request = cluster.last(LogsRequest)
    assert (request.stack, request.services) == ("shop", ())
    assert request.options is not None and (request.options.tail, request.options.follow) == (
        3,
        True,
    )
    assert cli("stack", "logs", "nope").code == 4


@pytest.mark.parametrize("words", ["logs -f web | head -1", "logs -f web 2>&1 | head -1"])
def test_a_reader_that_ends_ends_the_following_at_once(
    cli: Cli, cluster: FakeCluster, words: str
) -> None:
    cluster.log_hold_s = 60.0
    swarmctl = " ".join([*COMMAND])
    script = f"set -o pipefail; {swarmctl} {words}; echo $?"
    done = subprocess.run(
        ("/bin/bash", "-c", script), env=cli.environment(), capture_output=True, timeout=30
    )
    assert done.stdout.decode().splitlines() == ["web.1.t1xxxxxxxxxx@alpha    | one", "0"]
    assert b"Error" not in done.stderr and b"Traceback" not in done.stderr


def test_ctrl_c_ends_the_following_without_a_word(cli: Cli, cluster: FakeCluster) -> None:
    cluster.log_hold_s = 60.0
    with ScreenProcess([*COMMAND, "logs", "-f", "web"], cli.environment(NO_COLOR="1")) as process:
        process.see_text("| three")
        process.send(b"\x03")
        assert process.wait() == 0
        assert [line for line in process.lines() if line][-1].startswith(("web.10", "^C"))


def test_an_interrupt_that_another_thread_gets_ends_the_following_too(
    cli: Cli, cluster: FakeCluster
) -> None:
    # Nothing says that the main thread, which waits, is the one that the kernel interrupts; nor
    # would a signal that comes just before it waits.
    cluster.log_hold_s = 60.0
    with ScreenProcess([*COMMAND, "logs", "-f", "web"], cli.environment(NO_COLOR="1")) as process:
        process.see_text("| three")
        process.kill_thread(signal.SIGINT)
        assert process.wait() == 0
