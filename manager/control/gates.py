"""depends_on: holding tasks back until other services have come far enough.

Each entry of a spec's `depends_on` is a gate on another service: service_started, service_healthy
(a task with a healthcheck runs when it is healthy) or service_completed_successfully. It is looked
at in two ways:

- strict, before the first tasks of a service's present template (for jobs: of the present
  iteration) are made, be it a new service or a roll-out: each slot that the other service should
  have must have a task of its present template (iteration) that has come so far. So of two services
  changed by one deploy, the one that depends begins when the other is through.
- loose, for all later tasks (lost with their node, crashed, scaled up, the rest of a roll-out): one
  task of the other service is enough, whatever its version. Asking for all of them would let one
  replica that finds no place keep every crashed task of the services behind it down.

What follows from that:
- A closed gate keeps tasks from being placed and from being started; it stops nothing. Held tasks
  claim nothing, so they cannot take the room that the service they wait for needs.
- A completion is a fact that nothing undoes, though a job's next iteration forgets the tasks of the
  last one. So a service that has had a task placed does not ask for it again.
- A rollback asks loosely: it goes back to what ran, and must not wait for what fails beside it.
- A service that is to have no tasks (scaled to 0) holds nothing back, as in Compose; one that finds
  no node does. A task on a node that is down counts as gone.
- `required: false` means that the other service need not exist; one that exists is waited for, as
  in Compose.
- A task is held by the gates of the version it is made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from manager.control.slots import Slot, is_live, is_lost, is_unplaced, slot_of
from manager.control.template import (
    Mode,
    Templates,
    job_size,
    mode_of,
    replicas_of,
    restart_policy,
    spec_of_version,
    state_of,
)
from manager.scheduler import barred, requirement_of
from manager.store import View
from swarm.v1 import Dependency, Node, Service, Task, TaskState, UpdateState

STARTED = "service_started"
HEALTHY = "service_healthy"
COMPLETED = "service_completed_successfully"
_WORDS = {
    STARTED: "has started",
    HEALTHY: "runs and is healthy",
    COMPLETED: "has completed",
}
_LET_GO = frozenset({UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_PAUSED})


@dataclass(frozen=True, slots=True)
class Closed:
    """One gate that holds tasks back."""

    gate: Dependency
    # The other service's id; empty: it does not exist.
    service_id: str
    # Follows "waits": "until service db has started". Changes only with the gate, never with how
    # far the other service is, because it is written into objects.
    what: str
    # How far it is: " (1 of 3 tasks so far)"; empty where there is nothing to count.
    progress: str = ""


class Gates:
    """What holds one service's tasks back; remembers its answers. For one service object, and for
    as long as the view stays as it is.
    """

    def __init__(self, view: View, service: Service) -> None:
        self._view = view
        self._service = service
        self._strict: tuple[Closed, ...] | None = None
        self._loose: dict[int, tuple[Closed, ...]] = {}

    def strict(self) -> tuple[Closed, ...]:
        """What the first tasks of the present template wait for."""
        if self._strict is None:
            spec = self._service.spec
            found = (_strictly(self._view, g) for g in (spec.depends_on if spec else ()))
            self._strict = tuple(c for c in found if c is not None)
        return self._strict

    def loose(self, version: int) -> tuple[Closed, ...]:
        """What a later task of the version waits for."""
        known = self._loose.get(version)
        if known is None:
            spec = spec_of_version(self._view, self._service, version) or self._service.spec
            found = (self._loosely(g) for g in (spec.depends_on if spec else ()))
            known = self._loose[version] = tuple(c for c in found if c is not None)
        return known

    def now(self, tasks: Iterable[Task]) -> tuple[Closed, ...]:
        """What the next new tasks of the present template wait for."""
        service = self._service
        if service.spec is None or not service.spec.depends_on:
            return ()
        if begun(service, tasks):
            return self.loose(service.spec_version)
        return self.strict()

    def _loosely(self, gate: Dependency) -> Closed | None:
        if gate.condition == COMPLETED:
            own = self._view.by(Task, "service", self._service.id)
            if any(state_of(t) >= TaskState.ASSIGNED for t in own):
                return None
        other = _other(self._view, gate)
        if other is None:
            return _missing(gate)
        if not _wanted(other):
            return None
        tasks = self._view.by(Task, "service", other.id)
        if any(_there(self._view, other, t, gate.condition) for t in tasks):
            return None
        return Closed(
            gate, other.id, f"until a task of service {gate.service} {_words(gate.condition)}"
        )


def begun(service: Service, tasks: Iterable[Task]) -> bool:
    """Whether tasks of the service's present template have been made since it is wanted. Told by
    versions, not by times: clocks of managers differ, and a template may be an older one again.
    """
    status = service.update_status
    if status is not None and status.state in _LET_GO:
        return True
    job = mode_of(service.spec).job
    return any(
        t.desired_state != TaskState.REMOVE
        and (
            t.job_iteration == service.job_iteration
            if job
            else t.spec_version >= service.task_version
        )
        for t in tasks
    )


def sentence(closed: Iterable[Closed], *, progress: bool = False) -> str:
    """All of it as the end of a sentence: "waits until … and until …"."""
    return f"waits {words(closed, progress=progress)}"


def words(closed: Iterable[Closed], *, progress: bool = False) -> str:
    """As `sentence`, without its verb."""
    return " and ".join(c.what + (c.progress if progress else "") for c in closed)


def closed_gates(view: View, service: Service) -> list[str]:
    """What the service waits for, one sentence each; empty: no gate holds anything back now."""
    return [sentence((c,), progress=True) for c in holding(view, service, Gates(view, service))]


def holding(
    view: View, service: Service, gates: Gates, tasks: Sequence[Task] | None = None
) -> tuple[Closed, ...]:
    """The closed gates that keep the service from something it would do now. One that has all that
    it should have waits for nothing, whatever became of the others. `tasks`: its tasks, or of those
    that are alike one each.
    """
    if tasks is None:
        tasks = view.by(Task, "service", service.id)
    if service.spec is None or service.pending_delete:
        return ()
    for task in tasks:
        waits = is_unplaced(task) or task.desired_state == TaskState.READY
        if waits and is_live(task) and (closed := gates.loose(task.spec_version)):
            return closed
    closed = gates.now(tasks)
    if not closed:
        return ()
    done, wanted = _slots(view, service, _provided)
    return closed if done < wanted else ()


def _provided(task: Task) -> bool:
    """Whether the task's slot needs no new one now."""
    return is_live(task) or state_of(task) in (
        TaskState.COMPLETE,
        TaskState.FAILED,
        TaskState.REJECTED,
    )


