"""One node as the scheduler sees it: the object, and sums over the claims on it."""

from __future__ import annotations

from manager.scheduler.refusals import Refusal
from manager.scheduler.requirement import HostPort
from swarm.clock import SECOND_NS
from swarm.gpus import GPUS_MAX, WHOLE
from swarm.v1 import Availability, Gpu, Node, NodeState

FAILURE_WINDOW_NS = 300 * SECOND_NS
FAILURES_MAX = 5  # from so many on in the window a node comes last
_GENERIC_MAX = 1 << 62  # what a node says of itself has to fit into the columns

Version = tuple[str, int]
"""Service id and spec_version."""

Load = tuple[int, float, str]
"""Of a node: tasks that should run, the larger share claimed of CPU and memory, the node's id."""


def node_name(node: Node) -> str:
    """What people call the node."""
    named = node.spec.name if node.spec else ""
    return named or (node.description.hostname if node.description else "") or node.id


class NodeInfo:
    """One node: the object, and sums over the claims on it. Only NodeTable changes it."""

    __slots__ = (
        "active",
        "by_service",
        "cpu_total",
        "cpu_used",
        "declared",
        "failures",
        "generic_total",
        "generic_used",
        "gpu_kinds",
        "gpu_memory_used",
        "gpus",
        "gpus_used",
        "id",
        "memory_total",
        "memory_used",
        "named_total",
        "named_used",
        "node",
        "pids_total",
        "pids_used",
        "ports",
        "refusals",
        "row",
        "usable_gpus",
    )

    def __init__(self, node: Node) -> None:
        self.id = node.id
        self.row = -1  # in the columns
        self.active = 0  # tasks that should run
        self.by_service: dict[str, int] = {}  # of these, by service id
        self.cpu_used = 0
        self.memory_used = 0
        self.pids_used = 0
        self.generic_used: dict[str, int] = {}
        self.named_used: dict[tuple[str, str], int] = {}  # kind and name -> claims
        self.gpus_used: dict[str, int] = {}  # uuid -> shares claimed
        self.gpu_memory_used: dict[str, int] = {}  # uuid -> bytes claimed
        self.ports: dict[HostPort, int] = {}
        self.failures: dict[Version, list[int]] = {}  # times, oldest first
        self.refusals: dict[Version, Refusal] = {}
        self.set_node(node)

    @property
    def name(self) -> str:
        """What people call it."""
        return node_name(self.node)

    @property
    def open(self) -> bool:
        """Whether it takes new tasks at all."""
        node = self.node
        return (
            node.status is not None
            and node.status.state == NodeState.READY
            and not node.revoked
            and (
                node.spec is None
                or node.spec.availability in (Availability.ACTIVE, Availability.UNSPECIFIED)
            )
        )

    def set_node(self, node: Node) -> None:
        """Takes a new version of the object; claims stay as they are."""
        self.node = node
        description = node.description
        resources = description.resources if description else None
        self.cpu_total = resources.cpu_nano if resources else 0
        self.memory_total = resources.memory_bytes if resources else 0
        self.pids_total = resources.pids if resources else 0  # 0: it does not say; no limit
        self.generic_total: dict[str, int] = {}
        self.named_total: dict[str, tuple[str, ...]] = {}
        for g in resources.generic if resources else ():
            if g.name:
                self.named_total[g.kind] = (*self.named_total.get(g.kind, ()), g.name)
            else:
                total = self.generic_total.get(g.kind, 0) + (g.count or 0)
                self.generic_total[g.kind] = min(total, _GENERIC_MAX)
        # Kinds that it has of itself; of these it serves requests by their account alone.
        self.declared = frozenset(self.generic_total.keys() | self.named_total.keys())
        gpus = description.gpus if description else ()
        split = {g.parent_uuid for g in gpus if g.parent_uuid}
        # A GPU that is split into MIG instances cannot be had as a whole.
        usable = {g.uuid: g for g in gpus if g.healthy and g.uuid not in split}
        self.usable_gpus: tuple[Gpu, ...] = tuple(usable.values())[:GPUS_MAX]
        self.gpus = tuple(g.uuid for g in self.usable_gpus)
        # What they are; equal: nodes whose GPUs are alike.
        self.gpu_kinds = tuple(
            (g.model, g.memory_bytes, g.compute_capability, g.driver, g.cdi_name.partition(".")[0])
            for g in self.usable_gpus
        )

    def load(self) -> Load:
        """How much of the node is taken."""
        share = 0.0
        if self.cpu_total:
            share = self.cpu_used / self.cpu_total
        if self.memory_total:
            share = max(share, self.memory_used / self.memory_total)
        return (self.active, share, self.id)

    def pids_free(self) -> int | None:
        """Processes that are not claimed; None: there is no limit."""
        return self.pids_total - self.pids_used if self.pids_total else None

    def generic_free(self, kind: str) -> int:
        """Pieces of the kind not claimed, named ones included."""
        free = self.generic_total.get(kind, 0) - self.generic_used.get(kind, 0)
        return free + len(self.named_free(kind))

    def named_free(self, kind: str) -> list[str]:
        """Names of the kind not claimed, in order."""
        return sorted(
            name for name in self.named_total.get(kind, ()) if (kind, name) not in self.named_used
        )

    def gpu_free(self, *, empty: bool = False) -> tuple[list[int], list[int]]:
        """Shares and memory that are free of each healthy GPU, in the node's order; `empty`: if
        nothing were claimed.
        """
        gpus = self.usable_gpus
        if empty or not self.gpus_used:
            return [WHOLE] * len(gpus), [g.memory_bytes for g in gpus]
        used, memory = self.gpus_used, self.gpu_memory_used
        return (
            [WHOLE - used.get(g.uuid, 0) for g in gpus],
            [g.memory_bytes - memory.get(g.uuid, 0) for g in gpus],
        )

    def recent_failures(self, version: Version, now_ns: int) -> int:
        """How often tasks of the version failed here in the last FAILURE_WINDOW_NS."""
        times = self.failures.get(version)
        if not times:
            return 0
        return sum(1 for t in times if t > now_ns - FAILURE_WINDOW_NS)

    def refusal(self, version: Version, now_ns: int) -> Refusal | None:
        """What it has refused of the version lately."""
        found = self.refusals.get(version)
        return found if found is not None and found.counts(now_ns) else None
