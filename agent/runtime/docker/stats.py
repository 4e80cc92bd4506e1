"""What a container uses, from the engine's statistics. Pure.

Fields: Docker Engine API, ContainerStats. As `docker stats` counts: memory without the page cache
that the kernel can drop, network over all networks, and block I/O read and written over all
devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.runtime.docker.logs import parse_time
from swarm.v1 import TaskStats

__all__ = ["parse_stats"]


def parse_stats(task_id: str, said: Mapping[str, Any], *, now_ns: int) -> TaskStats:
    """`now_ns`: where the engine does not say when it measured."""
    memory = said.get("memory_stats") or {}
    details = memory.get("stats") or {}
    cache = details.get("total_inactive_file", details.get("inactive_file", 0))
    received, sent = _network(said)
    read, written = _disk(said)
    return TaskStats(
        task_id=task_id,
        cpu_total_ns=int(_cpu(said).get("total_usage") or 0),
        memory_bytes=max(0, int(memory.get("usage") or 0) - int(cache)),
        memory_limit_bytes=int(memory.get("limit") or 0),
        pids=int((said.get("pids_stats") or {}).get("current") or 0),
        timestamp_ns=parse_time(str(said.get("read", ""))) or now_ns,
        network_in_bytes=received,
        network_out_bytes=sent,
        disk_read_bytes=read,
        disk_written_bytes=written,
    )


def _cpu(said: Mapping[str, Any]) -> Mapping[str, Any]:
    return (said.get("cpu_stats") or {}).get("cpu_usage") or {}


def _network(said: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """None: it has the host's network, or none, of which the engine does not tell."""
    networks = said.get("networks")
    if not networks:
        return None, None
    return (
        sum(int(n.get("rx_bytes") or 0) for n in networks.values()),
        sum(int(n.get("tx_bytes") or 0) for n in networks.values()),
    )


def _disk(said: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """None: the kernel does not count. What has not read or written yet has an empty list on cgroup
    v1, and none on v2.
    """
    blocks = said.get("blkio_stats") or {}
    entries = blocks.get("io_service_bytes_recursive")
    if entries is None:
        return None, None
    read = written = 0
    for entry in entries:
        match str(entry.get("op", "")).lower():
            case "read":
                read += int(entry.get("value") or 0)
            case "write":
                written += int(entry.get("value") or 0)
    return read, written
