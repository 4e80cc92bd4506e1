"""Attempts that a node refuses go on at another node at once.

Where a node cannot get at the registry, has no room on its disk, or its engine fails, the task is
not to blame: the slot's next attempt is made at once, without the restart delay, and counts neither
as a crash nor towards max_attempts; the scheduler leads it to nodes that have not refused the
version (scheduler/refusals.py). So it goes until each node that could take it has had a try. Then
it is an attempt that ended by itself like any other, for it would go round for ever: the delay, the
backoff and the attempts of the policy hold.

A task that has never run is tried elsewhere whatever the policy says, as no restart follows from
it; one that has run only if the policy restarts it. In services with one task a node there is no
elsewhere.
"""

from __future__ import annotations

from manager.control.nodes import replacement_version
from manager.control.slots import slot_of
from manager.control.template import restart_policy
from manager.control.work import Work
from manager.scheduler import PERHAPS, PERHAPS_MAX, Group, others_left, refused
from swarm import states
from swarm.v1 import StopCause, Task


def goes_elsewhere(work: Work, ended: Task) -> bool:
    """Whether the slot's next attempt is to be made at once on another node: the newest task of the
    slot has ended by itself, and it was a node's fault.
    """
    if not refused(ended) or work.mode.per_node or ended.stop_cause != StopCause.UNSPECIFIED:
        return False
    if not states.wanted(ended.desired_state):
        return False  # the slot was given up before
    policy = restart_policy(work.service.spec)
    if ended.running_since_ns and policy.condition == "none":
        return False
    if _was_tried_before(work, ended):
        return False
    version = replacement_version(work, ended)
    key = (ended.service_id, version)
    status = ended.status
    perhaps = status is not None and status.cause in PERHAPS
    if perhaps and len(work.table.refusing(key, work.now_ns)) >= PERHAPS_MAX:
        return False
    return work.once(("others left", version), lambda: _others_left(work, version))


def went_elsewhere(work: Work, ended: Task) -> bool:
    """Whether that has been done, or is about to be: then it is no failure of the service."""
    if not refused(ended):
        return False
    slot = work.slots[slot_of(ended)]
    after = slot[next(i for i, t in enumerate(slot) if t.id == ended.id) + 1 :]
    if not after:
        return states.wanted(ended.desired_state) and not work.mode.per_node
    return after[0].crashes <= ended.crashes


def _was_tried_before(work: Work, ended: Task) -> bool:
    """Whether the node had refused the version before the attempt was made: then all others had no
    room for it.
    """
    info = work.table.nodes.get(ended.node_id)
    if info is None or ended.meta is None:
        return True
    refusal = info.refusal((ended.service_id, ended.spec_version), work.now_ns)
    return refusal is not None and refusal.first_ns < ended.meta.created_at_ns


def _others_left(work: Work, version: int) -> bool:
    service_id = work.service.id
    need = work.table.requirement_of_version(service_id, version, work.draft)
    return others_left(work.table, Group(service_id, version, need, ()), work.now_ns)
