"""Who gets a node: the tasks that wait for one, and one tick's placing of them. Pure.

The Placer is the Controller's: it remembers which tasks have no node, by service. Groups that no
node could take sleep (scheduler/sleeping.py) until a change could help them, so a tick costs what
changed and not what waits. `observe_*` take committed changes, `run` places within a tick's draft;
then `done` follows where the draft was committed. What `run` claims in the node table is taken back
by the Controller where it was not.

A task that waits is asleep in its group, or held back by what is named in Admission, or behind a
gate, or its service is to be looked at in the next tick anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from msgspec import structs

from manager.control.admission import Admission
from manager.control.gates import Gates
from manager.control.holds import Hold
from manager.control.slots import is_unplaced, slot_of
from manager.control.template import state_of
from manager.control.tick import Tick
from manager.control.turns import Turns
from manager.scheduler import Group, NodeTable, Requirement, account, pending_reason
from manager.scheduler.sleeping import Sleepers
from manager.scheduler.trial import Trial
from manager.store import Draft, View
from swarm import errors, states
from swarm.clock import SECOND_NS
from swarm.v1 import Cluster, Service, Task, TaskState, TaskStatus

# How often the reason of a task that stays pending is written anew when only its numbers change.
REASON_INTERVAL_NS = 5 * SECOND_NS
# How many tasks that sleep are told anew, in one interval, why: some milliseconds of a tick.
REFRESHED_MAX = 200
REFRESHED_GROUPS_MAX = 20


class Placer:
    """What waits for a node, and the way to one."""

    def __init__(self, table: NodeTable, *, explains: bool = True) -> None:
        """`explains` false: tasks that find no node are not told why."""
        self._table = table
        self._explains = explains
        self._freed = True  # anything that waits may fit now
        self._pending: dict[str, set[str]] = {}  # service -> tasks without a node
        self._sleepers = Sleepers(table)
        self._emptied: set[str] = set()  # services of which nothing waits any more
        self._refresh_ns = 0  # when reasons may be told anew
        self.admission = Admission(table)

    # -------------------------------------------------------------- taking in changes

    def reset(self, table: NodeTable, view: View) -> None:
        """Forgets everything; the view's tasks are to be handed to `note_task` one by one."""
        self._table = table
        self._freed = True
        self._pending = {}
        self._sleepers = Sleepers(table)
        self._emptied = set()
        self._refresh_ns = 0
        self.admission = Admission.of(table, view)

    def note_task(self, task: Task, view: View) -> None:
        """Takes one task of a view that the Placer begins with."""
        if is_unplaced(task):
            self._pending.setdefault(task.service_id, set()).add(task.id)
        else:
            self.admission.enter(task.id, task.service_id, view)

    def observe_service(self, old: Service | None, new: Service | None, view: View) -> None:
        """Takes a committed change of a service."""
        service = new or old
        assert service is not None
        queue = self.admission.terms(service.id).queue
        self._freed |= self.admission.observe_service(old, new)
        if queue != self.admission.terms(service.id).queue:
            self.admission.moved_queue(service, view)

    def observe_cluster(self, old: Cluster | None, new: Cluster | None) -> None:
        """Takes a committed change of the cluster."""
        self.admission.observe_cluster(old, new)

    def observe_task(self, old: Task | None, new: Task | None, view: View) -> None:
        """Takes a committed change of a task; the table knows of it already."""
        task = new or old
        assert task is not None
        waiting = self._pending.get(task.service_id, set())
        if new is not None and is_unplaced(new):
            self._pending.setdefault(task.service_id, waiting).add(task.id)
        elif task.id in waiting:
            waiting.discard(task.id)
            if not waiting:
                del self._pending[task.service_id]
                self._emptied.add(task.service_id)
        before = state_of(old) if old is not None else TaskState.NEW
        after = state_of(new) if new is not None else before
        held = old is not None and bool(old.node_id) and not states.ended(before)
        self.admission.enter(task.id, task.service_id, view)
        if held and (new is None or states.ended(after)):
            assert old is not None
            self._sleepers.stir(old.node_id)
            self._sleepers.stir_service(task.service_id)
            self.admission.claim_freed(task.service_id, task.node_id)
        elif (old.node_id if old else "") != (new.node_id if new else ""):
            self._sleepers.stir_service(task.service_id)
        if old is not None and new is not None and old.desired_state != new.desired_state:
            # max_replicas and conditions on services count by desired state.
            self._sleepers.stir_service(task.service_id)

    def observe_node(self, node_id: str) -> None:
        """Takes a committed change of what tasks depend on of a node."""
        self._sleepers.stir(node_id)
        self.admission.observe_node(node_id)

    @property
    def has_work(self) -> bool:
        """Whether something that waits may fit now."""
        return bool(self._pending) and (
            self._freed or self._sleepers.stirred or bool(self.admission.due) or bool(self._emptied)
        )

    @property
    def wake_ns(self) -> int | None:
        """When some of those that sleep are to be told anew why; None: what they know holds."""
        if not self._explains or next(self._sleepers.untold(), None) is None:
            return None
        return self._refresh_ns

    # -------------------------------------------------------------- one tick

    def run(self, draft: Draft, tasks: Iterable[Task], tick: Tick) -> None:
        """Places the tasks of the services that the tick has looked at, and what else waits where
        something may fit now.
        """
        waiting = list(tasks)
        tick.retried = self._freed
        for service_id in sorted(self._emptied):
            # Not before: another task of it may have begun to wait in the same commit.
            if service_id not in self._pending:
                self._sleepers.forget_service(service_id)
                self.admission.forget_service(service_id)
        self._emptied.clear()
        tick.woken = self._sleepers.wake()
        # Also of those behind a gate: when it opens, their service is looked at.
        tick.due = frozenset(self.admission.due)
        self.admission.due.clear()
        again: Iterable[str] = self._pending
        if not self._freed:
            again = {k[0] for k in (*tick.due, *tick.woken.keys)}
        if again:
            # Of a job only a part has been looked at: what else of it waits is as any other's.
            done = set(tick.services) - tick.looks.keys()
            have = {t.id for t in waiting if t.service_id in tick.looks}
            for service_id in sorted(again, key=lambda i: (service_name(draft, i), i)):
                if service_id not in done and service_id in self._pending:
                    still = self._still_pending(draft, service_id, tick)
                    waiting.extend(t for t in still if t.id not in have)
        if waiting:
            self._place(draft, waiting, tick)
        if (wake_ns := self.wake_ns) is not None and draft.now_ns >= wake_ns:
            self._refresh(draft, tick)

    def _refresh(self, draft: Draft, tick: Tick) -> None:
        """Tells some of those that sleep why, as things are now."""
        tick.told = self._table.changes
        tasks = 0
        for key in self._sleepers.untold():
            if len(tick.refreshed) == REFRESHED_GROUPS_MAX or tasks >= REFRESHED_MAX:
                break
            service_id, version, node_id = key
            tick.refreshed.append(key)
            if key in tick.slept or service_id in tick.services:
                continue
            service = draft.get(Service, service_id)
            if service is None or Gates(draft, service).loose(version):
                continue  # a gate has closed since, and they have been told so
            need = self._table.requirement_of_version(service_id, version, draft)
            why = self._why(need, service_id, node_id, self._sleepers.tasks(key))
            if not why or key in self.admission.held_back:
                continue
            for task_id in sorted(self._pending.get(service_id, ())):
                task = draft.get(Task, task_id)
                if task is None or task.spec_version != version or task.node_id != node_id:
                    continue
                tasks += 1
                status = task.status or TaskStatus()
                if status.err and status.err != why and is_unplaced(task):
                    status = structs.replace(status, timestamp_ns=draft.now_ns, err=why)
                    draft.put(structs.replace(task, status=status))

    def _still_pending(self, draft: Draft, service_id: str, tick: Tick) -> list[Task]:
        """The tasks of a service that need not be looked at otherwise, as far as they may run."""
        found = (draft.get(Task, i) for i in sorted(self._pending[service_id]))
        waiting = [t for t in found if t is not None and is_unplaced(t)]
        service = draft.get(Service, service_id)
        if service is None:
            return waiting
        gates = Gates(draft, service)
        free = []
        for task in waiting:
            closed = gates.loose(task.spec_version)
            for gate in closed:
                tick.gates.setdefault(gate.gate.service, set()).add(service_id)
            if not closed:
                free.append(task)
        return free

    def _place(self, draft: Draft, waiting: list[Task], tick: Tick) -> None:
        """Gives the waiting tasks nodes, turn by turn, and notes why others wait."""
        grouped: dict[tuple[str, int, str], list[Task]] = {}
        for task in waiting:
            key = (task.service_id, task.spec_version, task.node_id)
            grouped.setdefault(key, []).append(task)
        groups = [
            Group(
                service_id=key[0],
                spec_version=key[1],
                requirement=self._table.requirement_of_version(key[0], key[1], draft),
                tasks=sorted(tasks, key=lambda t: (t.slot, t.id)),
                node_id=key[2],
            )
            for key, tasks in grouped.items()
        ]

        def note(group: Group, left: Sequence[Task], why: str) -> None:
            self._note_reason(draft, group, left, tick, why)
            turn = self.admission.turn(group, draft, draft.now_ns)
            tick.slept[turn.key] = (replace(group, tasks=left), turn, self._table.changes)
            service = draft.get(Service, group.service_id)
            for gate in service.spec.depends_on if service and service.spec else ():
                # If it closes now, that is what they wait for.
                tick.gates.setdefault(gate.service, set()).add(group.service_id)

        tick.tried.extend((g.service_id, g.spec_version, g.node_id) for g in groups)
        for group in groups:
            self._keep_own(draft, group)

        Turns(self.admission, self._table, draft, tick, note).run(groups)

    def _keep_own(self, draft: Draft, group: Group) -> None:
        """Where tasks wait for those before them in their slots to leave the node, their places are
        kept, for as long as they will do: they were given up for that.
        """
        if not group.node_id:
            return
        turn = self.admission.turn(group, draft, draft.now_ns)
        leaving: list[str] = []
        places = 0
        for task in group.tasks if not turn.terms.job else ():
            slot = draft.by(Task, "slot", (group.service_id, slot_of(task)))
            given_up = [t for t in slot if t.node_id == group.node_id and _given_up(t)]
            leaving += [t.id for t in given_up if not states.ended(state_of(t))]
            places += bool(given_up)
        hold = self.admission.holds.get(turn.key)
        if places and self.fits(draft, group.tasks[0], group.node_id, out=leaving):
            if hold is None:
                self.admission.note(turn.key)
                hold = Hold(turn, replace(group, tasks=group.tasks[:1]), preempts=True, own=True)
                for _ in range(places):
                    self.admission.holds.add(hold, group.node_id, frozenset(leaving))
        elif hold is not None and hold.own:
            self.admission.holds.drop(turn.key)

    def fits(self, draft: Draft, task: Task, node_id: str, *, out: Sequence[str] = ()) -> bool:
        """Whether the node could take a task that has no place if these were gone, and what is kept
        there for others were taken.
        """
        group = Group(
            service_id=task.service_id,
            spec_version=task.spec_version,
            requirement=self._table.requirement_of_version(
                task.service_id, task.spec_version, draft
            ),
            tasks=[task],
            node_id=node_id,
        )
        turn = self.admission.turn(group, draft, draft.now_ns)
        with Trial(self._table, draft, draft.now_ns) as trial:
            for task_id in out:
                trial.out(task_id)
            return bool(trial.place(group)) and self.admission.holds.room_beside(
                self._table, draft, draft.now_ns, node_id, turn
            )

    def _why(self, need: Requirement, service_id: str, node_id: str, tasks: int) -> str:
        """What stands in the status of tasks that no node can take."""
        counts = account(self._table, need, service_id, node_id)
        if counts.nodes_fit and self.admission.terms(service_id).gang:
            nodes = f"{counts.nodes_fit} node{'' if counts.nodes_fit == 1 else 's'}"
            return f"no room for its gang of {tasks} at once ({nodes} could take a task)"
        return pending_reason(counts)

    def _note_reason(
        self, draft: Draft, group: Group, left: Sequence[Task], tick: Tick, why: str
    ) -> None:
        """`why`: what holds the tasks back; empty: no node can take them."""
        if not why and not self._explains:
            for task in left:
                if draft.get(Task, task.id) is not task:
                    draft.put(task)
            return
        if not why:
            why = self._why(group.requirement, group.service_id, group.node_id, len(left))
        now_ns = draft.now_ns
        for task in left:
            status = task.status or TaskStatus()
            again_ns = status.timestamp_ns + REASON_INTERVAL_NS
            if task.meta is not None and status.err == why:
                pass
            elif task.meta is not None and status.err and now_ns < again_ns:
                earlier = tick.wakes.get(task.service_id, 0)
                tick.wakes[task.service_id] = min(earlier or again_ns, again_ns)
                if (look := tick.looks.get(task.service_id)) is not None:
                    look.remind(again_ns)
            else:
                status = structs.replace(status, timestamp_ns=now_ns, err=why)
                task = structs.replace(task, status=status)
            if draft.get(Task, task.id) is not task:
                draft.put(task)

    def done(self, tick: Tick) -> None:
        """The tick's draft was committed (or had nothing in it)."""
        if tick.retried:
            self._freed = False
        for key in (*tick.tried, *tick.woken.keys):
            if key not in tick.slept:
                self._sleepers.forget(key)
        for key, (group, turn, told) in tick.slept.items():
            self._sleepers.sleep(
                key,
                group.requirement,
                terms=turn.terms,
                order=turn.place,
                tasks=len(group.tasks),
                told=told,
            )
        self._sleepers.settle(tick.woken, tick.slept)
        for key in tick.refreshed:
            self._sleepers.tell(key, tick.told)
        if tick.refreshed or tick.slept:
            self._refresh_ns = tick.now_ns + REASON_INTERVAL_NS

    def undo(self, tick: Tick, view: View) -> None:
        """The tick's draft came to nothing; the table is as the view again."""
        self.admission.undo(tick, view)

    # -------------------------------------------------------------- for others

    @property
    def pending(self) -> int:
        """Tasks that wait for a node."""
        return sum(len(waiting) for waiting in self._pending.values())

    def check_invariants(self, view: View) -> None:
        """What waits is what the view says, once all its changes were observed; for tests."""
        unplaced: dict[str, set[str]] = {}
        for task in view.all(Task):
            if is_unplaced(task):
                unplaced.setdefault(task.service_id, set()).add(task.id)
        errors.invariant(self._pending == unplaced, "tasks that wait for a node are off")
        self._sleepers.check_invariants()


def _given_up(task: Task) -> bool:
    """Whether the task had its place and was told to stop."""
    return not states.wanted(task.desired_state) and state_of(task) >= TaskState.ASSIGNED


def service_name(view: View, service_id: str) -> str:
    """The service's name; empty when it is gone."""
    service = view.get(Service, service_id)
    return service.spec.name if service is not None and service.spec is not None else ""
