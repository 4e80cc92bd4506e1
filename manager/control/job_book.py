"""A job's books: where each of its slots stands, and the sums over them. Pure.

A job may have a hundred thousand slots, of which a tick concerns a few. The Controller keeps one
`Book` for each job service: built from a view (`Book.of`), kept by `note` (a slot's tasks have
changed), both from the objects alone, so that a new leader's book is the same. The rules that act
on it are in jobs.py.

A slot is in one phase, told by its tasks of the present iteration that are not to be forgotten:

| phase | the slot's tasks |
|---|---|
| (absent) | none |
| WAITING | one that should run has no node |
| PLACED, READY, STARTING, RUNNING | one that should run has one; READY: it waits to be told to;
  the last two only where somebody looks at them (`Terms.fine`), else PLACED |
| STOPPING | the last was told to stop and has not ended |
| RETRY | the last has ended, and the next may be made when it is due |
| FAILED | the last has failed for good |
| COMPLETE | one has completed: whatever else becomes of the slot, it never runs again |

Whether a task that failed has failed for good is Docker's rule (restart.py); one that the cluster
stopped for reasons of its own (preempted, its gang, moved, a device) has not failed, and one that
ran for too long has. Of jobs with a JobSpec the delay before an attempt doubles with each.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

import msgspec

from manager.control.backoff import MAX_DELAY_NS, starting_ns
from manager.control.slots import Slot, is_live, slot_of, slot_order
from manager.control.template import (
    DEFAULT_RESTART_DELAY_NS,
    Mode,
    job_size,
    mode_of,
    restart_policy,
    state_of,
)
from manager.store import View
from swarm import errors, states
from swarm.v1 import JobState, RestartPolicy, Service, StopCause, Task, TaskState

K = TypeVar("K")

RESTARTS_KEPT = 32  # of a slot, where no limit says how many count: far beyond MAX_DELAY_NS
# With so many tasks that found no place no more are made (except of gangs): what waits costs a look
# each time something may fit, and more of them would not be placed sooner.
BACKLOG_MAX = 500

_OWN_END = frozenset({TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED})


class Phase(IntEnum):
    WAITING = 0
    PLACED = 1
    READY = 2
    STARTING = 3
    RUNNING = 4
    STOPPING = 5
    RETRY = 6
    FAILED = 7
    COMPLETE = 8


LIVE = (Phase.WAITING, Phase.PLACED, Phase.READY, Phase.STARTING, Phase.RUNNING)
HAS_PLACE = (Phase.PLACED, Phase.READY, Phase.STARTING, Phase.RUNNING, Phase.STOPPING)


# ------------------------------------------------------------------ what the spec says


@dataclass(frozen=True, slots=True)
class Terms:
    """What a service says of itself as a job."""

    mode: Mode
    iteration: int
    total: int
    at_once: int
    policy: RestartPolicy
    gang: bool = False
    timeout_ns: int = 0
    keep_ns: int | None = None
    cancelled: bool = False
    backs_off: bool = False
    gated: bool = False  # it depends on other services
    # Whether STARTING and RUNNING are told apart from PLACED: where tasks have limited time, or
    # other services wait for the job. Else most changes of its tasks make no difference.
    fine: bool = False

    @classmethod
    def of(cls, service: Service, *, fine: bool = False) -> Terms:
        """`fine`: other services wait for the job."""
        spec = service.spec
        mode = mode_of(spec)
        total, at_once = job_size(spec)
        gated = spec is not None and bool(spec.depends_on)
        terms = cls(
            mode,
            service.job_iteration,
            total,
            at_once,
            restart_policy(spec),
            gated=gated,
            fine=fine,
        )
        job = spec.job if spec is not None else None
        if job is None:
            return terms
        gang = job.gang and mode == Mode.REPLICATED_JOB
        return cls(
            mode=mode,
            iteration=service.job_iteration,
            total=total,
            at_once=total if gang else at_once,
            policy=terms.policy,
            gang=gang,
            timeout_ns=job.timeout_ns,
            keep_ns=job.keep_ns,
            cancelled=job.cancelled,
            backs_off=True,
            gated=gated,
            fine=fine or job.timeout_ns > 0,
        )

    def delay_ns(self, attempts: int) -> int:
        """How long the next attempt waits after so many."""
        delay_ns = self.policy.delay_ns
        if delay_ns is None:
            delay_ns = DEFAULT_RESTART_DELAY_NS
        if not self.backs_off:
            return delay_ns
        most_ns = self.policy.max_delay_ns
        if most_ns is None:
            most_ns = MAX_DELAY_NS
        # A longer delay than the bound was asked for as it is.
        return max(delay_ns, min(delay_ns << min(attempts, RESTARTS_KEPT), most_ns))

    def counted(self, task: Task) -> tuple[int, ...]:
        """The attempts that count against the task's end, oldest first; see restart.py on windows:
        the time spent waiting for delays and getting started is no part of one.
        """
        window_ns = self.policy.window_ns or 0
        if not window_ns:
            return task.restarts_ns
        at_ns = _changed_ns(task)
        starting = starting_ns(task, at_ns)  # a job's tasks are made when they are due
        waited_ns = 0
        kept = 0
        for i in range(len(task.restarts_ns) - 1, -1, -1):
            if at_ns - task.restarts_ns[i] - starting - waited_ns > window_ns:
                break
            kept += 1
            waited_ns += self.delay_ns(i)
        return tuple(r + starting for r in task.restarts_ns[len(task.restarts_ns) - kept :])

    def next_attempt(self, ended: Task) -> tuple[int, tuple[int, ...]]:
        """When the attempt after this one is due, and the attempts that it carries on."""
        if not ended_by_itself(ended):
            return 0, ended.restarts_ns
        counted = self.counted(ended)
        # Once it was worked out it stands in the task.
        due_ns = ended.start_after_ns or _changed_ns(ended) + self.delay_ns(len(counted))
        limit = self.policy.max_attempts or (RESTARTS_KEPT if self.backs_off else 0)
        return due_ns, (*counted, due_ns)[-limit:] if limit else ()


def ended_by_itself(task: Task) -> bool:
    """Whether the task has ended of its own. What it says after the cluster told it to stop for a
    reason of the cluster's does not count, unless it had completed.
    """
    state = state_of(task)
    if state == TaskState.COMPLETE:
        return True
    if task.stop_cause != StopCause.UNSPECIFIED or state == TaskState.ORPHANED:
        return False
    return state in _OWN_END or (states.ended(state) and states.wanted(task.desired_state))


def phase_of(tasks: Sequence[Task], terms: Terms) -> tuple[Phase, int]:
    """The phase of a slot with these tasks (of the iteration, not to be forgotten, oldest first; at
    least one); and when the next attempt is due, or the task has run for long enough.
    """
    newest = tasks[-1]
    state = state_of(newest)
    if state == TaskState.COMPLETE or (
        len(tasks) > 1 and any(state_of(t) == TaskState.COMPLETE for t in tasks)
    ):
        return Phase.COMPLETE, 0
    if is_live(newest):
        if state < TaskState.ASSIGNED:
            return Phase.WAITING, 0
        if state == TaskState.READY and newest.desired_state == TaskState.READY:
            return Phase.READY, 0
        if state < TaskState.STARTING or not terms.fine:
            return Phase.PLACED, 0
        until_ns = runs_since_ns(newest) + terms.timeout_ns if terms.timeout_ns else 0
        return (Phase.STARTING if state == TaskState.STARTING else Phase.RUNNING), until_ns
    if not states.ended(state):
        return Phase.STOPPING, 0
    if newest.stop_cause == StopCause.TIMED_OUT:
        return Phase.FAILED, 0
    if not ended_by_itself(newest):
        return Phase.RETRY, 0
    limit = terms.policy.max_attempts or 0
    if terms.policy.condition == "none" or (limit and len(terms.counted(newest)) >= limit):
        return Phase.FAILED, 0
    return Phase.RETRY, terms.next_attempt(newest)[0]


def current(tasks: Iterable[Task], iteration: int) -> list[Task]:
    """Those of the iteration that are not to be forgotten, oldest first."""
    found = [
        t for t in tasks if t.job_iteration == iteration and t.desired_state != TaskState.REMOVE
    ]
    if len(found) > 1:
        found.sort(key=age)
    return found


def age(task: Task) -> tuple[int, str]:
    return (task.meta.created_at_ns if task.meta else 0, task.id)


def runs_since_ns(task: Task) -> int:
    """Since when its time counts: since it runs, by managers' clocks; before, since its last
    step.
    """
    return task.running_since_ns or _changed_ns(task)


def _changed_ns(task: Task) -> int:
    return task.meta.updated_at_ns if task.meta else 0


# ------------------------------------------------------------------ the book


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One slot. `phase` None: no task of it counts (any more)."""

    phase: Phase | None
    due_ns: int  # see phase_of
    # Spec version and node of each of its tasks, those to be forgotten included.
    tasks: tuple[tuple[int, str], ...]
    # Tasks that nobody has been told to forget yet and that do not count: of an earlier iteration.
    leftover: bool
    # All are to be forgotten.
    leaving: bool


