"""When waiting ends, and what is shown until then."""

from __future__ import annotations

import pytest

from cli.progress import REPEAT_EVERY_S, PlainDisplay, _Seen, plain_line, rows
from cli.verdict import (
    STUCK_GRACE_S,
    STUCK_HOLD_S,
    Goal,
    Progress,
    StuckServices,
    Verdict,
    judge,
)
from swarm.clock import SECOND_NS, ManualClock
from swarm.v1 import ServiceStatus, UpdateState, UpdateStatus


def status(**more: object) -> ServiceStatus:
    fields: dict[str, object] = {"service_id": "w", "name": "web", "desired": 3, **more}
    return ServiceStatus(**fields)  # type: ignore[arg-type]  # of these names


def update(state: UpdateState, started: int = 9) -> UpdateStatus:
    return UpdateStatus(state=state, started_at_ns=started)


@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        ({}, {}, Progress.GOING),
        ({"converged": True}, {}, Progress.DONE),
        ({"converged": True, "update_status": update(UpdateState.COMPLETED)}, {}, Progress.DONE),
        ({"converged": True, "update_status": update(UpdateState.UPDATING)}, {}, Progress.GOING),
        (
            {"converged": True, "update_status": update(UpdateState.ROLLBACK_STARTED)},
            {},
            Progress.GOING,
        ),
        ({"update_status": update(UpdateState.PAUSED)}, {}, Progress.PAUSED),
        ({"update_status": update(UpdateState.ROLLBACK_PAUSED)}, {}, Progress.PAUSED),
        (
            {"converged": True, "update_status": update(UpdateState.ROLLBACK_COMPLETED)},
            {},
            Progress.ROLLED_BACK,
        ),
        (
            {"converged": False, "update_status": update(UpdateState.ROLLBACK_COMPLETED)},
            {},
            Progress.ROLLED_BACK,
        ),
        (
            {"converged": True, "update_status": update(UpdateState.ROLLBACK_COMPLETED)},
            {"goal": Goal.ROLLED_BACK},
            Progress.DONE,
        ),
        (
            {"running": 1, "update_status": update(UpdateState.ROLLBACK_COMPLETED)},
            {"goal": Goal.ROLLED_BACK},
            Progress.GOING,
        ),
        # Somebody waits for what others did: a rollback by hand is no failure, one by itself is.
        (
            {"converged": True, "update_status": update(UpdateState.ROLLBACK_COMPLETED)},
            {"goal": Goal.ANY},
            Progress.DONE,
        ),
        (
            {"running": 3, "update_status": update(UpdateState.ROLLBACK_COMPLETED)},
            {"goal": Goal.ANY},
            Progress.ROLLED_BACK,
        ),
        (
            {
                "running": 3,
                "settles_in_ns": 1,
                "update_status": update(UpdateState.ROLLBACK_COMPLETED),
            },
            {"goal": Goal.ANY},
            Progress.GOING,
        ),
        ({"stuck": True}, {}, Progress.STUCK),
        ({"stuck": True, "update_status": update(UpdateState.PAUSED)}, {}, Progress.PAUSED),
        ({"stuck": True, "update_status": update(UpdateState.UPDATING)}, {}, Progress.STUCK),
        ({"stuck": True}, {"goal": Goal.REMOVED}, Progress.GOING),
        ({"running": 3, "settles_in_ns": 4}, {}, Progress.GOING),
        (
            {
                "running": 3,
                "settles_in_ns": 4,
                "update_status": update(UpdateState.ROLLBACK_COMPLETED),
            },
            {"before": 9},
            Progress.GOING,
        ),
        (
            {"converged": True, "update_status": update(UpdateState.ROLLBACK_COMPLETED)},
            {"before": 9},
            Progress.DONE,
        ),
        (
            {"converged": True, "update_status": update(UpdateState.PAUSED)},
            {"before": 9},
            Progress.DONE,
        ),
        ({"update_status": update(UpdateState.PAUSED)}, {"before": 5}, Progress.PAUSED),
        # Scaled while it is paused, it first comes to as many tasks as are wanted now.
        (
            {"running": 5, "update_status": update(UpdateState.PAUSED)},
            {"before": 9},
            Progress.GOING,
        ),
        (
            {"update_status": update(UpdateState.PAUSED), "running": 1},
            {"before": 9},
            Progress.GOING,
        ),
        (
            {"update_status": update(UpdateState.PAUSED), "running": 3},
            {"before": 9},
            Progress.PAUSED,
        ),
        (
            {"update_status": update(UpdateState.ROLLBACK_COMPLETED), "running": 3},
            {"before": 9},
            Progress.DONE,
        ),
        (
            {"update_status": update(UpdateState.ROLLBACK_COMPLETED), "running": 1},
            {"before": 9},
            Progress.GOING,
        ),
        ({"removed": True}, {}, Progress.GONE),
        ({"converged": True}, {"goal": Goal.REMOVED}, Progress.GOING),
        ({"removed": True}, {"goal": Goal.REMOVED}, Progress.GONE),
    ],
)
def test_how_far_a_service_is(
    given: dict[str, object], options: dict[str, object], expected: Progress
) -> None:
    assert judge(status(**given), **options) is expected  # type: ignore[arg-type]  # of these names


