"""Tasks without namespaces: what any user's swarmd can run."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from agent.runtime.base import EventKind, Failed, Phase, Rejected, TaskFile
from swarm.v1 import (
    ContainerSpec,
    Driver,
    ExecInput,
    ExecStart,
    HealthConfig,
    LogOptions,
    LogStream,
    PortConfig,
    TaskSpec,
    WindowSize,
)
from tests.integration.runtime_process.conftest import Harness, until, work

SECOND = 1_000_000_000


async def test_exit_code_and_output_of_a_task_are_kept(plain: Harness) -> None:
    job = work("sh", "-c", "echo out; echo err >&2; exit 3")
    assert await plain.finish(job) == (3, "out\nerr")
    lines = [line async for line in plain.runtime.logs(job.task_id, LogOptions(tail=-1))]
    assert {(line.stream, line.data) for line in lines} == {
        (LogStream.STDOUT, b"out"),
        (LogStream.STDERR, b"err"),
    }
    assert all(line.timestamp_ns > 1_600_000_000 * SECOND for line in lines)


async def test_a_second_start_of_a_running_task_returns_the_same(plain: Harness) -> None:
    job = work("sleep", "60")
    assert await plain.run(job) == await plain.runtime.start(job)


async def test_an_unknown_program_is_rejected_with_its_name(plain: Harness) -> None:
    with pytest.raises(Rejected, match="no-such-program") as caught:
        await plain.run(work("no-such-program"))
    assert caught.value.cause == "program_missing"


async def test_the_environment_holds_only_what_is_said(
    plain: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEAK", "1")
    ports = [PortConfig(target_port=80), PortConfig(target_port=53, protocol="udp")]
    code, text = await plain.finish(
        work("env", container=ContainerSpec(env=("A=b", "HOME")), ports=ports)
    )
    env = dict(line.split("=", 1) for line in text.splitlines())
    assert code == 0
    assert env["A"] == "b" and "HOME" not in env and "LEAK" not in env
    assert env["SWARM_BIND_ADDR"] == "127.0.0.2"
    assert env["PORT"] == env["SWARM_PORT_80"] != env["SWARM_PORT_53"]
    assert set(env) <= {"A", "PATH", "PORT", "PWD", "SHLVL", "_"} | {
        k for k in env if k.startswith("SWARM_")
    }


async def test_each_target_port_gets_a_port_of_the_nodes_address(plain: Harness) -> None:
    program = "import os,socket;s=socket.create_server((os.environ['SWARM_BIND_ADDR'],int(os.environ['SWARM_PORT_80'])));print('up',flush=True);s.accept()[0].sendall(b'hi')"
    job = work("python3", "-c", program, ports=[PortConfig(target_port=80)])
    started = await plain.run(job)
    async for line in plain.runtime.logs(job.task_id, LogOptions(tail=-1, follow=True)):
        assert line.data == b"up"
        break
    reader, writer = await asyncio.open_connection(started.address, started.port_map[80])
    assert await reader.read() == b"hi"
    writer.close()
    await writer.wait_closed()


async def test_publish_mode_host_gives_the_port_itself(plain: Harness) -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        number = taken.getsockname()[1]
        port = PortConfig(target_port=80, published_port=number, publish_mode="host")
        with pytest.raises(Failed, match=f"{number}.*in use"):
            await plain.run(work("sleep", "60", ports=[port]))
    job = work("sh", "-c", "echo $PORT; sleep 60", ports=[port])
    started = await plain.run(job)
    assert started.port_map == {80: number}
    assert started.host_ports[0].published_port == number


async def test_stop_sends_the_signal_and_returns_the_tasks_own_code(plain: Harness) -> None:
    job = work("sh", "-c", "trap 'exit 7' INT; echo up; while :; do sleep 0.05; done")
    await plain.run(job)
    async for _ in plain.runtime.logs(job.task_id, LogOptions(tail=-1, follow=True)):
        break
    assert await plain.runtime.stop(job.task_id, signal="SIGINT", grace_s=10) == 7


async def test_stop_kills_what_ignores_the_signal_after_the_grace_period(plain: Harness) -> None:
    job = work("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")
    await plain.run(job)
    async for _ in plain.runtime.logs(job.task_id, LogOptions(tail=-1, follow=True)):
        break
    assert await plain.runtime.stop(job.task_id, signal="", grace_s=0.2) == 137
    assert await plain.runtime.stop(job.task_id, signal="", grace_s=0.2) == 137
    assert await plain.runtime.stop("unknown", signal="", grace_s=1) is None


async def test_processes_that_a_task_leaves_behind_are_ended(
    plain: Harness, tmp_path: Path
) -> None:
    mark = tmp_path / "pid"
    script = f"setsid sh -c 'echo $$ > {mark}; exec sleep 300' & while [ ! -s {mark} ]; do sleep 0.01; done"
    assert (await plain.finish(work("sh", "-c", script)))[0] == 0
    assert not Path(f"/proc/{int(mark.read_text())}").exists()


async def test_a_running_task_is_adopted_and_its_exit_code_known(plain: Harness) -> None:
    job = work("sh", "-c", "trap 'exit 5' USR1; echo up; while :; do sleep 0.05; done")
    started = await plain.run(job)
    async for _ in plain.runtime.logs(job.task_id, LogOptions(tail=-1, follow=True)):
        break
    await plain.restart()
    (found,) = await plain.runtime.adopt()
    assert (found.phase, found.started) == (Phase.RUNNING, started)
    os.kill(started.container.pid, signal.SIGUSR1)
    event = await plain.event()
    assert (event.kind, event.exit_code) == (EventKind.EXITED, 5)


async def test_a_task_that_ended_without_an_agent_is_found_with_its_code(plain: Harness) -> None:
    job = work("sh", "-c", "sleep 0.2; exit 9")
    await plain.run(job)
    await plain.runtime.close()
    await until((plain.folder / "tasks" / job.task_id / "exit").exists)
    await plain.restart()
    (found,) = await plain.runtime.adopt()
    assert (found.phase, found.exit_code) == (Phase.EXITED, 9)


async def test_a_prepared_task_is_found_as_created_and_can_start(plain: Harness) -> None:
    job = work("sleep", "60")
    await plain.runtime.prepare(job)
    await plain.restart()
    (found,) = await plain.runtime.adopt()
    assert found.phase is Phase.CREATED
    assert (await plain.runtime.start(job)).container.pid > 0


async def test_a_task_dies_with_its_supervisor(plain: Harness) -> None:
    job = work("sleep", "60")
    started = await plain.run(job)
    pids = (plain.folder / "tasks" / job.task_id / "pids").read_text().split()
    os.kill(int(pids[1]), signal.SIGKILL)
    event = await plain.event()
    assert event.exit_code == 137 and "supervisor" in event.message
    await until(lambda: not Path(f"/proc/{started.container.pid}/exe").exists())


async def test_remove_ends_the_task_and_leaves_nothing(plain: Harness) -> None:
    job = work("sleep", "60", files=[TaskFile("/run/secrets/s", b"x", secret=True)])
    started = await plain.run(job)
    await plain.runtime.remove(job.task_id)
    await plain.runtime.remove(job.task_id)
    assert not (plain.folder / "tasks" / job.task_id).exists()
    assert not Path(f"/proc/{started.container.pid}").exists()
    assert not list(Path("/dev/shm").glob(f"swarm-process-files-*/*/{job.task_id}"))


async def test_secrets_lie_in_memory_under_the_folder_that_is_named(plain: Harness) -> None:
    script = 'cat "$SWARM_FILES/run/secrets/key"; stat -f -c %T "$SWARM_FILES"'
    files = [TaskFile("/run/secrets/key", b"hush\n", mode=0o400, secret=True)]
    assert await plain.finish(work("sh", "-c", script, files=files)) == (0, "hush\ntmpfs")


async def test_a_healthcheck_tells_healthy_and_unhealthy(plain: Harness) -> None:
    check = HealthConfig(
        test=("CMD-SHELL", "echo looked; test -e ok"),
        interval_ns=SECOND // 20,
        retries=2,
        timeout_ns=10 * SECOND,
    )
    job = work("sh", "-c", "touch ok; exec sleep 60", container=ContainerSpec(healthcheck=check))
    started = await plain.run(job)
    assert not started.healthy
    assert (await plain.event()).kind is EventKind.HEALTHY
    (plain.folder / "tasks" / job.task_id / "work/ok").unlink()
    event = await plain.event()
    assert (event.kind, event.message) == (EventKind.UNHEALTHY, "2 checks failed: looked")


async def test_logs_follow_across_rotation_and_lose_nothing(plain: Harness) -> None:
    spec = TaskSpec(
        log_driver=Driver(name="json-file", options={"max-size": "20k", "max-file": "1000"})
    )
    job = work(
        "sh", "-c", "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done", spec=spec
    )
    await plain.run(job)
    lines = plain.runtime.logs(job.task_id, LogOptions(tail=-1, follow=True))
    assert [line.data async for line in lines] == [b"line %d" % i for i in range(3000)]
    assert len(list((plain.folder / "tasks" / job.task_id / "log").iterdir())) > 3
    assert await plain.output(job, tail=2) == "line 2998\nline 2999"
    assert await plain.output(job, tail=0) == ""


async def test_exec_runs_beside_the_task_and_returns_its_code(plain: Harness) -> None:
    job = work("sleep", "60", container=ContainerSpec(env=("A=1",)))
    await plain.run(job)
    script = "echo $A $B; pwd; exit 4"
    code, out = await plain.execute(job, "sh", "-c", script, env=("B=2",))
    assert (code, out) == (4, f"1 2\n{plain.folder}/tasks/{job.task_id}/work\n")
    with pytest.raises(Rejected, match="no-such"):
        await plain.execute(job, "no-such-program")


async def test_exec_with_a_terminal_has_size_and_input(plain: Harness) -> None:
    job = work("sleep", "60")
    await plain.run(job)
    received = b""
    ready = asyncio.Event()

    async def typed():
        await ready.wait()
        yield ExecInput(resize=WindowSize(rows=40, columns=100))
        yield ExecInput(stdin=b"go\n")

    start = ExecStart(
        command=("sh", "-c", "stty size; read x; stty size; tty; exit 2"),
        tty=True,
        size=WindowSize(rows=20, columns=70),
    )
    code = None
    async with asyncio.timeout(20):
        async for output in plain.runtime.exec(job.task_id, start, typed()):
            received += output.stdout or b""
            if b"20 70" in received:
                ready.set()
            code = output.exit_code
    assert code == 2
    assert b"40 100" in received and b"/dev/pts/" in received


async def test_stats_count_the_tasks_processes(plain: Harness) -> None:
    job = work("sh", "-c", "sleep 60 & sleep 60")
    await plain.run(job)
    async with asyncio.timeout(10):
        while (stats := await plain.runtime.stats(job.task_id)).pids < 3:
            await asyncio.sleep(0.01)
    assert stats.memory_bytes > 0


async def test_a_terminal_task_sees_a_terminal(plain: Harness) -> None:
    job = work("sh", "-c", "tty; echo two", container=ContainerSpec(tty=True))
    code, text = await plain.finish(job)
    assert code == 0 and text.startswith("/dev/pts/") and text.endswith("\ntwo")


async def test_what_cannot_be_had_is_rejected_naming_the_field(plain: Harness) -> None:
    spec = ContainerSpec(image="nginx", hostname="h", user="nobody:x")
    with pytest.raises(Rejected) as caught:
        await plain.runtime.prepare(work("true", container=spec))
    assert caught.value.cause == "unsupported"
    assert 'image "nginx"' in caught.value.message and "hostname" in caught.value.message


async def test_long_lines_are_whole_again(plain: Harness) -> None:
    script = (
        "import os;w=os.write;w(1,b'a'*40000+b'\\n');w(2,b'err\\n');"
        "w(1,b'b'*16384);w(1,b'\\nnext\\n');w(1,b'c'*3000000);w(1,b'\\n');w(1,b'd'*20000)"
    )
    job = work(sys.executable, "-c", script)
    code, _ = await plain.finish(job)
    assert code == 0
    lines = plain.runtime.logs(job.task_id, LogOptions(tail=-1, stdout=True))
    said = [line.data async for line in lines]
    assert [len(data) for data in said[:3]] == [40_000, 16_384, 4]
    cut = said[3:-1]
    assert b"".join(cut) == b"c" * 3_000_000
    assert max(map(len, cut)) < 1_100_000  # what has no end is given out in parts
    assert said[-1] == b"d" * 20_000
    lines = plain.runtime.logs(job.task_id, LogOptions(tail=1, stdout=True))
    assert [len(line.data) async for line in lines] == [20_000]
