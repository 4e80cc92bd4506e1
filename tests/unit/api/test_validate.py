"""Every rule of a service's spec, with what it says; all of them at once."""

from __future__ import annotations

import pytest

from swarm import errors
from swarm.v1 import (
    BindOptions,
    ConfigReference,
    CreateRequest,
    Dependency,
    DeviceRequest,
    DnsConfig,
    EndpointSpec,
    FileTarget,
    GenericResource,
    Global,
    GlobalJob,
    HealthConfig,
    Mount,
    NetworkAttachmentSpec,
    Placement,
    PlacementPreference,
    Replicated,
    ReplicatedJob,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    SecretReference,
    ServiceMode,
    ServiceSpec,
    Spec,
    TmpfsOptions,
    Ulimit,
    UpdateConfig,
)
from tests.unit.api.harness import CONTEXT, Api, port, service

MIB = 1024 * 1024
JOB = ServiceMode(replicated_job=ReplicatedJob())


def container(**fields):
    return service(container=fields)


def limits(**fields):
    return service(task={"resources": ResourceRequirements(limits=Resources(**fields))})


def reserved(**fields):
    return service(task={"resources": ResourceRequirements(reservations=Resources(**fields))})


def placed(**fields):
    return service(task={"placement": Placement(**fields)})


def mounted(*mounts: Mount):
    return container(mounts=mounts)


def health(**fields):
    return container(healthcheck=HealthConfig(**fields))


def with_config(file: FileTarget | None, **fields):
    return container(configs=(ConfigReference(config_name="c", file=file, **fields),))


