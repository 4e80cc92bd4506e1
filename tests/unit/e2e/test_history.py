"""The judges of whole clusters see what is wrong and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.history import (
    Absence,
    Answer,
    Run,
    check_kept,
    check_registers,
    check_revisions,
    check_runs,
    live,
    read_runs,
    version_of,
)
from tests.linearizability import Action, Operation, Outcome


def put(
    invoked: float, returned: float, value: int, over: int = 0, outcome: Outcome = Outcome.OK
) -> Operation:
    return Operation(
        *("c", "r1", Action.PUT, invoked, returned, outcome, value),
        expected=version_of(over),
        version=version_of(value) if outcome is Outcome.OK else 0,
    )


def read(invoked: float, returned: float, value: int) -> Operation:
    found = value or None
    return Operation("c", "r1", Action.READ, invoked, returned, Outcome.OK, found, None, -value)


def delete(invoked: float, returned: float, outcome: Outcome = Outcome.OK) -> Operation:
    return Operation("c", "r1", Action.DELETE, invoked, returned, outcome)


LOST = Outcome.UNKNOWN
FAILED = Outcome.FAILED
REFUSED = Outcome.REFUSED

REGISTERS_GOOD = {
    "made, changed, removed, made": [put(0, 1, 7), put(2, 3, 4, 7), delete(4, 5), put(6, 7, 2)],
    "values need not grow": [put(0, 1, 7), put(2, 3, 4, 7), read(4, 5, 4)],
    "read while it changes": [put(0, 1, 7), put(2, 9, 4, 7), read(3, 4, 4), read(3, 4, 7)],
    "answer lost, done": [put(0, 1, 7), put(2, 3, 4, 7, LOST), read(4, 5, 4), put(6, 7, 5, 4)],
    "answer lost, not done": [put(0, 1, 7), put(2, 3, 4, 7, LOST), read(4, 5, 7)],
    "two made it, one was refused": [put(0, 3, 1), put(1, 2, 2, 0, REFUSED), read(4, 5, 1)],
    "failed": [put(0, 1, 1), put(2, 3, 2, 1, FAILED), read(4, 5, 1)],
    "removal's answer lost": [put(0, 1, 1), delete(2, 3, LOST), read(4, 5, 1), read(6, 7, 0)],
}
REGISTERS_BAD = {
    "acknowledged and lost": [put(0, 1, 7), put(2, 3, 4, 7), read(4, 5, 7)],
    "acknowledged and gone": [put(0, 1, 7), read(2, 3, 0)],
    "both halves wrote": [put(0, 1, 7), put(2, 5, 4, 7), put(3, 6, 5, 7)],
    "both halves made it": [put(0, 3, 1), put(1, 2, 2)],
    "old view": [put(0, 1, 7), put(2, 3, 4, 7), read(4, 5, 4), read(6, 7, 7)],
    "failed and done": [put(0, 1, 1), put(2, 3, 2, 1, FAILED), read(4, 5, 2)],
    "removed and back": [put(0, 1, 1), delete(2, 3), read(4, 5, 1)],
    "refused for nothing": [put(0, 1, 1, 0, REFUSED), read(2, 3, 0)],
    "lost answer, done twice": [
        put(0, 1, 1),
        put(2, 3, 2, 1, LOST),
        read(4, 5, 2),
        put(6, 7, 3, 2),
        read(8, 9, 2),
    ],
}


@pytest.mark.parametrize("history", REGISTERS_GOOD.values(), ids=REGISTERS_GOOD)
def test_a_register_that_can_be_is_accepted(history: list[Operation]) -> None:
    assert not check_registers(history)


@pytest.mark.parametrize("history", REGISTERS_BAD.values(), ids=REGISTERS_BAD)
def test_a_register_that_cannot_be_is_told(history: list[Operation]) -> None:
    (problem,) = check_registers(history)
    assert problem.startswith("r1: ")


def answer(invoked: float, returned: float, revision: int, *, wrote: bool = True) -> Answer:
    return Answer("c", invoked, returned, revision, wrote)


@pytest.mark.parametrize(
    ("answers", "bad"),
    [
        ([answer(0, 1, 5), answer(2, 3, 6)], 0),
        ([answer(0, 1, 5), answer(2, 3, 5)], 1),
        ([answer(0, 1, 5), answer(2, 3, 4)], 1),
        ([answer(0, 2, 5), answer(1, 3, 4)], 0),
        ([answer(0, 1, 5), answer(2, 3, 5, wrote=False)], 0),
        ([answer(0, 1, 5), answer(2, 3, 4, wrote=False)], 1),
        ([answer(0, 1, 5, wrote=False), answer(2, 3, 4, wrote=False)], 1),
        ([answer(0, 1, 5, wrote=False), answer(2, 3, 5)], 1),
        ([answer(0, 1, 9), answer(0, 1.5, 5), answer(2, 3, 6)], 1),
    ],
    ids=[
        "grows",
        "the same twice",
        "smaller",
        "at the same time",
        "view holds it",
        "view does not hold it",
        "view goes back",
        "written below a view",
        "the largest told counts",
    ],
)
def test_revisions_only_grow(answers: list[Answer], bad: int) -> None:
    assert len(check_revisions(answers)) == bad


def test_what_is_kept_is_there_and_what_failed_is_not() -> None:
    history = [
        Operation("c", "a", Action.PUT, 0, 1, Outcome.OK, 1),
        Operation("c", "b", Action.PUT, 0, 1, Outcome.UNKNOWN, 2),
        Operation("c", "d", Action.PUT, 0, 1, Outcome.FAILED, 3),
    ]
    assert not check_kept(history, ["a"])
    assert not check_kept(history, ["a", "b"])
    (lost,) = check_kept(history, ["b"])
    assert lost.startswith("acknowledged and lost: a ")
    (extra,) = check_kept(history, ["a", "d"])
    assert extra.startswith("said to have failed and there: d ")


def run(task: str, host: str, first: float, last: float, *, slot: int = 1, begun: int = 1) -> Run:
    return Run("web", slot, task, host, first, last, begun)


def test_one_after_another_in_a_slot_is_right() -> None:
    runs = [run("a", "h1", 0, 5), run("b", "h2", 5, 9), run("c", "h2", 0, 9, slot=2)]
    assert not check_runs(runs)


def test_two_at_a_time_in_a_slot_are_told() -> None:
    (problem,) = check_runs([run("b", "h2", 4, 9), run("a", "h1", 0, 5)])
    assert "two at a time" in problem and "task a" in problem and "task b" in problem


def test_all_pairs_of_a_slot_are_looked_at() -> None:
    runs = [run("a", "h1", 0, 9), run("b", "h2", 1, 2), run("c", "h2", 5, 6)]
    assert len(check_runs(runs)) == 2


def test_a_task_started_twice_is_told() -> None:
    (problem,) = check_runs([run("a", "h1", 0, 5, begun=2)])
    assert problem.startswith("started 2 times")


@pytest.mark.parametrize(
    ("absence", "bad"),
    [
        (Absence("h1", 3, 6), 0),
        (Absence("h3", 3, 6), 1),
        (Absence("h1", 4.5, 6), 1),
        (Absence("h1", 3, 4.9), 1),
    ],
    ids=["cut off", "another host", "cut off later", "went on although it was told"],
)
def test_only_an_absent_hosts_task_may_overlap(absence: Absence, bad: int) -> None:
    runs = [run("a", "h1", 0, 5), run("b", "h2", 4, 9)]
    assert len(check_runs(runs, [absence])) == bad


def test_files_of_tasks_are_read(tmp_path: Path) -> None:
    (tmp_path / "web,2,t2").write_text("begun h1\n10.00\n10.20\n10.4")
    (tmp_path / "web,1,t1").write_text("begun h2\n3.50\nbegun h2\n4.00\n")
    (tmp_path / "web,3,t3").write_text("begun h2\n")
    runs = read_runs(tmp_path)
    assert runs == [
        Run("web", 1, "t1", "h2", 3.5, 4.0, 2),
        Run("web", 2, "t2", "h1", 10.0, 10.2, 1),
    ]
    assert [r.task for r in live(runs, "web", 10.1)] == ["t2"]
    assert not live(runs, "other", 0)
