"""What a service's status says: settling, being stuck, and why, in good English."""

from __future__ import annotations

import pytest
from msgspec import structs

from manager.control import service_status
from swarm.v1 import (
    ContainerSpec,
    ContainerStatus,
    Dependency,
    HealthConfig,
    JobSpec,
    Node,
    NodeDescription,
    NodeState,
    NodeStatus,
    Placement,
    RestartPolicy,
    ServiceSpec,
    Task,
    UpdateConfig,
)
from tests.unit.control.world import (
    CPU,
    GLOBAL,
    SECOND,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)

FAST = RestartPolicy(delay_ns=SECOND // 5)
ONCE = RestartPolicy(condition="none")


def with_healthcheck(spec: ServiceSpec, **check: int) -> ServiceSpec:
    assert spec.task is not None
    assert spec.task.container is not None
    health = HealthConfig(test=("CMD", "true"), **check)
    container = structs.replace(spec.task.container, healthcheck=health)
    return structs.replace(spec, task=structs.replace(spec.task, container=container))


def ran(world: World, task: Task, state: S, *, code: int = 3, err: str = "") -> None:
    """The task's end as agents report it when it had been started."""
    world.report(
        task,
        state,
        err=err or ("" if state == S.COMPLETE else f"task: non-zero exit ({code})"),
        container=ContainerStatus(container_id="c", exit_code=0 if state == S.COMPLETE else code),
    )


def crash(world: World, sid: str, times: int, *, after_s: float = 0.1, **how: object) -> None:
    for _ in range(times):
        world.pass_time(1, step=0.1)
        world.clock.advance(seconds=after_s)
        ran(world, world.running(sid)[0], S.FAILED, **how)  # type: ignore[arg-type]
    world.settle()


# ---------------------------------------------------------------- settling


def test_tasks_must_have_run_for_the_monitor_time() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    status = world.status(sid)
    assert (status.converged, status.stuck, status.up_to_date) == (False, False, 2)
    assert status.reasons == ("2 of 2 replicas have just started and must keep running for 5s",)
    assert 4.9 * SECOND < status.settles_in_ns <= 5 * SECOND
    world.pass_time(4)
    assert 0 < world.status(sid).settles_in_ns <= 1 * SECOND
    world.pass_time(1.1)
    status = world.status(sid)
    assert (status.converged, status.settles_in_ns, status.reasons) == (True, 0, ())


def test_the_watch_is_not_told_where_more_is_in_the_way() -> None:
    """It would be told long after it is over: nothing else tells that time has passed."""
    world = World(1)
    world.create(make_spec("other", cpu=CPU))
    world.settle()
    sid = world.create(make_spec(replicas=4, cpu=CPU))
    world.settle()
    assert [r.partition(":")[0] for r in world.status(sid).reasons] == [
        "1 of 4 replicas is not placed"
    ]


def test_a_replica_that_comes_later_is_watched_the_others_are_not_again() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.pass_time(10)
    world.scale(sid, 3)
    world.settle()
    assert world.status(sid).reasons == (
        "1 of 3 replicas has just started and must keep running for 5s",
    )


@pytest.mark.parametrize("monitor_s", [0, 2])
def test_the_watched_time_is_that_of_the_update_config(monitor_s: int) -> None:
    world = World(1)
    sid = world.create(make_spec(update=UpdateConfig(parallelism=1, monitor_ns=monitor_s * SECOND)))
    world.settle()
    assert world.status(sid).converged is (monitor_s == 0)
    world.pass_time(2.1)
    assert world.status(sid).converged


def test_a_task_with_a_healthcheck_and_a_job_need_no_watching() -> None:
    world = World(1)
    web = world.create(with_healthcheck(make_spec("web")))
    once = world.create(make_spec("once", mode=job(1), restart=ONCE))
    world.settle()
    assert world.status(web).converged
    world.report(world.running(once)[0], S.COMPLETE)
    world.settle()
    assert world.status(once).converged


def test_a_healthcheck_that_is_switched_off_counts_for_nothing() -> None:
    world = World(1)
    off = HealthConfig(test=("NONE",))
    spec = make_spec()
    assert spec.task is not None
    task = structs.replace(spec.task, container=ContainerSpec(image="web:1", healthcheck=off))
    sid = world.create(structs.replace(spec, task=task))
    world.settle()
    assert world.status(sid).settles_in_ns > 0


@pytest.mark.parametrize("skew_s", [-3600, 3600])
def test_clocks_that_differ_change_the_watch_by_no_more_than_itself(skew_s: int) -> None:
    """Neither the node's clock nor another manager's makes anybody wait for an hour."""
    world = World(1)
    sid = world.create(make_spec())
    world.settle()
    (task,) = world.running(sid)
    assert task.status is not None
    wrong = task.status.timestamp_ns + skew_s * SECOND
    world.put(structs.replace(task, status=structs.replace(task.status, timestamp_ns=wrong)))
    assert 0 < world.status(sid).settles_in_ns <= 5 * SECOND
    here_ns = world.clock.now_ns() + skew_s * SECOND
    assert service_status(world.tables, world.service(sid), here_ns).settles_in_ns <= 5 * SECOND


def test_an_update_s_last_seconds_are_told_as_well() -> None:
    world = World(1)
    sid = world.create(make_spec())
    world.pass_time(6)
    world.update(sid, make_spec(image="web:2"))
    world.pass_time(1)
    status = world.status(sid)
    assert status.reasons == (
        "1 of 1 replica has just started and must keep running for 5s",
        "update in progress",
    )
    assert 3 * SECOND < status.settles_in_ns < 5 * SECOND
    world.pass_time(5)
    assert world.status(sid).converged


# ---------------------------------------------------------------- stuck: tasks that fail


@pytest.mark.parametrize("cause", ["image_missing", "image_denied"])
def test_an_image_that_cannot_be_had_is_known_at_once(cause: str) -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.tick()
    for task in world.tasks(sid):
        world.report(task, S.REJECTED, err="image 'web:1' cannot be pulled: no", cause=cause)
    world.tick()
    status = world.status(sid)
    assert status.stuck
    assert status.reasons == (
        "2 of 2 replicas cannot run: image 'web:1' cannot be pulled: no (n1, n2)",
    )
    assert status.failing_task_id in {t.id for t in world.tasks(sid)}


def test_a_registry_that_is_away_may_come_back() -> None:
    world = World(1)
    sid = world.create(make_spec())
    world.tick()
    world.report(world.tasks(sid)[0], S.FAILED, err="registry cannot be reached")
    world.tick()
    status = world.status(sid)
    assert not status.stuck
    assert status.reasons == (
        "1 of 1 replica is waiting to be restarted: registry cannot be reached",
    )


def test_what_one_node_cannot_do_another_may_be_able_to() -> None:
    world = World(2)
    sid = world.create(make_spec(restart=FAST))
    world.tick()
    for expected in (False, True):
        world.report(world.live(sid)[0], S.REJECTED, err="no ipc", cause="unsupported")
        assert not world.status(sid).stuck, "nobody has decided yet"
        world.clock.advance(seconds=0.001)
        world.tick()
        assert world.status(sid).stuck is expected
    assert world.status(sid).reasons == ("1 of 1 replica cannot run on any node: no ipc (n1, n2)",)


def test_a_crash_loop_is_one_after_three_times() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=FAST))
    crash(world, sid, 2)
    status = world.status(sid)
    assert not status.stuck
    assert status.reasons == (
        "1 of 1 replica is backing off, next try in 1s: exited with code 3, 2 times in a row",
    )
    crash(world, sid, 1)
    status = world.status(sid)
    assert status.stuck
    assert status.reasons == (
        "1 of 1 replica is backing off, next try in 3s: exited with code 3, 3 times in a row",
    )
    failed = [t for t in world.tasks(sid) if state_of(t) == S.FAILED]
    assert status.failing_task_id == failed[-1].id
    world.pass_time(2.5)
    assert world.running(sid)
    status = world.status(sid)
    assert status.stuck, "the next attempt has not proved itself yet"
    assert status.reasons[0] == (
        "1 of 1 replica is in a crash loop, 3 times in a row: exited with code 3"
    )
    world.pass_time(5)
    assert world.status(sid).converged


