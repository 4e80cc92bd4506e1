"""GPUs of containers on a real engine, which a stand-in for NVIDIA's hook lets take device requests.

The hook runs as the engine runs it, with the container made and not started, and notes what the engine asks of it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.gpus import Device, hand_over
from agent.runtime.base import Rejected, Work
from deploy.testbed import Bed, Host
from swarm.ids import new_id, system_rng
from swarm.v1 import ContainerSpec, DeviceRequest, Gpu, ResourceRequirements, Resources, TaskSpec
from tests.integration.runtime_docker.conftest import Harness

pytestmark = [pytest.mark.docker, pytest.mark.root]

# Its standard input is the container's state, which names the bundle.
HOOK = """#!/bin/sh
bundle=$(sed 's/.*"bundle":"\\([^"]*\\)".*/\\1/')
tr -d ' \\n' <"$bundle/config.json" >"$(dirname "$0")/calls/$(date +%s%N)"
"""
IMAGE = "greedy:latest"
DEVICES = (
    *(Device(Gpu(uuid=f"GPU-{n}", driver="nvidia", healthy=True)) for n in range(8)),
    Device(Gpu(uuid="AMD-1", driver="cdi", cdi_name="amd.com/gpu=1", healthy=True)),
    Device(
        Gpu(uuid="X-1", driver="none", healthy=True), nodes=("/dev/full",), env={"X_DEVICES": "one"}
    ),
)


@pytest.fixture(scope="module")
def hooked(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Path]]:
    """An engine that finds the hook on its PATH, and the folder of what the hook notes."""
    host = bed.docker_hosts(2)[1]
    folder = tmp_path_factory.mktemp("hook")
    (folder / "calls").mkdir()
    hook = folder / "nvidia-container-runtime-hook"
    hook.write_text(HOOK)
    hook.chmod(0o755)
    host.stop("dockerd")
    host.extra_environment["PATH"] = f"{folder}:{host.environment()['PATH']}"
    try:
        host.start_docker()
        made = host.docker("create", "busybox:latest", "true").strip()
        change = "ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all"
        host.docker("commit", "--change", change, made, IMAGE)
        host.docker("rm", made)
        yield host, folder / "calls"
    finally:
        del host.extra_environment["PATH"]
        host.stop("dockerd")
        host.start_docker()


@pytest.fixture
async def node(hooked: tuple[Host, Path]) -> AsyncIterator[Harness]:
    harness = Harness(
        hooked[0], new_id(system_rng()), gpus=lambda claimed: hand_over(DEVICES, claimed)
    )
    await harness.open()
    try:
        yield harness
    finally:
        await harness.clean()


@pytest.fixture
def calls(hooked: tuple[Host, Path]) -> Path:
    for file in hooked[1].iterdir():
        file.unlink()
    return hooked[1]


def claiming(
    node: Harness,
    *gpus: str,
    image: str = "busybox:latest",
    env: tuple[str, ...] = (),
    **claim: Any,
) -> Work:
    container = ContainerSpec(image=image, command=("sh", "-c"), env=env)
    spec = TaskSpec()
    if claim:
        devices = (DeviceRequest(**claim),)
        spec = TaskSpec(resources=ResourceRequirements(reservations=Resources(devices=devices)))
    made = node.work("env; ls /dev/full 2>&1", container=container, spec=spec)
    assert made.assignment.task is not None
    task = replace(made.assignment.task, assigned_gpus=gpus)
    return Work(replace(made.assignment, task=task), made.files, made.networks)


async def seen(node: Harness, work: Work) -> dict[str, str]:
    """The environment inside."""
    await node.start(work)
    lines = [line.data.decode() for line in await node.lines(work, follow=True)]
    return dict(line.split("=", 1) for line in lines if "=" in line)


def asked(calls: Path) -> list[list[str]]:
    """What the engine had told the hook in each call: the GPUs that it gives the container."""
    found = []
    for file in sorted(calls.iterdir()):
        env = json.loads(file.read_text())["process"]["env"]
        found.append([word for word in env if word.startswith("NVIDIA_VISIBLE_DEVICES=")])
    return found


async def test_the_container_is_given_exactly_the_claimed_gpus(node: Harness, calls: Path) -> None:
    work = claiming(
        node, "GPU-5", "GPU-2", capabilities=("gpu",), count=2, options={"model": "A100"}
    )
    inside = await seen(node, work)
    assert inside["NVIDIA_VISIBLE_DEVICES"] == "GPU-5,GPU-2"
    (request,) = node.inspect(work)["HostConfig"]["DeviceRequests"]
    assert (request["Count"], request["DeviceIDs"]) == (0, ["GPU-5", "GPU-2"])
    assert (request["Driver"], request["Options"]) == ("nvidia", {})
    assert all(set(words) == {"NVIDIA_VISIBLE_DEVICES=GPU-5,GPU-2"} for words in asked(calls))
    assert len(asked(calls)) == 1


async def test_neither_image_nor_spec_can_ask_for_more(node: Harness, calls: Path) -> None:
    inside = await seen(
        node, claiming(node, "GPU-1", image=IMAGE, env=("NVIDIA_VISIBLE_DEVICES=all",))
    )
    assert inside["NVIDIA_VISIBLE_DEVICES"] == "GPU-1"
    assert [set(words) for words in asked(calls)] == [{"NVIDIA_VISIBLE_DEVICES=GPU-1"}]


@pytest.mark.parametrize(
    "env", [(), ("NVIDIA_VISIBLE_DEVICES=all",), ("NVIDIA_VISIBLE_DEVICES",)], ids=str
)
async def test_a_task_that_claims_none_sees_none(
    node: Harness, calls: Path, env: tuple[str, ...]
) -> None:
    inside = await seen(node, claiming(node, image=IMAGE, env=env))
    assert inside["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert asked(calls) == []  # the engine does not even call it


async def test_device_nodes_are_given_where_there_is_no_driver(node: Harness) -> None:
    work = claiming(node, "X-1", capabilities=("gpu",))
    inside = await seen(node, work)
    assert (inside["X_DEVICES"], inside["NVIDIA_VISIBLE_DEVICES"]) == ("one", "void")
    (device,) = node.inspect(work)["HostConfig"]["Devices"]
    assert device["PathOnHost"] == "/dev/full"
    assert node.inspect(work)["HostConfig"]["DeviceRequests"] is None


async def test_what_cannot_be_given_is_rejected_with_the_reason(node: Harness) -> None:
    with pytest.raises(Rejected, match="GPU GPU-99 is not on this node any more"):
        await node.runtime.prepare(claiming(node, "GPU-99"))
    if node.runtime._facts.api < (1, 44):
        with pytest.raises(Rejected, match="a CDI device needs an engine with API 1.44"):
            await node.runtime.prepare(claiming(node, "AMD-1"))
