"""What a task asks for is what its container has, seen from inside and in its cgroup."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.runtime.base import Failed, Rejected, TaskFile, Work
from swarm.v1 import (
    BindOptions,
    ContainerSpec,
    DeviceMapping,
    DnsConfig,
    Driver,
    Mount,
    PortConfig,
    Privileges,
    ResourceRequirements,
    Resources,
    SeccompOpts,
    TaskSpec,
    TmpfsOption,
    TmpfsOptions,
    Ulimit,
    VolumeOptions,
)
from tests.fakes.waiting import until
from tests.integration.runtime_docker.conftest import Harness

pytestmark = [pytest.mark.docker, pytest.mark.root]
MIB = 1 << 20


async def test_limits_stand_in_the_cgroup(docker: Harness) -> None:
    spec = TaskSpec(
        resources=ResourceRequirements(
            limits=Resources(cpu_nano=100_000_000, memory_bytes=50 * MIB, pids=20)
        )
    )
    container = ContainerSpec(cpuset="0", cpu_shares=512, memory_reservation_bytes=20 * MIB)
    _, started = await docker.run("sleep", "100", spec=spec, container=container)

    def read(controller: str, v1: str, v2: str) -> str:
        return docker.cgroup(started, controller, v1, v2)

    assert read("memory", "memory.limit_in_bytes", "memory.max") == str(50 * MIB)
    assert read("pids", "pids.max", "pids.max") == "20"
    assert read("cpuset", "cpuset.cpus", "cpuset.cpus") == "0"
    quota = read("cpu", "cpu.cfs_quota_us", "cpu.max").split()
    period = quota[1:] or [read("cpu", "cpu.cfs_period_us", "cpu.max")]
    assert int(quota[0]) / int(period[0]) == pytest.approx(0.1)
    reserved = read("memory", "memory.soft_limit_in_bytes", "memory.low")
    assert reserved == str(20 * MIB)


async def test_process_fields_are_seen_from_inside(docker: Harness) -> None:
    container = ContainerSpec(
        command=("sh", "-c"),
        env=("A=1", "B=two words"),
        dir="/var",
        user="7:8",
        groups=("9",),
        hostname="box",
        domainname="example.org",
        hosts=("1.2.3.4 one uno",),
        dns=DnsConfig(nameservers=("10.9.8.7",), search=("x.org",), options=("ndots:3",)),
        ulimits=(Ulimit(name="nofile", soft=100, hard=200),),
        oom_score_adj=77,
        read_only=True,
        init=True,
    )
    script = (
        "echo $A-$B; pwd; id -u; id -g; id -G; hostname; grep uno /etc/hosts;"
        "cat /etc/resolv.conf; ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj;"
        "touch /x || true; cat /proc/1/comm"
    )
    said = (await docker.output(script, container=container)).splitlines()
    assert said[:6] == ["1-two words", "/var", "7", "8", "8 9", "box"]
    text = "\n".join(said)
    assert "1.2.3.4\tuno" in text
    assert "nameserver 10.9.8.7" in text
    assert "search x.org" in text
    assert "ndots:3" in text
    assert "100\n200\n77" in text
    assert "Read-only file system" in text
    assert said[-1] in ("docker-init", "tini")


async def test_kernel_fields_are_seen_from_inside(docker: Harness) -> None:
    container = ContainerSpec(
        sysctls={"net.core.somaxconn": "77"},
        capability_add=("CAP_NET_ADMIN",),
        capability_drop=("ALL",),
        shm_size_bytes=3 * MIB,
        devices=(DeviceMapping(source="/dev/null", target="/dev/nothing", permissions="rw"),),
        mac_address="02:42:ac:11:00:99",
        privileges=Privileges(no_new_privileges=True, seccomp=SeccompOpts(mode="unconfined")),
    )
    said = await docker.output(
        "sh",
        "-c",
        "cat /proc/sys/net/core/somaxconn; grep CapEff /proc/self/status; df -m /dev/shm;"
        "ls /dev/nothing; cat /sys/class/net/eth0/address;"
        "grep -E 'NoNewPrivs|Seccomp:' /proc/self/status",
        container=container,
    )
    assert said.splitlines()[0] == "77"
    assert f"{1 << 12:016x}" in said  # CAP_NET_ADMIN alone
    assert " 3 " in said.splitlines()[3]
    assert "/dev/nothing" in said
    assert "02:42:ac:11:00:99" in said
    assert "NoNewPrivs:\t1" in said
    assert "Seccomp:\t0" in said


async def test_namespaces_are_shared_as_asked(docker: Harness) -> None:
    own = {kind: Path(f"/proc/self/ns/{kind}").readlink() for kind in ("pid", "ipc")}
    shared = ContainerSpec(pid_mode="host", ipc_mode="host", network_mode="host")
    private = ContainerSpec(ipc_mode="private")
    for container, same in ((shared, True), (private, False)):
        _, started = await docker.run("sleep", "100", container=container)
        for kind, link in own.items():
            inside = Path(f"/proc/{started.container.pid}/ns/{kind}").readlink()
            assert (inside == link) is same, kind
        assert (started.address == "127.0.0.1") is same


async def test_without_a_network_there_is_no_address(docker: Harness) -> None:
    _, started = await docker.run("sleep", "100", container=ContainerSpec(network_mode="none"))
    assert started.address == ""


async def test_privileged_is_passed_on(docker: Harness) -> None:
    """Whether such a container can start depends on what the machine itself may do."""
    work = docker.work("true", container=ContainerSpec(privileged=True))
    await docker.runtime.prepare(work)
    assert docker.inspect(work)["HostConfig"]["Privileged"] is True


# ------------------------------------------------------------------ mounts and files


async def test_mounts_of_every_kind(docker: Harness, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("from the node")
    (tmp_path / "new").mkdir()
    volume = f"vol-{docker.node_id[:8]}"
    mounts = (
        Mount(type="bind", source=str(tmp_path), target="/bind", read_only=True),
        Mount(
            type="bind",
            source=str(tmp_path / "new/made"),
            target="/made",
            bind_options=BindOptions(create_mountpoint=True),
        ),
        Mount(
            type="volume",
            source=volume,
            target="/volume",
            volume_options=VolumeOptions(labels={"a": "b"}, driver_config=Driver(name="local")),
        ),
        Mount(
            type="tmpfs",
            target="/tmpfs",
            tmpfs_options=TmpfsOptions(size_bytes=2 * MIB, mode=0o700),
        ),
        Mount(
            type="tmpfs",
            target="/opts",
            tmpfs_options=TmpfsOptions(options=(TmpfsOption(words=("uid", "7")),)),
        ),
    )
    try:
        said = await docker.output(
            "sh",
            "-c",
            "cat /bind/f; echo; touch /bind/g; touch /made/x /volume/y; df -m /tmpfs | tail -1;"
            "ls -ldn /tmpfs; ls -ldn /opts",
            container=ContainerSpec(mounts=mounts),
        )
        assert "from the node" in said
        assert "/bind/g: Read-only file system" in said
        assert (tmp_path / "new/made/x").exists()
        assert "drwx------" in said
        assert said.splitlines()[-1].split()[2] == "7"
        labels = docker.host.docker("volume", "inspect", "-f", "{{.Labels.a}} {{.Driver}}", volume)
        assert labels.split() == ["b", "local"]
    finally:
        await docker.clean()
        docker.host.docker("volume", "rm", "-f", volume)


async def test_a_bind_without_a_source_is_rejected(docker: Harness) -> None:
    mounts = (Mount(type="bind", source="/no/such/path", target="/x"),)
    with pytest.raises(Rejected, match="/no/such/path"):
        await docker.runtime.prepare(docker.work("true", container=ContainerSpec(mounts=mounts)))


async def test_secrets_are_in_memory_with_owner_and_mode_and_go_with_the_task(
    docker: Harness,
) -> None:
    files = (
        TaskFile("/run/secrets/key", b"hush\x00", uid=7, gid=8, mode=0o440, secret=True),
        TaskFile("/etc/app.conf", b"conf", mode=0o444),
    )
    work, started = await docker.run(
        "sleep", "100", files=files, container=ContainerSpec(user="7:9")
    )
    code, said = await docker.inside(
        work,
        "sh",
        "-c",
        "stat -c '%a %u %g' /run/secrets/key; wc -c </run/secrets/key;"
        "cat /etc/app.conf; echo; grep secrets /proc/mounts; echo x >/run/secrets/key",
    )
    lines = said.splitlines()
    assert lines[:3] == ["440 7 8", "5", "conf"]
    # Standard output and standard error come in no order that is sure.
    assert any(" tmpfs ro," in line for line in lines[3:])
    assert "Read-only" in said or "denied" in said
    assert code != 0
    sources = [m["Source"] for m in docker.inspect(work)["Mounts"]]
    assert all(Path(source).exists() for source in sources)
    # The agent's restart neither loses nor leaks them.
    runtime = await docker.restart()
    await runtime.adopt()
    assert (await docker.inside(work, "cat", "/etc/app.conf"))[1] == "conf"
    await runtime.remove(work.task_id)
    assert not any(Path(source).exists() for source in sources)
    assert started.container.pid


# ------------------------------------------------------------------ ports, labels, logs, runtimes


async def test_host_ports_are_published_and_told(docker: Harness) -> None:
    ports = (
        PortConfig(target_port=80, published_port=18080, publish_mode="host"),
        PortConfig(target_port=80, publish_mode="host"),
        PortConfig(target_port=81, published_port=18081, publish_mode="ingress"),
    )
    work, started = await docker.run(ports=ports, container=ContainerSpec(image="web:latest"))
    published = sorted(p.published_port for p in started.host_ports)
    assert 18080 in published
    assert len(published) == 2
    assert all(p.target_port == 80 and p.publish_mode == "host" for p in started.host_ports)
    hostname = docker.inspect(work)["Config"]["Hostname"]
    for port in published:
        url = f"http://{docker.host.address}:{port}/"
        answers: list[str] = []

        def asked(url: str = url, answers: list[str] = answers) -> bool:
            try:
                with urllib.request.urlopen(url, timeout=2) as answer:
                    answers.append(answer.read().decode().strip())
            except OSError:
                return False
            return True

        await until(asked)
        assert answers[-1] == hostname


async def test_a_taken_host_port_fails_with_the_engines_reason(docker: Harness) -> None:
    ports = (PortConfig(target_port=80, published_port=18085, publish_mode="host"),)
    await docker.run("sleep", "100", ports=ports)
    with pytest.raises(Failed, match="18085"):
        await docker.run("sleep", "100", ports=ports)


async def test_labels_are_on_the_container(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100", container=ContainerSpec(labels={"mine": "1"}))
    labels = docker.inspect(work)["Config"]["Labels"]
    assert labels["mine"] == "1"
    assert labels["com.docker.swarm.task.id"] == work.task_id
    assert labels["com.docker.swarm.task.name"] == work.assignment.name
    assert labels["com.docker.swarm.service.name"] == "app_web"
    assert labels["com.docker.swarm.node.id"] == docker.node_id


async def test_log_driver_and_runtime_are_the_ones_asked_for(docker: Harness) -> None:
    spec = TaskSpec(log_driver=Driver(name="local", options={"max-size": "1m"}), runtime="runc")
    work, _ = await docker.run("echo", "said", spec=spec)
    found = docker.inspect(work)["HostConfig"]
    assert found["LogConfig"] == {"Type": "local", "Config": {"max-size": "1m"}}
    assert found["Runtime"] == "runc"
    assert [line.data for line in await docker.lines(work, follow=True)] == [b"said"]


async def test_an_unknown_runtime_is_rejected(docker: Harness) -> None:
    with pytest.raises(Rejected, match="no runtime 'nope'; it has .*runc"):
        await docker.runtime.prepare(docker.work("true", spec=TaskSpec(runtime="nope")))


async def test_gpus_on_a_node_without_them_are_rejected(docker: Harness) -> None:
    work = docker.work("true")
    assert work.assignment.task is not None
    task = replace(work.assignment.task, assigned_gpus=("GPU-1",))
    work = Work(replace(work.assignment, task=task))
    with pytest.raises(Rejected, match="device driver"):
        await docker.start(work)
