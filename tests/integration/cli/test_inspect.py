"""inspect, explain, events, info and version: Docker's JSON, and what people read."""

from __future__ import annotations

import base64
import json

import pytest
import yaml

from swarm.errors import NotManager
from swarm.v1 import (
    Config,
    ConfigSpec,
    ContainerSpec,
    Event,
    ExplainTaskResponse,
    FilterResult,
    GetInfoResponse,
    GetNodeInfoResponse,
    HealthConfig,
    IpamConfig,
    Kind,
    Meta,
    Network,
    NetworkSpec,
    NodeRole,
    Object,
    Replicated,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceRevision,
    ServiceSpec,
    TaskSpec,
    TaskState,
    UpdateConfig,
    UpdateState,
    UpdateStatus,
    WatchRequest,
)
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import node, service, status, task

TIME_NS = 1_795_254_292_946_163_064
TIME = "2026-11-21T09:44:52.946163064Z"


@pytest.fixture
def s2(cluster: FakeCluster) -> Service:
    found: Service = cluster.add(
        Service(
            id="9psiy1ki2phlvs0120dnx2aua",
            meta=Meta(version=159, created_at_ns=TIME_NS, updated_at_ns=TIME_NS),
            spec=ServiceSpec(
                name="s2",
                labels={"l": "1"},
                task=TaskSpec(
                    container=ContainerSpec(
                        image="busybox:latest",
                        init=False,
                        stop_grace_period_ns=10**9,
                        healthcheck=HealthConfig(test=("CMD", "true")),
                    ),
                    restart=RestartPolicy(condition="any", max_attempts=0),
                    docker_runtime="container",
                ),
                mode=ServiceMode(replicated=Replicated(replicas=0)),
                update=UpdateConfig(parallelism=1, monitor_ns=0, max_failure_ratio=0.0),
            ),
            spec_version=2,
            update_status=UpdateStatus(
                state=UpdateState.ROLLBACK_STARTED, started_at_ns=TIME_NS, message="manually"
            ),
        )
    )
    return found


def test_inspect_has_docker_s_shape(cli: Cli, cluster: FakeCluster, s2: Service) -> None:
    cluster.statuses[s2.id] = status(s2, 2, 2)
    [found] = json.loads(cli.ok("service", "inspect", "s2"))
    assert found == {
        "ID": s2.id,
        "Version": {"Index": 159},
        "CreatedAt": TIME,
        "UpdatedAt": TIME,
        "Spec": {
            "Name": "s2",
            "Labels": {"l": "1"},
            "TaskTemplate": {
                "ContainerSpec": {
                    "Image": "busybox:latest",
                    "Init": False,
                    "StopGracePeriod": 10**9,
                    "Healthcheck": {"Test": ["CMD", "true"]},
                },
                "RestartPolicy": {"Condition": "any", "MaxAttempts": 0},
                "ForceUpdate": 0,
                "Runtime": "container",
            },
            "Mode": {"Replicated": {"Replicas": 0}},
            "UpdateConfig": {"Parallelism": 1, "Monitor": 0, "MaxFailureRatio": 0},
        },
        "Endpoint": {"Spec": {}},
        "UpdateStatus": {"State": "rollback_started", "StartedAt": TIME, "Message": "manually"},
        "ServiceStatus": {"RunningTasks": 2, "DesiredTasks": 2, "CompletedTasks": 0},
    }


def test_inspect_takes_formats(cli: Cli, s2: Service) -> None:
    assert (
        cli.ok("service", "inspect", "s2", "--format", "{{.Spec.Mode.Replicated.Replicas}}")
        == "0\n"
    )
    assert cli.ok("service", "inspect", "s2", "--format", "{{json .Spec.Labels}}") == '{"l":"1"}\n'
    assert cli.ok("service", "inspect", "s2", "--format", "<{{.PreviousSpec.Name}}>") == "<>\n"
    assert json.loads(cli.ok("service", "inspect", "9psi", "--format", "json"))["ID"] == s2.id
    assert yaml.safe_load(cli.ok("service", "inspect", "s2", "--format", "yaml"))[0]["ID"] == s2.id
    answer = cli("service", "inspect", "s2", "--format", "{{.Spce}}")
    assert answer.code == 2 and "did you mean 'Spec'?" in answer.err


