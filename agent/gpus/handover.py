"""How a task is given exactly the GPUs that it claims, and none of the others. Pure but for looking
at device nodes.

A runtime asks for a Handover and says it in its own words: the docker runtime as device requests
and environment, the process runtime as environment and rules of the devices cgroup. Always by
UUID or name, never by count: no engine keeps account of what it has given out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.gpus.device import CDI, NVIDIA, Device

DEV = Path("/dev")
# Of one GPU, or of one MIG instance; every other node below nvidia* is the driver's own.
_NUMBERED = ("nvidia[0-9]*", "nvidia-caps/nvidia-cap*")
_CONTROLS = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")


@dataclass(frozen=True, slots=True)
class Handover:
    """One task's GPUs."""

    # For the engine's NVIDIA driver.
    uuids: tuple[str, ...] = ()
    # For a CUDA program, which knows neither CDI nor an engine.
    cuda: tuple[str, ...] = ()
    # For the Container Device Interface.
    cdi: tuple[str, ...] = ()
    # Device nodes that the task needs, where neither of the two gives them.
    nodes: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    # Rules of the devices cgroup (v1) that keep other GPUs from the task: "c 195:1 rwm".
    denied: tuple[str, ...] = ()
    # Claimed, and not on this node.
    missing: tuple[str, ...] = ()
    # Claimed, and known by a CDI name alone: only a container engine can give them.
    engine_only: tuple[str, ...] = ()
    # There are GPUs here, so what the task did not claim must be hidden from it.
    hide: bool = False
    # Where the control daemon of MPS has its pipes; empty: there is none (see sharing.py).
    mps: str = ""
    # Of the host, which a container must have at the same place.
    shared_paths: tuple[str, ...] = ()


# Claimed UUIDs to what the task is given.
HandOver = Callable[[Sequence[str]], Handover]


def as_claimed(claimed: Sequence[str]) -> Handover:
    """Where nothing is known of the node's GPUs: the driver judges what it is asked for."""
    return Handover(uuids=tuple(claimed), cuda=tuple(claimed), hide=bool(claimed))


def hand_over(
    devices: Sequence[Device],
    claimed: Sequence[str],
    *,
    strict: bool = True,
    dev: Path = DEV,
    mps: str = "",
) -> Handover:
    """What a task with these claims gets of these devices, all that the node has.

    Not `strict`: the node's GPUs are not all known yet, and unknown ones are NVIDIA's to judge.
    `mps`: where MPS has its pipes.
    """
    known = {d.gpu.uuid: d for d in devices}
    given = [known[uuid] for uuid in claimed if uuid in known]
    unknown = tuple(uuid for uuid in claimed if uuid not in known)
    env: dict[str, str] = {}
    for device in given:
        for key, value in device.env.items():
            env[key] = f"{env[key]},{value}" if key in env else value
    assumed = () if strict else unknown
    nvidia = [d.gpu.uuid for d in given if d.gpu.driver == NVIDIA]
    cuda = [d.gpu.uuid for d in given if _is_nvidia(d)]
    allowed = dict.fromkeys(node for d in given for node in d.nodes)
    return Handover(
        uuids=(*nvidia, *assumed),
        cuda=(*cuda, *assumed),
        cdi=tuple(d.gpu.cdi_name for d in given if d.gpu.driver == CDI),
        nodes=tuple(
            dict.fromkeys(n for d in given if d.gpu.driver not in (NVIDIA, CDI) for n in d.nodes)
        ),
        env=env,
        denied=_denied(devices, tuple(allowed), dev, driver=bool(cuda or assumed)),
        missing=unknown if strict else (),
        engine_only=tuple(
            d.gpu.uuid for d in given if d.gpu.driver == CDI and not d.nodes and not _is_nvidia(d)
        ),
        hide=bool(devices or claimed or (dev / "nvidiactl").exists()),
        mps=mps if cuda or assumed else "",
    )


def _is_nvidia(device: Device) -> bool:
    return device.gpu.driver == NVIDIA or device.gpu.cdi_name.startswith("nvidia.com/")


def _denied(
    devices: Sequence[Device], allowed: Sequence[str], dev: Path, *, driver: bool
) -> tuple[str, ...]:
    """Every GPU's device nodes but the allowed ones; without a GPU of NVIDIA's its driver's too."""
    nodes = {node for d in devices for node in d.nodes}
    for pattern in _NUMBERED:
        nodes.update(str(path) for path in dev.glob(pattern))
    if not driver:
        nodes.update(str(dev / name) for name in _CONTROLS)
    keep = {_number(node) for node in allowed}
    rules = {_number(node) for node in nodes} - keep - {""}
    return tuple(f"{rule} rwm" for rule in sorted(rules))


def _number(node: str) -> str:
    """As "c 195:0"; empty: there is no such device."""
    try:
        found = os.stat(node)
    except OSError:
        return ""
    kind = "c" if stat.S_ISCHR(found.st_mode) else "b" if stat.S_ISBLK(found.st_mode) else ""
    return f"{kind} {os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" if kind else ""
