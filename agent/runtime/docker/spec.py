"""From a task to the body of POST /containers/create. Pure: no call, no clock.

Every field of ContainerSpec and TaskSpec is either said to the engine or refused with the reason;
all problems of a task are reported in one Rejected. What the engine checks itself (names of
signals, drivers, capabilities, paths) is left to it: its answer becomes the reason.

Labels are Docker's, so that tools that look for com.docker.swarm.* find them; `LABEL_NODE` is ours
and says whose container it is when an agent comes back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent.gpus import Handover, as_claimed, limited
from agent.gpus.sharing import SHARED_MEMORY
from agent.runtime.base import UNSUPPORTED, Rejected, Work
from agent.runtime.docker.attach import (
    BUILT_IN,
    Attachment,
    exposed_ports,
    plan_attachments,
    port_bindings,
)
from agent.runtime.docker.facts import Facts
from agent.runtime.docker.mounts import Problem, plan_mounts
from swarm.gpus import OPTIONS as GPU_OPTIONS
from swarm.gpus import is_gpu_request
from swarm.v1 import (
    Assignment,
    ContainerSpec,
    HealthConfig,
    Privileges,
    ResourceRequirements,
    Resources,
    Task,
    TaskSpec,
)

LABEL_NODE = "swarm-py.node.id"
LABEL_CLUSTER = "swarm-py.cluster.id"
LABEL_TASK = "com.docker.swarm.task.id"
# The engine stops a container by itself (at its own end) with this grace; Docker's default.
STOP_GRACE_NS = 10_000_000_000
SECOND_NS = 1_000_000_000
START_INTERVAL_API = (1, 44)
_CDI = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9_.-]+=.+")


@dataclass(frozen=True, slots=True)
class Plan:
    """A container to be. Networks and files are filled in when they exist: see `body_for`."""

    task_id: str
    name: str
    image: str
    platform: str
    pull_policy: str
    attachments: tuple[Attachment, ...]
    body: dict[str, Any]
    # As in agent.runtime.base.Started.
    note: str = ""


def plan_container(
    work: Work, facts: Facts, *, node_id: str, cluster_id: str, gpus: Handover | None = None
) -> Plan:
    """The container for a task, which is given these GPUs. Raises Rejected with every reason."""
    assignment = work.assignment
    task, spec = assignment.task or Task(), assignment.spec or TaskSpec()
    container = spec.container or ContainerSpec()
    given = limited(as_claimed(task.assigned_gpus) if gpus is None else gpus, spec)
    problems: list[str] = []
    problem = problems.append
    problems += [f"GPU {uuid} is not on this node any more" for uuid in given.missing]
    if not container.image:
        problem("no image is named")
    attachments = plan_attachments(work, spec, container, facts, problem)
    ports = [p for p in assignment.ports if p.publish_mode == "host"]
    body = {
        **_config(assignment, container, facts, given, problem),
        "Labels": _labels(assignment, container, node_id=node_id, cluster_id=cluster_id),
        "ExposedPorts": exposed_ports(container, ports, problem),
        "HostConfig": {
            **_host_config(container, facts, given, problem),
            **_resources(spec.resources, container, problem),
            **_devices(spec, container, facts, given, problem),
            **port_bindings(ports, attachments, problem),
            **_log_config(spec),
            **_runtime(spec, facts, problem),
        },
    }
    _check_policy(container, problem)
    if problems:
        name = assignment.service_name or task.id
        raise Rejected(
            f"task of service {name!r} cannot run on this node: {'; '.join(problems)}",
            cause=UNSUPPORTED,
        )
    return Plan(
        task_id=task.id,
        name=assignment.name or f"task.{task.id}",
        image=container.image,
        platform=container.platform,
        pull_policy=container.pull_policy,
        attachments=attachments,
        body=body,
        note=note_on(container, facts),
    )


def body_for(
    plan: Plan, network_ids: Sequence[str], files: Sequence[tuple[str, str]], facts: Facts
) -> tuple[dict[str, Any], tuple[tuple[str, dict[str, Any]], ...]]:
    """The body with the engine's networks and the mounted files, and the networks that must be
    connected afterwards (before API 1.44 a container is made with one network).
    """
    host = dict(plan.body["HostConfig"])
    body = {**plan.body, "HostConfig": host}
    if files and facts.selinux:
        host["Binds"] = [*host.get("Binds", ()), *(f"{s}:{t}:ro,z" for s, t in files)]
    elif files:
        host["Mounts"] = [
            *host.get("Mounts", ()),
            *(
                {"Type": "bind", "Source": source, "Target": target, "ReadOnly": True}
                for source, target in files
            ),
        ]
    endpoints = [(i, a.endpoint) for i, a in zip(network_ids, plan.attachments, strict=True)]
    if not endpoints:
        return body, ()
    host["NetworkMode"] = endpoints[0][0]
    if endpoints[0][0] in BUILT_IN:
        return body, tuple(endpoints[1:])
    now = endpoints if facts.api >= (1, 44) else endpoints[:1]
    body["NetworkingConfig"] = {"EndpointsConfig": dict(now)}
    return body, tuple(endpoints[len(now) :])


# ------------------------------------------------------------------ the container itself


def _config(
    assignment: Assignment,
    container: ContainerSpec,
    facts: Facts,
    given: Handover,
    problem: Problem,
) -> dict[str, Any]:
    grace_ns = container.stop_grace_period_ns
    grace_ns = STOP_GRACE_NS if grace_ns is None else grace_ns
    config: dict[str, Any] = {
        "Image": container.image,
        "Env": _env(assignment, container, facts, given),
        "Tty": container.tty,
        "OpenStdin": container.open_stdin,
        "StopTimeout": -(-grace_ns // SECOND_NS),
    }
    for key, value in (
        ("Hostname", container.hostname),
        ("Domainname", container.domainname),
        ("User", container.user),
        ("WorkingDir", container.dir),
        ("StopSignal", container.stop_signal),
        ("Entrypoint", list(container.command)),
        ("Cmd", list(container.args)),
    ):
        if value:
            config[key] = value
    if container.mac_address and facts.api < (1, 44):
        config["MacAddress"] = container.mac_address
    if container.healthcheck is not None:
        config["Healthcheck"] = _healthcheck(container.healthcheck, facts, problem)
    return config


def _healthcheck(health: HealthConfig, facts: Facts, problem: Problem) -> dict[str, Any]:
    if health.test[:1] != ("NONE",) and not facts.healthchecks:
        problem("a healthcheck is asked for, and Podman runs them only where systemd runs")
    out: dict[str, Any] = {
        "Test": list(health.test),
        "Interval": health.interval_ns,
        "Timeout": health.timeout_ns,
        "StartPeriod": health.start_period_ns,
        "Retries": health.retries,
    }
    # An older engine checks every interval from the beginning: what is healthy is known later.
    if health.start_interval_ns and facts.api >= START_INTERVAL_API:
        out["StartInterval"] = health.start_interval_ns
    return out


def note_on(container: ContainerSpec, facts: Facts) -> str:
    """What the engine cannot do of the spec and what is done in its place; empty: nothing."""
    health = container.healthcheck
    if health is None or not health.start_interval_ns or facts.api >= START_INTERVAL_API:
        return ""
    return (
        f"its healthcheck's start_interval has no effect: {facts.engine} {facts.release} has API "
        f"{facts.api[0]}.{facts.api[1]} and this needs {START_INTERVAL_API[0]}."
        f"{START_INTERVAL_API[1]}; it is checked every interval"
    )


def _env(
    assignment: Assignment, container: ContainerSpec, facts: Facts, given: Handover
) -> list[str]:
    task = assignment.task or Task()
    env = list(container.env)
    named: dict[str, list[str]] = {}
    for resource in task.assigned_generic:
        value = resource.name or str(resource.count or 0)
        named.setdefault(resource.kind, []).append(value)
    # Docker's names for what a task was given.
    env += [f"DOCKER_RESOURCE_{kind.upper()}={','.join(v)}" for kind, v in sorted(named.items())]
    if given.hide or facts.nvidia:
        # With the NVIDIA runtime this variable hands out GPUs, and images set it to `all`: what
        # the task did not claim must be kept from it, whatever it says itself.
        # What CDI or device nodes give is not this runtime's: void there, too.
        said = {**given.env, "NVIDIA_VISIBLE_DEVICES": ",".join(given.uuids) or "void"}
        env = [word for word in env if word.partition("=")[0] not in said]
        env += [f"{key}={value}" for key, value in said.items()]
    return env


def _labels(
    assignment: Assignment, container: ContainerSpec, *, node_id: str, cluster_id: str
) -> dict[str, str]:
    task = assignment.task or Task()
    return {
        **container.labels,
        "com.docker.swarm.node.id": node_id,
        "com.docker.swarm.service.id": task.service_id,
        "com.docker.swarm.service.name": assignment.service_name,
        "com.docker.swarm.task": "",
        LABEL_TASK: task.id,
        "com.docker.swarm.task.name": assignment.name,
        LABEL_NODE: node_id,
        LABEL_CLUSTER: cluster_id,
    }


def _check_policy(container: ContainerSpec, problem: Problem) -> None:
    if container.pull_policy not in ("", "always", "missing", "never"):
        problem(f"pull_policy {container.pull_policy!r} is none of always, missing, never")


# ------------------------------------------------------------------ host config


def _host_config(
    container: ContainerSpec, facts: Facts, given: Handover, problem: Problem
) -> dict[str, Any]:
    mounts = plan_mounts(container.mounts, facts, problem)
    config: dict[str, Any] = {
        "RestartPolicy": {"Name": "no"},  # the cluster restarts, not the engine
        "Mounts": [*mounts.mounts, *_shared(container, given)],
        "Privileged": container.privileged,
        "ReadonlyRootfs": container.read_only,
    }
    for key, value in (
        ("Binds", mounts.binds),
        ("Tmpfs", mounts.tmpfs),
        ("CapAdd", list(container.capability_add)),
        ("CapDrop", list(container.capability_drop)),
        ("GroupAdd", list(container.groups)),
        ("ExtraHosts", _extra_hosts(container.hosts, problem)),
        ("Sysctls", dict(container.sysctls)),
        ("Ulimits", [{"Name": u.name, "Soft": u.soft, "Hard": u.hard} for u in container.ulimits]),
        ("OomScoreAdj", container.oom_score_adj),
        ("ShmSize", container.shm_size_bytes),
        ("IpcMode", container.ipc_mode),
        ("PidMode", container.pid_mode),
        ("UsernsMode", container.userns_mode),
        ("UTSMode", container.uts_mode),
        ("CgroupParent", container.cgroup_parent),
        ("StorageOpt", dict(container.storage_opt)),
        ("Isolation", container.isolation),
        ("SecurityOpt", _security(container, facts, problem)),
        ("OomKillDisable", container.oom_kill_disable),
    ):
        if value:
            config[key] = value
    if container.dns is not None:
        config["Dns"] = list(container.dns.nameservers)
        config["DnsSearch"] = list(container.dns.search)
        config["DnsOptions"] = list(container.dns.options)
    if container.init is not None:
        config["Init"] = container.init
    if container.cgroupns_mode and facts.needs((1, 41), "cgroupns_mode", problem):
        config["CgroupnsMode"] = container.cgroupns_mode
    if container.annotations and facts.needs((1, 43), "annotations", problem):
        config["Annotations"] = dict(container.annotations)
    if container.platform:
        facts.needs((1, 41), "platform", problem)
    return config


def _extra_hosts(lines: Sequence[str], problem: Problem) -> list[str]:
    """Swarm writes lines of /etc/hosts, the engine takes name:address."""
    out = []
    for line in lines:
        address, *names = line.split()
        if not names:
            problem(f"extra host {line!r} is not of the form `IP name`")
        out += [f"{name}:{address}" for name in names]
    return out


def _security(container: ContainerSpec, facts: Facts, problem: Problem) -> list[str]:
    out = list(container.security_opt)
    privileges = container.privileges
    if privileges is not None:
        out += _privileges(privileges, facts, problem)
    for option in container.security_opt:
        key, _, value = option.replace(":", "=", 1).partition("=")
        if key == "apparmor" and value != "unconfined" and not facts.apparmor:
            problem(f"security_opt {option!r}: this node has no AppArmor")
        if key == "label" and not value.startswith("disable") and not facts.selinux:
            problem(f"security_opt {option!r}: this node has no SELinux")
    return out


def _privileges(privileges: Privileges, facts: Facts, problem: Problem) -> list[str]:
    out = []
    credential = privileges.credential_spec
    if credential is not None and (credential.config or credential.file or credential.registry):
        problem("credential specs exist on Windows only")
    if (selinux := privileges.selinux_context) is not None:
        parts = {
            "user": selinux.user,
            "role": selinux.role,
            "type": selinux.type,
            "level": selinux.level,
        }
        if selinux.disable:
            out.append("label=disable")
        elif any(parts.values()) and not facts.selinux:
            problem("an SELinux context is asked for, and this node has no SELinux")
        out += [f"label={key}:{value}" for key, value in parts.items() if value]
    if (seccomp := privileges.seccomp) is not None and seccomp.mode not in ("", "default"):
        if seccomp.mode == "unconfined":
            out.append("seccomp=unconfined")
        elif seccomp.mode == "custom":
            try:
                out.append(f"seccomp={json.dumps(json.loads(seccomp.profile))}")
            except ValueError as error:
                problem(f"the custom seccomp profile is not JSON: {error}")
        else:
            problem(f"seccomp mode {seccomp.mode!r} is none of default, unconfined, custom")
    if (apparmor := privileges.apparmor) is not None and apparmor.mode not in ("", "default"):
        if apparmor.mode == "disabled":
            out.append("apparmor=unconfined")
        else:
            problem(f"AppArmor mode {apparmor.mode!r} is none of default, disabled")
    if privileges.no_new_privileges:
        out.append("no-new-privileges:true")
    return out


def _resources(
    requirements: ResourceRequirements | None, container: ContainerSpec, problem: Problem
) -> dict[str, Any]:
    """Limits, which the engine enforces; reservations are the scheduler's."""
    requirements = requirements or ResourceRequirements()
    limits = requirements.limits or Resources()
    swap_bytes = container.memory_swap_bytes  # memory and swap together, as the engine takes it
    if not swap_bytes and requirements.swap_bytes is not None:
        if requirements.swap_bytes < 0:
            swap_bytes = -1
        elif limits.memory_bytes:
            swap_bytes = limits.memory_bytes + requirements.swap_bytes
        else:
            problem("a limit on swap needs a limit on memory")
    swappiness = container.memory_swappiness
    if swappiness is None:
        swappiness = requirements.memory_swappiness
    out = {
        "NanoCpus": limits.cpu_nano,
        "Memory": limits.memory_bytes,
        "PidsLimit": limits.pids,
        "MemorySwap": swap_bytes,
        "MemoryReservation": container.memory_reservation_bytes,
        "CpuShares": container.cpu_shares,
        "CpusetCpus": container.cpuset,
        "DeviceCgroupRules": list(container.device_cgroup_rules),
    }
    out = {key: value for key, value in out.items() if value}
    if swappiness is not None:
        out["MemorySwappiness"] = swappiness
    return out


