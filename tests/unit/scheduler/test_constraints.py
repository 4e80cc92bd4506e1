"""Constraints: Docker's semantics, and errors that say what to write."""

from __future__ import annotations

import pytest

from manager.scheduler import parse_constraint, parse_spread
from swarm import errors
from swarm.v1 import (
    EngineDescription,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeStatus,
    Platform,
)

NODE = Node(
    id="id1",
    spec=NodeSpec(labels={"zone": "A", "Rack": "r1"}, role=NodeRole.MANAGER),
    description=NodeDescription(
        hostname="Host-1",
        platform=Platform(os="linux", architecture="x86_64"),
        engine=EngineDescription(labels={"storage": "ssd"}),
    ),
    status=NodeStatus(addr="10.0.0.7"),
)
BARE = Node(id="id2")


@pytest.mark.parametrize(
    ("text", "matches", "bare"),
    [
        ("node.id == id1", True, False),
        ("node.id==ID1", True, False),
        ("node.id != id1", False, True),
        ("node.hostname == host-1", True, False),
        ("NODE.Hostname == host-1", True, False),
        ("node.hostname != host-1", False, True),
        ("node.role==manager", True, False),
        ("node.role == Worker", False, True),
        ("node.role != manager", False, True),
        ("node.labels.zone == a", True, False),
        ("node.labels.zone != a", False, True),
        ("node.labels.ZONE == a", False, False),
        ("Node.Labels.Rack == R1", True, False),
        ("node.labels.missing != x", True, True),
        ("engine.labels.storage == ssd", True, False),
        ("engine.labels.storage != ssd", False, True),
        ("node.platform.os == linux", True, False),
        ("node.platform.os != windows", True, True),
        ("node.platform.arch == x86_64", True, False),
        ("node.platform.arch == amd64", True, False),
        ("node.platform.arch == arm64", False, False),
        ("node.ip == 10.0.0.7", True, False),
        ("node.ip == 10.0.0.0/24", True, False),
        ("node.ip != 10.0.0.0/24", False, True),
        ("node.ip == 10.1.0.0/24", False, False),
        ("node.ip != 2001:db8::/32", True, True),
    ],
)
def test_matching(text: str, matches: bool, bare: bool) -> None:
    constraint = parse_constraint(text)
    assert constraint.matches(NODE) is matches
    assert constraint.matches(BARE) is bare


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node.role=manager", "expected one operator of ==, !="),
        ("node.role", "expected one operator of ==, !="),
        ("node.rolle == manager", "did you mean node.role?"),
        ("node.labels. == a", "unknown key"),
        ("== a", "key '' is not one of"),
        ("node.labels.zone ==", "is empty"),
        ("node.labels.zone == a>b", "has characters other than"),
        ("node.role == boss", "a role is manager or worker"),
        ("node.ip == here", "neither an address nor a network"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        parse_constraint(text)
    assert says in caught.value.message
    assert repr(text) in caught.value.message


def test_spread_takes_attributes_and_labels() -> None:
    assert parse_spread("node.labels.zone").of(NODE) == "A"
    assert parse_spread("engine.labels.storage").of(BARE) == ""
    with pytest.raises(errors.Invalid):
        parse_spread("zone")
