"""Failures that say something about a node and little about the task, and what follows from them.

A node that cannot get at the registry, has no room on its disk, or whose engine fails, *refuses* a
version of a service: another node may well run it. So do images that some nodes have and the
registry has not. Such a node comes last for that version for a while, whatever else speaks for it
(placement.py), and the slot's next attempt goes to another node at once (manager/control:
elsewhere.py). What is known of refusals comes from the slots' tasks, as far as these are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from manager.store import View
from swarm.clock import SECOND_NS
from swarm.v1 import Node, Task, TaskState

# TaskStatus.cause: what is the node's own affair ...
NODE_FAULTS = frozenset({"image_unreachable", "disk_full", "engine_failed", "unsupported"})
# ... and what most often is the same everywhere, but need not be: an image that was built on one
# node, credentials that another node had before, a program of the host.
PERHAPS = frozenset({"image_missing", "image_denied", "program_missing"})
REFUSALS = NODE_FAULTS | PERHAPS
WINDOW_NS = 900 * SECOND_NS  # three times the longest delay that is usual between attempts
# Of what is most often the same everywhere so many nodes are asked at once: a registry must not be
# asked a thousand times for a name with a typing error.
PERHAPS_MAX = 10
_FAILED = frozenset({TaskState.FAILED, TaskState.REJECTED})
_SAYINGS_MAX = 3
_NAMES_MAX = 5


@dataclass(frozen=True, slots=True)
class Refusal:
    """What one node has refused of one version, lately."""

    first_ns: int
    last_ns: int
    count: int = 1

    def again(self, at_ns: int) -> Refusal:
        """With one more, in whatever order they are told; those too old do not count."""
        if at_ns > self.last_ns + WINDOW_NS:
            return Refusal(at_ns, at_ns)
        if at_ns < self.last_ns - WINDOW_NS:
            return self
        return Refusal(min(self.first_ns, at_ns), max(self.last_ns, at_ns), self.count + 1)

    def counts(self, now_ns: int) -> bool:
        """Whether it is not too old."""
        return self.last_ns > now_ns - WINDOW_NS


def refused(task: Task) -> bool:
    """Whether the task failed for a reason that may be its node's."""
    status = task.status
    return status is not None and status.state in _FAILED and status.cause in REFUSALS


def said(view: View, tasks: Iterable[Task]) -> str:
    """What the nodes said that refused these tasks, each node's last word: "no route to host (n1,
    n2); no space left (n3)". Empty: none did.
    """
    last: dict[str, Task] = {}
    for task in sorted(filter(refused, tasks), key=_age):
        last[task.node_id] = task
    by_text: dict[str, list[str]] = {}
    for node_id, task in last.items():
        status = task.status
        assert status is not None
        text = status.err or status.message or status.cause
        by_text.setdefault(text, []).append(_name(view, node_id))
    ordered = sorted(by_text.items(), key=lambda item: (-len(item[1]), item[0]))
    parts = [f"{text} ({_some(sorted(names))})" for text, names in ordered[:_SAYINGS_MAX]]
    if len(ordered) > _SAYINGS_MAX:
        more = sum(len(names) for _, names in ordered[_SAYINGS_MAX:])
        parts.append(f"other reasons ({more} more)")
    return "; ".join(parts)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_MAX])
    more = len(names) - _NAMES_MAX
    return f"{shown} and {more} more" if more > 0 else shown


def _name(view: View, node_id: str) -> str:
    node = view.get(Node, node_id)
    if node is None:
        return node_id
    named = node.spec.name if node.spec else ""
    return named or (node.description.hostname if node.description else "") or node_id


def _age(task: Task) -> tuple[int, str]:
    return (task.meta.created_at_ns if task.meta else 0, task.id)
