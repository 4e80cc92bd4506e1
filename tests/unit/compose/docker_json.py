"""A ServiceSpec as the body that `docker stack deploy` sends, for comparison with captured ones.

Empty fields are left out on both sides (`pruned`), because the CLI sends some of them and not
others without a meaning.
"""

from __future__ import annotations

from typing import Any

from swarm.v1 import (
    FileTarget,
    HealthConfig,
    Mount,
    ResourceRequirements,
    Resources,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
)


def pruned(value: Any) -> Any:
    """Without what is empty, at any depth. Names of objects' ids are the engine's, not the file's."""
    if isinstance(value, dict):
        found = {k: pruned(v) for k, v in value.items() if k not in ("SecretID", "ConfigID")}
        return {k: v for k, v in found.items() if v not in (None, "", 0, False, {}, [])}
    if isinstance(value, list | tuple):
        return [pruned(each) for each in value]
    return value


def docker_service(spec: ServiceSpec) -> dict[str, Any]:
    task = spec.task
    assert task is not None
    container = task.container
    assert container is not None
    privileges = container.privileges
    credential = privileges.credential_spec if privileges is not None else None
    restart, placement, endpoint = task.restart, task.placement, spec.endpoint
    assert placement is not None
    assert endpoint is not None
    return {
        "Name": spec.name,
        "Labels": spec.labels,
        "TaskTemplate": {
            "ContainerSpec": {
                "Image": container.image,
                "Labels": container.labels,
                "Command": list(container.command),
                "Args": list(container.args),
                "Hostname": container.hostname,
                "Env": list(container.env),
                "Dir": container.dir,
                "User": container.user,
                "Privileges": {
                    "CredentialSpec": {
                        "Config": credential.config,
                        "File": credential.file,
                        "Registry": credential.registry,
                    }
                    if credential is not None
                    else None
                },
                "Init": container.init,
                "StopSignal": container.stop_signal,
                "TTY": container.tty,
                "OpenStdin": container.open_stdin,
                "ReadOnly": container.read_only,
                "Mounts": [_mount(each) for each in container.mounts],
                "StopGracePeriod": container.stop_grace_period_ns,
                "Healthcheck": _health(container.healthcheck),
                "Hosts": list(container.hosts),
                "DNSConfig": {
                    "Nameservers": list(container.dns.nameservers),
                    "Search": list(container.dns.search),
                }
                if container.dns is not None
                else None,
                "Secrets": [
                    {"File": _file(s.file), "SecretName": s.secret_name} for s in container.secrets
                ],
                "Configs": [
                    {"File": _file(c.file), "ConfigName": c.config_name} for c in container.configs
                ],
                "Isolation": container.isolation,
                "Sysctls": container.sysctls,
                "CapabilityAdd": list(container.capability_add),
                "CapabilityDrop": list(container.capability_drop),
                "Ulimits": [
                    {"Name": u.name, "Soft": u.soft, "Hard": u.hard} for u in container.ulimits
                ],
            },
            "Resources": _requirements(task.resources),
            "RestartPolicy": {
                "Condition": restart.condition,
                "Delay": restart.delay_ns,
                "MaxAttempts": restart.max_attempts,
                "Window": restart.window_ns,
            }
            if restart is not None
            else None,
            "Placement": {
                "Constraints": list(placement.constraints),
                "Preferences": [
                    {"Spread": {"SpreadDescriptor": p.spread}} for p in placement.preferences
                ],
                "MaxReplicas": placement.max_replicas,
            },
            "Networks": [
                {
                    "Target": n.target,
                    "Aliases": list(n.aliases),
                    "DriverOpts": n.driver_opts,
                }
                for n in task.networks
            ],
            "LogDriver": {"Name": task.log_driver.name, "Options": task.log_driver.options}
            if task.log_driver is not None
            else None,
        },
        "Mode": _mode(spec.mode),
        "UpdateConfig": _update(spec.update),
        "RollbackConfig": _update(spec.rollback),
        "EndpointSpec": {
            "Mode": endpoint.mode,
            "Ports": [
                {
                    "Protocol": p.protocol,
                    "TargetPort": p.target_port,
                    "PublishedPort": p.published_port,
                    "PublishMode": p.publish_mode,
                }
                for p in endpoint.ports
            ],
        },
    }


def _mount(mount: Mount) -> dict[str, Any]:
    bind, volume, tmpfs = mount.bind_options, mount.volume_options, mount.tmpfs_options
    driver = volume.driver_config if volume is not None else None
    return {
        "Type": mount.type,
        "Source": mount.source,
        "Target": mount.target,
        "ReadOnly": mount.read_only,
        "Consistency": mount.consistency,
        "BindOptions": {"Propagation": bind.propagation} if bind is not None else None,
        "VolumeOptions": {
            "NoCopy": volume.no_copy,
            "Labels": volume.labels,
            "DriverConfig": {"Name": driver.name, "Options": driver.options} if driver else None,
        }
        if volume is not None
        else None,
        "TmpfsOptions": {"SizeBytes": tmpfs.size_bytes} if tmpfs is not None else None,
    }


def _health(health: HealthConfig | None) -> dict[str, Any] | None:
    if health is None:
        return None
    return {
        "Test": list(health.test),
        "Interval": health.interval_ns,
        "Timeout": health.timeout_ns,
        "StartPeriod": health.start_period_ns,
        "StartInterval": health.start_interval_ns,
        "Retries": health.retries,
    }


def _file(file: FileTarget | None) -> dict[str, Any] | None:
    if file is None:
        return None
    return {"Name": file.name, "UID": file.uid, "GID": file.gid, "Mode": file.mode}


def _requirements(given: ResourceRequirements | None) -> dict[str, Any]:
    assert given is not None
    return {"Limits": _resources(given.limits), "Reservations": _resources(given.reservations)}


def _resources(given: Resources | None) -> dict[str, Any] | None:
    if given is None:
        return None
    return {
        "NanoCPUs": given.cpu_nano,
        "MemoryBytes": given.memory_bytes,
        "Pids": given.pids,
        "GenericResources": [
            {"DiscreteResourceSpec": {"Kind": g.kind, "Value": g.count}} for g in given.generic
        ],
    }


def _mode(mode: ServiceMode | None) -> dict[str, Any] | None:
    if mode is None:
        return None
    if mode.replicated is not None:
        return {"Replicated": {"Replicas": mode.replicated.replicas}}
    if mode.replicated_job is not None:
        job = mode.replicated_job
        return {
            "ReplicatedJob": {
                "MaxConcurrent": job.max_concurrent,
                "TotalCompletions": job.total_completions,
            }
        }
    return {"GlobalJob": {}} if mode.global_job is not None else {"Global": {}}


def _update(update: UpdateConfig | None) -> dict[str, Any] | None:
    if update is None:
        return None
    return {
        "Parallelism": update.parallelism,
        "Delay": update.delay_ns,
        "FailureAction": update.failure_action,
        "Monitor": update.monitor_ns,
        "MaxFailureRatio": update.max_failure_ratio,
        "Order": update.order,
    }
