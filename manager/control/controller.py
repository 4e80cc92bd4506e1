"""What the control loop remembers between ticks, and one tick. Pure: no await, no clock of its own.

Everything durable is in the objects; the Controller holds what makes a tick cheap (which services
have to be looked at, when, the node table, who waits for a node) and can be made afresh from a view
at any time (`reset`). `observe` takes committed changes, `tick` writes one tick's changes into a
draft; then either `done` (the draft was committed) or `undo` (it was not) must follow.

    observe(change)... -> tick(draft): for each dirty service
                             scale -> follow_nodes -> restart -> update -> move -> rebalance
                             -> promote -> reap
                          then place what waits  -> done | undo

A tick's cost: the tasks of the dirty services, and the nodes once for each group that is placed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from typing import Any

from msgspec import structs

from manager.control import jobs
from manager.control.automatic import Automatic
from manager.control.books import Books
from manager.control.history import (
    forget_orphans,
    reap_tasks,
    remove_service,
    versions_of,
)
from manager.control.job_book import Book
from manager.control.moves import move
from manager.control.nodes import follow_nodes
from manager.control.pace import Rests, rest_ns
from manager.control.placing import Placer, service_name
from manager.control.rebalance import rebalance
from manager.control.restart import promote, restart
from manager.control.scale import scale
from manager.control.slots import goes_on
from manager.control.template import (
    PAUSED,
    UPDATING,
    mode_of,
    state_of,
)
from manager.control.tick import Tick
from manager.control.update import update
from manager.control.versions import keep_versions
from manager.control.work import Budget, Work
from manager.scheduler import NodeTable, unsuitable
from manager.scheduler.nodeinfo import FAILURE_WINDOW_NS
from manager.store import Change, Draft, View
from swarm import errors, ids, states
from swarm.clock import SECOND_NS
from swarm.v1 import Cluster, Gpu, Kind, Node, Service, Task, TaskState

LOOKED_MAX = 10_000  # slots of a job that one tick looks at
DEFECT_RETRY_NS = 30 * SECOND_NS  # after a service that could not be worked out
CREATED_MAX = 5_000  # tasks that one tick may create: some 0.1 s of work, one commit of 2 MB


def _raise(service_id: str, error: Exception) -> None:
    raise error


class Controller:
    """The mutable part of the control loop."""

    def __init__(
        self,
        rng: ids.Rng,
        *,
        created_max: int = CREATED_MAX,
        explains: bool = True,
        played: bool = False,
        on_defect: Callable[[str, Exception], None] = _raise,
    ) -> None:
        """`explains` false: tasks that find no node are not told why, which costs all nodes once a
        group and tick; for who asks for the reasons at the end. `played`: time is played, so that
        nothing begins for which things must be quiet. `on_defect` hears of a service, by its id,
        that could not be worked out; unless it raises, the others go on.
        """
        self._rng = rng
        self._created_max = created_max
        self._on_defect = on_defect
        self.table = NodeTable()
        self._placer = Placer(self.table, explains=explains)
        self.dirty: set[str] = set()  # services to look at
        self._books = Books()
        self._per_node: set[str] = set()  # services with one task a node
        # Service name -> services whose gates look at it.
        self._gates: dict[str, set[str]] = {}
        self._wake: dict[str, int] = {}  # service -> when to look at it
        self._heap: list[tuple[int, str]] = []
        self._rests = Rests()
        self._rest = not played
        # Services with tasks on their way to other nodes: how far these come matters.
        self._moving: set[str] = set()
        self._automatic = None if played else Automatic()
        self._tick: Tick | None = None
        self._forget_ns = 0  # when failures too old to count are dropped

    # -------------------------------------------------------------- taking in changes

    def reset(self, view: View) -> None:
        """Forgets everything and begins with this view; all services are dirty."""
        self.table = NodeTable.build(view)
        self.dirty = {s.id for s in view.all(Service)}
        self._placer.reset(self.table, view)
        self._per_node, self._gates = set(), {}
        self._wake, self._heap = {}, []
        self._rests = Rests()
        self._moving = set()
        self._tick = None
        self._books.reset(view)
        if self._automatic is not None:
            self._automatic.reset()
        for service in view.all(Service):
            self._note_service(service)
            if self._automatic is not None:
                self._automatic.note(service)
        for task in view.all(Task):
            if task.service_id not in self.dirty:
                self.dirty.add(task.service_id)  # its service is gone
            self._placer.note_task(task, view)

    def observe(self, change: Change, view: View, *, own: bool = False) -> None:
        """Takes one committed change, in order. `own`: the tick itself made it, so it leaves
        nothing to do.
        """
        if change.kind == Kind.TASK and goes_on(change.old, change.new):
            book = self._books.get(change.new.service_id)
            if book is None or book.heeds(change.new):
                self._observe_step(change.old, change.new, view, own=own)
            return
        self.table.apply(change, view)
        if self._automatic is not None and change.kind != Kind.TASK:
            self._automatic.observe(change)
        match change.kind:
            case Kind.TASK:
                self._observe_task(change.old, change.new, view, own=own)
            case Kind.NODE:
                self._observe_node(change, view)
            case Kind.SERVICE:
                self._placer.observe_service(change.old, change.new, view)
                if self._books.note_service(change.id, view):
                    self.dirty.add(change.id)
                if change.new is not None:
                    self._note_service(change.new)
                else:
                    self._per_node.discard(change.id)
                for name in {o.spec.name for o in (change.old, change.new) if o and o.spec}:
                    self.dirty |= self._gates.get(name, set())
                if not own:
                    self.dirty.add(change.id)
            case Kind.CLUSTER:
                self._placer.observe_cluster(change.old, change.new)
                if _history_limit(change.old) != _history_limit(change.new):
                    self.dirty.update(s.id for s in view.all(Service))
                    self._books.look_at_all()

    def _note_service(self, service: Service) -> None:
        if mode_of(service.spec).per_node:
            self._per_node.add(service.id)
        else:
            self._per_node.discard(service.id)

    def _observe_task(self, old: Task | None, new: Task | None, view: View, *, own: bool) -> None:
        task = new or old
        assert task is not None
        self._placer.observe_task(old, new, view)
        self._observe_step(old, new, view, own=own)

    def _observe_step(self, old: Task | None, new: Task | None, view: View, *, own: bool) -> None:
        """What a change of a task leaves to do for its service."""
        task = new or old
        assert task is not None
        book = self._books.get(task.service_id)
        if book is not None:
            self._observe_job(book, old, new, view, own=own)
            return
        before = state_of(old) if old is not None else TaskState.NEW
        after = state_of(new) if new is not None else before
        if old is not None and new is not None and before == after:
            if old.desired_state != new.desired_state and not own:
                self.dirty.add(task.service_id)
            return
        if own:
            return
        service = view.get(Service, task.service_id)
        if after >= TaskState.STARTING:
            self._wake_waiting(service)
        rolling = service is not None and _rolling(service)
        if (
            old is None
            or new is None
            or states.ended(after)
            or (after == TaskState.RUNNING and rolling)
            or (after >= TaskState.READY and task.service_id in self._moving)
        ):
            self.dirty.add(task.service_id)

    def _observe_job(
        self, book: Book, old: Task | None, new: Task | None, view: View, *, own: bool
    ) -> None:
        """A job's books tell what a change of one of its tasks leaves to do, and when the services
        that wait for the job may go on.
        """
        before = book.milestones if self._gates else ()
        if self._books.note_task(book, old, new, view, own=own):
            self.dirty.add(book.service_id)
        wake_ns = book.next_ns
        if wake_ns and wake_ns < self._wake.get(book.service_id, wake_ns + 1):
            self._set_wake(book.service_id, wake_ns)
        if self._gates and before != book.milestones:
            self._wake_waiting(view.get(Service, book.service_id))

    def _observe_node(self, change: Change, view: View) -> None:
        if _matters(change.old) == _matters(change.new):
            return
        if self._automatic is not None:
            self._automatic.stir()
        self._placer.observe_node(change.id)
        self._books.note_node(change.id, view)
        concerned = {t.service_id for t in view.by(Task, "node", change.id)} | self._per_node
        if _condition(change.old) == _condition(change.new):
            # Only what services ask of the node itself can have changed.
            concerned = {i for i in concerned if self._suits_otherwise(change, i, view)}
        self.dirty |= concerned
        if self._gates:
            # How many tasks a service should have, and which of them count, depends on nodes.
            for service_id in concerned:
                self._wake_waiting(view.get(Service, service_id))

    def _suits_otherwise(self, change: Change, service_id: str, view: View) -> bool:
        """Whether the node suits the service and did not, or the other way round."""
        service = view.get(Service, service_id)
        if service is None:
            return True
        need = self.table.requirement_of_spec(service.spec)
        return (unsuitable(change.old, need) is None) != (unsuitable(change.new, need) is None)

    def _wake_waiting(self, service: Service | None) -> None:
        """The services that wait for this one have to be looked at."""
        if service is not None and service.spec is not None:
            self.dirty |= self._gates.get(service.spec.name, set())

    # -------------------------------------------------------------- time

    def next_wake_ns(self) -> int | None:
        """When the next tick is due though nothing changes; None: never."""
        due_ns = self._next_service_ns()
        wake_ns = self._automatic.wake_ns if self._automatic is not None else None
        told_ns = self._placer.wake_ns
        rested_ns = self._rests.next_ns(self.dirty)
        times = (due_ns, wake_ns, told_ns, rested_ns)
        return min((w for w in times if w is not None), default=None)

    def _next_service_ns(self) -> int | None:
        while self._heap and self._wake.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def has_work(self, now_ns: int) -> bool:
        """Whether a tick would have something to look at."""
        due_ns = self.next_wake_ns()
        due = due_ns is not None and due_ns <= now_ns
        awake = any(self._rests.over(i, now_ns) for i in self.dirty)
        return awake or due or self._placer.has_work

    def _set_wake(self, service_id: str, at_ns: int) -> None:
        if at_ns:
            self._wake[service_id] = at_ns
            heapq.heappush(self._heap, (at_ns, service_id))
        else:
            self._wake.pop(service_id, None)

    # -------------------------------------------------------------- one tick

    def tick(self, draft: Draft) -> Tick:
        """Works out what to change at the draft's time, and writes it into the draft."""
        errors.invariant(self._tick is None, "a tick before the last one was done or undone")
        now_ns = draft.now_ns
        while (due_ns := self._next_service_ns()) is not None and due_ns <= now_ns:
            service_id = heapq.heappop(self._heap)[1]
            del self._wake[service_id]
            self.dirty.add(service_id)
        for name, waiters in self._gates.items():
            if self._books.watch(name, draft):
                # Until now nobody has noted how far its tasks came.
                self.dirty |= waiters
        if self._automatic is not None and (service_id := self._automatic.step(draft, self.table)):
            self.dirty.add(service_id)
        # By name: ids are drawn by lot, and a rehearsal must come to the same as the deploy.
        awake = (i for i in self.dirty if self._rests.over(i, now_ns))
        order = tuple(sorted(awake, key=lambda i: (service_name(draft, i), i)))
        tick = self._tick = Tick(services=order, now_ns=now_ns)
        if now_ns >= self._forget_ns:
            self.table.forget_failures(now_ns)
            self._forget_ns = now_ns + FAILURE_WINDOW_NS
        budget = Budget(self._created_max)
        waiting: list[Task] = []
        for service_id in tick.services:
            try:
                waiting.extend(self._service(draft, service_id, budget, tick))
            except Exception as error:
                # The stages write at their end, so nothing of this service is half done.
                self._on_defect(service_id, error)
                tick.wakes[service_id] = now_ns + DEFECT_RETRY_NS
        tick.created = self._created_max - budget.tasks
        self._placer.run(draft, waiting, tick)
        return tick

    def _service(self, draft: Draft, service_id: str, budget: Budget, tick: Tick) -> Iterable[Task]:
        """Runs the stages for one service; returns its tasks that wait for a node."""
        service = draft.get(Service, service_id)
        if service is None:
            keep_versions(draft, service_id, versions_of(forget_orphans(draft, service_id)))
            self._sync(draft, [t.id for t in draft.by(Task, "service", service_id)], tick)
            return ()
        book = self._books.get(service_id)
        if book is not None:
            return self._job(draft, service, book, budget, tick)
        work = Work(draft, service, self.table, self._rng, budget, places=self._placer)
        if service.pending_delete:
            self._rest_after(work, tick)
            gone = remove_service(work)
            self._flush(work, tick)
            tick.wakes[service_id] = work.wake_ns
            if gone:
                draft.delete(Service, service_id)
            keep_versions(draft, service_id, versions_of(work.tasks.values()))
            return ()
        scale(work)
        follow_nodes(work)
        restart(work)
        update(work)
        move(work)
        rebalance(work)
        promote(work)
        reap_tasks(work)
        work.note_held()
        keep_versions(draft, service_id, versions_of(work.tasks.values()))
        if work.moving:
            tick.moving.add(service_id)
        return self._conclude(work, tick)

    def _job(
        self, draft: Draft, service: Service, book: Book, budget: Budget, tick: Tick
    ) -> Iterable[Task]:
        """As `_service`, for a job: only the slots that something has become of."""
        look = book.look(draft.now_ns, most=LOOKED_MAX)
        tick.looks[service.id] = look
        work = Work(
            draft, service, self.table, self._rng, budget, slots=look.slots, begun=book.used > 0
        )
        if not look.whole:
            tick.unfinished.add(service.id)
        if service.pending_delete:
            gone = jobs.remove(work, book, look)
            used = jobs.versions(work, book)
            tick.wakes[service.id] = work.wake_ns
            if work.deleted() and not gone:
                tick.unfinished.add(service.id)
            self._flush(work, tick)
            if gone:
                draft.delete(Service, service.id)
            keep_versions(draft, service.id, used)
            return ()
        jobs.run(work, book, look)
        look.wakes = work.slot_wakes
        return self._conclude(work, tick)

    def _conclude(self, work: Work, tick: Tick) -> Iterable[Task]:
        """Writes what the stages have made of a service; returns its tasks that wait for a node."""
        unplaced = work.unplaced()
        self._flush(work, tick, waiting={t.id for t in unplaced})
        for name in work.waits_for:
            tick.gates.setdefault(name, set()).add(work.service.id)
        if work.unfinished:
            tick.unfinished.add(work.service.id)
        else:
            self._rest_after(work, tick)
        tick.wakes[work.service.id] = work.wake_ns
        return unplaced

    def _rest_after(self, work: Work, tick: Tick) -> None:
        rest = rest_ns(len(work.tasks)) if self._rest else 0
        tick.rests[work.service.id] = tick.now_ns + rest if rest else 0

    def _flush(self, work: Work, tick: Tick, *, waiting: Collection[str] = ()) -> None:
        """Writes the service's changes, except of tasks that wait for a node: the Placer does."""
        draft = work.draft
        changed = [t for t in work.changed() if t.id not in waiting]
        for task in changed:
            draft.put(task)
        deleted = work.deleted()
        for task_id in deleted:
            draft.delete(Task, task_id)
        self._sync(draft, [*(t.id for t in changed), *deleted], tick)

    def _sync(self, draft: Draft, task_ids: list[str], tick: Tick) -> None:
        for task_id in task_ids:
            self.table.sync_task(task_id, draft.get(Task, task_id), draft)
        tick.touched.extend(task_ids)

    # -------------------------------------------------------------- after the commit

    def done(self) -> None:
        """The tick's draft was committed (or had nothing in it)."""
        tick = self._tick
        errors.invariant(tick is not None, "done without a tick")
        assert tick is not None
        self._tick = None
        self.dirty = (self.dirty - set(tick.services)) | tick.unfinished
        self._placer.done(tick)
        self._moving = (self._moving - set(tick.services)) | tick.moving
        for service_id, look in tick.looks.items():
            book = self._books.get(service_id)
            if book is not None:
                wake_ns = book.done(look)
                if wake_ns:
                    tick.wakes[service_id] = min(wake_ns, tick.wakes.get(service_id) or wake_ns)
        for service_id in tick.services:
            self._rests.begin(service_id, tick.rests.get(service_id, 0))
            self._set_wake(service_id, tick.wakes.get(service_id, 0))
        for service_id in tick.wakes.keys() - set(tick.services):
            self._set_wake(service_id, tick.wakes[service_id])
        for waiting in self._gates.values():
            waiting.difference_update(tick.services)
        for name, waiting in tick.gates.items():
            self._gates.setdefault(name, set()).update(waiting)
            if not self._books.watches(name):
                self.dirty |= waiting  # until the next tick begins nobody looks at that service
        self._gates = {name: waiting for name, waiting in self._gates.items() if waiting}

    def undo(self, view: View) -> None:
        """The tick's draft came to nothing; the node table goes back to what the view says."""
        tick = self._tick
        errors.invariant(tick is not None, "undo without a tick")
        assert tick is not None
        self._tick = None
        if self._automatic is not None:
            self._automatic.undo()
        for task_id in tick.touched:
            self.table.sync_task(task_id, view.get(Task, task_id), view)
        self._placer.undo(tick, view)
        # Services whose time had come have lost their timer; they stay in `dirty`.

    @property
    def pending(self) -> int:
        """Tasks that wait for a node."""
        return self._placer.pending

    def check_invariants(self, view: View) -> None:
        """The memory agrees with the view, once all its changes were observed; for tests."""
        self.table.check_invariants(view)
        self._placer.check_invariants(view)
        self._books.check_invariants(view)


