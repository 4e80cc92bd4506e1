"""`inspect --pretty`: services and nodes for people, worded and indented as Docker's CLI does."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from cli.jobs import is_job, job_state, queue_of, status_of
from cli.pretty_gpu import gpu_lines
from cli.times import rfc3339
from swarm.errors import Invalid
from swarm.gpus import ask_of
from swarm.quantities import format_bytes, format_cpus, format_duration
from swarm.v1 import (
    ContainerSpec,
    EndpointSpec,
    GetResponse,
    GpuUsage,
    Node,
    NodeRole,
    PortConfig,
    Resources,
    RestartPolicy,
    Service,
    ServiceMode,
    TaskSpec,
    UpdateConfig,
)

__all__ = ["describe_node", "describe_service", "manager_word"]


def _line(title: str, value: object, *, width: int = 16, indent: int = 0) -> str:
    return f"{' ' * indent}{title + ':':<{width - indent}}{value}".rstrip()


def _labels(labels: dict[str, str], title: str = "Labels") -> list[str]:
    if not labels:
        return []
    return [f"{title}:", *(f" {key}={value}" for key, value in sorted(labels.items()))]


def manager_word(node: Node) -> str:
    """Of a manager: Leader, Reachable or Unreachable; Promoting and Demoting while its role
    changes. Empty: a worker.
    """
    wanted = node.spec is not None and node.spec.role is NodeRole.MANAGER
    status = node.manager_status
    if status is None:
        return "Promoting" if wanted else ""
    if not wanted:
        return "Demoting"
    return "Leader" if status.leader else status.reachability.name.capitalize()


def describe_node(answer: GetResponse, gpus: Sequence[GpuUsage] = ()) -> str:
    """A node; `gpus`: what is known of who has its GPUs."""
    node = answer.object.node if answer.object else None
    assert node is not None and node.spec is not None and node.meta is not None
    lines = [_line("ID", node.id, width=24)]
    if node.spec.name:
        lines.append(_line("Name", node.spec.name, width=24))
    lines += _labels(node.spec.labels)
    description, status = node.description, node.status
    lines.append(_line("Hostname", description.hostname if description else "", width=24))
    lines.append(_line("Joined at", rfc3339(node.meta.created_at_ns), width=24))
    if status is not None:
        lines.append("Status:")
        lines.append(_line("State", status.state.name.capitalize(), width=24, indent=1))
        if status.message:
            lines.append(_line("Message", status.message, width=24, indent=1))
        availability = node.spec.availability.name.capitalize()
        lines.append(_line("Availability", availability, width=24, indent=1))
        lines.append(_line("Address", status.addr, width=24, indent=1))
    if manager := node.manager_status:
        lines.append("Manager Status:")
        lines.append(_line("Address", manager.addr, width=24, indent=1))
        reach = manager.reachability.name.capitalize()
        lines.append(_line("Raft Status", reach, width=24, indent=1))
        lines.append(_line("Leader", "Yes" if manager.leader else "No", width=24, indent=1))
        if manager.engine_version:
            lines.append(_line("Store", manager.engine_version, width=24, indent=1))
    if manager_word(node) in ("Promoting", "Demoting"):
        lines.append(_line("Role Change", manager_word(node), width=24))
    if description is None:
        return "\n".join(lines)
    if platform := description.platform:
        lines.append("Platform:")
        lines.append(_line("Operating System", platform.os, width=24, indent=1))
        lines.append(_line("Architecture", platform.architecture, width=24, indent=1))
    if resources := description.resources:
        lines += ["Resources:", *_resources(resources, width=24)]
    if engine := description.engine:
        lines.append(_line("Engine Version", f"{engine.name} {engine.version}".strip(), width=24))
        lines += _labels(engine.labels, "Engine Labels")
    lines.append(_line("Agent Version", description.agent_version, width=24))
    lines.append(_line("Runtimes", ", ".join(description.runtimes), width=24))
    lines += gpu_lines(description.gpus, gpus)
    lines += [f"Warning: {warning}" for warning in description.warnings]
    return "\n".join(lines)


def _resources(resources: Resources, *, width: int) -> list[str]:
    lines = []
    if resources.cpu_nano:
        lines.append(_line("CPUs", format_cpus(resources.cpu_nano), width=width, indent=1))
    if resources.memory_bytes:
        lines.append(_line("Memory", format_bytes(resources.memory_bytes), width=width, indent=1))
    if resources.pids:
        lines.append(_line("PIDs", resources.pids, width=width, indent=1))
    for generic in resources.generic:
        amount = generic.name or generic.count
        lines.append(_line(generic.kind, amount, width=width, indent=1))
    try:
        if resources.devices and (ask := ask_of(structs.replace(resources, generic=()))):
            lines.append(_line("GPUs", ask, width=width, indent=1))
    except Invalid as error:  # stored by another version
        lines.append(_line("GPUs", error.message, width=width, indent=1))
    return lines


def describe_service(answer: GetResponse) -> str:
    """A service."""
    service = answer.object.service if answer.object else None
    assert service is not None and service.spec is not None
    spec = service.spec
    lines = [_line("ID", service.id), _line("Name", spec.name), *_labels(spec.labels)]
    lines += _mode(spec.mode)
    if spec.priority:
        lines.append(_line("Priority", spec.priority))
    if is_job(spec):
        lines += _job(service)
    lines += _update_status(service)
    lines += _rebalance_status(service)
    task = spec.task
    if task is not None:
        lines += _placement(task)
    lines += _update_config("UpdateConfig", spec.update)
    lines += _update_config("RollbackConfig", spec.rollback)
    if task is not None:
        if task.container is not None:
            lines += _container(task.container)
        if task.resources is not None:
            for title, amount in (
                ("Reservations", task.resources.reservations),
                ("Limits", task.resources.limits),
            ):
                if amount is not None and (found := _resources(amount, width=16)):
                    lines += ["Resources:", f" {title}:", *(f" {line}" for line in found)]
        if task.restart is not None:
            lines += _restart(task.restart)
        if task.networks:
            lines.append(_line("Networks", " ".join(net.target for net in task.networks)))
        if task.log_driver is not None:
            lines += ["Log Driver:", _line("Name", task.log_driver.name, indent=1)]
            lines += [f"  {k}={v}" for k, v in sorted(task.log_driver.options.items())]
        if task.runtime:
            lines.append(_line("Runtime", task.runtime))
    ports = service.endpoint.ports if service.endpoint else ()
    lines += _endpoint(spec.endpoint, ports)
    return "\n".join(lines)


def _mode(mode: ServiceMode | None) -> list[str]:
    if mode is None or mode.replicated is not None:
        replicas = mode.replicated.replicas if mode and mode.replicated else None
        number = 1 if replicas is None else replicas
        return [_line("Service Mode", "Replicated"), _line("Replicas", number, indent=1)]
    if mode.global_service is not None:
        return [_line("Service Mode", "Global")]
    if mode.replicated_job is not None:
        job = mode.replicated_job
        concurrent = job.max_concurrent if job.max_concurrent is not None else 1
        total = job.total_completions if job.total_completions is not None else concurrent
        return [
            _line("Service Mode", "ReplicatedJob"),
            f" Max Concurrent: {concurrent}",
            f" Total Completions: {total}",
        ]
    return [_line("Service Mode", "GlobalJob")]


def _update_status(service: Service) -> list[str]:
    status = service.update_status
    if status is None:
        return []
    lines = ["UpdateStatus:", _line("State", status.state.name.lower(), indent=1)]
    lines.append(_line("Started", rfc3339(status.started_at_ns), indent=1))
    if status.completed_at_ns:
        lines.append(_line("Completed", rfc3339(status.completed_at_ns), indent=1))
    lines.append(_line("Message", status.message, indent=1))
    return lines


def _job(service: Service) -> list[str]:
    """What a job says beyond its mode, and where it stands."""
    job = service.spec.job if service.spec else None
    lines = [_line("Queue", queue_of(service))]
    if job is not None:
        if job.gang:
            lines.append(_line("Gang", "true"))
        if job.timeout_ns:
            lines.append(_line("Timeout", format_duration(job.timeout_ns)))
        if job.keep_ns is not None:
            lines.append(_line("Keep", format_duration(job.keep_ns)))
    lines.append(_line("Job State", job_state(service).capitalize()))
    status = status_of(service)
    for title, time_ns in (
        ("Queued", status.queued_at_ns),
        ("Started", status.started_at_ns),
        ("Ended", status.ended_at_ns),
    ):
        if time_ns:
            lines.append(_line(title, rfc3339(time_ns), indent=1))
    if status.exit_code is not None:
        lines.append(_line("Exit Code", status.exit_code, indent=1))
    if status.ended_at_ns:
        lines.append(_line("Completed", status.completed, indent=1))
        lines.append(_line("Failed", status.failed, indent=1))
    if status.message:
        lines.append(_line("Message", status.message, indent=1))
    return lines


def _rebalance_status(service: Service) -> list[str]:
    status = service.rebalance_status
    if status is None:
        return []
    lines = ["RebalanceStatus:"]
    lines.append(_line("State", "running" if status.running else "ended", indent=1))
    lines.append(_line("Started", rfc3339(status.started_at_ns), indent=1))
    if status.ended_at_ns:
        lines.append(_line("Ended", rfc3339(status.ended_at_ns), indent=1))
    lines.append(_line("Moved", status.moved, indent=1))
    if status.message:
        lines.append(_line("Message", status.message, indent=1))
    return lines


def _placement(task: TaskSpec) -> list[str]:
    placement = task.placement
    if placement is None:
        return []
    lines = []
    if placement.constraints:
        lines.append(_line("Constraints", ", ".join(placement.constraints), indent=1))
    spreads = [preference.spread for preference in placement.preferences if preference.spread]
    if spreads:
        lines.append(_line("Preferences", f"spread={' '.join(spreads)}", indent=1))
    for preference in placement.preferences:
        if preference.affinity:
            weight = preference.weight or 1
            lines.append(_line("Affinity", f"{preference.affinity} (weight {weight})", indent=1))
    if placement.strategy:
        lines.append(_line("Strategy", placement.strategy, indent=1))
    if placement.max_replicas:
        lines.append(f" Max Replicas Per Node: {placement.max_replicas}")
    return ["Placement:", *lines] if lines else []


def _update_config(title: str, config: UpdateConfig | None) -> list[str]:
    if config is None:
        return []
    lines = [f"{title}:", _line("Parallelism", config.parallelism, width=20, indent=1)]
    if config.delay_ns:
        lines.append(_line("Delay", format_duration(config.delay_ns), width=20, indent=1))
    lines.append(_line("On failure", config.failure_action or "pause", width=20, indent=1))
    if config.monitor_ns is not None:
        period = format_duration(config.monitor_ns)
        lines.append(_line("Monitoring Period", period, width=20, indent=1))
    ratio = f"{config.max_failure_ratio:g}"
    lines.append(_line("Max failure ratio", ratio, width=20, indent=1))
    lines.append(_line("Update order", config.order or "stop-first", width=20, indent=1))
    return lines


def _container(container: ContainerSpec) -> list[str]:
    lines = ["ContainerSpec:", _line("Image", container.image, indent=1)]
    many: Sequence[tuple[str, Sequence[str]]] = (
        ("Command", container.command),
        ("Args", container.args),
        ("Env", container.env),
    )
    lines += [_line(title, " ".join(words), indent=1) for title, words in many if words]
    single = (("Dir", container.dir), ("User", container.user), ("Hostname", container.hostname))
    lines += [_line(title, text, indent=1) for title, text in single if text]
    if container.init is not None:
        lines.append(_line("Init", str(container.init).lower(), indent=1))
    if container.mounts:
        lines.append("Mounts:")
    for mount in container.mounts:
        lines.append(_line("Target", mount.target, indent=1))
        lines.append(_line("Source", mount.source, indent=2))
        lines.append(_line("ReadOnly", str(mount.read_only).lower(), indent=2))
        lines.append(_line("Type", mount.type, indent=2))
    for title, names in (
        ("Secrets", [(r.file.name if r.file else "", r.secret_name) for r in container.secrets]),
        ("Configs", [(r.file.name if r.file else "", r.config_name) for r in container.configs]),
    ):
        if names:
            lines += [f"{title}:", *(f" Target: {at}  Source: {name}" for at, name in names)]
    if container.healthcheck is not None:
        test = " ".join(container.healthcheck.test)
        lines += ["Healthcheck:", _line("Test", test, indent=1)]
    return lines


def _restart(policy: RestartPolicy) -> list[str]:
    lines = ["RestartPolicy:", _line("Condition", policy.condition or "any", indent=1)]
    if policy.delay_ns is not None:
        lines.append(_line("Delay", format_duration(policy.delay_ns), indent=1))
    if policy.max_attempts:
        lines.append(_line("Max attempts", policy.max_attempts, indent=1))
    if policy.window_ns:
        lines.append(_line("Window", format_duration(policy.window_ns), indent=1))
    return lines


def _endpoint(spec: EndpointSpec | None, given: tuple[PortConfig, ...]) -> list[str]:
    lines = [_line("Endpoint Mode", (spec.mode if spec else "") or "vip")]
    ports = given or (spec.ports if spec else ())
    if ports:
        lines.append("Ports:")
    for port in ports:
        lines.append(_line("PublishedPort", port.published_port, width=18, indent=1))
        lines.append(_line("Protocol", port.protocol or "tcp", width=18, indent=2))
        lines.append(_line("TargetPort", port.target_port, width=18, indent=2))
        lines.append(_line("PublishMode", port.publish_mode or "ingress", width=18, indent=2))
    return lines
