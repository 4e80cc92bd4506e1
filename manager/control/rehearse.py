"""What the control loop would do: the loop itself, on a draft, with nodes that do as they are told.

`rehearse` takes a view that holds a change not yet committed (a deploy's draft), and runs the real
Controller over a draft of it until nothing is left to do. Nodes are played: whatever a node that is
up is told succeeds: each task starts and stays healthy, each stop is over at once, and the tasks of
jobs complete when there is nothing else to do. Time is played as well: it jumps to when the loop
wants to look again, so that delays and monitor periods cost nothing. Nothing is written anywhere
but in the draft.

It knows nothing of what tasks would do in truth: one that crashes, or an image that is missing, is
not foreseen; a roll-out that fails because its tasks find no place is. All nodes being equally
fast, services whose roll-outs run side by side take turns.

Cost: the node table once (all tasks), then what the change touches. A roll-out of n tasks in steps
of p looks n/p times at n tasks, so those of many steps are played in larger ones (STEPS_TASKS_MAX);
that comes to the same numbers, though single tasks may come to other nodes than in truth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar, cast

from msgspec import structs

from manager.control.controller import Controller
from manager.control.gates import closed_gates
from manager.control.template import (
    PAUSED,
    ROLLBACK,
    UPDATING,
    Mode,
    job_size,
    mode_of,
    state_of,
    update_config,
)
from manager.scheduler import account, reason
from manager.store import Change, Draft, View
from manager.store.tables import BY_CLASS
from swarm import ids, states
from swarm.clock import MILLISECOND_NS, SECOND_NS
from swarm.v1 import (
    Kind,
    Message,
    Node,
    NodePlacement,
    NodeState,
    PendingPlacement,
    ReplicatedJob,
    Service,
    ServiceMode,
    ServicePlacement,
    StopCause,
    Task,
    TaskState,
    TaskStatus,
)

T = TypeVar("T", bound=Message)

# The bounds. Beyond them the rehearsal ends as it stands (`settled` is False).
TICKS_MAX = 20_000
# Longer than any roll-out whose end somebody waits for.
HORIZON_NS = 7 * 24 * 3600 * SECOND_NS
# How many tasks the steps of all roll-outs may look at together, each step at every task of its
# service: some 3 s of work. 300 services of ten tasks go one by one, a service of 200 as well; one
# of 1,000 goes in 40 steps, one of 10,000 in four.
STEPS_TASKS_MAX = 40_000
_STEPS_MIN = 3
_FOR_OTHERS = frozenset({StopCause.PREEMPTED, StopCause.GANG})
_TURN_NS = MILLISECOND_NS  # what each round of loop and nodes takes


class Rehearsal:
    """How it ended. `placement` says what became of one service."""

    def __init__(
        self, before: View, after: _Stage, controller: Controller, *, settled: bool
    ) -> None:
        self.settled = settled
        self._victims = after.victims
        self._before = before
        self._after = after
        self._table = controller.table

    def preempted(self) -> tuple[str, ...]:
        """Whose tasks would be stopped for others of a higher priority, in sentences."""
        counts: Counter[tuple[str, int, str]] = Counter()
        for (service_id, message), tasks in self._victims.items():
            service = self._before.get(Service, service_id)
            spec = service.spec if service is not None else None
            counts[spec.name if spec else service_id, spec.priority if spec else 0, message] += (
                tasks
            )
        return tuple(
            f"{tasks} task{'s' if tasks != 1 else ''} of {name} (priority {priority}) would be "
            f"stopped: {message}"
            for (name, priority, message), tasks in sorted(counts.items())
        )

    def placement(self, service_id: str) -> ServicePlacement:
        """What became of the service's tasks. Kept and stopped are counted over the tasks that were
        to run before, created and pending over those that are to run now and did not exist then.
        What had completed and is forgotten (a job that runs anew) is not stopped.
        """
        before = {t.id: t for t in self._before.by(Task, "service", service_id) if _counts(t)}
        after = {t.id: t for t in self._after.by(Task, "service", service_id) if _counts(t)}
        made = [t for i, t in after.items() if i not in before]
        kept = len(after) - len(made)
        service = self._after.get(Service, service_id)
        return ServicePlacement(
            kept=kept,
            created=len(made),
            stopped=sum(
                i not in after and not states.ended(state_of(t)) for i, t in before.items()
            ),
            nodes=self._nodes(made),
            pending=self._pending(made),
            waits=(*closed_gates(self._after, service), *self._failure(service)) if service else (),
        )

    def _failure(self, after: Service) -> tuple[str, ...]:
        """How the service's roll-out would fail, for want of a place: nothing else is foreseen."""
        before, status = self._before.get(Service, after.id), after.update_status
        if before is None or status is None or status == before.update_status:
            return ()
        if after.spec_version > before.spec_version:
            return ("the update would be rolled back, for it would find no place in time",)
        return (status.message,) if status.state in PAUSED and not status.awaits_resume else ()

    def _nodes(self, made: list[Task]) -> tuple[NodePlacement, ...]:
        counts = Counter(t.node_id for t in made if state_of(t) >= TaskState.ASSIGNED)
        found = [
            NodePlacement(node_id=node_id, hostname=self._name(node_id), tasks=count)
            for node_id, count in counts.items()
        ]
        return tuple(sorted(found, key=lambda n: (-n.tasks, n.hostname, n.node_id)))

    def _name(self, node_id: str) -> str:
        info = self._table.nodes.get(node_id)
        return info.name if info is not None else node_id

    def _pending(self, made: list[Task]) -> tuple[PendingPlacement, ...]:
        groups: dict[tuple[str, int, str], list[Task]] = {}
        for task in made:
            if state_of(task) < TaskState.ASSIGNED:
                key = (task.service_id, task.spec_version, task.node_id)
                groups.setdefault(key, []).append(task)
        found: Counter[tuple[str, bool]] = Counter()
        for (service_id, version, node_id), tasks in sorted(groups.items()):
            need = self._table.requirement_of_version(service_id, version, self._after)
            why = account(self._table, need, service_id, node_id)
            if why.nodes_fit:
                # A place is not what they wait for, but a gate: they say so themselves.
                found.update((t.status.err if t.status else "", False) for t in tasks)
            else:
                found[reason(why), why.never] += len(tasks)
        return tuple(
            PendingPlacement(tasks=count, reason=text, never=never)
            for (text, never), count in sorted(found.items(), key=lambda f: (-f[1], f[0]))
        )


