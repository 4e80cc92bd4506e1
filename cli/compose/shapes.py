"""How each key of a merged file is printed: the docker CLI's types, as tables.

The tables hold the Compose Specification's other keys as well, which Docker refuses; a test watches
that they hold every key of keys.py. Keys that Docker's schema takes and its structs lack (`beyond`)
are printed in the exact form only, for the plain one is Docker's; a warning tells.

Source: docker/cli, cli/compose/types/types.go; and the CLI itself, which the tests ask.
"""

from __future__ import annotations

from cli.compose.at import At
from cli.compose.printing import (
    Field,
    Style,
    Table,
    anything,
    duration,
    duration_or_none,
    integer,
    integer_or_text,
    mapping,
    mode_bits,
    mount_options,
    named,
    one,
    record,
    record_or_text,
    records,
    single,
    size,
    size_number,
    size_or_unlimited,
    strings,
    text,
    truth,
    variables,
    written,
)
from cli.compose.shorts import pairs


def _written_strings(at: At, style: Style) -> object:
    """Entries as they were written; the exact form has what was made of them."""
    if not at.is_list():
        return []
    return [each.text() if style.exact else each.node.text for each in at.elements()]


def _restart(at: At, style: Style) -> object:
    """An unquoted `no` that a tool of YAML 1.1 made false is the word."""
    return "no" if at.node.value is False else text(at, style)


def _devices(at: At, style: Style) -> object:
    found: list[object] = []
    for each in at.elements():
        short = each.node.text
        found.append(short or record_or_text(each, DEVICE_MAPPING, style))
    return found


def _env_file(at: At, style: Style) -> object:
    """Docker prints the files beside what they say. The exact form must not read them again."""
    return None if style.exact else strings(at, style)


def _ulimits(at: At, style: Style) -> object:
    if not at.is_map():
        return {}
    found: dict[str, object] = {}
    for name, each in sorted(at.items()):
        if isinstance(each.node.value, dict):
            found[name] = record(each, ULIMIT, style)
        else:
            # Docker's form has no single 0: it is the struct's zero, and printed as such.
            found[name] = written(each, integer, style) or (0 if style.exact else {})
    return found


def _depends_on(at: At, style: Style) -> object:
    if not at.is_map():
        return []
    entries = {key: record(each, DEPENDENCY, style) for key, each in at.items()}
    if all(entry == {"condition": "service_started"} for entry in entries.values()):
        return list(entries)
    return dict(sorted(entries.items()))


def _ports(at: At, style: Style) -> object:
    found: list[object] = []
    for each in at.elements():
        port = record_or_text(each, PORT, style)
        if isinstance(port, dict) and port.get("mode") != "host":
            port.pop("host_ip", None)  # listens everywhere, which a warning tells
        found.append(port)
    return found


def _generic(at: At, style: Style) -> object:
    del style
    kind, value = at.set_at("kind"), at.set_at("value")
    return {
        "kind": kind.text() if kind is not None else "",
        "value": value.integer() if value is not None else 0,
    }


def _pairs(at: At, style: Style) -> object:
    given = pairs(at)
    return mapping(At(given, at.path, at.report), style) if given is not None else {}


# ------------------------------------------------------------------ tables

TEXT, TRUTH, INTEGER, STRINGS = Field(text), Field(truth), Field(integer), Field(strings)
MAPPING, ANY = Field(mapping), Field(anything)


def _all(field: Field, names: str) -> dict[str, Field]:
    return dict.fromkeys(names.split(), field)


def _texts(names: str) -> dict[str, Field]:
    return _all(TEXT, names)


