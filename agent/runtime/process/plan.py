"""From a task's spec to what its supervisor carries out: a plan of plain values.

Pure but for look-ups of the host's users and of files that are to be mounted. The checks are
fields.py's; here everything is known to be possible.
"""

from __future__ import annotations

import grp
import pwd
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.gpus import Handover
from agent.runtime.base import Rejected, TaskFile
from agent.runtime.process import fields as fields
from agent.runtime.process.cgroup import Limits
from agent.runtime.process.fields import Powers
from agent.runtime.process.net import Lease
from swarm.quantities import parse_bytes
from swarm.v1 import Assignment, ContainerSpec, Mount, Resources, TaskSpec

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOG_FILE_BYTES_MAX = 10 << 20
LOG_FILES_MAX = 5
NAMESPACES = ("ipc", "uts", "net", "pid", "mnt")  # in the order in which exec enters them


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the task runs as. None: as the agent's user."""

    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    home: str = ""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the task shall listen."""

    bind_address: str
    actual: Mapping[int, int]  # target port -> port to listen on


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the task's things are on the host."""

    folder: Path  # the task's own
    volumes: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"


def identity(container: ContainerSpec, user: str | None = None) -> Identity:
    """Looks up `user`, or the spec's; groups by name or number. Raises Rejected."""
    text = container.user if user is None else user
    if not text and not container.groups:
        return Identity()
    name, _, group = (text or "0").partition(":")
    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        uid, gid, home = entry.pw_uid, entry.pw_gid, entry.pw_dir
    except KeyError:
        if not name.isdigit():
            raise Rejected(f'user "{name}": the node has no such user') from None
        uid, gid, home = int(name), 0, ""  # Docker: a number nobody has is allowed
    if group:
        gid = _group(group)
    extra = [_group(g) for g in container.groups]
    if not group and not name.isdigit():
        extra += [g.gr_gid for g in grp.getgrall() if name in g.gr_mem]
    return Identity(uid, gid, tuple(sorted({gid, *extra})), home)


def _group(text: str) -> int:
    if text.isdigit():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise Rejected(f'group "{text}": the node has no such group') from None


def environment(
    assignment: Assignment, ports: Ports, *, home: str, files: str, gpus: Handover
) -> dict[str, str]:
    """Only what the spec says, and what a process needs to find its place. Which GPUs it finds the
    spec cannot say: it claims them.
    """
    task, spec = assignment.task, assignment.spec
    assert task is not None and spec is not None
    container = spec.container or ContainerSpec()
    env = {
        "PATH": PATH,
        "HOME": home,
        "SWARM_TASK_ID": task.id,
        "SWARM_TASK_NAME": assignment.name,
        "SWARM_TASK_SLOT": str(task.slot),
        "SWARM_SERVICE_ID": task.service_id,
        "SWARM_SERVICE_NAME": assignment.service_name,
        "SWARM_NODE_ID": task.node_id,
        "SWARM_NODE_NAME": assignment.node_name,
        "SWARM_BIND_ADDR": ports.bind_address,
    }
    for number, (target, actual) in enumerate(ports.actual.items()):
        env[f"SWARM_PORT_{target}"] = str(actual)
        if number == 0:
            env["PORT"] = str(actual)
    if files:
        env["SWARM_FILES"] = files
    if container.tty:
        env["TERM"] = "xterm"
    for line in container.env:
        key, equals, value = line.partition("=")
        if equals:
            env[key] = value
        else:
            env.pop(key, None)
    if gpus.hide:
        # Empty hides all of them from CUDA.
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.cuda)
        env["NVIDIA_VISIBLE_DEVICES"] = ",".join(gpus.cuda) or "void"
        env |= gpus.env
    return env


def limits(spec: TaskSpec, gpus: Handover) -> Limits:
    container = spec.container or ContainerSpec()
    given = (spec.resources.limits if spec.resources else None) or Resources()
    required = spec.resources
    swappiness = container.memory_swappiness
    if swappiness is None and required is not None:
        swappiness = required.memory_swappiness
    swap = container.memory_swap_bytes
    if not swap and required is not None and required.swap_bytes is not None:
        # Docker's SwapBytes counts swap alone.
        swap = (
            required.swap_bytes
            if required.swap_bytes < 0
            else (given.memory_bytes + required.swap_bytes)
        )
    return Limits(
        cpu_nano=given.cpu_nano,
        memory_bytes=given.memory_bytes,
        memory_swap_bytes=swap,
        memory_reservation_bytes=container.memory_reservation_bytes,
        memory_swappiness=swappiness,
        pids=given.pids,
        cpuset=container.cpuset,
        cpu_shares=container.cpu_shares,
        oom_kill_disable=container.oom_kill_disable,
        denied_devices=gpus.denied,
    )


