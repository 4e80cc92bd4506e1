"""Slots, and what a task's two states mean for the slot that it is in."""

from __future__ import annotations

from manager.control.template import state_of
from manager.scheduler import Hindrance
from swarm import states
from swarm.clock import SECOND_NS
from swarm.v1 import Node, NodeState, Task, TaskState

Slot = int | str
"""A slot's number; in services with one task a node the node's id."""

# An engine that hangs, or is restarted, mostly comes back with all its containers: so long nothing
# is begun elsewhere.
ENGINE_GRACE_NS = 120 * SECOND_NS
LOST_STATES = frozenset({NodeState.DOWN, NodeState.DISCONNECTED})


def slot_of(task: Task) -> Slot:
    """The task's slot within its service."""
    return task.slot or task.node_id


def slot_order(slot: Slot) -> tuple[int, str]:
    """Sorts slots: numbers, then nodes."""
    return (slot, "") if isinstance(slot, int) else (0, slot)


def is_live(task: Task) -> bool:
    """Whether the task should run and has not ended."""
    desired = task.desired_state
    return (desired <= TaskState.RUNNING or desired == TaskState.COMPLETE) and not (
        task.status is not None and task.status.state in states.TERMINAL
    )


def is_unplaced(task: Task) -> bool:
    """Whether the task should run and waits for a node."""
    return states.wanted(task.desired_state) and state_of(task) < TaskState.ASSIGNED


def goes_on(old: Task | None, new: Task | None) -> bool:
    """Whether the task keeps its place and what it holds there, and only comes a step further: most
    changes are of this kind, and concern nobody else.
    """
    return (
        old is not None
        and new is not None
        and old.node_id == new.node_id
        and old.desired_state == new.desired_state
        and state_of(old) >= TaskState.ASSIGNED
        and not states.ended(state_of(new))
        and old.assigned_gpus == new.assigned_gpus
        and old.assigned_generic == new.assigned_generic
    )


def is_lost(node: Node) -> bool:
    """Whether what runs on the node counts as lost."""
    return node.revoked or (node.status is not None and node.status.state in LOST_STATES)


def lost_at_ns(node: Node, hindrance: Hindrance | None) -> int:
    """From when on what runs there counts as lost because its runtime does not answer, though the
    node does; 0: it answers. `hindrance`: which runtimes it may be in; None: any of those that do
    not answer.
    """
    since_ns = node.status.unresponsive_since_ns if node.status is not None else {}
    if not since_ns:
        return 0
    described = node.description.runtimes if node.description is not None else ()
    known = dict.fromkeys((*described, *sorted(since_ns)))
    runtimes = hindrance.among(known) if hindrance is not None else sorted(since_ns)
    if not runtimes or not all(runtime in since_ns for runtime in runtimes):
        return 0
    return max(since_ns[runtime] for runtime in runtimes) + ENGINE_GRACE_NS


def silent(node: Node, now_ns: int) -> bool:
    """Whether nobody waits for what is to stop on the node, or in one of its runtimes."""
    at_ns = lost_at_ns(node, None)
    return is_lost(node) or 0 < at_ns <= now_ns
