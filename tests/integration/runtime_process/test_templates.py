"""Templates, secrets and configs of tasks, from a manager's word to what the process sees; with and without a view of
the files of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.runtime.base import EventKind, Phase, Rejected, TaskFile
from agent.runtime.docker.files import Files as DockerFiles
from agent.runtime.memory import filesystem, memory_folder
from agent.runtime.process.fields import Powers
from agent.runtime.process.files import Files
from swarm.ids import new_id, system_rng
from swarm.v1 import (
    Assignment,
    ConfigData,
    ConfigReference,
    ContainerSpec,
    Driver,
    FileTarget,
    Mount,
    SecretData,
    SecretReference,
    TaskSpec,
    TaskState,
)
from tests.fakes.node import HOSTNAME, Node, assignment, on_disk, shut_down
from tests.integration.runtime_process.conftest import Harness, harness, until, work

GOLANG = Driver(name="golang")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def files_root() -> Path:
    found = memory_folder("process-files")
    assert found is not None
    return found


def make_task(held: Harness, container: ContainerSpec, *, slot: int = 1) -> Assignment:
    spec = TaskSpec(runtime="process", container=container)
    return assignment(
        new_id(system_rng()),
        spec,
        node_id=held.runtime._node_id,
        slot=slot,
        labels={"tier": "front"},
    )


def container(**fields: object) -> ContainerSpec:
    base: dict[str, object] = {"command": ("sleep", "1000"), "stop_grace_period_ns": 0}
    return ContainerSpec(**(base | fields))  # type: ignore[arg-type]  # checked by the struct


async def inside(held: Harness, task: Assignment, script: str) -> list[str]:
    """What a command in the task says; its output is in no log."""
    assert task.task is not None
    code, said = await held.execute(work("unused", task_id=task.task.id), "sh", "-c", script)
    assert code == 0, said
    return said.splitlines()


SECRETS = (
    SecretReference(secret_id="s", secret_name="key"),
    SecretReference(
        secret_id="t", secret_name="conn", file=FileTarget(name="deep/er/conn", mode=0o400)
    ),
)
CONFIGS = (
    ConfigReference(config_id="c", config_name="conf", file=FileTarget(name="etc/app-x/x.conf")),
)
SUPPLIES = {
    "secrets": (
        SecretData(id="s", name="key", data=b"pass"),
        SecretData(id="t", name="conn", data=b'{{secret "key"}}@{{.Task.Slot}}', templating=GOLANG),
    ),
    "configs": (
        ConfigData(
            id="c",
            name="conf",
            data=b'{{.Service.Name}}.{{.Task.Slot}} {{index .Service.Labels "tier"}} {{env "WHERE"}}\n',
            templating=GOLANG,
        ),
    ),
}


@needs_root
async def test_templates_are_expanded_for_each_isolated_task(
    isolated: Harness, tmp_path: Path
) -> None:
    volume = "data-{{.Task.Slot}}"
    spec = container(
        hostname="{{.Service.Name}}-{{.Task.Slot}}",
        env=("WHERE={{.Node.Hostname}}", "SLOT={{.Task.Slot}}"),
        mounts=(Mount(type="volume", source=volume, target="/data/{{.Task.Slot}}"),),
        secrets=SECRETS,
        configs=CONFIGS,
    )
    tasks = [make_task(isolated, spec, slot=n) for n in (1, 2)]
    script = (
        'hostname; echo "$WHERE $SLOT"; ls -d /data/*; cat /run/secrets/key; echo;'
        "cat /run/secrets/deep/er/conn; echo; cat /etc/app-x/x.conf"
    )
    async with Node(isolated.runtime, tmp_path) as node:
        await node.run(*tasks, **SUPPLIES)  # type: ignore[arg-type]  # see `run`
        for slot, task in enumerate(tasks, 1):
            assert await inside(isolated, task, script) == [
                f"web-{slot}",
                f"{HOSTNAME} {slot}",
                f"/data/{slot}",
                "pass",
                f"pass@{slot}",
                f"web.{slot} front {HOSTNAME}",
            ]
            assert (isolated.folder / "volumes" / f"data-{slot}").is_dir()
        await node.run()
    await isolated.restart()


async def test_templates_are_expanded_for_each_plain_task(plain: Harness, tmp_path: Path) -> None:
    spec = container(env=("WHERE={{.Node.Hostname}}",), secrets=SECRETS, configs=CONFIGS)
    tasks = [make_task(plain, spec, slot=n) for n in (1, 2)]
    script = (
        "cd $SWARM_FILES; cat run/secrets/key; echo; cat run/secrets/deep/er/conn; echo; cat etc/app-x/x.conf;"
        "stat -c %a run/secrets/deep/er/conn"
    )
    async with Node(plain.runtime, tmp_path) as node:
        await node.run(*tasks, **SUPPLIES)  # type: ignore[arg-type]  # see `run`
        for slot, task in enumerate(tasks, 1):
            assert await inside(plain, task, script) == [
                "pass",
                f"pass@{slot}",
                f"web.{slot} front {HOSTNAME}",
                "400",
            ]
        await node.run()
        assert not (files_root() / plain.runtime._node_id).exists()
    await plain.restart()


async def test_a_template_that_fails_rejects_its_task_and_says_where(
    plain: Harness, tmp_path: Path
) -> None:
    task = make_task(plain, container(env=("A={{.Service.Labels.nope}}",)))
    assert task.task is not None
    async with Node(plain.runtime, tmp_path) as node:
        await node.run(task, until_state=TaskState.REJECTED)
        status = node.status(task.task.id)
        await node.run()
    await plain.restart()
    assert status is not None
    assert (status.state, status.cause) == (TaskState.REJECTED, "unsupported")
    assert status.err.startswith(
        "environment A: line 1, column 3: there is no label 'nope' (set: tier)"
    )


@pytest.mark.parametrize("isolate", [False, pytest.param(True, marks=needs_root)])
async def test_secrets_are_nowhere_on_the_disk_and_go_with_their_tasks(
    tmp_path: Path, isolate: bool
) -> None:
    marker = f"hush-{new_id(system_rng())}"
    supplies = {"secrets": (SecretData(id="s", name="key", data=marker.encode()),)}
    path = "/run/secrets/key" if isolate else "$SWARM_FILES/run/secrets/key"
    state = tmp_path / "state"
    state.mkdir()
    async with harness(tmp_path / "p", isolate=isolate, cgroup_root=tmp_path / "none") as held:
        first, second = (make_task(held, container(secrets=SECRETS[:1])) for _ in range(2))
        async with Node(held.runtime, state) as node:
            await node.run(first, second, **supplies)  # type: ignore[arg-type]  # see `run`
            said = await inside(held, first, f"cat {path}; echo; stat -f -c %T {path}")
            assert said == [marker, "tmpfs"]
            await node.worker._state.flushed()
            assert on_disk(marker.encode(), tmp_path) == []
        # The agent goes and comes; nobody but it knew.
        held.runtime = await held.make()
        async with Node(held.runtime, state) as node:
            assert await inside(held, second, f"cat {path}") == [marker]
            await node.run(shut_down(first), second, **supplies)  # type: ignore[arg-type]
            assert await inside(held, second, f"cat {path}") == [marker]
            await node.run()
        held.runtime = await held.make()
        assert not (files_root() / held.runtime._node_id).exists()
        assert on_disk(marker.encode(), tmp_path) == []


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tmpfs in sight of tasks: they have a /tmp and a /dev/shm of their own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


@needs_root
async def test_isolated_tasks_do_not_see_the_secrets_of_others(
    tmp_path: Path, memory: Path
) -> None:
    async with (
        harness(tmp_path / "a", isolate=False) as plain,
        harness(tmp_path / "b", isolate=True) as isolated,
    ):
        files = [TaskFile("/key", b"hush", secret=True)]
        await plain.run(work("sleep", "1000", files=files))
        docker = DockerFiles("n1", memory_folder("files"))
        docker.write("t1", files)
        shown = (files_root() / plain.runtime._node_id, memory_folder("files") or memory)
        assert all(os.listdir(folder) for folder in shown)
        look = f"for d in {shown[0].parent} {shown[1]}; do ls -A $d; done; ls {memory}"
        code, said = await isolated.finish(work("sh", "-c", look))
        docker.remove("t1")
        assert code == 0
        assert shown[0].name not in said and "n1" not in said.split()


@needs_root
@pytest.mark.parametrize("uid", [0, 65534])
async def test_a_plain_task_of_any_user_reads_its_own_files(plain: Harness, uid: int) -> None:
    files = [
        TaskFile("/run/secrets/mine", b"mine", uid=uid, gid=uid, mode=0o400),
        TaskFile("/run/secrets/others", b"others", uid=1, gid=1, mode=0o400),
    ]
    script = 'cd "$SWARM_FILES/run/secrets"; cat mine; echo; stat -c "%u %g %a" mine others; cat others 2>&1; exit 0'
    job = work("sh", "-c", script, files=files, container=ContainerSpec(user=f"{uid}:{uid}"))
    code, said = await plain.finish(job)
    lines = said.splitlines()
    assert (code, lines[:3]) == (0, ["mine", f"{uid} {uid} 400", "1 1 400"])
    assert (lines[3] == "others") if uid == 0 else ("denied" in lines[3])


def test_without_root_an_owner_is_refused_and_says_why(tmp_path: Path) -> None:
    files = Files("n1", tmp_path)
    powers = Powers(root=False, isolated=False)
    (problem,) = files.problems([TaskFile("/key", b"x", uid=7, gid=os.getegid())], powers)
    assert problem.startswith('file "/key": owner 7:')
    assert "needs root on the node, and swarmd does not run as root" in problem
    own = TaskFile("/key", b"x", uid=os.geteuid(), gid=0)
    assert files.problems([own, TaskFile("/x", b"")], powers) == []


def test_folders_are_for_their_task_alone_and_in_memory(tmp_path: Path) -> None:
    assert (
        filesystem(next(p for p in (files_root(), *files_root().parents) if p.exists())) == "tmpfs"
    )
    files = Files("n1", tmp_path)
    folder = files.write("t1", [TaskFile("/a/b", b"x", mode=0o440)], uid=None, gid=None)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "a/b").stat().st_mode) == 0o440
    files.write("t2", [TaskFile("/a", b"x")], uid=None, gid=None)
    files.keep({"t2"})
    assert [p.name for p in (tmp_path / "n1").iterdir()] == ["t2"]
    files.remove("t2")
    assert list(tmp_path.iterdir()) == []


async def test_a_target_that_is_no_file_is_refused(plain: Harness) -> None:
    for target in ("/", "/a/../b"):
        with pytest.raises(Rejected, match="must be an absolute path below /"):
            await plain.runtime.prepare(work("true", files=[TaskFile(target, b"x")]))


# An agent that runs one task with a secret, has begun another one, and waits to be killed.
AGENT = """
import asyncio, sys
from pathlib import Path
from agent.runtime.base import TaskFile
from agent.runtime.process import ProcessRuntime
from swarm.clock import SystemClock
from tests.integration.runtime_process.conftest import work

