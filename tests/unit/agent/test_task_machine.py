"""The task machine: tables of what follows from what, then properties over any events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import task_machine as tm
from agent.runtime.base import Found, Phase, Started
from swarm.states import DESIRED, ended, may_follow
from swarm.v1 import ContainerStatus, TaskState, TaskStatus

S = TaskState
STARTED = Started(ContainerStatus(container_id="c1", pid=7), address="172.17.0.2")
SICK = Started(ContainerStatus(container_id="c1", pid=7), healthy=False)


class Run:
    """One task driven event by event."""

    def __init__(self, state: TaskState = S.ASSIGNED, desired: TaskState = S.RUNNING) -> None:
        self.machine = tm.begin(TaskStatus(state=state), desired, equipped=True)
        self.effects: list[tm.Effect] = []
        self.states: list[TaskState] = []
        self.now_ns = 0

    def feed(self, *events: tm.Event) -> Run:
        for event in events:
            self.now_ns += 1
            self.machine, self.effects = tm.step(self.machine, event, now_ns=self.now_ns)
            self.machine.check_invariants()
            if tm.Report() in self.effects:
                self.states.append(self.machine.state)
        return self

    def state(self) -> TaskState:
        return self.machine.state

    def doing(self) -> tm.Doing:
        return self.machine.doing


def running() -> Run:
    return Run().feed(tm.Located(None), tm.Prepared(), tm.DidStart(STARTED))


def test_what_the_node_could_not_do_stands_in_the_status() -> None:
    noted = replace(STARTED, note="its 0.5 of GPU G is not enforced")
    run = Run().feed(tm.Located(None), tm.Prepared(), tm.DidStart(noted))
    assert run.machine.status.message == "started; its 0.5 of GPU G is not enforced"


def test_task_goes_through_all_states_to_running() -> None:
    run = Run().feed(tm.Located(None))
    assert run.states == [S.PREPARING]
    assert run.effects[-1] == tm.Run(tm.Doing.PREPARE)
    run.feed(tm.Prepared())
    assert run.state() == S.STARTING
    assert run.effects[-1] == tm.Run(tm.Doing.START)
    run.feed(tm.DidStart(STARTED))
    assert run.state() == S.RUNNING
    assert tm.Expose(STARTED) in run.effects
    assert run.machine.status.container == STARTED.container


def test_desired_ready_prepares_and_waits_for_desired_running() -> None:
    run = Run(desired=S.READY).feed(tm.Located(None), tm.Prepared())
    assert run.state() == S.READY
    assert run.doing() == tm.Doing.NOTHING
    run.feed(tm.Assigned(S.RUNNING, equipped=True))
    assert run.doing() == tm.Doing.START


def test_nothing_is_done_before_the_host_was_looked_at() -> None:
    run = Run().feed(tm.Assigned(S.RUNNING, equipped=True), tm.Assigned(S.REMOVE, equipped=True))
    assert run.effects == []
    assert run.doing() == tm.Doing.NOTHING


def test_restored_task_is_not_prepared_before_a_manager_confirms_it() -> None:
    run = Run()
    run.machine = tm.begin(TaskStatus(state=S.PREPARING), S.RUNNING, equipped=False)
    run.feed(tm.Located(None))
    assert run.doing() == tm.Doing.NOTHING
    run.feed(tm.Assigned(S.RUNNING, equipped=True))
    assert run.doing() == tm.Doing.PREPARE


def test_task_with_healthcheck_runs_once_healthy() -> None:
    run = Run().feed(tm.Located(None), tm.Prepared(), tm.DidStart(SICK))
    assert run.state() == S.STARTING
    run.feed(tm.Healthy())
    assert run.state() == S.RUNNING
    assert any(isinstance(e, tm.Expose) for e in run.effects)


def test_health_told_before_the_start_was_answered_counts() -> None:
    run = Run().feed(tm.Located(None), tm.Prepared(), tm.Healthy(), tm.DidStart(SICK))
    assert run.state() == S.RUNNING


def test_a_check_that_says_nothing_leaves_no_colon_behind() -> None:
    run = running().feed(tm.Unhealthy(""), tm.DidStop(137))
    assert run.machine.status.err == "unhealthy"


def test_unhealthy_task_is_stopped_then_failed() -> None:
    run = running().feed(tm.Unhealthy("probe said no"))
    assert tm.Hide() in run.effects
    assert run.doing() == tm.Doing.STOP
    run.feed(tm.DidStop(137))
    assert run.state() == S.FAILED
    assert run.machine.status.err == "unhealthy: probe said no"
    assert run.machine.status.cause == "unhealthy"
    assert run.machine.status.container is not None
    assert run.machine.status.container.exit_code == 137


def test_that_a_task_is_unhealthy_is_reported_before_it_is_stopped() -> None:
    before = running()
    since_ns = before.machine.status.timestamp_ns
    run = before.feed(tm.Unhealthy("3 checks failed: no"))
    assert run.effects[0] == tm.Report()
    status = run.machine.status
    assert (status.state, status.cause) == (S.RUNNING, "unhealthy")
    assert status.err == "unhealthy: 3 checks failed: no"
    assert status.timestamp_ns == since_ns, "it has run since then"


def test_a_task_that_never_was_healthy_says_so_once_it_has_failed() -> None:
    run = Run().feed(tm.Located(None), tm.Prepared(), tm.DidStart(SICK), tm.Unhealthy("no"))
    assert run.state() == S.STARTING
    assert run.machine.status.cause == ""
    run.feed(tm.DidStop(137))
    assert (run.state(), run.machine.status.cause) == (S.FAILED, "unhealthy")


@pytest.mark.parametrize(
    ("given", "state", "err", "cause"),
    [
        (tm.Exit(0, "stopped with its engine", "engine_failed", forced=True), S.FAILED,
         "stopped with its engine", "engine_failed"),
        (tm.Exit(137, "killed by somebody", forced=True), S.FAILED,
         "task: non-zero exit (137): killed by somebody", ""),
        (tm.Exit(137, "out of memory", "oom"), S.FAILED,
         "task: non-zero exit (137): out of memory", "oom"),
        (tm.Exit(0), S.COMPLETE, "", ""),
    ],
)  # fmt: skip
def test_an_end_that_somebody_else_made_is_no_success(
    given: tm.Exit, state: TaskState, err: str, cause: str
) -> None:
    status = running().feed(tm.Exited(given)).machine.status
    assert (status.state, status.err, status.cause) == (state, err, cause)


@pytest.mark.parametrize(
    ("found", "doing", "state"),
    [
        (None, tm.Doing.PREPARE, S.PREPARING),
        (Found("t", Phase.CREATED), tm.Doing.CLEAN, S.PREPARING),
        (Found("t", Phase.RUNNING, STARTED), tm.Doing.NOTHING, S.RUNNING),
        (Found("t", Phase.EXITED, exit_code=1), tm.Doing.NOTHING, S.FAILED),
    ],
)
def test_an_interrupted_preparation_goes_on_from_what_is_found(
    found: Found | None, doing: tm.Doing, state: TaskState
) -> None:
    run = Run().feed(tm.Located(None), tm.Interrupted())
    assert (run.doing(), run.state()) == (tm.Doing.NOTHING, S.PREPARING)
    assert run.effects == [], "nobody knows anything, so nothing is said or done"
    run.feed(tm.Located(found))
    assert (run.doing(), run.state()) == (doing, state)


@pytest.mark.parametrize(
    ("found", "doing", "state"),
    [
        (None, tm.Doing.NOTHING, S.FAILED),
        (Found("t", Phase.CREATED), tm.Doing.START, S.STARTING),
        (Found("t", Phase.RUNNING, STARTED), tm.Doing.NOTHING, S.RUNNING),
        (Found("t", Phase.EXITED, exit_code=1), tm.Doing.NOTHING, S.FAILED),
    ],
)
def test_an_interrupted_start_goes_on_from_what_is_found(
    found: Found | None, doing: tm.Doing, state: TaskState
) -> None:
    run = Run().feed(tm.Located(None), tm.Prepared(), tm.Interrupted(), tm.Located(found))
    assert (run.doing(), run.state()) == (doing, state)


def test_a_stop_that_was_asked_for_meanwhile_is_done_after_the_look() -> None:
    run = Run().feed(tm.Located(None), tm.Prepared(), tm.Interrupted())
    run.feed(tm.Assigned(S.SHUTDOWN, equipped=True))
    assert run.effects == []
    run.feed(tm.Located(Found("t", Phase.RUNNING, STARTED)))
    assert run.doing() == tm.Doing.STOP


@pytest.mark.parametrize(
    ("code", "message", "state", "err"),
    [
        (0, "", S.COMPLETE, ""),
        (1, "", S.FAILED, "task: non-zero exit (1)"),
        (137, "out of memory", S.FAILED, "task: non-zero exit (137): out of memory"),
    ],
)
def test_exit_code_decides_the_end(code: int, message: str, state: TaskState, err: str) -> None:
    run = running().feed(tm.Exited(tm.Exit(code, message)))
    assert (run.state(), run.machine.status.err) == (state, err)
    assert tm.Hide() in run.effects


def test_task_that_ends_before_its_start_is_answered_is_not_lost() -> None:
    run = Run().feed(tm.Located(None), tm.Prepared(), tm.Exited(tm.Exit(0)), tm.DidStart(STARTED))
    assert run.state() == S.COMPLETE


@pytest.mark.parametrize("rejected", [True, False])
def test_failed_preparation_ends_the_task_at_once(rejected: bool) -> None:
    run = Run().feed(tm.Located(None), tm.Refused("no such image", rejected))
    assert run.state() == (S.REJECTED if rejected else S.FAILED)
    assert run.machine.status.err == "no such image"
    assert run.doing() == tm.Doing.NOTHING


@pytest.mark.parametrize("rejected", [True, False])
def test_failed_start_is_stopped_before_it_has_failed(rejected: bool) -> None:
    run = Run().feed(tm.Located(None), tm.Prepared(), tm.Refused("no such file", rejected))
    assert run.doing() == tm.Doing.STOP
    run.feed(tm.DidStop(None))
    assert run.state() == (S.REJECTED if rejected else S.FAILED)


def test_shutdown_stops_and_keeps_what_is_left() -> None:
    run = running().feed(tm.Assigned(S.SHUTDOWN, equipped=True))
    assert run.doing() == tm.Doing.STOP
    run.feed(tm.Exited(tm.Exit(143)), tm.DidStop(143))
    assert run.state() == S.SHUTDOWN
    assert run.machine.have == tm.Have.EXITED
    assert run.doing() == tm.Doing.NOTHING


def test_remove_stops_removes_and_forgets() -> None:
    run = running().feed(tm.Assigned(S.REMOVE, equipped=True), tm.DidStop(0))
    assert run.doing() == tm.Doing.REMOVE
    run.feed(tm.DidRemove())
    assert run.effects == [tm.Forget()]
    assert run.machine.forgotten


def test_shutdown_in_the_middle_of_a_preparation_abandons_it() -> None:
    run = Run().feed(tm.Located(None), tm.Assigned(S.SHUTDOWN, equipped=True))
    assert run.effects == [tm.Abandon()]
    run.feed(tm.Refused("abandoned", rejected=False))
    assert run.state() == S.SHUTDOWN


def test_remove_in_the_middle_of_a_start_leaves_nothing() -> None:
    run = Run().feed(tm.Located(None), tm.Prepared(), tm.Assigned(S.REMOVE, equipped=True))
    assert tm.Abandon() in run.effects
    run.feed(tm.Refused("abandoned", rejected=False))
    assert run.doing() == tm.Doing.STOP
    run.feed(tm.DidStop(None))
    assert run.doing() == tm.Doing.REMOVE


def test_desired_state_never_goes_back() -> None:
    run = running().feed(tm.Assigned(S.SHUTDOWN, equipped=True))
    run.feed(tm.Assigned(S.RUNNING, equipped=True), tm.DidStop(0))
    assert run.state() == S.SHUTDOWN


def test_removed_task_that_never_came_here_is_forgotten_at_once() -> None:
    run = Run(desired=S.REMOVE).feed(tm.Located(None))
    assert run.machine.forgotten
    assert tm.Forget() in run.effects


FOUND_RUNNING = Found("t", Phase.RUNNING, STARTED)
FOUND_CREATED = Found("t", Phase.CREATED)
FOUND_DEAD = Found("t", Phase.EXITED, exit_code=3)
FOUND_DONE = Found("t", Phase.EXITED, exit_code=0)


@pytest.mark.parametrize(
    ("state", "desired", "found", "after", "doing"),
    [
        (S.RUNNING, S.RUNNING, FOUND_RUNNING, S.RUNNING, tm.Doing.NOTHING),
        (S.RUNNING, S.RUNNING, FOUND_DEAD, S.FAILED, tm.Doing.NOTHING),
        (S.RUNNING, S.RUNNING, FOUND_DONE, S.COMPLETE, tm.Doing.NOTHING),
        (S.RUNNING, S.RUNNING, None, S.FAILED, tm.Doing.NOTHING),
        (S.RUNNING, S.RUNNING, FOUND_CREATED, S.FAILED, tm.Doing.NOTHING),
        (S.RUNNING, S.SHUTDOWN, FOUND_RUNNING, S.RUNNING, tm.Doing.STOP),
        (S.RUNNING, S.SHUTDOWN, FOUND_DEAD, S.SHUTDOWN, tm.Doing.NOTHING),
        (S.RUNNING, S.SHUTDOWN, None, S.SHUTDOWN, tm.Doing.NOTHING),
        (S.RUNNING, S.REMOVE, FOUND_RUNNING, S.RUNNING, tm.Doing.STOP),
        (S.RUNNING, S.REMOVE, FOUND_DEAD, S.SHUTDOWN, tm.Doing.REMOVE),
        (S.STARTING, S.RUNNING, FOUND_RUNNING, S.RUNNING, tm.Doing.NOTHING),
        (S.STARTING, S.RUNNING, FOUND_CREATED, S.STARTING, tm.Doing.START),
        (S.STARTING, S.RUNNING, None, S.FAILED, tm.Doing.NOTHING),
        (S.READY, S.RUNNING, FOUND_CREATED, S.STARTING, tm.Doing.START),
        (S.READY, S.RUNNING, None, S.READY, tm.Doing.PREPARE),
        (S.READY, S.READY, FOUND_CREATED, S.READY, tm.Doing.NOTHING),
        (S.READY, S.RUNNING, FOUND_RUNNING, S.RUNNING, tm.Doing.NOTHING),
        (S.PREPARING, S.RUNNING, FOUND_CREATED, S.PREPARING, tm.Doing.CLEAN),
        (S.PREPARING, S.RUNNING, None, S.PREPARING, tm.Doing.PREPARE),
        (S.ASSIGNED, S.RUNNING, FOUND_RUNNING, S.RUNNING, tm.Doing.NOTHING),
        (S.FAILED, S.RUNNING, FOUND_DEAD, S.FAILED, tm.Doing.NOTHING),
        (S.FAILED, S.RUNNING, FOUND_RUNNING, S.FAILED, tm.Doing.STOP),
        (S.FAILED, S.REMOVE, FOUND_DEAD, S.FAILED, tm.Doing.REMOVE),
        (S.COMPLETE, S.RUNNING, None, S.COMPLETE, tm.Doing.NOTHING),
    ],
)
def test_after_a_restart_the_host_tells_what_became_of_it(
    state: TaskState, desired: TaskState, found: Found | None, after: TaskState, doing: tm.Doing
) -> None:
    run = Run(state, desired).feed(tm.Located(found))
    assert (run.state(), run.doing()) == (after, doing)


def test_interrupted_preparation_is_cleaned_and_done_again() -> None:
    run = Run(S.PREPARING).feed(tm.Located(FOUND_CREATED), tm.DidRemove())
    assert run.doing() == tm.Doing.PREPARE


FOUNDS = st.sampled_from([None, FOUND_RUNNING, FOUND_CREATED, FOUND_DEAD, FOUND_DONE])
EVENTS = st.one_of(
    st.builds(tm.Assigned, st.sampled_from(sorted(DESIRED)), st.booleans()),
    st.builds(tm.Located, FOUNDS),
    st.just(tm.Prepared()),
    st.sampled_from([tm.DidStart(STARTED), tm.DidStart(SICK)]),
    st.builds(tm.Refused, st.just("why"), st.booleans()),
    st.just(tm.Interrupted()),
    st.builds(tm.DidStop, st.sampled_from([None, 0, 143])),
    st.just(tm.DidRemove()),
    st.just(tm.Healthy()),
    st.just(tm.Unhealthy("why")),
    st.builds(lambda code: tm.Exited(tm.Exit(code)), st.sampled_from([0, 1])),
)


@given(
    state=st.sampled_from(sorted(set(S) - {S.UNSPECIFIED, S.NEW, S.PENDING, S.REMOVE})),
    desired=st.sampled_from(sorted(DESIRED)),
    equipped=st.booleans(),
    events=st.lists(EVENTS, max_size=25),
)
def test_whatever_happens_states_only_grow_and_one_thing_is_done_at_a_time(
    state: TaskState, desired: TaskState, equipped: bool, events: list[tm.Event]
) -> None:
    machine = tm.begin(TaskStatus(state=state), desired, equipped=equipped)
    for number, event in enumerate(events):
        before = machine
        machine, effects = tm.step(machine, event, now_ns=number)
        machine.check_invariants()
        assert may_follow(before.state, machine.state)
        runs = [e for e in effects if isinstance(e, tm.Run)]
        assert len(runs) <= 1
        if runs:
            assert before.doing == tm.Doing.NOTHING or before.doing != machine.doing
            assert machine.doing == runs[0].doing
        if ended(before.state):
            assert not any(r.doing in (tm.Doing.PREPARE, tm.Doing.START) for r in runs)
        if machine.desired >= S.SHUTDOWN:
            assert not any(r.doing in (tm.Doing.PREPARE, tm.Doing.START) for r in runs)


def _result(doing: tm.Doing) -> tm.Event | None:
    return {
        tm.Doing.NOTHING: None,
        tm.Doing.PREPARE: tm.Prepared(),
        tm.Doing.START: tm.DidStart(STARTED),
        tm.Doing.STOP: tm.DidStop(0),
        tm.Doing.CLEAN: tm.DidRemove(),
        tm.Doing.REMOVE: tm.DidRemove(),
    }[doing]


@given(
    state=st.sampled_from([S.ASSIGNED, S.PREPARING, S.READY, S.STARTING, S.RUNNING, S.FAILED]),
    found=FOUNDS,
    events=st.lists(EVENTS, max_size=15),
)
def test_a_removed_task_is_always_forgotten_in_the_end(
    state: TaskState, found: Found | None, events: list[tm.Event]
) -> None:
    run = Run(state).feed(tm.Located(found), *events, tm.Assigned(S.REMOVE, equipped=True))
    run.feed(tm.Located(found))  # where it was interrupted
    for _ in range(6):
        result = _result(run.doing())
        if result is not None:
            run.feed(result)
    assert run.machine.forgotten
