"""Templates, secrets and configs of tasks, from a manager's word to what the container sees."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.runtime.base import TaskFile
from deploy.testbed import Host
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
    VolumeOptions,
)
from tests.fakes.node import HOSTNAME, SERVICE, Node, assignment, on_disk, shut_down
from tests.fakes.waiting import until
from tests.integration.runtime_docker.conftest import Harness

pytestmark = [pytest.mark.docker, pytest.mark.root]

GOLANG = Driver(name="golang")


class Bench:
    """A node id on one engine, whose agent may come and go."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.harness = Harness(host, new_id(system_rng()))
        self.folder = folder
        self.host = host

    def node(self) -> Node:
        self.harness.runtime = self.harness._make()
        return Node(self.harness.runtime, self.folder)

    def task(self, container: ContainerSpec, *, slot: int = 1, service: str = "web") -> Assignment:
        spec = TaskSpec(container=container)
        return assignment(
            new_id(system_rng()),
            spec,
            node_id=self.harness.node_id,
            slot=slot,
            service=service,
            labels={"tier": "front"},
        )

    async def inside(self, task: Assignment, script: str) -> str:
        return self.host.docker("exec", task.name, "sh", "-c", script).rstrip("\n")

    def sources(self, task: Assignment) -> list[Path]:
        """Where the files that the container sees lie on the host."""
        form = '{{range .Mounts}}{{if eq .Type "bind"}}{{println .Source}}{{end}}{{end}}'
        return [Path(p) for p in self.host.docker("inspect", "-f", form, task.name).split()]


