"""Everything that agents report, written to the store in few large commits.

Owns what a report may do: a task's observed state only grows (swarm.states), only the task's own
node may report it, and `removed` deletes a task only if that was desired. All sessions share one
writer: reports gather for a short while, then one commit takes all of them, and only after it are
they acknowledged.

What waits is bounded while the store cannot write: one change for each node, and of each agent the
reports of its present session, which has a limit of its own (session.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog
from msgspec import structs

from manager.dispatcher.metrics import STATUS_COMMIT_SECONDS, STATUSES
from manager.store import Draft, Stale, Store
from swarm import errors
from swarm.clock import SECOND_NS, Clock
from swarm.states import may_follow
from swarm.v1 import (
    NetworkAttachment,
    Node,
    NodeDescription,
    NodeState,
    NodeStatus,
    Task,
    TaskReport,
    TaskState,
)

log = structlog.get_logger("dispatcher")

GATHER_S = 0.02  # short beside what a task takes to start, long beside a commit
COMMIT_REPORTS_MAX = (
    5_000  # so that one commit holds the task writers' lock for some 100 ms at most
)
RETRY_S_MIN, RETRY_S_MAX = 0.1, 2.0
# A report older than the last one comes late, from the node's session with another manager; one
# that is older by so much was made after the node's clock was set back.
CLOCK_STEP_NS = 300 * SECOND_NS
# Of RuntimeProblem: nothing is known of the tasks there.
ENGINE_UNRESPONSIVE = "engine_unresponsive"

# The node as it is and the time now (unix ns); returns the node as it should be, itself for no
# change. May be called several times for one commit: the last one counts.
NodeChange = Callable[[Node, int], Node]


@dataclass(frozen=True, slots=True)
class _Batch:
    """One agent's reports."""

    node_id: str
    reports: Sequence[TaskReport]
    done: Callable[[], None] | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is to become of one node."""

    change: NodeChange
    done: Callable[[], None] | None


def came_up(
    node: Node,
    now_ns: int,
    *,
    description: NodeDescription | None,
    addr: str,
    manager_id: str,
    session_id: str,
) -> Node:
    """The node has a session with this manager. As each session has an id of its own, each changes
    the node, and a commit that was made for an older one and comes late is Stale.
    """
    before = node.status or NodeStatus()
    status = NodeStatus(
        state=NodeState.READY,
        addr=addr or before.addr,
        since_ns=before.since_ns if before.state == NodeState.READY else now_ns,
        manager_id=manager_id,
        session_id=session_id,
        unresponsive_since_ns=_unresponsive(
            description or node.description, before.unresponsive_since_ns, now_ns
        ),
    )
    return structs.replace(node, description=description or node.description, status=status)


def _unresponsive(
    description: NodeDescription | None, before: Mapping[str, int], now_ns: int
) -> dict[str, int]:
    """The runtimes that do not answer, and since when managers know."""
    problems = description.runtime_problems if description is not None else ()
    runtimes = {r for p in problems if p.cause == ENGINE_UNRESPONSIVE for r in p.runtimes}
    return {runtime: before.get(runtime, now_ns) for runtime in sorted(runtimes)}


def went_down(node: Node, now_ns: int, message: str) -> Node:
    """The node is not heard any more."""
    before = node.status or NodeStatus()
    if before.state == NodeState.DOWN:
        return node
    status = structs.replace(before, state=NodeState.DOWN, message=message, since_ns=now_ns)
    return structs.replace(node, status=status)


class Intake:
    """The one writer of what agents report. `run` until cancelled."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._batches: dict[str, list[_Batch]] = {}  # by node
        self._nodes: dict[str, _Entry] = {}
        self._wake = asyncio.Event()
        self._since_s = 0.0

    def statuses(
        self, node_id: str, reports: Sequence[TaskReport], done: Callable[[], None] | None = None
    ) -> None:
        """Takes reports in; `done` is called once they are committed."""
        self._gather()
        self._batches.setdefault(node_id, []).append(_Batch(node_id, reports, done))

    def node(
        self, node_id: str, change: NodeChange, done: Callable[[], None] | None = None
    ) -> None:
        """Takes a change of a node in, in place of one that still waits; `done` is called once it
        is committed.
        """
        self._gather()
        self._nodes[node_id] = _Entry(change, done)

    def forget(self, node_id: str) -> None:
        """A new session begins, in which the agent tells everything anew: its earlier reports that
        still wait are not entered.
        """
        self._batches.pop(node_id, None)

    def _gather(self) -> None:
        if not self._wake.is_set():
            self._since_s = self._clock.monotonic_s()
            self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            self._wake.clear()
            begun_s = self._since_s
            nodes, self._nodes = self._nodes, {}
            waiting = [batch for batches in self._batches.values() for batch in batches]
            self._batches = {}
            while waiting or nodes:
                count = _fitting(waiting)
                batches, waiting = waiting[:count], waiting[count:]
                await self._commit(batches, nodes)
                nodes = {}
                STATUS_COMMIT_SECONDS.observe(self._clock.monotonic_s() - begun_s)

    async def _commit(self, batches: Sequence[_Batch], nodes: Mapping[str, _Entry]) -> None:
        """Goes on until the store has taken it: what agents reported is not lost by a store that
        cannot write for a while, they would only have to tell it again.
        """

        def apply(draft: Draft) -> Counter[str]:
            for node_id, entry in nodes.items():
                node = draft.get(Node, node_id)
                if node is not None and (after := entry.change(node, draft.now_ns)) is not node:
                    draft.put(after)
            return Counter(
                apply_report(draft, batch.node_id, report)
                for batch in batches
                for report in batch.reports
            )

        delay_s = RETRY_S_MIN
        while True:
            try:
                async with self._store.task_writer:
                    outcomes = await self._store.update(apply)
                break
            except (Stale, errors.Unavailable, errors.TimedOut, errors.Exhausted) as error:
                log.warning("reports_not_written", reason=error.message, retry_s=delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(RETRY_S_MAX, delay_s * 2)
        for outcome, count in outcomes.items():
            STATUSES.labels(outcome).inc(count)
        for done in [e.done for e in nodes.values()] + [b.done for b in batches]:
            if done is not None:
                done()


def _fitting(batches: Sequence[_Batch]) -> int:
    """How many of the batches go into one commit; at least one."""
    reports = 0
    for count, batch in enumerate(batches):
        reports += len(batch.reports)
        if reports > COMMIT_REPORTS_MAX and count:
            return count
    return len(batches)


def apply_report(draft: Draft, node_id: str, report: TaskReport) -> str:
    """Enters one report; says what became of it: applied, removed, same, unknown or illegal."""
    task = draft.get(Task, report.task_id)
    if task is None or task.node_id != node_id:
        return "unknown"
    if report.removed and task.desired_state == TaskState.REMOVE:
        draft.delete(Task, task.id)
        return "removed"
    status = report.status
    if status is None or status == task.status:
        return "same"
    before = task.status.state if task.status else TaskState.ASSIGNED
    if not may_follow(before, status.state):
        return "illegal"
    if status.state == before and task.status:
        earlier_ns = task.status.timestamp_ns - status.timestamp_ns
        if 0 < earlier_ns < CLOCK_STEP_NS:
            return "illegal"
    runs = status.state == TaskState.RUNNING
    draft.put(
        structs.replace(
            task,
            status=status,
            running_since_ns=task.running_since_ns or (draft.now_ns if runs else 0),
            host_ports=report.host_ports or task.host_ports,
            networks=_attached(task.networks, report.networks),
        )
    )
    return "applied"


def _attached(
    before: tuple[NetworkAttachment, ...], told: tuple[NetworkAttachment, ...]
) -> tuple[NetworkAttachment, ...]:
    """The task's networks with the addresses that the node gave it."""
    if not told:
        return before
    addresses = {n.network_id: n.addresses for n in told}
    if not before:
        return told
    return tuple(
        structs.replace(n, addresses=addresses.get(n.network_id) or n.addresses) for n in before
    )
