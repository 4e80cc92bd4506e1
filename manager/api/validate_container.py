"""What a task's container may say: files, mounts, health, and the engine's own options."""

from __future__ import annotations

import ipaddress
import re
import signal

from manager.api.names import check_labels
from manager.api.problems import Finder
from swarm.placeholders import container_problems
from swarm.quantities import format_bytes
from swarm.v1 import (
    ConfigReference,
    ContainerSpec,
    FileTarget,
    HealthConfig,
    Mount,
    SecretReference,
    Ulimit,
)

MOUNT_TYPES = ("bind", "volume", "tmpfs", "image")
PROPAGATIONS = ("private", "rprivate", "shared", "rshared", "slave", "rslave")
HEALTH_NS_MIN = 1_000_000  # Docker's: nothing below 1 ms
SHM_BYTES_MAX = 1 << 46
_PLATFORM = re.compile(r"[a-z0-9]+(/[a-z0-9_]+(/[a-z0-9]+)?)?")
_RTMIN = re.compile(r"RT(MIN(\+\d{1,2})?|MAX(-\d{1,2})?)")
_MODE_MAX = 0o7777


def check_container(find: Finder, container: ContainerSpec) -> None:
    """Notes everything that is wrong with the template's container."""
    check_labels(find, container.labels, "container_labels")
    _check_words(find, container)
    _check_numbers(find, container)
    if container.healthcheck is not None:
        _check_health(find.at("healthcheck"), container.healthcheck)
    _check_mounts(find, container)
    _check_files(find, container)
    for i, ulimit in enumerate(container.ulimits):
        _check_ulimit(find, i, ulimit)
    names = [u.name for u in container.ulimits]
    for name in sorted({n for n in names if names.count(n) > 1}):
        find.add("ulimits", f"{name!r} is given twice")
    for problem in container_problems(container):
        find.add("", problem.message)


def _check_words(find: Finder, container: ContainerSpec) -> None:
    image = container.image
    if image and (image != image.strip() or any(c.isspace() or c < " " for c in image)):
        find.add("image", f"{image!r} holds white space; write name, name:tag or name@digest")
    elif re.match(r"[a-z]+://", image):
        find.add("image", f"{image!r} is a URL; write the image without {image.split('//')[0]}//")
    for i, text in enumerate(container.env):
        if not text.partition("=")[0] or "\0" in text:
            find.add(f"environment[{i}]", f"{text!r} is not of the form NAME=value or NAME")
    for i, line in enumerate(container.hosts):
        _check_host(find, i, line)
    if container.dns is not None:
        for i, server in enumerate(container.dns.nameservers):
            if not _is_address(server):
                find.add(f"dns[{i}]", f"{server!r} is not an IP address")
    if container.stop_signal and not _is_signal(container.stop_signal):
        find.add(
            "stop_signal",
            f"{container.stop_signal!r} is not a signal; write a name such as SIGTERM, or a number",
        )
    if container.dir and "{{" not in container.dir and not container.dir.startswith("/"):
        find.add("working_dir", f"{container.dir!r} must be an absolute path")
    find.one_of("pull_policy", container.pull_policy, ("always", "missing", "never"))
    find.one_of("network_mode", container.network_mode, ("host", "none"))
    if container.platform and not _PLATFORM.fullmatch(container.platform):
        find.add("platform", f"{container.platform!r} is not of the form os/architecture")
    for i, device in enumerate(container.devices):
        if not device.source:
            find.add(f"devices[{i}]", "the device's path on the node is missing")
        if set(device.permissions) - set("rwm"):
            find.add(f"devices[{i}]", f"{device.permissions!r} is not made of r, w and m")


def _check_numbers(find: Finder, container: ContainerSpec) -> None:
    find.not_negative("stop_grace_period", container.stop_grace_period_ns, "a duration")
    find.not_negative("shm_size", container.shm_size_bytes, "a size")
    find.not_negative("cpu_shares", container.cpu_shares, "a share")
    find.not_negative("mem_reservation", container.memory_reservation_bytes, "a size")
    if container.shm_size_bytes > SHM_BYTES_MAX:
        find.add("shm_size", f"{format_bytes(container.shm_size_bytes)} is more than any node has")
    if not -1000 <= container.oom_score_adj <= 1000:
        find.add("oom_score_adj", f"{container.oom_score_adj} is not from -1000 to 1000")
    if container.memory_swap_bytes < -1:
        find.add("memswap_limit", f"{container.memory_swap_bytes} is not a size; -1 is no limit")
    if container.memory_swappiness is not None and not -1 <= container.memory_swappiness <= 100:
        find.add("mem_swappiness", f"{container.memory_swappiness} is not from -1 to 100")


def _check_host(find: Finder, index: int, line: str) -> None:
    """The API's form is "IP name [name...]"."""
    address, _, names = line.partition(" ")
    if not names.strip() or not (_is_address(address) or address == "host-gateway"):
        find.add(
            f"extra_hosts[{index}]", f"{line!r} is not an address and a name, such as 10.0.0.5 db"
        )


def _check_health(find: Finder, health: HealthConfig) -> None:
    if health.test:
        kind = health.test[0]
        if kind not in ("NONE", "CMD", "CMD-SHELL"):
            find.add("test", f"{kind!r} must be NONE, CMD or CMD-SHELL, then the command")
        elif kind != "NONE" and len(health.test) < 2:
            find.add("test", f"{kind} needs a command after it")
    for field, value in (
        ("interval", health.interval_ns),
        ("timeout", health.timeout_ns),
        ("start_period", health.start_period_ns),
        ("start_interval", health.start_interval_ns),
    ):
        find.not_negative(field, value, "a duration")
        if 0 < value < HEALTH_NS_MIN:
            find.add(field, "a duration below 1ms is too short; leave it out for the default")
    find.not_negative("retries", health.retries, "a number of tries")