def log_bounds(spec: TaskSpec) -> tuple[int, int] | None:
    """Bytes of a file and number of files; None: output is not kept."""
    driver = spec.log_driver
    if driver is None:
        return LOG_FILE_BYTES_MAX, LOG_FILES_MAX
    if driver.name == "none":
        return None
    size, count = driver.options.get("max-size"), driver.options.get("max-file")
    return (
        parse_bytes(size) if size else LOG_FILE_BYTES_MAX,
        int(count) if count else LOG_FILES_MAX,
    )


def shares_host_network(spec: TaskSpec, drivers: Sequence[str]) -> bool:
    """By network mode, or by a network whose driver is host (compose's `networks: [host]`)."""
    container = spec.container or ContainerSpec()
    return container.network_mode == "host" or "host" in drivers


def make(
    assignment: Assignment,
    layout: Layout,
    powers: Powers,
    *,
    hide: Sequence[Path],
    who: Identity,
    env: Mapping[str, str],
    lease: Lease | None,
    host_network: bool,
    files: Sequence[TaskFile],
    cgroups: Sequence[Path],
    shared: Sequence[str] = (),
) -> dict[str, Any]:
    """The plan. `hide` are folders of the host that isolated tasks do not see. `files` are shown by
    mounts, and so given only to isolated tasks. `shared` are places of the host that isolated
    tasks see too.
    """
    spec = assignment.spec
    assert spec is not None
    container = spec.container or ContainerSpec()
    hostname = container.hostname or assignment.name[:63]
    plan = {
        "folder": str(layout.folder),
        "argv": [*container.command, *container.args],
        "env": dict(env),
        "cwd": container.dir or str(layout.work),
        "cwd_ours": not container.dir,
        **credentials(container, powers, who),
        "rlimits": [(fields.ULIMITS[u.name], u.soft, u.hard) for u in container.ulimits],
        "oom_score_adj": _oom_score_adj(container, powers),
        "tty": container.tty,
        "open_stdin": container.open_stdin,
        "log": log_bounds(spec),
        "cgroups": [str(path) for path in cgroups],
        "isolate": powers.isolated,
        "init": powers.isolated and container.init is not False,
    }
    if powers.isolated:
        plan |= {
            "root": str(layout.folder / "root"),
            "hostname": hostname,
            "domainname": container.domainname,
            "host_network": host_network,
            "address": lease.address if lease else "",
            "prefix": lease.prefix if lease else 0,
            "gateway": lease.gateway if lease else "",
            "sysctls": dict(container.sysctls),
            "shm_size": container.shm_size_bytes,
            "read_only": container.read_only,
            "hide": [str(folder) for folder in hide],
            "mounts": _mounts(container, layout, shared),
            "files": [
                {"target": f.target, "data": f.data, "uid": f.uid, "gid": f.gid, "mode": f.mode}
                for f in (*_name_files(container, hostname, lease), *files)
            ],
        }
    return plan


def credentials(container: ContainerSpec, powers: Powers, who: Identity) -> dict[str, Any]:
    """The part of a plan that says who runs; exec uses it too."""
    return {
        "uid": who.uid,
        "gid": who.gid,
        "groups": list(who.groups),
        "capabilities": fields.capability_mask(container) if powers.root else None,
        "no_new_privileges": fields.no_new_privileges(container),
    }


def _oom_score_adj(container: ContainerSpec, powers: Powers) -> int | None:
    # swarmd's own is low, and must not be inherited; without root it can only be raised.
    if not powers.root and container.oom_score_adj < powers.oom_score_adj:
        return None
    return container.oom_score_adj


def _mounts(
    container: ContainerSpec, layout: Layout, shared: Sequence[str]
) -> list[dict[str, Any]]:
    work = str(layout.work)
    mounts = [_bind(work, work, read_only=False, recursive=False)]
    taken = {mount.target for mount in container.mounts}
    mounts += [_bind(p, p, read_only=False, recursive=False) for p in shared if p not in taken]
    for mount in sorted(container.mounts, key=lambda m: m.target.rstrip("/").count("/")):
        if mount.type == "tmpfs":
            mounts.append(_tmpfs(mount))
            continue
        options = mount.bind_options
        mounts.append(
            _bind(
                str(volume_path(mount, layout)) if mount.type == "volume" else mount.source,
                mount.target,
                read_only=mount.read_only,
                recursive=not (options is not None and options.non_recursive),
            )
        )
    for device in container.devices:
        mounts.append(
            _bind(device.source, device.target or device.source, read_only=False, recursive=False)
        )
    return mounts


