"""Every key that the Compose Specification knows, each in exactly one class: honoured, honoured by
the docker runtime only, or refused with the reason and what to write instead.

The loader accepts and refuses by these tables, the documentation lists them, and a test goes
through them; nothing else decides whether a key is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache


class Support(Enum):
    """What becomes of a key."""

    HONOURED = "honoured"
    DOCKER_ONLY = "honoured by the docker runtime only"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Key:
    """A key's class. Refused keys say why, and what to write instead."""

    support: Support
    how: str = ""
    reason: str = ""
    instead: str = ""


def _yes(how: str) -> Key:
    return Key(Support.HONOURED, how=how)


def _docker(how: str) -> Key:
    return Key(Support.DOCKER_ONLY, how=how)


def _no(reason: str, instead: str) -> Key:
    return Key(Support.REFUSED, reason=reason, instead=instead)


def _plain(names: str) -> dict[str, Key]:
    """Honoured keys whose name says it all."""
    return dict.fromkeys(names.split(), _yes(""))


_BY_NAME = "services on one network reach each other by name"
SERVICE: Mapping[str, Key] = {
    "annotations": _docker("OCI annotations of the container"),
    "attach": _yes("checked; a deploy never attaches to output, so both values mean the same"),
    "blkio_config": _no(
        "a cluster has no block-I/O weights",
        "remove it, or pick nodes with faster disks by a label and deploy.placement.constraints",
    ),
    "build": _no(
        "a cluster runs images from a registry and does not build",
        "build and push the image first and name it with `image:`; then remove build here, or "
        "move it to an override file that is not deployed, or take it out with `build: !reset "
        "null` in one that is",
    ),
    "cap_add": _yes("capabilities added to the container"),
    "cap_drop": _yes("capabilities taken from the container"),
    "cgroup": _yes("cgroup namespace: host or private"),
    "cgroup_parent": _docker("parent cgroup of the container"),
    "cgroupns_mode": _yes("older name of cgroup"),
    "command": _yes("arguments; replaces the image's"),
    "configs": _yes("files from configs of the cluster"),
    "container_name": _yes(
        "another name of the service on its networks; containers are named after their task"
    ),
    "cpu_count": _no("it is for Windows only", "write deploy.resources.limits.cpus"),
    "cpu_percent": _no("it is for Windows only", "write deploy.resources.limits.cpus"),
    "cpu_period": _yes("with cpu_quota becomes limits.cpus"),
    "cpu_quota": _yes("divided by cpu_period (100000) becomes limits.cpus"),
    "cpu_rt_period": _no(
        "real-time CPU time can't be granted by a cluster", "write deploy.resources.limits.cpus"
    ),
    "cpu_rt_runtime": _no(
        "real-time CPU time can't be granted by a cluster", "write deploy.resources.limits.cpus"
    ),
    "cpu_shares": _yes("relative CPU weight"),
    "cpus": _yes("deploy.resources.limits.cpus where that is absent"),
    "cpuset": _yes("CPUs the container may use"),
    "credential_spec": _docker("Windows credential spec"),
    "depends_on": _yes("tasks wait until the other service has reached the condition"),
    "deploy": _yes("how the cluster runs it"),
    "develop": _no("it is for `docker compose watch`", "remove it from the file you deploy"),
    "device_cgroup_rules": _docker("cgroup rules for devices"),
    "devices": _yes("devices of the node, by path or CDI name"),
    "dns": _yes("name servers"),
    "dns_opt": _yes("resolver options"),
    "dns_search": _yes("search domains"),
    "domainname": _yes("domain name"),
    "entrypoint": _yes("command; replaces the image's entrypoint"),
    "env_file": _yes("files of variables, below environment"),
    "environment": _yes("variables"),
    "expose": _yes("information only: every port is open within a network"),
    "extends": _yes("starts from another service's definition"),
    "external_links": _no(
        "links to single containers do not reach across hosts",
        f"put both services on one external network; {_BY_NAME}",
    ),
    "extra_hosts": _yes("lines of /etc/hosts"),
    "gpus": _yes("like deploy.resources.reservations.devices with the capability gpu"),
    "group_add": _yes("supplementary groups"),
    "healthcheck": _yes("how health is told"),
    "hostname": _yes("host name; may hold placeholders such as {{.Task.Slot}}"),
    "image": _yes("what to run; not used by runtime: process"),
    "init": _yes("an init as process 1"),
    "ipc": _yes("IPC namespace: host, private or shareable"),
    "isolation": _docker("Windows isolation"),
    "label_file": _yes("files of labels, below labels"),
    "labels": _yes("labels of the containers"),
    "links": _yes("waits for the other service; its alias becomes one of the other service's"),
    "logging": _yes("log driver and its options"),
    "mac_address": _docker("MAC address; two replicas on one host would share it"),
    "mem_limit": _yes("deploy.resources.limits.memory where that is absent"),
    "mem_reservation": _yes("soft memory limit"),
    "mem_swappiness": _yes("kernel swappiness of the container"),
    "memswap_limit": _yes("memory and swap together"),
    "models": _no("a cluster runs no AI models of its own", "run the model server as a service"),
    "network_mode": _yes("host or none"),
    "networks": _yes("networks to join, with aliases and addresses"),
    "oom_kill_disable": _yes("never kill it when memory runs out"),
    "oom_score_adj": _yes("who is killed first when memory runs out"),
    "pid": _yes("PID namespace: host"),
    "pids_limit": _yes("deploy.resources.limits.pids where that is absent"),
    "platform": _yes("platform of the image; only matching nodes are chosen"),
    "ports": _yes("published ports"),
    "post_start": _no(
        "hooks after start are not run by the cluster",
        "do it in the entrypoint, or in a job service with depends_on",
    ),
    "pre_stop": _no(
        "hooks before stop are not run by the cluster",
        "handle the stop signal (stop_signal, stop_grace_period) in the program",
    ),
    "privileged": _yes("full access to the host"),
    "profiles": _yes("left out unless one of them is active"),
    "provider": _no("plugins of docker compose are not run", "describe it as a service"),
    "pull_policy": _docker("always, missing or never"),
    "pull_refresh_after": _no(
        "images are not pulled by the clock", "deploy again with pull_policy: always"
    ),
    "read_only": _yes("read-only root file system"),
    "restart": _yes("deploy.restart_policy where that is absent"),
    "runtime": _yes("process, or a runtime of the engine such as runc, nvidia or runsc"),
    "scale": _yes("deploy.replicas where that is absent"),
    "secrets": _yes("files from secrets of the cluster"),
    "security_opt": _yes("seccomp, apparmor, label and no-new-privileges"),
    "shm_size": _yes("size of /dev/shm"),
    "stdin_open": _yes("standard input stays open"),
    "stop_grace_period": _yes("time from the stop signal to SIGKILL"),
    "stop_signal": _yes("signal that asks it to end"),
    "storage_opt": _docker("options of the storage driver"),
    "sysctls": _yes("kernel parameters of the container"),
    "tmpfs": _yes("in-memory file systems"),
    "tty": _yes("a terminal"),
    "ulimits": _yes("limits of its processes"),
    "use_api_socket": _no(
        "it would hand the engine's credentials to every node",
        "mount /var/run/docker.sock yourself if you mean it",
    ),
    "user": _yes("user and group it runs as"),
    "userns_mode": _yes("user namespace: host"),
    "uts": _yes("UTS namespace: host"),
    "volumes": _yes("volumes, host paths and in-memory file systems"),
    "volumes_from": _no(
        "containers of other hosts have no volumes to share",
        "name the same volume in both services",
    ),
    "working_dir": _yes("working directory"),
    # Keys of old versions.
    "net": _no("it is of version 1 files", "write network_mode or networks"),
    "log_driver": _no("it is of version 1 files", "write logging.driver"),
    "log_opt": _no("it is of version 1 files", "write logging.options"),
    "volume_driver": _no("it is of version 1 files", "write volumes.NAME.driver at the top level"),
    "dockerfile": _no("a cluster does not build images", "build and push the image first"),
}