def _check_mounts(find: Finder, container: ContainerSpec) -> None:
    targets: dict[str, int] = {}
    for i, mount in enumerate(container.mounts):
        at = find.at(f"mounts[{i}]")
        _check_mount(at, mount)
        if mount.target:
            target = mount.target.rstrip("/") or "/"
            if target in targets:
                at.add("target", f"{target} is a target twice (also mounts[{targets[target]}])")
            targets.setdefault(target, i)


def _check_mount(find: Finder, mount: Mount) -> None:
    if mount.type in ("npipe", "cluster"):
        why = "Windows has" if mount.type == "npipe" else "CSI plugins make"
        find.add("type", f"{mount.type!r} mounts, which {why}, are not offered")
        return
    if not mount.type:
        find.add("type", f"the type is missing; write one of {', '.join(MOUNT_TYPES)}")
    elif not find.one_of("type", mount.type, MOUNT_TYPES):
        return
    if not mount.target:
        find.add("target", "the path inside the task is missing")
    elif not mount.target.startswith(("/", "{{")):
        find.add("target", f"{mount.target!r} must be an absolute path inside the task")
    elif not mount.target.strip("/"):
        find.add("target", "a mount cannot take the place of the task's root")
    match mount.type:
        case "bind":
            if not mount.source:
                find.add("source", "a bind mount needs the path on the node")
            elif not mount.source.startswith(("/", "{{")):
                find.add("source", f"{mount.source!r} must be an absolute path on the node")
        case "tmpfs":
            if mount.source:
                find.add("source", "a tmpfs mount has no source; leave it out")
        case "volume":
            if "/" in mount.source and "{{" not in mount.source:
                find.add("source", f"{mount.source!r} is a path; a volume has a name (or use bind)")
        case "image":
            if not mount.source:
                find.add("source", "an image mount needs the image's name")
    _check_mount_options(find, mount)


def _check_mount_options(find: Finder, mount: Mount) -> None:
    for kind, options in (
        ("bind", mount.bind_options),
        ("volume", mount.volume_options),
        ("tmpfs", mount.tmpfs_options),
    ):
        # Docker's clients send empty options of other types; they say nothing.
        if options is not None and kind != mount.type and options != type(options)():
            find.add(f"{kind}_options", f"a {mount.type} mount has no {kind} options")
    if mount.bind_options is not None:
        find.one_of("bind.propagation", mount.bind_options.propagation, PROPAGATIONS)
        find.one_of("bind.selinux", mount.bind_options.selinux, ("z", "Z"))
    if mount.tmpfs_options is not None:
        find.not_negative("tmpfs.size", mount.tmpfs_options.size_bytes, "a size")
        if mount.tmpfs_options.mode > _MODE_MAX:
            find.add("tmpfs.mode", f"{mount.tmpfs_options.mode:o} is not made of permission bits")


def _check_files(find: Finder, container: ContainerSpec) -> None:
    """Secrets and configs: where they appear must be clear and no two at one place."""
    seen: dict[str, str] = {}
    secrets: list[tuple[str, SecretReference | ConfigReference]] = [
        (f"secrets[{i}]", s) for i, s in enumerate(container.secrets)
    ]
    configs = [(f"configs[{i}]", c) for i, c in enumerate(container.configs)]
    for where, reference in (*secrets, *configs):
        if isinstance(reference, ConfigReference) and reference.runtime:
            if reference.file is not None:
                find.add(where, "a config that the runtime uses does not appear as a file")
            continue
        if reference.file is None:
            continue  # completed to the default place when the reference is resolved
        path = _file_path(reference)
        _check_file(find.at(where), reference.file)
        if path in seen:
            find.add(f"{where}.target", f"{path} is a target twice (also {seen[path]})")
        seen.setdefault(path, where)


def _check_file(find: Finder, file: FileTarget) -> None:
    if not file.name:
        find.add("target", "the file's name inside the task is missing")
    elif ".." in file.name.split("/"):
        find.add("target", f"{file.name!r} must not contain '..'")
    for field, value in (("uid", file.uid), ("gid", file.gid)):
        if value and not value.isdecimal():
            find.add(field, f"{value!r} is not a number")
    if file.mode > _MODE_MAX:
        find.add("mode", f"{file.mode:o} is not made of permission bits")


def _file_path(reference: SecretReference | ConfigReference) -> str:
    assert reference.file is not None
    name = reference.file.name
    if name.startswith("/"):
        return name
    return f"/run/secrets/{name}" if isinstance(reference, SecretReference) else f"/{name}"


def _check_ulimit(find: Finder, index: int, ulimit: Ulimit) -> None:
    where = f"ulimits[{index}]"
    if not ulimit.name:
        find.add(where, "the limit's name is missing, such as nofile")
    if ulimit.soft < -1 or ulimit.hard < -1:
        find.add(where, f"{ulimit.name}: a limit cannot be negative; -1 means none")
    elif ulimit.hard != -1 and (ulimit.soft > ulimit.hard or ulimit.soft == -1):
        find.add(where, f"{ulimit.name}: soft ({ulimit.soft}) is above hard ({ulimit.hard})")


def _is_signal(text: str) -> bool:
    if text.isdecimal():
        return 1 <= int(text) <= 64
    name = text.upper().removeprefix("SIG")
    return f"SIG{name}" in signal.Signals.__members__ or _RTMIN.fullmatch(name) is not None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
