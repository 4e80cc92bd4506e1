"""Crash loops: delays that grow, rows that end, and what a new leader knows of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.control import Controller
from manager.control.backoff import JITTER, MAX_DELAY_NS, delay_ns, waited_ns
from swarm import states
from swarm.ids import seeded_rng
from swarm.v1 import JobSpec, NodeState, RestartPolicy, Task, UpdateState, UpdateStatus
from tests.unit.control.world import GLOBAL, SECOND, S, World, job, make_spec, state_of

DELAY = RestartPolicy(delay_ns=5 * SECOND)
# What the next attempts wait for, in seconds, without the lot's share.
EXPECTED = [5, 5, 10, 20, 40, 80, 160, 300, 300]


def newest(world: World, sid: str) -> Task:
    return max(world.tasks(sid), key=lambda t: (t.meta.created_at_ns if t.meta else 0, t.id))


def crash(world: World, sid: str) -> float:
    """The slot's task fails when it has run for a second; how long the next one waits, in s."""
    world.clock.advance(seconds=1)
    (task,) = world.running(sid)
    world.report(task, S.FAILED, err="task: non-zero exit (1)")
    world.tick()
    return (newest(world, sid).start_after_ns - world.clock.now_ns()) / SECOND


def until_it_runs(world: World, sid: str) -> None:
    for _ in range(20):
        if world.running(sid):
            return
        wait_ns = newest(world, sid).start_after_ns - world.clock.now_ns()
        world.clock.advance(seconds=max(0.1, wait_ns / SECOND))
        world.settle()
    raise AssertionError("it does not start")


def new_leader(world: World) -> None:
    world.controller = Controller(seeded_rng(2))
    world.controller.reset(world.tables)


# ---------------------------------------------------------------- the delay


def test_the_delay_doubles_from_the_third_crash_on_to_five_minutes() -> None:
    assert [delay_ns(DELAY, n) / SECOND for n in range(1, 10)] == EXPECTED


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RestartPolicy(delay_ns=0), [0, 0, 2, 4, 8]),
        (RestartPolicy(delay_ns=SECOND // 10), [0.1, 0.1, 2, 4, 8]),
        (RestartPolicy(), [5, 5, 10, 20, 40]),
        (RestartPolicy(delay_ns=5 * SECOND, max_delay_ns=12 * SECOND), [5, 5, 10, 12, 12]),
        (RestartPolicy(delay_ns=5 * SECOND, max_delay_ns=SECOND), [5] * 5),
        (RestartPolicy(delay_ns=5 * SECOND, max_delay_ns=0), [5] * 5),
        (RestartPolicy(delay_ns=600 * SECOND), [600] * 5),
    ],
    ids=["no delay", "a short one", "the default", "a limit", "below it", "switched off", "long"],
)
def test_the_policy_says_how_it_grows(policy: RestartPolicy, expected: list[float]) -> None:
    assert [delay_ns(policy, n) / SECOND for n in range(1, 6)] == expected


@given(st.integers(0, 10**6), st.integers(0, 10**12), st.one_of(st.none(), st.integers(0, 10**13)))
def test_no_delay_is_beyond_its_limit_and_a_fifth(
    crashes: int, delay: int, most: int | None
) -> None:
    policy = RestartPolicy(delay_ns=delay, max_delay_ns=most)
    limit = max(delay, MAX_DELAY_NS if most is None else most)
    drawn = delay_ns(policy, crashes, seeded_rng(crashes))
    assert delay <= delay_ns(policy, crashes) <= drawn <= limit * (1 + JITTER)
    assert drawn <= waited_ns(policy, crashes)


# ---------------------------------------------------------------- the row


def test_a_task_that_crashes_again_and_again_is_tried_ever_more_seldom() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=DELAY))
    world.settle()
    for crashes, expected in enumerate(EXPECTED, start=1):
        wait = crash(world, sid)
        assert newest(world, sid).crashes == crashes
        assert expected <= wait <= expected * (1.2 if crashes >= 3 else 1)
        until_it_runs(world, sid)