def _bind(source: str, target: str, *, read_only: bool, recursive: bool) -> dict[str, Any]:
    return {
        "type": "bind",
        "source": source,
        "target": target,
        "read_only": read_only,
        "recursive": recursive,
        "private": True,
    }


def volume_path(mount: Mount, layout: Layout) -> Path:
    """The folder of a named volume, or of one that has no name and lives as long as the task."""
    name = mount.source or f"anonymous{mount.target.replace('/', '-')}"
    base = layout.volumes if mount.source else layout.folder / "volumes"
    subpath = mount.volume_options.subpath if mount.volume_options else ""
    return base / name / subpath.lstrip("/")


def _tmpfs(mount: Mount) -> dict[str, Any]:
    flags = 2 | 4 | 8 | (1 if mount.read_only else 0)  # nosuid, nodev, noexec: Docker's default
    given = mount.tmpfs_options
    data = {"mode": f"{given.mode:o}" if given and given.mode else "1777"}
    if given and given.size_bytes:
        data["size"] = str(given.size_bytes)
    for option in given.options if given else ():
        if len(option.words) == 2:
            data[option.words[0]] = option.words[1]
        else:
            flags |= fields.TMPFS_FLAGS.get(option.words[0], 0)
            flags &= ~fields.TMPFS_CLEARS.get(option.words[0], 0)
    options = ",".join(f"{key}={value}" for key, value in data.items())
    return {"type": "tmpfs", "target": mount.target, "flags": flags, "options": options}


def _name_files(container: ContainerSpec, hostname: str, lease: Lease | None) -> list[TaskFile]:
    """/etc/hosts and, where the spec says so, /etc/resolv.conf."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    lines += [" ".join(line.split()) for line in container.hosts]
    names = f"{hostname}.{container.domainname} {hostname}" if container.domainname else hostname
    lines.append(f"{lease.address if lease else '127.0.1.1'} {names}")
    found = [TaskFile("/etc/hosts", ("\n".join(lines) + "\n").encode(), mode=0o644)]
    dns = container.dns
    if dns is not None and (dns.nameservers or dns.search or dns.options):
        text = "".join(f"nameserver {server}\n" for server in dns.nameservers)
        text += f"search {' '.join(dns.search)}\n" if dns.search else ""
        text += f"options {' '.join(dns.options)}\n" if dns.options else ""
        found.append(TaskFile("/etc/resolv.conf", text.encode(), mode=0o644))
    return found


def parse_signal(text: str) -> int:
    """A signal by number or name, with or without SIG; empty: SIGTERM. Raises Rejected."""
    name = text.upper().removeprefix("SIG")
    if not name:
        return int(signal.SIGTERM)
    if name.isdigit() and 1 <= int(name) <= 64:
        return int(name)
    base, plus, offset = name.partition("+")
    try:
        number = int(signal.Signals[f"SIG{base}"])
    except KeyError:
        raise Rejected(
            f'signal "{text}": no such signal; write one such as SIGTERM or 15'
        ) from None
    if plus and offset.isdigit() and base == "RTMIN":
        number += int(offset)
    elif plus:
        raise Rejected(f'signal "{text}": only SIGRTMIN takes an offset')
    return number


def source_problems(container: ContainerSpec, powers: Powers) -> list[str]:
    """Binds and devices that are not there; those that may be made are made."""
    problems: list[str] = []
    if not powers.isolated:
        return problems
    for mount in container.mounts:
        if mount.type != "bind" or not mount.source.startswith("/"):
            continue
        options = mount.bind_options
        if options is not None and options.create_mountpoint:
            Path(mount.source).mkdir(parents=True, exist_ok=True)
        elif not Path(mount.source).exists():
            problems.append(
                f'mount on "{mount.target}": bind source path {mount.source} does not exist on '
                "this node"
            )
    for device in container.devices:
        if not Path(device.source).exists():
            problems.append(f'device "{device.source}" does not exist on this node')
    return problems
