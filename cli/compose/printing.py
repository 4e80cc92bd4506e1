"""How each key of a merged file is printed: the docker CLI's types, as tables.

`docker stack config` decodes a file into Go structs and prints these: fields in their order, maps
sorted, what is zero left out unless the field is a pointer. A Table is such a struct: its fields
name how a value is written and whether its zero is. The tables hold the Compose Specification's
other keys as well, which Docker refuses. That they hold every key of keys.py, a test watches.

Keys that Docker's schema takes and its structs lack (`beyond`) are printed in the exact form only,
for the plain one is Docker's; a warning tells. Source: docker/cli, cli/compose/types/types.go; and
the CLI itself, which the tests ask.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cli.compose.at import At, go_float
from cli.compose.forms import pairs
from cli.compose.tree import LITERAL_TAG, Node, go_time
from swarm.quantities import format_duration


@dataclass(frozen=True, slots=True)
class Style:
    """What the form is for. `exact`: to be deployed again, so nothing is left out."""

    exact: bool


Write = Callable[[At, Style], object]


@dataclass(frozen=True, slots=True)
class Field:
    """How one key is written. `zero`: its zero is printed too. `beyond`: not in Docker's form."""

    write: Write
    zero: bool = False
    beyond: bool = False


Table = Mapping[str, Field]


def record(at: At, table: Table, style: Style, *, own: bool = True) -> dict[str, object]:
    """A mapping in the table's order, then the user's own keys (x-) if `own`."""
    found: dict[str, object] = {}
    for key, field in table.items():
        value_at = at.set_at(key)
        if value_at is None:
            continue
        value = written(value_at, field.write, style)
        if value is None:
            continue
        if not value and not field.zero and not style.exact:
            continue
        if field.beyond and not style.exact:
            value_at.warn(
                "a deploy honours this, but the form that Docker prints has no place for it; "
                "the exact form has"
            )
            continue
        found[key] = value
    return {**found, **own_keys(at)} if own else found


def own_keys(at: At) -> dict[str, object]:
    """The keys that begin with x-, sorted."""
    return {key: plain(each.node) for key, each in sorted(at.items()) if key.startswith("x-")}


def written(at: At, write: Write, style: Style) -> object:
    """A value; what holds variables that were not filled in stays as it is."""
    if at.node.tag == LITERAL_TAG and isinstance(at.node.value, str) and write not in _SPLITS:
        return at.node.value
    return write(at, style)


# ------------------------------------------------------------------ values


def plain(node: Node) -> object:
    """A value whose type nobody knows: as Go reads and prints it."""
    value = node.value
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str) and node.plain and (stamp := go_time(value)) is not None:
        day, time, zone, _ = stamp.split()
        return datetime.fromisoformat(f"{day}T{time}{zone[:3]}:{zone[3:]}")
    return value


def _number(value: float) -> int | float:
    """1.0 is printed as 1, and so read as a whole number."""
    text = go_float(value)
    return int(text) if text.lstrip("-").isdigit() else value


def _any(at: At, style: Style) -> object:
    del style
    return plain(at.node)


def _text(at: At, style: Style) -> object:
    del style
    return at.text()


def truth(at: At, style: Style) -> object:
    del style
    return at.truth()


def _integer(at: At, style: Style) -> object:
    del style
    return at.integer()


def _integer_or_text(at: At, style: Style) -> object:
    """A published port, which may be a range; a number of devices, which may be all."""
    value = at.node.value
    if isinstance(value, str) and not value.strip().lstrip("-").isdigit():
        return value
    if value == -1:
        return "all"
    return _integer(at, style)


def _single(at: At, style: Style) -> object:
    """A number of 32 bits, whose digits are the fewest that tell it from others."""
    value = at.number()
    if style.exact:
        return _number(value)
    near = struct.unpack("f", struct.pack("f", value))[0]
    for digits in range(1, 10):
        shorter = float(f"{near:.{digits}g}")
        if struct.unpack("f", struct.pack("f", shorter))[0] == near:
            return _number(shorter)
    return _number(near)


