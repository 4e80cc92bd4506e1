"""The flags of `service create` and `service update`, and what they make of a ServiceSpec.

Two tables own the whole matter, and cli/service_options.py makes click's options of them.
`SCALARS`: a flag, the path it sets, and its type. `LISTS`: a flag that repeats, how an entry is
parsed, its key, and the path it stands at. What does not fit is in `_edit_special`. All of it is
pure; names of secrets, configs and networks were looked up before (`Resolved`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import msgspec

from cli import placement_flags as placement
from cli import service_values as values
from cli.gpu_flags import edit_gpus
from cli.options import BYTES, CPUS, DURATION, key_values
from cli.spec_paths import at, put
from swarm.errors import NotFound
from swarm.v1 import (
    ContainerSpec,
    Global,
    GlobalJob,
    HealthConfig,
    PortConfig,
    Replicated,
    ReplicatedJob,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
)

__all__ = [
    "COUNT",
    "LISTS",
    "MAPS",
    "SCALARS",
    "Listed",
    "Resolved",
    "Scalar",
    "edit",
    "new_mode",
    "references",
]

# Is told, in a sentence each, what was to be removed and is not there.
Missed = Callable[[str], None]
COUNT = click.IntRange(min=0)
_RATIO = click.FloatRange(0, 1)
_ON_FAILURE = click.Choice(["pause", "continue", "rollback"])
_ON_ROLLBACK_FAILURE = click.Choice(["pause", "continue"])
_ORDER = click.Choice(["start-first", "stop-first"])
_CONTAINER = "task.container."
_LIMITS, _RESERVED = "task.resources.limits.", "task.resources.reservations."
_HEALTH, _RESTART = _CONTAINER + "healthcheck.", "task.restart."


@dataclass(frozen=True, slots=True)
class Scalar:
    """A flag with one value."""

    flag: str
    path: str
    type: Any
    help: str
    metavar: str | None = None

    @property
    def name(self) -> str:
        return self.flag.replace("-", "_")


SCALARS: tuple[Scalar, ...] = (
    Scalar("hostname", _CONTAINER + "hostname", str, "Hostname inside the task."),
    Scalar("user", _CONTAINER + "user", str, "User: name|uid[:group|gid]."),
    Scalar("workdir", _CONTAINER + "dir", str, "Working directory."),
    Scalar("init", _CONTAINER + "init", bool, "Run an init as process 1."),
    Scalar("tty", _CONTAINER + "tty", bool, "Give the task a terminal."),
    Scalar("read-only", _CONTAINER + "read_only", bool, "Root file system is read-only."),
    Scalar("stop-signal", _CONTAINER + "stop_signal", str, "Signal that asks the task to end."),
    Scalar(
        "stop-grace-period",
        _CONTAINER + "stop_grace_period_ns",
        DURATION,
        "Time from the stop signal to the kill (10s).",
    ),
    Scalar(
        "oom-score-adj",
        _CONTAINER + "oom_score_adj",
        click.IntRange(-1000, 1000),
        "How readily the kernel kills it when memory is short.",
    ),
    Scalar("isolation", _CONTAINER + "isolation", str, "Kept for read-back; Windows only."),
    Scalar("privileged", _CONTAINER + "privileged", bool, "All of the host's devices and rights."),
    Scalar("shm-size", _CONTAINER + "shm_size_bytes", BYTES, "Size of /dev/shm."),
    Scalar(
        "credential-spec",
        _CONTAINER + "privileges.credential_spec",
        values.CREDENTIAL_SPEC,
        "Windows credentials: config://NAME, file://PATH or registry://KEY.",
    ),
    Scalar("memory-swap", "task.resources.swap_bytes", values.SWAP, "Swap beside memory; -1: all."),
    Scalar(
        "memory-swappiness",
        "task.resources.memory_swappiness",
        click.IntRange(-1, 100),
        "How readily memory is swapped; -1: the engine's default.",
    ),
    Scalar("limit-cpu", _LIMITS + "cpu_nano", CPUS, "Most CPUs a task gets."),
    Scalar("limit-memory", _LIMITS + "memory_bytes", BYTES, "Most memory a task gets."),
    Scalar("limit-pids", _LIMITS + "pids", COUNT, "Most processes a task may have."),
    Scalar("reserve-cpu", _RESERVED + "cpu_nano", CPUS, "CPUs set aside for a task."),
    Scalar("reserve-memory", _RESERVED + "memory_bytes", BYTES, "Memory set aside for a task."),
    Scalar("reserve-pids", _RESERVED + "pids", COUNT, "Processes set aside for a task."),
    Scalar(
        "restart-condition",
        _RESTART + "condition",
        click.Choice(["none", "on-failure", "any"]),
        "When an ended task is replaced (any).",
    ),
    Scalar("restart-delay", _RESTART + "delay_ns", DURATION, "Time before it is (5s)."),
    Scalar("restart-max-attempts", _RESTART + "max_attempts", COUNT, "How often; 0: no limit."),
    Scalar(
        "restart-max-delay",
        _RESTART + "max_delay_ns",
        DURATION,
        "Longest time between crashes; it doubles with each (5m).",
    ),
    Scalar("restart-window", _RESTART + "window_ns", DURATION, "Only restarts this recent count."),
    Scalar(
        "replicas-max-per-node",
        "task.placement.max_replicas",
        COUNT,
        "Most tasks on one node; 0: no limit.",
    ),
    Scalar(
        "placement-strategy",
        "task.placement.strategy",
        placement.STRATEGY,
        "spread tasks over nodes or binpack them on few (the cluster's default).",
    ),
    Scalar("update-parallelism", "update.parallelism", COUNT, "Tasks at once; 0: all (1)."),
    Scalar("update-delay", "update.delay_ns", DURATION, "Pause between batches (0s)."),
    Scalar("update-monitor", "update.monitor_ns", DURATION, "How long a new task is watched (5s)."),
    Scalar("update-failure-action", "update.failure_action", _ON_FAILURE, "On failure (pause)."),
    Scalar("update-max-failure-ratio", "update.max_failure_ratio", _RATIO, "Failures put up with."),
    Scalar("update-order", "update.order", _ORDER, "Which comes first (stop-first)."),
    Scalar(
        "update-deadline",
        "update.deadline_ns",
        DURATION,
        "Failed after so long without progress; 0: never (10m).",
    ),
    Scalar("rollback-parallelism", "rollback.parallelism", COUNT, "As for updates."),
    Scalar("rollback-delay", "rollback.delay_ns", DURATION, "As for updates."),
    Scalar("rollback-monitor", "rollback.monitor_ns", DURATION, "As for updates."),
    Scalar(
        "rollback-failure-action",
        "rollback.failure_action",
        _ON_ROLLBACK_FAILURE,
        "On failure (pause).",
    ),
    Scalar("rollback-max-failure-ratio", "rollback.max_failure_ratio", _RATIO, "As for updates."),
    Scalar("rollback-order", "rollback.order", _ORDER, "As for updates."),
    Scalar("rollback-deadline", "rollback.deadline_ns", DURATION, "As for updates."),
    Scalar("health-interval", _HEALTH + "interval_ns", DURATION, "Time between checks (30s)."),
    Scalar("health-timeout", _HEALTH + "timeout_ns", DURATION, "Time a check may take (30s)."),
    Scalar("health-retries", _HEALTH + "retries", COUNT, "Failures that mean unhealthy (3)."),
    Scalar("health-start-period", _HEALTH + "start_period_ns", DURATION, "Time to get started."),
    Scalar(
        "health-start-interval",
        _HEALTH + "start_interval_ns",
        DURATION,
        "Time between checks while it starts (5s).",
    ),
    Scalar("log-driver", "task.log_driver.name", str, "Log driver."),
    Scalar(
        "endpoint-mode",
        "endpoint.mode",
        click.Choice(["vip", "dnsrr"]),
        "How the service's name resolves (vip).",
    ),
    Scalar("runtime", "task.runtime", str, "process, or a runtime of the engine."),
    Scalar(
        "priority",
        "priority",
        click.IntRange(-1000, 1000),
        "Who is placed first, and may take the place of lower ones (0).",
    ),
)


# ------------------------------------------------------------------ flags that repeat


@dataclass(frozen=True, slots=True)
class Listed:
    """A flag that repeats. `parse` makes entries of one text; `key` tells which entry another
    replaces; `rm_key` what `--…-rm` names (by default the key).
    """

    flag: str
    path: str
    parse: Callable[[str], Sequence[Any]]
    key: Callable[[Any], Any]
    help: str
    metavar: str
    rm_key: Callable[[str], Any] = str
    # Short form of create's flag.
    short: str = ""
    # Whether `--…-rm` of what is not there is an error, as Docker has it for this one.
    strict: bool = False

    @property
    def name(self) -> str:
        return self.flag.replace("-", "_")


@dataclass(frozen=True, slots=True)
class Resolved:
    """Ids by name of what the flags refer to, and names by id of networks."""

    secrets: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict)


def _identity(value: Any) -> Any:
    return value


def _one(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: (parse(text),)


def _word(text: str) -> tuple[str]:
    if not text:
        raise click.BadParameter("an empty value.")
    return (text,)


def _port_key(port: PortConfig) -> tuple[int, str]:
    return (port.target_port, port.protocol or "tcp")


def _port_rm(text: str) -> tuple[int, str]:
    return _port_key(values.ports(text, option="--publish-rm")[0])


def _capability(text: str) -> tuple[str]:
    name = text.upper()
    if name == "ALL" or name.startswith("CAP_"):
        return (name,)
    return (f"CAP_{name}",)


LISTS: tuple[Listed, ...] = (
    Listed(
        "publish",
        "endpoint.ports",
        values.ports,
        lambda port: (port.published_port, *_port_key(port)),
        "Publish a port: 8080:80, or published=8080,target=80,mode=host.",
        "PORT",
        _port_rm,
        "-p",
    ),
    Listed(
        "mount",
        _CONTAINER + "mounts",
        _one(values.mount),
        lambda mount: mount.target,
        "Mount: type=volume,source=data,target=/data.",
        "MOUNT",
    ),
    Listed(
        "secret",
        _CONTAINER + "secrets",
        _one(values.secret_reference),
        lambda reference: (reference.secret_name, reference.file and reference.file.name),
        "Secret: NAME, or source=NAME,target=FILE,mode=0400.",
        "SECRET",
    ),
    Listed(
        "config",
        _CONTAINER + "configs",
        _one(values.config_reference),
        lambda reference: (reference.config_name, reference.file and reference.file.name),
        "Config: NAME, or source=NAME,target=FILE,mode=0444.",
        "CONFIG",
    ),
    Listed(
        "network",
        "task.networks",
        _one(values.network),
        lambda network: network.target,
        "Network: NAME, or name=NAME,alias=ALIAS.",
        "NETWORK",
    ),
    Listed(
        "constraint",
        "task.placement.constraints",
        placement.constraint,
        placement.squeezed,
        "Where tasks may run: node.labels.zone==a, 'node.gpu.memory >= 40GiB'.",
        "EXPRESSION",
        placement.squeezed,
    ),
    Listed(
        "placement-pref",
        "task.placement.preferences",
        _one(placement.preference),
        placement.preference_key,
        "Where they run rather: spread=ATTRIBUTE or affinity=EXPRESSION,weight=N.",
        "PREFERENCE",
        lambda text: placement.preference_key(placement.preference(text)),
    ),
    Listed(
        "generic-resource",
        _RESERVED + "generic",
        lambda text: values.generic_resources([text], option="--generic-resource"),
        lambda resource: (resource.kind, resource.name),
        "Pieces set aside for a task: gpu=2.",
        "KIND=VALUE",
        strict=True,
    ),
    Listed(
        "device",
        _CONTAINER + "devices",
        _one(values.device),
        lambda device: device.target,
        "Device of the node: /dev/x[:/dev/y[:rwm]].",
        "DEVICE",
    ),
    Listed(
        "host",
        _CONTAINER + "hosts",
        _one(values.extra_host),
        _identity,
        "Line for /etc/hosts.",
        "NAME:IP",
        values.host_to_remove,
    ),
    Listed("dns", _CONTAINER + "dns.nameservers", _word, _identity, "DNS server.", "IP"),
    Listed("dns-option", _CONTAINER + "dns.options", _word, _identity, "DNS option.", "OPTION"),
    Listed("dns-search", _CONTAINER + "dns.search", _word, _identity, "DNS domain.", "DOMAIN"),
    Listed("group", _CONTAINER + "groups", _word, _identity, "Supplementary group.", "GROUP"),
    Listed(
        "ulimit",
        _CONTAINER + "ulimits",
        _one(values.ulimit),
        lambda limit: limit.name,
        "Limit: nofile=1024:2048.",
        "ULIMIT",
    ),
)
MAPS: tuple[tuple[str, str, str, str], ...] = (
    ("label", "labels", "Label of the service.", "-l"),
    ("container-label", _CONTAINER + "labels", "Label of its containers.", ""),
    ("sysctl", _CONTAINER + "sysctls", "Kernel parameter.", ""),
)
# Matches `--…-rm` for entries whose key is more than what is named.
_RM: dict[str, Callable[[Any, Any], bool]] = {
    "publish": lambda port, key: _port_key(port) == key,
    "secret": lambda reference, key: key in (reference.secret_name, reference.secret_id),
    "config": lambda reference, key: key in (reference.config_name, reference.config_id),
    "generic-resource": lambda resource, key: resource.kind == key,
    # A line of /etc/hosts against (name, address or nothing).
    "host": lambda line, key: key[0] in line.split()[1:] and key[1] in ("", line.partition(" ")[0]),
}


# ------------------------------------------------------------------ what they do


def references(flags: Mapping[str, Any]) -> tuple[set[str], set[str], set[str]]:
    """Names of secrets, configs and networks that the flags add or remove."""
    networks = {network.target for network in flags["network_add"]} | set(
        flags.get("network_rm") or ()
    )
    return (
        {reference.secret_name for reference in flags["secret_add"]},
        {reference.config_name for reference in flags["config_add"]},
        networks,
    )


def new_mode(flags: Mapping[str, Any]) -> ServiceMode:
    """The mode of a new service. Raises UsageError for numbers that do not fit it."""
    mode, replicas, concurrent = flags["mode"], flags["replicas"], flags["max_concurrent"]
    if replicas is not None and mode not in ("replicated", "replicated-job"):
        raise click.UsageError(
            "--replicas can only be used with mode replicated or replicated-job."
        )
    if concurrent is not None and mode != "replicated-job":
        raise click.UsageError("--max-concurrent can only be used with mode replicated-job.")
    match mode:
        case "global":
            return ServiceMode(global_service=Global())
        case "global-job":
            return ServiceMode(global_job=GlobalJob())
        case "replicated-job":
            most = replicas if concurrent is None else concurrent
            return ServiceMode(
                replicated_job=ReplicatedJob(max_concurrent=most, total_completions=replicas)
            )
    return ServiceMode(replicated=Replicated(replicas=replicas))


def edit(
    spec: ServiceSpec,
    flags: Mapping[str, Any],
    resolved: Resolved,
    environment: Mapping[str, str],
    missed: Missed = lambda text: None,
) -> ServiceSpec:
    """The spec with the flags applied; flags that were not given leave it as it is. A `--…-rm` of
    what is not there changes nothing, as in Docker, and `missed` is told. Raises UsageError for
    flags that contradict each other.
    """
    if spec.task is None or spec.task.container is None:
        task = spec.task or TaskSpec()
        container = task.container or ContainerSpec()
        spec = put(spec, "task", msgspec.structs.replace(task, container=container))
    for scalar in SCALARS:
        value = flags[scalar.name]
        if value is not None:
            spec = put(spec, scalar.path, value)
    for listed in LISTS:
        spec = _edit_list(spec, listed, flags, resolved, missed)
    for flag, path, _, _short in MAPS:
        spec = _edit_map(spec, flag, path, flags, missed)
    spec = edit_gpus(_edit_env(spec, flags, environment, missed), flags)
    return _edit_special(spec, flags)


def _edit_list(
    spec: ServiceSpec,
    listed: Listed,
    flags: Mapping[str, Any],
    resolved: Resolved,
    missed: Missed,
) -> ServiceSpec:
    added = [_fill_in(listed.flag, entry, resolved) for entry in flags[f"{listed.name}_add"]]
    removed = flags.get(f"{listed.name}_rm") or ()
    if not added and not removed:
        return spec
    entries = list(at(spec, listed.path))
    for text in removed:
        key = resolved.networks.get(text, text) if listed.flag == "network" else text
        key = listed.rm_key(key)
        kept = [entry for entry in entries if not _named(listed, entry, key)]
        if len(kept) == len(entries):
            what = f"--{listed.flag}-rm {text}"
            if listed.strict:
                raise NotFound(f"{what}: {_absent(listed.flag)}")
            missed(f"{what}: {_absent(listed.flag)}")
        entries = kept
    keys = [listed.key(entry) for entry in added]
    if len(set(keys)) < len(keys):
        double = next(key for key in keys if keys.count(key) > 1)
        raise click.UsageError(f"--{listed.flag}: {double!r} is given twice.")
    entries = [entry for entry in entries if listed.key(entry) not in keys] + added
    return put(spec, listed.path, tuple(entries))


def _named(listed: Listed, entry: Any, key: Any) -> bool:
    """Whether `--…-rm` with this key means the entry."""
    matches = _RM.get(listed.flag)
    return matches(entry, key) if matches is not None else bool(listed.key(entry) == key)


def _fill_in(flag: str, entry: Any, resolved: Resolved) -> Any:
    match flag:
        case "secret":
            return msgspec.structs.replace(entry, secret_id=resolved.secrets[entry.secret_name])
        case "config":
            return msgspec.structs.replace(entry, config_id=resolved.configs[entry.config_name])
        case "network":
            return msgspec.structs.replace(entry, target=resolved.networks[entry.target])
    return entry


def _absent(flag: str) -> str:
    return f"the service has no such {flag.replace('-', ' ')}"


def _edit_map(
    spec: ServiceSpec, flag: str, path: str, flags: Mapping[str, Any], missed: Missed
) -> ServiceSpec:
    name = flag.replace("-", "_")
    added = key_values(flags[f"{name}_add"], option=f"--{flag}")
    removed = flags.get(f"{name}_rm") or ()
    if not added and not removed:
        return spec
    table = dict(at(spec, path))
    for key in removed:
        if table.pop(key, None) is None:
            missed(f"--{flag}-rm {key}: {_absent(flag)}")
    return put(spec, path, table | added)


def _edit_env(
    spec: ServiceSpec,
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    missed: Missed,
) -> ServiceSpec:
    added = [
        line for path in flags.get("env_file") or () for line in values.env_file(path, environment)
    ]
    added += [values.env_value(text, environment) for text in flags["env_add"]]
    removed = set(flags.get("env_rm") or ())
    if not added and not removed:
        return spec
    table = {text.partition("=")[0]: text for text in at(spec, _CONTAINER + "env")}
    for key in sorted(removed):
        if table.pop(key, None) is None:
            missed(f"--env-rm {key}: the service has no such variable")
    table |= {text.partition("=")[0]: text for text in added}
    return put(spec, _CONTAINER + "env", tuple(table.values()))


def _edit_special(spec: ServiceSpec, flags: Mapping[str, Any]) -> ServiceSpec:
    if flags["entrypoint"] is not None:
        spec = put(spec, _CONTAINER + "command", split_words("--entrypoint", flags["entrypoint"]))
    if flags.get("arguments") is not None:
        spec = put(spec, _CONTAINER + "args", split_words("--args", flags["arguments"]))
    if flags.get("image"):
        spec = put(spec, _CONTAINER + "image", flags["image"])
    if flags.get("force"):
        spec = put(spec, "task.force_update", at(spec, "task.force_update") + 1)
        if spec.job is not None and spec.job.cancelled:
            # Who asks a cancelled job for new tasks wants it to run.
            spec = put(spec, "job.cancelled", False)
    if flags["log_opt"] or flags["log_driver"] is not None:
        # Options of another driver mean nothing to the new one.
        before = {} if flags["log_driver"] is not None else at(spec, "task.log_driver.options")
        options = before | key_values(flags["log_opt"], option="--log-opt")
        spec = put(spec, "task.log_driver.options", options)
    spec = _edit_health(spec, flags)
    return _edit_capabilities(spec, flags)


def _edit_health(spec: ServiceSpec, flags: Mapping[str, Any]) -> ServiceSpec:
    health = [name for name in flags if name.startswith("health_") and flags[name] is not None]
    if flags["no_healthcheck"]:
        if health:
            flag = health[0].replace("_", "-")
            raise click.UsageError(f"--no-healthcheck and --{flag} exclude each other.")
        return put(spec, _CONTAINER + "healthcheck", HealthConfig(test=("NONE",)))
    if flags["health_cmd"] is not None:
        return put(spec, _HEALTH + "test", ("CMD-SHELL", flags["health_cmd"]))
    return spec


def _edit_capabilities(spec: ServiceSpec, flags: Mapping[str, Any]) -> ServiceSpec:
    adding = [_capability(text)[0] for text in flags["cap_add"]]
    dropping = [_capability(text)[0] for text in flags["cap_drop"]]
    both = sorted(set(adding) & set(dropping))
    if both:
        raise click.UsageError(f"{both[0]} is in --cap-add and in --cap-drop.")
    if not adding and not dropping:
        return spec
    # As in Docker: what was dropped and is added, or the other way round, is as the image has it.
    added = set(at(spec, _CONTAINER + "capability_add"))
    dropped = set(at(spec, _CONTAINER + "capability_drop"))
    added, dropped = (
        (added - set(dropping)) | (set(adding) - dropped),
        (dropped - set(adding)) | (set(dropping) - added),
    )
    spec = put(spec, _CONTAINER + "capability_add", tuple(sorted(added)))
    return put(spec, _CONTAINER + "capability_drop", tuple(sorted(dropped)))


def split_words(option: str, text: str) -> tuple[str, ...]:
    """Words of a shell-quoted text. Raises BadParameter."""
    import shlex

    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise values.fail(option, text, f"{str(error).lower()}") from None