@pytest.mark.parametrize(
    ("progress", "timed_out", "code"),
    [
        ([Progress.DONE, Progress.GONE], False, 0),
        ([Progress.DONE, Progress.ROLLED_BACK], False, 7),
        ([Progress.PAUSED, Progress.ROLLED_BACK], False, 6),
        ([Progress.GOING], True, 6),
        ([Progress.STUCK, Progress.DONE], False, 6),
        ([Progress.STUCK, Progress.ROLLED_BACK], False, 6),
        ([], True, 6),
        ([], False, 0),
    ],
)
def test_the_exit_code_of_a_verdict(progress: list[Progress], timed_out: bool, code: int) -> None:
    named = {str(number): one for number, one in enumerate(progress)}
    assert Verdict(progress=named, timed_out=timed_out).exit_code == code


def test_an_empty_verdict_is_not_over() -> None:
    assert not Verdict().over
    assert not Verdict(progress={"a": Progress.DONE, "b": Progress.GOING}).over
    assert not Verdict(progress={"a": Progress.DONE, "b": Progress.STUCK}).over, "it may go on"


@pytest.mark.parametrize(
    ("given", "progress", "line"),
    [
        (
            {"up_to_date": 1, "states": {"running": 1, "starting": 2}},
            Progress.GOING,
            "web: 1/3 running, 2 starting",
        ),
        (
            {"states": {"pending": 3, "assigned": 1}, "reasons": ("no suitable node",)},
            Progress.GOING,
            "web: 0/3 running, 3 pending, 1 assigned; no suitable node",
        ),
        (
            {"reasons": ("3 of 3 replicas starting",), "states": {"starting": 3}},
            Progress.GOING,
            "web: 0/3 running, 3 starting",
        ),
        ({"up_to_date": 3, "stopping": 2}, Progress.GOING, "web: 3/3 running, 2 stopping"),
        ({"up_to_date": 3}, Progress.DONE, "web: 3/3 running, converged"),
        (
            {"up_to_date": 3, "settles_in_ns": 4, "reasons": ("3 of 3 replicas are watched",)},
            Progress.GOING,
            "web: 3/3 running, verifying",
        ),
        (
            {"reasons": ("image nope is missing",)},
            Progress.STUCK,
            "web: 0/3 running, stuck; image nope is missing",
        ),
        (
            {"completed": 1, "up_to_date": 2, "states": {"running": 2, "complete": 1}},
            Progress.GOING,
            "web: 1/3 completed, 2 running",
        ),
        (
            {"job": True, "up_to_date": 3, "states": {"running": 3}},
            Progress.GOING,
            "web: 0/3 completed, 3 running",
        ),
        ({"completed": 3, "converged": True}, Progress.DONE, "web: 3/3 completed, converged"),
        (
            {"completed": 1, "up_to_date": 2, "converged": True},
            Progress.DONE,
            "web: 3/3 running or completed, converged",
        ),
        ({"up_to_date": 1}, Progress.ROLLED_BACK, "web: 1/3 running, rolled back"),
        ({"removed": True, "desired": 0}, Progress.GONE, "web: removed"),
    ],
)
def test_plain_lines(given: dict[str, object], progress: Progress, line: str) -> None:
    [row] = rows([status(**given)], {"w": progress}, removing=False)
    assert plain_line(row) == line


