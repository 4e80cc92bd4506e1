"""Limits and accounts of the process runtime's tasks: cgroups, version 1 and 2, behind one class.

A task's group is `<controller or root>/<parent>/<node>/<task>`, made by `create`, entered by the
task itself before it executes, removed by `destroy`. Which controllers can be used is found out
once; what is missing is said by `missing`, never tried again. Paths and files are the kernel's:
Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PERIOD_US = 100_000  # Docker's CPU period
_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What a task may use; 0, empty or None: no limit."""

    cpu_nano: int = 0
    memory_bytes: int = 0
    memory_swap_bytes: int = 0  # memory and swap together, -1: unlimited swap (Docker's meaning)
    memory_reservation_bytes: int = 0
    memory_swappiness: int | None = None
    pids: int = 0
    cpuset: str = ""
    cpu_shares: int = 0
    oom_kill_disable: bool = False
    denied_devices: tuple[str, ...] = ()  # rules as "c 195:1 rwm"; version 1 only


@dataclass(frozen=True, slots=True)
class Usage:
    """What a task has used; None: not accounted."""

    cpu_total_ns: int | None = None
    memory_bytes: int | None = None
    memory_limit_bytes: int = 0
    pids: int | None = None
    # Over all block devices.
    read_bytes: int | None = None
    written_bytes: int | None = None


class Cgroups(Protocol):
    """One node's subtree."""

    # Controllers that cannot be used here.
    missing: tuple[str, ...]
    # Whether devices can be denied to a task.
    denies_devices: bool

    def create(self, task_id: str, limits: Limits) -> tuple[Path, ...]:
        """Makes the task's groups with their limits; the process lists that its process must enter.
        Raises OSError naming the file when a limit is refused.
        """
        ...

    def procs(self, task_id: str) -> tuple[Path, ...]:
        """The process lists of the groups that exist."""
        ...

    def oom_kills(self, task_id: str) -> int: ...

    def usage(self, task_id: str) -> Usage: ...

    def destroy(self, task_id: str) -> bool:
        """Removes the task's groups; False while a process is still in one."""
        ...

    def destroy_node(self) -> None:
        """Removes the node's own folders if no task is left."""
        ...


DEVICES = "devices"
CONTROLLERS = ("cpu", "memory", "pids", "cpuset")
# Only counts; nobody misses it where it is not there. By version.
BLOCKS_V1, BLOCKS_V2 = "blkio", "io"


def detect(root: Path, parent: str, node: str) -> Cgroups | None:
    """The kind that is mounted at the root and that this user may change; None: neither."""
    if (root / "cgroup.controllers").exists():
        return V2.open(root, parent, node)
    if any((root / name / "cgroup.procs").exists() for name in CONTROLLERS):
        return V1.open(root, parent, node)
    return None


class V1:
    """One hierarchy per controller."""

    def __init__(self, groups: dict[str, Path], missing: tuple[str, ...]) -> None:
        self._groups = groups  # controller -> the node's folder; several may be one mount
        self.missing = missing
        self.denies_devices = DEVICES in groups

    @classmethod
    def open(cls, root: Path, parent: str, node: str) -> V1 | None:
        groups = {}
        offered = tuple(n for n in (DEVICES, BLOCKS_V1) if (root / n / "cgroup.procs").exists())
        for name in (*CONTROLLERS, "cpuacct", *offered):
            group = root / name / parent / node
            try:
                _make_v1(group, name)
            except OSError:
                continue
            groups[name] = group
        missing = tuple(name for name in CONTROLLERS if name not in groups)
        return cls(groups, missing) if groups else None

    def create(self, task_id: str, limits: Limits) -> tuple[Path, ...]:
        for name, group in self._groups.items():
            if name == DEVICES and not limits.denied_devices:
                continue
            _make_v1(group, name)  # gone if this is the first task after the last
            folder = group / task_id
            folder.mkdir(exist_ok=True)
            if name == "cpuset":
                _inherit_cpuset(folder)
        for name, file, value in _v1_values(limits):
            if name in self._groups:
                path = self._groups[name] / task_id / file
                # Accounting of swap is a kernel option; without it nothing can be swapped beyond
                # the memory limit's own accounting, and the limit on memory stands.
                if file == "memory.memsw.limit_in_bytes" and not path.exists():
                    continue
                _write(path, value)
        if self.denies_devices:
            for rule in limits.denied_devices:
                # The kernel takes one rule in each write.
                _write(self._groups[DEVICES] / task_id / "devices.deny", rule)
        return self.procs(task_id)

    def procs(self, task_id: str) -> tuple[Path, ...]:
        paths = {(g / task_id / "cgroup.procs").resolve() for g in self._groups.values()}
        return tuple(sorted(p for p in paths if p.exists()))

    def oom_kills(self, task_id: str) -> int:
        return _keyed(self._file("memory", task_id, "memory.oom_control")).get("oom_kill", 0)

    def usage(self, task_id: str) -> Usage:
        memory = _number(self._file("memory", task_id, "memory.usage_in_bytes"))
        cache = _keyed(self._file("memory", task_id, "memory.stat")).get("total_inactive_file", 0)
        limit = _number(self._file("memory", task_id, "memory.limit_in_bytes")) or 0
        return Usage(
            cpu_total_ns=_number(self._file("cpuacct", task_id, "cpuacct.usage")),
            memory_bytes=None if memory is None else max(0, memory - cache),
            memory_limit_bytes=0 if limit >= 1 << 60 else limit,  # the kernel's way of "none"
            pids=_number(self._file("pids", task_id, "pids.current")),
            **_blocks_v1(
                self._file(BLOCKS_V1, task_id, "blkio.throttle.io_service_bytes_recursive")
            ),
        )

    def destroy(self, task_id: str) -> bool:
        left = [g for g in self._groups.values() if not _remove(g / task_id)]
        return not left

    def destroy_node(self) -> None:
        for group in self._groups.values():
            _remove_empty(group, group.parent)

    def _file(self, controller: str, task_id: str, name: str) -> Path | None:
        group = self._groups.get(controller)
        return None if group is None else group / task_id / name


