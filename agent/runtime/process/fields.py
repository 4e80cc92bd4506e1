"""Which fields of a task's spec the process runtime honours, and what it says to the others.

`CONTAINER` and `TASK` name every field of ContainerSpec and TaskSpec once; a test holds them
against the contract. `check` is a pure function over them: it returns every problem, each naming
its field and what to do. A field is never ignored in silence: what is set and cannot be had is a
problem, what is set and only bounds the task (limits where no cgroup can be written) is a standing
warning of the node.
"""

from __future__ import annotations

import platform
import re
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from agent.gpus import Handover
from agent.runtime.process import health as process_health
from agent.runtime.process.cgroup import Cgroups
from swarm.v1 import ContainerSpec, HealthConfig, Mount, TaskSpec


class How(Enum):
    """What becomes of a field."""

    HONOURED = "honoured"
    ROOT = "honoured as root"  # needs namespaces, or the right to change user
    LIMIT = "enforced where a cgroup can be written, else the node says once that it is not"
    REFUSED = "refused: only a container has it"
    NO_EFFECT = "has no effect in any runtime, or none without an image"


@dataclass(frozen=True, slots=True)
class Powers:
    """What the runtime may do on this host."""

    root: bool  # may change user and capabilities
    isolated: bool  # may make namespaces and mounts
    oom_score_adj: int = 0  # the agent's own; only root may go below

    @property
    def lack(self) -> str:
        if self.root:
            return "swarmd runs as root, but the kernel refuses it namespaces"
        return "swarmd does not run as root"


def shortcomings(powers: Powers, missing: Sequence[str], why_not: str) -> tuple[str, ...]:
    """What the runtime cannot enforce on this host, for the node's warnings. `missing` are cgroup
    controllers; `why_not` says why there are no namespaces.
    """
    found = []
    if missing:
        what = "" if tuple(missing) == ("all",) else f" of {', '.join(missing)}"
        found.append(
            f"process runtime: limits{what} are not enforced: swarmd cannot write the cgroups"
        )
    if not powers.isolated:
        found.append(
            "process runtime: tasks share the host's network, processes and files: swarmd may "
            f"not make namespaces ({why_not or 'switched off'})"
        )
    else:
        found.append(
            "process runtime: tasks of this node share one bridge, and networks between "
            "services neither separate them nor resolve names"
        )
    return tuple(found)


H, R, L, X, N = How.HONOURED, How.ROOT, How.LIMIT, How.REFUSED, How.NO_EFFECT

TASK: dict[str, How] = {
    "container": H,
    "resources": L,
    "restart": H,  # the control loop's
    "placement": H,  # the scheduler's
    "networks": H,  # the node's one bridge; see `check`
    "log_driver": H,
    "force_update": H,
    "docker_runtime": N,
    "runtime": H,
}
CONTAINER: dict[str, How] = {
    "image": X,
    "labels": N,
    "command": H,
    "args": H,
    "hostname": R,
    "env": H,
    "dir": H,
    "user": H,
    "groups": R,
    "privileges": H,
    "init": H,
    "stop_signal": H,
    "tty": H,
    "open_stdin": H,
    "read_only": R,
    "mounts": R,
    "stop_grace_period_ns": H,
    "healthcheck": H,
    "hosts": R,
    "dns": R,
    "secrets": H,
    "configs": H,
    "isolation": N,
    "sysctls": R,
    "capability_add": R,
    "capability_drop": R,
    "ulimits": H,
    "oom_score_adj": H,
    "privileged": R,
    "devices": R,
    "shm_size_bytes": R,
    "ipc_mode": H,
    "pid_mode": H,
    "userns_mode": H,
    "uts_mode": H,
    "cgroupns_mode": H,
    "network_mode": H,
    "security_opt": H,
    "cgroup_parent": X,
    "domainname": R,
    "mac_address": X,
    "oom_kill_disable": L,
    "pull_policy": N,
    "platform": H,
    "expose": N,
    "annotations": N,
    "storage_opt": X,
    "cpuset": L,
    "cpu_shares": L,
    "memory_swap_bytes": L,
    "memory_reservation_bytes": L,
    "memory_swappiness": L,
    "device_cgroup_rules": X,
}

