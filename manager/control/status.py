"""How far a service has come, worked out from its objects alone: what `stack deploy` waits for,
what `service ls` shows, and what the API gives to clients that watch a roll-out.
"""

from __future__ import annotations

from collections import Counter

from manager.control.gates import closed_gates
from manager.control.slots import Slot, is_live, is_lost, slot_of, slot_order
from manager.control.template import (
    PAUSED,
    UPDATING,
    Mode,
    Templates,
    job_size,
    mode_of,
    replicas_of,
    restart_policy,
    state_of,
)
from manager.scheduler import requirement_of, unavailable, unsuitable
from manager.store import View
from swarm import states
from swarm.v1 import Node, Service, ServiceStatus, Task, TaskState, UpdateState

REASONS_MAX = 5
_ENDED_BY_ITSELF = (TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED)


def up_to_date(view: View, service: Service, task: Task) -> bool:
    """Whether the task is what the service's present spec would make."""
    return Templates(view, service).up_to_date(task)


def service_status(view: View, service: Service) -> ServiceStatus:
    """The account of one service. O(tasks of the service), for global ones O(nodes) besides.

    Converged: every slot has one task of the present template that runs (for jobs: has completed;
    a task that ended well and is not to be restarted counts as well), nothing that should be gone
    still runs, and no roll-out is under way, paused, or rolled back by a failure.
    """
    account = _Account(view, service)
    reasons = Counter(account.reasons)
    first = {text: i for i, text in reversed(list(enumerate(account.reasons)))}
    ordered = sorted(reasons, key=lambda text: (-account.weight.get(text, 1), first[text]))
    return ServiceStatus(
        service_id=service.id,
        name=service.spec.name if service.spec else "",
        desired=account.desired,
        running=account.running,
        completed=account.completed,
        up_to_date=account.current,
        converged=not account.reasons,
        reasons=tuple(ordered[:REASONS_MAX]),
        update_status=service.update_status,
        states=dict(account.states),
        stopping=account.stopping,
        removed=False,
    )


