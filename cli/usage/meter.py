"""Figures from measurements: what the cluster uses just now, and at what rate.

A `Meter` takes the answers of Control.Stats, in which counters only grow, and keeps the last two
measurements of each node. Rates are differences of these, over the time between them on the node's
own clock, so that neither a late message nor a clock that is wrong changes them. Where a counter
went back the task (or the node) began anew: there is no rate then, and never a negative one. A
node that has said nothing for a while has no figures at all, only the sentence why.

What is measured says nothing of nodes that do not answer, of services without tasks, and of what
is reserved: that comes from the objects (`Inventory`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cli.objects import name_of
from cli.tasks import natural
from swarm.v1 import (
    Node,
    NodeState,
    NodeUsage,
    Service,
    ServiceStatus,
    StatsResponse,
    TaskStats,
)

__all__ = [
    "ClusterFigures",
    "Figures",
    "Flow",
    "Inventory",
    "Meter",
    "NodeFigures",
    "ServiceFigures",
    "TaskFigures",
]

SILENT_PERIODS = 3  # a node that missed so many measurements has no figures any more
SILENT_S_MIN = 5.0
PROBLEMS_MAX = 20  # sentences kept
_HOLDING = ("assigned", "accepted", "preparing", "ready", "starting", "running")


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes in and out (of disks: read and written) so far, and per second. None: not known."""

    in_bytes: int | None = None
    out_bytes: int | None = None
    in_rate: float | None = None
    out_rate: float | None = None


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """One running task."""

    id: str
    # "web.1"
    name: str
    service: str
    node_id: str
    node: str
    # 100 is one CPU.
    cpu_percent: float | None
    memory_bytes: int
    # Its own or, without one, all of the node's; 0: not known.
    memory_limit_bytes: int
    network: Flow
    disk: Flow
    pids: int
    # Mean load of the GPUs it holds; None: it holds none, or the driver does not tell.
    gpu_percent: float | None
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """One node; without `measured` there is only its name and why."""

    id: str
    name: str
    measured: bool
    # Ready, Down …; empty: not known.
    state: str
    # 100 is all its CPUs.
    cpu_percent: float | None = None
    cpus: int = 0
    memory_bytes: int = 0
    memory_total_bytes: int = 0
    disk_bytes: int = 0
    disk_total_bytes: int = 0
    gpu_percent: float | None = None
    gpus: int = 0
    gpu_memory_bytes: int = 0
    gpu_memory_total_bytes: int = 0
    tasks: int = 0


@dataclass(frozen=True, slots=True)
class ServiceFigures:
    """The sum of a service's running tasks."""

    name: str
    # None: not known.
    running: int | None
    desired: int | None
    tasks: int
    cpu_percent: float | None
    memory_bytes: int
    network: Flow
    disk: Flow
    pids: int
    gpu_percent: float | None
    gpus: int


@dataclass(frozen=True, slots=True)
class ClusterFigures:
    """The sum of the nodes that are measured."""

    nodes: int
    nodes_measured: int
    tasks: int
    services: int
    # CPUs that are busy, and how many there are.
    cpus_used: float | None
    cpus: int
    # What tasks have set aside; None: not known.
    cpus_reserved: float | None
    memory_bytes: int
    memory_total_bytes: int
    memory_reserved_bytes: int | None
    gpu_percent: float | None
    gpus: int
    # That a task holds.
    gpus_held: int


@dataclass(frozen=True, slots=True)
class Figures:
    """All that is known at one moment."""

    cluster: ClusterFigures
    nodes: tuple[NodeFigures, ...]
    services: tuple[ServiceFigures, ...]
    tasks: tuple[TaskFigures, ...]
    # What could not be measured, a sentence each.
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    """The objects that figures are about: all nodes and services, or those that were named."""

    nodes: Mapping[str, Node] = field(default_factory=dict)
    # All of these nodes are to be measured; else they only have names.
    expected: bool = True
    # By name.
    services: Mapping[str, tuple[Service, ServiceStatus]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        nodes: Iterable[Node],
        services: Iterable[tuple[Service, ServiceStatus]],
        *,
        expected: bool = True,
    ) -> Inventory:
        return cls(
            {node.id: node for node in nodes},
            expected,
            {name_of(service): (service, status) for service, status in services},
        )

    def reserved(self) -> tuple[float, int]:
        """CPUs and bytes that tasks with a place have set aside."""
        cpus, memory = 0.0, 0
        for service, status in self.services.values():
            resources = service.spec.task.resources if service.spec and service.spec.task else None
            asked = resources.reservations if resources else None
            if asked is None:
                continue
            count = sum(status.states.get(state, 0) for state in _HOLDING) + status.stopping
            cpus += count * asked.cpu_nano / 1e9
            memory += count * asked.memory_bytes
        return cpus, memory


@dataclass(slots=True)
class _Heard:
    """The last two measurements of a node, and when the last came (any steady clock)."""

    last: NodeUsage
    at_s: float
    before: NodeUsage | None = None


