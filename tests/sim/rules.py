"""The rules that a run must keep, by name; README.md shows them, violations name them."""

from __future__ import annotations

from typing import Final

SAFETY: Final = {
    "legal-states": "a task's observed state only grows, as swarm.states.LEGAL says",
    "desired-grows": "a task's desired state only grows",
    "node-fixed": "a task that has its place keeps it",
    "forgotten": "a task goes only when its node says it is gone, or the node is gone",
    "resurrected": "a task or service that was forgotten never comes back",
    "place-open": "a place is given only on a node that is ready, active and in the cluster",
    "capacity": "no node has more claimed than it has: CPU, memory, GPUs, host ports",
    "leader-only": "tasks are made, placed and told to stop by the leader alone",
    "restart-delay": "a replacement does not start before it is due",
    "max-attempts": "no slot is tried more often than max_attempts allows",
    "budget": "a roll-out never takes down more slots than its parallelism",
    "paused": "a roll-out that is paused takes no slot down",
    "gang-whole": "a gang begins to run as a whole, when all of it is ready",
    "runs-twice": "a task runs once, on its own node",
    "slot-overlap": "tasks of a slot run beside each other only as the order allows",
    "host-capacity": "what runs on a machine fits it",
    "not-wanted": "nothing starts that was told to stop when its node was last told",
    "acked-write": "what the log has acknowledged is there after any crash, whole",
    "acked-call": "what a user was told is done, is done and stays",
    "acked-status": "a report that was acknowledged is in the log",
    "wrong-node": "a node is told of its own tasks alone",
    "to-removed": "a node that is not in the cluster is told nothing",
    "silent-node": "a node is down only when it was not heard for long",
    "defect": "nothing fails in a way that nobody expects, and no error is logged",
    "books": "what the store and the control loop remember agrees with the objects",
}
LIVENESS: Final = {
    "no-leader": "after the faults somebody leads",
    "node-lost": "after the faults every agent has its session, and its node is ready",
    "report-lost": "after the faults every node's reports are in the log",
    "stray": "after the faults nothing runs that the cluster does not want",
    "not-converged": "after the faults every service is as wanted, or says why not",
    "hangs": "after the faults no roll-out, removal or stop goes on for ever",
    "livelock": "nobody works without end",
}
RULES: Final = SAFETY | LIVENESS
