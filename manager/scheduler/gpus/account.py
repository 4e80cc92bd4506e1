"""Claims of tasks on nodes with GPUs, and the best place for the next.

`GpuAccount` is a board (board.py) with an account of who holds what: all that is needed to place
tasks with GPUs by themselves, without services and filters. The scheduler's NodeTable keeps its own
account of claims and tells a board what is free.

Invariants:
- `claim` never takes more of a dimension than is free: CPU, memory, GPU shares, GPU memory.
- Several GPUs are whole ones of one node; a part comes from one GPU; models are respected.
- A release gives back exactly what the claim took.

A claim made elsewhere (`take`: read from the store) is a fact and counts even where it does not
fit; what is free is then negative, and nothing is placed there until it is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from manager.scheduler.gpus.board import GpuBoard, GpuDecision
from manager.scheduler.gpus.needs import GpuNeed, GpuNode
from manager.scheduler.gpus.policies import FGD, Bools
from manager.scheduler.gpus.workload import Workload
from swarm.errors import invariant


@dataclass(frozen=True, slots=True)
class GpuHold:
    """What one task holds: the node, and the uuids of its GPUs."""

    need: GpuNeed
    node_id: str
    gpus: tuple[str, ...]


class GpuAccount:
    """Nodes, claims, and the policy that chooses."""

    def __init__(self, policy: str = FGD, workload: Workload | None = None) -> None:
        self.board = GpuBoard(policy, workload)
        self.workload = self.board.workload
        self._claims: dict[str, GpuHold] = {}
        self._on: dict[str, set[str]] = {}  # claims by node id, also of nodes not (yet) there

    # Nodes.

    def update(self, node: GpuNode) -> None:
        """Takes a new node or a new version of one; its claims stay."""
        if self.board.update(node):
            for task_id in sorted(self._on.get(node.id, ())):
                self._add(self._claims[task_id], 1)

    def remove(self, node_id: str) -> None:
        """Forgets a node. Its claims count again when it comes back."""
        self.board.remove(node_id)

    # Claims.

    def claim(
        self, task_id: str, need: GpuNeed, among: Iterable[str] | None = None
    ) -> GpuHold | None:
        """Takes the best place for a task; None: there is none."""
        board = self.board
        row = board.lowest(board.scores(need, self._among(among)))
        if row is None:
            return None
        claim = GpuHold(need, board.ids[row], board.chosen(row, need))
        lowest = self.take(task_id, claim)
        invariant(lowest >= 0, f"node {claim.node_id} is oversubscribed by task {task_id}")
        return claim

    def take(self, task_id: str, claim: GpuHold) -> int:
        """Counts a claim that was decided elsewhere; the same one twice is once. Returns the least
        that is free of any dimension then.
        """
        if self._claims.get(task_id) == claim:
            return 0
        self.release(task_id)
        self._claims[task_id] = claim
        self._on.setdefault(claim.node_id, set()).add(task_id)
        return self._add(claim, 1)

    def release(self, task_id: str) -> bool:
        """Gives back what a task holds; False: it held nothing."""
        claim = self._claims.pop(task_id, None)
        if claim is None:
            return False
        held = self._on[claim.node_id]
        held.discard(task_id)
        if not held:
            del self._on[claim.node_id]
        self._add(claim, -1)
        return True

    def held(self, task_id: str) -> GpuHold | None:
        """What a task holds."""
        return self._claims.get(task_id)

    def _add(self, claim: GpuHold, sign: int) -> int:
        return self.board.change(claim.node_id, claim.need, claim.gpus, -sign)

    # Decisions.

    def best(self, need: GpuNeed, among: Iterable[str] | None = None) -> GpuDecision | None:
        """The best place of a task now; None: it fits nowhere. Takes nothing."""
        return self.board.best(need, self._among(among))

    def rejected(self, need: GpuNeed, among: Iterable[str] | None = None) -> dict[str, int]:
        """See GpuBoard.rejected."""
        return self.board.rejected(need, None if among is None else set(among))

    def fragmentation(self) -> float:
        """See GpuBoard.fragmentation."""
        return self.board.fragmentation()

    def _among(self, among: Iterable[str] | None) -> Bools | None:
        if among is None:
            return None
        board = self.board
        keep = np.zeros(board.rows, np.bool_)
        keep[[board.row[i] for i in among if i in board.row]] = True
        return keep

    # Checks.

    def check_invariants(self) -> None:
        """Free is total less claims, everywhere, and kept scores are those worked out anew."""
        board = self.board
        fresh = GpuAccount(board.policy, self.workload)
        for node in board.nodes.values():
            fresh.update(node)
        for task_id, claim in self._claims.items():
            fresh.take(task_id, claim)
        for node_id in board.row:
            same = board.free(node_id) == fresh.board.free(node_id)
            invariant(same, f"what is free on {node_id} is off")
        board.check_invariants()
