"""GPUs of processes: named in the environment, and the others refused by the kernel."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.gpus import Device, Handover, hand_over
from agent.runtime.base import Rejected, Work
from swarm.v1 import ContainerSpec, DeviceRequest, Gpu, ResourceRequirements, Resources
from tests.integration.runtime_process.conftest import Harness, harness, work

pytestmark = pytest.mark.root

# Devices that every machine has play those of GPUs.
DEVICES = (
    Device(Gpu(uuid="GPU-zero", driver="nvidia", healthy=True), nodes=("/dev/zero",)),
    Device(Gpu(uuid="GPU-full", driver="nvidia", healthy=True), nodes=("/dev/full",)),
    Device(Gpu(uuid="AMD-1", driver="cdi", cdi_name="amd.com/gpu=1", healthy=True)),
)
LOOK = (
    "sh",
    "-c",
    "echo cuda=$CUDA_VISIBLE_DEVICES nvidia=$NVIDIA_VISIBLE_DEVICES;"
    "for d in zero full; do head -c1 /dev/$d >/dev/null 2>&1 && echo $d; done; true",
)


def give(claimed: Sequence[str]) -> Handover:
    return hand_over(DEVICES, claimed)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Harness]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    async with harness(tmp_path / "p", isolate=True, gpus=give) as held:
        cgroups = held.runtime._cgroups
        if not held.runtime._powers.isolated or cgroups is None or not cgroups.denies_devices:
            pytest.skip("needs namespaces and the devices cgroup of version 1")
        yield held


def claiming(*gpus: str, command: Sequence[str] = LOOK, env: tuple[str, ...] = ()) -> Work:
    made = work(*command, container=ContainerSpec(env=env))
    assert made.assignment.task is not None
    task = replace(made.assignment.task, assigned_gpus=gpus)
    return replace_work(made, task)


def replace_work(made: Work, task: object) -> Work:
    return Work(replace(made.assignment, task=task), made.files, made.networks)


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ((), "cuda= nvidia=void"),
        (("GPU-zero",), "cuda=GPU-zero nvidia=GPU-zero\nzero"),
        (("GPU-full",), "cuda=GPU-full nvidia=GPU-full\nfull"),
        (("GPU-full", "GPU-zero"), "cuda=GPU-full,GPU-zero nvidia=GPU-full,GPU-zero\nzero\nfull"),
    ],
    ids=str,
)
async def test_a_task_reaches_the_gpus_that_it_claims_and_no_others(
    node: Harness, claims: tuple[str, ...], said: str
) -> None:
    # What the spec says of them does not count.
    env = ("CUDA_VISIBLE_DEVICES=0,1", "NVIDIA_VISIBLE_DEVICES=all")
    assert await node.finish(claiming(*claims, env=env)) == (0, said)


async def test_exec_is_held_to_the_same(node: Harness) -> None:
    task = claiming("GPU-zero", command=("sleep", "100"))
    await node.run(task)
    assert await node.execute(task, *LOOK) == (0, "cuda=GPU-zero nvidia=GPU-zero\nzero\n")


async def test_a_part_of_a_gpu_comes_with_the_pipes_of_mps_also_behind_its_own_tmp(
    tmp_path: Path,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with tempfile.TemporaryDirectory(prefix="mps", dir="/tmp") as pipes:
        os.mkfifo(f"{pipes}/control")
        with tempfile.NamedTemporaryFile(prefix="mps", dir="/dev/shm") as shared:
            look = (
                f"test -p {pipes}/control && test -f {shared.name} && env | grep ^CUDA_MPS | sort"
            )
            request = DeviceRequest(capabilities=("gpu",), options={"fraction": "0.5"})
            reserved = Resources(devices=(request,))
            made = claiming("GPU-zero", command=("sh", "-c", look))
            assert made.assignment.spec is not None
            spec = replace(
                made.assignment.spec, resources=ResourceRequirements(reservations=reserved)
            )
            asked = Work(replace(made.assignment, spec=spec))

            def with_mps(claimed: Sequence[str]) -> Handover:
                return hand_over(DEVICES, claimed, mps=pipes)

            async with harness(tmp_path / "p", isolate=True, gpus=with_mps) as node:
                if not node.runtime._powers.isolated:
                    pytest.skip("needs namespaces")
                assert await node.finish(asked) == (
                    0,
                    f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=50\nCUDA_MPS_PIPE_DIRECTORY={pipes}",
                )


async def test_what_cannot_be_given_is_rejected_with_the_reason(node: Harness) -> None:
    with pytest.raises(Rejected, match="GPU GPU-9 is not on this node any more"):
        await node.runtime.prepare(claiming("GPU-9"))
    with pytest.raises(Rejected, match="AMD-1 is known by its CDI name alone"):
        await node.runtime.prepare(claiming("AMD-1"))


async def test_groups_of_devices_go_with_their_tasks(node: Harness) -> None:
    home = Path("/sys/fs/cgroup/devices/swarm") / node.runtime._node_id
    task = claiming(command=("sleep", "100"))
    await node.run(task)
    assert (home / task.task_id).is_dir()
    await node.runtime.remove(task.task_id)
    assert not home.exists()


async def test_where_devices_cannot_be_denied_the_node_says_so(tmp_path: Path) -> None:
    async with harness(
        tmp_path / "p", isolate=False, cgroup_root=tmp_path / "none", gpus=give
    ) as held:
        said = (await held.runtime.describe()).warnings
        assert any("hidden from it by CUDA_VISIBLE_DEVICES, not refused" in w for w in said)
    async with harness(tmp_path / "q", isolate=False, cgroup_root=tmp_path / "none") as held:
        assert not any("CUDA" in w for w in (await held.runtime.describe()).warnings)
