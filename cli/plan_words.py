"""A plan's field paths and values in compose's words.

The manager names what would change as its specs do: `task.container.env[DEBUG]`,
`update.delay_ns`. People write `environment.DEBUG` and `deploy.update_config.delay: 10s`. One table
(`SERVICE`, `OBJECT`) translates: the longest entry that a path begins with gives the compose key,
what is left of the path follows it. Units are told by the field's own ending (`_ns`, `_bytes`,
`_nano`). A path that no entry knows is shown as it came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cli.plan_values import (
    Format,
    claim,
    dependency,
    device,
    file,
    limit,
    mount,
    octal,
    plain,
    port,
    with_unit,
    words,
)
from swarm.v1 import FieldChange, Kind

__all__ = ["Field", "fields", "value"]


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Any = _Absent()


@dataclass(frozen=True, slots=True)
class Field:
    """One field as people read it; None: it was not, or would not be, set."""

    key: str
    before: str | None
    after: str | None


# ------------------------------------------------------------------ the table

Entry = tuple[str, Format | None]


def _table(text: str, **formats: Format) -> dict[str, Entry]:
    """Lines `path compose-key [format]`. `[]` stands for any element, and `*` in the compose key
    for its name.
    """
    found: dict[str, Entry] = {}
    for line in text.split("\n"):
        if words := line.split():
            found[words[0]] = (words[1], formats[words[2]] if len(words) > 2 else None)
    return found


SERVICE = _table(
    """
    task.container.image                  image
    task.container.command                entrypoint words
    task.container.args                   command words
    task.container.env                    environment
    task.container.env[]                  environment.*
    endpoint.ports                        ports
    endpoint.ports[]                      ports[*] port
    endpoint.ports[].target_port          ports[*].target
    endpoint.ports[].published_port       ports[*].published
    endpoint.ports[].publish_mode         ports[*].mode
    mode.replicated.replicas              deploy.replicas
    mode.replicated_job.total_completions deploy.replicas
    mode.replicated_job.max_concurrent    deploy.max_concurrent
    task.container.hostname               hostname
    task.container.dir                    working_dir
    task.container.user                   user
    task.container.groups                 group_add
    task.container.groups[]               group_add.*
    task.container.privileges             privileges
    task.container.privileges.credential_spec credential_spec
    task.container.init                   init
    task.container.stop_signal            stop_signal
    task.container.tty                    tty
    task.container.open_stdin             stdin_open
    task.container.read_only              read_only
    task.container.mounts                 volumes
    task.container.mounts[]               volumes[*] mount
    task.container.mounts[].volume_options.no_copy       volumes[*].volume.nocopy
    task.container.mounts[].volume_options.subpath       volumes[*].volume.subpath
    task.container.mounts[].volume_options               volumes[*].volume
    task.container.mounts[].bind_options                 volumes[*].bind
    task.container.mounts[].tmpfs_options                volumes[*].tmpfs
    task.container.mounts[].tmpfs_options.size_bytes     volumes[*].tmpfs.size
    task.container.mounts[].tmpfs_options.mode           volumes[*].tmpfs.mode octal
    task.container.stop_grace_period_ns   stop_grace_period
    task.container.healthcheck            healthcheck
    task.container.healthcheck.test       healthcheck.test words
    task.container.hosts                  extra_hosts
    task.container.hosts[]                extra_hosts[*]
    task.container.dns.nameservers        dns
    task.container.dns.nameservers[]      dns[*]
    task.container.dns.search             dns_search
    task.container.dns.search[]           dns_search[*]
    task.container.dns.options            dns_opt
    task.container.dns.options[]          dns_opt[*]
    task.container.secrets                secrets
    task.container.secrets[]              secrets[*] file
    task.container.secrets[].secret_name  secrets[*].source
    task.container.secrets[].file.name    secrets[*].target
    task.container.secrets[].file.uid     secrets[*].uid
    task.container.secrets[].file.gid     secrets[*].gid
    task.container.secrets[].file.mode    secrets[*].mode octal
    task.container.configs                configs
    task.container.configs[]              configs[*] file
    task.container.configs[].config_name  configs[*].source
    task.container.configs[].file.name    configs[*].target
    task.container.configs[].file.uid     configs[*].uid
    task.container.configs[].file.gid     configs[*].gid
    task.container.configs[].file.mode    configs[*].mode octal
    task.container.isolation              isolation
    task.container.sysctls                sysctls
    task.container.sysctls[]              sysctls.*
    task.container.capability_add         cap_add
    task.container.capability_add[]       cap_add[*]
    task.container.capability_drop        cap_drop
    task.container.capability_drop[]      cap_drop[*]
    task.container.ulimits                ulimits
    task.container.ulimits[]              ulimits.* limit
    task.container.oom_score_adj          oom_score_adj
    task.container.privileged             privileged
    task.container.devices                devices
    task.container.devices[]              devices[*] device
    task.container.shm_size_bytes         shm_size
    task.container.ipc_mode               ipc
    task.container.pid_mode               pid
    task.container.userns_mode            userns_mode
    task.container.uts_mode               uts
    task.container.cgroupns_mode          cgroup
    task.container.network_mode           network_mode
    task.container.security_opt           security_opt
    task.container.security_opt[]         security_opt[*]
    task.container.cgroup_parent          cgroup_parent
    task.container.domainname             domainname
    task.container.mac_address            mac_address
    task.container.oom_kill_disable       oom_kill_disable
    task.container.pull_policy            pull_policy
    task.container.platform               platform
    task.container.expose                 expose
    task.container.expose[]               expose[*]
    task.container.annotations            annotations
    task.container.annotations[]          annotations.*
    task.container.storage_opt            storage_opt
    task.container.storage_opt[]          storage_opt.*
    task.container.cpuset                 cpuset
    task.container.cpu_shares             cpu_shares
    task.container.memory_swap_bytes      memswap_limit
    task.container.memory_reservation_bytes mem_reservation
    task.container.memory_swappiness      mem_swappiness
    task.container.device_cgroup_rules    device_cgroup_rules
    task.container.device_cgroup_rules[]  device_cgroup_rules[*]
    task.resources                        deploy.resources
    task.resources.limits.generic         deploy.resources.limits.generic_resources
    task.resources.reservations.generic   deploy.resources.reservations.generic_resources
    task.resources.reservations.devices   deploy.resources.reservations.devices
    task.resources.reservations.devices[] deploy.resources.reservations.devices[*] claim
    task.resources.swap_bytes             memswap_limit
    task.resources.memory_swappiness      mem_swappiness
    task.restart                          deploy.restart_policy
    task.placement                        deploy.placement
    task.placement.max_replicas           deploy.placement.max_replicas_per_node
    task.placement.platforms              platform
    task.networks                         networks
    task.networks[]                       networks.*
    task.log_driver                       logging
    task.log_driver.name                  logging.driver
    task.log_driver.options[]             logging.options.*
    task.force_update                     force_update
    task.docker_runtime                   runtime
    task.runtime                          runtime
    priority                              deploy.priority
    job                                   deploy.job
    update                                deploy.update_config
    rollback                              deploy.rollback_config
    endpoint.mode                         deploy.endpoint_mode
    depends_on                            depends_on
    depends_on[]                          depends_on.* dependency
    task.container.labels                 labels
    task.container.labels[]               labels.*
    labels                                deploy.labels
    labels[]                              deploy.labels.*
    """,
    words=words,
    octal=octal,
    port=port,
    mount=mount,
    file=file,
    limit=limit,
    device=device,
    claim=claim,
    dependency=dependency,
)
# Networks, volumes, secrets and configs.
OBJECT = _table(
    """
    labels                 labels
    labels[]               labels.*
    driver.name            driver
    driver.options         driver_opts
    driver.options[]       driver_opts.*
    ipv6                   enable_ipv6
    ipv4                   enable_ipv4
    ipam.driver.name       ipam.driver
    ipam.configs           ipam.config
    ipam.configs[]         ipam.config[*]
    templating             template_driver
    templating.name        template_driver
    data                   content
    """
)
_SECRETS_DIR = "/run/secrets/"
# What a reference leads to, where only that has changed.
_CONTENT = re.compile(r"((secrets|configs)\[.*\])\.(data|secret_id|config_id)")
_MODES = {
    "mode.replicated": "replicated",
    "mode.global_service": "global",
    "mode.replicated_job": "replicated-job",
    "mode.global_job": "global-job",
}


# ------------------------------------------------------------------ fields


def fields(kind: Kind, changes: tuple[FieldChange, ...], *, stack: str = "") -> list[Field]:
    """The changes of one object, in the order of the table: what people look at first stands
    first. Names of the stack's own objects are shown as its files name them: `depends_on.db`, not
    `depends_on.app_db`. A secret's content is not shown, nor what stands for it.
    """
    table = SERVICE if kind is Kind.SERVICE else OBJECT
    order = {pattern: number for number, pattern in enumerate(table)}
    found: list[tuple[int, Field]] = []
    modes: dict[str, str] = {}
    for change in changes:
        before, after = _value(change.before), _value(change.after)
        for path, old, new in _leaves(change.path, before, after):
            mode, _, rest = _mode(path)
            if mode and not rest:
                modes |= {k: mode for k, v in (("before", old), ("after", new)) if v is not ABSENT}
                continue
            if kind is Kind.SECRET and path == "data":
                continue
            pattern, _ = _match(table, path)
            place = order.get(pattern, len(order))
            found.append((place, _field(table, path, old, new, stack)))
    if len(set(modes.values())) == 2:
        found.append((-1, Field("deploy.mode", modes["before"], modes["after"])))
    found.sort(key=lambda pair: pair[0])
    return [field for _, field in found if field.before != field.after]


def value(text: str | None) -> Any:
    """A value of a FieldChange; None where it is not set."""
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError:
        return text


def _value(text: str | None) -> Any:
    return ABSENT if text is None else value(text)


def _mode(path: str) -> tuple[str, str, str]:
    for prefix, name in _MODES.items():
        if path == prefix or path.startswith(prefix + "."):
            return name, prefix, path[len(prefix) :]
    return "", "", path


def _leaves(path: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """A whole message that came, went or changed, as its fields. An element of a list that came or
    went stays whole.
    """
    whole = path.endswith("]") and (before is ABSENT or after is ABSENT)
    if whole:
        yield path, before, after
    elif isinstance(before, dict) or isinstance(after, dict):
        old = before if isinstance(before, dict) else {}
        new = after if isinstance(after, dict) else {}
        if path in _MODES:
            yield path, before, after
        for name in sorted({*old, *new}):
            inner = f"{path}.{name}" if re.fullmatch(r"\w+", name) else f"{path}[{name}]"
            yield from _leaves(inner, old.get(name, ABSENT), new.get(name, ABSENT))
        if not old and not new and path not in _MODES:
            yield path, before, after
    elif before is not after and before != after:
        yield path, before, after


def _field(table: Mapping[str, Entry], path: str, before: Any, after: Any, stack: str) -> Field:
    key, form = _translate(table, path)
    key = re.sub(
        r"^(depends_on\.|networks\.|secrets\[|configs\[)([^\].]*)",
        lambda found: found[1] + _short(found[2], stack),
        key,
    )
    if (match := _CONTENT.fullmatch(key)) and before is not ABSENT and after is not ABSENT:
        # What tells one content from another means nothing to people.
        return Field(match[1], "present content", "new content")
    show = form or plain
    shown = [None if value is ABSENT else show(value) or '""' for value in (before, after)]
    if key.endswith("]") and None in shown and _tells_itself(key, form, shown):
        key = key.partition("[")[0]
    return Field(key, shown[0], shown[1])


def _short(name: str, stack: str) -> str:
    name = name.removeprefix(_SECRETS_DIR)
    return name.removeprefix(f"{stack}_") if stack else name


def _tells_itself(key: str, form: Format | None, shown: list[str | None]) -> bool:
    """Whether an element that came or went is told by its value: `cap_add[X]: X` says it twice."""
    return form in (port, mount, device) or f"[{shown[0] or shown[1]}]" in key


def _match(table: Mapping[str, Entry], path: str) -> tuple[str, list[str]]:
    """The longest entry of the table that the path begins with, and what is left of the path."""
    segments = split(path)
    rest: list[str] = []
    while segments:
        # Elements in brackets match `[]`.
        pattern = "".join("[]" if part.startswith("[") else f".{part}" for part in segments)[1:]
        if pattern in table:
            return pattern, rest
        rest.insert(0, segments.pop())
    return "", rest


def _translate(table: Mapping[str, Entry], path: str) -> tuple[str, Format | None]:
    """The compose key, and how values are shown."""
    pattern, rest = _match(table, path)
    if not pattern:
        return with_unit(path, path, None)
    key, form = table[pattern]
    if "*" in key:
        name = next(part for part in split(path) if part.startswith("["))
        key = key.replace("*", name[1:-1])
    tail = "".join(part if part.startswith("[") else f".{part}" for part in rest)
    return with_unit(key + tail, path, None if rest else form)


def split(path: str) -> list[str]:
    """ "a.b[c.d].e" → ["a", "b", "[c.d]", "e"]: a name in brackets may hold anything."""
    found: list[str] = []
    at = 0
    while at < len(path):
        if path[at] == "[":
            end = re.search(r"\](?=$|[.\[])", path[at:])
            stop = at + end.end() if end else len(path)
            found.append(path[at:stop])
        else:
            stop = at
            while stop < len(path) and path[stop] not in ".[":
                stop += 1
            found.append(path[at:stop])
        at = stop + 1 if stop < len(path) and path[stop] == "." else stop
    return [part for part in found if part]