def test_what_takes_long_to_fail_and_never_runs_is_a_crash_loop_too() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=FAST))
    for _ in range(3):
        world.tick()
        world.clock.advance(seconds=60)
        world.report(world.live(sid)[0], S.FAILED, err="registry cannot be reached")
    world.tick()
    assert world.status(sid).reasons == (
        "1 of 1 replica is backing off, next try in 3s: "
        "registry cannot be reached, 3 times in a row",
    )


def test_a_replacement_that_fails_before_it_is_due_leaves_no_gap_in_the_story() -> None:
    """Until its delay is over the slot has no task; it is in its crash loop all the same."""
    world = World(1)
    world.frozen.add("n1")
    sid = world.create(make_spec(restart=RestartPolicy(delay_ns=5 * SECOND)))
    stuck = []
    for _ in range(20):  # a second each; whatever is there fails at once
        world.tick()
        for task in world.live(sid):
            world.report(task, S.FAILED, err="no such host")
        world.clock.advance(seconds=0.001)
        world.tick()
        status = world.status(sid)
        failures = [t for t in world.tasks(sid) if state_of(t) == S.FAILED]
        assert status.stuck is (len(failures) >= 3)
        stuck.append(status.stuck and not world.live(sid))
        if not status.stuck:
            assert all("no such host" in reason for reason in status.reasons)
        world.clock.advance(seconds=1)
    assert any(stuck)


