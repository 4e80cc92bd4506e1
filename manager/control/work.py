"""One service in one tick: what the stages read and change.

A `Work` lays the stages' changes over the draft and writes each task once, at the end. The stages
(replicated, per_node, jobs, nodes, restart, update, history) are functions over it. Invariants that
they keep together:

- A task that should run is told to stop only in the same tick in which its slot gets its next task,
  unless the slot is given up; so a slot without a task that should run has come to its end.
- A task that never reached a node is deleted, not stopped: nobody would report its end.
- A replacement whose predecessor still has to stop begins with desired state READY, as does one
  that a gate (depends_on) holds back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Protocol

from msgspec import structs

from manager.control.gates import Closed, Gates, words
from manager.control.slots import (
    Slot,
    is_live,
    is_lost,
    is_unplaced,
    lost_at_ns,
    slot_of,
    slot_order,
)
from manager.control.template import (
    Mode,
    Templates,
    attachments,
    mode_of,
    spec_of_version,
    state_of,
)
from manager.scheduler import NodeTable, Requirement, barred
from manager.store import Draft
from swarm import ids
from swarm.v1 import (
    NetworkAttachment,
    Node,
    Service,
    StopCause,
    Task,
    TaskState,
    TaskStatus,
)

PENDING_MESSAGE = "pending task scheduling"


class Budget:
    """How many tasks one tick may still create, so that a tick and its commit stay short."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks


class Places(Protocol):
    """Knows what a node has room for."""

    def fits(self, draft: Draft, task: Task, node_id: str, *, out: Sequence[str] = ()) -> bool:
        """Whether the node could take the task if these were gone (task ids)."""
        raise NotImplementedError