def rehearse(view: View, *, now_ns: int, rng: ids.Rng, services: Collection[str] = ()) -> Rehearsal:
    """Runs the control loop on the view, which is left as it is. `services`: ids of what the change
    touches, removed ones included; what else has something to do is found.
    """
    stage = _Stage(view, now_ns=now_ns)
    _take_larger_steps(stage, [s for s in view.all(Service) if s.id in services or _rolling(s)])
    stage.step()
    controller = Controller(rng, explains=False, played=True)
    controller.reset(stage)
    told = [t for t in stage.all(Task) if _unsettled(t)]
    touched = {s.spec.name for i in services if (s := stage.get(Service, i)) and s.spec}
    controller.dirty = {
        *(i for i in services if stage.get(Service, i) is not None),
        *(t.service_id for t in told),
        *(s.id for s in stage.all(Service) if _waits(stage, s, touched)),
    }
    settled = _play(stage, controller, [t.id for t in told])
    return Rehearsal(view, stage, controller, settled=settled)


def _waits(view: View, service: Service, touched: Collection[str]) -> bool:
    """Whether it waits for other services, or may have waited for one that is touched."""
    if service.spec is None or not service.spec.depends_on:
        return False
    named = any(gate.service in touched for gate in service.spec.depends_on)
    return named or bool(closed_gates(view, service))


