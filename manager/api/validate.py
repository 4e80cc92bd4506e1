"""What a service's spec may say. Checked once, here; inside the manager specs are right.

Every rule names the field as the user knows it (compose's word where there is one) and says what to
write instead. Nothing is looked up here but the spec itself: what a spec refers to is the matter of
manager/api/references.py. Sources of the rules: SwarmKit's controlapi validation, Docker's daemon.
"""

from __future__ import annotations

import math

from msgspec import structs

from manager.api.names import check_labels, check_service_name
from manager.api.problems import Finder
from manager.api.validate_container import check_container
from manager.api.validate_devices import check_devices
from manager.api.validate_jobs import check_job, check_priority
from manager.api.validate_placement import check_placement
from swarm.quantities import format_bytes, format_cpus
from swarm.v1 import (
    EndpointSpec,
    GenericResource,
    PortConfig,
    Replicated,
    ReplicatedJob,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
)

# More than any cluster runs; a slip of the keyboard must not fill the store.
REPLICAS_MAX = 500_000
CPU_NANO_MIN = 1_000_000  # 0.001 CPU, as SwarmKit
MEMORY_BYTES_MIN = 4 * 1024 * 1024  # as SwarmKit: no container starts with less
CONDITIONS = ("none", "on-failure", "any")
ORDERS = ("stop-first", "start-first")
DEPENDENCY_CONDITIONS = (
    "service_started",
    "service_healthy",
    "service_completed_successfully",
)
PROCESS_RUNTIME = "process"


def complete(spec: ServiceSpec) -> ServiceSpec:
    """The spec with the defaults filled in that Docker shows as given: one replica; and an
    affinity's weight.
    """
    mode = spec.mode or ServiceMode(replicated=Replicated())
    if mode.replicated is not None and mode.replicated.replicas is None:
        mode = structs.replace(mode, replicated=Replicated(replicas=1))
    return structs.replace(spec, mode=mode, task=_complete_task(spec.task or TaskSpec()))


def _complete_task(task: TaskSpec) -> TaskSpec:
    """With the weight of affinities that have none."""
    placement = task.placement
    if placement is None or all(p.weight or not p.affinity for p in placement.preferences):
        return task
    preferences = tuple(
        structs.replace(p, weight=p.weight or 1) if p.affinity else p for p in placement.preferences
    )
    return structs.replace(task, placement=structs.replace(placement, preferences=preferences))


def check_service(find: Finder, spec: ServiceSpec) -> None:
    """Notes everything that is wrong with a completed spec."""
    check_service_name(find, spec.name)
    check_labels(find, spec.labels)
    assert spec.mode is not None and spec.task is not None
    _check_mode(find, spec.mode)
    check_job(find, spec)
    check_priority(find, spec)
    is_job = mode_name(spec.mode) in ("replicated-job", "global-job")
    _check_task(find, spec.task, spec.mode, is_job=is_job)
    if spec.update is not None:
        _check_update(find.at("update_config"), spec.update, ("pause", "continue", "rollback"))
    if spec.rollback is not None:
        _check_update(find.at("rollback_config"), spec.rollback, ("pause", "continue"))
    if is_job and (spec.update is not None or spec.rollback is not None):
        find.add("update_config", "a job is not updated in steps; leave update and rollback out")
    if spec.endpoint is not None:
        _check_endpoint(find, spec.endpoint)
        if is_job and any((p.publish_mode or "ingress") == "ingress" for p in spec.endpoint.ports):
            find.add("ports", "a job cannot publish ports in mode ingress; use mode host")
        _check_network_mode(find, spec)
    for i, dependency in enumerate(spec.depends_on):
        if not dependency.service:
            find.add(f"depends_on[{i}]", "the other service's name is missing")
        elif dependency.service == spec.name:
            find.add(f"depends_on[{i}]", "a service cannot wait for itself")
        find.one_of(f"depends_on[{i}].condition", dependency.condition, DEPENDENCY_CONDITIONS)


def warnings_of(spec: ServiceSpec) -> tuple[str, ...]:
    """What is allowed and probably not meant."""
    out = []
    ports = spec.endpoint.ports if spec.endpoint else ()
    fixed = [p for p in ports if p.publish_mode == "host" and p.published_port]
    if fixed and spec.update is not None and spec.update.order == "start-first":
        per_node = spec.mode is not None and spec.mode.global_service is not None
        where = "" if per_node else " where no other node is free for the new one"
        out.append(
            f'service "{spec.name}": host port {fixed[0].published_port} cannot be held by the old '
            f"and the new task of a node at once, so start-first stops the old one first{where}"
        )
    return tuple(out)


