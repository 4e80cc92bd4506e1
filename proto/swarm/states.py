"""Task states: their order, the legal transitions, and what they mean for the outside.

One table (`LEGAL`) that the agent, the store's checks, the docs and the tests read. States only
grow; Swarm's SwarmKit `api.TaskState` has the same order.
"""

from __future__ import annotations

from swarm.v1 import TaskState

S = TaskState

# From each observed state to the states that may follow it. Skipping is legal where the work
# between is empty, going back never.
LEGAL: dict[TaskState, frozenset[TaskState]] = {
    S.NEW: frozenset({S.PENDING, S.ASSIGNED, S.SHUTDOWN}),
    S.PENDING: frozenset({S.ASSIGNED, S.SHUTDOWN}),
    S.ASSIGNED: frozenset(
        {S.ACCEPTED, S.PREPARING, S.READY, S.STARTING, S.RUNNING}
        | {S.COMPLETE, S.SHUTDOWN, S.FAILED, S.REJECTED, S.ORPHANED}
    ),
    S.ACCEPTED: frozenset(
        {S.PREPARING, S.READY, S.STARTING, S.RUNNING}
        | {S.COMPLETE, S.SHUTDOWN, S.FAILED, S.REJECTED, S.ORPHANED}
    ),
    S.PREPARING: frozenset(
        {S.READY, S.STARTING, S.RUNNING, S.COMPLETE}
        | {S.SHUTDOWN, S.FAILED, S.REJECTED, S.ORPHANED}
    ),
    S.READY: frozenset(
        {S.STARTING, S.RUNNING, S.COMPLETE, S.SHUTDOWN, S.FAILED, S.REJECTED, S.ORPHANED}
    ),
    S.STARTING: frozenset({S.RUNNING, S.COMPLETE, S.SHUTDOWN, S.FAILED, S.REJECTED, S.ORPHANED}),
    S.RUNNING: frozenset({S.COMPLETE, S.SHUTDOWN, S.FAILED, S.ORPHANED}),
    S.COMPLETE: frozenset(),
    S.SHUTDOWN: frozenset(),
    S.FAILED: frozenset(),
    S.REJECTED: frozenset(),
    S.ORPHANED: frozenset(),
}

# A task in one of these has ended and will never run again.
TERMINAL = frozenset({S.COMPLETE, S.SHUTDOWN, S.FAILED, S.REJECTED, S.ORPHANED})
# What a desired state may be.
DESIRED = frozenset({S.READY, S.RUNNING, S.COMPLETE, S.SHUTDOWN, S.REMOVE})


def may_follow(before: TaskState, after: TaskState) -> bool:
    """Whether an observed state may change so; staying is legal."""
    return before == after or after in LEGAL[before]


def ended(state: TaskState) -> bool:
    """Whether the task has ended, for whatever reason."""
    return state in TERMINAL


def wanted(desired: TaskState) -> bool:
    """Whether a task with this desired state counts as one of the service's current tasks."""
    return desired <= S.RUNNING or desired == S.COMPLETE


def label(state: TaskState) -> str:
    """The state as the CLI and Docker's API show it."""
    return state.name.lower()