def _play(stage: _Stage, controller: Controller, told: Sequence[str]) -> bool:
    """Loop and nodes take turns until neither has anything to do; False: a bound came first.

    `told`: ids of tasks whose nodes may have something to do.
    """
    until_ns = stage.now_ns + HORIZON_NS
    ticks = 0
    at_work: set[str] = set()  # tasks of jobs that run
    while True:
        own: list[Change] = []
        if controller.has_work(stage.now_ns):
            if ticks == TICKS_MAX:
                return False
            ticks += 1
            controller.tick(stage)
            controller.done()
            own = _observed(controller, stage, own=True)
        stage.now_ns += _TURN_NS
        for task_id in sorted({*told, *_tasks(own)}):
            if _obey(stage, task_id):
                at_work.add(task_id)
        done = _observed(controller, stage, own=False)
        told = _tasks(done)
        if own or done or controller.has_work(stage.now_ns):
            continue
        if at_work:
            # What a job does takes longer than starts and stops.
            for task_id in sorted(at_work):
                _complete(stage, task_id)
            at_work.clear()
            told = _tasks(_observed(controller, stage, own=False))
            continue
        wake_ns = controller.next_wake_ns()
        if wake_ns is None:
            return True
        if wake_ns > until_ns:
            return False
        stage.now_ns = max(stage.now_ns, wake_ns)


def _observed(controller: Controller, stage: _Stage, *, own: bool) -> list[Change]:
    """Tells the controller what has happened since the last time."""
    changes = stage.step()
    for change in changes:
        controller.observe(change, stage, own=own)
    return changes


def _tasks(changes: Iterable[Change]) -> list[str]:
    return [c.id for c in changes if c.kind == Kind.TASK and c.new is not None]


# ---------------------------------------------------------------- the nodes


def _unsettled(task: Task) -> bool:
    """Whether the task's node, if it has one, has something left to do."""
    state = state_of(task)
    if task.desired_state == TaskState.REMOVE:
        return True
    if states.ended(state):
        return False
    return state != TaskState.RUNNING or task.desired_state != TaskState.RUNNING


def _obey(stage: _Stage, task_id: str) -> bool:
    """The task's node takes it one step further, if there is one and it is up; True: it runs, and
    is to run to completion. A start takes three turns and a stop one, and a replacement gets ready
    while its predecessor stops.
    """
    task = stage.get(Task, task_id)
    if task is None or not _unsettled(task) or state_of(task) < TaskState.ASSIGNED:
        return False
    node = stage.get(Node, task.node_id)
    if node is None or node.status is None or node.status.state != NodeState.READY:
        return False
    state, desired = state_of(task), task.desired_state
    if desired == TaskState.REMOVE:
        stage.delete(Task, task_id)
    elif desired == TaskState.SHUTDOWN:
        _report(stage, task, TaskState.SHUTDOWN)
    elif state < TaskState.PREPARING:
        _report(stage, task, TaskState.PREPARING)
    elif state < TaskState.READY:
        _report(stage, task, TaskState.READY)
    elif state < TaskState.RUNNING and desired != TaskState.READY:
        _report(stage, task, TaskState.RUNNING)
    return state == TaskState.RUNNING and desired == TaskState.COMPLETE


def _complete(stage: _Stage, task_id: str) -> None:
    task = stage.get(Task, task_id)
    if task is not None and task.desired_state == TaskState.COMPLETE:
        _report(stage, task, TaskState.COMPLETE)


def _report(stage: _Stage, task: Task, state: TaskState) -> None:
    status = structs.replace(task.status or TaskStatus(), state=state, timestamp_ns=stage.now_ns)
    runs_ns = stage.now_ns if state == TaskState.RUNNING else 0
    since_ns = task.running_since_ns or runs_ns
    stage.put(structs.replace(task, status=status, running_since_ns=since_ns))


