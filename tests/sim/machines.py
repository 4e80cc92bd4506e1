"""Safety on the machines: what really runs, container by container."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.control.template import stop_grace_ns
from manager.scheduler.requirement import requirement_of, spec_of_version
from swarm import states
from swarm.v1 import Availability, Node, NodeState, Service, ServiceSpec, StopCause, Task, TaskState
from tests.sim.host import Box, Host
from tests.sim.tasks import name_of, slot_of, state_of

if TYPE_CHECKING:
    from tests.sim.checks import Safety

# A replacement waits for a predecessor that does not stop for a minute and its grace period.
OLD_TASK_S = 60.0
DRAIN_S = 60.0  # a task may have been placed before its node was drained, and begin later

SlotKey = tuple[str, int | str, int]


class Machines:
    def __init__(self, safety: Safety) -> None:
        self._safety = safety
        self._starts: dict[str, str] = {}  # task -> where it was started
        self._slots: dict[SlotKey, dict[str, tuple[Host, Box, float]]] = {}
        self.ended_s: dict[str, float] = {}  # task -> when its container ended
        self.beside: set[str] = set()  # services whose tasks may overlap

    def begun(self, host: Host, box: Box) -> None:
        safety = self._safety
        told = box.work.assignment.task
        assert told is not None
        task = safety.model.get(Task, told.id) or told
        name = name_of(safety.model, task)
        safety.cluster.note(f"{host.name}: {name} runs")
        if task.id in self._starts:
            safety.fail("runs-twice", f"{name} runs on {host.name}, ran on {self._starts[task.id]}")
        self._starts[task.id] = host.name
        agent = next(a for a in safety.cluster.agents if a.engine is host)
        if task.node_id != agent.node_id:
            safety.fail("runs-twice", f"{name} runs on {host.name}, its node is another")
        if not states.wanted(told.desired_state) or told.desired_state < TaskState.RUNNING:
            word = TaskState(told.desired_state).name
            safety.fail("not-wanted", f"{name} starts on {host.name}, told to be {word}")
        self._fits(host, name)
        key = (task.service_id, slot_of(task), task.job_iteration)
        slot = self._slots.setdefault(key, {})
        self._overlap(task, name, slot)
        slot[task.id] = (host, box, safety.now_s)

    def ended(self, host: Host, box: Box) -> None:
        task = box.work.assignment.task
        assert task is not None
        slot = self._slots.get((task.service_id, slot_of(task), task.job_iteration), {})
        slot.pop(task.id, None)
        self.ended_s[task.id] = self._safety.now_s
        safety = self._safety
        if not safety.over:
            safety.cluster.note(
                f"{host.name}: {name_of(safety.model, task)} ended {box.exit_code} {box.message}"
            )

    def _fits(self, host: Host, name: str) -> None:
        cpu = memory = 0
        ports: set[tuple[int, str]] = set()
        for box in host.running():
            need = requirement_of(_of(self._safety, box))
            cpu += need.cpu
            memory += need.memory
            for port in need.host_ports:
                if port[:2] in ports:
                    self._safety.fail("host-capacity", f"port {port} is used twice on {host.name}")
                ports.add(port[:2])
        if cpu > host.resources.cpu_nano or memory > host.resources.memory_bytes:
            self._safety.fail(
                "host-capacity",
                f"{name} begins on {host.name}, where {cpu / 1e9:g} CPUs and {memory >> 20} MiB "
                "are used then",
            )

    def _overlap(self, task: Task, name: str, slot: dict[str, tuple[Host, Box, float]]) -> None:
        if not states.wanted(task.desired_state):
            return  # it was begun in the very moment in which it was given up
        beside = []
        for other_id, (host, box, since_s) in slot.items():
            told = box.work.assignment.task
            other = self._safety.model.get(Task, other_id)
            if told is not None and other is not None and self._counts(task, other, since_s):
                beside.append((host, other))
        allowed = 1 if task.service_id in self.beside else 0
        if len(beside) > allowed:
            host, other = beside[0]
            self._safety.fail(
                "slot-overlap",
                f"{name} begins while {name_of(self._safety.model, other)} runs on {host.name}",
            )

    def _counts(self, task: Task, other: Task, since_s: float) -> bool:
        """Whether one that runs should have stopped before the other task of its slot begins."""
        safety = self._safety
        if other.desired_state == TaskState.REMOVE or state_of(other) == TaskState.ORPHANED:
            return False  # given up; a slot that comes later knows nothing of it
        node = safety.model.get(Node, other.node_id)
        if node is None or node.status is None or node.status.state != NodeState.READY:
            return False
        if safety.down_s.get(other.node_id, -1.0) >= since_s:
            return False  # it was taken for lost
        moves = node.spec is not None and node.spec.availability == Availability.DRAIN
        if safety.drained_s.get(other.node_id, -1.0) >= since_s - DRAIN_S:
            moves = True
        if moves or other.stop_cause == StopCause.MOVED:
            return False
        spec = spec_of_version(safety.model, task.service_id, task.spec_version)
        made_ns = task.meta.created_at_ns if task.meta else 0
        waited_s = (safety.cluster.clock.now_ns() - made_ns) / 1e9
        return waited_s < OLD_TASK_S + stop_grace_ns(spec) / 1e9 - 1.0

    def note_service(self, service: Service) -> None:
        """Remembers whether its tasks may ever run beside each other."""
        spec = service.spec
        if spec is None:
            return
        for config in (spec.update, spec.rollback):
            if config is not None and config.order == "start-first":
                self.beside.add(service.id)


def _of(safety: Safety, box: Box) -> ServiceSpec | None:
    task = box.work.assignment.task
    assert task is not None
    return spec_of_version(safety.model, task.service_id, task.spec_version)