def mode_name(mode: ServiceMode) -> str:
    """replicated, global, replicated-job or global-job; empty: none is set."""
    for name, value in (
        ("replicated", mode.replicated),
        ("global", mode.global_service),
        ("replicated-job", mode.replicated_job),
        ("global-job", mode.global_job),
    ):
        if value is not None:
            return name
    return ""


# ---------------------------------------------------------------- mode, update, restart


def _check_mode(find: Finder, mode: ServiceMode) -> None:
    count = sum(
        m is not None
        for m in (mode.replicated, mode.global_service, mode.replicated_job, mode.global_job)
    )
    if count != 1:
        find.add(
            "mode", "exactly one of replicated, global, replicated-job and global-job must be set"
        )
    if mode.replicated is not None:
        _check_count(find, "replicas", mode.replicated.replicas)
    if mode.replicated_job is not None:
        _check_job(find, mode.replicated_job)


def _check_job(find: Finder, job: ReplicatedJob) -> None:
    _check_count(find, "max_concurrent", job.max_concurrent)
    _check_count(find, "total_completions", job.total_completions)
    if job.max_concurrent == 0:
        find.add("max_concurrent", "a job must run at least 1 task at once; leave it out for all")


def _check_count(find: Finder, field: str, count: int | None) -> None:
    find.not_negative(field, count, "a number of tasks")
    if count is not None and count > REPLICAS_MAX:
        find.add(field, f"{count} tasks are more than the limit of {REPLICAS_MAX} for one service")


def _check_update(find: Finder, config: UpdateConfig, actions: tuple[str, ...]) -> None:
    find.not_negative("parallelism", config.parallelism, "a number of tasks")
    find.not_negative("delay", config.delay_ns, "a duration")
    find.not_negative("monitor", config.monitor_ns, "a duration")
    find.not_negative("deadline", config.deadline_ns, "a duration")
    find.one_of("failure_action", config.failure_action, actions)
    find.one_of("order", config.order, ORDERS)
    ratio = config.max_failure_ratio
    if math.isnan(ratio) or not 0 <= ratio <= 1:
        find.add("max_failure_ratio", f"{ratio:g} is not a share from 0 to 1")


def _check_restart(find: Finder, restart: RestartPolicy, *, is_job: bool) -> None:
    find.one_of("condition", restart.condition, CONDITIONS)
    if is_job and restart.condition == "any":
        find.add("condition", "a job runs to completion; use none or on-failure")
    find.not_negative("delay", restart.delay_ns, "a duration")
    find.not_negative("window", restart.window_ns, "a duration")
    find.not_negative("max_delay", restart.max_delay_ns, "a duration")


# ---------------------------------------------------------------- task template


def _check_task(find: Finder, task: TaskSpec, mode: ServiceMode, *, is_job: bool) -> None:
    container = task.container
    image = container.image if container is not None else ""
    process = task.runtime == PROCESS_RUNTIME
    if not image and not process:
        find.add("image", "no image is given; name one, or set runtime: process for host processes")
    if process and (container is None or not (container.command or container.args)):
        find.add("command", "runtime: process needs a command, as there is no image to have one")
    if task.docker_runtime not in ("", "container"):
        find.add(
            "docker_runtime",
            f"{task.docker_runtime!r} tasks are not offered; only containers and processes are",
        )
    if container is not None:
        check_container(find, container)
    if task.resources is not None:
        _check_resources(find, task.resources)
    if task.restart is not None:
        _check_restart(find.at("restart_policy"), task.restart, is_job=is_job)
    if task.placement is not None:
        check_placement(find.at("placement"), task.placement, mode)
    targets = [n.target for n in task.networks]
    for i, target in enumerate(targets):
        if not target:
            find.add(f"networks[{i}]", "the network's name is missing")
        elif target in targets[:i]:
            find.add(f"networks[{i}]", f"network {target!r} is named twice")


def _check_resources(find: Finder, resources: ResourceRequirements) -> None:
    limits, reservations = resources.limits, resources.reservations
    if limits is not None:
        at = find.at("limits")
        _check_amounts(at, limits)
        if limits.generic or limits.devices:
            at.add("devices", "devices and generic resources are reserved, not limited")
    if reservations is not None:
        at = find.at("reservations")
        _check_amounts(at, reservations)
        _check_generic(at, reservations.generic)
        check_devices(at, reservations)
    if limits is not None and reservations is not None:
        _check_within(find, limits, reservations)
    if resources.memory_swappiness is not None and not -1 <= resources.memory_swappiness <= 100:
        find.add("memory_swappiness", f"{resources.memory_swappiness} is not from -1 to 100")
    if resources.swap_bytes is not None and resources.swap_bytes < -1:
        find.add("memory_swap", f"{resources.swap_bytes} is not an amount; -1 means no limit")