class Meter:
    """The last measurements. `take` and `know` are all that changes it."""

    def __init__(self, period_s: float) -> None:
        self._silent_s = max(SILENT_PERIODS * period_s, SILENT_S_MIN)
        self._heard: dict[str, _Heard] = {}
        self._inventory: Inventory | None = None
        # By sentence: when it was last said.
        self._problems: dict[str, float] = {}

    def take(self, answer: StatsResponse, now_s: float) -> None:
        """What the manager sent. `now_s`: of a steady clock, the same in all calls."""
        for usage in answer.nodes:
            heard = self._heard.get(usage.node_id)
            if heard is None:
                self._heard[usage.node_id] = _Heard(usage, now_s)
            elif usage.timestamp_ns != heard.last.timestamp_ns:
                heard.before = heard.last
                heard.last, heard.at_s = usage, now_s
        for problem in answer.problems:
            self._problems.pop(problem, None)
            self._problems[problem] = now_s
        while len(self._problems) > PROBLEMS_MAX:
            del self._problems[next(iter(self._problems))]

    def know(self, inventory: Inventory) -> None:
        """The objects as they are now."""
        self._inventory = inventory
        for node_id in set(self._heard) - set(inventory.nodes):
            del self._heard[node_id]

    def complete(self) -> bool:
        """Every node that was heard was measured twice, so that there are rates."""
        return bool(self._heard) and all(h.before is not None for h in self._heard.values())

    def figures(self, now_s: float) -> Figures:
        """What is known now, in order of name."""
        inventory = self._inventory or Inventory()
        fresh = {
            id_: heard for id_, heard in self._heard.items() if now_s - heard.at_s <= self._silent_s
        }
        for problem in [p for p, at in self._problems.items() if now_s - at > self._silent_s * 4]:
            del self._problems[problem]
        tasks = [task for heard in fresh.values() for task in _tasks(heard)]
        tasks.sort(key=lambda task: (natural(task.name), task.id))
        nodes = [_node(heard, inventory.nodes.get(id_)) for id_, heard in fresh.items()]
        awaited = inventory.nodes.keys() if inventory.expected else set()
        for id_ in (awaited | self._heard.keys()) - fresh.keys():
            known, heard = inventory.nodes.get(id_), self._heard.get(id_)
            name = name_of(known) if known else heard.last.node_name or id_ if heard else id_
            nodes.append(NodeFigures(id_, name, measured=False, state=_state(known)))
        nodes.sort(key=lambda node: (natural(node.name), node.id))
        services = _services(tasks, inventory)
        problems = tuple(self._problems)
        return Figures(
            _cluster(nodes, tasks, services, fresh.values(), self._inventory),
            tuple(nodes),
            tuple(services),
            tuple(tasks),
            problems + _unheard(nodes, problems, started=bool(self._heard)),
        )


def _state(node: Node | None) -> str:
    if node is None or node.status is None:
        return ""
    return node.status.state.name.capitalize() if node.status.state else ""


def _unheard(
    nodes: Sequence[NodeFigures], problems: Sequence[str], *, started: bool
) -> tuple[str, ...]:
    """A sentence on nodes without figures that nobody has said anything about."""
    if not started:
        return ()
    silent = [n for n in nodes if not n.measured and not any(n.name in p for p in problems)]
    down = [n.name for n in silent if n.state not in ("", NodeState.READY.name.capitalize())]
    quiet = [n.name for n in silent if n.name not in down]
    out = []
    if down:
        out.append(f"not ready, so not measured: {_some(down)}")
    if quiet:
        out.append(f"no measurement comes from {_some(quiet)}")
    return tuple(out)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _rate(now: int | None, before: int | None, seconds: float) -> float | None:
    """Per second; None where it went back, or one of the two is not known."""
    if now is None or before is None or seconds <= 0 or now < before:
        return None
    return (now - before) / seconds


def _flow(now: TaskStats, before: TaskStats | None, seconds: float, *, network: bool) -> Flow:
    def pair(stats: TaskStats | None) -> tuple[int | None, int | None]:
        if stats is None:
            return None, None
        if network:
            return stats.network_in_bytes, stats.network_out_bytes
        return stats.disk_read_bytes, stats.disk_written_bytes

    (into, out), (into_before, out_before) = pair(now), pair(before)
    return Flow(into, out, _rate(into, into_before, seconds), _rate(out, out_before, seconds))


def _tasks(heard: _Heard) -> list[TaskFigures]:
    usage = heard.last
    before = {task.task_id: task for task in heard.before.tasks} if heard.before else {}
    loads = {gpu.uuid: gpu.percent for gpu in usage.gpus}
    return [
        _task(usage, task, before.get(task.task_id), loads, heard.before) for task in usage.tasks
    ]