async def main():
    folder, node_id, runs, begun, marker, isolate = sys.argv[1:]
    runtime = ProcessRuntime(folder=Path(folder), node_id=node_id, bind_address="127.0.0.2",
        clock=SystemClock(), isolate=isolate == "yes")
    await runtime.connect()
    files = [TaskFile("/run/secrets/key", marker.encode(), secret=True)]
    job = work("sleep", "1000", task_id=runs, files=files)
    await runtime.prepare(job)
    await runtime.start(job)
    other = work("sleep", "1000", task_id=begun, files=files)
    await runtime.prepare(other)
    await runtime._make_record(other)
    print("ready", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("isolate", ["no", pytest.param("yes", marks=needs_root)])
async def test_an_agent_that_is_killed_leaves_no_secrets_but_those_of_running_tasks(
    plain: Harness, isolated: Harness, isolate: str
) -> None:
    held = isolated if isolate == "yes" else plain
    marker = f"hush-{new_id(system_rng())}"
    runs, begun = new_id(system_rng()), new_id(system_rng())
    words = [str(held.folder), held.runtime._node_id, runs, begun, marker, isolate]
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, *words, stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    async with asyncio.timeout(30):
        assert await agent.stdout.readline() == b"ready\n"
    os.kill(agent.pid, signal.SIGKILL)
    await agent.wait()

    found = {f.task_id: f.phase for f in await held.runtime.adopt()}
    assert found == {runs: Phase.RUNNING, begun: Phase.CREATED}
    assert on_disk(marker.encode(), held.folder) == []
    folder = files_root() / held.runtime._node_id
    assert (isolate == "yes" and not folder.exists()) or [p.name for p in folder.iterdir()] == [
        runs
    ]
    job = work("unused", task_id=runs)
    path = "/run/secrets/key" if isolate == "yes" else "$SWARM_FILES/run/secrets/key"
    assert await held.execute(job, "sh", "-c", f"cat {path}") == (0, marker)
    # Its end is noticed although no agent started it, and takes the secret with it.
    await held.runtime.stop(runs, signal="KILL", grace_s=0)
    assert (await held.event()).kind is EventKind.EXITED
    await until(lambda: not folder.exists())
    await held.runtime.remove(begun)
