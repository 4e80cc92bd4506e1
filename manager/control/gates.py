"""depends_on: holding back a service's first tasks until other services have come far enough.

A gate matters until the service has tasks; what becomes of the other service later does not stop
this one. service_started: each slot of the other has a task that has begun to start;
service_healthy: each runs (a task with a healthcheck runs when it is healthy);
service_completed_successfully: each slot has a task that completed.
"""

from __future__ import annotations

from collections.abc import Callable

from manager.control.template import Mode, job_size, mode_of, replicas_of, state_of
from manager.control.work import is_live, slot_of
from manager.store import View
from swarm.v1 import Dependency, Service, Task, TaskState

STARTED = "service_started"
HEALTHY = "service_healthy"
COMPLETED = "service_completed_successfully"


def closed_gates(view: View, service: Service) -> list[str]:
    """What the service waits for, one sentence each; empty: it may start."""
    if service.spec is None or not service.spec.depends_on:
        return []
    if view.by(Task, "service", service.id):
        return []
    out = []
    for gate in service.spec.depends_on:
        if (sentence := _closed(view, gate)) is not None:
            out.append(sentence)
    return out


def _closed(view: View, gate: Dependency) -> str | None:
    others = [s for s in view.by(Service, "name", gate.service) if not s.pending_delete]
    if not others:
        return f"waits for service {gate.service}, which does not exist" if gate.required else None
    reached: dict[str, tuple[str, Callable[[Task], bool]]] = {
        STARTED: ("has started", lambda t: state_of(t) >= TaskState.STARTING),
        HEALTHY: (
            "runs and is healthy",
            lambda t: state_of(t) in (TaskState.RUNNING, TaskState.COMPLETE),
        ),
        COMPLETED: ("has completed", lambda t: state_of(t) == TaskState.COMPLETE),
    }
    words, far_enough = reached.get(gate.condition, reached[STARTED])
    tasks = [
        t
        for t in view.by(Task, "service", others[0].id)
        if t.desired_state != TaskState.REMOVE
        and t.job_iteration == others[0].job_iteration
        and (is_live(t) or state_of(t) == TaskState.COMPLETE)
    ]
    wanted = _slots_wanted(others[0], tasks)
    done = len({slot_of(t) for t in tasks if far_enough(t)})
    if done >= wanted:
        return None
    return f"waits until service {gate.service} {words} ({done} of {wanted} tasks so far)"


def _slots_wanted(service: Service, tasks: list[Task]) -> int:
    match mode_of(service.spec):
        case Mode.REPLICATED:
            return replicas_of(service.spec)
        case Mode.REPLICATED_JOB:
            return job_size(service.spec)[0]
        case _:
            return max(1, len({slot_of(t) for t in tasks}))
