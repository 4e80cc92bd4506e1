"""Tasks with namespaces, cgroups, a network and a user of their own; needs root."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.ingress import LocalTarget
from agent.runtime.base import EventKind, Phase, Rejected, TaskFile
from swarm import errors
from swarm.v1 import (
    ContainerSpec,
    DnsConfig,
    HealthConfig,
    LogOptions,
    Mount,
    PortConfig,
    ResourceRequirements,
    Resources,
    TaskSpec,
    TmpfsOptions,
    Ulimit,
)
from tests.integration.runtime_process.conftest import Harness, harness, until, work

pytestmark = pytest.mark.root
SECOND = 1_000_000_000


def links() -> set[str]:
    found = json.loads(subprocess.check_output(["ip", "-j", "link"]))
    return {link["ifname"] for link in found}


def nft_tables() -> str:
    return subprocess.check_output(["nft", "list", "tables"], text=True)


def own_links(held: Harness) -> set[str]:
    return {name for name in links() if name == held.runtime._bridge.name}


def cgroups(held: Harness) -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"*/swarm/{held.runtime._node_id}/*/cgroup.procs"))


async def test_a_task_sees_only_its_own_processes_name_and_temporary_files(
    isolated: Harness, tmp_path: Path
) -> None:
    script = "ls /proc | grep -c '^[0-9]*$'; hostname; ls -A /tmp; ls /run/../tmp | wc -l"
    job = work(
        "sh", "-c", f"{script}; ls {isolated.folder}/tasks", container=ContainerSpec(hostname="box")
    )
    code, text = await isolated.finish(job)
    lines = text.splitlines()
    assert code == 0
    assert int(lines[0]) <= 5 and lines[1] == "box"
    assert lines[-1] == job.task_id  # only the way to its own working directory


async def test_a_task_has_an_address_that_the_host_reaches(isolated: Harness) -> None:
    program = "import socket;s=socket.create_server(('0.0.0.0',80));print('up',flush=True);s.accept()[0].sendall(b'hi')"
    job = work("python3", "-c", program, ports=[PortConfig(target_port=80)])
    started = await isolated.run(job)
    assert started.port_map == {}
    async for line in isolated.runtime.logs(job.task_id, LogOptions(tail=-1, follow=True)):
        assert line.data == b"up"
        break
    reader, writer = await asyncio.open_connection(started.address, 80)
    assert await reader.read() == b"hi"
    writer.close()
    await writer.wait_closed()


async def test_tasks_reach_each_other_and_the_host(isolated: Harness) -> None:
    first, second = work("sleep", "60"), work("sleep", "60")
    address = (await isolated.run(first)).address
    await isolated.run(second)
    code, _ = await isolated.execute(
        second, "python3", "-c", f"import socket;socket.create_connection(('{address}',1),5)"
    )
    assert code == 1  # refused, not unreachable: see the next line
    _, text = await isolated.execute(
        second, "python3", "-c", f"import socket;socket.create_connection(('{address}',1),5)"
    )
    assert "ConnectionRefusedError" in text


async def test_network_and_cgroups_are_gone_with_the_last_task(isolated: Harness) -> None:
    jobs = [work("sleep", "60") for _ in range(3)]
    started = [await isolated.run(job) for job in jobs]
    assert len({s.address for s in started}) == 3
    assert own_links(isolated) and cgroups(isolated)
    for job in jobs:
        await isolated.runtime.remove(job.task_id)
    assert not own_links(isolated) and not cgroups(isolated)
    rules = nft_tables()
    assert isolated.runtime._bridge._table not in rules
    assert not list(Path("/sys/fs/cgroup").glob(f"*/swarm/{isolated.runtime._node_id}"))
    assert (await isolated.run(work("sleep", "60"))).address  # and all of it comes again
    assert own_links(isolated) and cgroups(isolated)


async def test_limits_stand_in_the_tasks_cgroup(isolated: Harness) -> None:
    limits = Resources(cpu_nano=SECOND // 10, memory_bytes=50 << 20, pids=20)
    spec = TaskSpec(resources=ResourceRequirements(limits=limits))
    job = work("sleep", "60", spec=spec)
    await isolated.run(job)
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        for name, value in {
            "cpu/*/cpu.cfs_quota_us": "10000",
            "memory/*/memory.limit_in_bytes": str(50 << 20),
            "pids/*/pids.max": "20",
        }.items():
            controller, _, file = name.split("/")
            path = Path(
                "/sys/fs/cgroup", controller, "swarm", isolated.runtime._node_id, job.task_id
            )
            assert (path / file).read_text().strip() == value
            assert (path / "cgroup.procs").read_text().strip()
    stats = await isolated.runtime.stats(job.task_id)
    assert stats.memory_limit_bytes == 50 << 20 and stats.pids == 1


async def test_a_task_over_its_memory_limit_ends_with_the_reason(isolated: Harness) -> None:
    limits = Resources(memory_bytes=32 << 20)
    spec = TaskSpec(resources=ResourceRequirements(limits=limits))
    job = work("python3", "-c", "x = bytearray(200 << 20)", spec=spec)
    await isolated.run(job)
    event = await isolated.event()
    assert event.exit_code == 137 and "out of memory" in event.message
    assert event.cause == "oom"
    await isolated.restart()
    (found,) = await isolated.runtime.adopt()
    assert (found.phase, found.message) == (Phase.EXITED, event.message)


async def test_user_groups_limits_and_capabilities_are_the_tasks(isolated: Harness) -> None:
    container = ContainerSpec(
        user="nobody:daemon",
        groups=("1234",),
        ulimits=(Ulimit(name="nofile", soft=100, hard=200),),
        oom_score_adj=7,
    )
    script = "id -u; id -G; ulimit -n; cat /proc/self/oom_score_adj; pwd; touch f; echo done > /dev/stdout"
    code, text = await isolated.finish(work("sh", "-c", script, container=container))
    lines = text.splitlines()
    assert code == 0, text
    assert lines[0] == "65534" and set(lines[1].split()) == {"1", "1234"}
    assert lines[2:4] == ["100", "7"] and lines[5] == "done"


async def test_root_has_dockers_capabilities_and_not_all(isolated: Harness) -> None:
    show = "grep CapEff /proc/self/status | cut -f2"
    assert await isolated.finish(work("sh", "-c", show)) == (0, "00000000a80425fb")
    dropped = ContainerSpec(capability_drop=("ALL",), capability_add=("NET_ADMIN",))
    assert await isolated.finish(work("sh", "-c", show, container=dropped)) == (
        0,
        "0000000000001000",
    )


async def test_mounts_are_as_asked_and_the_hosts_files_untouched(
    isolated: Harness, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("from host")
    mounts = (
        Mount(type="bind", source=str(source), target="/not-on-host/ro", read_only=True),
        Mount(type="bind", source=str(source), target="/etc/swarm-new-folder"),
        Mount(type="volume", source="data", target="/data"),
        Mount(type="tmpfs", target="/scratch", tmpfs_options=TmpfsOptions(size_bytes=1 << 20)),
    )
    script = (
        "cat /not-on-host/ro/file; echo; touch /not-on-host/ro/x && echo BAD;"
        "touch /etc/swarm-new-folder/y; echo kept > /data/v; df -k /scratch | tail -1 | awk '{print $2}';"
        "test -e /etc/passwd && echo etc"
    )
    job = work("sh", "-c", script, container=ContainerSpec(mounts=mounts))
    code, text = await isolated.finish(job)
    assert code == 0
    assert "from host" in text and "BAD" not in text and "1024" in text.splitlines()
    assert text.endswith("etc")
    assert (source / "y").exists() and not Path("/etc/swarm-new-folder").exists()
    assert not Path("/not-on-host").exists() and not Path("/data/v").exists()
    again = work("cat", "/data/v", container=ContainerSpec(mounts=mounts[2:3]))
    assert await isolated.finish(again) == (0, "kept")


async def test_a_missing_bind_source_is_rejected(isolated: Harness) -> None:
    mount = Mount(type="bind", source="/no/such/source", target="/x")
    with pytest.raises(Rejected, match="/no/such/source does not exist"):
        await isolated.runtime.prepare(work("true", container=ContainerSpec(mounts=(mount,))))


async def test_a_read_only_root_lets_write_only_where_asked(isolated: Harness) -> None:
    mounts = (Mount(type="volume", source="w", target="/w"),)
    script = "touch /root/x /usr/x /etc/x 2>/dev/null && echo BAD; touch /w/x ./x /tmp/x /dev/shm/x && echo ok"
    job = work("sh", "-c", script, container=ContainerSpec(read_only=True, mounts=mounts))
    assert await isolated.finish(job) == (0, "ok")


async def test_secrets_configs_hosts_and_dns_appear_in_their_places(isolated: Harness) -> None:
    files = [
        TaskFile("/run/secrets/key", b"hush", uid=65534, gid=1, mode=0o400, secret=True),
        TaskFile("/etc/app/c.conf", b"conf"),
    ]
    container = ContainerSpec(
        hosts=("10.9.8.7 db db.local",),
        dns=DnsConfig(nameservers=("9.9.9.9",), search=("x.org",)),
    )
    script = (
        "cat /run/secrets/key /etc/app/c.conf; echo; stat -c '%u %g %a' /run/secrets/key;"
        'grep -c 10.9.8.7 /etc/hosts; cat /etc/resolv.conf; test -z "$SWARM_FILES" && echo none'
    )
    code, text = await isolated.finish(work("sh", "-c", script, container=container, files=files))
    assert (code, text) == (
        0,
        "hushconf\n65534 1 400\n1\nnameserver 9.9.9.9\nsearch x.org\nnone",
    )
    assert not Path("/run/secrets").exists() or not Path("/run/secrets/key").exists()


async def test_stop_reaches_the_main_process_through_init(isolated: Harness) -> None:
    job = work("sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done")
    await isolated.run(job)
    async for _ in isolated.runtime.logs(job.task_id, LogOptions(tail=-1, follow=True)):
        break
    assert await isolated.runtime.stop(job.task_id, signal="", grace_s=10) == 7
    # A program with no handler of its own ends too: it is not process 1.
    sleeper = work("sleep", "60")
    await isolated.run(sleeper)
    assert await isolated.runtime.stop(sleeper.task_id, signal="", grace_s=10) == 143


async def test_without_init_the_command_is_process_one(isolated: Harness) -> None:
    job = work("sh", "-c", "echo $$", container=ContainerSpec(init=False))
    assert await isolated.finish(job) == (0, "1")


async def test_exec_enters_the_tasks_namespaces_and_cgroup(isolated: Harness) -> None:
    job = work("sleep", "60", container=ContainerSpec(hostname="inner"))
    await isolated.run(job)
    code, text = await isolated.execute(
        job, "sh", "-c", "hostname; ls /proc | grep -c '^[0-9]*$'; grep -c swarm /proc/self/cgroup"
    )
    lines = text.splitlines()
    assert code == 0 and lines[0] == "inner" and int(lines[1]) < 10 and int(lines[2]) > 0
    assert await isolated.execute(job, "id", "-u", user="nobody") == (0, "65534\n")


async def test_adoption_keeps_address_network_and_health(isolated: Harness) -> None:
    check = HealthConfig(test=("CMD", "test", "-e", "ok"), interval_ns=SECOND // 20, retries=1)
    job = work("sh", "-c", "touch ok; exec sleep 60", container=ContainerSpec(healthcheck=check))
    before = await isolated.run(job)
    assert (await isolated.event()).kind is EventKind.HEALTHY
    await isolated.restart()
    (found,) = await isolated.runtime.adopt()
    assert found.started is not None
    assert found.started.address == before.address and found.started.healthy
    other = await isolated.run(work("sleep", "60"))
    assert other.address != before.address
    assert (await isolated.execute(job, "rm", "ok"))[0] == 0
    assert (await isolated.event()).kind is EventKind.UNHEALTHY


async def test_network_mode_none_has_only_loopback_and_host_the_hosts(isolated: Harness) -> None:
    show = "ls /sys/class/net | wc -l; cat /proc/net/dev | grep -c :"
    none = await isolated.finish(
        work("sh", "-c", show, container=ContainerSpec(network_mode="none"))
    )
    assert none[1].splitlines()[1] == "1"
    job = work(
        "sh",
        "-c",
        "echo $SWARM_BIND_ADDR $PORT; sleep 60",
        container=ContainerSpec(network_mode="host"),
        ports=[PortConfig(target_port=80)],
    )
    started = await isolated.run(job)
    assert started.address == "127.0.0.2" and 80 in started.port_map


async def test_sysctls_of_the_tasks_network_are_set(isolated: Harness) -> None:
    job = work(
        "cat",
        "/proc/sys/net/ipv4/ip_unprivileged_port_start",
        container=ContainerSpec(sysctls={"net.ipv4.ip_unprivileged_port_start": "80"}),
    )
    assert await isolated.finish(job) == (0, "80")


class FakeHostPorts:
    """Remembers what was published, as agent/proxy would."""

    def __init__(self) -> None:
        self.published: dict[str, LocalTarget] = {}
        self.taken = False  # by another program

    async def publish(
        self, task_id: str, ports: Sequence[PortConfig], target: LocalTarget
    ) -> tuple[PortConfig, ...]:
        from msgspec.structs import replace

        if self.taken:
            raise errors.Conflict("tcp 0.0.0.0:31000 is taken by another program")
        self.published[task_id] = target
        return tuple(replace(port, published_port=port.published_port or 31000) for port in ports)

    async def withdraw(self, task_id: str) -> None:
        self.published.pop(task_id, None)


async def test_publish_mode_host_goes_through_the_given_publisher(tmp_path: Path) -> None:
    ports = FakeHostPorts()
    async with harness(tmp_path / "p", isolate=True, host_ports=ports) as held:
        port = PortConfig(target_port=80, publish_mode="host")
        job = work("sleep", "60", ports=[port])
        started = await held.run(job)
        assert started.host_ports[0].published_port == 31000
        assert ports.published[job.task_id].address == started.address
        await held.restart()
        ports.published.clear()
        await held.runtime.adopt()
        assert ports.published[job.task_id].address == started.address
        await held.runtime.stop(job.task_id, signal="SIGKILL", grace_s=1)
        await until(lambda: not ports.published)


async def test_a_host_port_that_was_taken_meanwhile_fails_its_task_alone(tmp_path: Path) -> None:
    ports = FakeHostPorts()
    async with harness(tmp_path / "p", isolate=True, host_ports=ports) as held:
        loser = work("sleep", "60", ports=[PortConfig(target_port=80, publish_mode="host")])
        other = work("sleep", "60")
        for job in (loser, other):
            await held.run(job)
        await held.restart()
        ports.taken = True
        for _ in range(2):  # looking again gives the same, and follows no task twice
            found = await held.runtime.adopt()
            assert {f.task_id: f.phase for f in found} == {
                loser.task_id: Phase.RUNNING,
                other.task_id: Phase.RUNNING,
            }
        event = await held.event()
        assert (event.task_id, event.kind) == (loser.task_id, EventKind.UNHEALTHY)
        assert "31000 is taken" in event.message


async def test_a_task_reaches_outside_through_masquerading(isolated: Harness) -> None:
    # A second host beyond the first: a namespace that only knows the way to the first.
    name = f"swt{isolated.runtime._node_id[:8]}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", "198.18.77.1/30", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "addr", "add", "198.18.77.2/30", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        job = work("sleep", "60")
        await isolated.run(job)
        text = ""
        with contextlib.suppress(TimeoutError):
            _, text = await isolated.execute(
                job,
                "python3",
                "-c",
                "import socket;socket.create_connection(('198.18.77.2',1),5)",
            )
        assert "ConnectionRefusedError" in text
    finally:
        ip("netns", "del", name)


async def test_starts_are_quick(isolated: Harness) -> None:
    jobs = [work("sleep", "60") for _ in range(8)]
    await asyncio.gather(*(isolated.runtime.prepare(job) for job in jobs))
    loop = asyncio.get_running_loop()
    begin = loop.time()
    started = await asyncio.gather(*(isolated.runtime.start(job) for job in jobs))
    print(f"8 starts: {loop.time() - begin:.3f} s")
    assert len({s.address for s in started}) == 8
    assert loop.time() - begin < 10
    assert socket.inet_aton(started[0].address)