# Numbers of RLIMIT_* on Linux (asm-generic/resource.h); `resource` lacks some names.
ULIMITS = {
    "cpu": 0,
    "fsize": 1,
    "data": 2,
    "stack": 3,
    "core": 4,
    "rss": 5,
    "nproc": 6,
    "nofile": 7,
    "memlock": 8,
    "as": 9,
    "locks": 10,
    "sigpending": 11,
    "msgqueue": 12,
    "nice": 13,
    "rtprio": 14,
    "rttime": 15,
}
# In the order of their numbers (linux/capability.h).
CAPABILITIES: tuple[str, ...] = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"),
    *("SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW"),
    *("IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT"),
    *("SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD"),
    *("LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG"),
    *("WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
)
# What Docker leaves to a container's root.
DEFAULT_CAPABILITIES = frozenset(
    (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID"),
        *("SETFCAP", "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
)
LOG_DRIVERS = ("", "json-file", "local", "none")
LOG_OPTIONS = ("max-size", "max-file")
TMPFS_FLAGS = {"nosuid": 2, "nodev": 4, "noexec": 8, "ro": 1}
TMPFS_CLEARS = {"suid": 2, "dev": 4, "exec": 8, "rw": 1}
TMPFS_KEYS = ("size", "mode", "uid", "gid", "nr_inodes", "nr_blocks")

_SYSCTL = re.compile(r"net\.|kernel\.(shm|msg|sem\b)|fs\.mqueue\.")
_VOLUME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_NO_NEW_PRIVILEGES = {"no-new-privileges", "no-new-privileges:true", "no-new-privileges=true"}
_UNCONFINED = re.compile(r"(seccomp|apparmor|systempaths)[=:]unconfined|label[=:]disable")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def check(spec: TaskSpec, powers: Powers) -> list[str]:
    """Every reason why the task cannot run here as it is specified; empty: it can."""
    container = spec.container or ContainerSpec()
    problems = list(_by_table(container, powers))
    problems += _command(container)
    problems += _modes(container, powers)
    problems += _user(container, powers)
    problems += _privileges(container)
    problems += _capabilities(container)
    problems += _ulimits(container, powers)
    problems += _logs(spec)
    if powers.isolated:
        for mount in container.mounts:
            problems += _mount(mount)
        problems += _devices(container)
        problems += _sysctls(container)
    problems += _networks(spec)
    return problems


def _by_table(container: ContainerSpec, powers: Powers) -> Iterator[str]:
    default = ContainerSpec()
    for name, how in CONTAINER.items():
        if getattr(container, name) == getattr(default, name):
            continue
        if name == "image":
            yield (
                f'image "{container.image}": the process runtime has no images; leave it out, and '
                "write the program to run in command"
            )
        elif how is How.REFUSED:
            yield f"{name}: the process runtime cannot honour it; leave it out or use docker"
        elif how is How.ROOT and not (powers.isolated and powers.root):
            yield f"{name}: needs root on the node, and {powers.lack}; leave it out or use docker"


def _command(container: ContainerSpec) -> Iterator[str]:
    words = (*container.command, *container.args)
    if not words or not words[0]:
        yield "command: nothing to run; write the program and its arguments"
    if any("\0" in word for word in words):
        yield "command: a word holds a zero byte"
    if container.dir and not container.dir.startswith("/"):
        yield f'dir "{container.dir}": must be an absolute path'
    health = container.healthcheck
    try:
        process_health.schedule(health)
    except ValueError as error:
        yield str(error)
    if health is not None and not health.test and health != HealthConfig():
        yield (
            "healthcheck: there is no image whose test could be used; write a test, or use docker"
        )


def _modes(container: ContainerSpec, powers: Powers) -> Iterator[str]:
    own, hosts = ("", "private"), ("", "host")
    allowed = {
        "ipc_mode": own if powers.isolated else hosts,
        "uts_mode": own if powers.isolated else hosts,
        "pid_mode": own if powers.isolated else hosts,
        "userns_mode": hosts,
        "cgroupns_mode": hosts,
        "network_mode": ("", "host", "none") if powers.isolated else hosts,
    }
    for name, values in allowed.items():
        value = getattr(container, name)
        if value not in values:
            words = " or ".join(v or "nothing" for v in values)
            yield f'{name} "{value}": the process runtime offers {words} here'
    if container.init is False and not powers.isolated:
        yield f"init: false needs a PID namespace, and {powers.lack}; leave it out"
    if container.platform:
        os_name, _, machine = container.platform.partition("/")
        if os_name != "linux" or _MACHINES.get(machine, machine) != platform.machine():
            yield f'platform "{container.platform}": this node is linux/{platform.machine()}'


def _user(container: ContainerSpec, powers: Powers) -> Iterator[str]:
    if container.user and not powers.root:
        yield (
            f'user "{container.user}": needs root on the node, and {powers.lack}; leave it out: '
            "the task then runs as swarmd's own user"
        )
    adjust = container.oom_score_adj
    if not -1000 <= adjust <= 1000:
        yield f"oom_score_adj {adjust}: must be from -1000 to 1000"
    elif adjust and adjust < powers.oom_score_adj and not powers.root:
        yield f"oom_score_adj {adjust}: only root may go below {powers.oom_score_adj}"


def _privileges(container: ContainerSpec) -> Iterator[str]:
    for option in container.security_opt:
        if option not in _NO_NEW_PRIVILEGES and not _UNCONFINED.fullmatch(option):
            yield (
                f'security_opt "{option}": the process runtime offers no-new-privileges, and '
                "confines nothing else"
            )
    given = container.privileges
    if given is None:
        return
    if given.credential_spec is not None:
        yield "privileges.credential_spec: is for Windows containers"
    if given.selinux_context is not None and (
        given.selinux_context.user
        or given.selinux_context.role
        or given.selinux_context.type
        or given.selinux_context.level
    ):
        yield "privileges.selinux_context: the process runtime sets no labels"
    if given.seccomp is not None and given.seccomp.mode not in ("", "unconfined"):
        yield f'privileges.seccomp "{given.seccomp.mode}": only unconfined is offered'
    if given.apparmor is not None and given.apparmor.mode not in ("", "disabled"):
        yield f'privileges.apparmor "{given.apparmor.mode}": only disabled is offered'


def _capabilities(container: ContainerSpec) -> Iterator[str]:
    for name in (*container.capability_add, *container.capability_drop):
        if name.upper() != "ALL" and name.upper().removeprefix("CAP_") not in CAPABILITIES:
            yield f'capability "{name}": no such capability'


def capability_mask(container: ContainerSpec) -> int:
    """Bits of the capabilities that the task may have: Docker's default, with the changes asked."""
    names = set(CAPABILITIES if container.privileged else DEFAULT_CAPABILITIES)
    add = {name.upper().removeprefix("CAP_") for name in container.capability_add}
    drop = {name.upper().removeprefix("CAP_") for name in container.capability_drop}
    # As Docker does: ALL first, then the single names, which win over the other side's ALL.
    if "ALL" in add:
        names = set(CAPABILITIES)
    if "ALL" in drop:
        names = set()
    names = (names | add) - drop - {"ALL"}
    return sum(1 << CAPABILITIES.index(name) for name in names)


def no_new_privileges(container: ContainerSpec) -> bool:
    given = container.privileges
    return any(o in _NO_NEW_PRIVILEGES for o in container.security_opt) or (
        given is not None and given.no_new_privileges
    )


def _ulimits(container: ContainerSpec, powers: Powers) -> Iterator[str]:
    for limit in container.ulimits:
        if limit.name not in ULIMITS:
            yield f'ulimit "{limit.name}": known are {", ".join(sorted(ULIMITS))}'
            continue
        soft, hard = limit.soft, limit.hard
        if hard >= 0 and (soft < 0 or soft > hard):
            yield f"ulimit {limit.name}: soft {soft} is above hard {hard}"
        mine = resource.getrlimit(ULIMITS[limit.name])[1]
        if not powers.root and mine >= 0 and (hard < 0 or hard > mine):
            above = f"hard {hard} is above swarmd's own {mine}"
            yield f"ulimit {limit.name}: {above}, and {powers.lack}"


def _logs(spec: TaskSpec) -> Iterator[str]:
    driver = spec.log_driver
    if driver is None:
        return
    if driver.name not in LOG_DRIVERS:
        yield (
            f'log driver "{driver.name}": the process runtime writes files; use json-file, local '
            "or none"
        )
        return
    for key, value in driver.options.items():
        if key not in LOG_OPTIONS:
            yield f'log option "{key}": known are {" and ".join(LOG_OPTIONS)}'
        elif key == "max-file" and not (value.isdigit() and 1 <= int(value) <= 1000):
            yield f'log option max-file "{value}": must be a number from 1 to 1000'
        elif key == "max-size" and not re.fullmatch(r"[1-9]\d*[kmg]?b?", value.lower()):
            yield f'log option max-size "{value}": must be a size such as 10m'


def _mount(mount: Mount) -> Iterator[str]:
    where = f'mount on "{mount.target}"'
    if not mount.target.startswith("/") or mount.target == "/" or "/../" in mount.target + "/":
        yield f"{where}: the target must be an absolute path below /"
    if mount.type == "bind":
        if not mount.source.startswith("/"):
            yield f'{where}: source "{mount.source}" must be an absolute path on the node'
        bind = mount.bind_options
        if bind is not None and bind.propagation not in ("", "private", "rprivate"):
            yield f'{where}: propagation "{bind.propagation}": only rprivate is offered'
        if bind is not None and bind.selinux:
            yield f"{where}: selinux relabelling is not offered"
    elif mount.type == "volume":
        if mount.source and not _VOLUME.fullmatch(mount.source):
            yield f'{where}: "{mount.source}" is no name of a volume ([a-zA-Z0-9_.-])'
        volume = mount.volume_options
        driver = volume.driver_config if volume is not None else None
        if driver is not None and (driver.name not in ("", "local") or driver.options):
            yield f'{where}: volume driver "{driver.name}": only local without options is offered'
        if volume is not None and ".." in volume.subpath.split("/"):
            yield f'{where}: subpath "{volume.subpath}" leaves the volume'
    elif mount.type == "tmpfs":
        for option in mount.tmpfs_options.options if mount.tmpfs_options else ():
            words = option.words
            flag = len(words) == 1 and words[0] in {**TMPFS_FLAGS, **TMPFS_CLEARS}
            pair = len(words) == 2 and words[0] in TMPFS_KEYS and words[1].isalnum()
            if not flag and not pair:
                yield f'{where}: tmpfs option "{"=".join(words)}" is not offered'
    else:
        yield f'{where}: type "{mount.type}": the process runtime offers bind, volume and tmpfs'


def _devices(container: ContainerSpec) -> Iterator[str]:
    for device in container.devices:
        if not device.source.startswith("/"):
            yield f'device "{device.source}": only a path is offered, no CDI name'
        if set(device.permissions) not in (set(), set("rwm")):
            asked = device.permissions
            yield f'device "{device.source}": permissions "{asked}": only rwm is offered'


def _sysctls(container: ContainerSpec) -> Iterator[str]:
    for key in container.sysctls:
        if not _SYSCTL.match(key) or "/" in key or ".." in key:
            yield (
                f'sysctl "{key}": is not of the task alone; offered are net.*, fs.mqueue.* and '
                "those of IPC"
            )
        elif key.startswith("net.") and container.network_mode == "host":
            yield f'sysctl "{key}": the task uses the host\'s network'


def _networks(spec: TaskSpec) -> Iterator[str]:
    for attachment in spec.networks:
        for name in ("ipv4_address", "ipv6_address", "driver_opts"):
            if getattr(attachment, name):
                yield f'network "{attachment.target}": {name} is not offered by the process runtime'


def gpu_problems(given: Handover) -> list[str]:
    """Why a task cannot be given what it claims."""
    problems = [f"GPU {uuid} is not on this node any more" for uuid in given.missing]
    problems += [
        f"GPU {uuid} is known by its CDI name alone, which only a container engine can use; add "
        "its devices to the node's GPU inventory, or choose another runtime"
        for uuid in given.engine_only
    ]
    return problems


def gpu_warnings(given: Handover, cgroups: Cgroups | None) -> tuple[str, ...]:
    """What keeps a task's GPUs from others less well than it should."""
    if not given.hide or (cgroups is not None and cgroups.denies_devices):
        return ()
    return (
        "process: GPUs that a task has not claimed are hidden from it by CUDA_VISIBLE_DEVICES, "
        "not refused: that needs the devices cgroup of version 1, as root",
    )