def _v1_values(limits: Limits) -> list[tuple[str, str, str]]:
    values: list[tuple[str, str, str]] = []
    if limits.cpu_nano:
        values.append(("cpu", "cpu.cfs_period_us", str(PERIOD_US)))
        values.append(("cpu", "cpu.cfs_quota_us", str(_quota_us(limits.cpu_nano))))
    if limits.cpu_shares:
        values.append(("cpu", "cpu.shares", str(limits.cpu_shares)))
    if limits.memory_bytes:
        values.append(("memory", "memory.limit_in_bytes", str(limits.memory_bytes)))
        swap = limits.memory_swap_bytes or 2 * limits.memory_bytes  # Docker's default
        values.append(("memory", "memory.memsw.limit_in_bytes", str(swap)))
    if limits.memory_reservation_bytes:
        values.append(
            ("memory", "memory.soft_limit_in_bytes", str(limits.memory_reservation_bytes))
        )
    if limits.memory_swappiness is not None:
        values.append(("memory", "memory.swappiness", str(limits.memory_swappiness)))
    if limits.oom_kill_disable:
        values.append(("memory", "memory.oom_control", "1"))
    if limits.pids:
        values.append(("pids", "pids.max", str(limits.pids)))
    if limits.cpuset:
        values.append(("cpuset", "cpuset.cpus", limits.cpuset))
    return values


class V2:
    """One hierarchy for all controllers. It denies devices by eBPF programs alone, which are not
    made here: `denied_devices` has no effect, and the runtime says so.
    """

    denies_devices = False

    def __init__(self, root: Path, group: Path, missing: tuple[str, ...]) -> None:
        self._root = root
        self._group = group
        self.missing = missing

    @classmethod
    def open(cls, root: Path, parent: str, node: str) -> V2 | None:
        group = root / parent / node
        try:
            _make_v2(root, group)
            enabled = (group / "cgroup.subtree_control").read_text().split()
        except OSError:
            return None
        missing = tuple(name for name in CONTROLLERS if name not in enabled)
        return cls(root, group, missing)

    def create(self, task_id: str, limits: Limits) -> tuple[Path, ...]:
        _make_v2(self._root, self._group)  # gone if this is the first task after the last
        folder = self._group / task_id
        folder.mkdir(exist_ok=True)
        for name, file, value in _v2_values(limits):
            if name not in self.missing:
                _write(folder / file, value)
        return self.procs(task_id)

    def procs(self, task_id: str) -> tuple[Path, ...]:
        path = self._group / task_id / "cgroup.procs"
        return (path,) if path.exists() else ()

    def oom_kills(self, task_id: str) -> int:
        return _keyed(self._group / task_id / "memory.events").get("oom_kill", 0)

    def usage(self, task_id: str) -> Usage:
        folder = self._group / task_id
        cpu_us = _keyed(folder / "cpu.stat").get("usage_usec")
        memory = _number(folder / "memory.current")
        cache = _keyed(folder / "memory.stat").get("inactive_file", 0)
        return Usage(
            cpu_total_ns=None if cpu_us is None else cpu_us * 1000,
            memory_bytes=None if memory is None else max(0, memory - cache),
            memory_limit_bytes=_number(folder / "memory.max") or 0,  # "max" is no number
            pids=_number(folder / "pids.current"),
            **_blocks_v2(folder / "io.stat"),
        )

    def destroy(self, task_id: str) -> bool:
        return _remove(self._group / task_id)

    def destroy_node(self) -> None:
        _remove_empty(self._group, self._group.parent)


