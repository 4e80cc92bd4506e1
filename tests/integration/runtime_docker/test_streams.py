"""Logs, commands inside, and statistics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from agent.runtime.base import Failed, Rejected
from swarm import errors
from swarm.v1 import (
    ContainerSpec,
    Driver,
    ExecInput,
    ExecOutput,
    ExecStart,
    LogLine,
    LogOptions,
    LogStream,
    ResourceRequirements,
    Resources,
    TaskSpec,
    WindowSize,
)
from tests.integration.runtime_docker.conftest import DEADLINE_S, Harness

pytestmark = [pytest.mark.docker, pytest.mark.root]
COUNTS = ("sh", "-c", "for i in 1 2 3 4; do echo line $i; done; echo bad >&2")


async def test_lines_have_stream_time_and_no_end(docker: Harness) -> None:
    work, _ = await docker.run(*COUNTS)
    lines = await docker.lines(work, follow=True)
    out = [line for line in lines if line.stream is LogStream.STDOUT]
    assert [line.data for line in out] == [b"line 1", b"line 2", b"line 3", b"line 4"]
    assert [line.data for line in lines if line.stream is LogStream.STDERR] == [b"bad"]
    times = [line.timestamp_ns for line in out]
    assert times == sorted(times)
    assert all(line.task_id == work.task_id for line in lines)


async def test_tail_since_until_and_streams_choose_lines(docker: Harness) -> None:
    work, _ = await docker.run(
        "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.02; done; echo e >&2"
    )
    every = await docker.lines(work, follow=True)
    assert len(every) == 4
    second = every[1].timestamp_ns

    async def chosen(**options: object) -> list[bytes]:
        return [line.data for line in await docker.lines(work, **options)]

    assert await chosen(tail=2) == [b"3", b"e"]
    assert await chosen(since_ns=second) == [b"2", b"3", b"e"]
    assert await chosen(until_ns=second) == [b"1", b"2"]
    assert await chosen(stderr=True) == [b"e"]
    assert await chosen(stdout=True) == [b"1", b"2", b"3"]


async def test_a_long_line_comes_whole(docker: Harness) -> None:
    work, _ = await docker.run("sh", "-c", "head -c 50000 /dev/zero | tr '\\0' x; echo; echo end")
    lines = await docker.lines(work, follow=True)
    assert [len(line.data) for line in lines] == [50_000, 3]


async def test_a_terminals_lines_are_whole_and_without_frames(docker: Harness) -> None:
    script = "head -c 20000 /dev/zero | tr '\\0' x; echo; echo end; echo err >&2"
    work, _ = await docker.run("sh", "-c", script, container=ContainerSpec(tty=True))
    lines = await docker.lines(work, follow=True)
    assert [len(line.data) for line in lines] == [20_000, 3, 3]
    assert {line.stream for line in lines} == {LogStream.STDOUT}


async def test_followed_lines_come_as_they_are_said(docker: Harness) -> None:
    work, _ = await docker.run(
        "sh", "-c", "echo first; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo second"
    )
    got: list[LogLine] = []
    async with asyncio.timeout(DEADLINE_S):
        async for line in docker.runtime.logs(work.task_id, LogOptions(follow=True, tail=-1)):
            got.append(line)
            if len(got) == 1:
                await docker.inside(work, "touch", "/tmp/go")
    assert [line.data for line in got] == [b"first", b"second"]


async def test_logs_of_a_stopped_task_stay_and_of_a_removed_one_go(docker: Harness) -> None:
    work, _ = await docker.run("sh", "-c", "echo here; sleep 100")
    await docker.runtime.stop(work.task_id, signal="SIGKILL", grace_s=5)
    assert [line.data for line in await docker.lines(work)] == [b"here"]
    await docker.runtime.remove(work.task_id)
    with pytest.raises(errors.NotFound):
        await docker.lines(work)


async def test_a_driver_that_cannot_be_read_says_so(docker: Harness) -> None:
    work, _ = await docker.run("echo", spec=TaskSpec(log_driver=Driver(name="none")))
    with pytest.raises(Failed, match="does not support reading"):
        await docker.lines(work)


# ------------------------------------------------------------------ exec


async def test_exec_carries_input_output_and_exit_code(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    options = {"env": ("A=1",), "dir": "/tmp", "user": "7"}
    code, said = await docker.inside(
        work, "sh", "-c", "cat; echo $A; pwd; id -u; exit 3", stdin=b"typed\n", **options
    )
    assert (code, said) == (3, "typed\n1\n/tmp\n7\n")


async def test_exec_carries_much_data_both_ways(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    data = bytes(range(256)) * 8192  # 2 MiB

    async def feed() -> AsyncIterator[ExecInput]:
        for begin in range(0, len(data), 65536):
            yield ExecInput(stdin=data[begin : begin + 65536])
        yield ExecInput(stdin_closed=True)

    got = bytearray()
    async with asyncio.timeout(DEADLINE_S):
        async for output in docker.runtime.exec(work.task_id, ExecStart(command=("cat",)), feed()):
            got += output.stdout or b""
    assert bytes(got) == data


async def test_exec_with_a_terminal_is_resized(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    typed: asyncio.Queue[ExecInput] = asyncio.Queue()

    async def feed() -> AsyncIterator[ExecInput]:
        while True:
            yield await typed.get()

    start = ExecStart(command=("sh",), tty=True, size=WindowSize(rows=30, columns=100))
    said = ""
    last: ExecOutput | None = None
    step = 0
    async with asyncio.timeout(DEADLINE_S):
        async for output in docker.runtime.exec(work.task_id, start, feed()):
            last = output
            said += (output.stdout or b"").decode()
            if step == 0 and "#" in said:
                step = 1
                typed.put_nowait(ExecInput(stdin=b"stty size\n"))
            if step == 1 and "30 100" in said:
                step = 2
                typed.put_nowait(ExecInput(resize=WindowSize(rows=40, columns=120)))
                typed.put_nowait(ExecInput(stdin=b"stty size\n"))
            if step == 2 and "40 120" in said:
                step = 3
                typed.put_nowait(ExecInput(stdin=b"exit 5\n"))
    assert step == 3, said
    assert last is not None
    assert last.exit_code == 5


async def test_exec_of_nothing_or_in_nothing_is_rejected(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    code, said = await docker.inside(work, "/no/such/thing")
    assert code in (126, 127)
    assert "/no/such/thing" in said
    with pytest.raises(Rejected, match="no command"):
        await docker.inside(work)
    await docker.runtime.stop(work.task_id, signal="SIGKILL", grace_s=5)
    with pytest.raises(Rejected, match="does not run"):
        await docker.inside(work, "true")


async def test_giving_up_an_exec_leaves_no_connection(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")

    async def feed() -> AsyncIterator[ExecInput]:
        await asyncio.Event().wait()
        yield ExecInput()

    outputs = docker.runtime.exec(work.task_id, ExecStart(command=("cat",)), feed())
    assert (await anext(outputs)).started
    await outputs.aclose()


# ------------------------------------------------------------------ stats


async def test_stats_tell_use_and_limit(docker: Harness) -> None:
    limits = Resources(memory_bytes=64 << 20)
    spec = TaskSpec(resources=ResourceRequirements(limits=limits))
    work, _ = await docker.run("sh", "-c", "while :; do :; done", spec=spec)
    first = await docker.runtime.stats(work.task_id)
    assert first.memory_limit_bytes == 64 << 20
    assert 0 < first.memory_bytes < 64 << 20
    assert first.pids >= 1
    while (second := await docker.runtime.stats(work.task_id)).cpu_total_ns <= first.cpu_total_ns:
        await asyncio.sleep(0.05)
    assert second.timestamp_ns > first.timestamp_ns
