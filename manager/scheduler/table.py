"""The scheduler's account of the cluster: what each node has, what is claimed, by whom.

`NodeTable` is kept up to date change by change (`apply`), or made afresh (`build`); both lead to
the same table, and applying a change twice is the same as once. It is the control loop's property:
`place` adds claims to it before they are committed, and the loop takes them back (`sync_task`)
when the commit does not come about.

What counts:
- A task holds its resources, its GPUs and its host ports from the moment it is placed until it has
  ended, whatever its desired state: a task that was told to stop still uses them.
- For spreading and max_replicas only tasks count that should go on running (SwarmKit's
  ActiveTasksCountByService).
- Recent failures per service version and node: FAILED or REJECTED, the last 5 minutes (SwarmKit's
  nodeinfo.go: monitorFailures 5 min, maxFailures 5).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from manager.scheduler.requirement import (
    NOTHING,
    HostPort,
    Requirement,
    requirement_of,
)
from manager.store import Change, View
from swarm import errors, states
from swarm.clock import SECOND_NS
from swarm.v1 import GenericResource, Kind, Node, Service, ServiceRevision, Task, TaskState

FAILURE_WINDOW_NS = 300 * SECOND_NS
FAILURES_MAX = 5  # from so many on in the window a node comes last
_FAILED = frozenset({TaskState.FAILED, TaskState.REJECTED})
# With more than one node in so many moved, sorting anew is cheaper than moving them.
_MOVES_SHARE = 8

Version = tuple[str, int]
"""Service id and spec_version."""

Load = tuple[int, float, str]
"""Of a node: tasks that should run, the larger share claimed of CPU and memory, the node's id. The
less loaded comes first; no two are equal."""


class NodeInfo:
    """One node: the object, and sums over the claims on it. Only NodeTable changes it."""

    __slots__ = (
        "active",
        "by_service",
        "cpu_total",
        "cpu_used",
        "failures",
        "generic_total",
        "generic_used",
        "gpus",
        "gpus_used",
        "id",
        "memory_total",
        "memory_used",
        "named_total",
        "named_used",
        "node",
        "ports",
    )

    def __init__(self, node: Node) -> None:
        self.id = node.id
        self.active = 0  # tasks that should run
        self.by_service: dict[str, int] = {}  # of these, by service id
        self.cpu_used = 0
        self.memory_used = 0
        self.generic_used: dict[str, int] = {}
        self.named_used: dict[tuple[str, str], int] = {}  # kind and name -> claims
        self.gpus_used: dict[str, int] = {}  # uuid -> claims
        self.ports: dict[HostPort, int] = {}
        self.failures: dict[Version, list[int]] = {}  # times, oldest first
        self.set_node(node)

    @property
    def name(self) -> str:
        """What people call it."""
        node = self.node
        named = node.spec.name if node.spec else ""
        return named or (node.description.hostname if node.description else "") or node.id

    def set_node(self, node: Node) -> None:
        """Takes a new version of the object; claims stay as they are."""
        self.node = node
        description = node.description
        resources = description.resources if description else None
        self.cpu_total = resources.cpu_nano if resources else 0
        self.memory_total = resources.memory_bytes if resources else 0
        self.generic_total: dict[str, int] = {}
        self.named_total: dict[str, tuple[str, ...]] = {}
        for g in resources.generic if resources else ():
            if g.name:
                self.named_total[g.kind] = (*self.named_total.get(g.kind, ()), g.name)
            else:
                self.generic_total[g.kind] = self.generic_total.get(g.kind, 0) + (g.count or 0)
        gpus = description.gpus if description else ()
        split = {g.parent_uuid for g in gpus if g.parent_uuid}
        # A GPU that is split into MIG instances cannot be had as a whole.
        self.gpus = tuple(g.uuid for g in gpus if g.healthy and g.uuid not in split)

    def load(self) -> Load:
        """How much of the node is taken."""
        share = 0.0
        if self.cpu_total:
            share = self.cpu_used / self.cpu_total
        if self.memory_total:
            share = max(share, self.memory_used / self.memory_total)
        return (self.active, share, self.id)

    def generic_free(self, kind: str) -> int:
        """Pieces of the kind not claimed, named ones included."""
        free = self.generic_total.get(kind, 0) - self.generic_used.get(kind, 0)
        return free + len(self.named_free(kind))

    def named_free(self, kind: str) -> list[str]:
        """Names of the kind not claimed, in order."""
        return sorted(
            name for name in self.named_total.get(kind, ()) if (kind, name) not in self.named_used
        )

    def free_gpus(self) -> list[str]:
        """Healthy GPUs not claimed, in the node's order."""
        return [uuid for uuid in self.gpus if not self.gpus_used.get(uuid)]

    def recent_failures(self, version: Version, now_ns: int) -> int:
        """How often tasks of the version failed here in the last FAILURE_WINDOW_NS."""
        times = self.failures.get(version)
        if not times:
            return 0
        return sum(1 for t in times if t > now_ns - FAILURE_WINDOW_NS)