# name of the rule: (spec, what the message must hold)
BAD: dict[str, tuple[ServiceSpec, str]] = {
    "no name": (service(""), "name: a service needs a name"),
    "name with a slash": (service("a/b"), "'a/b' must be valid as a DNS name"),
    "name that ends in a dash": (service("web-"), "letter or digit first and last"),
    "name too long": (service("a" * 64), "at most 63 characters"),
    "label without a name": (service(labels={"": "x"}), "labels: a label has no name"),
    "no image": (
        container(image=""),
        "image: no image is given; name one, or set runtime: process",
    ),
    "image with spaces": (container(image="nginx 1"), "image: 'nginx 1' holds white space"),
    "image as a URL": (
        container(image="https://x/y"),
        "is a URL; write the image without https://",
    ),
    "process without a command": (
        service(task={"runtime": "process"}, container={"image": ""}),
        "command: runtime: process needs a command",
    ),
    "plugin runtime": (
        service(task={"docker_runtime": "plugin"}),
        "'plugin' tasks are not offered",
    ),
    # mode
    "two modes": (
        service(mode=ServiceMode(replicated=Replicated(replicas=1), global_service=Global())),
        "mode: exactly one of replicated, global, replicated-job and global-job must be set",
    ),
    "no mode": (service(mode=ServiceMode()), "mode: exactly one of"),
    "too many replicas": (
        service(replicas=10**6),
        "1000000 tasks are more than the limit of 500000",
    ),
    "job of nothing at once": (
        service(mode=ServiceMode(replicated_job=ReplicatedJob(max_concurrent=0))),
        "max_concurrent: a job must run at least 1 task at once",
    ),
    "job with an update": (
        service(mode=JOB, update=UpdateConfig()),
        "a job is not updated in steps",
    ),
    "job with ingress ports": (
        service(mode=JOB, ports=[port(80)]),
        "a job cannot publish ports in mode ingress",
    ),
    "job that restarts always": (
        service(mode=JOB, task={"restart": RestartPolicy(condition="any")}),
        "restart_policy.condition: a job runs to completion; use none or on-failure",
    ),
    # update and restart
    "update order": (
        service(update=UpdateConfig(order="first")),
        "update_config.order: 'first' is not one of stop-first, start-first",
    ),
    "failure action": (
        service(update=UpdateConfig(failure_action="stop")),
        "update_config.failure_action: 'stop' is not one of pause, continue, rollback",
    ),
    "rollback of a rollback": (
        service(rollback=UpdateConfig(failure_action="rollback")),
        "rollback_config.failure_action: 'rollback' is not one of pause, continue",
    ),
    "ratio": (
        service(update=UpdateConfig(max_failure_ratio=1.5)),
        "update_config.max_failure_ratio: 1.5 is not a share from 0 to 1",
    ),
    "ratio that is no number": (
        service(update=UpdateConfig(max_failure_ratio=float("nan"))),
        "is not a share from 0 to 1",
    ),
    "negative delay": (
        service(update=UpdateConfig(delay_ns=-1)),
        "update_config.delay: a duration cannot be negative",
    ),
    "negative deadline": (
        service(rollback=UpdateConfig(deadline_ns=-1)),
        "rollback_config.deadline: a duration",
    ),
    "negative monitor": (
        service(update=UpdateConfig(monitor_ns=-1)),
        "update_config.monitor: a duration",
    ),
    "negative longest delay": (
        service(task={"restart": RestartPolicy(max_delay_ns=-1)}),
        "restart_policy.max_delay: a duration cannot be negative",
    ),
    "restart condition": (
        service(task={"restart": RestartPolicy(condition="sometimes")}),
        "restart_policy.condition: 'sometimes' is not one of none, on-failure, any",
    ),
    "restart delay": (
        service(task={"restart": RestartPolicy(delay_ns=-5)}),
        "restart_policy.delay: a duration",
    ),
    # resources
    "cpus too small": (
        limits(cpu_nano=999_999),
        "limits.cpus: 0.000999999 is too little; at least 0.001",
    ),
    "cpus negative": (limits(cpu_nano=-(10**9)), "limits.cpus: -1 is too little"),
    "memory too small": (
        limits(memory_bytes=MIB),
        "limits.memory: 1 MiB is too little; at least 4 MiB",
    ),
    "reserved memory too small": (
        reserved(memory_bytes=5),
        "reservations.memory: 5 B is too little",
    ),
    "pids negative": (limits(pids=-1), "limits.pids: a number of processes cannot be negative"),
    "reserved pids negative": (
        reserved(pids=-5),
        "reservations.pids: a number of processes cannot be negative",
    ),
    "devices limited": (
        limits(generic=(GenericResource(kind="gpu", count=1),)),
        "limits.devices: devices and generic resources are reserved, not limited",
    ),
    "reservation above the limit": (
        service(
            task={
                "resources": ResourceRequirements(
                    limits=Resources(memory_bytes=64 * MIB),
                    reservations=Resources(memory_bytes=128 * MIB),
                )
            }
        ),
        "reservations.memory: 128 MiB is more than limits.memory (64 MiB)",
    ),
    "generic of zero": (
        reserved(generic=(GenericResource(kind="gpu", count=0),)),
        "reservations.generic_resources[0]: 0 of 'gpu' is no reservation",
    ),
    "generic twice": (
        reserved(generic=(GenericResource(kind="g", count=1), GenericResource(kind="g", count=1))),
        "reservations.generic_resources[1]: 'g' is reserved twice",
    ),
    "no devices": (
        reserved(devices=(DeviceRequest(count=0, capabilities=("gpu",)),)),
        "reservations.devices[0].count: 0 devices are no reservation",
    ),
    "count and ids": (
        reserved(devices=(DeviceRequest(count=1, device_ids=("0",), capabilities=("gpu",)),)),
        "count and device_ids exclude each other",
    ),
    "devices of no kind": (
        reserved(devices=(DeviceRequest(count=1),)),
        "say which devices are wanted",
    ),
    "devices that are no GPUs": (
        reserved(devices=(DeviceRequest(count=1, capabilities=("tpu",)),)),
        "no node offers devices of tpu; GPUs are asked for with [gpu]",
    ),
    "GPU without a name": (
        reserved(devices=(DeviceRequest(device_ids=("",), capabilities=("gpu",)),)),
        "devices[0].device_ids: a name is empty",
    ),
    "GPU option": (
        reserved(devices=(DeviceRequest(capabilities=("gpu",), options={"memry": "1g"}),)),
        "reservations.devices[0].options: GPUs have no option 'memry': use model, memory, "
        "fraction, capability; did you mean memory?",
    ),
    "fraction of two GPUs": (
        reserved(devices=(DeviceRequest(count=2, driver="nvidia", options={"fraction": "0.5"}),)),
        "only one GPU can be shared",
    ),
    "too many GPUs": (
        reserved(devices=(DeviceRequest(count=65, capabilities=("gpu",)),)),
        "devices[0].count: 65 GPUs are asked for: a task can have at most 64",
    ),
    "requests that differ": (
        reserved(
            devices=(
                DeviceRequest(count=1, capabilities=("gpu",), options={"model": "A100"}),
                DeviceRequest(count=1, capabilities=("gpu",), options={"model": "H100"}),
            )
        ),
        "reservations.devices: GPU option model: the task's requests for GPUs say different",
    ),
    "fraction beside a counted kind": (
        reserved(
            devices=(DeviceRequest(capabilities=("gpu",), options={"fraction": "0.5"}),),
            generic=(GenericResource(kind="NVIDIA-GPU", count=1),),
        ),
        "reservations.devices: GPU option fraction",
    ),
    # placement
    "constraint": (placed(constraints=("node.role=manager",)), "placement.constraints[0]: "),
    "constraint key": (placed(constraints=("node.rol == manager",)), "did you mean node.role?"),
    "preference": (
        placed(preferences=(PlacementPreference(spread="zone"),)),
        "placement.preferences[0].spread: ",
    ),
    "constraint list": (
        placed(constraints=("node.labels.zone in a",)),
        "placement.constraints[0]: constraint 'node.labels.zone in a': a list stands in",
    ),
    "constraint pattern": (
        placed(constraints=("node.hostname =~ (web",)),
        "is not a regular expression: a ( is not closed",
    ),
    "constraint order": (
        placed(constraints=("node.labels.disks >= many",)),
        "'many' is not a number",
    ),
    "affinity": (
        placed(preferences=(PlacementPreference(affinity="node.zone == a"),)),
        "placement.preferences[0].affinity: affinity 'node.zone == a': unknown key",
    ),
    "preference for two things": (
        placed(preferences=(PlacementPreference(spread="node.id", affinity="node.id == a"),)),
        "placement.preferences[0]: spread and affinity exclude each other",
    ),
    "preference for nothing": (
        placed(preferences=(PlacementPreference(),)),
        "placement.preferences[0].spread: ",
    ),
    "spread over services": (
        placed(preferences=(PlacementPreference(spread="service.name"),)),
        "unknown key 'service.name'",
    ),
    "weight of a spread": (
        placed(preferences=(PlacementPreference(spread="node.id", weight=3),)),
        "placement.preferences[0].weight: only an affinity has a weight",
    ),
    "weight": (
        placed(preferences=(PlacementPreference(affinity="stack.name == a", weight=101),)),
        "placement.preferences[0].weight: 101 is not from -100 to 100",
    ),
    "many affinities": (
        placed(preferences=(PlacementPreference(affinity="stack.name == a"),) * 65),
        "placement.preferences: 65 affinities are more than the limit of 64",
    ),
    "strategy": (
        placed(strategy="binpak"),
        "placement.strategy: 'binpak' is not one of spread, binpack; did you mean 'binpack'?",
    ),
    "max replicas of a global": (
        service(
            mode=ServiceMode(global_service=Global()), task={"placement": Placement(max_replicas=1)}
        ),
        "placement.max_replicas_per_node: only services with a number of replicas",
    ),
    # ports
    "target port 0": (service(ports=[port(80, target=0)]), "ports[0].target: 0 is not a port"),
    "published port too high": (
        service(ports=[port(99999)]),
        "ports[0].published: 99999 is not a port",
    ),
    "port twice": (
        service(ports=[port(80), port(80, target=81)]),
        "ports[1].published: port 80/tcp is published twice (also ports[0])",
    ),
    "host and ingress port": (
        service(ports=[port(80, publish_mode="host", host_ip="127.0.0.1"), port(80)]),
        "ports[1].published: port 80/tcp is published twice (also ports[0])",
    ),
    "protocol": (
        service(ports=[port(80, protocol="icmp")]),
        "ports[0].protocol: 'icmp' is not one of tcp, udp, sctp",
    ),
    "sctp over nodes": (
        service(ports=[port(80, protocol="sctp")]),
        "sctp cannot be balanced over nodes",
    ),
    "port mode": (
        service(ports=[port(80, publish_mode="ingres")]),
        "ports[0].mode: 'ingres' is not one of ingress, host; did you mean 'ingress'?",
    ),
    "address of an ingress port": (
        service(ports=[port(80, host_ip="10.0.0.1")]),
        "an address needs mode: host",
    ),
    "dnsrr with ingress": (
        service(endpoint=EndpointSpec(mode="dnsrr", ports=(port(80),))),
        "ports[0].mode: endpoint_mode dnsrr has no ingress ports",
    ),
    "endpoint mode": (
        service(endpoint=EndpointSpec(mode="x")),
        "endpoint_mode: 'x' is not one of vip, dnsrr",
    ),
    "host network and its own port": (
        service(container={"network_mode": "host"}, ports=[port(80, target=80)]),
        "ports[0].published: with network_mode: host the task itself listens on port 80",
    ),
    "no network and a port": (
        service(container={"network_mode": "none"}, ports=[port(80)]),
        "ports: a task with network_mode: none has no network",
    ),
    # mounts
    "mount target": (
        mounted(Mount(type="volume", source="v", target="data")),
        "mounts[0].target: 'data' must be an absolute path",
    ),
    "mount without a target": (
        mounted(Mount(type="volume")),
        "mounts[0].target: the path inside the task is missing",
    ),
    "mount over the root": (
        mounted(Mount(type="tmpfs", target="/")),
        "cannot take the place of the task's root",
    ),
    "bind without a source": (
        mounted(Mount(type="bind", target="/d")),
        "mounts[0].source: a bind mount needs the path on the node",
    ),
    "bind with a relative source": (
        mounted(Mount(type="bind", source="./d", target="/d")),
        "mounts[0].source: './d' must be an absolute path on the node",
    ),
    "tmpfs with a source": (
        mounted(Mount(type="tmpfs", source="x", target="/d")),
        "a tmpfs mount has no source",
    ),
    "volume with a path": (
        mounted(Mount(type="volume", source="/x", target="/d")),
        "is a path; a volume has a name",
    ),
    "mount type": (
        mounted(Mount(type="nfs", target="/d")),
        "mounts[0].type: 'nfs' is not one of bind, volume, tmpfs, image",
    ),
    "cluster mount": (mounted(Mount(type="cluster", target="/d")), "are not offered"),
    "mount target twice": (
        mounted(Mount(type="tmpfs", target="/d"), Mount(type="tmpfs", target="/d/")),
        "mounts[1].target: /d is a target twice (also mounts[0])",
    ),
    "options of another mount": (
        mounted(
            Mount(type="bind", source="/s", target="/d", tmpfs_options=TmpfsOptions(size_bytes=1))
        ),
        "mounts[0].tmpfs_options: a bind mount has no tmpfs options",
    ),
    "propagation": (
        mounted(
            Mount(type="bind", source="/s", target="/d", bind_options=BindOptions(propagation="x"))
        ),
        "mounts[0].bind.propagation: 'x' is not one of private",
    ),
    # container
    "env template": (
        container(env=("A={{.Task.Solt}}",)),
        "environment A: line 1, column 3: there is no field 'Solt'; did you mean 'Slot'?",
    ),
    "hostname template": (
        container(hostname="a-{{.Task.Slot}"),
        "hostname: line 1, column 15: '}' cannot be read here",
    ),
    "mount template": (
        mounted(Mount(type="volume", source="{{foo}}", target="/d")),
        "mount /d: source: line 1, column 3: there is no function 'foo'",
    ),
    "env": (container(env=("=x",)), "environment[0]: '=x' is not of the form NAME=value or NAME"),
    "hosts": (
        container(hosts=("db 10.0.0.5",)),
        "extra_hosts[0]: 'db 10.0.0.5' is not an address and a name",
    ),
    "dns": (
        container(dns=DnsConfig(nameservers=("one.one",))),
        "dns[0]: 'one.one' is not an IP address",
    ),
    "signal": (container(stop_signal="SIGNOPE"), "stop_signal: 'SIGNOPE' is not a signal"),
    "grace": (
        container(stop_grace_period_ns=-1),
        "stop_grace_period: a duration cannot be negative",
    ),
    "working dir": (container(dir="app"), "working_dir: 'app' must be an absolute path"),
    "pull policy": (
        container(pull_policy="ifnotpresent"),
        "pull_policy: 'ifnotpresent' is not one of",
    ),
    "network mode": (
        container(network_mode="bridge"),
        "network_mode: 'bridge' is not one of host, none",
    ),
    "oom score": (container(oom_score_adj=2000), "oom_score_adj: 2000 is not from -1000 to 1000"),
    "ulimit": (
        container(ulimits=(Ulimit(name="nofile", soft=10, hard=5),)),
        "ulimits[0]: nofile: soft (10) is above hard (5)",
    ),
    "ulimit twice": (
        container(ulimits=(Ulimit(name="nofile"), Ulimit(name="nofile"))),
        "ulimits: 'nofile' is given twice",
    ),
    "health test": (
        health(test=("true",)),
        "healthcheck.test: 'true' must be NONE, CMD or CMD-SHELL",
    ),
    "health test of nothing": (
        health(test=("CMD",)),
        "healthcheck.test: CMD needs a command after it",
    ),
    "health interval": (
        health(interval_ns=10),
        "healthcheck.interval: a duration below 1ms is too short",
    ),
    "health retries": (
        health(retries=-1),
        "healthcheck.retries: a number of tries cannot be negative",
    ),
    # what it refers to
    "network": (
        service(task={"networks": (NetworkAttachmentSpec(target="front"),)}),
        "networks[0]: network 'front' not found; create it first",
    ),
    "network of each engine": (
        service(task={"networks": (NetworkAttachmentSpec(target="host"),)}),
        "set network_mode: host",
    ),
    "network twice": (
        service(
            task={
                "networks": (NetworkAttachmentSpec(target="a"), NetworkAttachmentSpec(target="a"))
            }
        ),
        "networks[1]: network 'a' is named twice",
    ),
    "secret": (
        container(secrets=(SecretReference(secret_name="key"),)),
        "secrets[0]: secret 'key' not found; create it first",
    ),
    "config": (
        with_config(FileTarget(name="/c")),
        "configs[0]: config 'c' not found; create it first",
    ),
    "file path": (
        with_config(FileTarget(name="../c")),
        "configs[0].target: '../c' must not contain '..'",
    ),
    "file owner": (
        with_config(FileTarget(name="/c", uid="root")),
        "configs[0].uid: 'root' is not a number",
    ),
    "runtime config with a file": (
        with_config(FileTarget(name="/c"), runtime=True),
        "a config that the runtime uses does not appear as a file",
    ),
    "file twice": (
        container(
            secrets=(
                SecretReference(secret_name="a", file=FileTarget(name="x")),
                SecretReference(secret_name="b", file=FileTarget(name="/run/secrets/x")),
            )
        ),
        "secrets[1].target: /run/secrets/x is a target twice (also secrets[0])",
    ),
    "dependency": (
        service(depends_on=(Dependency(service="db", condition="service_started", required=True),)),
        "depends_on[0]: service 'db' not found",
    ),
    "dependency on itself": (
        service(depends_on=(Dependency(service="web", condition="service_started"),)),
        "depends_on[0]: a service cannot wait for itself",
    ),
    "dependency condition": (
        service(depends_on=(Dependency(service="db", condition="healthy"),)),
        "depends_on[0].condition: 'healthy' is not one of service_started",
    ),
}


