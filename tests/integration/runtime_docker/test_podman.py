"""The same runtime on Podman's compatible socket."""

from __future__ import annotations

import shutil
import signal
from collections.abc import AsyncIterator

import pytest

from agent.runtime.base import EventKind, Phase, Rejected, TaskFile
from deploy.testbed import Bed, Host
from deploy.testbed.images import IMAGES, root_archive
from deploy.testbed.processes import poll
from swarm.ids import new_id, system_rng
from swarm.v1 import (
    ContainerSpec,
    HealthConfig,
    Network,
    NetworkAttachmentSpec,
    NetworkSpec,
    ResourceRequirements,
    Resources,
    TaskSpec,
)
from tests.integration.runtime_docker.conftest import Harness

pytestmark = [
    pytest.mark.docker,
    pytest.mark.root,
    pytest.mark.skipif(
        shutil.which("podman") is None, reason="needs podman (apt-get install podman)"
    ),
]
# A host of its own, with Podman in the place of Docker.
HOST = 5


@pytest.fixture(scope="module")
def podman_host(bed: Bed) -> Host:
    host = bed.host(HOST)
    # Its default limits are above what a machine may hand out that is itself a container.
    (host.folder / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
        '[engine]\nlock_type = "file"\n'  # else it leaves a segment in /dev/shm
    )
    host.spawn(
        "podman",
        *("env", f"CONTAINERS_CONF={host.folder}/containers.conf", "podman"),
        *("--root", host.folder / "containers", "--runroot", "/run/containers"),
        *("--cgroup-manager", "cgroupfs"),
        *("system", "service", "--time", "0", f"unix://{host.docker_socket}"),
    )
    assert poll(host.docker_socket.exists, 20), host.log("podman")
    archive = root_archive()
    for name, changes in IMAGES.items():
        words = [word for change in changes for word in ("--change", change)]
        host.docker("import", *words, "-", name, stdin=archive)
    return host


@pytest.fixture
async def podman(podman_host: Host) -> AsyncIterator[Harness]:
    harness = Harness(podman_host, new_id(system_rng()))
    await harness.open()
    yield harness
    await harness.clean()


async def test_it_says_what_it_is(podman: Harness) -> None:
    said = await podman.runtime.describe()
    assert said.engine is not None
    assert said.engine.name == "podman"
    assert "runc" in said.runtimes or "crun" in said.runtimes


async def test_a_task_runs_ends_and_is_removed(podman: Harness) -> None:
    limits = Resources(memory_bytes=50 << 20, cpu_nano=100_000_000)
    spec = TaskSpec(resources=ResourceRequirements(limits=limits))
    work, started = await podman.run("sh", "-c", "echo said; sleep 0.3; exit 3", spec=spec)
    assert started.address
    limit = podman.cgroup(started, "memory", "memory.limit_in_bytes", "memory.max")
    assert limit == str(50 << 20)
    assert (await podman.event(work, EventKind.EXITED)).exit_code == 3
    assert [line.data for line in await podman.lines(work, follow=True)] == [b"said"]
    await podman.runtime.remove(work.task_id)
    assert await podman.runtime.stop(work.task_id, signal="", grace_s=1) is None


async def test_tasks_are_adopted_and_stopped(podman: Harness) -> None:
    work, started = await podman.run("sh", "-c", "trap 'exit 42' INT; while :; do sleep 0.05; done")
    runtime = await podman.restart()
    (found,) = await runtime.adopt()
    assert (found.phase, found.started) == (Phase.RUNNING, started)
    podman.listen()
    assert await runtime.stop(work.task_id, signal="SIGINT", grace_s=20) == 42
    assert podman.events_of(work) == []
    stubborn, _ = await podman.run("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    assert await runtime.stop(stubborn.task_id, signal="SIGTERM", grace_s=0.3) == 137


async def test_networks_files_and_commands_work(podman: Harness) -> None:
    network = Network(id=new_id(system_rng()), spec=NetworkSpec(name="app_default"))
    podman.networks[network.id] = network
    files = (TaskFile("/run/secrets/key", b"hush", uid=7, mode=0o400, secret=True),)
    attachment = NetworkAttachmentSpec(target=network.id, aliases=("web",))
    work, started = await podman.run("sleep", "100", networks=[attachment], files=files)
    assert [n.network_id for n in started.networks] == [network.id]
    code, said = await podman.inside(
        work,
        "sh",
        "-c",
        "cat; cat /run/secrets/key; stat -c ' %a %u' /run/secrets/key; exit 7",
        stdin=b"typed ",
    )
    assert (code, said) == (7, "typed hush 400 7\n")
    assert (await podman.runtime.stats(work.task_id)).memory_bytes > 0
    await podman.runtime.stop(work.task_id, signal="SIGKILL", grace_s=5)
    await podman.runtime.remove(work.task_id)
    await podman.runtime.release_network(network.id)
    assert network.id not in podman.host.docker("network", "ls", "--format", "{{.Labels}}")


async def test_a_killed_container_is_told(podman: Harness) -> None:
    work, _ = await podman.run("sleep", "100")
    podman.host.docker("kill", "-s", str(int(signal.SIGKILL)), work.assignment.name)
    assert (await podman.event(work, EventKind.EXITED)).exit_code == 137


async def test_healthchecks_are_refused_where_podman_cannot_run_them(podman: Harness) -> None:
    if podman.runtime._facts.healthchecks:
        pytest.skip("needs a machine without systemd")
    container = ContainerSpec(healthcheck=HealthConfig(test=("CMD", "true")))
    with pytest.raises(Rejected, match="systemd"):
        await podman.runtime.prepare(podman.work("sleep", "1", container=container))
