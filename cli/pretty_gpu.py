"""`gpu inspect --pretty`, and the GPUs of `node inspect --pretty`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cli.gpu_view import free_share, is_split
from swarm.gpus import WHOLE, format_share
from swarm.quantities import format_bytes
from swarm.v1 import Gpu, GpuUsage

__all__ = ["describe_gpu", "gpu_lines"]

_WIDTH = 24


def _line(title: str, value: object, *, indent: int = 0) -> str:
    return f"{' ' * indent}{title + ':':<{_WIDTH - indent}}{value}".rstrip()


def describe_gpu(usage: GpuUsage, all_: Sequence[GpuUsage], names: Mapping[str, str]) -> str:
    """One GPU for people; `all_` names those that it is joined to."""
    gpu = usage.gpu or Gpu()
    places = {u.gpu.uuid: f"GPU {u.gpu.index}" for u in all_ if u.gpu is not None}
    node = names.get(usage.node_id) or usage.hostname
    lines = [
        _line("UUID", gpu.uuid),
        _line("Node", f"{node} ({usage.node_id})"),
        _line("Index", gpu.index),
        _line("Model", gpu.model),
    ]
    if gpu.parent_uuid:
        lines.append(_line("Instance", f"{gpu.mig_profile} of {gpu.parent_uuid}".strip()))
    lines += [
        _line("Memory", format_bytes(gpu.memory_bytes) if gpu.memory_bytes else "unknown"),
        _line("Health", "Healthy" if gpu.healthy else f"Unhealthy: {gpu.health_message}"),
    ]
    if is_split(usage, all_):
        lines.append(_line("Free", "split into instances"))
    else:
        lines.append(_line("Free", f"{format_share(free_share(usage))} of 1"))
    for title, value in (
        ("Compute Capability", gpu.compute_capability),
        ("Driver", f"{gpu.driver} {gpu.driver_version}".strip()),
        ("CDI Name", gpu.cdi_name),
        ("PCI Address", gpu.pci_address),
        ("NUMA Node", gpu.numa_node if gpu.numa_node >= 0 else ""),
        ("ECC Errors", gpu.ecc_errors or ""),
    ):
        if value != "":
            lines.append(_line(title, value))
    if gpu.links:
        lines.append("Links:")
        for link in gpu.links:
            how = link.proximity.name.lower().replace("_", " ")
            over = f"{link.nvlinks} NVLinks, {how}" if link.nvlinks else how
            lines.append(_line(places.get(link.uuid, link.uuid), over, indent=1))
    if usage.holders:
        lines.append("Tasks:")
        lines += [
            _line(h.name, f"{format_share(h.share)} ({h.task_id})", indent=1) for h in usage.holders
        ]
    if gpu.processes:
        lines.append("Processes:")
        lines += [
            _line(f"{p.pid} {p.name}".strip(), format_bytes(p.memory_bytes), indent=1)
            for p in gpu.processes
        ]
    return "\n".join(lines)


def gpu_lines(gpus: Sequence[Gpu], usages: Sequence[GpuUsage]) -> list[str]:
    """A line for each GPU of a node; of which little is known where `usages` has nothing."""
    known = {u.gpu.uuid: u for u in usages if u.gpu is not None}
    split = {gpu.parent_uuid for gpu in gpus}
    lines = ["GPUs:"] if gpus else []
    for gpu in gpus:
        text = f"{gpu.model} {gpu.mig_profile}".strip()
        if gpu.memory_bytes:
            text += f", {format_bytes(gpu.memory_bytes)}"
        usage = known.get(gpu.uuid)
        if not gpu.healthy:
            text += f", not healthy: {gpu.health_message}"
        if gpu.uuid in split:
            text += ", split into instances"
        elif usage is not None:
            free = free_share(usage)
            text += ", free" if free == WHOLE else f", {format_share(free)} free"
            text += "".join(f", {h.name}" for h in usage.holders)
        title = f"{gpu.index}" if not gpu.parent_uuid else f"{gpu.index} (instance)"
        lines.append(_line(f"{title} {gpu.uuid[:12]}", text, indent=1))
    return lines
