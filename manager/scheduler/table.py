"""The scheduler's account of the cluster: what each node has, what is claimed, by whom.

`NodeTable` is kept up to date change by change (`apply`), or made afresh (`build`); both lead to
the same table, and applying a change twice is the same as once. It is the control loop's property:
`place` adds claims to it before they are committed, and the loop takes them back (`sync_task`)
when the commit does not come about. `columns` is the same as arrays, by which groups are placed.

What counts:
- A task holds its resources, its GPUs and its host ports from the moment it is placed until it has
  ended, whatever its desired state: a task that was told to stop still uses them. Of each of its
  assigned GPUs it holds the share and memory it asked for.
- For spreading, max_replicas and conditions on services only tasks count that should go on running
  (SwarmKit's ActiveTasksCountByService).
- Recent failures per service version and node: FAILED or REJECTED, the last 5 minutes (SwarmKit's
  nodeinfo.go: monitorFailures 5 min, maxFailures 5). Those that are the node's own count apart, as
  refusals (refusals.py).

The workload that fragmentation is measured by (gpus/) is learned from the tasks that come: from all
that are there when the table is made, and then from each that is created. It is no part of what
`build` and `apply` have to agree on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from manager.scheduler.columns import Columns
from manager.scheduler.constraints import Constraint, Neighbour, neighbour_of
from manager.scheduler.gpus import FGD, POLICIES
from manager.scheduler.nodeinfo import FAILURE_WINDOW_NS, FAILURES_MAX, NodeInfo, Version
from manager.scheduler.refusals import Refusal, refused
from manager.scheduler.requirement import (
    NOTHING,
    SPREAD,
    STRATEGIES,
    HostPort,
    Requirement,
    requirement_of,
    spec_of_version,
)
from manager.store import Change, View
from swarm import errors, states
from swarm.gpus import WHOLE
from swarm.v1 import (
    Cluster,
    GenericResource,
    Kind,
    Node,
    Service,
    ServiceSpec,
    Task,
    TaskState,
)

__all__ = ["FAILURES_MAX", "Claim", "NodeInfo", "NodeTable"]

_FAILED = frozenset({TaskState.FAILED, TaskState.REJECTED})
_INTERNED_SPARE = 1_000  # requirements that no version has any more, before they are dropped
_SPECS_MAX = 20_000  # whose requirement is kept beside those of versions
_MEANINGS_MAX = 4_096  # conditions on services whose meaning is kept


class Claim(msgspec.Struct, frozen=True, gc=False):
    """What one task takes of its node. `active`: it should go on running."""

    task_id: str
    node_id: str
    service_id: str
    requirement: Requirement
    generic: tuple[GenericResource, ...]
    gpus: tuple[str, ...]
    active: bool


def claim_of(task: Task, requirement: Requirement) -> Claim:
    """What a task with a node takes of it."""
    return Claim(
        task.id,
        task.node_id,
        task.service_id,
        requirement,
        task.assigned_generic,
        task.assigned_gpus,
        states.wanted(task.desired_state),
    )


class NodeTable:
    """Nodes by id, and the claims of tasks on them. `strategy` and `gpu_policy` are the cluster's,
    for services that say nothing.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, NodeInfo] = {}
        self.columns = Columns()
        self.strategy = SPREAD
        # Service -> row -> its tasks there that should run.
        self.services: dict[str, dict[int, int]] = {}
        # Host port and protocol -> nodes where a task has it.
        self.ports: dict[tuple[int, str], dict[str, int]] = {}
        # Version -> nodes where it has failed, or been refused, lately.
        self.failing: dict[Version, set[str]] = {}
        self._accounts: dict[object, object] = {}
        self._accounts_at = -1
        self._changes = 0  # of claims, nodes and services
        self._claims: dict[str, Claim] = {}
        # By node and task; also of nodes that are not (yet) there: counted when the node comes.
        self._on: dict[str, dict[str, Claim]] = {}
        self._requirements: dict[Version, Requirement] = {}
        self._by_spec: dict[int, tuple[ServiceSpec | None, Requirement]] = {}
        self._interned: dict[Requirement, Requirement] = {}
        self._neighbours: dict[str, Neighbour] = {}
        self._meanings: dict[Constraint, frozenset[str]] = {}

    @classmethod
    def build(cls, view: View) -> NodeTable:
        """The table of a whole view."""
        table = cls()
        for cluster in view.all(Cluster):
            table.configure(cluster)
        for node in view.all(Node):
            table.sync_node(node.id, node)
        for service in view.all(Service):
            table._neighbours[service.id] = neighbour_of(service)
        for task in sorted(view.all(Task), key=lambda t: t.id):
            table.sync_task(task.id, task, view)
            if _state(task) in _FAILED:
                table._note_failure(task)
            table._learn(task, view)
        return table

    def apply(self, change: Change, view: View) -> None:
        """Takes one committed change. `view` is at its revision or later."""
        if change.kind == Kind.TASK:
            self.sync_task(change.id, change.new, view)
            failed = change.new is not None and _state(change.new) in _FAILED
            if failed and (change.old is None or _state(change.old) not in _FAILED):
                self._note_failure(change.new)
            if change.old is None and change.new is not None:
                self._learn(change.new, view)
        elif change.kind == Kind.NODE:
            self.sync_node(change.id, change.new)
        elif change.kind == Kind.SERVICE:
            self._note_service(change.id, change.new)
        elif change.kind == Kind.CLUSTER and change.new is not None:
            self.configure(change.new)
        elif change.kind == Kind.SERVICE_REVISION and change.new is None:
            self._requirements.pop((change.old.service_id, change.old.spec_version), None)

    def configure(self, cluster: Cluster) -> None:
        """Takes the cluster's strategy and policy; what is not known is as if it were not said."""
        config = cluster.spec.scheduling if cluster.spec else None
        strategy = config.strategy if config else ""
        policy = config.gpu_policy if config else ""
        self.strategy = strategy if strategy in STRATEGIES else SPREAD
        self.columns.board.use_policy(policy if policy in POLICIES else FGD)

    def learn(self, need: Requirement) -> None:
        """Counts the arrival of a task into the workload that fragmentation is measured by."""
        self.columns.board.workload.learn(need.gpu_need)

    def _learn(self, task: Task, view: View) -> None:
        if self.columns.board.nodes:
            self.learn(self.requirement(task, view))

    @property
    def changes(self) -> int:
        """Counts changes of claims, nodes and services: equal means that the table is the same."""
        return self._changes

    @property
    def accounts(self) -> dict[object, object]:
        """For explain.py: what it worked out of the table as it is now."""
        if self._accounts_at != self._changes:
            self._accounts.clear()
            self._accounts_at = self._changes
        return self._accounts

    # ------------------------------------------------------------------ nodes

    def sync_node(self, node_id: str, node: Node | None) -> None:
        """Makes the table know the node as it is; None: it is gone."""
        info = self.nodes.get(node_id)
        if info is not None and info.node is node:
            return
        self._changes += 1
        if node is None:
            if info is not None:
                self.columns.remove(info)
                del self.nodes[node_id]
                for service_id in info.by_service:
                    self._count(service_id, info.row, 0)
                for port in info.ports:
                    self._drop_port(port, node_id)
                for version in info.failures.keys() | info.refusals.keys():
                    self._forget_failing(version, node_id)
            return
        if info is not None:
            before, info_before = info.node, info.open
            info.set_node(node)
            if info_before != info.open or not same_node(before, node):
                self.columns.node_changed(info)
        else:
            info = self.nodes[node_id] = NodeInfo(node)
            self.columns.add(info)
            for claim in self._on.get(node_id, {}).values():
                self._add(info, claim, 1)

    def sync_nodes(self, view: View) -> None:
        """Catches up with changes of nodes that have not been applied; a comparison a node."""
        for node in view.all(Node):
            info = self.nodes.get(node.id)
            if info is None or info.node is not node:
                self.sync_node(node.id, node)
        if len(self.nodes) != view.count(Node):
            for node_id in [i for i in self.nodes if view.get(Node, i) is None]:
                self.sync_node(node_id, None)

    # ------------------------------------------------------------------ claims

    def sync_task(self, task_id: str, task: Task | None, view: View) -> None:
        """Makes the table hold exactly what the task claims; None: it is gone."""
        old = self._claims.get(task_id)
        new = None
        if task is not None and task.node_id and _holds(_state(task)):
            new = claim_of(task, self.requirement(task, view))
        if old is None and new is None:
            return
        if old is not None:
            if old == new:
                return
            here = self._on[old.node_id]
            del here[task_id]
            if not here:
                del self._on[old.node_id]
            del self._claims[task_id]
            self._move(old, -1)
        if new is not None:
            self._know_service(new.service_id, view)
            self._hold(new)
            self._move(new, 1)

    def take_many(
        self, tasks: Sequence[Task], where: Sequence[NodeInfo], need: Requirement, view: View
    ) -> None:
        """Claims for tasks of one service whose claim is amounts alone, which had none before. As
        sync_task one by one; the sums of each node are changed once.
        """
        if not tasks:
            return
        service_id = tasks[0].service_id
        self._know_service(service_id, view)
        counts: dict[str, list[int]] = {}
        claims, on = self._claims, self._on
        nothing: tuple[()] = ()
        for task, info in zip(tasks, where, strict=True):
            active = states.wanted(task.desired_state)
            task_id, node_id = task.id, info.id
            claim = Claim(task_id, node_id, service_id, need, nothing, nothing, active)
            claims[task_id] = claim
            here = on.get(node_id)
            if here is None:
                here = on[node_id] = {}
            here[task_id] = claim
            count = counts.get(node_id)
            if count is None:
                count = counts[node_id] = [0, 0]
            count[0] += 1
            count[1] += active
        for node_id, (all_, active_) in counts.items():
            info = self.nodes[node_id]
            info.cpu_used += all_ * need.cpu
            info.memory_used += all_ * need.memory
            info.pids_used += all_ * need.pids
            if active_:
                info.active += active_
                now = info.by_service.get(service_id, 0) + active_
                info.by_service[service_id] = now
                self._count(service_id, info.row, now)
            self.columns.touch(info)
        self._changes += 1

    def _hold(self, claim: Claim) -> None:
        self._claims[claim.task_id] = claim
        here = self._on.get(claim.node_id)
        if here is None:
            here = self._on[claim.node_id] = {}
        here[claim.task_id] = claim

    def _move(self, claim: Claim, sign: int) -> None:
        info = self.nodes.get(claim.node_id)
        if info is not None:
            self._add(info, claim, sign)

    def _add(self, info: NodeInfo, claim: Claim, sign: int) -> None:
        """Counts a claim in (1) or out (-1)."""
        self._changes += 1
        if claim.active:
            info.active += sign
            service_id = claim.service_id
            count = info.by_service.get(service_id, 0) + sign
            if count:
                info.by_service[service_id] = count
            else:
                info.by_service.pop(service_id, None)
            self._count(service_id, info.row, count)
        need = claim.requirement
        info.cpu_used += sign * need.cpu
        info.memory_used += sign * need.memory
        info.pids_used += sign * need.pids
        if claim.generic:
            _add_generic(info, claim.generic, sign)
        if claim.gpus:
            ask = need.gpus
            share, memory = (ask.share, ask.memory_bytes) if ask is not None else (WHOLE, 0)
            for uuid in claim.gpus:
                _bump(info.gpus_used, uuid, sign * share)
                _bump(info.gpu_memory_used, uuid, sign * memory)
        for port in need.host_ports:
            _bump(info.ports, port, sign)
            if port in info.ports:
                self.ports.setdefault(port[:2], {})[info.id] = 1
            else:
                self._drop_port(port, info.id)
        self.columns.touch(info)

    def _count(self, service_id: str, row: int, count: int) -> None:
        here = self.services.get(service_id)
        if count:
            if here is None:
                here = self.services[service_id] = {}
            here[row] = count
        elif here is not None:
            here.pop(row, None)
            if not here:
                del self.services[service_id]

    def _drop_port(self, port: HostPort, node_id: str) -> None:
        """A task gave the port up; another may have it on another address of the node."""
        nodes = self.ports.get(port[:2], {})
        info = self.nodes.get(node_id)
        if info is None or not any(p[:2] == port[:2] for p in info.ports):
            nodes.pop(node_id, None)
        if not nodes:
            self.ports.pop(port[:2], None)

    def claim_of(self, task_id: str) -> Claim | None:
        """What a task holds; None: nothing."""
        return self._claims.get(task_id)

    def claims_on(self, node_id: str) -> Mapping[str, Claim]:
        """What tasks hold of a node, by task id; a view of the table, so not to be kept."""
        return MappingProxyType(self._on.get(node_id, {}))

    # ------------------------------------------------------------------ services

    def _note_service(self, service_id: str, service: Service | None) -> None:
        new = neighbour_of(service) if service is not None else None
        if self._neighbours.get(service_id) != new:
            self._changes += 1
            self._meanings.clear()
            if new is None:
                self._neighbours.pop(service_id, None)
            else:
                self._neighbours[service_id] = new

    def _know_service(self, service_id: str, view: View) -> None:
        if service_id not in self._neighbours:
            self._note_service(service_id, view.get(Service, service_id))

    def meaning(self, constraint: Constraint) -> frozenset[str]:
        """The services that a condition on services means, whether they run or not."""
        found = self._meanings.get(constraint)
        if found is None:
            while len(self._meanings) >= _MEANINGS_MAX:
                del self._meanings[next(iter(self._meanings))]
            found = self._meanings[constraint] = frozenset(
                service_id
                for service_id, service in self._neighbours.items()
                if constraint.means(service)
            )
        return found

    def near(self, info: NodeInfo, constraint: Constraint) -> bool:
        """Whether a condition on services holds on the node."""
        meant = self.meaning(constraint)
        return any(i in meant for i in info.by_service) != constraint.negated

    def may_join(self, info: NodeInfo, constraint: Constraint, service_id: str) -> bool:
        """Whether a task of the service may go to the node by a constraint on services. One that
        means the service itself, where none of those it means runs anywhere, holds everywhere:
        else the first task could never start.
        """
        if self.near(info, constraint):
            return True
        return not constraint.negated and self.is_first(constraint, service_id)

    def is_first(self, constraint: Constraint, service_id: str) -> bool:
        """Whether the constraint means the service, and nothing that it means runs anywhere."""
        meant = self.meaning(constraint)
        return service_id in meant and not any(i in self.services for i in meant)

    def _note_failure(self, task: Task) -> None:
        info = self.nodes.get(task.node_id)
        if info is None:
            return
        version = (task.service_id, task.spec_version)
        self.failing.setdefault(version, set()).add(info.id)
        at_ns = task.meta.updated_at_ns if task.meta else 0
        if refused(task):
            before = info.refusals.get(version)
            info.refusals[version] = before.again(at_ns) if before else Refusal(at_ns, at_ns)
            return
        times = info.failures.setdefault(version, [])
        times.append(at_ns)
        times.sort()
        del times[:-FAILURES_MAX]

    def refusing(self, version: Version, now_ns: int) -> list[NodeInfo]:
        """The nodes that have refused the version lately."""
        failing = (self.nodes[i] for i in self.failing.get(version, ()))
        return [info for info in failing if info.refusal(version, now_ns) is not None]

    def _forget_failing(self, version: Version, node_id: str) -> None:
        nodes = self.failing.get(version, set())
        nodes.discard(node_id)
        if not nodes:
            self.failing.pop(version, None)

    def requirement(self, task: Task, view: View) -> Requirement:
        """What the task's version asks for; NOTHING when its spec is gone."""
        return self.requirement_of_version(task.service_id, task.spec_version, view)

    def requirement_of_version(self, service_id: str, spec_version: int, view: View) -> Requirement:
        """What the version asks for; remembered, since versions never change."""
        key = (service_id, spec_version)
        found = self._requirements.get(key)
        if found is not None:
            return found
        spec = spec_of_version(view, service_id, spec_version)
        if spec is None:
            return NOTHING
        found = self._requirements[key] = self.requirement_of_spec(spec)
        return found

    def requirement_of_spec(self, spec: ServiceSpec | None) -> Requirement:
        """As requirement_of; remembered for the very object."""
        found = self._by_spec.get(id(spec))
        # The spec is kept beside, so that nothing else can have its identity.
        if found is None or found[0] is not spec:
            if len(self._by_spec) >= _SPECS_MAX:
                self._by_spec.clear()
            found = self._by_spec[id(spec)] = (spec, self._intern(requirement_of(spec)))
        return found[1]

    def _intern(self, need: Requirement) -> Requirement:
        """The one object for all equal requirements: groups that are alike are then found by
        identity, and what is worked out from one is worked out once.
        """
        if len(self._interned) > 2 * len(self._requirements) + _INTERNED_SPARE:
            self._interned = {r: r for r in self._requirements.values()}
        return self._interned.setdefault(need, need)

    def forget_failures(self, now_ns: int) -> None:
        """Drops failures too old to count, so that the account stays small."""
        old = now_ns - FAILURE_WINDOW_NS
        for version, nodes in list(self.failing.items()):
            for node_id in list(nodes):
                info = self.nodes[node_id]
                if version in info.failures and info.failures[version][-1] <= old:
                    del info.failures[version]
                if version in info.refusals and info.refusal(version, now_ns) is None:
                    del info.refusals[version]
                if version not in info.failures and version not in info.refusals:
                    self._forget_failing(version, node_id)

    def summary(self) -> dict[str, Any]:
        """All of the table in comparable form; for tests."""
        return {
            i: (
                info.active,
                dict(sorted(info.by_service.items())),
                (info.cpu_used, info.cpu_total, info.memory_used, info.memory_total),
                (info.pids_used, info.pids_total, info.open),
                dict(sorted(info.generic_used.items())),
                dict(sorted(info.named_used.items())),
                dict(sorted(info.gpus_used.items())),
                dict(sorted(info.gpu_memory_used.items())),
                dict(sorted(info.ports.items())),
                dict(sorted(info.failures.items())),
            )
            for i, info in sorted(self.nodes.items())
        }

    def check_invariants(self, view: View) -> None:
        """The table is what `build` makes of the view, failures aside; for tests."""
        self._check_columns()
        mine, fresh = self.summary(), NodeTable.build(view).summary()
        for node_id in {*mine, *fresh}:
            a, b = mine.get(node_id), fresh.get(node_id)
            errors.invariant(
                a is not None and b is not None and a[:-1] == b[:-1],
                f"node table is off for {node_id}: {a} should be {b}",
            )

    def _check_columns(self) -> None:
        """The columns and indexes say what the nodes say."""
        columns = self.columns
        columns.flush()
        services: dict[str, dict[int, int]] = {}
        ports: dict[tuple[int, str], set[str]] = {}
        failing: dict[Version, set[str]] = {}
        for info in self.nodes.values():
            row = info.row
            errors.invariant(columns.infos[row] is info, f"node {info.id} has not got row {row}")
            have = [int(columns.column(i)[row]) for i in range(7)]
            want = [info.cpu_total, info.cpu_used, info.memory_total, info.memory_used]
            want += [info.pids_total, info.pids_used, info.active]
            errors.invariant(have == want, f"columns of {info.id}: {have} should be {want}")
            opened = bool(columns.open[row])
            errors.invariant(opened == info.open, f"whether {info.id} is open is off")
            for kind in info.declared | info.generic_used.keys():
                free = int(columns.generic(kind)[row])
                errors.invariant(free == info.generic_free(kind), f"{kind} of {info.id} is off")
            if info.gpus:
                free_now = columns.board.free(info.id)
                shares, memory = info.gpu_free()
                errors.invariant(
                    free_now[2:] == (tuple(shares), tuple(memory)), f"GPUs of {info.id} are off"
                )
            for service_id, count in info.by_service.items():
                services.setdefault(service_id, {})[row] = count
            for port in info.ports:
                ports.setdefault(port[:2], set()).add(info.id)
            for version in info.failures.keys() | info.refusals.keys():
                failing.setdefault(version, set()).add(info.id)
        errors.invariant(self.services == services, "the services' rows are off")
        mine = {port: set(nodes) for port, nodes in self.ports.items()}
        errors.invariant(mine == ports, "host ports in use are off")
        errors.invariant(self.failing == failing, "nodes that fail are off")
        columns.board.check_invariants()


def same_node(a: Node, b: Node) -> bool:
    """Whether nothing differs that a condition on the node could see."""
    return (
        a.description == b.description
        and a.spec == b.spec
        and (a.status.addr if a.status else "") == (b.status.addr if b.status else "")
    )


def _state(task: Task) -> TaskState:
    return task.status.state if task.status else TaskState.NEW


def _holds(state: TaskState) -> bool:
    """Whether a task with a node claims what it needs. One that still waits for its own node to
    have room (global services) does not.
    """
    return state >= TaskState.ASSIGNED and not states.ended(state)


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