@pytest.mark.parametrize(("left", "text"), [(2, ", 2 tasks left"), (1, ", 1 task left"), (0, "")])
def test_lines_of_a_removal(left: int, text: str) -> None:
    going = {"w": Progress.GOING}
    [row] = rows([status(desired=3, stopping=left)], going, removing=True)
    assert plain_line(row, removing=True) == f"web: removing{text}"


def test_an_update_counts_what_is_updated() -> None:
    [row] = rows([status(running=3, up_to_date=1)], {"w": Progress.GOING}, removing=False)
    assert plain_line(row) == "web: 1/3 updated"


@pytest.mark.parametrize(
    ("settles_in_ns", "elapsed_s", "seconds"),
    [(0, 0.0, 0), (5 * SECOND_NS, 0.0, 5), (5 * SECOND_NS, 1.2, 4), (5 * SECOND_NS, 9.0, 1)],
)
def test_the_seconds_left_count_down_to_one(
    settles_in_ns: int, elapsed_s: float, seconds: int
) -> None:
    given = status(settles_in_ns=settles_in_ns)
    [row] = rows([given], {"w": Progress.GOING}, removing=False, elapsed_s={"w": elapsed_s})
    assert row.settles_in_s == seconds


def test_plain_lines_come_with_a_change_of_state_and_seldom_for_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = ManualClock()
    display = PlainDisplay(clock)

    def show(progress: Progress = Progress.GOING, **given: object) -> str:
        display.show([status(**given)], {"w": progress})
        return capsys.readouterr().err

    assert show(states={"starting": 3}) == "web: 0/3 running, 3 starting\n"
    assert show(states={"starting": 3}) == ""
    assert show(states={"starting": 2}, up_to_date=1) == "", "only numbers differ"
    clock.advance(seconds=REPEAT_EVERY_S)
    assert show(states={"starting": 2}, up_to_date=1) == "web: 1/3 running, 2 starting\n"
    assert show(up_to_date=3, settles_in_ns=5) == "web: 3/3 running, verifying\n"
    assert show(up_to_date=3, settles_in_ns=4) == ""
    assert show(states={"starting": 1}, up_to_date=2) == "", "it went round in a circle"
    assert show(Progress.DONE, up_to_date=3) == "web: 3/3 running, converged\n"


def test_a_verdict_names_what_is_stuck_and_remembers_the_task_that_failed() -> None:
    verdict = Verdict()
    verdict.note(status(stuck=True, failing_task_id="t1", reasons=("it crashes",)), Progress.STUCK)
    verdict.note(status(stuck=True, reasons=("it crashes",)), Progress.STUCK)
    verdict.note(status(service_id="v", name="db", up_to_date=1), Progress.GOING)
    assert verdict.failing == {"w": "t1"}
    assert verdict.headline("stack 'app'", timeout_ns=0, goal=Goal.UPDATED) == (
        "stack 'app' does not converge: web is stuck"
    )
    assert verdict.explain() == {
        "w": ["web: 0/3 running, stuck", "  it crashes"],
        "v": ["db: 1/3 running, not converged yet; it goes on"],
    }


