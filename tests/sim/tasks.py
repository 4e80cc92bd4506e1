"""Safety of single tasks and slots, commit by commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.control.template import restart_policy
from manager.scheduler.requirement import spec_of_version
from manager.store import View
from swarm import states
from swarm.v1 import Node, Service, ServiceSpec, StopCause, Task, TaskState
from tests.sim.log import Commit
from tests.sim.loop import EPOCH_NS

if TYPE_CHECKING:
    from tests.sim.checks import Safety

S = TaskState
_BY_ITSELF = (S.FAILED, S.REJECTED, S.COMPLETE)
SLOW_S = 6.0  # what may lie between a draft and its commit
LOST_S = 20.0
SKEW_NS = 50_000_000


class TaskRules:
    def __init__(self, safety: Safety) -> None:
        self._safety = safety
        self._forgotten: set[str] = set()
        # (service, slot, version, iteration) -> when and where it has ended by itself.
        self._ends: dict[tuple[str, int | str, int, int], list[tuple[float, str]]] = {}
        self._promoted: dict[str, None] = {}  # services with tasks told to run in this commit

    def judge(self, old: Task | None, new: Task | None, *, led: bool) -> None:
        safety = self._safety
        task = new or old
        assert task is not None
        if new is None:
            assert old is not None
            self._gone(old, led=led)
            return
        if new.id in self._forgotten:
            safety.fail("resurrected", f"{self._name(new)} was forgotten, and is back")
        if old is None:
            if not led:
                safety.fail("leader-only", f"{self._name(new)} is made by one who does not lead")
            if new.node_id and state_of(new) >= S.ASSIGNED:
                self._placed(new)
            return
        before, after = state_of(old), state_of(new)
        if not states.may_follow(before, after):
            safety.fail("legal-states", f"{self._name(new)}: {before.name} to {after.name}")
        if new.desired_state < old.desired_state:
            was, now = TaskState(old.desired_state), TaskState(new.desired_state)
            safety.fail("desired-grows", f"{self._name(new)}: {was.name} to {now.name}")
        if not led and (old.desired_state, old.node_id) != (new.desired_state, new.node_id):
            safety.fail("leader-only", f"{self._name(new)} is changed by one who does not lead")
        if before < S.ASSIGNED <= after:
            self._placed(new)
        elif before >= S.ASSIGNED and old.node_id != new.node_id:
            safety.fail("node-fixed", f"{self._name(new)} moves to node {new.node_id[:6]}")
        if old.desired_state == S.READY and new.desired_state in (S.RUNNING, S.COMPLETE):
            self._starts(new)
        if before != after and after in _BY_ITSELF:
            self._ended(old, new)

    def _gone(self, old: Task, *, led: bool) -> None:
        safety = self._safety
        self._forgotten.add(old.id)
        node = safety.model.get(Node, old.node_id) if old.node_id else None
        if old.desired_state == S.REMOVE or state_of(old) < S.ASSIGNED:
            return
        if node is not None or not led:
            safety.fail("forgotten", f"{self._name(old)} is forgotten with its node still there")

    def _placed(self, task: Task) -> None:
        safety = self._safety
        node = safety.model.get(Node, task.node_id)
        from tests.sim.checks import is_open

        if node is not None and is_open(node):
            return
        since_s = safety.closed_s.get(task.node_id)
        if node is None and since_s is None:
            safety.fail("place-open", f"{self._name(task)} is placed on a node that never was")
        elif since_s is not None and safety.now_s - since_s > SLOW_S:
            safety.fail(
                "place-open",
                f"{self._name(task)} is placed on {task.node_id[:6]}, which takes no tasks since "
                f"{since_s:.3f} s",
            )

    def _starts(self, task: Task) -> None:
        now_ns = EPOCH_NS + round(self._safety.now_s * 1e9)
        if task.start_after_ns > now_ns + SKEW_NS:
            late_s = (task.start_after_ns - now_ns) / 1e9
            self._safety.fail("restart-delay", f"{self._name(task)} starts {late_s:.1f} s early")
        self._promoted[task.service_id] = None

    def _ended(self, old: Task, task: Task) -> None:
        """Counts the attempts of a slot."""
        safety = self._safety
        if not states.wanted(old.desired_state) or task.stop_cause != StopCause.UNSPECIFIED:
            return
        if task.status is not None and task.status.cause:
            return
        spec = spec_of_version(safety.model, task.service_id, task.spec_version)
        policy = restart_policy(spec)
        limit = policy.max_attempts or 0
        if not limit or policy.window_ns or (spec and spec.job and spec.job.gang):
            return
        if state_of(task) == S.COMPLETE and policy.condition not in ("", "any"):
            return
        key = (task.service_id, slot_of(task), task.spec_version, task.job_iteration)
        ends = self._ends.setdefault(key, [])
        ends.append((safety.now_s, task.node_id))
        count = sum(not self._lost_then(at_s, node_id) for at_s, node_id in ends)
        if count > limit + 1:
            safety.fail(
                "max-attempts",
                f"{self._name(task)} has ended by itself {count} times, allowed are {limit} "
                "restarts",
            )

    def _lost_then(self, at_s: float, node_id: str) -> bool:
        """Whether the node was lost before the task could be replaced: that counts as no attempt."""
        down_s = self._safety.down_s.get(node_id)
        return down_s is not None and at_s - LOST_S < down_s < at_s + LOST_S

    def service(self, old: Service | None, new: Service | None) -> None:
        service = new or old
        assert service is not None
        safety = self._safety
        if new is None:
            self._forgotten.add(service.id)
            if old is not None and not old.pending_delete:
                safety.fail("acked-call", f"service {service.id} is gone, and nobody removed it")
            return
        if new.id in self._forgotten:
            safety.fail("resurrected", f"service {service.id} was removed, and is back")
        if old is None:
            return
        if new.spec_version < old.spec_version or (old.pending_delete and not new.pending_delete):
            safety.fail("acked-call", f"service {service.id} goes back to an earlier state")

    def after(self, commit: Commit) -> None:
        """What concerns several tasks of a commit."""
        promoted, self._promoted = self._promoted, {}
        model = self._safety.model
        for service_id in promoted:
            service = model.get(Service, service_id)
            if service is None or service.spec is None or not _gang(service.spec):
                continue
            mode = service.spec.mode
            job = mode.replicated_job if mode is not None else None
            total = (job.total_completions if job else None) or 1
            tasks = [
                t
                for t in model.by(Task, "service", service_id)
                if t.job_iteration == service.job_iteration
                and (
                    state_of(t) == S.COMPLETE
                    or (t.desired_state == S.COMPLETE and not states.ended(state_of(t)))
                )
            ]
            early = [t for t in tasks if state_of(t) < S.READY]
            if early:
                self._safety.fail(
                    "gang-whole", f"{self._name(early[0])} is told to run and is not ready"
                )
            if len({slot_of(t) for t in tasks}) != total:
                self._safety.fail(
                    "gang-whole",
                    f"{len(tasks)} of {total} tasks of {service.spec.name} are told to run",
                )

    def slot_given_up(self, service_id: str, slot: int | str) -> None:
        for key in [k for k in self._ends if k[:2] == (service_id, slot)]:
            del self._ends[key]

    def _name(self, task: Task) -> str:
        return name_of(self._safety.model, task)


def _gang(spec: ServiceSpec) -> bool:
    return spec.job is not None and spec.job.gang


def slot_of(task: Task) -> int | str:
    return task.slot or task.node_id


def state_of(task: Task) -> TaskState:
    return task.status.state if task.status is not None else S.NEW


def name_of(view: View, task: Task) -> str:
    """As people would call it, and enough of its id to tell it from its siblings."""
    service = view.get(Service, task.service_id)
    name = service.spec.name if service is not None and service.spec else task.service_id[:5]
    slot = str(task.slot or task.node_id[:4])
    return f"{name}.{slot}.{task.id[:4]}"
