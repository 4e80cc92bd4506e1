"""Placing a group of alike tasks: spread.

Method: SwarmKit's scheduler (manager/scheduler/scheduler.go: scheduleTaskGroup, nodeLess; its
decision tree of placement preferences), as one pass with heaps in place of rounds. The tasks of a
group have the same service and version, so all have the same need. Each goes to the best branch of
each spread preference in turn (fewest of the service's tasks on all nodes of the branch), and there
to the best node: not failing lately, fewest tasks of the service, fewest tasks, lowest share of CPU
or memory claimed, lowest id. Cost: all nodes once, then O(depth + log nodes) a task; without
preferences, nodes are looked at in order of load only until the tasks have one each.
Deterministic: the order of dictionaries does not matter; ties end at a branch's value or a node's
id.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from msgspec import structs

from manager.scheduler.constraints import Attribute
from manager.scheduler.filters import (
    choose_generic,
    choose_gpus,
    fits,
    unavailable,
    unsuitable,
)
from manager.scheduler.requirement import Requirement
from manager.scheduler.table import FAILURES_MAX, NodeInfo, NodeTable
from manager.store import View
from swarm.v1 import Task, TaskState, TaskStatus

ASSIGNED_MESSAGE = "scheduler assigned task to node"


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks of one service version that wait for a node, in the order in which they get one.
    `node_id` set: they may go to this node only (global services). `without`: nodes that they may
    not go to, for these are kept for others.
    """

    service_id: str
    spec_version: int
    requirement: Requirement
    tasks: Sequence[Task]
    node_id: str = ""
    without: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Placement:
    """What became of a group: tasks with their node, and those that found none, in order."""

    placed: tuple[Task, ...]
    left: tuple[Task, ...]


Rank = tuple[int, int, int, float, str]


class _Leaf:
    """The nodes of one branch."""

    __slots__ = ("heap", "service_id", "tasks", "value")

    def __init__(self, value: str, service_id: str) -> None:
        self.value = value
        self.tasks = 0
        self.service_id = service_id
        # rank, tasks it can still take, failures that count, the node
        self.heap: list[tuple[Rank, int, int, NodeInfo]] = []

    def take(self, claim: Callable[[NodeInfo], None]) -> bool:
        """Claims the best node for one task; False: the branch is full."""
        if not self.heap:
            return False
        _, room, failures, info = self.heap[0]
        claim(info)
        self.tasks += 1
        if room > 1:
            rank = _rank(info, self.service_id, failures)
            heapq.heapreplace(self.heap, (rank, room - 1, failures, info))
        else:
            heapq.heappop(self.heap)
        return True


class _Branch:
    """The branches of one preference's values."""

    __slots__ = ("children", "heap", "tasks", "value")

    def __init__(self, value: str) -> None:
        self.value = value
        self.tasks = 0
        self.children: dict[str, _Branch | _Leaf] = {}
        self.heap: list[tuple[int, str]] = []

    def take(self, claim: Callable[[NodeInfo], None]) -> bool:
        """Claims the best node of the best branch for one task; False: all are full."""
        while self.heap:
            value = self.heap[0][1]
            child = self.children[value]
            if child.take(claim):
                self.tasks += 1
                heapq.heapreplace(self.heap, (child.tasks, value))
                return True
            heapq.heappop(self.heap)
        return False


def place(table: NodeTable, group: Group, view: View, now_ns: int) -> Placement:
    """Gives each task of the group a node as long as nodes fit, and claims it in the table.

    The placed tasks have node, assigned resources and state ASSIGNED; the others are as given.
    """
    need = group.requirement
    placed: list[Task] = []

    def claim(info: NodeInfo) -> None:
        task = _assign(group.tasks[len(placed)], info, need, now_ns)
        table.sync_task(task.id, task, view)
        placed.append(task)

    if group.node_id:
        own = table.nodes.get(group.node_id)
        nodes = [own] if own is not None and own.id not in group.without else []
    elif need.spreads:
        nodes = list(table.nodes.values())
    else:
        nodes = _place_on_fresh_nodes(table, group, now_ns, claim)
    if len(placed) < len(group.tasks):
        root = _tree(nodes, group, now_ns)
        while len(placed) < len(group.tasks) and root.take(claim):
            pass
    return Placement(tuple(placed), tuple(group.tasks[len(placed) :]))


