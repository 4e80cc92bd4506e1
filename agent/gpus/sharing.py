"""A part of a GPU, made to hold where CUDA's Multi-Process Service (MPS) runs. Pure but for looking
at its pipe directory.

The manager keeps account of shares; nothing of a GPU itself keeps two programs apart. Where the
control daemon of MPS runs, a task with a fraction becomes its client: with its share of the GPU's
threads, and with the memory that it claimed. A task in a container needs the daemon's pipes and the
host's shared memory for that. Variables and their forms: NVIDIA, "Multi-Process Service", appendix
on environment variables; memory is named by the index among the GPUs that the task sees, since
limits by UUID have been found not to be applied (NVIDIA's device plugin for Kubernetes, 0.15).

The limits are the client's own settings: they hold for programs that leave their environment as it
is. Where there is no daemon, the task runs all the same; its status and the node's warnings say so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from agent.gpus.device import NVIDIA
from agent.gpus.handover import HandOver, Handover
from swarm import errors
from swarm.gpus import WHOLE, GpuAsk, ask_of, format_share
from swarm.v1 import Assignment, Gpu, TaskSpec

# The daemon's own default.
PIPES = Path("/tmp/nvidia-mps")
SHARED_MEMORY = "/dev/shm"
_MIB = 1 << 20


def daemon_at(pipes: Path) -> bool:
    """Whether a control daemon of MPS serves this directory."""
    try:
        if not stat.S_ISFIFO((pipes / "control").stat().st_mode):
            return False
        text = (pipes / "nvidia-cuda-mps-control.pid").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        # Of a container's daemon the pid says nothing here, and some write none.
        return (pipes / "control").exists()
    except (OSError, ValueError):
        return False
    return not text.isdecimal() or _runs(int(text))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def ask_of_task(spec: TaskSpec | None) -> GpuAsk | None:
    """The ask of a task's reservations; None: no GPUs, or nothing that can be read."""
    resources = spec.resources if spec is not None else None
    try:
        return ask_of(resources.reservations if resources is not None else None)
    except errors.Invalid:
        return None


def limited(given: Handover, spec: TaskSpec | None) -> Handover:
    """The same GPUs with what keeps the task to its part of one, where that can be done."""
    ask = ask_of_task(spec)
    if ask is None or not ask.shared or not given.mps or len(given.cuda) != 1:
        return given
    env = {
        "CUDA_MPS_PIPE_DIRECTORY": given.mps,
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(max(1, ask.share * 100 // WHOLE)),
    }
    if ask.memory_bytes:
        env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={max(1, ask.memory_bytes // _MIB)}M"
    return replace(given, env={**given.env, **env}, shared_paths=(given.mps, SHARED_MEMORY))


def given_to(assignment: Assignment, gpus: HandOver) -> Handover:
    """What an assignment's task is given, kept to its part."""
    claimed = assignment.task.assigned_gpus if assignment.task is not None else ()
    return limited(gpus(claimed), assignment.spec)


def unlimited(
    spec: TaskSpec | None, claimed: Sequence[str], gpus: Collection[Gpu], mps: str
) -> str:
    """Why a task's part of a GPU does not hold, for people; empty: it does, or it has none."""
    ask = ask_of_task(spec) if claimed else None
    if ask is None or not ask.shared:
        return ""
    part = f"its {format_share(ask.share)} of GPU {claimed[0]}"
    if not all(_is_nvidia(gpu) for gpu in gpus if gpu.uuid in claimed):
        return f"{part} is not enforced: only NVIDIA's GPUs can be limited (by MPS)"
    if not mps:
        return f"{part} is not enforced: no MPS control daemon runs here"
    return ""


def _is_nvidia(gpu: Gpu) -> bool:
    return gpu.driver == NVIDIA or gpu.cdi_name.startswith("nvidia.com/")