def _shared(container: ContainerSpec, given: Handover) -> list[dict[str, Any]]:
    """What a task with a part of a GPU has of the host; not in place of what its spec puts there,
    nor shared memory where it has the host's anyway.
    """
    taken = {mount.target for mount in container.mounts}
    if container.ipc_mode == "host":
        taken.add(SHARED_MEMORY)
    return [
        {"Type": "bind", "Source": path, "Target": path}
        for path in given.shared_paths
        if path not in taken
    ]


def _devices(
    spec: TaskSpec, container: ContainerSpec, facts: Facts, given: Handover, problem: Problem
) -> dict[str, Any]:
    requests: list[dict[str, Any]] = []
    devices = [
        {"PathOnHost": node, "PathInContainer": node, "CgroupPermissions": "rwm"}
        for node in given.nodes
    ]
    cdi = list(given.cdi)
    for device in container.devices:
        if _CDI.fullmatch(device.source) and not device.source.startswith("/"):
            cdi.append(device.source)
            continue
        devices.append(
            {
                "PathOnHost": device.source,
                "PathInContainer": device.target or device.source,
                "CgroupPermissions": device.permissions or "rwm",
            }
        )
    if cdi and facts.needs((1, 44), "a CDI device", problem):
        requests.append({"Driver": "cdi", "DeviceIDs": cdi})
    reservations = (spec.resources and spec.resources.reservations) or Resources()
    capabilities: list[str] = []
    options: dict[str, str] = {}
    for claim in reservations.devices:
        if is_gpu_request(claim):
            capabilities += [c for c in claim.capabilities if c not in capabilities]
            # Those that say which GPU is wanted are not the driver's.
            options |= {k: v for k, v in claim.options.items() if k not in GPU_OPTIONS}
        else:
            requests.append(
                {
                    "Driver": claim.driver,
                    "Count": 0 if claim.device_ids else (1 if claim.count is None else claim.count),
                    "DeviceIDs": list(claim.device_ids),
                    "Capabilities": [list(claim.capabilities)],
                    "Options": dict(claim.options),
                }
            )
    if given.uuids:
        # Always by UUID: the engine keeps no account and would hand out the first ones.
        requests.append(
            {
                "Driver": "nvidia",
                "DeviceIDs": list(given.uuids),
                "Capabilities": [capabilities or ["gpu"]],
                "Options": options,
            }
        )
    out: dict[str, Any] = {}
    if devices:
        out["Devices"] = devices
    if requests:
        out["DeviceRequests"] = requests
    return out


def _log_config(spec: TaskSpec) -> dict[str, Any]:
    driver = spec.log_driver
    if driver is None or not (driver.name or driver.options):
        return {}  # the engine's default
    return {"LogConfig": {"Type": driver.name, "Config": dict(driver.options)}}


def _runtime(spec: TaskSpec, facts: Facts, problem: Problem) -> dict[str, Any]:
    if spec.runtime in ("", "docker"):
        return {}
    if spec.runtime not in facts.runtimes:
        known = ", ".join(sorted(facts.runtimes))
        problem(f"the engine has no runtime {spec.runtime!r}; it has {known}")
    return {"Runtime": spec.runtime}