@pytest.mark.parametrize(("spec", "message"), BAD.values(), ids=BAD)
async def test_refused_with_object_field_and_reason(api: Api, spec: ServiceSpec, message: str):
    before = api.store.revision
    with pytest.raises(errors.Invalid) as caught:
        await api.create(service=spec)
    assert message in caught.value.message
    assert f'service "{spec.name}"' in caught.value.message
    assert api.store.revision == before


GOOD: dict[str, ServiceSpec] = {
    "dotted name": service("a.b_c-d"),
    "global": service(mode=ServiceMode(global_service=Global())),
    "global job": service(mode=ServiceMode(global_job=GlobalJob())),
    "no replicas": service(replicas=0),
    "host ports on two addresses": service(
        ports=[
            port(80, publish_mode="host", host_ip="127.0.0.1"),
            port(80, publish_mode="host", host_ip="127.0.0.2"),
        ]
    ),
    "tcp and udp": service(ports=[port(53), port(53, protocol="udp")]),
    "all devices": reserved(devices=(DeviceRequest(count=-1, capabilities=("gpu",)),)),
    "health off": health(test=("NONE",)),
    "real-time signal": container(stop_signal="SIGRTMIN+3"),
    "signal number": container(stop_signal="9"),
    "host gateway": container(hosts=("host-gateway host.internal",)),
    "templates": container(hostname="{{.Node.Hostname}}", env=("A={{.Task.Slot}}", "B", "C=")),
    "templates that hang on the task": container(
        env=("A={{.Service.Labels.x}}{{slice .Node.Hostname 0 9}}",)
    ),
    "template for a path": mounted(
        Mount(type="bind", source="{{.Service.Labels.path}}", target="{{.Service.Labels.path}}")
    ),
    "anonymous volume": mounted(Mount(type="volume", target="/data")),
    "unlimited ulimit": container(ulimits=(Ulimit(name="memlock", soft=-1, hard=-1),)),
    "empty options of another mount": mounted(
        Mount(type="bind", source="/s", target="/d", tmpfs_options=TmpfsOptions())
    ),
    "optional dependency": service(
        depends_on=(Dependency(service="db", condition="service_healthy"),)
    ),
    "constraints": placed(constraints=("node.role == manager", "node.labels.zone != a")),
    "all sorts of constraints": placed(
        constraints=(
            "node.labels.zone in (a, b)",
            "node.labels.zone not in (c)",
            "node.gpu.memory >= 40GiB",
            "node.hostname =~ web-[0-9]+",
            "service.name != db",
        ),
        strategy="binpack",
    ),
    "preferences": placed(
        preferences=(
            PlacementPreference(spread="node.gpu.model"),
            PlacementPreference(affinity="service.labels.tier in (1, 2)", weight=-100),
            PlacementPreference(affinity="node.labels.disks > 2"),
        )
    ),
}


