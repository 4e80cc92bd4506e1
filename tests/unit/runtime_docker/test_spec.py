"""From a task to the engine's words: every field arrives, and what cannot be said is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from agent.gpus import Handover, as_claimed
from agent.runtime.base import Rejected, Work
from agent.runtime.docker.facts import Facts
from agent.runtime.docker.spec import body_for, plan_container
from swarm.v1 import (
    AppArmorOpts,
    Assignment,
    ContainerSpec,
    CredentialSpec,
    DeviceMapping,
    DeviceRequest,
    DnsConfig,
    Driver,
    GenericResource,
    HealthConfig,
    Mount,
    Network,
    NetworkAttachment,
    NetworkAttachmentSpec,
    NetworkSpec,
    PortConfig,
    Privileges,
    ResourceRequirements,
    Resources,
    SeccompOpts,
    SeLinuxContext,
    Task,
    TaskSpec,
    Ulimit,
)

NEW = Facts(api=(1, 48), runtimes=frozenset({"runc", "runsc"}), selinux=True, apparmor=True)
OLD = Facts(api=(1, 41))
NET = Network(id="net1", spec=NetworkSpec(name="app_default"))
NET2 = Network(id="net2", spec=NetworkSpec(name="app_back"))


def work(
    container: ContainerSpec | None = None,
    *,
    task: Task | None = None,
    networks: tuple[NetworkAttachmentSpec, ...] = (),
    ports: tuple[PortConfig, ...] = (),
    **spec: Any,
) -> Work:
    container = container or ContainerSpec()
    return Work(
        Assignment(
            task=task or Task(id="t1", service_id="s1"),
            service_name="app_web",
            name="app_web.1.t1",
            spec=TaskSpec(
                container=replace(container, image=container.image or "web"),
                networks=networks,
                **spec,
            ),
            ports=ports,
        ),
        networks={n.id: n for n in (NET, NET2)},
    )


def body(given: Work, facts: Facts = NEW, gpus: Handover | None = None) -> dict[str, Any]:
    plan = plan_container(given, facts, node_id="n1", cluster_id="c1", gpus=gpus)
    ids = [a.built_in or f"engine-{a.network.id}" for a in plan.attachments]  # type: ignore[union-attr]
    return body_for(plan, ids, (), facts)[0]


def refused(given: Work, facts: Facts = NEW) -> str:
    with pytest.raises(Rejected) as caught:
        plan_container(given, facts, node_id="n1", cluster_id="c1")
    return caught.value.message


CONFIG_FIELDS: dict[str, tuple[ContainerSpec, dict[str, Any]]] = {
    "command": (ContainerSpec(command=("a", "b")), {"Entrypoint": ["a", "b"]}),
    "args": (ContainerSpec(args=("a", "b")), {"Cmd": ["a", "b"]}),
    "hostname": (ContainerSpec(hostname="h"), {"Hostname": "h"}),
    "domainname": (ContainerSpec(domainname="d"), {"Domainname": "d"}),
    "env": (ContainerSpec(env=("A=1", "B")), {"Env": ["A=1", "B"]}),
    "dir": (ContainerSpec(dir="/x"), {"WorkingDir": "/x"}),
    "user": (ContainerSpec(user="1:2"), {"User": "1:2"}),
    "tty": (ContainerSpec(tty=True), {"Tty": True}),
    "open_stdin": (ContainerSpec(open_stdin=True), {"OpenStdin": True}),
    "stop_signal": (ContainerSpec(stop_signal="SIGINT"), {"StopSignal": "SIGINT"}),
    "stop_grace_rounds_up": (ContainerSpec(stop_grace_period_ns=1_500_000_000), {"StopTimeout": 2}),
    "stop_grace_zero": (ContainerSpec(stop_grace_period_ns=0), {"StopTimeout": 0}),
    "stop_grace_default": (ContainerSpec(), {"StopTimeout": 10}),
    "expose": (
        ContainerSpec(expose=("80", "53/udp", "90-91")),
        {"ExposedPorts": {"80/tcp": {}, "53/udp": {}, "90/tcp": {}, "91/tcp": {}}},
    ),
    "healthcheck": (
        ContainerSpec(
            healthcheck=HealthConfig(
                test=("CMD", "x"),
                interval_ns=1,
                timeout_ns=2,
                start_period_ns=3,
                start_interval_ns=4,
                retries=5,
            )
        ),
        {
            "Healthcheck": {
                "Test": ["CMD", "x"],
                "Interval": 1,
                "Timeout": 2,
                "StartPeriod": 3,
                "StartInterval": 4,
                "Retries": 5,
            }
        },
    ),
    "healthcheck_none": (
        ContainerSpec(healthcheck=HealthConfig(test=("NONE",))),
        {
            "Healthcheck": {
                "Test": ["NONE"],
                "Interval": 0,
                "Timeout": 0,
                "StartPeriod": 0,
                "Retries": 0,
            }
        },
    ),
}

HOST_FIELDS: dict[str, tuple[ContainerSpec, dict[str, Any]]] = {
    "read_only": (ContainerSpec(read_only=True), {"ReadonlyRootfs": True}),
    "privileged": (ContainerSpec(privileged=True), {"Privileged": True}),
    "init": (ContainerSpec(init=True), {"Init": True}),
    "init_off": (ContainerSpec(init=False), {"Init": False}),
    "groups": (ContainerSpec(groups=("video",)), {"GroupAdd": ["video"]}),
    "hosts": (
        ContainerSpec(hosts=("1.2.3.4 a b", "::1 c")),
        {"ExtraHosts": ["a:1.2.3.4", "b:1.2.3.4", "c:::1"]},
    ),
    "dns": (
        ContainerSpec(dns=DnsConfig(nameservers=("1.1.1.1",), search=("x",), options=("o",))),
        {"Dns": ["1.1.1.1"], "DnsSearch": ["x"], "DnsOptions": ["o"]},
    ),
    "sysctls": (ContainerSpec(sysctls={"a": "1"}), {"Sysctls": {"a": "1"}}),
    "caps": (
        ContainerSpec(capability_add=("CAP_X",), capability_drop=("ALL",)),
        {"CapAdd": ["CAP_X"], "CapDrop": ["ALL"]},
    ),
    "ulimits": (
        ContainerSpec(ulimits=(Ulimit(name="nofile", soft=1, hard=2),)),
        {"Ulimits": [{"Name": "nofile", "Soft": 1, "Hard": 2}]},
    ),
    "oom": (
        ContainerSpec(oom_score_adj=-5, oom_kill_disable=True),
        {"OomScoreAdj": -5, "OomKillDisable": True},
    ),
    "shm": (ContainerSpec(shm_size_bytes=5), {"ShmSize": 5}),
    "modes": (
        ContainerSpec(
            ipc_mode="private",
            pid_mode="host",
            userns_mode="host",
            uts_mode="host",
            cgroupns_mode="private",
        ),
        {
            "IpcMode": "private",
            "PidMode": "host",
            "UsernsMode": "host",
            "UTSMode": "host",
            "CgroupnsMode": "private",
        },
    ),
    "network_host": (ContainerSpec(network_mode="host"), {"NetworkMode": "host"}),
    "network_none": (ContainerSpec(network_mode="none"), {"NetworkMode": "none"}),
    "cgroup_parent": (ContainerSpec(cgroup_parent="/x"), {"CgroupParent": "/x"}),
    "storage_opt": (ContainerSpec(storage_opt={"size": "1G"}), {"StorageOpt": {"size": "1G"}}),
    "annotations": (ContainerSpec(annotations={"a": "b"}), {"Annotations": {"a": "b"}}),
    "isolation": (ContainerSpec(isolation="default"), {"Isolation": "default"}),
    "cpu": (ContainerSpec(cpuset="0", cpu_shares=5), {"CpusetCpus": "0", "CpuShares": 5}),
    "memory": (
        ContainerSpec(memory_swap_bytes=-1, memory_reservation_bytes=7, memory_swappiness=0),
        {"MemorySwap": -1, "MemoryReservation": 7, "MemorySwappiness": 0},
    ),
    "device_rules": (
        ContainerSpec(device_cgroup_rules=("c 1:3 r",)),
        {"DeviceCgroupRules": ["c 1:3 r"]},
    ),
    "devices": (
        ContainerSpec(
            devices=(
                DeviceMapping(source="/dev/a"),
                DeviceMapping(source="/dev/b", target="/dev/c", permissions="r"),
            )
        ),
        {
            "Devices": [
                {"PathOnHost": "/dev/a", "PathInContainer": "/dev/a", "CgroupPermissions": "rwm"},
                {"PathOnHost": "/dev/b", "PathInContainer": "/dev/c", "CgroupPermissions": "r"},
            ]
        },
    ),
    "cdi_device": (
        ContainerSpec(devices=(DeviceMapping(source="vendor.com/class=name"),)),
        {"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["vendor.com/class=name"]}]},
    ),
    "security_opt": (
        ContainerSpec(security_opt=("seccomp=unconfined", "no-new-privileges")),
        {"SecurityOpt": ["seccomp=unconfined", "no-new-privileges"]},
    ),
    "privileges": (
        ContainerSpec(
            privileges=Privileges(
                no_new_privileges=True,
                seccomp=SeccompOpts(mode="custom", profile=b'{ "a": 1 }'),
                apparmor=AppArmorOpts(mode="disabled"),
                selinux_context=SeLinuxContext(type="t", level="s0"),
            )
        ),
        {
            "SecurityOpt": [
                "label=type:t",
                "label=level:s0",
                'seccomp={"a": 1}',
                "apparmor=unconfined",
                "no-new-privileges:true",
            ]
        },
    ),
    "selinux_disabled": (
        ContainerSpec(privileges=Privileges(selinux_context=SeLinuxContext(disable=True))),
        {"SecurityOpt": ["label=disable"]},
    ),
}


@pytest.mark.parametrize(("container", "expected"), CONFIG_FIELDS.values(), ids=CONFIG_FIELDS)
def test_field_reaches_the_container_config(
    container: ContainerSpec, expected: dict[str, Any]
) -> None:
    made = body(work(container))
    assert {key: made.get(key) for key in expected} == expected


@pytest.mark.parametrize(("container", "expected"), HOST_FIELDS.values(), ids=HOST_FIELDS)
def test_field_reaches_the_host_config(container: ContainerSpec, expected: dict[str, Any]) -> None:
    made = body(work(container))["HostConfig"]
    assert {key: made.get(key) for key in expected} == expected


def test_unset_fields_are_left_to_the_engine() -> None:
    made = body(work())
    assert set(made) == {
        *("Image", "Env", "Tty", "OpenStdin", "StopTimeout", "Labels", "ExposedPorts", "HostConfig")
    }
    assert set(made["HostConfig"]) == {"RestartPolicy", "Mounts", "Privileged", "ReadonlyRootfs"}


def test_every_field_of_a_container_is_known_here() -> None:
    """A field added to the contract must be honoured or refused, so it must be looked at here."""
    covered = {
        *("image", "labels", "command", "args", "hostname", "env", "dir", "user", "groups"),
        *("privileges", "init", "stop_signal", "tty", "open_stdin", "read_only", "mounts"),
        *("stop_grace_period_ns", "healthcheck", "hosts", "dns", "isolation", "sysctls"),
        *("capability_add", "capability_drop", "ulimits", "oom_score_adj", "privileged"),
        *("devices", "shm_size_bytes", "ipc_mode", "pid_mode", "userns_mode", "uts_mode"),
        *("cgroupns_mode", "network_mode", "security_opt", "cgroup_parent", "domainname"),
        *("mac_address", "oom_kill_disable", "pull_policy", "platform", "expose", "annotations"),
        *("storage_opt", "cpuset", "cpu_shares", "memory_swap_bytes", "memory_reservation_bytes"),
        *("memory_swappiness", "device_cgroup_rules"),
        *("secrets", "configs"),  # become Work.files
    }
    assert set(ContainerSpec.__struct_fields__) == covered


def test_limits_are_the_engines_and_reservations_are_not() -> None:
    made = body(
        work(
            resources=ResourceRequirements(
                limits=Resources(cpu_nano=100_000_000, memory_bytes=1000, pids=9),
                reservations=Resources(cpu_nano=5, memory_bytes=5),
                swap_bytes=500,
                memory_swappiness=10,
            )
        )
    )["HostConfig"]
    wanted = {
        "NanoCpus": 100_000_000,
        "Memory": 1000,
        "PidsLimit": 9,
        "MemorySwap": 1500,
        "MemorySwappiness": 10,
    }
    assert {key: made.get(key) for key in wanted} == wanted
    assert "MemoryReservation" not in made


def test_labels_are_dockers_and_ours_and_cannot_be_forged() -> None:
    forged = {"x": "y", "com.docker.swarm.task.id": "other", "swarm-py.node.id": "other"}
    assert body(work(ContainerSpec(labels=forged)))["Labels"] == {
        "x": "y",
        "com.docker.swarm.node.id": "n1",
        "com.docker.swarm.service.id": "s1",
        "com.docker.swarm.service.name": "app_web",
        "com.docker.swarm.task": "",
        "com.docker.swarm.task.id": "t1",
        "com.docker.swarm.task.name": "app_web.1.t1",
        "swarm-py.node.id": "n1",
        "swarm-py.cluster.id": "c1",
    }


# ------------------------------------------------------------------ GPUs and other resources


def test_gpus_are_passed_by_uuid_and_in_the_environment() -> None:
    claim = DeviceRequest(driver="nvidia", count=2, capabilities=("gpu", "utility"))
    made = body(
        work(
            ContainerSpec(env=("NVIDIA_VISIBLE_DEVICES=all", "A=1")),
            task=Task(id="t1", assigned_gpus=("GPU-1", "GPU-2")),
            resources=ResourceRequirements(reservations=Resources(devices=(claim,))),
        )
    )
    assert made["Env"] == ["A=1", "NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2"]
    assert made["HostConfig"]["DeviceRequests"] == [
        {
            "Driver": "nvidia",
            "DeviceIDs": ["GPU-1", "GPU-2"],
            "Capabilities": [["gpu", "utility"]],
            "Options": {},
        }
    ]


def test_a_part_of_a_gpu_comes_with_what_mps_needs() -> None:
    claim = DeviceRequest(count=1, capabilities=("gpu",), options={"fraction": "0.5"})
    resources = ResourceRequirements(reservations=Resources(devices=(claim,)))
    given = Handover(uuids=("G",), cuda=("G",), hide=True, mps="/run/mps")
    task = Task(id="t1", assigned_gpus=("G",))
    container = ContainerSpec(env=("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=100",))
    made = body(work(container, task=task, resources=resources), gpus=given)
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=50" in made["Env"]
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=100" not in made["Env"]
    assert [m["Target"] for m in made["HostConfig"]["Mounts"]] == ["/run/mps", "/dev/shm"]
    assert made["HostConfig"]["DeviceRequests"][0]["Options"] == {}
    own = Mount(type="tmpfs", target="/dev/shm")
    made = body(work(ContainerSpec(mounts=(own,)), task=task, resources=resources), gpus=given)
    assert [m["Target"] for m in made["HostConfig"]["Mounts"]].count("/dev/shm") <= 1
    made = body(work(ContainerSpec(ipc_mode="host"), task=task, resources=resources), gpus=given)
    assert [m["Target"] for m in made["HostConfig"]["Mounts"]] == ["/run/mps"]


def test_a_task_without_gpus_sees_none_where_the_runtime_would_give_them() -> None:
    given = work(ContainerSpec(env=("NVIDIA_VISIBLE_DEVICES=all",)))
    assert body(given, Facts(nvidia=True))["Env"] == ["NVIDIA_VISIBLE_DEVICES=void"]


def with_gpus(given: Work, gpus: Handover, facts: Facts = NEW) -> dict[str, Any]:
    return plan_container(given, facts, node_id="n1", cluster_id="c1", gpus=gpus).body


def test_a_task_without_gpus_sees_none_on_a_node_that_has_some() -> None:
    made = with_gpus(work(ContainerSpec(env=("NVIDIA_VISIBLE_DEVICES=all",))), Handover(hide=True))
    assert made["Env"] == ["NVIDIA_VISIBLE_DEVICES=void"]
    assert "DeviceRequests" not in made["HostConfig"]
    assert with_gpus(work(), Handover())["Env"] == []


def test_gpus_of_other_vendors_are_passed_by_cdi_name_or_device_node() -> None:
    claim = DeviceRequest(driver="amd", count=3, capabilities=("gpu",), options={"model": "MI300X"})
    given = Handover(
        cdi=("amd.com/gpu=1",), nodes=("/dev/kfd",), env={"ROCR_VISIBLE_DEVICES": "1"}, hide=True
    )
    made = with_gpus(
        work(
            ContainerSpec(env=("ROCR_VISIBLE_DEVICES=0,1", "A=1")),
            resources=ResourceRequirements(reservations=Resources(devices=(claim,))),
        ),
        given,
    )
    assert made["Env"] == ["A=1", "ROCR_VISIBLE_DEVICES=1", "NVIDIA_VISIBLE_DEVICES=void"]
    host = made["HostConfig"]
    assert host["DeviceRequests"] == [{"Driver": "cdi", "DeviceIDs": ["amd.com/gpu=1"]}]
    assert [d["PathOnHost"] for d in host["Devices"]] == ["/dev/kfd"]


def test_options_that_choose_a_gpu_are_not_the_engines() -> None:
    claim = DeviceRequest(capabilities=("gpu",), options={"memory": "40GiB", "mine": "1"})
    made = with_gpus(
        work(resources=ResourceRequirements(reservations=Resources(devices=(claim,)))),
        as_claimed(("GPU-1",)),
    )
    assert made["HostConfig"]["DeviceRequests"][0]["Options"] == {"mine": "1"}


def test_a_gpu_that_is_not_here_any_more_is_told() -> None:
    with pytest.raises(Rejected, match="GPU GPU-1 is not on this node any more"):
        with_gpus(work(), Handover(missing=("GPU-1",)))


def test_generic_resources_are_told_as_docker_does() -> None:
    task = Task(
        id="t1",
        assigned_generic=(
            GenericResource(kind="ssd", count=3),
            GenericResource(kind="fpga", name="f1"),
            GenericResource(kind="fpga", name="f2"),
        ),
    )
    assert body(work(task=task))["Env"] == ["DOCKER_RESOURCE_FPGA=f1,f2", "DOCKER_RESOURCE_SSD=3"]


def test_other_device_claims_are_passed_on() -> None:
    claim = DeviceRequest(driver="x", count=-1, capabilities=("tpu",), options={"a": "b"})
    made = body(work(resources=ResourceRequirements(reservations=Resources(devices=(claim,)))))
    assert made["HostConfig"]["DeviceRequests"] == [
        {
            "Driver": "x",
            "Count": -1,
            "DeviceIDs": [],
            "Capabilities": [["tpu"]],
            "Options": {"a": "b"},
        }
    ]


# ------------------------------------------------------------------ networks, ports, logs, runtime


def test_networks_are_attached_by_priority_with_their_aliases() -> None:
    given = work(
        networks=(
            NetworkAttachmentSpec(target="app_back", aliases=("back",)),
            NetworkAttachmentSpec(
                target="net1",
                aliases=("web", "app_web"),
                priority=5,
                ipv4_address="10.0.0.9",
                driver_opts={"o": "1"},
            ),
        ),
        task=Task(
            id="t1", networks=(NetworkAttachment(network_id="net2", addresses=("10.2.0.3/24",)),)
        ),
    )
    made = body(given)
    assert made["HostConfig"]["NetworkMode"] == "engine-net1"
    assert list(made["NetworkingConfig"]["EndpointsConfig"].items()) == [
        (
            "engine-net1",
            {
                "Aliases": ["web", "app_web", "app_web.1.t1"],
                "IPAMConfig": {"IPv4Address": "10.0.0.9"},
                "DriverOpts": {"o": "1"},
            },
        ),
        (
            "engine-net2",
            {
                "Aliases": ["back", "app_web", "app_web.1.t1"],
                "IPAMConfig": {"IPv4Address": "10.2.0.3"},
            },
        ),
    ]


def test_an_old_engine_gets_further_networks_afterwards() -> None:
    given = work(
        networks=(NetworkAttachmentSpec(target="net1"), NetworkAttachmentSpec(target="net2"))
    )
    plan = plan_container(given, OLD, node_id="n1", cluster_id="c1")
    made, later = body_for(plan, ["e1", "e2"], (), OLD)
    assert list(made["NetworkingConfig"]["EndpointsConfig"]) == ["e1"]
    assert [name for name, _ in later] == ["e2"]


@pytest.mark.parametrize(
    ("facts", "where"), [(OLD, "container"), (NEW, "endpoint")], ids=["old", "new"]
)
def test_the_mac_address_goes_where_the_engine_takes_it(facts: Facts, where: str) -> None:
    given = work(
        ContainerSpec(mac_address="02:00:00:00:00:01"),
        networks=(NetworkAttachmentSpec(target="net1"),),
    )
    made = body(given, facts)
    endpoint = made["NetworkingConfig"]["EndpointsConfig"]["engine-net1"]
    assert (made.get("MacAddress") is not None) == (where == "container")
    assert (endpoint.get("MacAddress") is not None) == (where == "endpoint")


def test_only_host_ports_are_published_by_the_engine() -> None:
    ports = (
        PortConfig(target_port=80, published_port=8080, publish_mode="host", host_ip="127.0.0.1"),
        PortConfig(target_port=53, protocol="udp", publish_mode="host"),
        PortConfig(target_port=81, published_port=4000, publish_mode="ingress"),
    )
    made = body(work(ports=ports))
    assert made["HostConfig"]["PortBindings"] == {
        "80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}],
        "53/udp": [{"HostIp": "", "HostPort": ""}],
    }
    assert made["ExposedPorts"] == {"80/tcp": {}, "53/udp": {}}


def test_log_driver_and_runtime() -> None:
    made = body(work(log_driver=Driver(name="local", options={"max-size": "1m"}), runtime="runsc"))
    assert made["HostConfig"]["LogConfig"] == {"Type": "local", "Config": {"max-size": "1m"}}
    assert made["HostConfig"]["Runtime"] == "runsc"
    assert "Runtime" not in body(work(runtime="docker"))["HostConfig"]


# ------------------------------------------------------------------ refusals


REFUSED: dict[str, tuple[Work, Facts, str]] = {
    "annotations": (work(ContainerSpec(annotations={"a": "b"})), OLD, "annotations needs"),
    "cdi": (work(ContainerSpec(devices=(DeviceMapping(source="v.com/c=n"),))), OLD, "CDI device"),
    "runtime": (work(runtime="kata"), OLD, "no runtime 'kata'; it has runc"),
    "unknown_network": (
        work(networks=(NetworkAttachmentSpec(target="nope"),)),
        OLD,
        "network 'nope' is not known",
    ),
    "network_mode": (work(ContainerSpec(network_mode="container:x")), OLD, "network_mode"),
    "host_and_networks": (
        work(ContainerSpec(network_mode="host"), networks=(NetworkAttachmentSpec(target="net1"),)),
        OLD,
        "cannot be combined with networks",
    ),
    "host_port_differs": (
        work(
            ContainerSpec(network_mode="host"),
            ports=(PortConfig(target_port=80, published_port=81, publish_mode="host"),),
        ),
        OLD,
        "cannot be published as 81",
    ),
    "credential_spec": (
        work(ContainerSpec(privileges=Privileges(credential_spec=CredentialSpec(file="x")))),
        NEW,
        "Windows only",
    ),
    "seccomp_json": (
        work(
            ContainerSpec(
                privileges=Privileges(seccomp=SeccompOpts(mode="custom", profile=b"{oops"))
            )
        ),
        NEW,
        "not JSON",
    ),
    "selinux_missing": (
        work(ContainerSpec(privileges=Privileges(selinux_context=SeLinuxContext(type="t")))),
        OLD,
        "no SELinux",
    ),
    "apparmor_missing": (work(ContainerSpec(security_opt=("apparmor=x",))), OLD, "no AppArmor"),
    "pull_policy": (work(ContainerSpec(pull_policy="sometimes")), NEW, "pull_policy 'sometimes'"),
    "no_healthchecks": (
        work(ContainerSpec(healthcheck=HealthConfig(test=("CMD", "x")))),
        Facts(engine="podman", healthchecks=False),
        "only where systemd runs",
    ),
    "extra_host": (work(ContainerSpec(hosts=("1.2.3.4",))), NEW, "not of the form `IP name`"),
    "expose": (work(ContainerSpec(expose=("http",))), NEW, "expose 'http'"),
    "swap": (
        work(resources=ResourceRequirements(swap_bytes=5)),
        NEW,
        "a limit on swap needs a limit on memory",
    ),
}


@pytest.mark.parametrize(("given", "facts", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_engine_cannot_do_is_refused_with_the_reason(
    given: Work, facts: Facts, reason: str
) -> None:
    message = refused(given, facts)
    assert reason in message
    assert "app_web" in message


def test_all_problems_are_told_at_once() -> None:
    message = refused(work(ContainerSpec(annotations={"a": "b"}, expose=("x",)), runtime="y"), OLD)
    assert message.count(";") >= 2


def test_files_are_read_only_and_relabelled_where_selinux_is() -> None:
    plan = plan_container(work(), OLD, node_id="n1", cluster_id="c1")
    files = [("/run/f/0", "/run/secrets/a")]
    plain, _ = body_for(plan, [], files, OLD)
    assert plain["HostConfig"]["Mounts"] == [
        {"Type": "bind", "Source": "/run/f/0", "Target": "/run/secrets/a", "ReadOnly": True}
    ]
    labelled, _ = body_for(plan, [], files, NEW)
    assert labelled["HostConfig"]["Binds"] == ["/run/f/0:/run/secrets/a:ro,z"]
    json.dumps(labelled)


def test_an_old_engine_checks_every_interval_and_the_task_says_so() -> None:
    health = HealthConfig(test=("CMD", "x"), start_interval_ns=1, interval_ns=2)
    given = work(ContainerSpec(healthcheck=health))
    old, new = (plan_container(given, facts, node_id="n1", cluster_id="c1") for facts in (OLD, NEW))
    assert "StartInterval" not in old.body["Healthcheck"]
    assert old.note == (
        "its healthcheck's start_interval has no effect: docker  has API 1.41 and this needs 1.44; "
        "it is checked every interval"
    )
    assert (new.body["Healthcheck"]["StartInterval"], new.note) == (1, "")


def test_a_test_left_out_is_the_images_with_other_times() -> None:
    """An empty test is what the engine takes from the image."""
    given = work(ContainerSpec(healthcheck=HealthConfig(interval_ns=2, retries=5)))
    assert body(given)["Healthcheck"] == {
        "Test": [],
        "Interval": 2,
        "Timeout": 0,
        "StartPeriod": 0,
        "Retries": 5,
    }