@pytest.fixture
async def bench(host: Host, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(host, tmp_path)
    try:
        yield made
    finally:
        await made.harness.clean()


def container(**fields: object) -> ContainerSpec:
    base: dict[str, object] = {
        "image": "busybox:latest",
        "pull_policy": "missing",
        "args": ("sleep", "1000"),
        "stop_grace_period_ns": 0,
    }
    return ContainerSpec(**(base | fields))  # type: ignore[arg-type]  # checked by the struct


async def test_templates_are_expanded_for_each_task(bench: Bench) -> None:
    volume = f"data-{bench.harness.node_id}"
    spec = container(
        hostname="{{.Service.Name}}-{{.Task.Slot}}",
        env=(
            "WHERE={{.Node.Hostname}}/{{.Node.ID}}/{{.Node.Platform.OS}}",
            "WHO={{.Service.ID}}/{{.Task.ID}}/{{.Task.Name}}",
            '{{.Nope}}={{index .Service.Labels "tier"}}{{if eq .Task.Slot "2"}}, second{{end}}',
        ),
        mounts=(
            Mount(
                type="volume",
                source=volume + "-{{.Task.Slot}}",
                target="/data/{{.Task.Slot}}",
                volume_options=VolumeOptions(labels={"slot": "{{.Task.Slot}}"}),
            ),
        ),
        secrets=(
            SecretReference(secret_id="s", secret_name="key"),
            SecretReference(
                secret_id="t",
                secret_name="conn",
                file=FileTarget(name="deep/er/conn", uid="7", gid="8", mode=0o440),
            ),
        ),
        configs=(
            ConfigReference(
                config_id="c", config_name="conf", file=FileTarget(name="/etc/app/x.conf")
            ),
        ),
    )
    secrets = (
        SecretData(id="s", name="key", data=b"pa{{.ss\xff"),
        SecretData(id="t", name="conn", data=b'{{secret "key"}}@{{.Task.Slot}}', templating=GOLANG),
    )
    configs = (
        ConfigData(
            id="c",
            name="conf",
            data=b'id={{.Task.Slot}}\n{{range $k, $v := .Service.Labels}}{{$k}}={{$v}}\n{{end}}env={{env "WHERE"}}\n',
            templating=GOLANG,
        ),
    )
    tasks = [bench.task(spec, slot=n) for n in (1, 2)]
    try:
        async with bench.node() as node:
            await node.run(*tasks, secrets=secrets, configs=configs)
            for slot, task in enumerate(tasks, 1):
                assert task.task is not None
                said = await bench.inside(
                    task,
                    "hostname; echo $WHERE; echo $WHO; tr '\\0' '\\n' </proc/1/environ | grep Nope; ls -d /data/*; cat /etc/app/x.conf;"
                    "stat -c '%a %u %g' /run/secrets/deep/er/conn /run/secrets/key /etc/app/x.conf;"
                    "od -An -c /run/secrets/deep/er/conn",
                )
                where = f"{HOSTNAME}/{bench.harness.node_id}/linux"
                assert said.splitlines() == [
                    f"web-{slot}",
                    where,
                    f"{SERVICE}/{task.task.id}/{task.name}",
                    "{{.Nope}}=front" + (", second" if slot == 2 else ""),
                    f"/data/{slot}",
                    f"id={slot}",
                    "tier=front",
                    f"env={where}",
                    "440 7 8",
                    "444 0 0",
                    "444 0 0",
                    f"   p   a   {{   {{   .   s   s 377   @   {slot}",
                ]
                form = "{{.Labels.slot}}"
                assert bench.host.docker(
                    "volume", "inspect", "-f", form, f"{volume}-{slot}"
                ).strip() == str(slot)
    finally:
        bench.harness.drop_containers()
        bench.host.docker("volume", "rm", "-f", f"{volume}-1", f"{volume}-2")


async def test_a_template_that_fails_rejects_its_task_and_says_where(bench: Bench) -> None:
    config = ConfigReference(config_id="c", config_name="conf")
    broken = ConfigData(id="c", name="conf", data=b"a\n {{.Task.Nope}}", templating=GOLANG)
    task = bench.task(container(configs=(config,)))
    assert task.task is not None
    async with bench.node() as node:
        await node.run(task, configs=(broken,), until_state=TaskState.REJECTED)
        status = node.status(task.task.id)
    assert status is not None
    assert (status.state, status.cause) == (TaskState.REJECTED, "unsupported")
    assert "config 'conf': line 2, column 4: there is no field 'Nope'" in status.err


async def test_secrets_are_nowhere_on_the_disk_and_go_with_their_tasks(bench: Bench) -> None:
    marker = f"hush-{new_id(system_rng())}"
    reference = SecretReference(secret_id="s", secret_name="key")
    shown = ConfigReference(config_id="c", config_name="shown")
    secret = SecretData(id="s", name="key", data=marker.encode())
    config = ConfigData(id="c", name="shown", data=b'{{secret "key"}}!', templating=GOLANG)
    first = bench.task(container(secrets=(reference,), configs=(shown,)), service="one")
    second = bench.task(container(secrets=(reference,)), service="two")
    supplies = {"secrets": (secret,), "configs": (config,)}
    async with bench.node() as node:
        await node.run(first, second, **supplies)  # type: ignore[arg-type]  # see `run`
        assert await bench.inside(first, "cat /run/secrets/key /shown") == f"{marker}{marker}!"
        await node.worker._state.flushed()
        assert on_disk(marker.encode(), bench.host.folder, bench.folder) == []
        lines = (await bench.inside(first, "grep -e secrets -e shown /proc/mounts")).splitlines()
        assert len(lines) == 2
        assert all(line.split()[2] in ("tmpfs", "ramfs") for line in lines)
        assert all(line.split()[3].startswith("ro") for line in lines)

    # The agent goes and comes: its tasks keep what they have, even what nobody names any more.
    folders = {path.parent for task in (first, second) for path in bench.sources(task)}
    left = bench.harness.runtime._files.write("gone", [TaskFile("/x", marker.encode())])
    async with bench.node() as node:
        assert await bench.inside(second, "cat /run/secrets/key") == marker
        # An agent that was killed between writing files and making the container leaves none.
        assert not Path(left[0][0]).exists()
        # One service's end is not the other's.
        await node.run(shut_down(first), second, **supplies, until_state=TaskState.RUNNING)  # type: ignore[arg-type]
        await until(
            lambda: sum(f.exists() for f in folders) == 1, timeout_s=20, what=lambda: str(folders)
        )
        assert await bench.inside(second, "cat /run/secrets/key") == marker
        await node.run()
        assert not any(folder.exists() for folder in folders)
    assert on_disk(marker.encode(), bench.host.folder, bench.folder) == []