def test_tasks_that_have_run_well_before_they_fail_are_no_crash_loop() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=FAST))
    crash(world, sid, 4, after_s=61)
    status = world.status(sid)
    assert not status.stuck
    assert status.reasons == ("1 of 1 replica is waiting to be restarted: exited with code 3",)


def test_a_healthcheck_that_never_passes_is_a_crash_loop_too() -> None:
    world = World(1)
    spec = with_healthcheck(
        make_spec(restart=FAST), interval_ns=2 * SECOND, timeout_ns=SECOND, retries=3
    )
    sid = world.create(spec)
    crash(world, sid, 3, after_s=8, err="unhealthy: connection refused")
    assert world.status(sid).reasons == (
        "1 of 1 replica is backing off, next try in 3s: "
        "unhealthy: connection refused, 3 times in a row",
    )


def test_what_ends_well_and_restarts_for_ever_is_a_loop_too() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=FAST))
    for _ in range(3):
        world.pass_time(1)
        ran(world, world.running(sid)[0], S.COMPLETE)
    world.settle()
    assert world.status(sid).reasons == (
        "1 of 1 replica is backing off, next try in 3s: exited with code 0, 3 times in a row",
    )


def test_slots_with_the_same_story_are_told_together_the_commonest_first() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=4, restart=ONCE))
    world.settle()
    for task, code in zip(world.running(sid), (1, 1, 2), strict=False):
        ran(world, task, S.FAILED, code=code)
    world.settle()
    status = world.status(sid)
    assert status.stuck
    assert status.reasons == (
        "2 of 4 replicas ended and will not be restarted: exited with code 1",
        "1 of 4 replicas ended and will not be restarted: exited with code 2",
    )
    assert status.settles_in_ns == 0, "time alone does not help"


