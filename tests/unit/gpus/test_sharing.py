"""A part of a GPU is made to hold by MPS, and where it cannot be that is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.gpus import Device, Handover, given_to, hand_over, limited, unlimited
from agent.gpus.sharing import SHARED_MEMORY, daemon_at
from swarm.v1 import (
    Assignment,
    DeviceRequest,
    Gpu,
    ResourceRequirements,
    Resources,
    Task,
    TaskSpec,
)

NOWHERE = Path("/nowhere")
ONE = Gpu(uuid="GPU-1", driver="nvidia", healthy=True)
AMD = Gpu(uuid="AMD-1", driver="none", healthy=True)
PIPES = "/run/mps"


def spec(**options: str) -> TaskSpec:
    request = DeviceRequest(capabilities=("gpu",), options=options)
    return TaskSpec(resources=ResourceRequirements(reservations=Resources(devices=(request,))))


def gpus(claimed: Sequence[str], *, mps: str = PIPES) -> Handover:
    devices = (Device(ONE), Device(AMD, nodes=("/dev/zero",)))
    return hand_over(devices, claimed, dev=NOWHERE, mps=mps)


def test_a_part_becomes_a_share_of_the_threads_and_a_limit_of_memory() -> None:
    got = limited(gpus(("GPU-1",)), spec(fraction="0.25", memory="10GiB"))
    assert got.env == {
        "CUDA_MPS_PIPE_DIRECTORY": PIPES,
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=10240M",
    }
    assert got.shared_paths == (PIPES, SHARED_MEMORY)
    assert got.uuids == ("GPU-1",)


def test_without_memory_only_threads_are_limited_and_at_least_one_percent() -> None:
    got = limited(gpus(("GPU-1",)), spec(fraction="1/300"))
    assert got.env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "1"
    assert "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT" not in got.env


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(limited(gpus(("GPU-1",)), spec(memory="10GiB")), id="a whole GPU"),
        pytest.param(limited(gpus(("GPU-1",), mps=""), spec(fraction="0.5")), id="no daemon"),
        pytest.param(limited(gpus(("AMD-1",)), spec(fraction="0.5")), id="another vendor"),
        pytest.param(limited(gpus(()), spec(fraction="0.5")), id="nothing claimed"),
        pytest.param(limited(gpus(("GPU-1",)), None), id="no spec"),
        pytest.param(limited(gpus(("GPU-1",)), spec(fraction="much")), id="unreadable"),
    ],
)
def test_what_is_no_part_of_an_nvidia_gpu_with_mps_is_given_as_ever(given: Handover) -> None:
    assert not given.env
    assert not given.shared_paths


def test_an_assignment_is_given_what_it_claims_and_kept_to_its_part() -> None:
    task = Task(id="t", assigned_gpus=("GPU-1",))
    got = given_to(Assignment(task=task, spec=spec(fraction="0.5")), gpus)
    assert (got.uuids, got.env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"]) == (("GPU-1",), "50")
    assert not given_to(Assignment(), gpus).uuids


@pytest.mark.parametrize(
    ("options", "claimed", "mps", "said"),
    [
        ({"fraction": "0.5"}, ("GPU-1",), PIPES, ""),
        ({"fraction": "0.5"}, ("GPU-1",), "", "0.5 of GPU GPU-1 is not enforced: no MPS"),
        ({"fraction": "0.5"}, ("AMD-1",), PIPES, "only NVIDIA's GPUs"),
        ({"fraction": "0.5"}, (), "", ""),
        ({}, ("GPU-1",), "", ""),
    ],
)
def test_a_part_that_does_not_hold_is_said_with_its_reason(
    options: dict[str, str], claimed: tuple[str, ...], mps: str, said: str
) -> None:
    found = unlimited(spec(**options), claimed, (ONE, AMD), mps)
    assert said in found
    assert bool(found) == bool(said)


def test_a_daemon_is_there_when_its_pipe_is_and_its_process_lives(tmp_path: Path) -> None:
    assert not daemon_at(tmp_path)
    (tmp_path / "control").touch()
    assert not daemon_at(tmp_path)  # no pipe
    (tmp_path / "control").unlink()
    os.mkfifo(tmp_path / "control")
    assert daemon_at(tmp_path)
    pid_file = tmp_path / "nvidia-cuda-mps-control.pid"
    pid_file.write_text(f"{os.getpid()}\n")
    assert daemon_at(tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    pid_file.write_text(str(ended.pid))
    assert not daemon_at(tmp_path)