def _check_amounts(find: Finder, amounts: Resources) -> None:
    if amounts.cpu_nano and amounts.cpu_nano < CPU_NANO_MIN:
        find.add("cpus", f"{format_cpus(amounts.cpu_nano)} is too little; at least 0.001 is needed")
    if amounts.memory_bytes and amounts.memory_bytes < MEMORY_BYTES_MIN:
        find.add(
            "memory",
            f"{format_bytes(amounts.memory_bytes)} is too little; at least 4 MiB is needed",
        )
    find.not_negative("pids", amounts.pids, "a number of processes")


def _check_within(find: Finder, limits: Resources, reservations: Resources) -> None:
    if limits.cpu_nano and reservations.cpu_nano > limits.cpu_nano:
        find.add(
            "reservations.cpus",
            f"{format_cpus(reservations.cpu_nano)} is more than limits.cpus "
            f"({format_cpus(limits.cpu_nano)})",
        )
    if limits.memory_bytes and reservations.memory_bytes > limits.memory_bytes:
        find.add(
            "reservations.memory",
            f"{format_bytes(reservations.memory_bytes)} is more than limits.memory "
            f"({format_bytes(limits.memory_bytes)})",
        )
    if limits.pids and reservations.pids > limits.pids:
        find.add(
            "reservations.pids", f"{reservations.pids} is more than limits.pids ({limits.pids})"
        )


def _check_generic(find: Finder, generic: tuple[GenericResource, ...]) -> None:
    for i, resource in enumerate(generic):
        where = f"generic_resources[{i}]"
        if not resource.kind:
            find.add(where, "the kind is missing; write kind=count")
        elif resource.name:
            find.add(where, f"one {resource.kind} cannot be asked for by name; write a count")
        elif resource.count is not None and resource.count < 1:
            find.add(where, f"{resource.count} of {resource.kind!r} is no reservation; at least 1")
        if resource.kind and resource.kind in [r.kind for r in generic[:i]]:
            find.add(where, f"{resource.kind!r} is reserved twice; add the counts up")


# ---------------------------------------------------------------- ports


def _check_endpoint(find: Finder, endpoint: EndpointSpec) -> None:
    find.one_of("endpoint_mode", endpoint.mode, ("vip", "dnsrr"))
    seen: dict[tuple[str, int], dict[str, int]] = {}
    for i, port in enumerate(endpoint.ports):
        at = find.at(f"ports[{i}]")
        _check_port(at, port)
        if endpoint.mode == "dnsrr" and (port.publish_mode or "ingress") == "ingress":
            at.add("mode", "endpoint_mode dnsrr has no ingress ports; use mode: host")
        if not port.published_port:
            continue
        protocol = port.protocol or "tcp"
        # Two host ports differ by their address; an ingress port is taken on every address.
        address = port.host_ip if port.publish_mode == "host" else ""
        holders = seen.setdefault((protocol, port.published_port), {})
        # A port of all addresses and one of an address cannot be held beside each other.
        others = holders.values() if not address else (holders.get(a) for a in ("", address))
        other = next((i for i in others if i is not None), None)
        if other is not None:
            at.add(
                "published",
                f"port {port.published_port}/{protocol} is published twice (also ports[{other}])",
            )
        holders.setdefault(address, i)


def _check_port(find: Finder, port: PortConfig) -> None:
    find.one_of("protocol", port.protocol, ("tcp", "udp", "sctp"))
    find.one_of("mode", port.publish_mode, ("ingress", "host"))
    if not 1 <= port.target_port <= 65535:
        find.add("target", f"{port.target_port} is not a port; write 1 to 65535")
    if port.published_port > 65535:
        find.add(
            "published",
            f"{port.published_port} is not a port; write 1 to 65535, or 0 to have one chosen",
        )
    if port.protocol == "sctp" and port.publish_mode != "host":
        find.add("protocol", "sctp cannot be balanced over nodes; use mode: host")
    if port.host_ip and port.publish_mode != "host":
        find.add("host_ip", "an ingress port listens on every node; an address needs mode: host")


def _check_network_mode(find: Finder, spec: ServiceSpec) -> None:
    container = spec.task.container if spec.task else None
    ports = spec.endpoint.ports if spec.endpoint else ()
    if container is None or not ports:
        return
    if container.network_mode == "none":
        find.add("ports", "a task with network_mode: none has no network to be reached on")
    if container.network_mode == "host":
        for i, port in enumerate(ports):
            same = port.published_port == port.target_port
            if same and (port.publish_mode or "ingress") == "ingress":
                find.add(
                    f"ports[{i}].published",
                    f"with network_mode: host the task itself listens on port {port.target_port} "
                    "of its node; publish another port, or none",
                )
