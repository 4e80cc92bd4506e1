"""Whose turn it is: the order in which groups that wait are given nodes. Pure.

    higher priority first > services before jobs > services: who has waited longest
                                                 > jobs: the queue with the lowest fair share, in it
                                                   the oldest job

Fair shares change with each task that is placed, so the order is asked for one turn at a time
(`next`), and a job gets only so many tasks at a turn as bring its queue level with the next one
(progressive filling, as in dominant resource fairness: Ghodsi et al., NSDI 2011, section 4). Levels
need not be met to the task: a turn gives at least STEP of the cluster, so that a cluster of any
size is filled in some hundred turns.

Cost: O(groups log groups), and the queues that wait once a turn.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from manager.scheduler.queues import DEFAULT_QUEUE, SHARE_WHOLE
from swarm.v1 import Service, ServiceSpec

GroupKey = tuple[str, int, str]
"""Service id, spec_version, and the node of tasks that may go to one only."""

Place = tuple[int, bool, int, str, GroupKey]

STEP = SHARE_WHOLE // 100


@dataclass(frozen=True, slots=True)
class Terms:
    """What a service's present spec says about its turn. All of its tasks have it, whatever their
    version: a priority that is raised is raised for what runs already.
    """

    priority: int = 0
    job: bool = False
    queue: str = DEFAULT_QUEUE
    gang: bool = False
    timeout_ns: int = 0


def terms_of(spec: ServiceSpec | None) -> Terms:
    """The terms of a spec; of none: a service without a priority."""
    if spec is None:
        return Terms()
    mode = spec.mode
    runs_out = mode is not None and (mode.replicated_job or mode.global_job) is not None
    if not runs_out:
        return Terms(priority=spec.priority)
    job = spec.job
    if job is None:
        return Terms(priority=spec.priority, job=True)
    return Terms(
        priority=spec.priority,
        job=True,
        queue=job.queue or DEFAULT_QUEUE,
        gang=job.gang,
        timeout_ns=job.timeout_ns,
    )


def job_since_ns(service: Service) -> int:
    """Since when a job waits: since it was made, or asked to run anew."""
    status = service.job_status
    if service.job_iteration and status is not None and status.queued_at_ns:
        return status.queued_at_ns
    return service.meta.created_at_ns if service.meta is not None else 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A group that waits. `since_ns`: of a job when it was queued, otherwise since when the oldest
    of its tasks waits.
    """

    key: GroupKey
    terms: Terms
    since_ns: int
    name: str

    @property
    def place(self) -> Place:
        """Sorts turns, fair shares aside; no two are equal. Names come before ids, which are drawn
        by lot.
        """
        return (-self.terms.priority, self.terms.job, self.since_ns, self.name, self.key)


def job_turn(service: Service) -> Turn:
    """The turn of a job as a whole, among other jobs."""
    return Turn(
        key=(service.id, 0, ""),
        terms=terms_of(service.spec),
        since_ns=job_since_ns(service),
        name=service.spec.name if service.spec is not None else "",
    )


class Ranking:
    """The turns that are still to be had."""

    def __init__(self, turns: Iterable[Turn], share: Callable[[str], int]) -> None:
        """`share`: a queue's fair share as it is when asked."""
        self._share = share
        # Last first, so that the next one is popped.
        self._left = sorted(turns, key=lambda t: t.place, reverse=True)
        # Of the priority whose jobs have their turns: by queue, last first; and the queues.
        self._jobs: dict[str, list[Turn]] = {}
        self._queues: list[tuple[int, str]] = []

    def next(self) -> Turn | None:
        """The next turn; None: there is none."""
        if not self._jobs:
            if not self._left:
                return None
            turn = self._left.pop()
            if not turn.terms.job:
                return turn
            self._open(turn)
        while True:
            share, queue = heapq.heappop(self._queues)
            now = self._share(queue)
            if now == share:
                break
            heapq.heappush(self._queues, (now, queue))
        turns = self._jobs[queue]
        turn = turns.pop()
        if turns:
            heapq.heappush(self._queues, (share, queue))
        else:
            del self._jobs[queue]
        return turn

    def _open(self, first: Turn) -> None:
        """All jobs of the priority get their turns; services of it have had theirs."""
        turns = [first]
        while self._left and self._left[-1].terms.priority == first.terms.priority:
            turns.append(self._left.pop())
        for turn in reversed(turns):
            self._jobs.setdefault(turn.terms.queue, []).append(turn)
        self._queues = [(self._share(queue), queue) for queue in self._jobs]
        heapq.heapify(self._queues)

    def again(self, turn: Turn) -> None:
        """The job of the turn that was just had is not through: it stays the first of its queue."""
        turns = self._jobs.setdefault(turn.terms.queue, [])
        if not turns:
            heapq.heappush(self._queues, (self._share(turn.terms.queue), turn.terms.queue))
        turns.append(turn)

    def at_most(self, turn: Turn, each: int) -> int | None:
        """How many tasks, each so much of a share, the turn that was just had may place before
        another queue is next; None: no other queue waits.
        """
        queue = turn.terms.queue
        others = [self._share(q) for q in self._jobs if q != queue]
        if not turn.terms.job or not others:
            return None
        distance = max(STEP, min(others) - self._share(queue))
        return max(1, distance // max(1, each))
