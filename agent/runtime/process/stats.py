"""What a task uses: from its cgroup, or summed up over its processes where it has none, and from
its network namespace where that is its own.
"""

from __future__ import annotations

import os
from pathlib import Path

from agent.runtime.process.cgroup import Usage
from swarm.v1 import TaskStats

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def read(
    task_id: str, main_pid: int, usage: Usage, now_ns: int, *, own_network: bool = False
) -> TaskStats:
    """One sample; what the cgroup does not account comes from /proc. Blocks for some milliseconds
    where there is no cgroup.
    """
    cpu_ns, memory_bytes, pids = 0, 0, 0
    if None in (usage.cpu_total_ns, usage.memory_bytes, usage.pids):
        cpu_ns, memory_bytes, pids = _of_tree(main_pid)
    received, sent = _network(main_pid) if own_network else (None, None)
    return TaskStats(
        task_id=task_id,
        cpu_total_ns=cpu_ns if usage.cpu_total_ns is None else usage.cpu_total_ns,
        memory_bytes=memory_bytes if usage.memory_bytes is None else usage.memory_bytes,
        memory_limit_bytes=usage.memory_limit_bytes,
        pids=pids if usage.pids is None else usage.pids,
        timestamp_ns=now_ns,
        network_in_bytes=received,
        network_out_bytes=sent,
        disk_read_bytes=usage.read_bytes,
        disk_written_bytes=usage.written_bytes,
    )


def _network(pid: int) -> tuple[int | None, int | None]:
    """Received and sent over all devices of the process's namespace but the loopback."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    except OSError:
        return None, None
    received = sent = 0
    for line in lines:
        name, colon, rest = line.partition(":")
        words = rest.split()
        if colon and name.strip() != "lo" and len(words) >= 9:
            received += int(words[0])
            sent += int(words[8])
    return received, sent


def _of_tree(root: int) -> tuple[int, int, int]:
    """CPU time (with that of children that have ended), resident memory and number of processes."""
    children: dict[int, list[int]] = {}
    seen: dict[int, list[str]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            words = (
                Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        seen[int(name)] = words
        children.setdefault(int(words[1]), []).append(int(name))
    cpu_ns = memory_bytes = count = 0
    queue = [root]
    while queue:
        pid = queue.pop()
        queue += children.get(pid, [])
        words = seen.get(pid, [])
        if words and words[0] not in "ZX":
            # utime, stime, cutime, cstime are fields 14 to 17 of proc(5), rss is 24.
            cpu_ns += sum(int(w) for w in words[11:15]) * _TICK_NS
            memory_bytes += int(words[21]) * _PAGE_BYTES
            count += 1
    return cpu_ns, memory_bytes, count
