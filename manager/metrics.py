"""What the cluster holds, by state, read from the store when somebody asks.

Counting costs about 0.1 µs a task and happens once a scrape, so nothing is kept up to date in
between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric

from manager.store import View
from swarm import states
from swarm.v1 import Node, NodeState, Service, Stack, Task


class ClusterCollector:
    """A prometheus_client collector over a view of the cluster."""

    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterable[Metric]:
        view = self._view
        node_states = Counter(n.status.state if n.status else 0 for n in view.all(Node))
        nodes = GaugeMetricFamily("swarm_cluster_nodes", "Nodes by state", labels=["state"])
        for node_state in NodeState:
            if node_state != NodeState.UNSPECIFIED:
                nodes.add_metric([node_state.name.lower()], node_states[node_state])
        yield nodes
        task_states = Counter(t.status.state if t.status else 0 for t in view.all(Task))
        tasks = GaugeMetricFamily(
            "swarm_cluster_tasks", "Tasks by observed state", labels=["state"]
        )
        for task_state in states.LEGAL:
            tasks.add_metric([states.label(task_state)], task_states[task_state])
        yield tasks
        for name, cls in (("services", Service), ("stacks", Stack)):
            yield GaugeMetricFamily(
                f"swarm_cluster_{name}", f"{name.capitalize()}", value=view.count(cls)
            )