ULIMIT: Table = {"soft": INTEGER, "hard": INTEGER}
DEPENDENCY: Table = {
    "condition": TEXT,
    "restart": Field(truth, zero=True),
    "required": Field(truth, zero=True),
}
DEVICE_MAPPING: Table = _texts("source target permissions")
FILE_REFERENCE: Table = {**_texts("source target uid gid"), "mode": Field(mode_bits, zero=True)}
BUILD: Table = {
    **_texts("context dockerfile"),
    "args": Field(variables),
    "labels": MAPPING,
    "cache_from": STRINGS,
    "extra_hosts": STRINGS,
    **_texts("network target"),
}
CREDENTIAL_SPEC: Table = _texts("config file registry")
HEALTHCHECK: Table = {
    "test": STRINGS,
    "timeout": Field(duration),
    "interval": Field(duration),
    "retries": Field(integer, zero=True),
    "start_period": Field(duration),
    "start_interval": Field(duration),
    "disable": TRUTH,
}
LOGGING: Table = {"driver": TEXT, "options": MAPPING}
SERVICE_NETWORK: Table = {
    "aliases": STRINGS,
    "driver_opts": MAPPING,
    "gw_priority": ANY,
    "interface_name": ANY,
    "ipv4_address": TEXT,
    "ipv6_address": TEXT,
    "link_local_ips": ANY,
    "mac_address": TEXT,
    "priority": INTEGER,
}
PORT: Table = {
    **_texts("name mode host_ip"),
    "target": INTEGER,
    "published": Field(integer_or_text),
    **_texts("protocol app_protocol"),
}
BIND: Table = {
    "propagation": TEXT,
    "create_host_path": Field(truth, beyond=True),
    "recursive": Field(text, beyond=True),
    "selinux": Field(text, beyond=True),
}
VOLUME_OPTIONS: Table = {
    "nocopy": TRUTH,
    "subpath": TEXT,
    "labels": Field(mapping, beyond=True),
}
TMPFS: Table = {"size": Field(size_number), "mode": Field(mode_bits, beyond=True)}
IMAGE_OPTIONS: Table = {"subpath": TEXT}
VOLUME_MOUNT: Table = {
    **_texts("type source target"),
    "read_only": TRUTH,
    "consistency": TEXT,
    "bind": Field(mount_options(BIND), zero=True),
    "volume": Field(mount_options(VOLUME_OPTIONS), zero=True),
    "tmpfs": Field(mount_options(TMPFS), zero=True),
    "image": Field(mount_options(IMAGE_OPTIONS), zero=True),
}
DEVICE: Table = {
    "capabilities": STRINGS,
    "driver": TEXT,
    "count": Field(integer_or_text),
    "device_ids": STRINGS,
    "options": Field(_pairs),
}
GENERIC: Table = {"discrete_resource_spec": Field(_generic)}
LIMITS: Table = {
    "cpus": TEXT,
    "memory": Field(size),
    "pids": INTEGER,
    "devices": ANY,
    "generic_resources": ANY,
}
RESERVATIONS: Table = {
    "cpus": TEXT,
    "memory": Field(size),
    "pids": INTEGER,
    "generic_resources": Field(records(GENERIC)),
    "devices": Field(records(DEVICE)),
}
RESOURCES: Table = {
    "limits": Field(one(LIMITS), zero=True),
    "reservations": Field(one(RESERVATIONS), zero=True),
}
UPDATE: Table = {
    "parallelism": Field(integer, zero=True),
    "delay": Field(duration_or_none),
    "failure_action": TEXT,
    "monitor": Field(duration_or_none),
    "max_failure_ratio": Field(single),
    "order": TEXT,
    # 0s: for ever.
    "deadline": Field(duration, zero=True),
}
RESTART: Table = {
    "condition": TEXT,
    "delay": Field(duration),
    "max_attempts": Field(integer, zero=True),
    "window": Field(duration),
    "max_delay": Field(duration, zero=True),
}
PREFERENCE: Table = {"spread": TEXT, "affinity": TEXT, "weight": INTEGER}
PLACEMENT: Table = {
    "constraints": STRINGS,
    "preferences": Field(records(PREFERENCE)),
    "max_replicas_per_node": INTEGER,
    "strategy": TEXT,
}
JOB: Table = {
    "queue": TEXT,
    "gang": TRUTH,
    "timeout": Field(duration),
    # 0s: it is removed at once.
    "keep": Field(duration, zero=True),
}
DEPLOY: Table = {
    "mode": TEXT,
    "replicas": Field(integer, zero=True),
    "labels": MAPPING,
    "update_config": Field(one(UPDATE), zero=True),
    "rollback_config": Field(one(UPDATE), zero=True),
    "resources": Field(one(RESOURCES)),
    "restart_policy": Field(one(RESTART), zero=True),
    "placement": Field(one(PLACEMENT)),
    "endpoint_mode": TEXT,
    "priority": INTEGER,
    "job": Field(one(JOB), zero=True),
}
SERVICE: Table = {
    "annotations": MAPPING,
    "attach": Field(truth, zero=True),
    "blkio_config": ANY,
    "build": Field(one(BUILD)),
    "cap_add": STRINGS,
    "cap_drop": STRINGS,
    "cgroup": TEXT,
    "cgroupns_mode": TEXT,
    "cgroup_parent": TEXT,
    "command": STRINGS,
    "configs": Field(records(FILE_REFERENCE)),
    "container_name": TEXT,
    **_all(ANY, "cpu_count cpu_percent cpu_period cpu_quota cpu_rt_period cpu_rt_runtime"),
    "cpu_shares": ANY,
    "cpus": TEXT,
    "cpuset": TEXT,
    "credential_spec": Field(one(CREDENTIAL_SPEC)),
    "depends_on": Field(_depends_on),
    "deploy": Field(one(DEPLOY)),
    "develop": ANY,
    "device_cgroup_rules": STRINGS,
    "devices": Field(_devices),
    "dns": STRINGS,
    "dns_opt": STRINGS,
    "dns_search": STRINGS,
    "dockerfile": ANY,
    "domainname": TEXT,
    "entrypoint": STRINGS,
    "environment": Field(variables),
    "env_file": Field(_env_file),
    "expose": STRINGS,
    "external_links": STRINGS,
    "extra_hosts": STRINGS,
    "gpus": Field(records(DEVICE)),
    "group_add": STRINGS,
    "hostname": TEXT,
    "healthcheck": Field(one(HEALTHCHECK), zero=True),
    "image": TEXT,
    "init": Field(truth, zero=True),
    "ipc": TEXT,
    "isolation": TEXT,
    "labels": MAPPING,
    "links": STRINGS,
    "log_driver": ANY,
    "log_opt": ANY,
    "logging": Field(one(LOGGING), zero=True),
    "mac_address": TEXT,
    "mem_limit": Field(size),
    "mem_reservation": Field(size),
    "mem_swappiness": Field(integer, zero=True),
    "memswap_limit": Field(size_or_unlimited),
    "models": ANY,
    "net": ANY,
    "network_mode": TEXT,
    "networks": Field(named(SERVICE_NETWORK)),
    "oom_kill_disable": TRUTH,
    "oom_score_adj": Field(integer, beyond=True),
    "pid": TEXT,
    "pids_limit": INTEGER,
    "platform": TEXT,
    "ports": Field(_ports),
    "post_start": ANY,
    "pre_stop": ANY,
    "privileged": TRUTH,
    "provider": ANY,
    "pull_policy": TEXT,
    "pull_refresh_after": TEXT,
    "read_only": TRUTH,
    "restart": Field(_restart),
    "runtime": TEXT,
    "scale": Field(integer, zero=True),
    "secrets": Field(records(FILE_REFERENCE)),
    "security_opt": Field(_written_strings),
    "shm_size": TEXT,
    "stdin_open": TRUTH,
    "stop_grace_period": Field(duration),
    "stop_signal": TEXT,
    "storage_opt": MAPPING,
    "sysctls": MAPPING,
    "tmpfs": STRINGS,
    "tty": TRUTH,
    "ulimits": Field(_ulimits),
    "use_api_socket": TRUTH,
    "user": TEXT,
    "userns_mode": TEXT,
    "uts": TEXT,
    "volume_driver": ANY,
    "volumes": Field(records(VOLUME_MOUNT)),
    "volumes_from": ANY,
    "working_dir": TEXT,
}
IPAM_CONFIG: Table = {**_texts("subnet ip_range gateway"), "aux_addresses": MAPPING}
IPAM: Table = {"driver": TEXT, "config": Field(records(IPAM_CONFIG)), "options": MAPPING}
NETWORK: Table = {
    "name": TEXT,
    "driver": TEXT,
    "driver_opts": MAPPING,
    "ipam": Field(one(IPAM)),
    "external": TRUTH,
    "internal": TRUTH,
    "attachable": TRUTH,
    "labels": MAPPING,
    "enable_ipv4": Field(truth, zero=True),
    "enable_ipv6": Field(truth, zero=True),
}
VOLUME: Table = {
    "name": TEXT,
    "driver": TEXT,
    "driver_opts": MAPPING,
    "external": TRUTH,
    "labels": MAPPING,
}
_TOPOLOGIES = Field(records({"segments": Field(_pairs)}))
CLUSTER_SPEC: Table = {
    "group": TEXT,
    "access_mode": ANY,
    "accessibility_requirements": Field(
        one({"requisite": _TOPOLOGIES, "preferred": _TOPOLOGIES}), zero=True
    ),
    "capacity_range": Field(
        one({"required_bytes": Field(size), "limit_bytes": Field(size)}), zero=True
    ),
    "secrets": ANY,
    "availability": TEXT,
}
CLUSTER_VOLUME: Table = {"x-cluster-spec": Field(one(CLUSTER_SPEC), zero=True)}
SECRET: Table = {
    **_texts("name file environment content"),
    "external": TRUTH,
    "labels": MAPPING,
    "driver": TEXT,
    "driver_opts": MAPPING,
    "template_driver": TEXT,
}
CONFIG: Table = {key: field for key, field in SECRET.items() if not key.startswith("driver")}
