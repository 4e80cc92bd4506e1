"""All GPUs, and what tasks hold of them."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.gpus import WHOLE
from swarm.v1 import (
    Availability,
    DeviceRequest,
    GenericResource,
    Gpu,
    GpuHolder,
    GpuUsage,
    ListGpusRequest,
    NodeDescription,
    NodeSpec,
    NodeState,
    NodeStatus,
    ResourceRequirements,
    Resources,
    TaskState,
    TaskStatus,
)
from tests.unit.api.harness import CONTEXT, Api, changed, node, service, task

GIB = 1 << 30


def gpu(uuid: str, **fields: Any) -> Gpu:
    return Gpu(**{"uuid": uuid, "memory_bytes": 40 * GIB, "healthy": True, **fields})


def gpu_node(id_: str, *gpus: Gpu, **fields: Any) -> Any:
    return changed(
        node(id_), description=NodeDescription(hostname=f"host-{id_}", gpus=gpus), **fields
    )


def wants(name: str, options: dict[str, str] | None = None, **fields: Any) -> Any:
    request = DeviceRequest(capabilities=("gpu",), options=options or {}, **fields)
    return service(
        name, task={"resources": ResourceRequirements(reservations=Resources(devices=(request,)))}
    )


async def listed(api: Api) -> dict[str, GpuUsage]:
    answer = await api.control.list_gpus(ListGpusRequest(), CONTEXT)
    return {usage.gpu.uuid: usage for usage in answer.gpus if usage.gpu is not None}


async def holding(api: Api, id_: str, service_id: str, *uuids: str, **fields: Any) -> None:
    made = task(id_, service_id, node_id="n1", state=TaskState.RUNNING)
    await api.put(changed(made, assigned_gpus=uuids, spec_version=1, **fields))


async def test_shares_and_memory_are_what_tasks_hold_until_they_end(api: Api) -> None:
    await api.put(gpu_node("n1", gpu("A"), gpu("B", index=1), gpu("C", index=2)))
    half = await api.create(service=wants("half", {"fraction": "0.5", "memory": "10GiB"}, count=1))
    whole = await api.create(service=wants("whole", count=1))
    await holding(api, "t1", half, "A", slot=1)
    await holding(api, "t2", half, "A", slot=2)
    await holding(api, "t3", whole, "B", slot=1)
    await holding(api, "t4", whole, "C", status=TaskStatus(state=TaskState.COMPLETE))
    found = await listed(api)
    shared = found["A"]
    assert (shared.claimed_share, shared.claimed_memory_bytes) == (WHOLE, 20 * GIB)
    assert shared.holders == (
        GpuHolder(task_id="t1", name="half.1", share=WHOLE // 2),
        GpuHolder(task_id="t2", name="half.2", share=WHOLE // 2),
    )
    assert (found["B"].claimed_share, found["B"].claimed_memory_bytes) == (WHOLE, 40 * GIB)
    assert (found["C"].claimed_share, found["C"].holders) == (0, ())


async def test_gpus_come_by_host_and_instances_after_their_gpu(api: Api) -> None:
    await api.put(
        gpu_node(
            "n2",
            gpu("A"),
            gpu("B", index=1),
            gpu("M1", parent_uuid="B", index=1),
            gpu("M0", parent_uuid="A"),
        ),
        gpu_node("n1", gpu("Z")),
        node("n3"),
    )
    assert list(await listed(api)) == ["Z", "A", "M0", "B", "M1"]


@pytest.mark.parametrize(
    ("fields", "usable"),
    [
        ({}, True),
        ({"spec": NodeSpec(availability=Availability.DRAIN)}, False),
        ({"spec": NodeSpec(availability=Availability.PAUSE)}, False),
        ({"status": NodeStatus(state=NodeState.DOWN)}, False),
        ({"revoked": True}, False),
    ],
)
async def test_usable_is_what_a_task_could_be_given(
    api: Api, fields: dict[str, Any], usable: bool
) -> None:
    await api.put(
        gpu_node(
            "n1",
            gpu("A"),
            gpu("B", healthy=False),
            gpu("C"),
            gpu("M", parent_uuid="C"),
            **fields,
        )
    )
    found = await listed(api)
    assert {uuid: u.usable for uuid, u in found.items()} == {
        "A": usable,
        "B": False,
        "C": False,
        "M": usable,
    }


async def test_a_task_whose_version_is_forgotten_holds_whole_gpus(api: Api) -> None:
    await api.put(gpu_node("n1", gpu("A")))
    await holding(api, "t1", "gone", "A")
    assert (await listed(api))["A"].claimed_share == WHOLE


async def test_gpus_given_for_swarms_kinds_are_whole(api: Api) -> None:
    await api.put(gpu_node("n1", gpu("A")))
    reserved = Resources(generic=(GenericResource(kind="NVIDIA-GPU", count=1),))
    id_ = await api.create(
        service=service("old", task={"resources": ResourceRequirements(reservations=reserved)})
    )
    await holding(api, "t1", id_, "A", slot=1)
    assert (await listed(api))["A"].holders == (GpuHolder(task_id="t1", name="old.1", share=WHOLE),)