def _rolling(service: Service) -> bool:
    status = service.update_status
    return status is not None and (status.state in UPDATING or status.state in PAUSED)


def _condition(node: Node | None) -> Any:
    """What of a node concerns all tasks on it, whatever they ask for."""
    if node is None:
        return None
    gpus = node.description.gpus if node.description else ()
    return (
        node.status and node.status.state,
        node.spec and node.spec.availability,
        node.revoked,
        node.status and node.status.unresponsive_since_ns,
        _problems(node),
        [(g.uuid, g.healthy) for g in gpus],
    )


def _matters(node: Node | None) -> Any:
    """What of a node tasks depend on."""
    if node is None:
        return None
    d, s = node.description, node.spec
    return (
        node.status and (node.status.state, node.status.addr, node.status.unresponsive_since_ns),
        _problems(node),
        s and (s.labels, s.role, s.availability),
        d and (d.hostname, d.platform, d.resources, d.engine, d.runtimes, _devices(d.gpus)),
        node.revoked,
    )


def _problems(node: Node) -> Any:
    description = node.description
    return description and [(p.runtimes, p.cause, p.message) for p in description.runtime_problems]


def _devices(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Without who uses them just now, which changes all the time and moves nothing."""
    return tuple(structs.replace(gpu, processes=(), ecc_errors=0) for gpu in gpus)


def _history_limit(cluster: Cluster | None) -> int | None:
    return cluster.spec.task_history_limit if cluster and cluster.spec else None