def _duration(at: At, style: Style) -> object:
    del style
    return format_duration(at.duration())


def _duration_or_none(at: At, style: Style) -> object:
    """A duration whose zero says as little as its absence."""
    value = at.duration()
    return format_duration(value) if value or style.exact else ""


def _size(at: At, style: Style) -> object:
    """Bytes, as text; 0 says as little as its absence."""
    value = at.size()
    return str(value) if value or style.exact else ""


def _size_or_unlimited(at: At, style: Style) -> object:
    return "-1" if str(at.node.value) == "-1" else _size(at, style)


def _size_number(at: At, style: Style) -> object:
    del style
    return at.size()


def _mode(at: At, style: Style) -> object:
    del style
    return at.mode_bits()


def _strings(at: At, style: Style) -> object:
    if not isinstance(at.node.value, list):
        return [at.text()]
    return [written(each, _text, style) for each in at.elements()]


def _mapping(at: At, style: Style) -> object:
    """Strings by name; a name alone has the empty one."""
    del style
    if not at.is_map():
        return {}
    return {key: _value(each) for key, each in sorted(at.items())}


def _variables(at: At, style: Style) -> object:
    """Strings by name; a name alone has none."""
    del style
    if not at.is_map():
        return {}
    return {
        key: None if each.node.value is None else _value(each) for key, each in sorted(at.items())
    }


def _value(at: At) -> str:
    return str(at.node.value) if at.node.tag == LITERAL_TAG else at.value_text()


def _records(table: Table) -> Write:
    def write(at: At, style: Style) -> object:
        if not at.is_list():
            return []
        return [_record_or_text(each, table, style) for each in at.elements()]

    return write


def _record_or_text(at: At, table: Table, style: Style) -> object:
    """Short forms that hold variables could not be written out."""
    if at.node.tag == LITERAL_TAG:
        return at.node.value
    return record(at, table, style) if at.is_map() else {}


def _one(table: Table) -> Write:
    def write(at: At, style: Style) -> object:
        return record(at, table, style) if at.is_map() else {}

    return write


def _options(table: Table) -> Write:
    """Options of a mount. Those that a short form was given (its node has no keys of a file) are
    nothing where Docker knows none of them.
    """

    def write(at: At, style: Style) -> object:
        found = record(at, table, style) if at.is_map() else {}
        return found if found or at.node.keys is not None else None

    return write


def _named(table: Table) -> Write:
    def write(at: At, style: Style) -> object:
        if not at.is_map():
            return {}
        return {
            key: None if each.node.value is None else record(each, table, style)
            for key, each in sorted(at.items())
        }

    return write


# ------------------------------------------------------------------ keys with a form of their own


def _written_strings(at: At, style: Style) -> object:
    """Entries as they were written; the exact form has what was made of them."""
    if not at.is_list():
        return []
    return [each.text() if style.exact else each.node.text for each in at.elements()]


def _devices(at: At, style: Style) -> object:
    found: list[object] = []
    for each in at.elements():
        short = each.node.text
        found.append(short or _record_or_text(each, DEVICE_MAPPING, style))
    return found


def _env_file(at: At, style: Style) -> object:
    """Docker prints the files beside what they say. The exact form must not read them again."""
    return None if style.exact else _strings(at, style)


def _ulimits(at: At, style: Style) -> object:
    if not at.is_map():
        return {}
    found: dict[str, object] = {}
    for name, each in sorted(at.items()):
        if isinstance(each.node.value, dict):
            found[name] = record(each, ULIMIT, style)
        else:
            # Docker's form has no single 0: it is the struct's zero, and printed as such.
            found[name] = written(each, _integer, style) or (0 if style.exact else {})
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
        port = _record_or_text(each, PORT, style)
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


def _segments(at: At, style: Style) -> object:
    given = pairs(at)
    return _mapping(At(given, at.path, at.report), style) if given is not None else {}


_SPLITS: frozenset[Write] = frozenset((_strings,))


# ------------------------------------------------------------------ tables

