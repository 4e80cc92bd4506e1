"""A real agent process that dies with SIGKILL, and an agent of an ordinary user."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.runtime.base import EventKind, Phase
from swarm.v1 import LogOptions
from tests.integration.runtime_process.conftest import Harness, until, work

# An agent that only starts one task and then waits to be killed.
AGENT = """
import asyncio, sys
from pathlib import Path
from tests.integration.runtime_process.conftest import work
from agent.runtime.process import ProcessRuntime
from swarm.clock import SystemClock

async def main():
    folder, node_id, task_id, isolate, script = sys.argv[1:]
    runtime = ProcessRuntime(folder=Path(folder), node_id=node_id, bind_address="127.0.0.2",
        clock=SystemClock(), isolate=isolate == "yes")
    await runtime.connect()
    job = work("sh", "-c", script, task_id=task_id)
    await runtime.prepare(job)
    started = await runtime.start(job)
    print("started", started.container.pid, started.address, *(await runtime.describe()).warnings,
        sep="|", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("isolate", ["yes", "no"])
async def test_tasks_outlive_an_agent_that_is_killed(
    plain: Harness, isolated: Harness, isolate: str
) -> None:
    held = isolated if isolate == "yes" else plain
    job = work("unused")
    script = "trap 'echo asked; exit 6' TERM; echo up; while :; do sleep 0.05; done"
    words = [str(held.folder), held.runtime._node_id, job.task_id, isolate, script]
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, *words, stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    async with asyncio.timeout(30):
        word, pid, address, *_ = (await agent.stdout.readline()).decode().split("|")
    assert word == "started"
    os.kill(agent.pid, signal.SIGKILL)
    await agent.wait()

    (found,) = await held.runtime.adopt()
    assert found.phase is Phase.RUNNING and found.started is not None
    assert (str(found.started.container.pid), found.started.address) == (pid, address)
    async for line in held.runtime.logs(job.task_id, LogOptions(tail=-1, follow=True)):
        assert line.data == b"up"
        break
    assert await held.runtime.stop(job.task_id, signal="", grace_s=20) == 6
    assert await held.output(job) == "up\nasked"
    event = await held.event()
    assert (event.kind, event.exit_code) == (EventKind.EXITED, 6)


NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def python_for_nobody() -> str:
    """A Python like ours that an ordinary user may run: ours may lie in root's home."""
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        script = "import os,sys; open(sys.executable).close(); print(sys.version_info[:2])"
        done = subprocess.run(
            [*NOBODY, python, "-c", script], capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and done.stdout.strip() == str(sys.version_info[:2]):
            return python
    pytest.skip(f"needs a Python {sys.version_info[:2]} that an ordinary user may run")


@pytest.mark.root
async def test_an_ordinary_user_runs_tasks_and_is_told_what_is_missing(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to become an ordinary user")
    # pytest's own folder is closed to others.
    folder = Path("/dev/shm") / f"swarm-test-{os.getpid()}"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    job = work("unused")
    words = [str(folder), "nobodysnode", job.task_id, "yes", "id -u; exit 4"]
    env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])
    try:
        agent = await asyncio.create_subprocess_exec(
            *NOBODY, python_for_nobody(), "-c", AGENT, *words, stdout=subprocess.PIPE, env=env
        )
        assert agent.stdout is not None
        async with asyncio.timeout(30):
            word, _, address, *warnings = (await agent.stdout.readline()).decode().split("|")
        assert (word, address) == ("started", "127.0.0.2")
        assert "limits are not enforced" in warnings[0]
        assert "does not run as root" in warnings[1]
        await until((folder / "tasks" / job.task_id / "exit").exists)
        assert (folder / "tasks" / job.task_id / "exit").read_text().split()[0] == "4"
        log = (folder / "tasks" / job.task_id / "log/00000001").read_text()
        assert log.endswith(" o 65534\n")
        agent.kill()
        await agent.wait()
    finally:
        shutil.rmtree(folder)


# An agent that runs a command beside a task, and leaves it if it is told to.
LEAVER = """
import asyncio, sys
from pathlib import Path
from tests.integration.runtime_process.conftest import silent
from agent.runtime.process import ProcessRuntime
from swarm.clock import SystemClock
from swarm.v1 import ExecStart

async def main():
    folder, node_id, task_id, isolate, tty, leaves, script = sys.argv[1:]
    runtime = ProcessRuntime(folder=Path(folder), node_id=node_id, bind_address="127.0.0.2",
        clock=SystemClock(), isolate=isolate == "yes")
    await runtime.connect()
    await runtime.adopt()
    left = asyncio.Event()
    start = ExecStart(command=("sh", "-c", script), tty=tty == "tty")
    outputs = runtime.exec(task_id, start, silent(), left)
    assert (await anext(outputs)).started
    while (await anext(outputs)).stdout is None:
        pass
    if leaves == "left":
        left.set()
        await outputs.aclose()
    print("begun", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("isolate", "tty", "leaves"),
    [
        ("yes", "pipes", "left"),
        ("yes", "tty", "left"),
        ("no", "pipes", "left"),
        ("yes", "pipes", "kept"),
        ("no", "tty", "kept"),
    ],
)
async def test_a_command_that_was_left_goes_on_without_the_agent_and_ends_with_its_task(
    plain: Harness, isolated: Harness, isolate: str, tty: str, leaves: str
) -> None:
    held = isolated if isolate == "yes" else plain
    job = work("sleep", "100")
    await held.run(job)
    # More than a pipe or a terminal holds, which somebody has to take.
    script = (
        "trap '' HUP; echo up; head -c 300000 /dev/zero; echo over; echo over >&2; "
        "exec sleep 12345.6"
    )
    words = [str(held.folder), held.runtime._node_id, job.task_id, isolate, tty, leaves, script]
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LEAVER, *words, stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    async with asyncio.timeout(30):
        assert await agent.stdout.readline() == b"begun\n"
    os.kill(agent.pid, signal.SIGKILL)
    await agent.wait()
    if leaves == "left":
        await until(lambda: bool(running("12345.6")))
        (command,) = running("12345.6")
        above = Path(f"/proc/{command}/stat").read_text().rpartition(")")[2].split()[1]
        assert await held.runtime.stop(job.task_id, signal="SIGKILL", grace_s=5) == 137
        await until(lambda: not Path(f"/proc/{above}").exists())
    await until(lambda: not running("12345.6"))


def running(seconds: str) -> list[int]:
    """Processes that sleep for so long."""
    wanted = f"sleep\0{seconds}\0".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{name}/cmdline").read_bytes() == wanted:
                found.append(int(name))
    return found