def test_a_service_that_has_not_changed_goes_on_counting_when_another_changes() -> None:
    going = {"w": Progress.GOING, "v": Progress.GOING}
    watched = status(settles_in_ns=5 * SECOND_NS)
    other = status(service_id="v", name="db")
    seen = _Seen().next([watched, other], going, 10.0)
    seen = seen.next([watched, status(service_id="v", name="db", running=1)], going, 12.0)
    assert [row.settles_in_s for row in seen.rows(13.0, removing=False)] == [0, 2]


@pytest.mark.parametrize(
    "reason",
    [
        "3 of 3 replicas are starting",
        "1 of 1 replica is ready",
        "2 of 4 replicas have just started and must keep running for 5s",
        "1 of 3 replicas is not yet on the current version",
        "update in progress",
    ],
)
def test_what_the_display_says_anyhow_is_no_reason(reason: str) -> None:
    updating = UpdateStatus(state=UpdateState.UPDATING, message="update in progress")
    given = status(reasons=(reason, "waits until service db has started"), update_status=updating)
    [row] = rows([given], {"w": Progress.GOING}, removing=False)
    assert row.reasons == ("waits until service db has started",)


def verdict_of(**progress: ServiceStatus) -> Verdict:
    found = Verdict()
    for given in progress.values():
        found.note(given, judge(given))
    return found


STUCK = status(stuck=True, reasons=("it crashes",))
OTHER = status(service_id="v", name="db")


def test_a_stuck_service_ends_the_wait_soon_alone_and_later_beside_others() -> None:
    assert StuckServices().note(verdict_of(w=STUCK), 5.0) == 5.0 + STUCK_HOLD_S
    both = StuckServices()
    assert both.note(verdict_of(w=STUCK, v=OTHER), 5.0) == 5.0 + STUCK_GRACE_S
    assert both.note(verdict_of(w=STUCK, v=OTHER), 9.0) == 5.0 + STUCK_GRACE_S, "not prolonged"
    done = status(service_id="v", converged=True)
    assert both.note(verdict_of(w=STUCK, v=done), 9.0) == 5.0 + STUCK_HOLD_S
    assert StuckServices().note(verdict_of(v=OTHER), 5.0) is None


def test_a_service_in_a_crash_loop_stays_stuck_while_its_next_task_is_made() -> None:
    stuck = StuckServices()
    stuck.note(verdict_of(w=STUCK), 5.0)
    between = verdict_of(w=status(reasons=("1 of 3 replicas ended",)))
    assert stuck.note(between, 5.5) == 5.0 + STUCK_HOLD_S
    stuck.settle(between)
    assert between.progress == {"w": Progress.STUCK}
    assert between.statuses["w"] is STUCK, "what it is stuck with is told"


@pytest.mark.parametrize(
    "later",
    [status(up_to_date=1), status(converged=True), status(completed=1), status(removed=True)],
)
def test_a_service_that_gets_further_is_not_stuck(later: ServiceStatus) -> None:
    stuck = StuckServices()
    stuck.note(verdict_of(w=STUCK), 5.0)
    assert stuck.note(verdict_of(w=later), 5.5) is None
    assert stuck.note(verdict_of(w=STUCK), 8.0) == 8.0 + STUCK_HOLD_S, "it begins anew"


def test_a_reason_that_names_the_next_try_counts_down() -> None:
    reason = "1 of 3 replicas backs off after 4 crashes, next try in 1m38s"
    seen = status(reasons=(reason,), states={"running": 2, "backing_off": 1}, up_to_date=2)
    [row] = rows([seen], {"w": Progress.GOING}, removing=False, elapsed_s={"w": 40.2})
    assert row.reasons == ("1 of 3 replicas backs off after 4 crashes, next try in 58s",)
    assert row.states == "1 backing off"
    [late] = rows([seen], {"w": Progress.GOING}, removing=False, elapsed_s={"w": 100.0})
    assert late.reasons[0].endswith("next try now")
