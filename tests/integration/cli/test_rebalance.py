"""`service rebalance` and `node rebalance`: what they ask, show, wait for and end with."""

from __future__ import annotations

import json

import msgspec
import pytest

from swarm.errors import Invalid
from swarm.v1 import (
    Event,
    Kind,
    Object,
    PlannedMove,
    RebalanceRequest,
    RebalanceResponse,
    RebalanceStatus,
    Service,
)
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import node, service

MOVES = tuple(
    PlannedMove(task_id="t" * 24 + str(i), name=f"web.{i}", from_node_id="n1", to_node_id="n2")
    for i in (1, 2)
)


def with_status(of: Service, *, running: bool, moved: int = 0, message: str = "") -> Service:
    status = RebalanceStatus(running=running, started_at_ns=5, moved=moved, message=message)
    return msgspec.structs.replace(of, rebalance_status=status)


def planned(cluster: FakeCluster, *after: Service, service_id: str = "w1") -> None:
    """Two tasks are to move, and the service then becomes what follows."""
    cluster.add(node("alpha", id_="n1"))
    cluster.add(node("beta", id_="n2"))
    cluster.rebalanced = RebalanceResponse(moves=MOVES, service_ids=(service_id,))
    cluster.watch_events = [
        Event(action="update", kind=Kind.SERVICE, object=Object(service=one), revision=i + 1)
        for i, one in enumerate(after)
    ]


TABLE = [
    ["TASK", "ID", "FROM", "TO"],
    ["web.1", "t" * 12, "alpha", "beta"],
    ["web.2", "t" * 12, "alpha", "beta"],
]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("service", "rebalance", "web"), RebalanceRequest(service="web", dry_run=True)),
        (("node", "rebalance", "alpha"), RebalanceRequest(node="alpha", dry_run=True)),
    ],
)
def test_a_dry_run_shows_the_moves_and_does_not_wait(
    cli: Cli, cluster: FakeCluster, words: tuple[str, ...], asked: RebalanceRequest
) -> None:
    planned(cluster)
    answer = cli(*words, "--dry-run")
    assert (answer.code, answer.err) == (0, "")
    assert [line.split() for line in answer.out.splitlines()] == TABLE
    assert cluster.last(RebalanceRequest) == asked
    row = json.loads(cli.ok(*words, "--dry-run", "--format", "json").splitlines()[0])
    assert (row["Task"], row["From"], row["To"]) == ("web.1", "alpha", "beta")
    assert row["TaskID"] == MOVES[0].task_id


def test_a_rebalance_is_followed_to_its_end(cli: Cli, cluster: FakeCluster) -> None:
    web = cluster.add(with_status(service("web", id_="w1"), running=True))
    planned(
        cluster,
        with_status(web, running=True, message="moving web.1 from alpha to beta"),
        with_status(web, running=True, message="moving web.1 from alpha to beta"),
        with_status(web, running=True, moved=1, message="moving web.2 from alpha to beta"),
        with_status(web, running=False, moved=2, message="no move makes it better"),
    )
    answer = cli("service", "rebalance", "web")
    assert answer.code == 0
    assert [line.split() for line in answer.out.splitlines()] == TABLE
    assert answer.err.splitlines() == [
        "web: moving web.1 from alpha to beta (0 moved)",
        "web: moving web.2 from alpha to beta (1 moved)",
        "web: 2 tasks moved; no move makes it better",
    ]
    quiet = cli("service", "rebalance", "-q", "web")
    assert quiet.err == "web: 2 tasks moved; no move makes it better\n"


def test_detached_it_is_only_asked_for(cli: Cli, cluster: FakeCluster) -> None:
    planned(cluster)
    answer = cli("node", "rebalance", "-d", "alpha")
    assert (answer.code, answer.err) == (0, "")
    assert cluster.last(RebalanceRequest) == RebalanceRequest(node="alpha")


def test_where_nothing_is_to_move_that_is_said(cli: Cli, cluster: FakeCluster) -> None:
    cluster.rebalanced = RebalanceResponse(service_ids=("w1",))
    assert cli.ok("service", "rebalance", "web") == (
        "No task is to move: no move makes it better.\n"
    )


def test_the_deadline_leaves_it_going_and_says_so(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(with_status(service("web", id_="w1"), running=True))
    planned(cluster)
    answer = cli("service", "rebalance", "--timeout", "200ms", "web")
    assert answer.code == 6
    assert "Error: service 'web' not rebalanced within 200ms\nThe rebalance goes on" in answer.err


def test_a_service_that_is_removed_meanwhile_is_told(cli: Cli, cluster: FakeCluster) -> None:
    planned(cluster)
    answer = cli("service", "rebalance", "web")
    assert (answer.code, answer.err) == (4, "Error: service 'w1' was removed meanwhile\n")


def test_a_refusal_comes_through(cli: Cli, cluster: FakeCluster) -> None:
    cluster.failures["rebalance"] = [Invalid("it has one task on each node")]
    answer = cli("service", "rebalance", "all")
    assert (answer.code, answer.out) == (2, "") and "one task on each node" in answer.err
