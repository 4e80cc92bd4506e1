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
        # Names of services that others wait for.
        self._watched: set[str] = set()

    def reset(self, view: View) -> None:
        """Forgets everything and begins with this view."""
        self.by_id, self._watched = {}, set()
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
            book = self.by_id[service_id] = self._make(service, view)
        book.shown = service.job_status.state if service.job_status else JobState.UNSPECIFIED
        return self._stands_out(book)

    def _make(self, service: Service, view: View) -> Book:
        name = service.spec.name if service.spec is not None else ""
        return Book.of(view, service, fine=name in self._watched)

    def watches(self, name: str) -> bool:
        """Whether it is known that others wait for the service of that name."""
        return name in self._watched

    def watch(self, name: str, view: View) -> bool:
        """Others wait for the service of that name; whether this is new. To be called while the
        books agree with the view.
        """
        if name in self._watched:
            return False
        self._watched.add(name)
        for service in view.by(Service, "name", name):
            book = self.by_id.get(service.id)
            if book is not None:
                shown = book.shown
                book = self.by_id[service.id] = self._make(service, view)
                book.shown = shown
        return True

    def note_task(
        self, book: Book, old: Task | None, new: Task | None, view: View, *, own: bool
    ) -> bool:
        """A task of the job has changed; whether the job has to be looked at."""
        task = new or old
        assert task is not None
        slot = slot_of(task)
        before = book.entries.get(slot)
        versions = len(book.versions)
        if before is not None and _only_stepped(book, before, old, new):
            after: Entry | None = book.step(slot, before, task)
        else:
            before, after = book.note(slot, view)
        if before is after:
            return False
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


def _only_stepped(book: Book, entry: Entry, old: Task | None, new: Task | None) -> bool:
    """Whether the slot's only task has changed and nothing but its state, in which a slot's entry
    follows without a look at its other tasks.
    """
    return (
        old is not None
        and new is not None
        and entry.phase is not None
        and len(entry.tasks) == 1
        and old.node_id == new.node_id
        and old.desired_state == new.desired_state != TaskState.REMOVE
        and new.job_iteration == book.terms.iteration
    )


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