def _task(
    usage: NodeUsage,
    task: TaskStats,
    before: TaskStats | None,
    loads: Mapping[str, int | None],
    whole: NodeUsage | None,
) -> TaskFigures:
    seconds = 0.0
    if before is not None and whole is not None:
        began_ns = before.timestamp_ns or whole.timestamp_ns
        seconds = ((task.timestamp_ns or usage.timestamp_ns) - began_ns) / 1e9
    busy = _rate(task.cpu_total_ns, before.cpu_total_ns if before else None, seconds)
    node = usage.node_name or usage.node_id
    service = task.service_name
    return TaskFigures(
        id=task.task_id,
        name=f"{service}.{task.slot or node}" if service else task.task_id,
        service=service,
        node_id=usage.node_id,
        node=node,
        cpu_percent=None if busy is None else busy / 1e7,
        memory_bytes=task.memory_bytes,
        memory_limit_bytes=task.memory_limit_bytes or usage.memory_total_bytes,
        network=_flow(task, before, seconds, network=True),
        disk=_flow(task, before, seconds, network=False),
        pids=task.pids,
        gpu_percent=_mean(loads.get(uuid) for uuid in task.gpus),
        gpus=task.gpus,
    )


def _node(heard: _Heard, known: Node | None) -> NodeFigures:
    usage, before = heard.last, heard.before
    busy = None
    if before is not None:
        seconds = (usage.timestamp_ns - before.timestamp_ns) / 1e9
        busy = _rate(usage.cpu_total_ns, before.cpu_total_ns, seconds)
    return NodeFigures(
        id=usage.node_id,
        name=usage.node_name or (name_of(known) if known else usage.node_id),
        measured=True,
        state=_state(known),
        # Two clocks are read one after the other, so a bit more than all of it may come out.
        cpu_percent=None if busy is None or not usage.cpus else min(busy / 1e7 / usage.cpus, 100.0),
        cpus=usage.cpus,
        memory_bytes=usage.memory_bytes,
        memory_total_bytes=usage.memory_total_bytes,
        disk_bytes=usage.disk_bytes,
        disk_total_bytes=usage.disk_total_bytes,
        gpu_percent=_mean(gpu.percent for gpu in usage.gpus),
        gpus=len(usage.gpus),
        gpu_memory_bytes=sum(gpu.memory_bytes for gpu in usage.gpus),
        gpu_memory_total_bytes=sum(gpu.memory_total_bytes for gpu in usage.gpus),
        tasks=len(usage.tasks),
    )


def _services(tasks: Sequence[TaskFigures], inventory: Inventory) -> list[ServiceFigures]:
    by_name: dict[str, list[TaskFigures]] = {name: [] for name in inventory.services}
    for task in tasks:
        if task.service:
            by_name.setdefault(task.service, []).append(task)
    out = []
    for name, those in sorted(by_name.items(), key=lambda pair: natural(pair[0])):
        known = inventory.services.get(name)
        # Tasks may share a GPU: it counts once.
        loads = {uuid: task.gpu_percent for task in those for uuid in task.gpus}
        out.append(
            ServiceFigures(
                name=name,
                running=known[1].running if known else None,
                desired=known[1].desired if known else None,
                tasks=len(those),
                cpu_percent=_sum(task.cpu_percent for task in those),
                memory_bytes=sum(task.memory_bytes for task in those),
                network=_flows(task.network for task in those),
                disk=_flows(task.disk for task in those),
                pids=sum(task.pids for task in those),
                gpu_percent=_mean(loads.values()),
                gpus=len(loads),
            )
        )
    return out


def _cluster(
    nodes: Sequence[NodeFigures],
    tasks: Sequence[TaskFigures],
    services: Sequence[ServiceFigures],
    heard: Iterable[_Heard],
    inventory: Inventory | None,
) -> ClusterFigures:
    measured = [node for node in nodes if node.measured]
    cpus, memory = inventory.reserved() if inventory else (None, None)
    loads = [gpu.percent for one in heard for gpu in one.last.gpus]
    return ClusterFigures(
        nodes=len(nodes),
        nodes_measured=len(measured),
        tasks=len(tasks),
        services=len(services),
        cpus_used=_sum(n.cpu_percent / 100 * n.cpus for n in measured if n.cpu_percent is not None),
        cpus=sum(node.cpus for node in measured),
        cpus_reserved=cpus,
        memory_bytes=sum(node.memory_bytes for node in measured),
        memory_total_bytes=sum(node.memory_total_bytes for node in measured),
        memory_reserved_bytes=memory,
        gpu_percent=_mean(loads),
        gpus=sum(node.gpus for node in measured),
        gpus_held=len({(task.node_id, uuid) for task in tasks for uuid in task.gpus}),
    )


def _flows(flows: Iterable[Flow]) -> Flow:
    those = list(flows)

    def total(values: Iterable[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    return Flow(
        total(flow.in_bytes for flow in those),
        total(flow.out_bytes for flow in those),
        _sum(flow.in_rate for flow in those),
        _sum(flow.out_rate for flow in those),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None: none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