def test_attempts_that_are_used_up_are_told() -> None:
    world = World(1)
    policy = RestartPolicy(delay_ns=SECOND // 5, max_attempts=1)
    sid = world.create(make_spec(mode=job(1), restart=policy))
    crash(world, sid, 2, err="task: non-zero exit (137): out of memory")
    status = world.status(sid)
    assert status.stuck
    assert status.reasons == (
        "1 of 1 task ended and will not be restarted after 1 restart: "
        "exited with code 137: out of memory",
    )


def test_a_new_template_is_a_new_chance() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=ONCE))
    crash(world, sid, 1)
    assert world.status(sid).stuck
    world.update(sid, make_spec(restart=ONCE, image="web:2"))
    assert not world.status(sid).stuck
    world.settle()
    status = world.status(sid)
    assert not status.stuck
    assert status.failing_task_id == ""


def test_a_paused_update_is_stuck_with_the_failure_behind_it() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2, restart=ONCE))
    world.pass_time(6)
    world.failing.add("web:2")
    world.update(sid, make_spec(replicas=2, restart=ONCE, image="web:2"))
    world.pass_time(1)
    status = world.status(sid)
    assert status.stuck
    (failed,) = [t for t in world.tasks(sid) if state_of(t) == S.FAILED]
    assert status.reasons == (
        f"update paused due to failure or early termination of task {failed.id}: exit code 1",
        "1 of 2 replicas ended and will not be restarted: exit code 1",
        "1 of 2 replicas is not yet on the current version",
    )
    assert status.failing_task_id == failed.id


def test_after_a_rollback_by_failure_a_service_is_at_rest() -> None:
    world = World(2)
    config = UpdateConfig(parallelism=1, monitor_ns=SECOND, failure_action="rollback")
    sid = world.create(make_spec(replicas=2, restart=FAST, update=config))
    world.pass_time(6)
    world.failing.add("web:2")
    world.update(sid, make_spec(replicas=2, restart=FAST, update=config, image="web:2"))
    world.pass_time(10)
    status = world.status(sid)
    assert (status.converged, status.stuck, status.settles_in_ns) == (False, False, 0)
    assert (status.running, status.desired, status.up_to_date) == (2, 2, 2)
    assert status.reasons == ("the update failed and was rolled back to the previous version",)
    failed = {t.id for t in world.tasks(sid) if state_of(t) == S.FAILED}
    assert status.failing_task_id in failed
    world.update(sid, make_spec(replicas=2, restart=FAST, update=config, image="web:3"))
    world.pass_time(10)
    assert world.status(sid).converged


# ---------------------------------------------------------------- stuck: places


def test_a_task_that_fits_no_node_is_stuck_until_one_joins() -> None:
    world = World(2)
    sid = world.create(make_spec(cpu=8 * CPU))
    world.settle()
    status = world.status(sid)
    assert status.stuck
    assert status.reasons == (
        "1 of 1 replica can never be placed: no suitable node "
        "(2 of 2 nodes short of CPU: need 8, best free 4 on n2)",
    )
    assert status.failing_task_id == ""
    world.put(make_node("n3", cpu=8 * CPU))
    assert not world.status(sid).stuck


def test_a_task_that_would_fit_a_node_that_is_down_waits() -> None:
    world = World(1)
    world.put(make_node("big", cpu=16 * CPU))
    world.set_state("big", NodeState.DOWN)
    sid = world.create(make_spec(cpu=8 * CPU))
    world.settle()
    status = world.status(sid)
    assert not status.stuck
    assert status.reasons[0].startswith("1 of 1 replica is not placed: no suitable node ")


def test_a_task_for_which_others_may_make_room_waits() -> None:
    world = World(1)
    world.create(make_spec("other", cpu=4 * CPU))
    world.settle()
    sid = world.create(make_spec(cpu=CPU))
    world.settle()
    assert not world.status(sid).stuck


def test_a_cluster_without_nodes_waits_for_them() -> None:
    world = World(0)
    sid = world.create(make_spec())
    world.settle()
    assert not world.status(sid).stuck


