"""Tasks that crash again and again: what lists, inspections and progress say of their next try."""

from __future__ import annotations

import json
import time

import pytest
from msgspec.structs import replace

from swarm.v1 import (
    Kind,
    Meta,
    Network,
    NetworkAttachmentSpec,
    NetworkSpec,
    Service,
    ServiceRevision,
    Task,
    TaskState,
    TaskStatus,
)
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import SECOND_NS, ago_ns, node, service, task

NEXT_TRY = ("--format", "{{.Name}}: {{.CurrentState}} [{{.NextTry}}]")


def waiting(web: Service, *, crashes: int, wait_s: float, **more: object) -> Task:
    """The next task of a slot, which is not to start yet."""
    return Task(
        id="t2" + "c" * 23,
        meta=Meta(version=12, created_at_ns=ago_ns(4)),
        service_id=web.id,
        spec_version=2,
        slot=1,
        node_id="n1",
        desired_state=TaskState.READY,
        status=TaskStatus(state=TaskState.READY, timestamp_ns=ago_ns(3)),
        start_after_ns=time.time_ns() + round(wait_s * SECOND_NS),
        crashes=crashes,
        **more,  # type: ignore[arg-type]  # fields of a task
    )


@pytest.fixture
def web(cluster: FakeCluster) -> Service:
    cluster.add(node("alpha", id_="n1", leader=True))
    found: Service = cluster.add(service("web", replicas=1))
    cluster.add(
        task(
            found,
            "t1" + "c" * 23,
            slot=1,
            node_id="n1",
            state=TaskState.FAILED,
            desired=TaskState.SHUTDOWN,
            seconds=5,
            err="task: non-zero exit (1)",
        )
    )
    return found


def test_a_task_that_waits_after_crashes_backs_off(
    cluster: FakeCluster, cli: Cli, web: Service
) -> None:
    cluster.add(waiting(web, crashes=4, wait_s=98.5))
    out = cli.ok("service", "ps", "web", *NEXT_TRY).splitlines()
    assert out[0] in (
        "web.1: Backing off, next try in 1m39s [1m39s]",
        "web.1: Backing off, next try in 1m38s [1m38s]",
    )
    assert out[1].startswith(r" \_ web.1: Failed 5 seconds ago []")
    assert "Backing off, next try in 1m3" in cli.ok("node", "ps", "alpha")
    assert "Backing off, next try in 1m3" in cli.ok("task", "ls")


@pytest.mark.parametrize(
    ("crashes", "wait_s"),
    [(1, 30.0), (4, -1.0)],
    ids=["the usual delay after one crash", "the time has come"],
)
def test_other_tasks_that_are_ready_do_not_back_off(
    cluster: FakeCluster, cli: Cli, web: Service, crashes: int, wait_s: float
) -> None:
    cluster.add(waiting(web, crashes=crashes, wait_s=wait_s))
    [first, _] = cli.ok("service", "ps", "web", *NEXT_TRY).splitlines()
    assert first == "web.1: Ready 3 seconds ago []"


def test_inspect_tells_people_of_the_wait_and_machines_the_raw_fields(
    cluster: FakeCluster, cli: Cli, web: Service
) -> None:
    held = cluster.add(waiting(web, crashes=4, wait_s=60))
    cluster.revisions[web.id, 2] = ServiceRevision(spec=web.spec)
    shown = cli.ok("task", "inspect", "t2", "--pretty")
    assert "Name:               web.1\n" in shown
    assert "Node:               alpha (n1)\n" in shown
    assert "Desired state:      Ready\n" in shown
    assert "Current state:      Backing off, next try in " in shown
    assert "Crashes before it:  4 in a row\n" in shown
    [document] = json.loads(cli.ok("task", "inspect", held.id))
    assert document["Crashes"] == 4
    assert document["Status"]["State"] == "ready"
    assert document["StartAfter"].endswith("Z")


def test_inspect_names_the_networks_of_a_service(cluster: FakeCluster, cli: Cli) -> None:
    found = service("web")
    assert found.spec is not None and found.spec.task is not None
    joined = (NetworkAttachmentSpec(target="net1"), NetworkAttachmentSpec(target="gone"))
    spec = replace(found.spec, task=replace(found.spec.task, networks=joined))
    cluster.add(replace(found, spec=spec))
    cluster.objects[Kind.NETWORK].append(Network(id="net1", spec=NetworkSpec(name="front")))
    assert "Networks:       front gone\n" in cli.ok("service", "inspect", "web", "--pretty")
