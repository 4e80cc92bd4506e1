"""What clients of a cluster were told and what its tasks did, and whether both were right.

Clients note every call with its times: the content of an object (a label that differs with every
write) as a register for tests.linearizability, and the revision that each answer carried. Tasks
append a line to a file of their own at every beat of `SCRIPT`, so that what ran, where and when is
known without asking whoever is being tested. Pure: nothing here talks to a cluster.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.linearizability import Action, Operation, Outcome, check

BEAT_S = 0.2
# Lines are "begun HOST PID" once and a time per beat: the machine's time since boot, which no jump
# of a clock changes and all hosts of a test bed share. Without processes of its own but for sleep.
SCRIPT = f"""\
trap 'exit 0' TERM
file=/beats/$SERVICE,$SLOT,$TASK
echo "begun $NODE" >>"$file"
while :; do
  read now rest </proc/uptime
  echo "$now" >>"$file"
  sleep {BEAT_S}
done
"""
ENV = (
    "SERVICE={{.Service.Name}}",
    "SLOT={{.Task.Slot}}",
    "TASK={{.Task.ID}}",
    "NODE={{.Node.Hostname}}",
)


# ------------------------------------------------------------------ what clients were told


@dataclass(frozen=True, slots=True)
class Answer:
    """The revision that one acknowledged call carried: of the write, or of the reader's view."""

    client: str
    invoked: float
    returned: float
    revision: int
    wrote: bool

    def __str__(self) -> str:
        what = "write at" if self.wrote else "read of"
        times = f"{self.invoked:.4f} to {self.returned:.4f}"
        return f"{self.client} {times}: {what} revision {self.revision}"


def version_of(value: int) -> int:
    """A register's version as the checker wants it, by what was written. Less than zero, so that
    nothing is assumed of the order in which versions were given out; 0 is absent.
    """
    return -value


def check_registers(history: Sequence[Operation]) -> list[str]:
    """Each object's history has an order that explains it. Values are those of `version_of`."""
    versions: dict[tuple[str, Hashable], int] = {
        (op.key, op.value): version_of(op.value)
        for op in history
        if op.action is Action.PUT and isinstance(op.value, int)
    }
    return [str(violation) for violation in check(history, versions)]


def check_revisions(answers: Iterable[Answer]) -> list[str]:
    """Over all managers: a write's revision is larger than any that was told before it was asked,
    and a reader's view holds all of them.
    """
    known = sorted(answers, key=lambda a: a.returned)
    times = [a.returned for a in known]
    newest = list(itertools.accumulate((a.revision for a in known), max))
    problems = []
    for answer in known:
        before = bisect.bisect_left(times, answer.invoked)
        if not before:
            continue
        told = newest[before - 1]
        if answer.revision < told or (answer.wrote and answer.revision == told):
            problems.append(f"revision {told} had been told before: {answer}")
    return problems


def check_kept(history: Sequence[Operation], present: Iterable[str]) -> list[str]:
    """Objects that are made and never removed: each acknowledged one is there at the end, and none
    of which it was said that it had failed.
    """
    there = set(present)
    problems = []
    for op in history:
        if op.action is not Action.PUT:
            continue
        if op.outcome is Outcome.OK and op.key not in there:
            problems.append(f"acknowledged and lost: {op.key} {op}")
        if op.outcome is Outcome.FAILED and op.key in there:
            problems.append(f"said to have failed and there: {op.key} {op}")
    return problems


# ------------------------------------------------------------------ what tasks did


@dataclass(frozen=True, slots=True)
class Run:
    """One task's life: from its first beat to its last, in seconds since boot."""

    service: str
    slot: int
    task: str
    host: str
    first: float
    last: float
    begun: int  # how often it was started

    def __str__(self) -> str:
        times = f"{self.first:.2f} to {self.last:.2f}"
        return f"{self.service}.{self.slot} task {self.task} on {self.host}, {times}"


@dataclass(frozen=True, slots=True)
class Absence:
    """A host that managers could not reach for a while: what ran there was given up and replaced
    while it went on, as it must be. `until`: when the host knew of that.
    """

    host: str
    since: float
    until: float


def read_runs(folder: Path) -> list[Run]:
    """What the tasks' files say, by service, slot and first beat. One without a beat yet is left
    out.
    """
    runs = []
    for path in folder.iterdir():
        service, slot, task = path.name.split(",")
        # A killed task's last line may be cut.
        lines = path.read_text().rpartition("\n")[0].splitlines()
        hosts = [line.split()[1] for line in lines if line.startswith("begun ")]
        beats = [float(line) for line in lines if not line.startswith("begun ")]
        if hosts and beats:
            runs.append(Run(service, int(slot), task, hosts[0], min(beats), max(beats), len(hosts)))
    return sorted(runs, key=lambda r: (r.service, r.slot, r.first, r.task))


def check_runs(runs: Sequence[Run], absences: Sequence[Absence] = ()) -> list[str]:
    """No task was started twice, and in each slot one task ran at a time, but for what ran on a
    host that could not be told to stop it.
    """
    problems = [f"started {run.begun} times: {run}" for run in runs if run.begun > 1]
    for _, slot in itertools.groupby(runs, key=lambda r: (r.service, r.slot)):
        for one, other in itertools.combinations(sorted(slot, key=lambda r: r.first), 2):
            if other.first < one.last and not any(
                a.host in (one.host, other.host) and a.since <= other.first and one.last <= a.until
                for a in absences
            ):
                problems.append(f"two at a time: {one}; and {other}")
    return problems


def live(runs: Iterable[Run], service: str, since: float) -> list[Run]:
    """Tasks of a service that have run since then."""
    return [run for run in runs if run.service == service and run.last >= since]
