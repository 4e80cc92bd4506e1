"""Mounts of a task in the engine's three ways of saying them: Mounts, Binds and Tmpfs. Pure.

Mounts says most. Binds alone can relabel for SELinux, and makes a missing source in engines before
API 1.42; Tmpfs alone takes free options before API 1.46. What none of the three can say on the
given engine is a problem, never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.runtime.docker.facts import Facts
from swarm.v1 import Mount

Problem = Callable[[str], None]

_OTHER_TYPES = {
    "npipe": "named pipes exist on Windows only",
    "cluster": "cluster volumes need a CSI plugin, which this agent does not drive; use a volume "
    "with a driver",
}


@dataclass(slots=True)
class Mounts:
    """The parts of HostConfig."""

    mounts: list[dict[str, Any]] = field(default_factory=list)
    binds: list[str] = field(default_factory=list)
    tmpfs: dict[str, str] = field(default_factory=dict)


def plan_mounts(mounts: Sequence[Mount], facts: Facts, problem: Problem) -> Mounts:
    """Sorts the mounts into the three lists; reports what cannot be said."""
    out = Mounts()
    for mount in mounts:
        where = f"mount {mount.target or mount.source!r}"

        def wrong(text: str, where: str = where) -> None:
            problem(f"{where}: {text}")

        kind = mount.type or "volume"
        if not mount.target.startswith("/"):
            wrong("the target must be an absolute path")
        elif kind == "bind":
            _bind(mount, facts, out, wrong)
        elif kind == "volume":
            _volume(mount, facts, out, wrong)
        elif kind == "tmpfs":
            _tmpfs(mount, out)
        elif kind == "image":
            if facts.needs((1, 48), "mounts of type image", wrong):
                out.mounts.append(_common(mount, "image"))
        else:
            wrong(_OTHER_TYPES.get(kind, f"type {kind!r} is none of bind, volume, tmpfs, image"))
    return out


def _common(mount: Mount, kind: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"Type": kind, "Target": mount.target, "ReadOnly": mount.read_only}
    if mount.source:
        entry["Source"] = mount.source
    if mount.consistency:
        entry["Consistency"] = mount.consistency
    return entry


def _bind(mount: Mount, facts: Facts, out: Mounts, wrong: Problem) -> None:
    options = mount.bind_options
    if not mount.source.startswith("/"):
        wrong(f"the source {mount.source!r} must be an absolute path on the node")
        return
    if options is None:
        out.mounts.append(_common(mount, "bind"))
        return
    makes_source = options.create_mountpoint and facts.api < (1, 42)
    if options.selinux or makes_source:
        if options.non_recursive or options.read_only_non_recursive:
            wrong(
                "this engine cannot combine a non-recursive bind with selinux or create_host_path"
            )
        elif options.read_only_force_recursive:
            wrong("this engine cannot combine a recursive read-only bind with selinux")
        elif ":" in mount.source + mount.target:
            wrong("a path with a colon cannot be combined with selinux or create_host_path")
        else:
            words = ["ro" if mount.read_only else "rw", options.propagation, options.selinux]
            out.binds.append(f"{mount.source}:{mount.target}:{','.join(w for w in words if w)}")
        return
    entry = _common(mount, "bind")
    said: dict[str, Any] = {}
    if options.propagation:
        said["Propagation"] = options.propagation
    if options.non_recursive:
        said["NonRecursive"] = True
    if options.create_mountpoint:
        said["CreateMountpoint"] = True
    # Before 1.44 read-only was never recursive, so the first of the two holds by itself.
    if options.read_only_non_recursive and facts.api >= (1, 44):
        said["ReadOnlyNonRecursive"] = True
    if options.read_only_force_recursive and facts.needs(
        (1, 44), "recursive read-only binds", wrong
    ):
        said["ReadOnlyForceRecursive"] = True
    if said:
        entry["BindOptions"] = said
    out.mounts.append(entry)


def _volume(mount: Mount, facts: Facts, out: Mounts, wrong: Problem) -> None:
    entry = _common(mount, "volume")
    options = mount.volume_options
    if options is not None:
        said: dict[str, Any] = {"NoCopy": options.no_copy, "Labels": dict(options.labels)}
        if options.driver_config is not None and options.driver_config.name:
            said["DriverConfig"] = {
                "Name": options.driver_config.name,
                "Options": dict(options.driver_config.options),
            }
        elif options.driver_config is not None and options.driver_config.options:
            said["DriverConfig"] = {
                "Name": "local",
                "Options": dict(options.driver_config.options),
            }
        if options.subpath and facts.needs((1, 45), "a volume's subpath", wrong):
            said["Subpath"] = options.subpath
        entry["VolumeOptions"] = said
    out.mounts.append(entry)


def _tmpfs(mount: Mount, out: Mounts) -> None:
    options = mount.tmpfs_options
    if options is None or not options.options:
        entry = {"Type": "tmpfs", "Target": mount.target, "ReadOnly": mount.read_only}
        if options is not None:
            entry["TmpfsOptions"] = {"SizeBytes": options.size_bytes, "Mode": options.mode}
        out.mounts.append(entry)
        return
    words = ["=".join(option.words) for option in options.options]
    if mount.read_only:
        words.append("ro")
    if options.size_bytes:
        words.append(f"size={options.size_bytes}")
    if options.mode:
        words.append(f"mode={options.mode:o}")
    out.tmpfs[mount.target] = ",".join(words)
