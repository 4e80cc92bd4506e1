"""A GPU that is not healthy: its tasks move, and it comes back."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from swarm.v1 import (
    DeviceRequest,
    Gpu,
    JobState,
    NodeState,
    RestartPolicy,
    ServiceSpec,
    StopCause,
    Task,
    TaskState,
)
from tests.unit.control.world import GLOBAL, World, job, make_node, make_spec

S = TaskState
GIB = 1 << 30


def gpu(uuid: str, **fields: Any) -> Gpu:
    known = {"model": "A100", "memory_bytes": 40 * GIB, "driver": "nvidia", "healthy": True}
    return Gpu(**{"uuid": uuid, **known, **fields})


def cluster(*nodes: tuple[Gpu, ...]) -> World:
    world = World(0)
    world.put(*(make_node(f"n{i}", gpus=gpus) for i, gpus in enumerate(nodes, 1)))
    return world


def wants(count: int = 1, options: dict[str, str] | None = None, **fields: Any) -> ServiceSpec:
    request = DeviceRequest(count=count, capabilities=("gpu",), options=options or {})
    return make_spec(reserved={"devices": (request,)}, **fields)


def set_gpu(world: World, node_id: str, uuid: str, **fields: Any) -> None:
    node = world.node(node_id)
    assert node.description is not None
    gpus = tuple(
        structs.replace(g, **fields) if g.uuid == uuid else g for g in node.description.gpus
    )
    world.put(structs.replace(node, description=structs.replace(node.description, gpus=gpus)))


def drop_gpu(world: World, node_id: str, uuid: str) -> None:
    node = world.node(node_id)
    assert node.description is not None
    gpus = tuple(g for g in node.description.gpus if g.uuid != uuid)
    world.put(structs.replace(node, description=structs.replace(node.description, gpus=gpus)))


def held(world: World, service_id: str) -> list[str]:
    return sorted(u for t in world.running(service_id) for u in t.assigned_gpus)


def stopped(world: World, service_id: str) -> Task:
    [task] = [t for t in world.tasks(service_id) if t.stop_cause != StopCause.UNSPECIFIED]
    return task


def test_its_task_moves_with_words_and_does_not_count_as_a_failure() -> None:
    world = cluster((gpu("A"),), (gpu("B"),))
    sid = world.create(wants(restart=RestartPolicy(condition="none")))
    world.settle()
    [first] = world.running(sid)
    [uuid] = first.assigned_gpus
    set_gpu(world, first.node_id, uuid, healthy=False, health_message="XID 79")
    world.settle()
    gone = stopped(world, sid)
    assert (gone.id, gone.stop_cause) == (first.id, StopCause.DEVICE)
    assert gone.stop_message == f"GPU {uuid} is not healthy: XID 79"
    assert held(world, sid) == sorted({"A", "B"} - {uuid})


def test_another_gpu_of_the_node_will_do_and_other_tasks_stay() -> None:
    world = cluster((gpu("A"), gpu("B"), gpu("C")))
    sid = world.create(wants(replicas=2))
    plain = world.create(make_spec("plain"))
    world.settle()
    before = {t.id for t in world.running(sid)} | {t.id for t in world.running(plain)}
    sick = held(world, sid)[0]
    set_gpu(world, "n1", sick, healthy=False)
    world.settle()
    assert held(world, sid) == sorted({"A", "B", "C"} - {sick})
    after = {t.id for t in world.running(sid)} | {t.id for t in world.running(plain)}
    assert len(before & after) == 2


def test_with_nowhere_to_go_it_waits_and_runs_when_the_gpu_is_back() -> None:
    world = cluster((gpu("A"),))
    sid = world.create(wants())
    world.settle()
    set_gpu(world, "n1", "A", healthy=False)
    world.settle()
    assert not world.running(sid)
    [waiting] = world.live(sid)
    assert (waiting.node_id, waiting.assigned_gpus) == ("", ())
    set_gpu(world, "n1", "A", healthy=True)
    world.settle()
    assert held(world, sid) == ["A"]


def test_a_global_services_task_waits_for_a_gpu_of_its_own_node() -> None:
    world = cluster((gpu("A"),), (gpu("B"),))
    sid = world.create(wants(mode=GLOBAL))
    world.settle()
    assert held(world, sid) == ["A", "B"]
    set_gpu(world, "n1", "A", healthy=False)
    world.settle()
    assert held(world, sid) == ["B"]
    set_gpu(world, "n1", "A", healthy=True)
    world.settle()
    assert held(world, sid) == ["A", "B"]


def test_all_who_share_it_move() -> None:
    world = cluster((gpu("A"),), (gpu("B"),))
    sid = world.create(wants(replicas=2, options={"fraction": "0.5"}))
    world.settle()
    [uuid] = set(held(world, sid))
    set_gpu(world, world.running(sid)[0].node_id, uuid, healthy=False)
    world.settle()
    assert held(world, sid) == [*({"A", "B"} - {uuid})] * 2


def test_a_gpu_that_is_gone_is_as_a_sick_one() -> None:
    world = cluster((gpu("A"), gpu("M", parent_uuid="P")), (gpu("B"),))
    sid = world.create(wants(replicas=3))
    world.settle()
    assert held(world, sid) == ["A", "B", "M"]
    drop_gpu(world, "n1", "M")
    world.settle()
    assert held(world, sid) == ["A", "B"]
    assert stopped(world, sid).stop_message == "GPU M is not on its node any more"


def test_a_jobs_task_is_tried_again_without_counting() -> None:
    world = cluster((gpu("A"),), (gpu("B"),))
    sid = world.create(wants(mode=job(1), restart=RestartPolicy(condition="none")))
    world.settle()
    [first] = world.running(sid)
    set_gpu(world, first.node_id, first.assigned_gpus[0], healthy=False)
    world.settle()
    [second] = world.running(sid)
    assert second.node_id != first.node_id
    assert second.restarts_ns == ()
    status = world.service(sid).job_status
    assert status is not None
    assert status.state == JobState.RUNNING


def test_what_uses_it_just_now_moves_nothing_and_a_node_that_was_away_keeps_its_claims() -> None:
    world = cluster((gpu("A"),), (gpu("B"),))
    sid = world.create(wants(replicas=2))
    world.settle()
    before = {t.id: t.assigned_gpus for t in world.running(sid)}
    set_gpu(world, "n1", "A", ecc_errors=1)
    world.set_state("n1", NodeState.UNKNOWN)
    world.settle()
    world.set_state("n1", NodeState.READY)
    world.settle()
    assert {t.id: t.assigned_gpus for t in world.running(sid)} == before