def test_inspecting_several_shows_those_that_exist(cli: Cli, s2: Service) -> None:
    answer = cli("service", "inspect", "nope", "s2", "neither")
    assert [item["ID"] for item in json.loads(answer.out)] == [s2.id]
    assert answer.code == 4
    assert answer.err == "Error: service nope not found\nError: service neither not found\n"
    assert cli("service", "inspect", "nope").out == "[]\n"


def test_pretty_service_and_node(cli: Cli, cluster: FakeCluster, s2: Service) -> None:
    out = cli.ok("service", "inspect", "--pretty", "s2")
    assert out.startswith(
        "ID:             9psiy1ki2phlvs0120dnx2aua\nName:           s2\nLabels:\n l=1\n"
    )
    assert "Service Mode:   Replicated\n Replicas:      0\n" in out
    assert " Image:         busybox:latest\n" in out
    cluster.add(node("alpha", id_="n1", leader=True))
    out = cli.ok("node", "inspect", "--pretty", "self")
    assert out.startswith("ID:                     n1\nHostname:               alpha\n")
    assert " Leader:                Yes\n" in out


def test_a_task_shows_the_spec_it_runs(cli: Cli, cluster: FakeCluster, s2: Service) -> None:
    found = cluster.add(task(s2, "t1", slot=1, node_id="n1"))
    cluster.revisions[(s2.id, found.spec_version)] = ServiceRevision(id="r", spec=s2.spec)
    [shown] = json.loads(cli.ok("task", "inspect", "t1"))
    assert shown["Spec"]["ContainerSpec"]["Image"] == "busybox:latest"
    assert (shown["Slot"], shown["DesiredState"], shown["Status"]["State"]) == (
        1,
        "running",
        "running",
    )
    assert shown["Status"]["PortStatus"] == {}