# Of a service as well: what Docker lacks and its schema would refuse below deploy, in keys that it
# leaves alone.
OWN: Mapping[str, Key] = {
    "x-restart-max-delay": _yes("deploy.restart_policy.max_delay, in a file that Docker reads too"),
    "x-rollback-deadline": _yes("deploy.rollback_config.deadline, in a file that Docker reads too"),
    "x-update-deadline": _yes("deploy.update_config.deadline, in a file that Docker reads too"),
}
ROOT: Mapping[str, Key] = {
    **_plain("version name services networks volumes secrets configs include"),
    "models": _no("a cluster runs no AI models of its own", "run the model server as a service"),
}
DEPLOY: Mapping[str, Key] = _plain(
    "mode replicas endpoint_mode labels placement resources restart_policy update_config "
    "rollback_config priority job"
)
JOB: Mapping[str, Key] = _plain("queue gang timeout keep")
PLACEMENT: Mapping[str, Key] = _plain("constraints preferences max_replicas_per_node strategy")
PREFERENCE: Mapping[str, Key] = _plain("spread affinity weight")
RESOURCES: Mapping[str, Key] = _plain("limits reservations")
LIMITS: Mapping[str, Key] = {
    **_plain("cpus memory pids"),
    "devices": _no("a device is claimed, not limited", "write it below resources.reservations"),
    "generic_resources": _no(
        "a resource is claimed, not limited", "write it below resources.reservations"
    ),
}
RESERVATIONS: Mapping[str, Key] = {
    **_plain("cpus memory devices generic_resources"),
    "pids": _no("processes are limited, not reserved", "write it below resources.limits"),
}
DEVICE: Mapping[str, Key] = _plain("driver count device_ids capabilities options")
GENERIC: Mapping[str, Key] = _plain("discrete_resource_spec")
DISCRETE: Mapping[str, Key] = _plain("kind value")
RESTART: Mapping[str, Key] = _plain("condition delay max_attempts window max_delay")
UPDATE: Mapping[str, Key] = _plain(
    "parallelism delay failure_action monitor max_failure_ratio order deadline"
)
HEALTHCHECK: Mapping[str, Key] = _plain(
    "test interval timeout retries start_period start_interval disable"
)
LOGGING: Mapping[str, Key] = _plain("driver options")
PORT: Mapping[str, Key] = _plain("name mode host_ip target published protocol app_protocol")
VOLUME_MOUNT: Mapping[str, Key] = _plain(
    "type source target read_only consistency bind volume tmpfs image"
)
BIND: Mapping[str, Key] = _plain("propagation create_host_path recursive selinux")
VOLUME_OPTIONS: Mapping[str, Key] = _plain("nocopy subpath labels")
TMPFS: Mapping[str, Key] = _plain("size mode")
IMAGE_OPTIONS: Mapping[str, Key] = _plain("subpath")
FILE_REFERENCE: Mapping[str, Key] = _plain("source target uid gid mode")
SERVICE_NETWORK: Mapping[str, Key] = {
    **_plain("aliases ipv4_address ipv6_address driver_opts priority"),
    "link_local_ips": _no("link-local addresses can't be given by a cluster", "remove it"),
    "mac_address": _no("an address per network can't be given", "write mac_address of the service"),
    "gw_priority": _no("the default gateway is chosen by the engine", "use priority"),
    "interface_name": _no("interface names are chosen by the engine", "remove it"),
}
ULIMIT: Mapping[str, Key] = _plain("soft hard")
DEPENDENCY: Mapping[str, Key] = _plain("condition required restart")
ENV_FILE: Mapping[str, Key] = _plain("path required format")
EXTENDS: Mapping[str, Key] = _plain("file service")
INCLUDE: Mapping[str, Key] = _plain("path project_directory env_file")
CREDENTIAL_SPEC: Mapping[str, Key] = _plain("config file registry")
DEVICE_MAPPING: Mapping[str, Key] = _plain("source target permissions")
NETWORK: Mapping[str, Key] = _plain(
    "name driver driver_opts ipam external internal attachable labels enable_ipv4 enable_ipv6"
)
IPAM: Mapping[str, Key] = _plain("driver config options")
IPAM_CONFIG: Mapping[str, Key] = _plain("subnet ip_range gateway aux_addresses")
VOLUME: Mapping[str, Key] = _plain("name driver driver_opts external labels")
SECRET: Mapping[str, Key] = _plain(
    "name file environment content external labels driver driver_opts template_driver"
)
CONFIG: Mapping[str, Key] = _plain("name file environment content external labels template_driver")
EXTERNAL: Mapping[str, Key] = _plain("name")