class Claim:
    """What one task takes of its node. `active`: it should go on running."""

    __slots__ = ("active", "generic", "gpus", "node_id", "requirement", "service_id", "task_id")

    def __init__(self, task: Task, requirement: Requirement) -> None:
        self.task_id = task.id
        self.node_id = task.node_id
        self.service_id = task.service_id
        self.requirement = requirement
        self.generic = task.assigned_generic
        self.gpus = task.assigned_gpus
        self.active = states.wanted(task.desired_state)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Claim)
            and self.task_id == other.task_id
            and self.node_id == other.node_id
            and self.active == other.active
            and self.service_id == other.service_id
            and self.generic == other.generic
            and self.gpus == other.gpus
            and (self.requirement is other.requirement or self.requirement == other.requirement)
        )

    __hash__ = None  # type: ignore[assignment]  # compared, never a key


class NodeTable:
    """Nodes by id, and the claims of tasks on them."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeInfo] = {}
        self._claims: dict[str, Claim] = {}
        # By node and task; also of nodes that are not (yet) there: counted when the node comes.
        self._on: dict[str, dict[str, Claim]] = {}
        # The nodes by load, as of when it was last asked for, and those whose load has changed
        # since; None: to be made anew.
        self._by_load: list[Load] | None = None
        self._loads: dict[str, Load] = {}
        self._moved: set[str] = set()
        self._requirements: dict[Version, Requirement] = {}

    @classmethod
    def build(cls, view: View) -> NodeTable:
        """The table of a whole view."""
        table = cls()
        for node in view.all(Node):
            table.nodes[node.id] = NodeInfo(node)
        for task in sorted(view.all(Task), key=lambda t: t.id):
            table.sync_task(task.id, task, view)
            if _state(task) in _FAILED:
                table._note_failure(task)
        return table

    def apply(self, change: Change, view: View) -> None:
        """Takes one committed change. `view` is at its revision or later."""
        if change.kind == Kind.TASK:
            self.sync_task(change.id, change.new, view)
            failed = change.new is not None and _state(change.new) in _FAILED
            if failed and (change.old is None or _state(change.old) not in _FAILED):
                self._note_failure(change.new)
        elif change.kind == Kind.NODE:
            self.sync_node(change.id, change.new)
        elif change.kind == Kind.SERVICE_REVISION and change.new is None:
            self._requirements.pop((change.old.service_id, change.old.spec_version), None)

    def sync_node(self, node_id: str, node: Node | None) -> None:
        """Makes the table know the node as it is; None: it is gone."""
        self._by_load = None
        info = self.nodes.get(node_id)
        if node is None:
            if info is not None:
                del self.nodes[node_id]
        elif info is not None:
            info.set_node(node)
        else:
            info = self.nodes[node_id] = NodeInfo(node)
            for claim in self._on.get(node_id, {}).values():
                _add(info, claim, 1)

    def sync_nodes(self, view: View) -> None:
        """Catches up with changes of nodes that have not been applied; a comparison a node."""
        for node in view.all(Node):
            info = self.nodes.get(node.id)
            if info is None or info.node is not node:
                self.sync_node(node.id, node)
        if len(self.nodes) != view.count(Node):
            for node_id in [i for i in self.nodes if view.get(Node, i) is None]:
                self.sync_node(node_id, None)

    def sync_task(self, task_id: str, task: Task | None, view: View) -> None:
        """Makes the table hold exactly what the task claims; None: it is gone."""
        old = self._claims.get(task_id)
        new = None
        if task is not None and task.node_id and _holds(_state(task)):
            new = Claim(task, self.requirement(task, view))
        if old is None and new is None:
            return
        if old is not None:
            if old == new:
                return
            here = self._on[old.node_id]
            del here[task_id]
            if not here:
                del self._on[old.node_id]
            self._move(old, -1)
            del self._claims[task_id]
        if new is not None:
            self._claims[task_id] = new
            here_now = self._on.get(new.node_id)
            if here_now is None:
                here_now = self._on[new.node_id] = {}
            here_now[task_id] = new
            self._move(new, 1)

    def _move(self, claim: Claim, sign: int) -> None:
        info = self.nodes.get(claim.node_id)
        if info is not None:
            _add(info, claim, sign)
            self._moved.add(claim.node_id)

    def claim_of(self, task_id: str) -> Claim | None:
        """What a task holds; None: nothing."""
        return self._claims.get(task_id)

    def claims_on(self, node_id: str) -> Mapping[str, Claim]:
        """What tasks hold of a node, by task id; a view of the table, so not to be kept."""
        return MappingProxyType(self._on.get(node_id, {}))

    def by_load(self) -> list[Load]:
        """All nodes, least loaded first. Made when asked for: what has changed since is moved, so
        that one task on a large cluster costs no look at all nodes. To be read before the next
        change of the table.
        """
        order = self._by_load
        if order is None or len(self._moved) * _MOVES_SHARE > len(order):
            self._loads = {i: info.load() for i, info in self.nodes.items()}
            order = self._by_load = sorted(self._loads.values())
        else:
            for node_id in self._moved:
                old, new = self._loads[node_id], self.nodes[node_id].load()
                if old != new:
                    del order[bisect_left(order, old)]
                    insort(order, new)
                    self._loads[node_id] = new
        self._moved.clear()
        return order

    def _note_failure(self, task: Task) -> None:
        info = self.nodes.get(task.node_id)
        if info is None:
            return
        times = info.failures.setdefault((task.service_id, task.spec_version), [])
        times.append(task.meta.updated_at_ns if task.meta else 0)
        times.sort()
        del times[:-FAILURES_MAX]

    def requirement(self, task: Task, view: View) -> Requirement:
        """What the task's version asks for; NOTHING when its spec is gone."""
        return self.requirement_of_version(task.service_id, task.spec_version, view)

    def requirement_of_version(self, service_id: str, spec_version: int, view: View) -> Requirement:
        """What the version asks for; remembered, since versions never change."""
        key = (service_id, spec_version)
        found = self._requirements.get(key)
        if found is not None:
            return found
        revision = view.get(ServiceRevision, f"{service_id}.{spec_version}")
        if revision is not None:
            spec = revision.spec
        else:
            service = view.get(Service, service_id)
            if service is None or service.spec_version != spec_version:
                return NOTHING
            spec = service.spec
        found = self._requirements[key] = requirement_of(spec)
        return found

    def forget_failures(self, now_ns: int) -> None:
        """Drops failures too old to count, so that the account stays small."""
        for info in self.nodes.values():
            if info.failures:
                old = now_ns - FAILURE_WINDOW_NS
                kept = {v: t for v, t in info.failures.items() if t[-1] > old}
                info.failures = kept

    def summary(self) -> dict[str, Any]:
        """All of the table in comparable form; for tests."""
        return {
            i: (
                info.active,
                dict(sorted(info.by_service.items())),
                (info.cpu_used, info.cpu_total, info.memory_used, info.memory_total),
                dict(sorted(info.generic_used.items())),
                dict(sorted(info.named_used.items())),
                dict(sorted(info.gpus_used.items())),
                dict(sorted(info.ports.items())),
                dict(sorted(info.failures.items())),
            )
            for i, info in sorted(self.nodes.items())
        }

    def check_invariants(self, view: View) -> None:
        """The table is what `build` makes of the view, failures aside; for tests."""
        errors.invariant(
            self.by_load() == sorted(info.load() for info in self.nodes.values()),
            "the order of nodes by load is off",
        )
        mine, fresh = self.summary(), NodeTable.build(view).summary()
        for node_id in {*mine, *fresh}:
            a, b = mine.get(node_id), fresh.get(node_id)
            errors.invariant(
                a is not None and b is not None and a[:-1] == b[:-1],
                f"node table is off for {node_id}: {a} should be {b}",
            )