@dataclass(slots=True)
class Look:
    """One tick's look at a job: which slots, and what became of them; for `Book.done`."""

    slots: tuple[Slot, ...]
    now_ns: int
    whole: bool = True  # nothing else of the job is to be looked at
    after: dict[Slot, tuple[Phase, int] | None] = field(default_factory=dict)
    wakes: dict[Slot, int] = field(default_factory=dict)
    # Slots that the next tick has to look at again.
    again: set[Slot] = field(default_factory=set)
    scanned: bool = False
    remind_ns: int = 0

    def remind(self, at_ns: int) -> None:
        """What waits without a place is to be looked at again then, 0: when something changes."""
        self.remind_ns = min(self.remind_ns or at_ns, at_ns)


class Book:
    """One job. What it says of slots is a function of the objects; what is to be looked at is not,
    and errs on the side of looking.
    """

    def __init__(self, service: Service, *, fine: bool = False) -> None:
        self.service_id = service.id
        self.version = service.spec_version
        self.watched = fine
        self.terms = Terms.of(service, fine=fine)
        self.deleting = service.pending_delete
        # What Service.job_status says.
        self.shown = JobState.UNSPECIFIED
        self.entries: dict[Slot, Entry] = {}
        self.counts: list[int] = [0] * len(Phase)
        self.versions: Counter[int] = Counter()
        self.nodes: Counter[str] = Counter()
        self.stopping: set[Slot] = set()
        self.failed: set[Slot] = set()
        self.held: set[Slot] = set()  # in phase WAITING or READY
        self.used = 0  # slots in some phase
        self.dirty: set[Slot] = set()
        # Of a job with a slot a node: nodes have changed.
        self.scan = True
        # When all that waits is to be looked at, 0: not.
        self._remind_ns = 0
        self._next = 1  # no number below it is free
        self._timers: list[tuple[int, tuple[int, str], Slot]] = []
        # Slots whose next attempt is due and waits for room.
        self._due: list[tuple[tuple[int, str], Slot]] = []

    @classmethod
    def of(cls, view: View, service: Service, *, fine: bool = False) -> Book:
        """The book of a view; all slots are to be looked at. `fine`: other services wait for it."""
        book = cls(service, fine=fine)
        slots: dict[Slot, list[Task]] = {}
        for task in view.by(Task, "service", service.id):
            slots.setdefault(slot_of(task), []).append(task)
        for slot, tasks in slots.items():
            book._set(slot, tasks)
        book.dirty = set(book.entries)
        return book

    # -------------------------------------------------------------- keeping

    def note(self, slot: Slot, view: View) -> tuple[Entry | None, Entry | None]:
        """The slot's tasks have changed; what was known of it, and what is."""
        before = self.entries.get(slot)
        self._set(slot, view.by(Task, "slot", (self.service_id, slot)))
        return before, self.entries.get(slot)

    def step(self, slot: Slot, entry: Entry, task: Task) -> Entry:
        """The slot's only task, which is not to be forgotten and of the iteration, is in another
        state: as `note`, without a look at the view.
        """
        phase, due_ns = phase_of((task,), self.terms)
        if phase is entry.phase and due_ns == entry.due_ns:
            return entry
        new = Entry(phase, due_ns, entry.tasks, leftover=False, leaving=False)
        assert entry.phase is not None
        self.entries[slot] = new
        self._count_phase(slot, entry.phase, -1)
        self._count_phase(slot, phase, 1)
        if (due_ns or phase is Phase.RETRY) and not self.deleting:
            self._later(slot, due_ns)
        return new

    def _set(self, slot: Slot, tasks: list[Task]) -> None:
        old = self.entries.get(slot)
        new = self._entry(tasks)
        if new == old:
            return
        if old is not None:
            self._count(slot, old, -1)
        if new is None:
            del self.entries[slot]
        else:
            self.entries[slot] = new
            self._count(slot, new, 1)
        if isinstance(slot, int) and (new is None or new.phase is None):
            self._next = min(self._next, slot)
        if new is not None and (new.due_ns or new.phase is Phase.RETRY) and not self.deleting:
            self._later(slot, new.due_ns)

    def _entry(self, tasks: list[Task]) -> Entry | None:
        if not tasks:
            return None
        iteration = self.terms.iteration
        counting = current(tasks, iteration)
        phase, due_ns = phase_of(counting, self.terms) if counting else (None, 0)
        leaving = all(t.desired_state == TaskState.REMOVE for t in tasks)
        return Entry(
            phase=phase,
            due_ns=due_ns,
            tasks=tuple((t.spec_version, t.node_id) for t in tasks),
            leftover=not leaving
            and any(
                t.job_iteration != iteration and t.desired_state != TaskState.REMOVE for t in tasks
            ),
            leaving=leaving,
        )

    def _count(self, slot: Slot, entry: Entry, sign: int) -> None:
        if entry.phase is not None:
            self._count_phase(slot, entry.phase, sign)
        for version, node_id in entry.tasks:
            _add(self.versions, version, sign)
            _add(self.nodes, node_id, sign)

    def _count_phase(self, slot: Slot, phase: Phase, sign: int) -> None:
        self.counts[phase] += sign
        self.used += sign
        if phase is Phase.STOPPING:
            which = self.stopping
        elif phase is Phase.FAILED:
            which = self.failed
        elif phase is Phase.WAITING or phase is Phase.READY:
            which = self.held
        else:
            return
        if sign > 0:
            which.add(slot)
        else:
            which.discard(slot)

    def _later(self, slot: Slot, at_ns: int) -> None:
        heapq.heappush(self._timers, (at_ns, slot_order(slot), slot))

    def heeds(self, task: Task) -> bool:
        """Whether it makes a difference when a task comes a step further at its node."""
        return self.terms.fine or task.desired_state == TaskState.READY

    # -------------------------------------------------------------- sums

    @property
    def live(self) -> int:
        """Slots that take one of the places that may be used at once."""
        return sum(self.counts[: Phase.STOPPING + 1])

    @property
    def waiting(self) -> int:
        return self.counts[Phase.WAITING]

    @property
    def has_place(self) -> bool:
        return any(self.counts[p] for p in HAS_PLACE)

    @property
    def room(self) -> int:
        """How many attempts may be begun, as far as numbers tell."""
        if self.terms.mode.per_node:
            return len(self._due)  # none is in another's way
        room = self.terms.at_once - self.live
        if self.waiting:
            room = min(room, BACKLOG_MAX - self.waiting)
        return room

    @property
    def hungry(self) -> bool:
        """Whether there is room, and something to begin."""
        if self.terms.mode.per_node or self.terms.gang or self.terms.cancelled or self.deleting:
            return False
        return self.room > 0 and (bool(self._due) or self.used < self.terms.total)

    @property
    def milestones(self) -> tuple[int, ...]:
        """What services that wait for the job look at: see gates.py."""
        counts, terms = self.counts, self.terms
        complete = counts[Phase.COMPLETE]
        runs = counts[Phase.RUNNING] + complete
        started = runs + counts[Phase.STARTING]
        turn = min(terms.total, terms.at_once)
        if terms.mode.per_node:
            return started, runs, complete
        return (
            started > 0, started >= turn, runs > 0, runs >= turn,
            complete > 0, complete >= terms.total,
        )  # fmt: skip

    def free_slots(self) -> Iterator[int]:
        """Numbers of slots without a task that counts, lowest first."""
        slot = self._next
        while True:
            entry = self.entries.get(slot)
            if entry is None or entry.phase is None:
                yield slot
            elif slot == self._next:
                self._next += 1
            slot += 1

    # -------------------------------------------------------------- one tick

    def look(self, now_ns: int, *, most: int) -> Look:
        """What a tick at this time has to look at, so many slots at most (of a gang: all)."""
        self._ring(now_ns)
        reminded = 0 < self._remind_ns <= now_ns
        if reminded:
            self._remind_ns = 0
        if self.terms.gang:
            self._due.clear()
            return Look(tuple(sorted(self.entries, key=slot_order)), now_ns)
        if self.terms.gated or reminded:
            self.dirty |= self.held
        room = self.room
        while self._due and room > 0:
            slot = heapq.heappop(self._due)[1]
            entry = self.entries.get(slot)
            if entry is not None and entry.phase is Phase.RETRY and slot not in self.dirty:
                self.dirty.add(slot)
                room -= 1
        slots = sorted((s for s in self.dirty if s in self.entries), key=slot_order)
        return Look(tuple(slots[:most]), now_ns, whole=len(slots) <= most)

    def _ring(self, now_ns: int) -> None:
        """Takes note of the timers that are due."""
        while self._timers and self._timers[0][0] <= now_ns:
            slot = heapq.heappop(self._timers)[2]
            entry = self.entries.get(slot)
            if entry is None or entry.due_ns > now_ns:
                continue  # for what it was before
            if entry.phase is Phase.RETRY:
                heapq.heappush(self._due, (slot_order(slot), slot))
            else:
                self.dirty.add(slot)

    def done(self, look: Look) -> int:
        """They were committed. When the next look is due, 0: when something changes."""
        if self.terms.gang:
            self.dirty.clear()
        else:
            self.dirty.difference_update(look.slots)
            self.dirty = {s for s in self.dirty if s in self.entries}
        self.dirty |= look.again
        if look.scanned:
            self.scan = False
        for slot, at_ns in look.wakes.items():
            self._later(slot, at_ns)
        for slot, after in look.after.items():
            # Looked at while there was no room for it.
            if after is not None and after[0] is Phase.RETRY and after[1] <= look.now_ns:
                heapq.heappush(self._due, (slot_order(slot), slot))
        if look.remind_ns:
            self._remind_ns = min(self._remind_ns or look.remind_ns, look.remind_ns)
        due = [at_ns for at_ns in (self.next_ns, self._remind_ns) if at_ns]
        return max(min(due), look.now_ns + 1) if due else 0

    @property
    def next_ns(self) -> int:
        """When the first timer rings; 0: there is none."""
        return self._timers[0][0] if self._timers else 0

    # -------------------------------------------------------------- for tests

    def check_invariants(self, view: View, service: Service) -> None:
        """The book is what `of` makes of the view."""
        fresh = Book.of(view, service, fine=self.watched)
        errors.invariant(self.terms == fresh.terms, f"terms of job {self.service_id} are off")
        for slot in self.entries.keys() | fresh.entries.keys():
            a, b = self.entries.get(slot), fresh.entries.get(slot)
            errors.invariant(
                (a and msgspec.structs.replace(a, tasks=tuple(sorted(a.tasks))))
                == (b and msgspec.structs.replace(b, tasks=tuple(sorted(b.tasks)))),
                f"slot {slot} of job {self.service_id} is off: {a} should be {b}",
            )
        errors.invariant(
            (self.counts, self.versions, self.nodes, self.stopping, self.failed, self.held)
            == (fresh.counts, fresh.versions, fresh.nodes, fresh.stopping, fresh.failed, fresh.held)
            and self.used == fresh.used,
            f"sums of job {self.service_id} are off",
        )
        free = next(s for s in range(1, len(self.entries) + 2) if not self._uses(s))
        errors.invariant(self._next <= free, f"free slots of job {self.service_id} are off")

    def _uses(self, slot: int) -> bool:
        entry = self.entries.get(slot)
        return entry is not None and entry.phase is not None


def _add(counter: Counter[K], key: K, sign: int) -> None:
    """Counts in or out; what comes to nothing is not kept."""
    count = counter[key] + sign
    if count:
        counter[key] = count
    else:
        del counter[key]
