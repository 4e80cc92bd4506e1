"""How queues stand, and waiting tasks in them."""

from __future__ import annotations

from manager.control import rehearse, standing, usage
from manager.scheduler import NodeTable
from swarm.ids import seeded_rng
from swarm.v1 import QueueSpec
from tests.unit.control.test_admission import cluster, complete, run_job
from tests.unit.control.world import CPU, GIB, S, make_spec, state_of


def test_default_is_listed_first_and_without_being_configured() -> None:
    world = cluster(4, z=QueueSpec(), a=QueueSpec(weight=2))
    assert [q.spec.name for q in usage(world.tables) if q.spec] == ["default", "a", "z"]


def test_a_queue_tells_what_its_jobs_hold_and_who_waits_in_order() -> None:
    world = cluster(4, batch=QueueSpec(weight=2, cpu_nano=3 * CPU))
    for name in ("one", "two", "three"):
        run_job(world, name, 2, queue="batch")
        world.clock.advance(seconds=1)
    run_job(world, "first", 2, queue="batch", priority=1)
    world.create(make_spec("web", memory=GIB))
    world.settle()
    (_, batch) = usage(world.tables)
    assert (batch.cpu_nano, batch.tasks, batch.jobs_running) == (3 * CPU, 3, 2)
    assert batch.waiting == ("one", "two", "three")
    # Three of four CPUs, by the weight 2.
    assert batch.fair_share == 375_000
    assert batch.gpu_nano == 0


def test_what_has_ended_is_held_no_more() -> None:
    world = cluster(4)
    run_job(world, "one", 2)
    world.settle()
    for task in world.running("s-one"):
        complete(world, task)
    world.settle()
    (default,) = usage(world.tables)
    assert (default.tasks, default.jobs_running, default.waiting) == (0, 0, ())


def test_a_waiting_task_knows_its_queue_its_turn_and_what_holds_it_back() -> None:
    world = cluster(4, batch=QueueSpec(tasks=1))
    for name in ("one", "two", "three"):
        run_job(world, name, queue="batch")
        world.clock.advance(seconds=1)
    world.settle()
    (task,) = world.live("s-three")
    found = standing(world.tables, NodeTable.build(world.tables), task, now_ns=world.clock.now_ns())
    assert (found.queue, found.position) == ("batch", 1)
    assert found.held_back == (
        "the quota of queue batch is 1 tasks: its jobs hold 1, this one needs 1",
    )
    assert "raise its quota" in found.hint
    (placed,) = world.running("s-one")
    assert (
        standing(
            world.tables, NodeTable.build(world.tables), placed, now_ns=world.clock.now_ns()
        ).queue
        == ""
    )


def test_a_task_that_preempts_says_what_it_waits_for() -> None:
    world = cluster(2)
    world.create(make_spec("low", cpu=2 * CPU))
    world.settle()
    world.frozen = {"n1"}
    world.create(make_spec("high", cpu=2 * CPU, priority=1))
    world.settle()
    (task,) = world.live("s-high")
    assert state_of(task) < S.ASSIGNED
    found = standing(world.tables, NodeTable.build(world.tables), task, now_ns=world.clock.now_ns())
    assert found.held_back == ("waits for tasks of lower priority to stop on n1",)


def test_a_rehearsal_tells_whose_tasks_would_be_stopped() -> None:
    world = cluster(2, 2)
    world.create(make_spec("low", replicas=4, cpu=CPU))
    world.settle()
    world.create(make_spec("high", cpu=2 * CPU, priority=7))
    found = rehearse(
        world.tables, now_ns=world.clock.now_ns(), rng=seeded_rng(5), services=["s-high"]
    )
    assert found.preempted() == (
        "2 tasks of low (priority 0) would be stopped: preempted by high (priority 7)",
    )
    assert found.placement("s-high").nodes[0].tasks == 1
    assert len(world.running("s-low")) == 4