def _counts(task: Task) -> bool:
    """Whether the task is to run, or has done what a job wants of it."""
    if not states.wanted(task.desired_state):
        return False
    return not states.ended(state_of(task)) or state_of(task) == TaskState.COMPLETE


# ---------------------------------------------------------------- larger steps


def _rolling(service: Service) -> bool:
    return service.update_status is not None and service.update_status.state in UPDATING


def _take_larger_steps(stage: _Stage, services: Iterable[Service]) -> None:
    """Lets roll-outs and jobs of many steps do more at a time: see STEPS_TASKS_MAX."""
    stepping = [(s, *_steps(stage, s)) for s in services if s.spec is not None]
    looks = sum(tasks * steps for _, tasks, steps in stepping)
    if looks <= STEPS_TASKS_MAX:
        return
    for service, tasks, steps in stepping:
        allowed = max(_STEPS_MIN, steps * STEPS_TASKS_MAX // looks)
        if steps > allowed:
            _at_least(stage, service, -(-tasks // allowed))


def _steps(view: View, service: Service) -> tuple[int, int]:
    """How many tasks the service has, and in how many steps they are changed or made."""
    if mode_of(service.spec) == Mode.REPLICATED_JOB:
        total, at_once = job_size(service.spec)
    else:
        total = len(view.by(Task, "service", service.id))
        at_once = update_config(service).parallelism or total
    return total, -(-total // max(1, at_once))


def _at_least(stage: _Stage, service: Service, at_once: int) -> None:
    """Puts the service as one that does so many tasks at a time; nothing else of it changes."""
    spec = service.spec
    assert spec is not None
    if mode_of(spec) == Mode.REPLICATED_JOB:
        total, _ = job_size(spec)
        job = ReplicatedJob(total_completions=total, max_concurrent=at_once)
        spec = structs.replace(spec, mode=ServiceMode(replicated_job=job))
    else:
        faster = structs.replace(update_config(service), parallelism=at_once)
        back = service.update_status is not None and service.update_status.state in ROLLBACK
        spec = structs.replace(spec, **{"rollback" if back else "update": faster})
    stage.put(structs.replace(service, spec=spec))


# ---------------------------------------------------------------- the stage


class _Stage(Draft):
    """A draft in which each step counts as committed; it remembers what the last one changed."""

    def __init__(self, base: View, *, now_ns: int) -> None:
        super().__init__(base, now_ns=now_ns)
        self._before: dict[tuple[type[Message], str], Message | None] = {}
        # Tasks stopped for others of a higher priority, by service and message.
        self.victims: Counter[tuple[str, str]] = Counter()

    def put(self, o: T, *, unseen: bool = False) -> T:
        self._note(type(o), cast("Any", o).id)
        return super().put(o, unseen=unseen)

    def delete(self, cls: type[Message], id_: str) -> None:
        self._note(cls, id_)
        super().delete(cls, id_)

    def _note(self, cls: type[Message], id_: str) -> None:
        if (cls, id_) not in self._before:
            self._before[cls, id_] = self.get(cls, id_)

    def step(self) -> list[Change]:
        """What has changed since the last call."""
        out = []
        for (cls, id_), old in self._before.items():
            new = self.get(cls, id_)
            if old is None and new is None:
                continue
            if old is not None and new is not None and _same(old, new):
                self._over[cls].set(id_, old)  # a commit leaves it out as well
                continue
            if _is_victim(old, new):
                assert isinstance(new, Task)
                self.victims[new.service_id, new.stop_message] += 1
            out.append(Change(BY_CLASS[cls].kind, id_, old, new))
        self._before = {}
        return out


def _is_victim(old: object, new: object) -> bool:
    """Whether a task is stopped for others of a higher priority."""
    if not isinstance(old, Task) or not isinstance(new, Task):
        return False
    return new.stop_cause in _FOR_OTHERS and old.stop_cause != new.stop_cause


def _same(old: Any, new: Any) -> bool:
    return bool(structs.replace(old, meta=new.meta) == new)
