"""swarmd with a driver that a text file plays: what managers, tasks and metrics see of its GPUs."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.cluster import wait_for
from tests.e2e.local import Node
from tests.fakes.nvml import GIB, Machine, build, uuid
from tests.ports import free_port


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path / "machine")
    made.set(0, recovery=0)
    return made


@pytest.fixture
def node(tmp_path: Path, machine: Machine) -> Iterator[Node]:
    made = Node(tmp_path, "n1")
    library = build(tmp_path)
    made.wrapped = ("env", f"LD_LIBRARY_PATH={library}", f"FAKE_NVML={machine.file}")
    try:
        yield made
    finally:
        made.close()


def gpus(node: Node) -> dict[str, dict[str, Any]]:
    (found,) = json.loads(node.ok("node", "inspect", "self"))
    return {g["UUID"]: g for g in found["Description"].get("GPUs", ())}


def test_a_cluster_sees_gives_and_takes_back_gpus(node: Node, machine: Machine) -> None:
    port = free_port("127.0.0.1")
    node.extra = ("--metrics-addr", f"127.0.0.1:{port}")
    node.start()
    node.init()
    wait_for("all GPUs are told", lambda: len(gpus(node)) == 8)
    one = gpus(node)[uuid(4)]
    assert (one["Model"], one["MemoryBytes"], one["Healthy"]) == (
        "NVIDIA A100-SXM4-80GB",
        80 * GIB,
        True,
    )
    assert one["NVLinkPeers"] == [uuid(5), uuid(6), uuid(7)]

    node.ok(
        "service",
        "create",
        "-d",
        "--runtime",
        "process",
        "--name",
        "g",
        "--gpus",
        "2",
        "sh",
        "-c",
        "echo =$CUDA_VISIBLE_DEVICES=; sleep 600",
    )
    node.ok(
        "service",
        "create",
        "-d",
        "--runtime",
        "process",
        "--name",
        "p",
        "sh",
        "-c",
        "echo =$CUDA_VISIBLE_DEVICES=; sleep 600",
    )
    wait_for(
        "the task with GPUs says which", lambda: "=GPU-" in node.run("service", "logs", "g").stdout
    )
    said = node.run("service", "logs", "g").stdout.split("=")[1].split(",")
    assert len(said) == 2 and set(said) < set(gpus(node))
    wait_for(
        "the task without says that it has none",
        lambda: "==" in node.run("service", "logs", "p").stdout,
    )

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    samples = {
        (sample.name, sample.labels.get("gpu")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["swarm_gpu_memory_used_bytes", uuid(3)] == 3 * GIB
    assert samples["swarm_gpu_utilization_ratio", uuid(7)] == 0.7
    assert samples["swarm_gpu_healthy", uuid(0)] == 1

    began_s = time.monotonic()
    machine.xid(6, 79)
    wait_for("the XID is told", lambda: not gpus(node)[uuid(6)].get("Healthy", False))
    assert time.monotonic() - began_s < 5.0
    assert "XID 79" in gpus(node)[uuid(6)]["HealthMessage"]
    machine.load(driver=False)
    wait_for(
        "none is healthy", lambda: not any(g.get("Healthy", False) for g in gpus(node).values())
    )
    machine.load(driver=True)
    wait_for("all are healthy", lambda: all(g.get("Healthy", False) for g in gpus(node).values()))


def test_a_wrong_inventory_file_is_told_where_people_look(node: Node, tmp_path: Path) -> None:
    file = tmp_path / "gpus.yml"
    file.write_text("gpus: [{uuid: AMD-1, memroy: 1GiB}]")
    node.extra = ("--gpu-inventory", str(file))
    done = subprocess.run(node.words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert (
        f"GPU inventory {file}: gpus[0].memroy: no such field; did you mean memory?" in done.stderr
    )
    file.write_text("gpus: [{uuid: AMD-1, memory: 1GiB, cdi: amd.com/gpu=0}]")
    node.start()
    node.init()
    wait_for("all GPUs are told", lambda: len(gpus(node)) == 9)
    assert gpus(node)["AMD-1"]["CDIName"] == "amd.com/gpu=0"
