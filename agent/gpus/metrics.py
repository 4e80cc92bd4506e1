"""GPUs on the agent's metrics port. The label `gpu` is a UUID: an id, but of a set that a node's
hardware closes, and the only name that logs, managers and other exporters share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import Gauge

from agent.gpus.device import Device, Use

_LABELS = ("gpu", "index")
MEMORY = Gauge("swarm_gpu_memory_bytes", "Memory of a GPU or MIG instance", _LABELS)
USED = Gauge("swarm_gpu_memory_used_bytes", "Memory of a GPU that is in use", _LABELS)
BUSY = Gauge("swarm_gpu_utilization_ratio", "Share of time in which a GPU works", _LABELS)
HEALTHY = Gauge("swarm_gpu_healthy", "1 while a GPU may be given to tasks, else 0", _LABELS)
_ALL = (MEMORY, USED, BUSY, HEALTHY)
_shown: set[tuple[str, str]] = set()  # labels that the gauges, which are one per process, have


def show(devices: Sequence[Device], uses: Mapping[str, Use]) -> None:
    """What is true now; a GPU that is gone, or does not tell, has no value."""
    clear()
    for device in devices:
        gpu, use = device.gpu, uses.get(device.gpu.uuid, Use())
        labels = (gpu.uuid, str(gpu.index))
        _shown.add(labels)
        HEALTHY.labels(*labels).set(gpu.healthy)
        if gpu.memory_bytes:
            MEMORY.labels(*labels).set(gpu.memory_bytes)
        if use.memory_bytes is not None:
            USED.labels(*labels).set(use.memory_bytes)
        if use.ratio is not None:
            BUSY.labels(*labels).set(use.ratio)


def clear() -> None:
    while _shown:
        labels = _shown.pop()
        for gauge in _ALL:
            gauge.remove(*labels)