def _make_v2(root: Path, group: Path) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for folder in (root, group.parent, group):
        for name in (*CONTROLLERS, BLOCKS_V2):
            # Refused where the folder itself has processes (a container's own root): then the
            # controller counts as missing.
            with contextlib.suppress(OSError):
                _write(folder / "cgroup.subtree_control", f"+{name}")


def _v2_values(limits: Limits) -> list[tuple[str, str, str]]:
    values: list[tuple[str, str, str]] = []
    if limits.cpu_nano:
        values.append(("cpu", "cpu.max", f"{_quota_us(limits.cpu_nano)} {PERIOD_US}"))
    if limits.cpu_shares:
        values.append(("cpu", "cpu.weight", str(_weight(limits.cpu_shares))))
    if limits.memory_bytes:
        values.append(("memory", "memory.max", str(limits.memory_bytes)))
        total = limits.memory_swap_bytes or 2 * limits.memory_bytes
        swap = "max" if total < 0 else str(max(0, total - limits.memory_bytes))
        values.append(("memory", "memory.swap.max", swap))
    if limits.memory_reservation_bytes:
        values.append(("memory", "memory.low", str(limits.memory_reservation_bytes)))
    if limits.pids:
        values.append(("pids", "pids.max", str(limits.pids)))
    if limits.cpuset:
        values.append(("cpuset", "cpuset.cpus", limits.cpuset))
    return values


def _quota_us(cpu_nano: int) -> int:
    """Microseconds of CPU in each period; the kernel takes no less than 1 ms."""
    return max(1000, cpu_nano * PERIOD_US // _NANO)


def _weight(shares: int) -> int:
    """cpu.shares 2..262144 to cpu.weight 1..10000, as runc maps them."""
    return 1 + (max(2, min(shares, 262_144)) - 2) * 9999 // 262_142


def _make_v1(group: Path, controller: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    if controller == "cpuset":
        for folder in (group.parent, group):
            _inherit_cpuset(folder)


def _inherit_cpuset(folder: Path) -> None:
    """A new v1 cpuset is empty and takes no process until it has CPUs and memory nodes."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (folder / name).read_text().strip():
            _write(folder / name, (folder.parent / name).read_text().strip())


def _write(path: Path, value: str) -> None:
    # Without O_CREAT: a cgroup's files exist, and a missing one must not be made beside them.
    try:
        handle = os.open(path, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(handle, value.encode())
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.ENOENT and path.name == "memory.swap.max":
            return  # a kernel that does not account swap
        raise OSError(error.errno, f"cannot write {value} to {path}: {error.strerror}") from None


def _remove_empty(*folders: Path) -> None:
    """Removes folders unless something is in them: the parent is shared with other nodes of this
    machine, whose tasks may be on their way into their groups.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove(folder: Path) -> bool:
    """Removes a group and the groups that the task made in it."""
    try:
        children = [child for child in folder.iterdir() if child.is_dir()]
    except FileNotFoundError:
        return True
    for child in children:
        if not _remove(child):
            return False
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _number(path: Path | None) -> int | None:
    try:
        return None if path is None else int(path.read_text())
    except (OSError, ValueError):
        return None


def _blocks_v1(path: Path | None) -> dict[str, int]:
    """From lines of `MAJOR:MINOR Read BYTES`."""
    try:
        words = [] if path is None else [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    if path is None:
        return {}
    sums = {"Read": 0, "Write": 0}
    for line in words:
        if len(line) == 3 and line[1] in sums:
            sums[line[1]] += int(line[2])
    return {"read_bytes": sums["Read"], "written_bytes": sums["Write"]}


def _blocks_v2(path: Path) -> dict[str, int]:
    """From lines of `MAJOR:MINOR rbytes=BYTES wbytes=BYTES …`."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    sums = {"rbytes": 0, "wbytes": 0}
    for word in text.split():
        key, _, value = word.partition("=")
        if key in sums and value.isdigit():
            sums[key] += int(value)
    return {"read_bytes": sums["rbytes"], "written_bytes": sums["wbytes"]}


def _keyed(path: Path | None) -> dict[str, int]:
    """A file of `key number` lines."""
    try:
        text = "" if path is None else path.read_text()
    except OSError:
        return {}
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
