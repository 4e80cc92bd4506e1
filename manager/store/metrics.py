"""What the store tells Prometheus."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

COMMIT_SECONDS: Final = Histogram(
    "swarm_store_commit_seconds",
    "From a commit's start until it is durable and applied",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
COMMITS: Final = Counter("swarm_store_commits_total", "Commits by outcome", ["outcome"])
COMMITTED: Final = COMMITS.labels("committed")
STALE: Final = COMMITS.labels("stale")
FAILED: Final = COMMITS.labels("failed")
CHANGES: Final = Counter("swarm_store_changes_total", "Objects created, changed and removed")
REVISION: Final = Gauge("swarm_store_revision", "The last commit that this manager holds")
WATCHES: Final = Gauge("swarm_store_watches", "Open watches")
WATCHES_LOST: Final = Counter(
    "swarm_store_watches_lost_total", "Watches ended because their reader fell behind"
)