def test_config_data_is_base64_and_in_clear_when_pretty(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(Config(id="c", meta=Meta(), spec=ConfigSpec(name="conf", data=b"hello\n")))
    [found] = json.loads(cli.ok("config", "inspect", "conf"))
    assert base64.b64decode(found["Spec"]["Data"]) == b"hello\n"
    assert cli.ok("config", "inspect", "--pretty", "conf").endswith("Data:\nhello\n\n")


def test_networks_have_the_engine_s_shape(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(
        Network(
            id="n",
            meta=Meta(created_at_ns=TIME_NS),
            spec=NetworkSpec(name="front", scope="swarm"),
            ipam=(IpamConfig(subnet="10.0.1.0/24", gateway="10.0.1.1"),),
        )
    )
    [found] = json.loads(cli.ok("network", "inspect", "front"))
    assert (found["Id"], found["Created"], found["Driver"]) == ("n", TIME, "overlay")
    assert found["IPAM"]["Config"] == [{"Subnet": "10.0.1.0/24", "Gateway": "10.0.1.1"}]


# ------------------------------------------------------------------ explain


def test_explain_shows_each_filter(cli: Cli, cluster: FakeCluster) -> None:
    cluster.explanation = ExplainTaskResponse(
        summary="no suitable node: 2 nodes short of memory, 1 node drained",
        nodes_total=3,
        filters=(
            FilterResult(
                filter="resources",
                detail="memory",
                nodes=2,
                needed=512 << 20,
                best=384 << 20,
                best_node="n3",
                message="2 nodes short of memory",
            ),
            FilterResult(filter="availability", nodes=1, message="1 node drained"),
        ),
        never=True,
        hint="Lower reservations.memory, or add a node.",
    )
    assert cli.ok("task", "explain", "t1") == (
        "no suitable node: 2 nodes short of memory, 1 node drained\n\n"
        "FILTER               NODES OUT   NEEDED    BEST FREE       REASON\n"
        "resources (memory)   2           512 MiB   384 MiB on n3   2 nodes short of memory\n"
        "availability         1                                     1 node drained\n\n"
        "0 of 3 nodes fit now, and none could later: not even if it were empty and ready.\n\n"
        "Lower reservations.memory, or add a node.\n"
    )
    assert cli.ok("task", "explain", "t1", "--format", "{{.NodesTotal}}") == "3\n"


# ------------------------------------------------------------------ events


def test_events_read_as_docker_s(cli: Cli, cluster: FakeCluster) -> None:
    before, after = service("web", id_="w", replicas=2), service("web", id_="w", replicas=5)
    ran = task(after, "t1", slot=1, node_id="n1", state=TaskState.RUNNING)
    cluster.events = [
        Event(
            action="update",
            kind=Kind.SERVICE,
            object=Object(service=after),
            old=Object(service=before),
            time_ns=TIME_NS,
            revision=9,
        ),
        Event(
            action="create", kind=Kind.TASK, object=Object(task=ran), time_ns=TIME_NS, revision=9
        ),
    ]
    assert cli.ok("events") == (
        f"{TIME} service update w (name=web, replicas.new=5, replicas.old=2)\n"
        f"{TIME} task create t1 (desired=running, node=n1, service=w, slot=1, state=running)\n"
    )
    first = json.loads(cli.ok("events", "--format", "json").splitlines()[0])
    assert first["Type"] == "service" and first["Actor"]["Attributes"]["replicas.new"] == "5"
    assert cli.ok("events", "--format", "{{.Action}} {{.Actor.ID}}") == "update w\ncreate t1\n"


def test_events_of_the_past_say_who_asked_and_what_is_missing(
    cli: Cli, cluster: FakeCluster
) -> None:
    cluster.events = [
        Event(
            action="create",
            kind=Kind.SERVICE,
            object=Object(service=service("web", id_="w", replicas=2)),
            time_ns=TIME_NS,
            revision=9,
            who="admin ada",
        )
    ]
    cluster.kept_from_ns = TIME_NS
    answer = cli("events", "--since", "10m", "--until", "2030-01-01")
    assert answer.out == f"{TIME} service create w (name=web, who=admin ada)\n"
    assert "Warning: changes before 2026" in answer.err and "swarm audit" in answer.err
    request = cluster.last(WatchRequest)
    assert request.until_ns == 1_893_456_000_000_000_000
    assert request.until_ns - request.since_ns > 0


# ------------------------------------------------------------------ info and version


def test_info_of_a_manager(cli: Cli, cluster: FakeCluster) -> None:
    cluster.node = GetNodeInfoResponse(
        node_id="n1",
        state="active",
        role=NodeRole.MANAGER,
        control_available=True,
        hostname="h1",
        warnings=("no cgroups",),
    )
    cluster.info = GetInfoResponse(
        cluster_id="c1", nodes=3, nodes_ready=2, manager_addrs=("a:2377",)
    )
    answer = cli("info")
    assert " Is Manager: true\n" in answer.out and " Nodes: 3 (2 ready)\n" in answer.out
    assert answer.err == "Warning: no cgroups\n"
    assert (
        cli.ok("info", "--format", "{{.Swarm.LocalNodeState}} {{.Swarm.Cluster.ID}}")
        == "active c1\n"
    )


def test_info_without_a_cluster(cli: Cli, cluster: FakeCluster) -> None:
    cluster.node = GetNodeInfoResponse(state="inactive", hostname="h1")
    out = cli.ok("info")
    assert "Swarm: inactive" in out and "ClusterID" not in out
    cluster.node = GetNodeInfoResponse(state="active", control_available=True, node_id="n")
    cluster.failures["get_info"] = [NotManager("x")]
    assert "NodeID: n" in cli.ok("info")


def test_version_shows_the_client_without_a_server(cli: Cli, cluster: FakeCluster) -> None:
    from cli.main import run

    assert "Server:\n Version:          0.1.0" in cli.ok("version")
    cli._capfd.readouterr()
    assert run(["--host", "unix:///nowhere/s", "version"]) == 9
    captured = cli._capfd.readouterr()
    assert captured.out.startswith("Client:\n Version:") and captured.err.startswith(
        "Error: no swarmd"
    )
    assert cli.ok("version", "--format", "{{.Server.Version}}") == "0.1.0\n"
