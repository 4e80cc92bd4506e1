"""`swarmctl top` on a terminal of its own, and in a pipe; the cluster is a fake one."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence

import pytest

from swarm.errors import Denied, Unavailable
from swarm.v1 import Kind, NodeState, NodeUsage, StatsRequest, StatsResponse, TaskStats
from tests.integration.cli.conftest import COMMAND, Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import node, service, status, task
from tests.integration.cli.screen import ScreenProcess

SECOND = 1_000_000_000
MIB = 1 << 20


def measured(number: int, tasks: int, *, node_id: str = "n1", name: str = "alpha") -> StatsResponse:
    """Task k uses k hundredths of a CPU, the node one of its four CPUs."""
    return StatsResponse(
        nodes=(
            NodeUsage(
                node_id=node_id,
                node_name=name,
                timestamp_ns=(1000 + number) * SECOND,
                cpu_total_ns=number * SECOND,
                cpus=4,
                memory_bytes=1024 * MIB,
                memory_total_bytes=4096 * MIB,
                disk_bytes=MIB,
                disk_total_bytes=2 * MIB,
                tasks=tuple(
                    TaskStats(
                        task_id=f"{name}{k}",
                        service_name="web" if k % 2 else "db",
                        slot=k,
                        timestamp_ns=(1000 + number) * SECOND,
                        cpu_total_ns=number * k * SECOND // 100,
                        memory_bytes=k * MIB,
                        memory_limit_bytes=1024 * MIB,
                        network_in_bytes=number * 1000,
                        network_out_bytes=0,
                        pids=k,
                    )
                    for k in range(1, tasks + 1)
                ),
            ),
        )
    )


@pytest.fixture(autouse=True)
def few(cluster: FakeCluster) -> None:
    cluster.add(node("alpha", id_="n1"))
    cluster.add(node("beta", id_="n2", state=NodeState.DOWN))
    for name in ("web", "db"):
        item = cluster.add(service(name, id_=f"{name}1"))
        cluster.statuses[item.id] = status(item, 2, 3)
    cluster.measure = lambda number: [measured(number, 4)]


def top(
    cli: Cli, *arguments: str, rows: int = 24, columns: int = 80, **environment: str
) -> ScreenProcess:
    return ScreenProcess(
        [*COMMAND, "top", *arguments], cli.environment(**environment), rows=rows, columns=columns
    )


def starts(lines: Sequence[str]) -> list[str]:
    """The first word of each line."""
    return [line.split()[0] if line.split() else "" for line in lines]


def test_the_page_is_live_and_takes_keys(cli: Cli) -> None:
    with top(cli) as process:
        before = process.modes()
        lines = process.see_text("4.00%")
        assert process.other_screen and process.cursor_hidden
        assert lines[0].startswith("2 nodes (1 measured), 2 services, 4 running tasks")
        assert "25%  1.0 of 4 CPUs" in lines[1] and "25%  1GiB of 4GiB" in lines[2]
        assert lines[3] == "! not ready, so not measured: beta"
        assert starts(lines[5:10]) == ["NAME", "db.4", "web.3", "db.2", "web.1"]
        assert lines[-1].startswith("q quit  h help")
        process.send(b"r")
        process.see(lambda lines: starts(lines[5:10]) == ["NAME", "web.1", "db.2", "web.3", "db.4"])
        process.send(b"<<")
        process.see(
            lambda lines: starts(lines[5:10]) == ["NAME▲", "db.2", "db.4", "web.1", "web.3"]
        )
        process.send(b"/we")
        process.see(lambda lines: starts(lines[5:9]) == ["NAME▲", "web.1", "web.3", ""])
        assert process.lines()[-1].startswith("Filter: we_")
        process.send(b"\x1b")
        process.see(lambda lines: "db.2" in starts(lines))
        process.send(b"n")
        lines = process.see_text("STATUS")
        assert " ".join(lines[6].split()) == "alpha Ready 25.00% 4 1GiB / 4GiB 25.00% 50.00% 4"
        assert lines[7].split() == ["beta", "Down", *"-" * 6]
        process.send(b"s")
        lines = process.see_text("REPLICAS")
        assert lines[6].split()[:5] == ["db", "2/3", "6.00%", "6MiB", lines[6].split()[4]]
        process.send(b"h")
        process.see_text("any key goes back")
        process.send(b"ho")
        process.see_text("Sort by: 1 NAME")
        process.send(b"1t")
        process.see_text("MEM USAGE / LIMIT")
        process.send(b"q")
        assert process.wait() == 0
        assert not process.other_screen and not process.cursor_hidden
        assert process.modes() == before
        assert process.lines() == [""] * 24, "what stood before stands again"


def test_a_paused_page_stands_still(cli: Cli) -> None:
    with top(cli) as process:
        process.see_text("4.00%")
        process.send(b"p")
        still = process.see_text("paused")
        process.send(b"j")  # is answered by a page, with measurements that have come meanwhile
        process.resize(23, 80)
        process.see(lambda lines: len(lines) == 23 and "q quit" in lines[-1])
        assert process.lines()[1:9] == still[1:9]
        process.send(b"p")
        process.see(lambda lines: "every 1s" in lines[0] and lines[6] != still[6])


def test_a_resize_is_followed_at_once_and_two_hundred_tasks_scroll(
    cli: Cli, cluster: FakeCluster
) -> None:
    cluster.measure = lambda number: [measured(number, 200)]
    with top(cli, "--interval", "1h") as process:
        cluster.measure_s = 0.05
        process.see_text("200.00%")
        for rows, columns in ((10, 50), (40, 120), (5, 20), (10, 50)):
            process.resize(rows, columns)
            process.see_text("200.00%")
            lines = process.see_text("q quit")
            assert len(lines) == rows and "q quit" in lines[-1]
        assert lines[0].startswith("1/2n 200t cpu 25% mem 25%")
        process.send(b"G")
        process.see(lambda lines: starts(lines)[8] == "web.1")
        process.send(b"\x1b[5~k")
        process.see(lambda lines: starts(lines)[8] == "db.8")
        process.send(b"q")
        assert process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_whatever_ends_it_the_terminal_is_as_it_was(cli: Cli, number: signal.Signals) -> None:
    with top(cli) as process:
        before = process.modes()
        process.see_text("4.00%")
        if number is signal.SIGINT:
            process.send(b"\x03")
        elif number is signal.SIGQUIT:
            process.send(b"\x1c")
        else:
            process.kill(number)
        assert process.wait() == (0 if number is signal.SIGINT else -number)
        assert process.modes() == before
        assert not process.other_screen and not process.cursor_hidden
        assert process.lines()[0] in ("", "^C", "^\\")


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(cli: Cli) -> None:
    shell = ["/bin/bash", "--norc", "--noediting", "-i"]
    with ScreenProcess(shell, cli.environment(PS1="ready> ")) as process:
        process.see_text("ready>")
        process.send(" ".join([*COMMAND, "top\n"]).encode())
        process.see_text("4.00%")
        process.send(b"\x1a")
        lines = process.see_text("Stopped")
        assert not process.other_screen and not process.cursor_hidden
        assert not any("MEM %" in line for line in lines)
        process.send(b"stty -a | tr ' ' '\\n' | grep -c -x -e icanon -e echo\n")
        process.see(lambda lines: "2" in lines)
        process.send(b"fg\n")
        process.see(lambda lines: process.other_screen and any("4.00%" in line for line in lines))
        assert process.cursor_hidden
        process.send(b"q")
        process.see(lambda lines: not process.other_screen)
        process.send(b"exit\n")
        assert process.wait() == 0


def test_an_error_is_told_on_the_screen_that_was_there_before(
    cli: Cli, cluster: FakeCluster
) -> None:
    cluster.measure_s = 0.3
    with top(cli) as process:
        process.see_text("4.00%")
        cluster.failures["stats"] = [Denied("the certificate has been revoked")]
        assert process.wait() == 8
        assert not process.other_screen
        assert process.lines()[0] == "Error: the certificate has been revoked"


def test_a_manager_that_goes_is_told_and_the_page_goes_on(cli: Cli, cluster: FakeCluster) -> None:
    with top(cli) as process:
        process.see_text("4.00%")
        cluster.failures["stats"] = [Unavailable("the manager stops")]
        process.see_text("! no manager answers, trying again: the manager stops")
        process.see(lambda lines: not any("trying again" in line for line in lines))
        assert sum(isinstance(call, StatsRequest) for call in cluster.calls) == 2


def test_what_is_named_is_asked_for(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(task(cluster.find(Kind.SERVICE, "web"), "t1" + "0" * 23, slot=1))
    cli.ok("top", "--no-stream", "web", "t1")
    request = cluster.last(StatsRequest)
    assert (request.services, request.tasks, request.once) == (("web1",), ("t1" + "0" * 23,), True)
    cli.ok("top", "--no-stream", "nodes", "alpha")
    assert cluster.last(StatsRequest).nodes == ("n1",)
    assert cli("top", "nope").err == "Error: no such service, task, stack or node: nope\n"
    assert cli("top", "nodes", "web").err == "Error: no such node: web\n"
    assert cli("top", "--sort", "color").code == 2
    assert "at least 200ms" in cli("top", "--interval", "1ms").err


def test_one_measurement_as_a_table(cli: Cli) -> None:
    answer = cli("top", "--no-stream", "--sort", "name")
    assert answer.code == 0
    assert answer.err == "Warning: not ready, so not measured: beta\n"
    head, first, *_ = answer.out.splitlines()
    assert head.split("  ")[0] == "NAME" and head.endswith("GPU %")
    assert " ".join(first.split()) == "db.2 alpha 2.00% 2MiB / 1GiB 0.20% 1kB / 0B - 2 -"
    out = cli.ok("top", "--no-stream", "--format", "{{.Name}} {{.CPUPerc}}", "services")
    assert out == "db 6.00%\nweb 4.00%\n"
    rows = [
        json.loads(line)
        for line in cli.ok("top", "--no-stream", "--format", "json", "nodes").splitlines()
    ]
    assert [row["Name"] for row in rows] == ["alpha", "beta"]
    assert rows[0]["Raw"]["CpuPercent"] == 25.0


def test_in_a_pipe_a_table_comes_again_and_again(cli: Cli, cluster: FakeCluster) -> None:
    def measure(number: int) -> list[StatsResponse]:
        if number == 6:
            cluster.failures["stats"] = [Denied("enough")]
        return [measured(number, 2)]

    cluster.measure = measure
    cluster.measure_s = 0.25
    done = cli.process("top", "--interval", "200ms")
    assert (done.returncode, done.stderr) == (8, b"Error: enough\n")
    blocks = done.stdout.decode().split("\n\n")
    assert len(blocks) >= 3
    assert all(starts(block.splitlines()) == ["NAME", "db.2", "web.1"] for block in blocks)
    assert b"\x1b" not in done.stdout


def test_without_colour_there_is_none(cli: Cli) -> None:
    for no_colour, coloured in (("1", False), ("", True)):
        with top(cli, NO_COLOR=no_colour) as process:
            process.see_text("4.00%")
            assert (b"\x1b[32m" in process.screen) == coloured


def test_keys_come_from_the_terminal_when_standard_input_is_something_else(cli: Cli) -> None:
    words = " ".join([*COMMAND, "top"])
    with ScreenProcess(["/bin/sh", "-c", f"echo x | {words}"], cli.environment()) as process:
        process.see_text("4.00%")
        process.send(b"q")
        assert process.wait() == 0
