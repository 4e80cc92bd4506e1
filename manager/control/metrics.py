"""What the control loop counts. The collectors live in prometheus-client's default registry, which
the manager's metrics endpoint serves.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

TICK_SECONDS = Histogram(
    "swarm_control_tick_seconds",
    "Time to work out one tick of the control loop, without its commit.",
    buckets=_BUCKETS,
)
COMMIT_SECONDS = Histogram(
    "swarm_control_commit_seconds",
    "Time from the end of a tick until its changes were durable.",
    buckets=_BUCKETS,
)
COMMITS = Counter(
    "swarm_control_commits_total",
    "Commits of the control loop by what came of them.",
    ["result"],  # done, stale, unavailable
)
TASKS_PLACED = Counter("swarm_control_tasks_placed_total", "Tasks that were given a node.")
TASKS_PENDING = Gauge("swarm_control_tasks_pending", "Tasks that wait for a node.")
SERVICES_DIRTY = Gauge("swarm_control_services_dirty", "Services that wait to be looked at.")
RESYNCS = Counter(
    "swarm_control_resyncs_total", "Times the control loop read the whole state afresh."
)
DEFECTS = Counter(
    "swarm_control_defects_total",
    "Times a service could not be worked out, for a defect of swarmd's; its log says more.",
)