class _Account:
    """The sums, and what is in the way."""

    def __init__(self, view: View, service: Service) -> None:
        self.reasons: list[str] = []
        self.weight: dict[str, int] = {}
        self.states: Counter[str] = Counter()
        self.running = self.completed = self.current = self.stopping = 0
        self._view = view
        self._service = service
        self._mode = mode_of(service.spec)
        self._templates = Templates(view, service)
        slots: dict[Slot, list[Task]] = {}
        for task in view.by(Task, "service", service.id):
            if not (self._mode.job and task.job_iteration != service.job_iteration):
                slots.setdefault(slot_of(task), []).append(task)
            self._count_stopping(task)
        self.desired = 0 if service.pending_delete else self._desired(slots)
        if service.pending_delete:
            self._because("the service is being removed", 1)
            return
        for sentence in closed_gates(view, service):
            self._because(sentence, self.desired)
        self._slots(slots)
        self._roll_out()
        if self.stopping:
            plural = "task is" if self.stopping == 1 else "tasks are"
            self._because(f"{self.stopping} {plural} still stopping", self.stopping)

    def _because(self, text: str, weight: int) -> None:
        if text not in self.weight:
            self.reasons.append(text)
        self.weight[text] = weight

    def _count_stopping(self, task: Task) -> None:
        """Tasks on nodes that are down cannot stop now, so nobody waits for them. Of a service that
        is being removed no task is wanted, even before the control loop has told each so.
        """
        wanted = states.wanted(task.desired_state) and not self._service.pending_delete
        if wanted or states.ended(state_of(task)):
            return
        node = self._view.get(Node, task.node_id) if task.node_id else None
        if node is not None and not is_lost(node):
            self.stopping += 1

    def _desired(self, slots: dict[Slot, list[Task]]) -> int:
        spec = self._service.spec
        match self._mode:
            case Mode.REPLICATED:
                return replicas_of(spec)
            case Mode.REPLICATED_JOB:
                return job_size(spec)[0]
            case _:
                need = requirement_of(spec)
                nodes = {
                    n.id
                    for n in self._view.all(Node)
                    if unavailable(n) is None and unsuitable(n, need) is None
                }
                # A paused node keeps the task it has.
                kept = {str(s) for s, tasks in slots.items() if any(is_live(t) for t in tasks)}
                return len(nodes | kept)

    def _slots(self, slots: dict[Slot, list[Task]]) -> None:
        """Goes through the slots; each is running, done, or has its reason."""
        done = 0
        out_of_date = 0
        overlap = 0
        why: Counter[str] = Counter()
        for slot in sorted(slots, key=slot_order):
            kept = [t for t in slots[slot] if t.desired_state != TaskState.REMOVE]
            live = [t for t in kept if is_live(t)]
            self.running += any(state_of(t) == TaskState.RUNNING for t in live)
            fit = [t for t in live if self._templates.up_to_date(t)]
            for task in live:
                self.states[states.label(state_of(task))] += 1
            if any(state_of(t) == TaskState.RUNNING for t in fit):
                self.current += 1
                overlap += len(live) - 1
                if not self._mode.job:
                    done += 1
            elif fit:
                why[_waiting_for(fit[-1], kept)] += 1
            elif live:
                out_of_date += 1
            elif (ended := _newest(kept)) is not None:
                if state_of(ended) == TaskState.COMPLETE:
                    self.states["complete"] += 1
                    self.completed += 1
                    done += self._finished(ended)
                elif self._mode.per_node and not self._open(slot):
                    continue
                else:
                    why[_ended(ended)] += 1
        self._explain(why, done=done, out_of_date=out_of_date, overlap=overlap)

    def _open(self, slot: Slot) -> bool:
        node = self._view.get(Node, str(slot))
        if node is None or unavailable(node) is not None:
            return False
        return unsuitable(node, requirement_of(self._service.spec)) is None

    def _finished(self, ended: Task) -> bool:
        """Whether a completed task is all that its slot is meant to do."""
        condition = restart_policy(self._service.spec).condition
        kept_down = self._mode.job or condition in ("none", "on-failure")
        return kept_down and self._templates.up_to_date(ended)

    def _explain(self, why: Counter[str], *, done: int, out_of_date: int, overlap: int) -> None:
        desired = self.desired
        unit = "tasks" if self._mode.per_node or self._mode.job else "replicas"
        for text, count in sorted(why.items()):
            self._because(f"{count} of {desired} {unit} {text}", count)
        if out_of_date:
            self._because(
                f"{out_of_date} of {desired} {unit} not yet on the current version", out_of_date
            )
        if overlap:
            self._because(f"{overlap} old {unit} still run beside new ones", overlap)
        explained = done + sum(why.values()) + out_of_date
        job_running = self.running if self._mode.job else 0
        if job_running:
            self._because(f"{job_running} of {desired} {unit} running", job_running)
            explained += job_running
        if explained < desired and not self.reasons:
            missing = desired - explained
            self._because(f"{missing} of {desired} {unit} not created yet", missing)
        if explained > desired:
            self._because(f"{explained - desired} more {unit} than wanted", explained - desired)

    def _roll_out(self) -> None:
        status = self._service.update_status
        if status is None:
            return
        back_by_failure = (
            status.state == UpdateState.ROLLBACK_COMPLETED
            and not self._service.previous_spec_version
        )
        if status.state in UPDATING or status.state in PAUSED:
            # What people must hear of first.
            self._because(status.message, self.desired + 1 if status.state in PAUSED else 0)
        elif back_by_failure:
            self._because(
                "the update failed and was rolled back to the previous version", self.desired + 1
            )


def _newest(tasks: list[Task]) -> Task | None:
    return max(tasks, key=lambda t: (t.meta.created_at_ns if t.meta else 0, t.id), default=None)


def _waiting_for(task: Task, siblings: list[Task]) -> str:
    """What a task that should run and does not is doing, as the end of a sentence."""
    state = state_of(task)
    if state < TaskState.ASSIGNED:
        err = task.status.err if task.status else ""
        return f"not placed: {err}" if err else "not placed"
    failed = _last_failure(siblings)
    if task.desired_state == TaskState.READY and failed:
        return f"waiting to be restarted after: {failed}"
    if task.desired_state == TaskState.READY:
        return "waiting for their predecessors to stop"
    return f"{states.label(state)}{f', last failure: {failed}' if failed else ''}"


def _last_failure(tasks: list[Task]) -> str:
    ended = [t for t in tasks if state_of(t) in (TaskState.FAILED, TaskState.REJECTED)]
    newest = _newest(ended)
    return _words(newest) if newest is not None else ""


def _words(task: Task) -> str:
    status = task.status
    return (status and (status.err or status.message)) or states.label(state_of(task))


def _ended(task: Task) -> str:
    if state_of(task) in _ENDED_BY_ITSELF and not states.wanted(task.desired_state):
        return f"ended and not to be restarted: {_words(task)}"
    return f"ended: {_words(task)}"