@pytest.mark.parametrize("history", [0, 1, 2, 5])
def test_a_new_leader_goes_on_with_the_row_whatever_history_is_kept(history: int) -> None:
    world = World(1, history=history)
    sid = world.create(make_spec(restart=DELAY))
    world.settle()
    for crashes, expected in enumerate(EXPECTED[:5], start=1):
        new_leader(world)
        wait = crash(world, sid)
        assert expected <= wait <= expected * 1.2
        new_leader(world)
        world.settle()
        assert newest(world, sid).start_after_ns > world.clock.now_ns()
        status = world.status(sid)
        assert status.stuck is (crashes >= 3)
        if crashes >= 2:
            assert "backing off, next try in " in status.reasons[0]
            assert f" {crashes} times in a row" in status.reasons[0]
            assert ("exited with code 1," in status.reasons[0]) is (history > 0)
        until_it_runs(world, sid)


def test_who_has_run_well_begins_a_new_row() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=DELAY))
    world.settle()
    for _ in range(4):
        crash(world, sid)
        until_it_runs(world, sid)
    world.pass_time(58, step=10)
    assert crash(world, sid) > 5, "a minute is not over"
    until_it_runs(world, sid)
    world.pass_time(61, step=10)
    assert crash(world, sid) == 5
    assert newest(world, sid).crashes == 0
    until_it_runs(world, sid)
    crash(world, sid)
    assert newest(world, sid).crashes == 1


def test_waiting_for_a_place_is_not_running_well() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=DELAY))
    world.settle()
    for _ in range(2):
        crash(world, sid)
        world.set_state("n1", NodeState.DOWN)
        world.pass_time(200, step=20)
        world.set_state("n1", NodeState.READY)
        until_it_runs(world, sid)
    assert crash(world, sid) >= 10
    assert newest(world, sid).crashes == 3


def test_what_ends_well_too_soon_is_a_crash_loop_too() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=DELAY))
    world.settle()
    for crashes in (1, 2, 3):
        world.report(world.running(sid)[0], S.COMPLETE)
        world.tick()
        assert newest(world, sid).crashes == crashes
        until_it_runs(world, sid)
    world.pass_time(61, step=10)
    world.report(world.running(sid)[0], S.COMPLETE)
    world.tick()
    assert newest(world, sid).crashes == 0


def test_a_new_template_begins_at_none() -> None:
    world = World(1)
    sid = world.create(make_spec(restart=DELAY))
    world.settle()
    for _ in range(4):
        crash(world, sid)
        until_it_runs(world, sid)
    crash(world, sid)
    world.update(sid, make_spec(restart=DELAY, image="web:2"))
    world.settle()
    (task,) = world.running(sid)
    assert task.crashes == 0
    assert crash(world, sid) == 5


def test_a_task_lost_with_its_node_hands_its_row_on() -> None:
    world = World(2)
    sid = world.create(make_spec(restart=DELAY))
    world.settle()
    for _ in range(3):
        crash(world, sid)
        until_it_runs(world, sid)
    world.set_state(world.running(sid)[0].node_id, NodeState.DOWN)
    world.settle()
    assert [t.crashes for t in world.live(sid)] == [3]
    crash(world, sid)
    assert newest(world, sid).crashes == 4


def test_a_delay_goes_on_when_the_node_of_the_next_attempt_is_lost() -> None:
    world = World(2)
    sid = world.create(make_spec(restart=DELAY))
    world.settle()
    for _ in range(3):
        crash(world, sid)
        until_it_runs(world, sid)
    crash(world, sid)
    due_ns = newest(world, sid).start_after_ns
    world.set_state(newest(world, sid).node_id, NodeState.DOWN)
    world.settle()
    (waits,) = world.live(sid)
    assert (waits.start_after_ns, waits.desired_state) == (due_ns, S.READY)
    assert not world.running(sid)


def test_each_node_of_a_global_service_has_a_row_of_its_own() -> None:
    world = World(2)
    sid = world.create(make_spec(mode=GLOBAL, restart=DELAY))
    world.settle()
    for crashes in (1, 2, 3):
        (task,) = [t for t in world.running(sid) if t.node_id == "n1"]
        world.report(task, S.FAILED, err="no")
        world.settle()
        (waits,) = [t for t in world.live(sid) if t.node_id == "n1"]
        assert waits.crashes == crashes
        world.pass_time(13)
    assert {t.node_id: t.crashes for t in world.live(sid)} == {"n1": 3, "n2": 0}


# ---------------------------------------------------------------- attempts