TEXT, TRUTH, INTEGER, STRINGS = Field(_text), Field(truth), Field(_integer), Field(_strings)
MAPPING, ANY = Field(_mapping), Field(_any)


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
FILE_REFERENCE: Table = {**_texts("source target uid gid"), "mode": Field(_mode, zero=True)}
BUILD: Table = {
    **_texts("context dockerfile"),
    "args": Field(_variables),
    "labels": MAPPING,
    "cache_from": STRINGS,
    "extra_hosts": STRINGS,
    **_texts("network target"),
}
CREDENTIAL_SPEC: Table = _texts("config file registry")
HEALTHCHECK: Table = {
    "test": STRINGS,
    "timeout": Field(_duration),
    "interval": Field(_duration),
    "retries": Field(_integer, zero=True),
    "start_period": Field(_duration),
    "start_interval": Field(_duration),
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
    "published": Field(_integer_or_text),
    **_texts("protocol app_protocol"),
}
BIND: Table = {
    "propagation": TEXT,
    "create_host_path": Field(truth, beyond=True),
    "recursive": Field(_text, beyond=True),
    "selinux": Field(_text, beyond=True),
}
VOLUME_OPTIONS: Table = {
    "nocopy": TRUTH,
    "subpath": TEXT,
    "labels": Field(_mapping, beyond=True),
}
TMPFS: Table = {"size": Field(_size_number), "mode": Field(_mode, beyond=True)}
IMAGE_OPTIONS: Table = {"subpath": TEXT}
VOLUME_MOUNT: Table = {
    **_texts("type source target"),
    "read_only": TRUTH,
    "consistency": TEXT,
    "bind": Field(_options(BIND), zero=True),
    "volume": Field(_options(VOLUME_OPTIONS), zero=True),
    "tmpfs": Field(_options(TMPFS), zero=True),
    "image": Field(_options(IMAGE_OPTIONS), zero=True),
}
DEVICE: Table = {
    "capabilities": STRINGS,
    "driver": TEXT,
    "count": Field(_integer_or_text),
    "device_ids": STRINGS,
    "options": MAPPING,
}
GENERIC: Table = {"discrete_resource_spec": Field(_generic)}
LIMITS: Table = {
    "cpus": TEXT,
    "memory": Field(_size),
    "pids": INTEGER,
    "devices": ANY,
    "generic_resources": ANY,
}
RESERVATIONS: Table = {
    "cpus": TEXT,
    "memory": Field(_size),
    "pids": INTEGER,
    "generic_resources": Field(_records(GENERIC)),
    "devices": Field(_records(DEVICE)),
}
RESOURCES: Table = {
    "limits": Field(_one(LIMITS), zero=True),
    "reservations": Field(_one(RESERVATIONS), zero=True),
}
UPDATE: Table = {
    "parallelism": Field(_integer, zero=True),
    "delay": Field(_duration_or_none),
    "failure_action": TEXT,
    "monitor": Field(_duration_or_none),
    "max_failure_ratio": Field(_single),
    "order": TEXT,
}
RESTART: Table = {
    "condition": TEXT,
    "delay": Field(_duration),
    "max_attempts": Field(_integer, zero=True),
    "window": Field(_duration),
}
PREFERENCE: Table = {"spread": TEXT}
PLACEMENT: Table = {
    "constraints": STRINGS,
    "preferences": Field(_records(PREFERENCE)),
    "max_replicas_per_node": INTEGER,
}
DEPLOY: Table = {
    "mode": TEXT,
    "replicas": Field(_integer, zero=True),
    "labels": MAPPING,
    "update_config": Field(_one(UPDATE), zero=True),
    "rollback_config": Field(_one(UPDATE), zero=True),
    "resources": Field(_one(RESOURCES)),
    "restart_policy": Field(_one(RESTART), zero=True),
    "placement": Field(_one(PLACEMENT)),
    "endpoint_mode": TEXT,
}
SERVICE: Table = {
    "annotations": MAPPING,
    "attach": Field(truth, zero=True),
    "blkio_config": ANY,
    "build": Field(_one(BUILD)),
    "cap_add": STRINGS,
    "cap_drop": STRINGS,
    "cgroup": TEXT,
    "cgroupns_mode": TEXT,
    "cgroup_parent": TEXT,
    "command": STRINGS,
    "configs": Field(_records(FILE_REFERENCE)),
    "container_name": TEXT,
    **_all(ANY, "cpu_count cpu_percent cpu_period cpu_quota cpu_rt_period cpu_rt_runtime"),
    "cpu_shares": ANY,
    "cpus": TEXT,
    "cpuset": TEXT,
    "credential_spec": Field(_one(CREDENTIAL_SPEC)),
    "depends_on": Field(_depends_on),
    "deploy": Field(_one(DEPLOY)),
    "develop": ANY,
    "device_cgroup_rules": STRINGS,
    "devices": Field(_devices),
    "dns": STRINGS,
    "dns_opt": STRINGS,
    "dns_search": STRINGS,
    "dockerfile": ANY,
    "domainname": TEXT,
    "entrypoint": STRINGS,
    "environment": Field(_variables),
    "env_file": Field(_env_file),
    "expose": STRINGS,
    "external_links": STRINGS,
    "extra_hosts": STRINGS,
    "gpus": Field(_records(DEVICE)),
    "group_add": STRINGS,
    "hostname": TEXT,
    "healthcheck": Field(_one(HEALTHCHECK), zero=True),
    "image": TEXT,
    "init": Field(truth, zero=True),
    "ipc": TEXT,
    "isolation": TEXT,
    "labels": MAPPING,
    "links": STRINGS,
    "log_driver": ANY,
    "log_opt": ANY,
    "logging": Field(_one(LOGGING), zero=True),
    "mac_address": TEXT,
    "mem_limit": Field(_size),
    "mem_reservation": Field(_size),
    "mem_swappiness": Field(_integer, zero=True),
    "memswap_limit": Field(_size_or_unlimited),
    "models": ANY,
    "net": ANY,
    "network_mode": TEXT,
    "networks": Field(_named(SERVICE_NETWORK)),
    "oom_kill_disable": TRUTH,
    "oom_score_adj": Field(_integer, beyond=True),
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
    "restart": TEXT,
    "runtime": TEXT,
    "scale": Field(_integer, zero=True),
    "secrets": Field(_records(FILE_REFERENCE)),
    "security_opt": Field(_written_strings),
    "shm_size": TEXT,
    "stdin_open": TRUTH,
    "stop_grace_period": Field(_duration),
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
    "volumes": Field(_records(VOLUME_MOUNT)),
    "volumes_from": ANY,
    "working_dir": TEXT,
}
IPAM_CONFIG: Table = {**_texts("subnet ip_range gateway"), "aux_addresses": MAPPING}
IPAM: Table = {"driver": TEXT, "config": Field(_records(IPAM_CONFIG)), "options": MAPPING}
NETWORK: Table = {
    "name": TEXT,
    "driver": TEXT,
    "driver_opts": MAPPING,
    "ipam": Field(_one(IPAM)),
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
_TOPOLOGIES = Field(_records({"segments": Field(_segments)}))
CLUSTER_SPEC: Table = {
    "group": TEXT,
    "access_mode": ANY,
    "accessibility_requirements": Field(
        _one({"requisite": _TOPOLOGIES, "preferred": _TOPOLOGIES}), zero=True
    ),
    "capacity_range": Field(
        _one({"required_bytes": Field(_size), "limit_bytes": Field(_size)}), zero=True
    ),
    "secrets": ANY,
    "availability": TEXT,
}
CLUSTER_VOLUME: Table = {"x-cluster-spec": Field(_one(CLUSTER_SPEC), zero=True)}
SECRET: Table = {
    **_texts("name file environment content"),
    "external": TRUTH,
    "labels": MAPPING,
    "driver": TEXT,
    "driver_opts": MAPPING,
    "template_driver": TEXT,
}
CONFIG: Table = {key: field for key, field in SECRET.items() if not key.startswith("driver")}