# ------------------------------------------------------------------ one gate


def _other(view: View, gate: Dependency) -> Service | None:
    named = view.by(Service, "name", gate.service)
    return next((s for s in named if not s.pending_delete), None)


def _missing(gate: Dependency) -> Closed | None:
    if not gate.required:
        return None
    return Closed(gate, "", f"for service {gate.service}, which does not exist")


def _words(condition: str) -> str:
    return _WORDS.get(condition, _WORDS[STARTED])


def _wanted(other: Service) -> int:
    """How many tasks the other service is to have; of services with one a node: at least one."""
    match mode_of(other.spec):
        case Mode.REPLICATED:
            return replicas_of(other.spec)
        case Mode.REPLICATED_JOB:
            return job_size(other.spec)[0]
        case _:
            return 1


def _strictly(view: View, gate: Dependency) -> Closed | None:
    other = _other(view, gate)
    if other is None:
        return _missing(gate)
    if not _wanted(other):
        return None
    done, wanted = _progress(view, other, gate.condition)
    if done >= wanted:
        return None
    tasks = "task" if wanted == 1 else "tasks"
    return Closed(
        gate,
        other.id,
        f"until service {gate.service} {_words(gate.condition)}",
        f" ({done} of {wanted} {tasks} so far)",
    )


def _progress(view: View, other: Service, condition: str) -> tuple[int, int]:
    """Of the slots that the other service should have: how many have come so far, and all."""
    done, wanted = _slots(view, other, lambda t: _there(view, other, t, condition))
    if mode_of(other.spec) == Mode.REPLICATED_JOB and condition != COMPLETED:
        # A job that runs its tasks in turns has started when those of the first turn have.
        wanted = min(job_size(other.spec))
    return done, wanted


def _slots(view: View, service: Service, counts: Callable[[Task], bool]) -> tuple[int, int]:
    """How many of the slots that the service should have hold a task of its present template (for
    jobs: iteration) that counts, and how many it should have.
    """
    mode = mode_of(service.spec)
    templates = Templates(view, service)
    reached: set[Slot] = set()
    for task in view.by(Task, "service", service.id):
        if task.desired_state == TaskState.REMOVE:
            continue
        if mode.job and task.job_iteration != service.job_iteration:
            continue
        if counts(task) and templates.up_to_date(task):
            reached.add(slot_of(task))
    if mode.per_node:
        need = requirement_of(service.spec)
        nodes = {n.id for n in view.all(Node) if barred(n, need) is None}
        return len(reached & nodes), max(1, len(nodes))
    return len(reached), _wanted(service)


def _there(view: View, other: Service, task: Task, condition: str) -> bool:
    """Whether the task has come as far as the condition says."""
    state = state_of(task)
    if condition == COMPLETED:
        return state == TaskState.COMPLETE
    if state == TaskState.COMPLETE:
        return task.desired_state != TaskState.REMOVE and stays_ended(other)
    least = TaskState.RUNNING if condition == HEALTHY else TaskState.STARTING
    if state < least or not is_live(task):
        return False
    node = view.get(Node, task.node_id)
    return node is not None and not is_lost(node)


def stays_ended(other: Service) -> bool:
    """Whether a task that completed has done what it is for."""
    restart = restart_policy(other.spec).condition
    return mode_of(other.spec).job or restart in ("none", "on-failure")