def unheard(node_id: str) -> Node:
    """A node that has joined and was not heard yet."""
    node = make_node(node_id)
    status = NodeStatus(state=NodeState.UNKNOWN)
    return structs.replace(node, description=NodeDescription(hostname=node_id), status=status)


def test_a_node_that_was_not_seen_yet_may_take_anything() -> None:
    world = World(0)
    world.put(unheard("n1"))
    web = world.create(
        make_spec("web", replicas=3, cpu=2 * CPU, placement=Placement(max_replicas=1))
    )
    every = world.create(make_spec("every", mode=GLOBAL))
    world.settle()
    assert world.status(web).reasons == (
        "3 of 3 replicas are not placed: no suitable node (1 node not seen yet)",
    )
    status = world.status(every)
    assert status.reasons == ("no node that it may run on has been seen yet",)
    assert not (world.status(web).stuck or status.stuck or status.converged)
    world.put(make_node("n1"))
    world.pass_time(6)
    assert world.status(web).stuck
    assert world.status(every).converged


def test_what_no_node_can_do_so_far_one_not_seen_yet_may() -> None:
    world = World(1)
    world.put(unheard("n2"))
    sid = world.create(make_spec(restart=FAST))
    world.tick()
    world.report(world.live(sid)[0], S.REJECTED, err="no", cause="program_missing")
    world.tick()
    assert not world.status(sid).stuck
    world.remove_node("n2")
    assert world.status(sid).stuck


def test_more_replicas_than_all_nodes_may_have_can_never_run() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=5, placement=Placement(max_replicas=2)))
    world.settle()
    status = world.status(sid)
    assert status.stuck
    assert status.reasons[0].startswith("no more than 4 of 5 replicas can ever be placed: ")


def test_a_job_that_goes_in_turns_needs_one_place_only() -> None:
    world = World(1)
    sid = world.create(make_spec(mode=job(20), cpu=3 * CPU))
    world.settle()
    assert not world.status(sid).stuck


def test_a_global_task_too_large_for_its_node_is_stuck() -> None:
    world = World(1)
    world.put(make_node("small", cpu=CPU))
    sid = world.create(make_spec(mode=GLOBAL, cpu=2 * CPU))
    world.settle()
    status = world.status(sid)
    assert status.stuck
    assert status.reasons[0].startswith("1 of 2 tasks can never be placed: ")


# ---------------------------------------------------------------- stuck: gates


def behind(name: str, other: str, condition: str, **spec: object) -> ServiceSpec:
    gate = Dependency(service=other, condition=condition, required=True)
    return make_spec(name, depends_on=(gate,), **spec)  # type: ignore[arg-type]


def test_a_service_that_waits_for_nobody_is_stuck() -> None:
    world = World(1)
    sid = world.create(behind("web", "db", "service_started"))
    world.settle()
    status = world.status(sid)
    assert status.stuck
    assert status.reasons == ("the service waits for service db, which does not exist",)


def test_a_service_behind_one_that_is_stuck_is_stuck_with_its_reason() -> None:
    world = World(1)
    migrate = world.create(make_spec("migrate", mode=job(1), restart=ONCE))
    world.create(behind("web", "migrate", "service_completed_successfully"))
    world.create(behind("front", "web", "service_started"))
    world.settle()
    assert not world.status("s-front").stuck
    crash(world, migrate, 1)
    why = "1 of 1 task ended and will not be restarted: exited with code 3"
    web = (
        "the service waits until service migrate has completed (0 of 1 task so far), which is "
        f"stuck: {why}"
    )
    assert world.status("s-web").reasons == (web,)
    front = world.status("s-front")
    assert front.stuck
    assert front.reasons == (
        "the service waits until service web has started (0 of 1 task so far), which is stuck "
        f"behind service migrate: {why}",
    )


