"""One GPU as the agent knows it: what managers are told of it, and how a task gets at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from swarm.v1 import Gpu

# Values of Gpu.driver.
NVIDIA, CDI, NODES = "nvidia", "cdi", "none"
DRIVERS = (NVIDIA, CDI, NODES)


@dataclass(frozen=True, slots=True)
class Device:
    """See the module."""

    gpu: Gpu
    # Device nodes that a program needs; several GPUs may name the same one.
    nodes: tuple[str, ...] = ()
    # What programs read to find it, as ROCR_VISIBLE_DEVICES; of several GPUs joined by commas.
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Use:
    """How much of a GPU is in use just now, for metrics. None: the driver does not tell."""

    memory_bytes: int | None = None
    ratio: float | None = None  # of time, 0 to 1


def called(model: str, mig_profile: str) -> str:
    """The model of an instance, as the driver's tools print it: claims name profiles by it."""
    return f"{model} MIG {mig_profile}".strip() if mig_profile else model
