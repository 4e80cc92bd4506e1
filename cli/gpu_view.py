"""GPUs as commands show them: what of each is free, who has it, and how one is named.

A GPU is named by its UUID, a prefix of it, its CDI name, or HOST/INDEX. Shares are millionths of
one GPU, as the cluster counts them (swarm/gpus.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from cli.connection import Connection
from cli.docker_tables import GPU, NAMES, Json, convert
from cli.format import Record
from swarm.errors import Invalid, NotFound
from swarm.gpus import WHOLE, format_share, model_matches, parse_models
from swarm.quantities import format_bytes
from swarm.v1 import Gpu, GpuUsage, ListGpusRequest

__all__ = [
    "FILTERS",
    "find_gpu",
    "free_share",
    "gpu_json",
    "gpu_row",
    "list_gpus",
    "matching",
    "totals",
]

FILTERS = ("node", "model", "task", "health", "free")
_HEALTHS = ("healthy", "unhealthy")
_FREES = ("whole", "part", "none")
SHORT_UUID = 12  # characters in tables: GPU-3f0a1b2c


async def list_gpus(connection: Connection) -> Sequence[GpuUsage]:
    """All of the cluster's."""
    return (await connection.control.list_gpus(ListGpusRequest())).gpus


def free_share(usage: GpuUsage) -> int:
    """What of it a task could still be given; nothing of one that is not usable."""
    return max(0, WHOLE - usage.claimed_share) if usage.usable else 0


def is_split(usage: GpuUsage, all_: Iterable[GpuUsage]) -> bool:
    """Whether it can only be had as its instances."""
    return any(_gpu(other).parent_uuid == _gpu(usage).uuid for other in all_)


def totals(usages: Sequence[GpuUsage]) -> dict[str, tuple[int, int]]:
    """By node id: free shares, and how many GPUs there are; a split one counts by its instances."""
    split = {_gpu(usage).parent_uuid for usage in usages}
    found: dict[str, tuple[int, int]] = {}
    for usage in usages:
        if _gpu(usage).uuid not in split:
            free, total = found.get(usage.node_id, (0, 0))
            found[usage.node_id] = (free + free_share(usage), total + 1)
    return found


def gpu_row(usage: GpuUsage, names: Mapping[str, str], *, split: bool, whole: bool) -> Record:
    """A row of `gpu ls`; `whole`: names are not cut."""
    gpu = _gpu(usage)
    free = free_share(usage)
    return Record(
        ID=gpu.uuid,
        Node=names.get(usage.node_id) or usage.hostname,
        NodeID=usage.node_id,
        Index=gpu.index,
        UUID=gpu.uuid if whole else gpu.uuid[:SHORT_UUID],
        Model=gpu.model + (f" {gpu.mig_profile}" if gpu.mig_profile not in gpu.model else ""),
        Memory=format_bytes(gpu.memory_bytes) if gpu.memory_bytes else "",
        MemoryBytes=gpu.memory_bytes,
        Free="split" if split else format_share(free),
        FreeShare=free / WHOLE,
        ClaimedShare=usage.claimed_share / WHOLE,
        ClaimedMemory=format_bytes(usage.claimed_memory_bytes),
        Health=_health(usage, split=split),
        Reason=gpu.health_message,
        Tasks=", ".join(
            h.name if h.share >= WHOLE else f"{h.name} ({format_share(h.share)})"
            for h in usage.holders
        ),
        Usable=usage.usable,
        Capability=gpu.compute_capability,
        Driver=gpu.driver,
        DriverVersion=gpu.driver_version,
        CDIName=gpu.cdi_name,
        PCIAddress=gpu.pci_address,
        NUMANode=gpu.numa_node,
        Parent=gpu.parent_uuid,
    )


def _health(usage: GpuUsage, *, split: bool) -> str:
    if not _gpu(usage).healthy:
        return "Unhealthy"
    # Of its instances some can be had although the GPU itself cannot.
    return "Healthy" if usage.usable or split else "Healthy (node not available)"


