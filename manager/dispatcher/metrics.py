"""What the dispatcher counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

SESSIONS = Gauge("swarm_dispatcher_sessions", "Agents with a session on this manager")
SESSIONS_ENDED = Counter(
    "swarm_dispatcher_sessions_ended_total", "Sessions that ended, by reason", ("reason",)
)
HEARTBEATS = Counter("swarm_dispatcher_heartbeats_total", "Heartbeats received")
HEARTBEATS_MISSED = Counter(
    "swarm_dispatcher_heartbeats_missed_total", "Nodes given up after three missed heartbeats"
)
HEARTBEAT_PERIOD = Gauge(
    "swarm_dispatcher_heartbeat_period_seconds", "How often agents are told to send a heartbeat"
)
ASSIGNMENTS = Counter(
    "swarm_dispatcher_assignments_total", "Tasks sent to agents, new and changed ones"
)
STATUSES = Counter(
    "swarm_dispatcher_statuses_total",
    "Task reports from agents, by what became of them",
    ("outcome",),
)
STATUS_COMMIT_SECONDS = Histogram(
    "swarm_dispatcher_status_commit_seconds",
    "Time from the first report of a batch until the batch was committed",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
RELAYS = Gauge("swarm_dispatcher_relays", "Streams of logs, exec and stats that are open")