# Where the keys of each context stand, for keys that were written in the wrong place.
_PLACES: tuple[tuple[str, Mapping[str, Key]], ...] = (
    ("the top level", ROOT),
    ("a service", SERVICE),
    ("deploy", DEPLOY),
    ("deploy.placement", PLACEMENT),
    ("deploy.resources", RESOURCES),
    ("deploy.resources.limits", LIMITS),
    ("deploy.resources.reservations", RESERVATIONS),
    ("deploy.restart_policy", RESTART),
    ("deploy.job", JOB),
    ("deploy.update_config", UPDATE),
    ("healthcheck", HEALTHCHECK),
    ("logging", LOGGING),
)


@cache
def _places() -> dict[str, str]:
    """Honoured keys that have one place only."""
    found: dict[str, list[str]] = {}
    for place, keys in _PLACES:
        for name, key in keys.items():
            if key.support is not Support.REFUSED:
                found.setdefault(name, []).append(place)
    found.pop("name", None)
    found.pop("driver", None)
    return {name: " or ".join(places[:2]) for name, places in found.items() if len(places) <= 2}


def place_of(name: str, context: str) -> str:
    """Where a key belongs that stood in `context`; empty when it is unknown everywhere."""
    place = _places().get(name, "")
    return "" if place == context else place


def markdown() -> str:
    """The table of service keys for the documentation, KEYS.md."""
    lines = [
        "# Keys of a service",
        "",
        "Each key of the Compose Specification, and what becomes of it. Made from `keys.py` by",
        "`python -m cli.compose.keys > cli/compose/KEYS.md`; a test fails when they differ.",
        "Other keys that begin with `x-` are yours and are taken everywhere.",
    ]
    for support in Support:
        lines += ["", f"## {support.value.capitalize()}", "", "| key | |", "|---|---|"]
        for name, key in sorted({**SERVICE, **OWN}.items()):
            if key.support is support:
                lines.append(f"| `{name}` | {key.how or f'{key.reason}; {key.instead}'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