def _state(task: Task) -> TaskState:
    return task.status.state if task.status else TaskState.NEW


def _holds(state: TaskState) -> bool:
    """Whether a task with a node claims what it needs. One that still waits for its own node to
    have room (global services) does not.
    """
    return state >= TaskState.ASSIGNED and not states.ended(state)


def _add(info: NodeInfo, claim: Claim, sign: int) -> None:
    """Counts a claim in (1) or out (-1)."""
    if claim.active:
        info.active += sign
        count = info.by_service.get(claim.service_id, 0) + sign
        if count:
            info.by_service[claim.service_id] = count
        else:
            info.by_service.pop(claim.service_id, None)
    need = claim.requirement
    info.cpu_used += sign * need.cpu
    info.memory_used += sign * need.memory
    _add_generic(info, claim.generic, sign)
    for uuid in claim.gpus:
        _bump(info.gpus_used, uuid, sign)
    for port in need.host_ports:
        _bump(info.ports, port, sign)


def _add_generic(info: NodeInfo, generic: Iterable[GenericResource], sign: int) -> None:
    for g in generic:
        if g.name:
            _bump(info.named_used, (g.kind, g.name), sign)
        else:
            _bump(info.generic_used, g.kind, sign * (g.count or 0))


def _bump(counts: dict[Any, int], key: Any, by: int) -> None:
    count = counts.get(key, 0) + by
    if count:
        counts[key] = count
    else:
        counts.pop(key, None)
