"""The stack of the first example on three Docker hosts, from deploy to removal."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.testbed import Bed
from tests.e2e.cluster import EXAMPLE, Cluster, wait_for

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(bed: Bed) -> Iterator[Cluster]:
    made = Cluster(bed.docker_hosts(3))
    made.up()
    yield made
    made.down()


@pytest.fixture
def stack(cluster: Cluster) -> Iterator[Cluster]:
    cluster.ctl("stack", "deploy", "-c", str(EXAMPLE), "app")
    yield cluster
    cluster.ctl("stack", "rm", "app", check=False)
    wait_for("no container is left", lambda: not any(cluster.containers(h) for h in cluster.hosts))


def test_the_stack_converges_and_answers_on_every_host(stack: Cluster) -> None:
    """Deploy returned, so it must have converged; each host reaches replicas on all hosts."""
    assert stack.replicas("app_web") == "5/5"
    where = {t["Node"] for t in stack.running("app_web")}
    assert where == {h.name for h in stack.hosts}
    names = {
        host.docker("inspect", "-f", "{{.Config.Hostname}}", c).strip(): host.name
        for host in stack.hosts
        for c in stack.containers(host)
    }
    for host in stack.hosts:
        seen = stack.answers(host, 30)
        assert set(seen) <= set(names)
        assert {names[n] for n in seen} == {h.name for h in stack.hosts}, (host.name, seen)


def test_limits_stand_in_the_containers_cgroups(stack: Cluster) -> None:
    for host in stack.hosts:
        for container in stack.containers(host):
            pid = host.docker("inspect", "-f", "{{.State.Pid}}", container).strip()
            lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
            groups = {line.split(":")[1]: line.split(":")[2] for line in lines}
            if "memory" in groups:  # cgroup v1
                memory = Path(f"/sys/fs/cgroup/memory{groups['memory']}/memory.limit_in_bytes")
                cpu = next(v for k, v in groups.items() if "cpu" in k.split(","))
                quota = Path(f"/sys/fs/cgroup/cpu{cpu}/cpu.cfs_quota_us")
                period = Path(f"/sys/fs/cgroup/cpu{cpu}/cpu.cfs_period_us")
                share = int(quota.read_text()) / int(period.read_text())
            else:
                memory = Path(f"/sys/fs/cgroup{groups['']}/memory.max")
                numbers = Path(f"/sys/fs/cgroup{groups['']}/cpu.max").read_text().split()
                share = int(numbers[0]) / int(numbers[1])
            assert int(memory.read_text()) == 50 * 1024 * 1024
            assert share == pytest.approx(0.1)


def test_fewer_replicas_in_the_file_leave_as_many_containers(
    stack: Cluster, tmp_path: Path
) -> None:
    edited = tmp_path / "web.yml"
    text = EXAMPLE.read_text()
    assert "replicas: 5" in text
    edited.write_text(text.replace("replicas: 5", "replicas: 2"))
    before = {t["ID"] for t in stack.running("app_web")}
    stack.ctl("stack", "deploy", "-c", str(edited), "app")
    wait_for(
        "two containers are left",
        lambda: sum(len(stack.containers(h)) for h in stack.hosts) == 2,
    )
    kept = {t["ID"] for t in stack.running("app_web")}
    assert len(kept) == 2
    assert kept < before, "the remaining replicas were not to be restarted"


def test_removing_the_stack_leaves_nothing(cluster: Cluster) -> None:
    cluster.ctl("stack", "deploy", "-c", str(EXAMPLE), "app")
    networks = [
        set(h.docker("network", "ls", "--format", "{{.Name}}").split()) for h in cluster.hosts
    ]
    assert any("app_default" in n for names in networks for n in names)
    cluster.ctl("stack", "rm", "app")
    for host in cluster.hosts:
        assert cluster.containers(host) == []
        names = host.docker("network", "ls", "--format", "{{.Name}}").split()
        assert set(names) == {"bridge", "host", "none"}
        with pytest.raises(OSError):
            cluster.ask(host, timeout_s=2)
    assert cluster.json("stack", "ls") == []
    assert cluster.json("service", "ls") == []
    assert cluster.json("network", "ls") == []


def test_logs_come_from_all_hosts(cluster: Cluster) -> None:
    cluster.ctl(
        *("service", "create", "--name", "talker", "--replicas", "3", "--stop-grace-period", "0s"),
        *("busybox:latest", "sh", "-c", "echo hello from $HOSTNAME; exec sleep 1000"),
    )
    try:
        lines = wait_for(
            "three greetings",
            lambda: (
                out
                if len(out := cluster.ctl("service", "logs", "talker").splitlines()) == 3
                else None
            ),
        )
        assert all("hello from" in line for line in lines)
        assert all(any(f"@{h.name}" in line for line in lines) for h in cluster.hosts)
    finally:
        cluster.ctl("service", "rm", "talker")


def test_exec_runs_in_the_task_and_returns_its_exit_code(stack: Cluster) -> None:
    task = stack.running("app_web")[0]["ID"]
    assert stack.ctl("exec", task, "sh", "-c", "echo out; hostname").splitlines()[0] == "out"
    code, _ = stack.fails("exec", task, "sh", "-c", "exit 7")
    assert code == 7


def test_a_task_that_fits_nowhere_says_why(cluster: Cluster) -> None:
    cluster.ctl(
        *("service", "create", "--name", "big", "-d", "--reserve-memory", "100TiB"),
        *("busybox:latest", "sleep", "1000"),
    )
    try:
        task = wait_for(
            "the task is pending with a reason",
            lambda: next((t for t in cluster.tasks("big") if t["Error"]), None),
        )
        assert "memory" in task["Error"]
        assert "100 TiB" in task["Error"]
        explained = cluster.ctl("task", "explain", task["ID"])
        assert "memory" in explained
    finally:
        cluster.ctl("service", "rm", "big")


def test_two_services_cannot_publish_one_port(stack: Cluster) -> None:
    code, said = stack.fails(
        *("service", "create", "--name", "rival", "--publish", "4000:80", "busybox:latest")
    )
    assert code != 0
    assert "4000" in said
    assert "app_web" in said
    assert [s["Name"] for s in stack.json("service", "ls")] == ["app_web"]
