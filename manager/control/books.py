"""The books of all jobs: which of them a change concerns, and whether it leaves something to do.

The Controller's; it hands committed changes in and marks services dirty by what comes back. Most
changes of a job's task leave nothing to do: it comes a step further. One that completed leaves room
for the next, and its slot need not be looked at for that.
"""

from __future__ import annotations

from manager.control.job_book import LIVE, Book, Entry, Phase
from manager.control.slots import slot_of
from manager.control.template import mode_of, state_of
from manager.store import View
from swarm import errors, states
from swarm.v1 import JobState, Service, Task, TaskState

_QUEUED = frozenset({JobState.UNSPECIFIED, JobState.QUEUED})


class Books:
    """One Book for each job."""

    def __init__(self) -> None:
        self.by_id: dict[str, Book] = {}

    def reset(self, view: View) -> None:
        """Forgets everything and begins with this view."""
        self.by_id = {}
        for service in view.all(Service):
            self.note_service(service.id, view)

    def get(self, service_id: str) -> Book | None:
        return self.by_id.get(service_id)

    def note_service(self, service_id: str, view: View) -> bool:
        """The service has changed; whether it has to be looked at whoever changed it. Another spec,
        iteration or end: all slots are looked at anew.
        """
        service = view.get(Service, service_id)
        if service is None or not mode_of(service.spec).job:
            self.by_id.pop(service_id, None)
            return False
        book = self.by_id.get(service_id)
        if (
            book is None
            or book.version != service.spec_version
            or book.terms.iteration != service.job_iteration
            or book.deleting != service.pending_delete
        ):
            book = self.by_id[service_id] = Book.of(view, service)
        book.shown = service.job_status.state if service.job_status else JobState.UNSPECIFIED
        return self._stands_out(book)

    def note_task(
        self, book: Book, old: Task | None, new: Task | None, view: View, *, own: bool
    ) -> bool:
        """A task of the job has changed; whether the job has to be looked at."""
        task = new or old
        assert task is not None
        same = old is not None and new is not None and _rank(old) == _rank(new)
        if same and not book.terms.timeout_ns:
            return False
        versions = len(book.versions)
        slot = slot_of(task)
        before, after = book.note(slot, view)
        if book.deleting:
            return not own
        leaves = not own and _leaves_work(before, after)
        if leaves:
            book.dirty.add(slot)
        if before == after:
            return leaves
        completed = _phase(after) is Phase.COMPLETE and not own
        fewer = len(book.versions) < versions
        return leaves or completed or fewer or book.hungry or self._stands_out(book)

    def _stands_out(self, book: Book) -> bool:
        """Whether the job as a whole has come to something: its first task has a place, or none
        has; all of its gang are ready, or not all of them go on.
        """
        counts = book.counts
        if book.shown in _QUEUED and book.has_place:
            return True
        if book.shown == JobState.RUNNING and book.waiting and not book.has_place:
            return True
        if not book.terms.gang:
            return False
        live = sum(counts[p] for p in LIVE)
        return bool(live) and (
            counts[Phase.READY] == live or live + counts[Phase.COMPLETE] < book.terms.total
        )

    def note_node(self, node_id: str, view: View) -> None:
        """Something that tasks depend on has changed of a node."""
        for book in self.by_id.values():
            book.scan = True
        for task in view.by(Task, "node", node_id):
            concerned = self.by_id.get(task.service_id)
            if concerned is not None and (
                not states.ended(state_of(task))
                or task.desired_state == TaskState.REMOVE
                or concerned.terms.mode.per_node
            ):
                concerned.dirty.add(slot_of(task))

    def look_at_all(self) -> None:
        """What holds for all slots has changed."""
        for book in self.by_id.values():
            book.dirty.update(book.entries)

    def check_invariants(self, view: View) -> None:
        """Each is what its view makes of it; for tests."""
        jobs = {s.id: s for s in view.all(Service) if mode_of(s.spec).job}
        errors.invariant(self.by_id.keys() == jobs.keys(), "books of jobs are missing or too many")
        for service_id, service in jobs.items():
            self.by_id[service_id].check_invariants(view, service)


def _rank(task: Task) -> tuple[int, int, int, str, int]:
    """What of a task a slot's entry depends on; states between two phases count as one."""
    state = state_of(task)
    if TaskState.ASSIGNED < state < TaskState.READY:
        state = TaskState.ASSIGNED
    return (state, task.desired_state, task.stop_cause, task.node_id, len(task.restarts_ns))


def _leaves_work(before: Entry | None, after: Entry | None) -> bool:
    """Whether the slot has to be looked at for what others have made of it."""
    phase = _phase(after)
    if phase is None:
        return _phase(before) is not None
    if phase is Phase.COMPLETE:
        return after is not None and len(after.tasks) > 1
    if phase in LIVE:
        return _phase(before) not in LIVE
    return True


def _phase(entry: Entry | None) -> Phase | None:
    return entry.phase if entry is not None else None