def gpu_json(usage: GpuUsage, names: Mapping[str, str]) -> Json:
    """The document of `gpu inspect`."""
    return convert(_gpu(usage), GPU) | {
        "NodeID": usage.node_id,
        "Hostname": usage.hostname,
        "NodeName": names.get(usage.node_id) or usage.hostname,
        "Usable": usage.usable,
        "FreeShare": free_share(usage) / WHOLE,
        "ClaimedShare": usage.claimed_share / WHOLE,
        "ClaimedMemoryBytes": usage.claimed_memory_bytes,
        "Tasks": [
            {"ID": h.task_id, "Name": h.name, "Share": h.share / WHOLE} for h in usage.holders
        ],
    }


NAMES |= {"NodeID", "Hostname", "NodeName", "Usable", "FreeShare", "ClaimedShare", "Tasks"}
NAMES |= {"ClaimedMemoryBytes", "Share"}


def matching(
    usages: Sequence[GpuUsage], filters: Iterable[tuple[str, str]], names: Mapping[str, str]
) -> list[GpuUsage]:
    """Those that pass: values of one key are alternatives. Raises Invalid."""
    asked: dict[str, list[str]] = {}
    for key, value in filters:
        for known, accepted in (("health", _HEALTHS), ("free", _FREES)):
            if key == known and value not in accepted:
                raise Invalid(f"--filter {key}={value}: write one of {', '.join(accepted)}")
        asked.setdefault(key, []).append(value)
    return [
        usage
        for usage in usages
        if all(any(_passes(usage, k, v, names) for v in many) for k, many in asked.items())
    ]


def _passes(usage: GpuUsage, key: str, value: str, names: Mapping[str, str]) -> bool:
    gpu, free = _gpu(usage), free_share(usage)
    match key:
        case "node":
            known = (usage.hostname, names.get(usage.node_id, ""))
            return value in known or usage.node_id.startswith(value)
        case "model":
            return any(
                model_matches(model, f"{gpu.model} {gpu.mig_profile}")
                for model in parse_models(value)
            )
        case "task":
            return any(
                h.name == value or h.task_id.startswith(value) or h.name.startswith(f"{value}.")
                for h in usage.holders
            )
        case "health":
            return gpu.healthy == (value == "healthy")
        case _:
            return value == ("whole" if free == WHOLE else "part" if free else "none")


def find_gpu(usages: Sequence[GpuUsage], ref: str, names: Mapping[str, str]) -> GpuUsage:
    """The one GPU meant. Raises NotFound, or Invalid when several match."""
    exact = [u for u in usages if ref in (_gpu(u).uuid, *_places(u, names))]
    found = exact or [u for u in usages if ref and _gpu(u).uuid.startswith(ref)]
    # A CDI name, which several nodes may use.
    found = found or [u for u in usages if ref and _gpu(u).cdi_name == ref]
    if len(found) == 1:
        return found[0]
    if found:
        places = ", ".join(f"{u.hostname}/{_gpu(u).index} ({_gpu(u).uuid})" for u in found[:5])
        raise Invalid(f"GPU {ref} is ambiguous ({len(found)} matches found): {places}")
    known = [name for u in usages for name in (_gpu(u).uuid, *_places(u, names))]
    near = difflib.get_close_matches(ref, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; swarmctl gpu ls shows all"
    raise NotFound(f"GPU {ref} not found: give its UUID or NODE/INDEX{hint}")


def _places(usage: GpuUsage, names: Mapping[str, str]) -> tuple[str, ...]:
    if _gpu(usage).parent_uuid:
        return ()  # an instance has an index within its GPU only
    hosts = dict.fromkeys((usage.hostname, names.get(usage.node_id, ""), usage.node_id))
    return tuple(f"{host}/{_gpu(usage).index}" for host in hosts if host)


def _gpu(usage: GpuUsage) -> Gpu:
    return usage.gpu or Gpu()
