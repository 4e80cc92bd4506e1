"""Safety of nodes' capacities, by the log's word: sums over the tasks that hold a place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manager.scheduler.requirement import Requirement, requirement_of, spec_of_version
from swarm import states
from swarm.v1 import Node, Task, TaskState
from tests.sim.tasks import name_of, state_of

if TYPE_CHECKING:
    from tests.sim.checks import Safety

NOTHING = Requirement()


@dataclass(slots=True)
class _Node:
    cpu: int = 0
    memory: int = 0
    gpus: dict[str, str] = field(default_factory=dict)  # uuid -> task
    ports: dict[tuple[int, str], str] = field(default_factory=dict)
    tasks: dict[str, Requirement] = field(default_factory=dict)


class Claims:
    def __init__(self, safety: Safety) -> None:
        self._safety = safety
        self._nodes: dict[str, _Node] = {}
        self._touched: dict[str, None] = {}
        self._needs: dict[tuple[str, int], Requirement] = {}

    def need(self, task: Task) -> Requirement:
        key = (task.service_id, task.spec_version)
        need = self._needs.get(key)
        if need is None:
            spec = spec_of_version(self._safety.model, *key)
            need = requirement_of(spec) if spec is not None else NOTHING
            if spec is not None:
                self._needs[key] = need
        return need

    def task(self, old: Task | None, new: Task | None) -> None:
        if old is not None and holds(old) and (new is None or not holds(new)):
            self._release(old)
        if new is not None and holds(new) and (old is None or not holds(old)):
            self._take(new)

    def node(self, node: Node | None) -> None:
        return None

    def _take(self, task: Task) -> None:
        node = self._nodes.setdefault(task.node_id, _Node())
        need = node.tasks[task.id] = self.need(task)
        node.cpu += need.cpu
        node.memory += need.memory
        name = name_of(self._safety.model, task)
        for uuid in task.assigned_gpus:
            if uuid in node.gpus:
                self._safety.fail("capacity", f"{uuid} has {node.gpus[uuid]} and {name}")
            node.gpus[uuid] = name
        for port in need.host_ports:
            if port[:2] in node.ports:
                self._safety.fail("capacity", f"port {port} has {node.ports[port[:2]]} and {name}")
            node.ports[port[:2]] = name
        self._touched[task.node_id] = None

    def _release(self, task: Task) -> None:
        node = self._nodes[task.node_id]
        need = node.tasks.pop(task.id)
        node.cpu -= need.cpu
        node.memory -= need.memory
        for uuid in task.assigned_gpus:
            node.gpus.pop(uuid, None)
        for port in need.host_ports:
            node.ports.pop(port[:2], None)

    def check_touched(self) -> None:
        touched, self._touched = self._touched, {}
        for node_id in touched:
            o = self._safety.model.get(Node, node_id)
            has = o.description.resources if o is not None and o.description else None
            if has is None:
                continue
            node = self._nodes[node_id]
            if node.cpu > has.cpu_nano or node.memory > has.memory_bytes:
                self._safety.fail(
                    "capacity",
                    f"{node_id[:6]} has {has.cpu_nano / 1e9:g} CPUs and "
                    f"{has.memory_bytes >> 20} MiB, claimed are {node.cpu / 1e9:g} and "
                    f"{node.memory >> 20}",
                )


def holds(task: Task) -> bool:
    """Whether it holds a place."""
    state = state_of(task)
    return bool(task.node_id) and state >= TaskState.ASSIGNED and not states.ended(state)