@pytest.mark.parametrize(("wide", "deep"), [(1, 400), (4, 30)])
def test_a_web_of_services_that_wait_costs_one_look_each(wide: int, deep: int) -> None:
    """Neither a long chain nor many ways to the same one is too much."""
    world = World(1)
    world.create(make_spec("first", cpu=64 * CPU))
    before = ["first"]
    for row in range(deep):
        gates = tuple(
            Dependency(service=b, condition="service_started", required=True) for b in before
        )
        before = [f"x{row}-{i}" for i in range(wide)]
        for name in before:
            world.create(make_spec(name, depends_on=gates))
    world.settle()
    status = world.status(f"s-{before[0]}")
    assert status.stuck
    assert ", which is stuck behind service first: 1 of 1 replica can " in status.reasons[0]


def test_services_that_wait_for_each_other_do_not_ask_for_ever() -> None:
    world = World(1)
    world.create(behind("a", "b", "service_started"))
    world.create(behind("b", "a", "service_started"))
    world.settle()
    assert not world.status("s-a").stuck


def test_a_running_service_does_not_mind_what_becomes_of_the_other() -> None:
    world = World(1)
    world.create(make_spec("db"))
    world.create(behind("web", "db", "service_healthy"))
    world.pass_time(10)
    world.report(world.running("s-db")[0], S.FAILED)
    world.tick()
    assert world.status("s-web").converged


# ---------------------------------------------------------------- words


def test_what_an_earlier_version_failed_of_is_not_told_of_this_one() -> None:
    config = UpdateConfig(
        parallelism=1, monitor_ns=SECOND, failure_action="rollback", deadline_ns=5 * SECOND
    )
    world = World(1)
    sid = world.create(make_spec(restart=FAST, update=config))
    world.pass_time(6)
    world.failing.add("web:2")
    world.update(sid, make_spec(restart=FAST, update=config, image="web:2"))
    world.pass_time(10)
    assert world.status(sid).failing_task_id
    world.frozen.add("n1")
    slow = structs.replace(config, order="start-first")
    world.update(sid, make_spec(restart=FAST, update=slow, image="web:3"))
    world.tick()
    assert world.status(sid).reasons[0] == "1 of 1 replica is assigned"
    world.pass_time(10)
    update = world.service(sid).update_status
    assert update is not None
    assert update.message.endswith(
        "update rolled back: no progress for 5s: 1 of 1 replica of the new version is assigned"
    )
    world.frozen.clear()
    world.pass_time(10)
    status = world.status(sid)
    assert status.reasons == ("the update failed and was rolled back to the previous version",)
    assert not status.failing_task_id


def test_one_is_singular() -> None:
    world = World(1)
    sid = world.create(make_spec(replicas=2))
    world.pass_time(6)
    world.frozen.add("n1")
    world.scale(sid, 1)
    world.settle()
    assert world.status(sid).reasons == ("1 task is still stopping",)
    world.scale(sid, 0)
    world.settle()
    assert world.status(sid).reasons == ("2 tasks are still stopping",)


def test_an_old_task_beside_its_replacement_is_told() -> None:
    world = World(1)
    config = UpdateConfig(parallelism=1, order="start-first")
    sid = world.create(make_spec(update=config))
    world.pass_time(6)
    world.update(sid, make_spec(update=config, image="web:2"))
    world.tick()
    assert world.status(sid).reasons == (
        "1 of 1 replica is assigned",
        "update in progress",
    )


def test_a_status_says_whether_it_is_of_a_job() -> None:
    world = World(1)
    assert world.status(world.create(make_spec("once", mode=job(2)))).job
    assert not world.status(world.create(make_spec())).job


def test_a_task_that_the_cluster_stopped_is_told_with_the_reason_for_that() -> None:
    world = World(1)
    spec = structs.replace(make_spec(mode=job(1)), job=JobSpec(timeout_ns=SECOND))
    sid = world.create(spec)
    world.settle()
    world.pass_time(3, step=0.5)
    world.settle()
    assert world.status(sid).reasons[0] == (
        "1 of 1 task ended: ran for longer than 1s, which is all that its job allows"
    )
