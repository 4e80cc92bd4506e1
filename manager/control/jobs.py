"""The rules of jobs: what is begun, tried again, stopped and told, slot by slot.

They work on the slots that something has become of (job_book.py: `Look`) and on sums over all, so
that a tick costs what changed and not the size of the job. SwarmKit's (orchestrator/jobs) decides
from all tasks of a job each time.

- As many slots as must complete (replicated; so many of them at a time), or one for each eligible
  node (global). Attempts that are due come before slots that have had none, the lowest first.
- A slot gets its next task when the last has ended, its node is lost, or it does not stop
  (restart.OLD_TASK_TIMEOUT_NS), never beside one that runs; and a slot that has completed never
  again. A task that fails is tried again as the restart policy says; the next task is made when it
  is due, not when the last one ended, so that waiting holds no place. Preempted, moved, lost: at
  once, and it does not count.
- A gang's tasks are made in one tick, with desired state READY, placed in one tick (the Placer),
  and told to run in one tick when all are ready. When one of them ends without having completed, is
  stopped or loses its node, all others are stopped (GANG), and the whole gang tries again when all
  have ended, as an attempt of each where it was a failure of one. Those that completed stay so.
- A task that has run for longer than the job allows is stopped (TIMED_OUT) and has failed for good.
- When a slot has failed for good, a gang fails with it; the other slots of another job go on, as in
  Docker, and it has failed when nothing is left to do.
- A job that is cancelled ends: tasks without a place are deleted, the others stopped (CANCELLED).
- Service.job_status follows, when the state changes; it is QUEUED again while nothing of the job
  has a place. Once it has ended for keep_ns, the service is removed.

A Docker job (without JobSpec) is the same without what JobSpec says; its delay does not double.
"""

from __future__ import annotations

from msgspec import structs

from manager.control.backoff import crashes_after, crashes_kept
from manager.control.elsewhere import goes_elsewhere
from manager.control.history import reap_slots
from manager.control.job_book import (
    BACKLOG_MAX,
    LIVE,
    Book,
    Look,
    Phase,
    Terms,
    current,
    ended_by_itself,
    phase_of,
    runs_since_ns,
)
from manager.control.nodes import follow_nodes
from manager.control.restart import OLD_TASK_TIMEOUT_NS, promote
from manager.control.slots import Slot, is_live, lost_at_ns, silent
from manager.control.stuck import failure
from manager.control.template import Mode, state_of, stop_grace_ns
from manager.control.versions import keep_versions
from manager.control.work import Work
from swarm import states
from swarm.quantities import format_duration
from swarm.v1 import JobState, JobStatus, Node, Service, StopCause, Task, TaskState

ENDED = frozenset({JobState.COMPLETE, JobState.FAILED, JobState.CANCELLED})
_TOLD = frozenset({JobState.QUEUED, JobState.RUNNING})


def run(work: Work, book: Book, look: Look) -> None:
    """One step of the job. `work` holds the slots of the look."""
    job = _Step(work, book, look)
    job.tend()
    if job.terms.gang:
        job.gang()
    elif not job.terms.cancelled:
        job.begin()
        promote(work)
    reap_slots(work, look.slots)
    work.note_held()
    job.tell()
    keep_versions(work.draft, book.service_id, versions(work, book))


def remove(work: Work, book: Book, look: Look) -> bool:
    """Stops and forgets the tasks of a job that is to go; True once it can be deleted. See
    history.remove_service, of which this does a part at a time.
    """
    for task in list(work.tasks.values()):
        work.remove(task)
    left = book.nodes.copy()
    left.subtract(t.node_id for t in _gone(work))
    nodes = [work.draft.get(Node, i) for i, count in left.items() if count]
    for node in nodes:
        if node is not None:
            work.wake(lost_at_ns(node, None))
    return look.whole and all(n is None or silent(n, work.now_ns) for n in nodes)


def _gone(work: Work) -> list[Task]:
    """The tasks that the tick deletes, as they were."""
    return [t for i in work.deleted() if (t := work.draft.get(Task, i)) is not None]


def versions(work: Work, book: Book) -> set[int]:
    """The spec versions of the job's tasks, as they are after the tick."""
    found = book.versions.copy()
    found.update(t.spec_version for t in work.created())
    found.subtract(t.spec_version for t in _gone(work))
    return {version for version, count in found.items() if count > 0}


