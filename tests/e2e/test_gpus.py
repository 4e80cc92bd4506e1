"""GPUs end to end: hosts with a real engine each, which a stand-in for NVIDIA's hook lets take device
requests, and with GPUs that an inventory file declares. What counts is what is seen inside.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.testbed import Bed, Host
from tests.e2e.cluster import Cluster, wait_for

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]

EACH = 4  # GPUs a host
SLEEP = ("sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait")
GREEDY = "greedy:latest"  # its image asks for all GPUs


class GpuCluster(Cluster):
    """Hosts with declared GPUs; on the first one "MPS runs", which is a pipe and nothing else."""

    def __init__(self, hosts: tuple[Host, ...], folder: Path) -> None:
        super().__init__(hosts)
        self._folder = folder
        self.mps = folder / "mps"
        self.mps.mkdir()
        os.mkfifo(self.mps / "control")
        for host in hosts:
            self.declare(host)

    def file(self, host: Host) -> Path:
        return self._folder / f"{host.name}.json"

    def declare(self, host: Host, **sick: str) -> None:
        """Writes the inventory; `sick`: by index ("g1"), why it is not healthy."""
        content: dict[str, Any] = {"discovery": "none", "gpus": []}
        if host is self.hosts[0]:
            content["mps"] = str(self.mps)
        for n in range(EACH):
            gpu: dict[str, Any] = {
                "uuid": f"GPU-{host.name}-{n}",
                "model": "NVIDIA A100-SXM4-40GB" if n < 3 else "NVIDIA L4",
                "memory": "40GiB" if n < 3 else "24GiB",
                "compute_capability": "8.0" if n < 3 else "8.9",
            }
            if why := sick.get(f"g{n}"):
                gpu |= {"healthy": False, "health_message": why}
            content["gpus"].append(gpu)
        made = self.file(host).with_suffix(".new")
        made.write_text(json.dumps(content))
        made.replace(self.file(host))

    def up(self) -> None:
        for host in self.hosts:
            host.start_swarmd(
                "--runtimes", "docker,process", "--gpu-inventory", str(self.file(host))
            )
        first = self.hosts[0]
        first.swarmctl("swarm", "init", "--advertise-addr", first.address)
        token = first.swarmctl("swarm", "join-token", "-q", "worker").strip()
        for host in self.hosts[1:]:
            host.swarmctl("swarm", "join", "--token", token, f"{first.address}:2377")
        wait_for(
            "all GPUs are known", lambda: len(self.json("gpu", "ls")) == EACH * len(self.hosts)
        )

    # -------------------------------------------------------------- questions

    def create(self, name: str, *flags: str, image: str = "busybox:latest") -> None:
        self.ctl("service", "create", "--name", name, *flags, image, *SLEEP)

    def remove(self, *names: str) -> None:
        self.ctl("service", "rm", *names)
        wait_for(
            "no container is left",
            lambda: not any(self.containers(host) for host in self.hosts),
        )

    def inside(self, service: str) -> dict[str, dict[str, str]]:
        """The environment within each running container of a service, by task."""
        found: dict[str, dict[str, str]] = {}
        for host in self.hosts:
            words = ["ps", "-q", "--filter", f"label=com.docker.swarm.service.name={service}"]
            for id_ in host.docker(*words).split():
                lines = host.docker("exec", id_, "env", check=False).splitlines()
                env = dict(line.split("=", 1) for line in lines if "=" in line)
                if "PATH" not in env:
                    continue  # it has just ended, which is what was said instead
                label = '{{index .Config.Labels "com.docker.swarm.task.name"}}'
                found[host.docker("inspect", "-f", label, id_).strip()] = env
        return found

    def given(self, service: str) -> dict[str, tuple[str, ...]]:
        """The UUIDs that each task of a service was given, as it sees them itself."""
        return {
            task: tuple(env["NVIDIA_VISIBLE_DEVICES"].split(","))
            for task, env in self.inside(service).items()
        }

    def usage(self) -> dict[str, dict[str, Any]]:
        return {row["UUID"]: row for row in self.json("gpu", "ls")}


HOOK = "#!/bin/sh\nexit 0\n"


@pytest.fixture(scope="module")
def hosts(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, ...]]:
    """Two engines that find the hook on their PATH."""
    folder = tmp_path_factory.mktemp("hook")
    hook = folder / "nvidia-container-runtime-hook"
    hook.write_text(HOOK)
    hook.chmod(0o755)
    found = bed.docker_hosts(2)
    for host in found:
        host.stop("dockerd")
        host.extra_environment["PATH"] = f"{folder}:{host.environment()['PATH']}"
    try:
        for host in found:
            host.start_docker()
            made = host.docker("create", "busybox:latest", "true").strip()
            host.docker("commit", "--change", "ENV NVIDIA_VISIBLE_DEVICES=all", made, GREEDY)
            host.docker("rm", made)
        yield found
    finally:
        for host in found:
            del host.extra_environment["PATH"]
            host.stop("dockerd")
            host.start_docker()


@pytest.fixture(scope="module")
def cluster(
    hosts: tuple[Host, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GpuCluster]:
    made = GpuCluster(hosts, tmp_path_factory.mktemp("gpus"))
    made.up()
    yield made
    made.down()


def test_each_task_sees_its_own_gpus_and_no_two_the_same(cluster: GpuCluster) -> None:
    cluster.create("pair", "--gpus", "2", "--replicas", "4")
    try:
        given = cluster.given("pair")
        assert len(given) == 4
        assert all(len(uuids) == 2 for uuids in given.values())
        everybody = Counter(uuid for uuids in given.values() for uuid in uuids)
        assert everybody == dict.fromkeys(cluster.usage(), 1)
        # The manager says the same as the containers.
        holders = {uuid: row["Tasks"] for uuid, row in cluster.usage().items()}
        told = {task.rsplit(".", 1)[0]: uuids for task, uuids in given.items()}
        assert holders == {uuid: task for task, uuids in told.items() for uuid in uuids}
        assert [row["GPUs"] for row in cluster.json("node", "ls")] == ["0/4", "0/4"]
        # One more waits, says why, and gets what another leaves.
        cluster.ctl("service", "scale", "-d", "pair=5")
        wait_for(
            "the fifth says what it waits for",
            lambda: [t for t in cluster.tasks("pair") if "gpu" in str(t["Error"]).lower()],
        )
        assert len(cluster.given("pair")) == 4
    finally:
        cluster.remove("pair")
    wait_for("all are free", lambda: {r["Free"] for r in cluster.usage().values()} == {"1"})


def test_gpus_are_chosen_by_model_memory_and_name(cluster: GpuCluster) -> None:
    cluster.create("small", "--gpus", "1", "--gpu-model", "L4|T4", "--replicas", "2")
    cluster.create("large", "--gpus", "3", "--gpu-memory", "40GiB", "--replicas", "2")
    try:
        assert sorted(cluster.given("small").values()) == [("GPU-h1-3",), ("GPU-h2-3",)]
        assert all(not uuid.endswith("-3") for u in cluster.given("large").values() for uuid in u)
        cluster.remove("small", "large")
        second = cluster.hosts[1].name
        cluster.create("named", "--gpus", f"device=GPU-{second}-2")
        assert list(cluster.given("named").values()) == [(f"GPU-{second}-2",)]
        code, said = cluster.fails("service", "create", "--gpus", "2", "--gpu-fraction", "0.5", "x")
        assert code == 2
        assert "only one GPU can be shared" in " ".join(said.split())
    finally:
        cluster.remove("named")


def test_a_task_without_a_claim_sees_none_whatever_its_image_and_spec_say(
    cluster: GpuCluster,
) -> None:
    cluster.create("none", "--mode", "global", image=GREEDY)
    cluster.create("says", "--env", "NVIDIA_VISIBLE_DEVICES=all", image=GREEDY)
    cluster.create("one", "--gpus", "1", "--env", "NVIDIA_VISIBLE_DEVICES=all", image=GREEDY)
    try:
        assert set(cluster.given("none").values()) == {("void",)}
        assert set(cluster.given("says").values()) == {("void",)}
        [(uuid,)] = cluster.given("one").values()
        assert uuid in cluster.usage()
    finally:
        cluster.remove("none", "says", "one")


def test_fractions_share_a_gpu_and_hold_where_mps_runs(cluster: GpuCluster) -> None:
    first, second = cluster.hosts
    part = ("--gpu-fraction", "0.5", "--gpu-memory", "10GiB")
    cluster.create("held", *part, "--replicas", "2", "--constraint", f"node.hostname=={first.name}")
    cluster.create("loose", *part, "--constraint", f"node.hostname=={second.name}")
    try:
        [uuid] = {u for uuids in cluster.given("held").values() for u in uuids}
        assert (cluster.usage()[uuid]["Free"], cluster.usage()[uuid]["ClaimedMemory"]) == (
            "0",
            "20 GiB",
        )
        for env in cluster.inside("held").values():
            assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
            assert env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=10240M"
            assert env["CUDA_MPS_PIPE_DIRECTORY"] == str(cluster.mps)
        for id_ in cluster.containers(first):
            first.docker("exec", id_, "test", "-p", str(cluster.mps / "control"))
        # On the other host nothing keeps it to its half, and it is said where people look.
        assert not any(
            k.startswith("CUDA_MPS") for e in cluster.inside("loose").values() for k in e
        )
        [task] = cluster.running("loose")
        [found] = json.loads(cluster.ctl("task", "inspect", task["ID"]))
        assert "not enforced: no MPS control daemon" in found["Status"]["Message"]
        wait_for(
            "the node says so too",
            lambda: "not enforced" in cluster.ctl("node", "inspect", "--pretty", second.name),
        )
    finally:
        cluster.remove("held", "loose")


def test_a_sick_gpus_task_moves_and_the_gpu_comes_back(cluster: GpuCluster) -> None:
    cluster.create("train", "--gpus", "1", "--gpu-model", "A100", "--restart-condition", "none")
    try:
        [(uuid,)] = cluster.given("train").values()
        host = next(h for h in cluster.hosts if h.name == uuid.split("-")[1])
        cluster.declare(host, **{f"g{uuid[-1]}": "XID 79"})
        [(other,)] = wait_for(
            "the task runs on another GPU",
            lambda: v if (v := set(cluster.given("train").values())) and (uuid,) not in v else None,
            timeout_s=60,
        )
        assert other != uuid
        assert (cluster.usage()[uuid]["Health"], cluster.usage()[uuid]["Reason"]) == (
            "Unhealthy",
            "XID 79",
        )
        stopped = [t for t in cluster.tasks("train") if t["DesiredState"] == "Shutdown"]
        [found] = json.loads(cluster.ctl("task", "inspect", stopped[0]["ID"]))
        assert found["StopMessage"] == f"GPU {uuid} is not healthy: XID 79"
        cluster.ctl("service", "scale", "-d", "train=6")
        wait_for("five run", lambda: len(cluster.running("train")) == 5, timeout_s=60)
        cluster.declare(host)
        wait_for("the sixth runs", lambda: len(cluster.running("train")) == 6, timeout_s=60)
        assert (uuid,) in cluster.given("train").values()
    finally:
        cluster.declare(cluster.hosts[0])
        cluster.declare(cluster.hosts[1])
        cluster.remove("train")


def test_tasks_keep_their_gpus_while_their_node_starts_anew(cluster: GpuCluster) -> None:
    cluster.create("stay", "--gpus", "2", "--replicas", "4")
    try:
        before = cluster.given("stay")
        for host in cluster.hosts:
            host.kill("swarmd")
            host.start_swarmd(
                "--runtimes", "docker,process", "--gpu-inventory", str(cluster.file(host))
            )
        wait_for("all run", lambda: len(cluster.running("stay")) == 4, timeout_s=60)
        assert cluster.given("stay") == before
        assert {row["Free"] for row in cluster.usage().values()} == {"0"}
    finally:
        cluster.remove("stay")


STACK = """
services:
  infer:
    image: busybox:latest
    command: [sh, -c, "trap 'exit 0' TERM; sleep 100000 & wait"]
    gpus: [{options: {fraction: "0.5", memory: 10GiB}}]
    deploy: {replicas: 2}
  train:
    image: busybox:latest
    command: [sh, -c, "trap 'exit 0' TERM; sleep 100000 & wait"]
    deploy:
      resources:
        reservations:
          devices: [{driver: nvidia, count: 2, capabilities: [gpu], options: {model: A100}}]
  old:
    image: busybox:latest
    command: [sh, -c, "trap 'exit 0' TERM; sleep 100000 & wait"]
    deploy:
      resources:
        reservations:
          generic_resources: [{discrete_resource_spec: {kind: NVIDIA-GPU, value: 1}}]
"""


def test_a_stack_claims_gpus_in_all_of_composes_ways(cluster: GpuCluster, tmp_path: Path) -> None:
    file = tmp_path / "stack.yml"
    file.write_text(STACK)
    cluster.ctl("stack", "deploy", "-c", str(file), "ai")
    try:
        claimed = {name: cluster.given(f"ai_{name}") for name in ("infer", "train", "old")}
        whole = [u for name in ("train", "old") for v in claimed[name].values() for u in v]
        assert len(whole) == len(set(whole)) == 3
        shared = {u for v in claimed["infer"].values() for u in v}
        assert not shared & set(whole)
        assert len(shared) == 1
    finally:
        cluster.ctl("stack", "rm", "ai")
        wait_for(
            "no container is left",
            lambda: not any(cluster.containers(host) for host in cluster.hosts),
        )