class Work:
    """One service and its tasks, as changed so far in this tick."""

    def __init__(
        self,
        draft: Draft,
        service: Service,
        table: NodeTable,
        rng: ids.Rng,
        budget: Budget,
        *,
        places: Places | None = None,
        slots: Iterable[Slot] | None = None,
        begun: bool | None = None,
    ) -> None:
        """`places`: whom to ask what would fit if. `slots`: only these are looked at and may be
        changed, and new ones made; None: all.
        `begun`: whether the present template has tasks, where not all are looked at.
        """
        self.draft = draft
        self.service = service
        self.table = table
        self.now_ns = draft.now_ns
        self.places = places
        self.wake_ns = (
            0  # the earliest time at which the service has to be looked at again; 0: none
        )
        self.unfinished = False  # the budget ran out
        self.waits_for: set[str] = set()  # names of services whose gates hold tasks back
        self.leaving: set[Slot] = set()  # slots with a task on a drained node that is to move
        self.moving = False  # a task is on its way to another node
        self.moved = 0  # tasks told to stop because they have moved
        self.refused: Task | None = None  # one made for a node, which did not take it
        self.rng = rng
        self._budget = budget
        self._begun = begun
        # When single slots have to be looked at again, besides `wake_ns`.
        self.slot_wakes: dict[Slot, int] = {}
        if slots is None:
            found = draft.by(Task, "service", service.id)
        else:
            found = [t for s in slots for t in draft.by(Task, "slot", (service.id, s))]
        self._before = {t.id: t for t in found}
        self.tasks: dict[str, Task] = {}
        self.slots: dict[Slot, list[Task]] = {}
        self._used: list[Slot] | None = None
        # Without a function for the key: it is a tenth of what a large service's look costs.
        now_ns = draft.now_ns
        aged = [(t.meta.created_at_ns if t.meta else now_ns, t.id, t) for t in found]
        for _, task_id, task in sorted(aged, key=itemgetter(0, 1)):
            self.tasks[task_id] = task
            self.slots.setdefault(task.slot or task.node_id, []).append(task)
        self._asked: dict[object, bool] = {}
        self._networks: dict[int, tuple[NetworkAttachment, ...]] = {}
        self.use(service)

    def use(self, service: Service) -> None:
        """Goes on with another version of the service object."""
        self.service = service
        self.mode: Mode = mode_of(service.spec)
        self.target = TaskState.COMPLETE if self.mode.job else TaskState.RUNNING
        self.templates = Templates(self.draft, service)
        self.gates = Gates(self.draft, service)
        self.need: Requirement = self.table.requirement_of_spec(service.spec)

    # -------------------------------------------------------------- reading

    def live(self, slot: Slot) -> list[Task]:
        """The slot's tasks that should run and have not ended, oldest first."""
        return [t for t in self.slots.get(slot, ()) if is_live(t)]

    def newest(self, slot: Slot) -> Task | None:
        """The slot's last task that is not to be forgotten."""
        tasks = self.slots.get(slot, ())
        return next((t for t in reversed(tasks) if t.desired_state != TaskState.REMOVE), None)

    def used_slots(self) -> list[Slot]:
        """Slots with a task that is not to be forgotten, in order."""
        if self._used is None:
            remove = TaskState.REMOVE
            used = (
                slot
                for slot, tasks in self.slots.items()
                if any(t.desired_state != remove for t in tasks)
            )
            self._used = sorted(used, key=slot_order)
        return list(self._used)

    def up_to_date(self, task: Task) -> bool:
        """Whether the task fits the service's present spec."""
        return self.templates.up_to_date(task)

    def knows_version(self, version: int) -> bool:
        """Whether the spec of a version is still kept."""
        return spec_of_version(self.draft, self.service, version) is not None

    def node(self, task: Task) -> Node | None:
        """The task's node, if it is there."""
        return self.draft.get(Node, task.node_id) if task.node_id else None

    def lost(self, task: Task) -> bool:
        """Whether the task's node, or its runtime there, cannot be asked any more."""
        if not task.node_id or state_of(task) < TaskState.ASSIGNED:
            return False
        node = self.node(task)
        if node is None or is_lost(node):
            return True
        at_ns = self.engine_lost_ns(task, node)
        return 0 < at_ns <= self.now_ns

    def engine_lost_ns(self, task: Task, node: Node) -> int:
        """See slots.lost_at_ns."""
        if node.status is None or not node.status.unresponsive_since_ns:
            return 0
        version = task.spec_version
        need = self.table.requirement_of_version(task.service_id, version, self.draft)
        return lost_at_ns(node, need.static.hindrance)

    def eligible(self, node: Node) -> bool:
        """Whether the node may get new tasks of the service."""
        return barred(node, self.need) is None

    def may_create(self, slot: Slot) -> bool:
        """Whether the slot may get a new task: slots that are nodes may be closed."""
        if not self.mode.per_node:
            return True
        node = self.draft.get(Node, str(slot))
        return node is not None and self.eligible(node)

    def held_back(self) -> str:
        """What the next new tasks of the present template wait for, as "until service …"; empty:
        they may be made. The service is looked at again when that has happened.
        """
        if self._begun is None:
            return self._note(self.gates.now(self.tasks.values()))
        loose = self.gates.loose(self.service.spec_version)
        return self._note(loose if self._begun else self.gates.strict())

    def held(self, version: int) -> str:
        """As `held_back`, for a task of the version that exists or replaces another."""
        return self._note(self.gates.loose(version))

    def _note(self, closed: tuple[Closed, ...]) -> str:
        self.waits_for.update(c.gate.service for c in closed)
        return words(closed)

    # -------------------------------------------------------------- changing

    def put(self, task: Task) -> Task:
        """A task as it should be from now on."""
        self._used = None
        siblings = self.slots.setdefault(slot_of(task), [])
        for i, sibling in enumerate(siblings):
            if sibling.id == task.id:
                siblings[i] = task
                break
        else:
            siblings.append(task)
        self.tasks[task.id] = task
        return task

    def _drop(self, task: Task) -> None:
        self._used = None
        del self.tasks[task.id]
        slot = slot_of(task)
        self.slots[slot] = [t for t in self.slots[slot] if t.id != task.id]
        if not self.slots[slot]:
            del self.slots[slot]

    def stop(
        self, task: Task, *, cause: StopCause = StopCause.UNSPECIFIED, message: str = ""
    ) -> None:
        """The task ends and stays as history. `cause`, `message`: why, where that is more than what
        the service's spec says.
        """
        if state_of(task) < TaskState.ASSIGNED:
            self._drop(task)
        elif task.desired_state < TaskState.SHUTDOWN:
            self.put(
                structs.replace(
                    task,
                    desired_state=TaskState.SHUTDOWN,
                    stop_cause=cause,
                    stop_message=message,
                )
            )

    def remove(self, task: Task) -> None:
        """The task ends and is forgotten, by its node or, where there is none, at once."""
        if state_of(task) < TaskState.ASSIGNED or self.node(task) is None:
            self._drop(task)
        elif task.desired_state != TaskState.REMOVE:
            self.put(structs.replace(task, desired_state=TaskState.REMOVE))

    def orphan(self, task: Task, err: str) -> Task:
        """The task is given up: nobody will ever report its end."""
        status = task.status or TaskStatus()
        status = structs.replace(
            status,
            state=TaskState.ORPHANED,
            timestamp_ns=self.now_ns,
            message="task is orphaned",
            err=err,
        )
        return self.put(structs.replace(task, status=status))

    def create(
        self,
        slot: Slot,
        *,
        version: int = 0,
        ready_first: bool = False,
        start_after_ns: int = 0,
        restarts_ns: tuple[int, ...] = (),
        crashes: int = 0,
        node_id: str = "",
        beyond: bool = False,
    ) -> Task | None:
        """A new task in the slot; None when this tick may make no more.

        `version` 0: the present one. `ready_first`: it waits until it is due and its predecessor
        has stopped. One that a gate holds back waits for that as well. `node_id`: it may be placed
        on this node only. `beyond`: also where the tick has made enough.
        """
        if not beyond and not self.may_create_more():
            return None
        self._budget.tasks -= 1
        version = version or self.service.spec_version
        networks = self._networks.get(version)
        if networks is None:
            spec = spec_of_version(self.draft, self.service, version)
            networks = self._networks[version] = attachments(self.draft, spec)
        return self.put(
            Task(
                id=ids.new_id(self.rng),
                service_id=self.service.id,
                spec_version=version,
                slot=slot if isinstance(slot, int) else 0,
                node_id=slot if isinstance(slot, str) else node_id,
                desired_state=(
                    TaskState.READY if ready_first or self.held(version) else self.target
                ),
                status=TaskStatus(
                    state=TaskState.PENDING, timestamp_ns=self.now_ns, message=PENDING_MESSAGE
                ),
                networks=networks,
                start_after_ns=start_after_ns,
                restarts_ns=restarts_ns,
                crashes=crashes,
                job_iteration=self.service.job_iteration,
            )
        )

    def once(self, key: object, ask: Callable[[], bool]) -> bool:
        """What `ask` says, which is asked once a tick."""
        found = self._asked.get(key)
        if found is None:
            found = self._asked[key] = ask()
        return found

    def may_create_more(self) -> bool:
        """Whether this tick may make more tasks; if not, the next one comes back to the service."""
        if self._budget.tasks > 0:
            return True
        self.unfinished = True
        return False

    def wake(self, at_ns: int, slot: Slot | None = None) -> None:
        """Looks at the service again then, if not before. `slot`: the one that it is for."""
        if at_ns <= self.now_ns:
            return
        if not self.wake_ns or at_ns < self.wake_ns:
            self.wake_ns = at_ns
        if slot is not None:
            self.slot_wakes[slot] = min(at_ns, self.slot_wakes.get(slot, at_ns))

    def note_held(self) -> None:
        """Says in tasks that have no place and may not have one yet what they wait for."""
        for task in list(self.tasks.values()):
            if is_unplaced(task) and (what := self.held(task.spec_version)):
                status = task.status or TaskStatus()
                why = f"waits {what}"
                if status.err != why:
                    status = structs.replace(status, timestamp_ns=self.now_ns, err=why)
                    self.put(structs.replace(task, status=status))

    # -------------------------------------------------------------- result

    def changed(self) -> Iterable[Task]:
        """Tasks that are new or differ from the draft."""
        for task_id, task in self.tasks.items():
            if self._before.get(task_id) is not task:
                yield task

    def created(self) -> list[Task]:
        """Tasks that are new."""
        return [t for i, t in self.tasks.items() if i not in self._before]

    def deleted(self) -> list[str]:
        """Ids of tasks to be deleted."""
        return sorted(i for i in self._before if i not in self.tasks)

    def unplaced(self) -> list[Task]:
        """Tasks that should run, have no place and may have one, in order of slot."""
        waiting = (
            t for t in self.tasks.values() if is_unplaced(t) and not self.held(t.spec_version)
        )
        return sorted(waiting, key=lambda t: (slot_order(slot_of(t)), t.id))
