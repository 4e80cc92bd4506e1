"""Nodes whose manager is gone: the leader waits for them in its place. Pure.

A node is judged by the manager that holds its session (custody.py). One whose manager is not there
would be judged by nobody, so the leader gives it the time to come back elsewhere, from when it saw
that manager missing, and then it counts as down. Nodes that no manager ever held, as clusters of
earlier versions and restored ones have, are the leader's too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from manager.dispatcher.liveness import Liveness
from swarm.v1 import Node, NodeState

_WAITED_FOR = (NodeState.READY, NodeState.UNKNOWN)


class Orphans:
    """The deadlines of these nodes, while this manager leads. Times as in Liveness."""

    def __init__(self) -> None:
        self._present: frozenset[str] | None = None  # None: another manager leads
        self._liveness = Liveness()

    def look(
        self,
        present: frozenset[str],
        nodes: Iterable[Node],
        deadline_s: Callable[[Node], float],
    ) -> None:
        """This manager leads, and these managers are there."""
        self._present = present
        for node in nodes:
            self.consider(node, deadline_s(node))

    def stop(self) -> None:
        """Another manager leads, or nobody knows who is there."""
        self._present = None
        self._liveness.clear()

    def consider(self, node: Node, deadline_s: float) -> None:
        """The node as it is now; `deadline_s` counts if it was not waited for before."""
        if self._present is None:
            return
        state = node.status.state if node.status else NodeState.UNKNOWN
        owner = node.status.manager_id if node.status else ""
        if owner in self._present or state not in _WAITED_FOR:
            self._liveness.forget(node.id)
        elif not self._liveness.knows(node.id):
            self._liveness.expect(node.id, deadline_s)

    def forget(self, node_id: str) -> None:
        """The node was removed."""
        self._liveness.forget(node_id)

    def expired(self, now_s: float) -> list[str]:
        """The nodes that did not come back, each told once."""
        return self._liveness.expired(now_s)

    def lost(self, node_id: str) -> bool:
        """Whether the node did not come back, and its manager neither."""
        return self._liveness.silent(node_id)

    def postpone(self, by_s: float, *, at_least_s: float) -> None:
        """See Liveness."""
        self._liveness.postpone(by_s, at_least_s=at_least_s)