@pytest.mark.parametrize("window_s", [0, 1, 20])
def test_grown_delays_do_not_defeat_max_attempts(window_s: int) -> None:
    world = World(1)
    policy = RestartPolicy(delay_ns=5 * SECOND, max_attempts=6, window_ns=window_s * SECOND)
    sid = world.create(make_spec(restart=policy))
    world.settle()
    attempts = 1
    for _ in range(20):
        if not world.live(sid):
            break
        until_it_runs(world, sid)
        new_leader(world)
        world.report(world.running(sid)[0], S.FAILED, err="no")
        world.settle()
        attempts += bool(world.live(sid))
    assert attempts == 7
    assert world.status(sid).stuck


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1, 30, 59, 61, 90]), min_size=1, max_size=7), st.integers(0, 3))
def test_the_row_is_what_has_run_too_shortly_since_the_last_that_ran_well(
    ran_s: list[int], history: int
) -> None:
    world = World(1, history=history)
    sid = world.create(make_spec(restart=RestartPolicy(delay_ns=SECOND)))
    world.settle()
    row = 0
    for seconds in ran_s:
        until_it_runs(world, sid)
        (task,) = world.running(sid)
        world.clock.advance(seconds=seconds)
        # The node's clock is off by fifty years.
        assert task.status is not None
        skewed = structs.replace(task.status, state=S.FAILED, timestamp_ns=seconds)
        world.put(structs.replace(task, status=skewed))
        world.tick()
        row = row + 1 if seconds < 60 else 0
        assert newest(world, sid).crashes == row
        assert sum(not states.ended(state_of(t)) for t in world.tasks(sid)) == 1


# ---------------------------------------------------------------- jobs


def test_a_job_that_fails_says_when_its_next_attempt_is_due() -> None:
    world = World(1)
    policy = RestartPolicy(condition="on-failure", delay_ns=5 * SECOND)
    spec = make_spec(mode=job(1), restart=policy)
    sid = world.create(structs.replace(spec, job=JobSpec()))
    world.settle()
    for crashes, expected in enumerate((5, 10, 20), start=1):
        world.report(world.running(sid)[0], S.FAILED, err="task: non-zero exit (1)")
        failed_ns = world.clock.now_ns()
        world.settle()
        failed = newest(world, sid)
        assert state_of(failed) == S.FAILED, "nothing of it holds a place meanwhile"
        assert failed.start_after_ns == failed_ns + expected * SECOND
        new_leader(world)
        world.pass_time(expected - 1)
        status = world.status(sid)
        if crashes > 1:
            assert status.reasons == (
                f"1 of 1 task is backing off, next try in 1s: "
                f"exited with code 1, {crashes} times in a row",
            )
        assert status.stuck is (crashes >= 3)
        assert not world.live(sid)
        world.pass_time(1.5)
        assert [t.crashes for t in world.running(sid)] == [crashes]


def test_a_job_s_policy_bounds_its_delay() -> None:
    world = World(1)
    policy = RestartPolicy(condition="on-failure", delay_ns=5 * SECOND, max_delay_ns=12 * SECOND)
    sid = world.create(structs.replace(make_spec(mode=job(1), restart=policy), job=JobSpec()))
    world.settle()
    waits = []
    for _ in range(4):
        world.report(world.running(sid)[0], S.FAILED, err="no")
        world.settle()
        waits.append(round((newest(world, sid).start_after_ns - world.clock.now_ns()) / SECOND))
        world.pass_time(13)
    assert waits == [5, 10, 12, 12]


def test_a_task_of_an_older_version_that_fails_while_it_waits_is_not_tried_again_before() -> None:
    world = World(1)
    policy = RestartPolicy(condition="any", delay_ns=60 * SECOND)
    sid = world.create(make_spec(restart=policy))
    world.tick()
    world.frozen.add("n1")
    world.clock.advance(seconds=1)
    world.report(newest(world, sid), S.FAILED, err="no")
    world.tick()
    waiting = newest(world, sid)
    assert waiting.desired_state == S.READY
    # The roll-out of a newer version is paused, so the slot stays with the one it has.
    world.update(sid, make_spec(image="web:2", restart=policy))
    paused = UpdateStatus(state=UpdateState.PAUSED, started_at_ns=world.clock.now_ns())
    world.put(structs.replace(world.service(sid), update_status=paused))
    world.report(waiting, S.REJECTED, err="no such image")
    for _ in range(5):
        world.clock.advance(seconds=1)
        world.tick()
    assert newest(world, sid).id == waiting.id
    world.clock.advance(seconds=60)
    world.tick()
    assert newest(world, sid).spec_version == 1 and newest(world, sid).id != waiting.id
