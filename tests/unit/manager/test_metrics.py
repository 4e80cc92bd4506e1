from prometheus_client import CollectorRegistry, generate_latest

from manager.metrics import ClusterCollector
from manager.store import Tables
from swarm.v1 import (
    Kind,
    Node,
    NodeState,
    NodeStatus,
    Service,
    ServiceSpec,
    Task,
    TaskState,
    TaskStatus,
)


def test_nodes_and_tasks_are_counted_by_state():
    tables = Tables()
    tables.apply(
        1,
        [
            (Kind.NODE, "n1", Node(id="n1", status=NodeStatus(state=NodeState.READY))),
            (Kind.NODE, "n2", Node(id="n2", status=NodeStatus(state=NodeState.DOWN))),
            (Kind.SERVICE, "s", Service(id="s", spec=ServiceSpec(name="web"))),
            (Kind.TASK, "t1", Task(id="t1", status=TaskStatus(state=TaskState.RUNNING))),
            (Kind.TASK, "t2", Task(id="t2", status=TaskStatus(state=TaskState.RUNNING))),
            (Kind.TASK, "t3", Task(id="t3", status=TaskStatus(state=TaskState.FAILED))),
        ],
    )
    registry = CollectorRegistry()
    registry.register(ClusterCollector(tables))
    text = generate_latest(registry).decode()
    for line in (
        'swarm_cluster_nodes{state="ready"} 1.0',
        'swarm_cluster_nodes{state="down"} 1.0',
        'swarm_cluster_tasks{state="running"} 2.0',
        'swarm_cluster_tasks{state="failed"} 1.0',
        'swarm_cluster_tasks{state="pending"} 0.0',
        "swarm_cluster_services 1.0",
        "swarm_cluster_stacks 0.0",
    ):
        assert line in text.splitlines()
