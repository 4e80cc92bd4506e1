"""Where tasks run, as the command line says and shows it."""

from __future__ import annotations

import json

import pytest
from msgspec import structs

from swarm.v1 import (
    Cluster,
    ClusterSpec,
    CreateRequest,
    Kind,
    Placement,
    PlacementPreference,
    QueueSpec,
    RebalanceConfig,
    SchedulingConfig,
    Service,
    ServiceSpec,
    UpdateRequest,
)
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import service


@pytest.fixture
def web(cluster: FakeCluster) -> Service:
    found = service("web", replicas=2)
    cluster.add(found)
    return found


def placement_sent(cluster: FakeCluster, kind: type) -> Placement:
    """What the last request of the kind says; a later one begins from it."""
    spec: ServiceSpec = cluster.last(kind).spec.service
    assert spec.task is not None and spec.task.placement is not None
    if found := cluster.objects[Kind.SERVICE]:
        found[0] = structs.replace(found[0], spec=spec)
    return spec.task.placement


def test_create_sends_constraints_preferences_and_strategy(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok(
        *("service", "create", "-d", "--constraint", " node.labels.zone in (a, b) "),
        *("--constraint", "node.gpu.memory >= 40GiB"),
        *("--placement-pref", "spread=node.labels.zone"),
        *("--placement-pref", "affinity=node.labels.disk in (ssd, nvme),weight=10"),
        *("--placement-pref", "weight=-5,affinity=service.name == db"),
        *("--placement-pref", "affinity=stack.name == shop"),
        *("--placement-strategy", "binpack", "busybox"),
    )
    assert placement_sent(cluster, CreateRequest) == Placement(
        constraints=("node.labels.zone in (a, b)", "node.gpu.memory >= 40GiB"),
        preferences=(
            PlacementPreference(spread="node.labels.zone"),
            PlacementPreference(affinity="node.labels.disk in (ssd, nvme)", weight=10),
            PlacementPreference(affinity="service.name == db", weight=-5),
            PlacementPreference(affinity="stack.name == shop", weight=1),
        ),
        strategy="binpack",
    )


def test_update_replaces_an_affinity_with_another_weight_and_removes_it(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    first = "affinity=node.labels.disk == ssd,weight=10"
    cli.ok("service", "update", "-d", "--placement-pref-add", first, "web")
    assert len(placement_sent(cluster, UpdateRequest).preferences) == 1
    cli.ok(
        *("service", "update", "-d", "--placement-pref-add"),
        *("affinity=node.labels.disk==ssd,weight=20", "--placement-strategy", "spread", "web"),
    )
    assert placement_sent(cluster, UpdateRequest) == Placement(
        preferences=(PlacementPreference(affinity="node.labels.disk==ssd", weight=20),),
        strategy="spread",
    )
    cli.ok(
        *("service", "update", "-d", "--placement-pref-rm", "affinity=node.labels.disk == ssd"),
        *("--placement-strategy", "default", "web"),
    )
    assert placement_sent(cluster, UpdateRequest) == Placement()


def test_inspect_shows_placement(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cli.ok(
        *("service", "update", "-d", "--constraint-add", "node.labels.zone not in (a, b)"),
        *("--placement-pref-add", "spread=node.labels.zone"),
        *("--placement-pref-add", "affinity=service.name != db,weight=7"),
        *("--placement-strategy", "binpack", "web"),
    )
    placement_sent(cluster, UpdateRequest)
    [document] = json.loads(cli.ok("service", "inspect", "web"))
    assert document["Spec"]["TaskTemplate"]["Placement"] == {
        "Constraints": ["node.labels.zone not in (a, b)"],
        "Preferences": [
            {"Spread": {"SpreadDescriptor": "node.labels.zone"}},
            {"Affinity": {"Condition": "service.name != db", "Weight": 7}},
        ],
        "Strategy": "binpack",
    }
    pretty = " ".join(cli.ok("service", "inspect", "--pretty", "web").split())
    assert "Constraints: node.labels.zone not in (a, b)" in pretty
    assert "Preferences: spread=node.labels.zone" in pretty
    assert "Affinity: service.name != db (weight 7)" in pretty
    assert "Strategy: binpack" in pretty


def scheduling_sent(cluster: FakeCluster) -> SchedulingConfig | None:
    spec: ClusterSpec = cluster.last(UpdateRequest).spec.cluster
    cluster.cluster = Cluster(id="c1", meta=cluster.cluster.meta, spec=spec)
    cluster.objects[Kind.CLUSTER] = [cluster.cluster]
    return spec.scheduling


def test_swarm_update_sets_how_the_scheduler_chooses(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok("swarm", "update", "--task-history-limit", "3")
    assert scheduling_sent(cluster) is None
    cli.ok("swarm", "update", "--placement-strategy", "binpack", "--gpu-policy", "packing")
    assert scheduling_sent(cluster) == SchedulingConfig(strategy="binpack", gpu_policy="packing")
    cli.ok("swarm", "update", "--rebalance-after", "2m", "--gpu-policy", "default")
    minutes = RebalanceConfig(quiet_ns=120 * 10**9)
    assert scheduling_sent(cluster) == SchedulingConfig(strategy="binpack", rebalance=minutes)
    cli.ok("swarm", "update", "--rebalance")
    assert scheduling_sent(cluster) == SchedulingConfig(strategy="binpack", rebalance=minutes)
    [document] = json.loads(cli.ok("swarm", "inspect"))
    assert document["Spec"]["Scheduling"] == {
        "Strategy": "binpack",
        "Rebalance": {"Quiet": 120 * 10**9},
    }
    cli.ok("swarm", "update", "--no-rebalance")
    assert scheduling_sent(cluster) == SchedulingConfig(strategy="binpack")
    answer = cli("swarm", "update", "--no-rebalance", "--rebalance-after", "1m")
    assert answer.code == 2
    assert "--rebalance-after exclude each other" in answer.err


def test_swarm_update_leaves_queues_alone(cli: Cli, cluster: FakeCluster) -> None:
    queues = (QueueSpec(name="ml", weight=3, gpu_nano=4 * 10**9),)
    cluster.objects[Kind.CLUSTER] = [
        Cluster(
            id="c1",
            meta=cluster.cluster.meta,
            spec=ClusterSpec(name="default", scheduling=SchedulingConfig(queues=queues)),
        )
    ]
    cli.ok("swarm", "update", "--gpu-policy", "best-fit")
    assert scheduling_sent(cluster) == SchedulingConfig(gpu_policy="best-fit", queues=queues)
    assert cli.ok("swarm", "inspect", "--format", "{{.Spec.Scheduling.GPUPolicy}}") == "best-fit\n"