@pytest.mark.parametrize("spec", GOOD.values(), ids=GOOD)
async def test_accepted(api: Api, spec: ServiceSpec):
    await api.create(service=spec)


async def test_all_problems_are_told_at_once(api: Api):
    spec = service(
        "we b",
        container={"image": "", "env": ("=x",)},
        ports=[port(70000), port(80, protocol="x")],
        update=UpdateConfig(order="x"),
    )
    with pytest.raises(errors.Invalid) as caught:
        await api.create(service=spec)
    lines = caught.value.message.splitlines()
    assert lines[0] == "6 problems:"
    fields = [line.strip().split(": ")[1] for line in lines[1:]]
    assert fields == [
        "name",
        "image",
        "environment[0]",
        "update_config.order",
        "ports[0].published",
        "ports[1].protocol",
    ]


async def test_message_of_very_many_problems_stays_short(api: Api):
    with pytest.raises(errors.Invalid) as caught:
        await api.create(service=container(env=tuple("=" * 300 for _ in range(1000))))
    assert caught.value.message.startswith("1000 problems:")
    assert "more" in caught.value.message.splitlines()[-1]
    assert len(caught.value.message) < 4500


async def test_host_port_with_start_first_warns(api: Api):
    spec = service(ports=[port(80, publish_mode="host")], update=UpdateConfig(order="start-first"))
    response = await api.control.create(CreateRequest(spec=Spec(service=spec)), CONTEXT)
    assert "start-first stops the old one first where no other node is free" in response.warnings[0]