class _Step:
    """One job in one tick."""

    def __init__(self, work: Work, book: Book, look: Look) -> None:
        self.terms: Terms = book.terms
        self._work = work
        self._book = book
        self._look = look
        # Slots whose next attempt is made at once on another node.
        self._elsewhere: set[Slot] = set()
        # By phase, as changed so far.
        self._counts = list(book.counts)
        for slot in look.slots:
            entry = book.entries.get(slot)
            look.after[slot] = (entry.phase, 0) if entry and entry.phase is not None else None

    def _kept(self, slot: Slot) -> list[Task]:
        """The slot's tasks that count, oldest first."""
        return [
            t
            for t in self._work.slots.get(slot, ())
            if t.job_iteration == self.terms.iteration and t.desired_state != TaskState.REMOVE
        ]

    def _settle(self, slot: Slot) -> None:
        """The slot has been changed; the sums follow."""
        tasks = self._kept(slot)
        before = self._look.after.get(slot)
        after = phase_of(tasks, self.terms) if tasks else None
        if before is not None:
            self._counts[before[0]] -= 1
        if after is not None:
            self._counts[after[0]] += 1
        self._look.after[slot] = after

    def _in(self, *phases: Phase) -> int:
        return sum(self._counts[p] for p in phases)

    # -------------------------------------------------------------- what is there

    def tend(self) -> None:
        """Follows what has become of the slots, without beginning anything."""
        work, terms = self._work, self.terms
        for task in list(work.tasks.values()):
            if task.job_iteration != terms.iteration:
                work.remove(task)
        follow_nodes(work)
        for slot in self._look.slots:
            tasks = self._kept(slot)
            if tasks:
                self._tend_slot(slot, tasks)
            self._settle(slot)

    def _tend_slot(self, slot: Slot, tasks: list[Task]) -> None:
        work, terms = self._work, self.terms
        phase, due_ns = phase_of(tasks, terms)
        newest = tasks[-1]
        if phase is Phase.COMPLETE:
            # The one that completed was given up before, with its node.
            for task in tasks:
                if is_live(task):
                    work.stop(task, message="another task of its slot has completed")
        elif terms.cancelled:
            if is_live(newest):
                work.stop(newest, cause=StopCause.CANCELLED, message="the job was cancelled")
        elif phase in (Phase.STARTING, Phase.RUNNING) and terms.timeout_ns:
            until_ns = runs_since_ns(newest) + terms.timeout_ns
            if work.now_ns >= until_ns:
                longest = format_duration(terms.timeout_ns)
                why = f"ran for longer than {longest}, which is all that its job allows"
                work.stop(newest, cause=StopCause.TIMED_OUT, message=why)
            else:
                work.wake(until_ns, slot)
        elif (
            phase in (Phase.FAILED, Phase.RETRY) and not terms.gang and goes_elsewhere(work, newest)
        ):
            self._elsewhere.add(slot)
        elif phase is Phase.FAILED and states.wanted(newest.desired_state):
            work.stop(newest)
        elif phase is Phase.RETRY and due_ns > work.now_ns and not newest.start_after_ns:
            # For people: nothing else of it says when the slot's next attempt is made.
            work.put(structs.replace(newest, start_after_ns=due_ns))

    # -------------------------------------------------------------- what is begun

    def begin(self) -> None:
        """Attempts that are due, then slots that have had none, as far as there is room."""
        work, look = self._work, self._look
        for slot in look.slots:
            after = look.after[slot]
            if slot in self._elsewhere:
                refused = self._kept(slot)[-1]
                kept, row = refused.restarts_ns, refused.crashes
                if work.create(slot, restarts_ns=kept, crashes=row) is None:
                    look.again.add(slot)
                    break
                self._retire(slot)
                self._settle(slot)
                continue
            if after is None or after[0] not in (Phase.RETRY, Phase.STOPPING):
                continue
            newest = self._kept(slot)[-1]
            if not self._may_follow(slot, newest, after) or not work.may_create(slot):
                continue
            if after[0] is Phase.RETRY and self._room() <= 0:
                continue
            _, restarts_ns = self.terms.next_attempt(newest)
            made = work.create(slot, restarts_ns=restarts_ns, crashes=self._crashes(newest))
            if made is None:
                look.again.add(slot)
                break
            self._retire(slot)
            self._settle(slot)
        if self.terms.mode == Mode.REPLICATED_JOB:
            self._fill()
        else:
            self._fill_nodes()

    def _crashes(self, ended: Task) -> int:
        """How many attempts of its slot have crashed in a row; for people alone."""
        count = crashes_after if ended_by_itself(ended) else crashes_kept
        return count(self._work.service, ended, self._work.now_ns)

    def _room(self) -> int:
        room = self.terms.at_once - self._in(*LIVE, Phase.STOPPING)
        if self.terms.mode.per_node:
            return 1
        if self._book.waiting:
            room = min(room, BACKLOG_MAX - self._counts[Phase.WAITING])
        return room

    def _may_follow(self, slot: Slot, newest: Task, after: tuple[Phase, int]) -> bool:
        """Whether the next task may take the slot now; if not, the slot is looked at again when it
        may.
        """
        work = self._work
        if after[0] is Phase.RETRY:
            return after[1] <= work.now_ns
        if work.lost(newest):
            return True
        told_ns = work.now_ns
        if work.draft.get(Task, newest.id) is newest and newest.meta is not None:
            told_ns = newest.meta.updated_at_ns
        until_ns = told_ns + OLD_TASK_TIMEOUT_NS + stop_grace_ns(work.service.spec)
        work.wake(until_ns, slot)
        return work.now_ns >= until_ns

    def _retire(self, slot: Slot) -> None:
        """What has ended before the newest is not asked to run any more."""
        for task in self._kept(slot)[:-1]:
            if states.ended(state_of(task)) and state_of(task) != TaskState.COMPLETE:
                self._work.stop(task)

    def _fill(self) -> None:
        """Tasks in the lowest slots that have none."""
        missing = min(self.terms.total - sum(self._counts), self._room())
        if missing <= 0 or self._work.held_back():
            return
        for slot in self._book.free_slots():
            if missing <= 0 or self._work.create(slot) is None:
                return
            self._settle(slot)
            missing -= 1

    def _fill_nodes(self) -> None:
        work = self._work
        if not self._book.scan:
            return
        entries = self._book.entries
        for node in sorted(work.draft.all(Node), key=lambda n: n.id):
            entry = entries.get(node.id)
            if (entry is not None and entry.phase is not None) or not work.eligible(node):
                continue
            if work.held_back() or work.create(node.id) is None:
                return
            self._settle(node.id)
        self._look.scanned = True

    # -------------------------------------------------------------- gangs

    def gang(self) -> None:
        """All at once, or none. The look holds all slots."""
        work, look, terms = self._work, self._look, self.terms
        numbers = [i for i in range(1, terms.total + 1) if self._phase(i) is not Phase.COMPLETE]
        live = [i for i in numbers if self._phase(i) in LIVE]
        if terms.cancelled or not numbers:
            return
        if live and len(live) < len(numbers):
            why = self._broken(numbers)
            for slot in live:
                work.stop(self._kept(slot)[-1], cause=StopCause.GANG, message=why)
                self._settle(slot)
            live = [i for i in numbers if self._phase(i) in LIVE]
        if live:
            if self._counts[Phase.READY] == len(live):
                self._let_go(live)
            return
        if self._counts[Phase.FAILED] or not self._all_may_follow(numbers):
            return
        if work.held_back() or not work.may_create_more():
            return
        carried: tuple[int, ...] = ()
        for slot in numbers:
            for task in self._kept(slot)[-1:]:
                _, restarts_ns = terms.next_attempt(task)
                carried = max(carried, restarts_ns, key=lambda r: (len(r), r))
        for slot in numbers:
            crashes = max((self._crashes(t) for t in self._kept(slot)[-1:]), default=0)
            work.create(slot, ready_first=True, restarts_ns=carried, crashes=crashes, beyond=True)
            self._retire(slot)
            self._settle(slot)
        look.again.update(s for s in look.slots if self._phase(s) is Phase.RETRY)

    def _phase(self, slot: Slot) -> Phase | None:
        after = self._look.after.get(slot)
        return after[0] if after is not None else None

    def _all_may_follow(self, numbers: list[int]) -> bool:
        may = True
        for slot in numbers:
            after = self._look.after.get(slot)
            if after is None:
                continue
            if not self._may_follow(slot, self._kept(slot)[-1], after):
                if after[0] is Phase.RETRY:
                    self._work.wake(after[1], slot)
                may = False
        return may

    def _broken(self, numbers: list[int]) -> str:
        """Why the others cannot go on, for people."""
        for slot in numbers:
            tasks = self._kept(slot)
            if tasks and self._phase(slot) not in LIVE:
                newest = tasks[-1]
                if ended_by_itself(newest):
                    return f"task {slot} of its gang failed: {failure(newest)}"
                if newest.stop_message:
                    return f"task {slot} of its gang was stopped: {newest.stop_message}"
                if self._work.lost(newest):
                    return f"task {slot} of its gang was lost with its node"
                return f"task {slot} of its gang was stopped"
        return "its gang is not complete"

    def _let_go(self, live: list[int]) -> None:
        """All of the gang is ready."""
        work = self._work
        if any(work.held(self._kept(slot)[-1].spec_version) for slot in live):
            return
        for slot in live:
            work.put(structs.replace(self._kept(slot)[-1], desired_state=work.target))
            self._settle(slot)

    # -------------------------------------------------------------- what is told

    def tell(self) -> None:
        """Brings Service.job_status up to date, and removes what has been kept for long enough."""
        for slot in self._look.slots:
            self._settle(slot)
        service = self._work.service
        status = self._status(service.job_status)
        if status != service.job_status:
            service = structs.replace(service, job_status=status)
            self._work.use(self._work.draft.put(service))
        keep_ns = self.terms.keep_ns
        if keep_ns is None or status.state not in ENDED:
            return
        if self._work.now_ns >= status.ended_at_ns + keep_ns:
            gone = structs.replace(self._work.service, pending_delete=True)
            self._work.use(self._work.draft.put(gone))
            self._work.unfinished = True
        else:
            self._work.wake(status.ended_at_ns + keep_ns)

    def _status(self, before: JobStatus | None) -> JobStatus:
        book, now_ns = self._book, self._work.now_ns
        if before is None or before.iteration != self.terms.iteration:
            before = JobStatus(
                state=JobState.QUEUED, iteration=self.terms.iteration, queued_at_ns=now_ns
            )
        if self._over():
            return before if before.state in ENDED else self._ended(before)
        state = before.state
        if book.has_place or state not in _TOLD:
            state = JobState.RUNNING if book.has_place else JobState.QUEUED
        elif book.waiting:
            state = JobState.QUEUED
        started_ns = before.started_at_ns
        if state == JobState.RUNNING and not started_ns:
            started_ns = now_ns
        return JobStatus(
            state=state,
            iteration=before.iteration,
            queued_at_ns=before.queued_at_ns,
            started_at_ns=started_ns,
        )

    def _over(self) -> bool:
        """Whether nothing of the job runs, and nothing more is to be begun."""
        terms, counts = self.terms, self._counts
        if self._in(*LIVE) or any(self._stops(s) for s in self._stopping()):
            return False
        if terms.cancelled or (terms.gang and counts[Phase.FAILED]):
            return True
        if terms.mode == Mode.REPLICATED_JOB:
            return not counts[Phase.RETRY] and sum(counts) >= terms.total
        if not sum(counts) or (self._book.scan and not self._look.scanned):
            return False
        # What waits for its next attempt on a node that may have none is not waited for.
        return not counts[Phase.RETRY] or not any(
            entry.phase is Phase.RETRY and self._work.may_create(slot)
            for slot, entry in self._book.entries.items()
            if self._look.after.get(slot, (Phase.RETRY, 0)) is not None
        )

    def _stopping(self) -> set[Slot]:
        after = self._look.after
        looked = {s for s, a in after.items() if a is not None and a[0] is Phase.STOPPING}
        return looked | {s for s in self._book.stopping if s not in after}

    def _stops(self, slot: Slot) -> bool:
        """Whether a task of the slot will say that it has ended."""
        return any(
            not states.ended(state_of(t)) and not self._work.lost(t) for t in self._tasks(slot)
        )

    def _tasks(self, slot: Slot) -> list[Task]:
        if slot in self._look.after:
            return self._kept(slot)
        found = self._work.draft.by(Task, "slot", (self._book.service_id, slot))
        return current(found, self.terms.iteration)

    def _ended(self, before: JobStatus) -> JobStatus:
        counts, now_ns = self._counts, self._work.now_ns
        complete, failed = counts[Phase.COMPLETE], counts[Phase.FAILED]
        message, code, timed_out = "", None, False
        if failed:
            state = JobState.FAILED
            message, code, timed_out = self._why()
        elif self.terms.cancelled and not self._all_complete():
            state = JobState.CANCELLED
            message = "cancelled"
        else:
            state, code = JobState.COMPLETE, 0
        return structs.replace(
            before,
            state=state,
            started_at_ns=before.started_at_ns or (now_ns if complete or failed else 0),
            ended_at_ns=now_ns,
            message=message,
            exit_code=code,
            completed=complete,
            failed=failed,
            timed_out=timed_out,
        )

    def _all_complete(self) -> bool:
        complete = self._counts[Phase.COMPLETE]
        if self.terms.mode == Mode.REPLICATED_JOB:
            return complete >= self.terms.total
        return bool(complete) and complete == sum(self._counts)

    def _why(self) -> tuple[str, int | None, bool]:
        """What became of the first task that failed for good: words, its exit code, and whether it
        ran for too long.
        """
        after = self._look.after
        slots = {s for s, a in after.items() if a is not None and a[0] is Phase.FAILED}
        slots |= {s for s in self._book.failed if s not in after}
        ended = [self._tasks(s)[-1] for s in sorted(slots, key=str)]
        first = min(ended, key=lambda t: (t.meta.updated_at_ns if t.meta else 0, t.slot, t.node_id))
        which = f"task {first.slot or first.node_id}"
        more = f"; {len(ended) - 1} more failed" if len(ended) > 1 else ""
        if first.stop_cause == StopCause.TIMED_OUT:
            return f"{which} {first.stop_message}{more}", None, True
        container = first.status.container if first.status else None
        code = container.exit_code if container else None
        return f"{which}: {failure(first)}{more}", code, False


def has_ended(service: Service) -> bool:
    """Whether the job's present iteration is over."""
    status = service.job_status
    return (
        status is not None and status.iteration == service.job_iteration and status.state in ENDED
    )
