"""`inspect --pretty`: services and nodes for people, worded and indented as Docker's CLI does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from msgspec import structs

from cli.jobs import is_job, job_state, queue_of, status_of
from cli.pretty_gpu import gpu_lines
from cli.pretty_lines import label_lines, line
from cli.pretty_update import config_lines, restart_lines, status_lines
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
    Service,
    ServiceMode,
    ServiceStatus,
    TaskSpec,
)

__all__ = ["describe_node", "describe_service", "manager_word"]

NO_NAMES: Mapping[str, str] = MappingProxyType({})


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
    lines = [line("ID", node.id, width=24)]
    if node.spec.name:
        lines.append(line("Name", node.spec.name, width=24))
    lines += label_lines(node.spec.labels)
    description, status = node.description, node.status
    lines.append(line("Hostname", description.hostname if description else "", width=24))
    lines.append(line("Joined at", rfc3339(node.meta.created_at_ns), width=24))
    if status is not None:
        lines.append("Status:")
        lines.append(line("State", status.state.name.capitalize(), width=24, indent=1))
        if status.message:
            lines.append(line("Message", status.message, width=24, indent=1))
        availability = node.spec.availability.name.capitalize()
        lines.append(line("Availability", availability, width=24, indent=1))
        lines.append(line("Address", status.addr, width=24, indent=1))
    if manager := node.manager_status:
        lines.append("Manager Status:")
        lines.append(line("Address", manager.addr, width=24, indent=1))
        reach = manager.reachability.name.capitalize()
        lines.append(line("Raft Status", reach, width=24, indent=1))
        lines.append(line("Leader", "Yes" if manager.leader else "No", width=24, indent=1))
        if manager.engine_version:
            lines.append(line("Store", manager.engine_version, width=24, indent=1))
    if manager_word(node) in ("Promoting", "Demoting"):
        lines.append(line("Role Change", manager_word(node), width=24))
    if description is None:
        return "\n".join(lines)
    if platform := description.platform:
        lines.append("Platform:")
        lines.append(line("Operating System", platform.os, width=24, indent=1))
        lines.append(line("Architecture", platform.architecture, width=24, indent=1))
    if resources := description.resources:
        lines += ["Resources:", *_resources(resources, width=24)]
    if engine := description.engine:
        lines.append(line("Engine Version", f"{engine.name} {engine.version}".strip(), width=24))
        lines += label_lines(engine.labels, "Engine Labels")
    lines.append(line("Agent Version", description.agent_version, width=24))
    lines.append(line("Runtimes", ", ".join(description.runtimes), width=24))
    lines += gpu_lines(description.gpus, gpus)
    lines += [
        f"No new tasks of {', '.join(problem.runtimes)}: {problem.message}"
        for problem in description.runtime_problems
    ]
    lines += [f"Warning: {warning}" for warning in description.warnings]
    return "\n".join(lines)


def _resources(resources: Resources, *, width: int) -> list[str]:
    lines = []
    if resources.cpu_nano:
        lines.append(line("CPUs", format_cpus(resources.cpu_nano), width=width, indent=1))
    if resources.memory_bytes:
        lines.append(line("Memory", format_bytes(resources.memory_bytes), width=width, indent=1))
    if resources.pids:
        lines.append(line("PIDs", resources.pids, width=width, indent=1))
    for generic in resources.generic:
        amount = generic.name or generic.count
        lines.append(line(generic.kind, amount, width=width, indent=1))
    try:
        if resources.devices and (ask := ask_of(structs.replace(resources, generic=()))):
            lines.append(line("GPUs", ask, width=width, indent=1))
    except Invalid as error:  # stored by another version
        lines.append(line("GPUs", error.message, width=width, indent=1))
    return lines


def describe_service(answer: GetResponse, networks: Mapping[str, str] = NO_NAMES) -> str:
    """A service; `networks`: names by id."""
    service = answer.object.service if answer.object else None
    assert service is not None and service.spec is not None
    spec = service.spec
    lines = [line("ID", service.id), line("Name", spec.name), *label_lines(spec.labels)]
    lines += _mode(spec.mode)
    if spec.priority:
        lines.append(line("Priority", spec.priority))
    if is_job(spec):
        lines += _job(service)
    lines += status_lines(service)
    lines += _rebalance_status(service)
    if answer.service_status is not None:
        lines += _standing(answer.service_status)
    task = spec.task
    if task is not None:
        lines += _placement(task)
    lines += config_lines("UpdateConfig", spec.update)
    lines += config_lines("RollbackConfig", spec.rollback)
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
            lines += restart_lines(task.restart)
        if task.networks:
            shown = (networks.get(net.target, net.target) for net in task.networks)
            lines.append(line("Networks", " ".join(shown)))
        if task.log_driver is not None:
            lines += ["Log Driver:", line("Name", task.log_driver.name, indent=1)]
            lines += [f"  {k}={v}" for k, v in sorted(task.log_driver.options.items())]
        if task.runtime:
            lines.append(line("Runtime", task.runtime))
    ports = service.endpoint.ports if service.endpoint else ()
    lines += _endpoint(spec.endpoint, ports)
    return "\n".join(lines)


def _mode(mode: ServiceMode | None) -> list[str]:
    if mode is None or mode.replicated is not None:
        replicas = mode.replicated.replicas if mode and mode.replicated else None
        number = 1 if replicas is None else replicas
        return [line("Service Mode", "Replicated"), line("Replicas", number, indent=1)]
    if mode.global_service is not None:
        return [line("Service Mode", "Global")]
    if mode.replicated_job is not None:
        job = mode.replicated_job
        concurrent = job.max_concurrent if job.max_concurrent is not None else 1
        total = job.total_completions if job.total_completions is not None else concurrent
        return [
            line("Service Mode", "ReplicatedJob"),
            f" Max Concurrent: {concurrent}",
            f" Total Completions: {total}",
        ]
    return [line("Service Mode", "GlobalJob")]


def _standing(status: ServiceStatus) -> list[str]:
    """How many of its tasks run, and why not all."""
    counted = f"{status.running}/{status.desired}"
    lines = ["Tasks:", line("Running", counted, indent=1)]
    return lines + [line("Reason", reason, indent=1) for reason in status.reasons]


def _job(service: Service) -> list[str]:
    """What a job says beyond its mode, and where it stands."""
    job = service.spec.job if service.spec else None
    lines = [line("Queue", queue_of(service))]
    if job is not None:
        if job.gang:
            lines.append(line("Gang", "true"))
        if job.timeout_ns:
            lines.append(line("Timeout", format_duration(job.timeout_ns)))
        if job.keep_ns is not None:
            lines.append(line("Keep", format_duration(job.keep_ns)))
    lines.append(line("Job State", job_state(service).capitalize()))
    status = status_of(service)
    for title, time_ns in (
        ("Queued", status.queued_at_ns),
        ("Started", status.started_at_ns),
        ("Ended", status.ended_at_ns),
    ):
        if time_ns:
            lines.append(line(title, rfc3339(time_ns), indent=1))
    if status.exit_code is not None:
        lines.append(line("Exit Code", status.exit_code, indent=1))
    if status.ended_at_ns:
        lines.append(line("Completed", status.completed, indent=1))
        lines.append(line("Failed", status.failed, indent=1))
    if status.message:
        lines.append(line("Message", status.message, indent=1))
    return lines


def _rebalance_status(service: Service) -> list[str]:
    status = service.rebalance_status
    if status is None:
        return []
    lines = ["RebalanceStatus:"]
    lines.append(line("State", "running" if status.running else "ended", indent=1))
    lines.append(line("Started", rfc3339(status.started_at_ns), indent=1))
    if status.ended_at_ns:
        lines.append(line("Ended", rfc3339(status.ended_at_ns), indent=1))
    lines.append(line("Moved", status.moved, indent=1))
    if status.message:
        lines.append(line("Message", status.message, indent=1))
    return lines


def _placement(task: TaskSpec) -> list[str]:
    placement = task.placement
    if placement is None:
        return []
    lines = []
    if placement.constraints:
        lines.append(line("Constraints", ", ".join(placement.constraints), indent=1))
    spreads = [preference.spread for preference in placement.preferences if preference.spread]
    if spreads:
        lines.append(line("Preferences", f"spread={' '.join(spreads)}", indent=1))
    for preference in placement.preferences:
        if preference.affinity:
            weight = preference.weight or 1
            lines.append(line("Affinity", f"{preference.affinity} (weight {weight})", indent=1))
    if placement.strategy:
        lines.append(line("Strategy", placement.strategy, indent=1))
    if placement.max_replicas:
        lines.append(f" Max Replicas Per Node: {placement.max_replicas}")
    return ["Placement:", *lines] if lines else []


def _container(container: ContainerSpec) -> list[str]:
    lines = ["ContainerSpec:", line("Image", container.image, indent=1)]
    many: Sequence[tuple[str, Sequence[str]]] = (
        ("Command", container.command),
        ("Args", container.args),
        ("Env", container.env),
    )
    lines += [line(title, " ".join(words), indent=1) for title, words in many if words]
    single = (("Dir", container.dir), ("User", container.user), ("Hostname", container.hostname))
    lines += [line(title, text, indent=1) for title, text in single if text]
    if container.init is not None:
        lines.append(line("Init", str(container.init).lower(), indent=1))
    if container.mounts:
        lines.append("Mounts:")
    for mount in container.mounts:
        lines.append(line("Target", mount.target, indent=1))
        lines.append(line("Source", mount.source, indent=2))
        lines.append(line("ReadOnly", str(mount.read_only).lower(), indent=2))
        lines.append(line("Type", mount.type, indent=2))
    for title, names in (
        ("Secrets", [(r.file.name if r.file else "", r.secret_name) for r in container.secrets]),
        ("Configs", [(r.file.name if r.file else "", r.config_name) for r in container.configs]),
    ):
        if names:
            lines += [f"{title}:", *(f" Target: {at}  Source: {name}" for at, name in names)]
    if container.healthcheck is not None:
        test = " ".join(container.healthcheck.test)
        lines += ["Healthcheck:", line("Test", test, indent=1)]
    return lines


def _endpoint(spec: EndpointSpec | None, given: tuple[PortConfig, ...]) -> list[str]:
    lines = [line("Endpoint Mode", (spec.mode if spec else "") or "vip")]
    ports = given or (spec.ports if spec else ())
    if ports:
        lines.append("Ports:")
    for port in ports:
        lines.append(line("PublishedPort", port.published_port, width=18, indent=1))
        lines.append(line("Protocol", port.protocol or "tcp", width=18, indent=2))
        lines.append(line("TargetPort", port.target_port, width=18, indent=2))
        lines.append(line("PublishMode", port.publish_mode or "ingress", width=18, indent=2))
    return lines