def _place_on_fresh_nodes(
    table: NodeTable, group: Group, now_ns: int, claim: Callable[[NodeInfo], None]
) -> list[NodeInfo]:
    """The first tasks, as far as there are nodes without a task of the service that have not been
    failing it: these rank first, and among themselves by load, which the table keeps. So a few
    tasks on a large cluster look at a few nodes. Returns the nodes that are left for the others.
    """
    need, service_id = group.requirement, group.service_id
    version = (service_id, group.spec_version)
    wanted = len(group.tasks)
    later: list[NodeInfo] = []
    for _, _, node_id in table.by_load():
        if not wanted:
            break
        info = table.nodes[node_id]
        if service_id in info.by_service or (
            info.failures and info.recent_failures(version, now_ns) >= FAILURES_MAX
        ):
            later.append(info)
        elif (
            node_id not in group.without
            and unavailable(info.node) is None
            and unsuitable(info.node, need) is None
            and fits(info, need, service_id) > 0
        ):
            claim(info)
            wanted -= 1
            later.append(info)
    return later


def _assign(task: Task, info: NodeInfo, need: Requirement, now_ns: int) -> Task:
    status = TaskStatus(state=TaskState.ASSIGNED, timestamp_ns=now_ns, message=ASSIGNED_MESSAGE)
    if need.counts_only:
        return structs.replace(task, node_id=info.id, status=status)
    return structs.replace(
        task,
        node_id=info.id,
        status=status,
        assigned_generic=choose_generic(info, need),
        assigned_gpus=choose_gpus(info, need),
    )


def _tree(nodes: Iterable[NodeInfo], group: Group, now_ns: int) -> _Branch | _Leaf:
    """The decision tree over the nodes that can take at least one task."""
    need, service_id = group.requirement, group.service_id
    version = (service_id, group.spec_version)
    spreads = need.spreads
    root: _Branch | _Leaf = _Branch("") if spreads else _Leaf("", service_id)
    for info in nodes:
        leaf = _leaf(root, spreads, info, service_id) if spreads else root
        if unavailable(info.node) is not None or unsuitable(info.node, need) is not None:
            continue
        if info.id in group.without:
            continue
        room = fits(info, need, service_id)
        if room > 0 and isinstance(leaf, _Leaf):
            failures = info.recent_failures(version, now_ns) if info.failures else 0
            failures = failures if failures >= FAILURES_MAX else 0
            leaf.heap.append((_rank(info, service_id, failures), room, failures, info))
    _seal(root)
    return root


def _leaf(
    root: _Branch | _Leaf, spreads: tuple[Attribute, ...], info: NodeInfo, service_id: str
) -> _Leaf:
    """The node's leaf; the service's tasks on the node count in all branches above it, whether or
    not the node can take more.
    """
    running = info.by_service.get(service_id, 0)
    here: _Branch | _Leaf = root
    here.tasks += running
    for depth, attribute in enumerate(spreads):
        assert isinstance(here, _Branch)
        value = attribute.of(info.node)
        child = here.children.get(value)
        if child is None:
            last = depth == len(spreads) - 1
            child = _Leaf(value, service_id) if last else _Branch(value)
            here.children[value] = child
        child.tasks += running
        here = child
    assert isinstance(here, _Leaf)
    return here


def _seal(here: _Branch | _Leaf) -> None:
    """Orders the heaps, once the tree is complete."""
    if isinstance(here, _Leaf):
        heapq.heapify(here.heap)
        return
    for child in here.children.values():
        _seal(child)
    here.heap = sorted((child.tasks, value) for value, child in here.children.items())


def _rank(info: NodeInfo, service_id: str, failures: int) -> Rank:
    """Lower is better."""
    active, share, node_id = info.load()
    return (failures, info.by_service.get(service_id, 0), active, share, node_id)
