"""Order of placement at the level of the whole loop: priorities, queues, gangs, preemption, backfill."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from msgspec import structs

from manager.control.holds import Hold, Holds
from manager.scheduler import Group, Requirement
from manager.scheduler.backfill import Spot
from manager.scheduler.ranking import Terms, Turn
from swarm.v1 import (
    Cluster,
    JobSpec,
    NodeState,
    QueueSpec,
    RestartPolicy,
    SchedulingConfig,
    StopCause,
    Task,
)
from tests.unit.control.world import (
    CPU,
    GIB,
    SECOND,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)

MINUTE = 60 * SECOND


def cluster(*cpus: int, **queues: QueueSpec) -> World:
    """Nodes n1, n2 … with so many CPUs, and queues by name."""
    world = World(0)
    for i, cpu in enumerate(cpus, start=1):
        world.put(make_node(f"n{i}", cpu=cpu * CPU, memory=64 * GIB))
    configure(world, **queues)
    return world


def configure(world: World, **queues: QueueSpec) -> None:
    found = world.tables.get(Cluster, "cluster")
    assert found is not None and found.spec is not None
    named = tuple(structs.replace(q, name=name) for name, q in queues.items())
    spec = structs.replace(found.spec, scheduling=SchedulingConfig(queues=named))
    world.put(structs.replace(found, spec=spec))


def run_job(world: World, name: str, total: int = 1, *, cpu: int = 1, **terms: Any) -> str:
    more = {k: terms.pop(k) for k in ("priority", "restart") if k in terms}
    return world.create(
        make_spec(name, mode=job(total), cpu=cpu * CPU, job=JobSpec(**terms), **more)
    )


def placed(world: World, service_id: str) -> list[Task]:
    return [t for t in world.live(service_id) if state_of(t) >= S.ASSIGNED]


def complete(world: World, task: Task) -> None:
    world.report(task, S.COMPLETE)


def stopped(world: World, cause: StopCause) -> list[str]:
    return sorted(t.service_id for t in world.tables.all(Task) if t.stop_cause == cause)


# ------------------------------------------------------------------ order


def test_a_higher_priority_is_placed_first_whatever_its_age() -> None:
    world = cluster(2)
    world.create(make_spec("old", cpu=2 * CPU))
    world.create(make_spec("new", cpu=2 * CPU, priority=5))
    world.settle()
    assert [len(placed(world, s)) for s in ("s-old", "s-new")] == [0, 1]


def test_services_are_placed_before_jobs_of_the_same_priority() -> None:
    world = cluster(2)
    run_job(world, "a-job", cpu=2)
    world.create(make_spec("web", cpu=2 * CPU))
    world.settle()
    assert [len(placed(world, s)) for s in ("s-a-job", "s-web")] == [0, 1]


def test_within_a_queue_the_oldest_job_is_first() -> None:
    world = cluster(1)
    for name in ("z", "b", "a"):
        world.clock.advance(seconds=1)
        run_job(world, name)
    for expected in ("z", "b", "a"):
        world.settle()
        (running,) = [n for n in "zba" if world.running(f"s-{n}")]
        assert running == expected
        complete(world, world.running(f"s-{running}")[0])


def test_queues_fill_the_cluster_by_their_weights() -> None:
    world = cluster(10, 10, 10, 10, a=QueueSpec(weight=3), b=QueueSpec(weight=1))
    run_job(world, "first", 100, queue="a")
    run_job(world, "second", 100, queue="b")
    world.settle()
    assert [len(placed(world, s)) for s in ("s-first", "s-second")] == [30, 10]


def test_a_queue_that_came_late_gets_its_share_as_tasks_end() -> None:
    world = cluster(10, a=QueueSpec(), b=QueueSpec())
    run_job(world, "first", 100, queue="a")
    world.settle()
    assert len(placed(world, "s-first")) == 10
    run_job(world, "second", 100, queue="b")
    for _ in range(12):
        oldest = min(
            (t for s in ("s-first", "s-second") for t in world.running(s)),
            key=lambda t: (t.meta.created_at_ns if t.meta else 0, t.service_id, t.slot),
        )
        complete(world, oldest)
        world.settle()
    assert [len(placed(world, s)) for s in ("s-first", "s-second")] == [5, 5]


# ------------------------------------------------------------------ quotas


def test_a_raised_quota_is_not_forgotten_with_a_commit_that_failed() -> None:
    world = cluster(10, small=QueueSpec(cpu_nano=CPU))
    run_job(world, "held", cpu=2, queue="small")
    world.settle()
    assert placed(world, "s-held") == []
    configure(world, small=QueueSpec(cpu_nano=4 * CPU))
    world.controller.tick(world.draft())
    world.controller.undo(world.tables)
    world.settle()
    assert len(placed(world, "s-held")) == 1


def test_a_quota_is_never_exceeded_and_blocks_nobody_else() -> None:
    world = cluster(10, small=QueueSpec(cpu_nano=3 * CPU))
    run_job(world, "held", 8, queue="small")
    run_job(world, "free", 4)
    world.settle()
    assert [len(placed(world, s)) for s in ("s-held", "s-free")] == [3, 4]
    waiting = [t for t in world.live("s-held") if state_of(t) < S.ASSIGNED]
    assert waiting and all(
        t.status and "the quota of queue small is 3 CPUs" in t.status.err for t in waiting
    )


def test_what_a_quota_holds_back_follows_as_soon_as_its_queue_holds_less() -> None:
    world = cluster(10, small=QueueSpec(tasks=2))
    run_job(world, "one", 2, queue="small")
    run_job(world, "two", 2, queue="small")
    world.settle()
    assert not placed(world, "s-two")
    complete(world, world.running("s-one")[0])
    world.settle()
    assert len(placed(world, "s-two")) == 1


def test_a_raised_quota_lets_tasks_in() -> None:
    world = cluster(10, small=QueueSpec(tasks=1))
    run_job(world, "held", 4, queue="small")
    world.settle()
    configure(world, small=QueueSpec(tasks=3))
    world.settle()
    assert len(placed(world, "s-held")) == 3


# ------------------------------------------------------------------ gangs


def test_a_gang_is_placed_whole_or_not_at_all() -> None:
    world = cluster(2, 2)
    world.create(make_spec("web", cpu=CPU))
    world.settle()
    run_job(world, "gang", 4, gang=True)
    world.settle()
    assert not placed(world, "s-gang")
    world.scale("s-web", 0)
    world.settle()
    assert len(placed(world, "s-gang")) == 4


def test_two_gangs_that_each_need_most_of_the_cluster_do_not_wait_for_each_other() -> None:
    world = cluster(2, 2)
    run_job(world, "one", 3, gang=True)
    run_job(world, "two", 3, gang=True)
    world.settle()
    counts = sorted(len(placed(world, s)) for s in ("s-one", "s-two"))
    assert counts == [0, 3]
    (first,) = [s for s in ("s-one", "s-two") if placed(world, s)]
    for task in world.running(first):
        complete(world, task)
    world.settle()
    assert len(placed(world, "s-two" if first == "s-one" else "s-one")) == 3


def test_a_gang_beyond_its_quota_takes_no_part_of_it() -> None:
    world = cluster(10, small=QueueSpec(tasks=3))
    run_job(world, "gang", 4, gang=True, queue="small")
    run_job(world, "other", 3, queue="small")
    world.settle()
    assert [len(placed(world, s)) for s in ("s-gang", "s-other")] == [0, 3]


# ------------------------------------------------------------------ preemption


def test_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    world = cluster(2)
    low = world.create(make_spec("low", replicas=2, cpu=CPU))
    world.settle()
    world.create(make_spec("high", cpu=CPU, priority=10))
    world.settle()
    assert len(world.running("s-high")) == 1
    assert len(world.running(low)) == 1
    assert stopped(world, StopCause.PREEMPTED) == [low]
    (victim,) = [t for t in world.tables.all(Task) if t.stop_cause]
    assert victim.stop_message == "preempted by high (priority 10)"
    assert len(world.live(low)) == 2, "it is replaced, and waits"


def test_an_equal_priority_takes_nobodys_place() -> None:
    world = cluster(2)
    world.create(make_spec("one", replicas=2, cpu=CPU, priority=3))
    world.settle()
    world.create(make_spec("two", cpu=CPU, priority=3))
    world.settle()
    assert not stopped(world, StopCause.PREEMPTED)


def test_a_task_that_would_not_help_is_never_stopped() -> None:
    world = cluster(4, 2)
    for name, node, cpu, priority in (
        ("big", "n1", 3, 0),
        ("small", "n1", 1, 0),
        ("firm", "n2", 2, 20),
    ):
        world.create(make_spec(name, cpu=cpu * CPU, priority=priority, placement=on(node)))
        world.settle()
    # 3 CPUs are to be had from big alone, so small stays; firm is above.
    world.create(make_spec("high", cpu=3 * CPU, priority=10))
    world.settle()
    assert stopped(world, StopCause.PREEMPTED) == ["s-big"]
    world.create(make_spec("huge", cpu=5 * CPU, priority=15))
    world.settle()
    assert stopped(world, StopCause.PREEMPTED) == ["s-big"]


def test_the_cheapest_victims_are_chosen() -> None:
    world = cluster(2, 2, 2, 2)
    # Priority 1 on n1; two of priority 0 on n2; one of priority 0 on n3, and on n4 a younger one.
    for name, node, cpu, priority in (
        ("one", "n1", 2, 1),
        ("half-a", "n2", 1, 0),
        ("half-b", "n2", 1, 0),
        ("old", "n3", 2, 0),
        ("young", "n4", 2, 0),
    ):
        world.create(
            make_spec(
                name,
                cpu=cpu * CPU,
                priority=priority,
                placement=on(node),
            )
        )
        world.pass_time(10, step=5)
    world.create(make_spec("high", cpu=2 * CPU, priority=10))
    world.settle()
    assert stopped(world, StopCause.PREEMPTED) == ["s-young"]
    world.create(make_spec("next", cpu=2 * CPU, priority=10))
    world.settle()
    assert stopped(world, StopCause.PREEMPTED) == ["s-old", "s-young"]


def on(node_id: str) -> Any:
    from swarm.v1 import Placement

    return Placement(constraints=(f"node.id=={node_id}",))


def test_tasks_that_stop_already_are_enough() -> None:
    world = cluster(2, 2)
    world.create(make_spec("low", replicas=4, cpu=CPU))
    world.settle()
    world.frozen = {"n1", "n2"}
    world.scale("s-low", 3)
    world.settle()
    world.create(make_spec("high", cpu=CPU, priority=10))
    world.settle()
    assert not stopped(world, StopCause.PREEMPTED)
    world.frozen = set()
    world.settle()
    assert len(world.running("s-high")) == 1


def test_no_further_victims_while_the_first_ones_stop() -> None:
    world = cluster(2, 2)
    world.create(make_spec("low", replicas=4, cpu=CPU))
    world.settle()
    world.frozen = {"n1", "n2"}
    world.create(make_spec("high", cpu=CPU, priority=10))
    world.settle()
    world.create(make_spec("high2", cpu=CPU, priority=10))
    world.pass_time(5)
    assert len(stopped(world, StopCause.PREEMPTED)) == 2
    world.frozen = set()
    world.settle()
    assert world.running("s-high") and world.running("s-high2")


def test_the_place_made_by_preemption_is_kept_for_who_made_it() -> None:
    world = cluster(2)
    world.create(make_spec("low", replicas=2, cpu=CPU))
    world.settle()
    world.frozen = {"n1"}
    world.create(make_spec("high", cpu=2 * CPU, priority=10))
    world.settle()
    assert len(stopped(world, StopCause.PREEMPTED)) == 2
    # One of the two has ended: what is free now would do for a small one.
    world.create(make_spec("small", cpu=CPU))
    (first, _) = world.tables.by(Task, "node", "n1")
    world.report(first, S.SHUTDOWN)
    world.settle()
    assert not placed(world, "s-small")
    (small,) = world.live("s-small")
    assert small.status and "kept for service high (priority 10)" in small.status.err
    world.frozen = set()
    world.settle()
    assert world.running("s-high")


def test_a_gangs_task_costs_its_whole_gang() -> None:
    world = cluster(2, 2, 2)
    run_job(world, "gang", 2, cpu=2, gang=True)
    world.create(make_spec("single", cpu=2 * CPU))
    world.settle()
    assert len(world.running("s-gang")) == 2
    world.create(make_spec("high", cpu=2 * CPU, priority=10))
    world.settle()
    assert stopped(world, StopCause.PREEMPTED) == ["s-single"], "one is fewer than two"
    world.create(make_spec("next", cpu=2 * CPU, priority=10))
    world.settle()
    assert stopped(world, StopCause.PREEMPTED) == ["s-gang", "s-single"]
    assert stopped(world, StopCause.GANG) == ["s-gang"]
    assert world.running("s-next")
    assert not world.running("s-gang")


@pytest.mark.parametrize("way", ["removed", "placed elsewhere"])
def test_a_place_that_is_not_kept_any_more_helps_who_could_not_preempt(way: str) -> None:
    world = cluster(2)
    run_job(world, "low", 2)
    world.settle()
    world.create(make_spec("first", cpu=CPU, priority=10))
    world.tick()
    # Beside the first's place even all of the low ones would not make enough room.
    world.create(make_spec("second", cpu=2 * CPU, priority=5))
    world.tick()
    assert len(stopped(world, StopCause.PREEMPTED)) == 1
    if way == "removed":
        world.remove("s-first")
    else:
        world.put(make_node("n2", cpu=CPU, memory=64 * GIB))
    world.settle()
    assert len(placed(world, "s-second")) == 1


def test_a_reservation_gives_way_to_a_place_that_a_job_of_the_same_priority_has_made() -> None:
    def turn(name: str) -> Turn:
        return Turn(("s-" + name, 1, ""), Terms(priority=9, job=True, gang=True), 0, name)

    group = Group("s", 1, Requirement(), [Task(id="t")])
    holds = Holds()
    holds.put(Hold(turn("first"), group, {"n1": Spot(1)}))
    holds.put(Hold(turn("second"), group, {"n1": Spot(1)}, preempts=True))
    # Else each of them would wait for the other.
    assert holds.binding(turn("first"), 0, 0) == {"n1"}
    assert holds.binding(turn("second"), 0, 0) == frozenset()
    assert holds.binding(turn("third"), 0, 0) == {"n1"}


@pytest.mark.parametrize("gang", [True, False])
def test_tasks_preempt_on_dearer_nodes_once_the_cheap_ones_are_used_up(gang: bool) -> None:
    world = cluster(1, 1, 1)
    world.create(make_spec("cheap", cpu=CPU, replicas=2, priority=2))
    world.create(make_spec("dear", cpu=CPU, priority=5))
    world.settle()
    run_job(world, "top", 3, gang=gang, priority=9)
    world.settle()
    assert len(placed(world, "s-top")) == 3


def test_what_stops_beside_an_end_counts_as_gone_for_who_could_not_preempt() -> None:
    world = cluster(3)
    top = run_job(world, "top", 1, cpu=2, priority=9)
    run_job(world, "low", 1)
    world.settle()
    world.create(make_spec("second", cpu=3 * CPU, priority=5))
    world.settle()
    world.remove("s-low")
    world.tick()
    # One that stops is left; who comes later and is lower must not have what the top one leaves.
    complete(world, world.running(top)[0])
    world.create(make_spec("third", cpu=CPU, priority=2))
    world.settle()
    assert [len(placed(world, s)) for s in ("s-second", "s-third")] == [1, 0]


def test_a_gang_preempts_for_all_of_its_tasks_or_for_none() -> None:
    world = cluster(2, 2, 2)
    world.create(make_spec("low", replicas=2, cpu=2 * CPU))
    world.create(make_spec("firm", cpu=2 * CPU, priority=20))
    world.settle()
    run_job(world, "large", 3, cpu=2, gang=True, priority=10)
    world.settle()
    assert not stopped(world, StopCause.PREEMPTED)
    run_job(world, "gang", 2, cpu=2, gang=True, priority=10)
    world.settle()
    assert stopped(world, StopCause.PREEMPTED) == ["s-low", "s-low"]
    assert len(world.running("s-gang")) == 2


@pytest.mark.parametrize("condition", ["none", "on-failure", "any"])
def test_a_preempted_task_is_replaced_and_has_not_failed(condition: str) -> None:
    world = cluster(1)
    policy = RestartPolicy(condition=condition, max_attempts=1, delay_ns=SECOND)
    low = world.create(make_spec("low", cpu=CPU, restart=policy))
    work = run_job(world, "work", priority=-1, restart=policy)
    world.settle()
    world.create(make_spec("high", cpu=CPU, priority=10))
    world.settle()
    assert world.running("s-high")
    world.scale("s-high", 0)
    world.pass_time(10)
    (again,) = world.running(low)
    assert not again.restarts_ns
    world.scale(low, 0)
    world.pass_time(10)
    assert len(world.running(work)) == 1


def test_a_preempted_jobs_task_is_tried_again_without_counting() -> None:
    world = cluster(1)
    policy = RestartPolicy(condition="on-failure", max_attempts=1, delay_ns=SECOND)
    work = run_job(world, "work", restart=policy)
    for turn in range(3):
        world.settle()
        assert len(world.running(work)) == 1
        world.create(make_spec(f"high{turn}", cpu=CPU, priority=10))
        world.settle()
        assert not world.running(work)
        world.remove(f"s-high{turn}")
        world.settle()
    assert len(world.running(work)) == 1


def test_a_global_task_takes_the_place_it_needs_on_its_node() -> None:
    from tests.unit.control.world import GLOBAL

    world = cluster(1, 1)
    world.create(make_spec("low", replicas=2, cpu=CPU))
    world.settle()
    world.create(make_spec("everywhere", mode=GLOBAL, cpu=CPU, priority=1))
    world.settle()
    assert len(world.running("s-everywhere")) == 2


def test_victims_on_a_node_that_goes_down_are_given_up_for_others() -> None:
    world = cluster(1, 1)
    world.create(make_spec("low", replicas=2, cpu=CPU))
    world.settle()
    world.frozen = {"n1", "n2"}
    world.create(make_spec("high", cpu=CPU, priority=10))
    world.settle()
    (victim,) = [t for t in world.tables.all(Task) if t.stop_cause]
    world.set_state(victim.node_id, NodeState.DOWN)
    world.settle()
    other = {"n1": "n2", "n2": "n1"}[victim.node_id]
    world.frozen = set()
    world.settle()
    assert [t.node_id for t in world.running("s-high")] == [other]


# ------------------------------------------------------------------ backfill


def test_backfill_does_not_delay_the_head_of_the_queue() -> None:
    world = cluster(4)
    run_job(world, "first", cpu=3, timeout_ns=10 * MINUTE)
    world.settle()
    run_job(world, "head", cpu=4)
    world.settle()
    world.clock.advance(seconds=1)
    run_job(world, "long", cpu=1, timeout_ns=30 * MINUTE)
    run_job(world, "short", cpu=1, timeout_ns=5 * MINUTE)
    world.settle()
    assert not placed(world, "s-long")
    assert len(placed(world, "s-short")) == 1
    (waits,) = world.live("s-long")
    assert waits.status and "kept for job head" in waits.status.err
    world.pass_time(4 * 60, step=60)
    complete(world, world.running("s-short")[0])
    complete(world, world.running("s-first")[0])
    world.settle()
    assert world.running("s-head") and not placed(world, "s-long")


def test_what_fits_beside_the_head_goes_before_it() -> None:
    world = cluster(4, 4)
    run_job(world, "first", 2, cpu=3)
    world.settle()
    run_job(world, "head", cpu=3)
    world.settle()
    world.clock.advance(seconds=1)
    run_job(world, "small", 3)
    world.settle()
    # One beside the head to be, one on the other node; a third has no room.
    assert len(placed(world, "s-small")) == 2


def test_services_are_not_held_back_by_jobs_of_their_priority() -> None:
    world = cluster(4)
    run_job(world, "first", cpu=3)
    world.settle()
    run_job(world, "head", cpu=4)
    run_job(world, "later", cpu=1)
    world.settle()
    assert not placed(world, "s-later")
    world.create(make_spec("web", cpu=CPU))
    world.settle()
    assert world.running("s-web")


def test_a_job_that_only_services_are_in_the_way_of_keeps_nothing() -> None:
    world = cluster(4)
    world.create(make_spec("web", cpu=2 * CPU))
    world.settle()
    run_job(world, "head", cpu=4)
    world.settle()
    run_job(world, "later", cpu=2)
    world.settle()
    assert placed(world, "s-later")


def test_a_gang_that_is_first_is_not_starved_by_small_jobs() -> None:
    world = cluster(2, 2)
    run_job(world, "early", 3)
    world.settle()
    run_job(world, "gang", 4, gang=True)
    world.settle()
    for i in range(6):
        world.clock.advance(seconds=1)
        run_job(world, f"small{i}")
    world.settle()
    for task in world.running("s-early"):
        complete(world, task)
        world.settle()
    assert len(placed(world, "s-gang")) == 4
    assert Counter(len(placed(world, f"s-small{i}")) for i in range(6)) == {0: 6}


def test_what_an_undone_tick_kept_for_somebody_counts_for_nothing() -> None:
    """A hold of a tick that was not committed named a task as leaving that never had its place; in
    the next tick the task's new claim was lost for it.
    """
    world = cluster(1, 2, 2, a=QueueSpec())
    run_job(world, "low", 2, cpu=2, gang=True)
    world.tick()
    run_job(world, "gang", 2, cpu=2, gang=True, priority=1)
    run_job(world, "single", 1, cpu=2, queue="a", priority=1)
    world.tick()
    world.agents()
    world.controller.tick(world.draft())
    world.controller.undo(world.tables)
    world.tick()
    used = Counter(t.node_id for s in ("s-low", "s-gang", "s-single") for t in placed(world, s))
    assert max(used.values()) == 1
