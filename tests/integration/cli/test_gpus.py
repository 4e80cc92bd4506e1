"""GPUs on the terminal: lists, one of them, and the columns of nodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec import structs

from swarm.gpus import WHOLE
from swarm.v1 import (
    Gpu,
    GpuHolder,
    GpuLink,
    GpuProximity,
    GpuUsage,
    ListGpusResponse,
)
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import node

GIB = 1 << 30
A, B = "n1" + "0" * 23, "n2" + "0" * 23
MODEL = "NVIDIA A100-SXM4-40GB"


def gpu(uuid: str, index: int, **fields: Any) -> Gpu:
    known = {"memory_bytes": 40 * GIB, "numa_node": 0, "driver": "nvidia", "healthy": True}
    return Gpu(**{"uuid": uuid, "index": index, "model": MODEL, **known, **fields})


@dataclass(frozen=True, slots=True)
class Usages:
    """The cluster of these tests: alpha with three GPUs, one of them split, beta with one."""

    all: tuple[GpuUsage, ...] = (
        GpuUsage(
            node_id=A,
            hostname="alpha",
            gpu=gpu(
                "GPU-aaaaaaaa-0000",
                0,
                links=(
                    GpuLink(
                        uuid="GPU-bbbbbbbb-0000", proximity=GpuProximity.ONE_SWITCH, nvlinks=12
                    ),
                ),
                compute_capability="8.0",
            ),
            claimed_share=WHOLE // 2,
            claimed_memory_bytes=10 * GIB,
            holders=(GpuHolder(task_id="t1" * 12, name="infer.1", share=WHOLE // 2),),
            usable=True,
        ),
        GpuUsage(
            node_id=A,
            hostname="alpha",
            gpu=gpu("GPU-bbbbbbbb-0000", 1, healthy=False, health_message="XID 79"),
        ),
        GpuUsage(node_id=A, hostname="alpha", gpu=gpu("GPU-cccccccc-0000", 2)),
        GpuUsage(
            node_id=A,
            hostname="alpha",
            gpu=gpu(
                "MIG-dddddddd-0000",
                0,
                parent_uuid="GPU-cccccccc-0000",
                mig_profile="1g.5gb",
                memory_bytes=5 * GIB,
            ),
            usable=True,
        ),
        GpuUsage(
            node_id=B,
            hostname="beta",
            gpu=gpu("GPU-eeeeeeee-0000", 0, model="NVIDIA H100", memory_bytes=80 * GIB),
            claimed_share=WHOLE,
            claimed_memory_bytes=80 * GIB,
            holders=(GpuHolder(task_id="t2" * 12, name="train.1", share=WHOLE),),
            usable=True,
        ),
    )


@pytest.fixture
def gpus(cluster: FakeCluster) -> Usages:
    usages = Usages()
    for name, id_ in (("alpha", A), ("beta", B)):
        made = node(name, id_=id_)
        assert made.description is not None
        mine = tuple(u.gpu for u in usages.all if u.node_id == id_ and u.gpu is not None)
        cluster.add(structs.replace(made, description=structs.replace(made.description, gpus=mine)))
    cluster.gpus = ListGpusResponse(gpus=usages.all)
    cluster.info = type(cluster.info)(node_id=A)
    return usages


def test_gpu_ls_shows_what_is_free_and_who_has_the_rest(cli: Cli, gpus: Usages) -> None:
    assert cli.ok("gpu", "ls") == (
        "NODE      INDEX     UUID           MODEL                          MEMORY    FREE      "
        "HEALTH      TASKS           REASON\n"
        "alpha     0         GPU-aaaaaaaa   NVIDIA A100-SXM4-40GB          40 GiB    0.5       "
        "Healthy     infer.1 (0.5)\n"
        "alpha     1         GPU-bbbbbbbb   NVIDIA A100-SXM4-40GB          40 GiB    0         "
        "Unhealthy                   XID 79\n"
        "alpha     2         GPU-cccccccc   NVIDIA A100-SXM4-40GB          40 GiB    split     "
        "Healthy\n"
        "alpha     0         MIG-dddddddd   NVIDIA A100-SXM4-40GB 1g.5gb   5 GiB     1         "
        "Healthy\n"
        "beta      0         GPU-eeeeeeee   NVIDIA H100                    80 GiB    0         "
        "Healthy     train.1\n"
    )
    assert cli.ok("gpu", "ls", "-q", "--filter", "node=beta") == "GPU-eeeeeeee-0000\n"


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (("node=alpha", "health=healthy"), "aaaaaaaa cccccccc dddddddd"),
        (("model=H100",), "eeeeeeee"),
        (("model=1g.5gb",), "dddddddd"),
        (("task=infer",), "aaaaaaaa"),
        (("task=train.1",), "eeeeeeee"),
        (("free=part",), "aaaaaaaa"),
        (("free=whole",), "dddddddd"),
        (("free=none", "health=unhealthy"), "bbbbbbbb"),
    ],
)
def test_gpu_ls_filters(cli: Cli, gpus: Usages, filters: tuple[str, ...], found: str) -> None:
    options = [word for text in filters for word in ("--filter", text)]
    uuids = cli.ok("gpu", "ls", "-q", *options).split()
    assert [uuid.split("-")[1] for uuid in uuids] == found.split()


def test_a_wrong_filter_value_names_the_accepted_ones(cli: Cli, gpus: Usages) -> None:
    answer = cli("gpu", "ls", "--filter", "free=all")
    assert answer.code == 2
    assert "write one of whole, part, none" in answer.err


def test_a_cluster_without_gpus_has_an_empty_list(cli: Cli, cluster: FakeCluster) -> None:
    assert cli.ok("gpu", "ls").split() == [
        "NODE",
        "INDEX",
        "UUID",
        "MODEL",
        "MEMORY",
        "FREE",
        "HEALTH",
        "TASKS",
    ]


@pytest.mark.parametrize(
    "ref",
    ["GPU-aaaaaaaa-0000", "GPU-aa", "alpha/0", f"{A}/0"],
    ids=["uuid", "prefix", "place", "id"],
)
def test_gpu_inspect_by_uuid_prefix_or_place(cli: Cli, gpus: Usages, ref: str) -> None:
    [found] = json.loads(cli.ok("gpu", "inspect", ref))
    assert found["UUID"] == "GPU-aaaaaaaa-0000"
    assert found["NodeName"] == "alpha"
    assert found["FreeShare"] == 0.5
    assert found["Tasks"] == [{"ID": "t1" * 12, "Name": "infer.1", "Share": 0.5}]
    assert cli.ok("gpu", "inspect", "--format", "{{.FreeShare}} {{.UUID}}", ref) == (
        "0.5 GPU-aaaaaaaa-0000\n"
    )


def test_a_gpu_that_is_not_there_is_told_with_the_nearest_one(cli: Cli, gpus: Usages) -> None:
    answer = cli("gpu", "inspect", "alpha/9")
    assert answer.code == 4
    assert "did you mean alpha/" in answer.err
    answer = cli("gpu", "inspect", "GPU-")
    assert answer.code == 2
    assert "4 matches found" in answer.err


def test_gpu_inspect_for_people_names_links_and_tasks(cli: Cli, gpus: Usages) -> None:
    out = cli.ok("gpu", "inspect", "--pretty", "alpha/0")
    assert "Free:                   0.5 of 1\n" in out
    assert " GPU 1:                 12 NVLinks, one switch\n" in out
    assert f" infer.1:               0.5 ({'t1' * 12})" in out


def test_node_ls_has_a_column_of_gpus_where_there_are_any(cli: Cli, gpus: Usages) -> None:
    lines = cli.ok("node", "ls").splitlines()
    assert lines[0].endswith("GPUS")
    assert [line.split()[-1] for line in lines[1:]] == ["1.5/3", "0/1"]
    assert cli.ok("node", "ls", "--format", "{{.GPUsFree}} {{.GPUsTotal}}") == "1.5 3\n0 1\n"


def test_node_ls_without_gpus_is_as_in_docker(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(node("alpha", id_=A))
    assert "GPUS" not in cli.ok("node", "ls")


def test_node_inspect_for_people_tells_of_each_gpu(cli: Cli, gpus: Usages) -> None:
    out = cli.ok("node", "inspect", "--pretty", "alpha")
    assert (
        "GPUs:\n 0 GPU-aaaaaaaa:        NVIDIA A100-SXM4-40GB, 40 GiB, 0.5 free, infer.1\n" in out
    )
    assert "40 GiB, not healthy: XID 79" in out
    assert "40 GiB, split into instances\n" in out
