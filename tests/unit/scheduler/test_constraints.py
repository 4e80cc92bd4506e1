"""Constraints: Docker's semantics, and errors that say what to write."""

from __future__ import annotations

import pytest

from manager.scheduler import Neighbour, neighbour_of, parse_constraint, parse_spread
from manager.scheduler.constraints import lenient_constraint
from swarm import errors
from swarm.v1 import (
    EngineDescription,
    Gpu,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeStatus,
    Platform,
    Service,
    ServiceSpec,
)

GIB = 1 << 30

NODE = Node(
    id="id1",
    spec=NodeSpec(labels={"zone": "A", "Rack": "r1", "tier": "10"}, role=NodeRole.MANAGER),
    description=NodeDescription(
        hostname="Host-1",
        platform=Platform(os="linux", architecture="x86_64"),
        engine=EngineDescription(labels={"storage": "ssd", "cores": "2.5"}),
        runtimes=("runc", "process"),
        gpus=(
            Gpu(
                uuid="g0",
                model="NVIDIA A100-SXM4-40GB",
                memory_bytes=40 * GIB,
                compute_capability="8.0",
                healthy=True,
            ),
            Gpu(uuid="g1", model="Tesla T4", memory_bytes=16 * GIB, compute_capability="7.5"),
            Gpu(uuid="g2", model="NVIDIA H100", memory_bytes=80 * GIB, healthy=True),
            Gpu(
                uuid="g3",
                model="NVIDIA H100 MIG 1g.10gb",
                memory_bytes=10 * GIB,
                compute_capability="9.0",
                parent_uuid="g2",
                healthy=True,
            ),
        ),
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
        ("node.labels.zone in (a, b)", True, False),
        ("node.labels.zone IN(b,A)", True, False),
        ("node.labels.zone not in (a, b)", False, True),
        ("node.labels.zone not  in (b, c)", True, True),
        ("node.role in (manager)", True, False),
        ("node.ip in (10.1.0.0/16, 10.0.0.0/24)", True, False),
        ("node.ip not in (10.1.0.0/16, 10.0.0.0/24)", False, True),
        ("node.platform.arch in (arm64, x86_64)", True, False),
        ("node.labels.tier < 9", False, False),
        ("node.labels.tier > 9", True, False),
        ("node.labels.tier >= 10.0", True, False),
        ("node.labels.tier<=-1", False, False),
        ("node.labels.zone > 1", False, False),
        ("engine.labels.cores < 2.75", True, False),
        ("node.hostname =~ host-[0-9]", True, False),
        ("node.hostname =~ host", False, False),
        ("node.labels.zone =~ a|b", True, False),
        ("node.labels.zone =~ a?", True, True),
        ("node.labels.zone =~ .+", True, False),
        ("node.ip =~ 10\\..*", True, False),
        ("node.runtime == RUNC", True, False),
        ("node.runtime != process", False, True),
        ("node.runtime in (kata, process)", True, False),
        ("node.gpu.model == a100", True, False),
        ("node.gpu.model == A10", False, False),
        ("node.gpu.model == A10|T4", True, False),
        ("node.gpu.model != t4", False, True),
        ("node.gpu.model in (L4, T4)", True, False),
        ("node.gpu.model =~ .*a[0-9]+.*", True, False),
        ("node.gpu.memory >= 40GiB", True, False),
        ("node.gpu.memory > 40GiB", False, False),
        ("node.gpu.memory == 16g", True, False),
        ("node.gpu.memory in (10g, 11g)", True, False),
        ("node.gpu.capability >= 8.6", True, False),
        ("node.gpu.capability > 9", False, False),
        ("node.gpu.capability == 9", True, False),
        ("node.gpu.capability < 7.5", False, False),
        ("node.gpu.count == 2", True, False),
        ("node.gpu.count >= 3", False, False),
        ("node.gpu.count == 0", False, True),
        ("node.gpu.count < 4", True, True),
        # About who else is there: nothing that the node itself could speak against.
        ("service.name == db", True, True),
        ("stack.name != shop", True, True),
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
        ("== a", "unknown key ''; accepted are node.id"),
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
    with pytest.raises(errors.Invalid):
        parse_spread("service.name")


def test_spread_joins_several_values() -> None:
    assert parse_spread("node.runtime").of(NODE) == "process+runc"
    assert parse_spread("node.gpu.count").of(NODE) == "2"
    assert parse_spread("node.gpu.capability").of(NODE) == "7.5+8.0+9.0"
    assert parse_spread("node.gpu.model").of(BARE) == ""


def _service(name: str, stack: str = "", **labels: str) -> Neighbour:
    if stack:
        labels["com.docker.stack.namespace"] = stack
    return neighbour_of(Service(id=name, spec=ServiceSpec(name=name, labels=labels)))


SHOP_DB = _service("shop_db", "shop", tier="3")
CACHE = _service("cache", tier="1")


@pytest.mark.parametrize(
    ("text", "db", "cache", "both", "nobody"),
    [
        ("service.name == SHOP_DB", True, False, True, False),
        ("service.name != shop_db", False, True, False, True),
        ("service.name in (cache, shop_db)", True, True, True, False),
        ("service.name not in (cache, x)", True, False, False, True),
        ("service.name =~ shop_.*", True, False, True, False),
        ("stack.name == shop", True, False, True, False),
        ("stack.name != shop", False, True, False, True),
        ("service.labels.tier > 2", True, False, True, False),
        ("service.labels.tier == 1", False, True, True, False),
        ("service.labels.none != 1", True, True, True, True),
    ],
)
def test_conditions_on_services(
    text: str, *, db: bool, cache: bool, both: bool, nobody: bool
) -> None:
    constraint = parse_constraint(text)
    assert constraint.of_tasks
    assert constraint.holds_among([SHOP_DB]) is db
    assert constraint.holds_among([CACHE]) is cache
    assert constraint.holds_among([SHOP_DB, CACHE]) is both
    assert constraint.holds_among([]) is nobody
    assert constraint.means(SHOP_DB) is (db != constraint.negated)


def test_a_condition_on_nodes_means_no_service() -> None:
    constraint = parse_constraint("node.labels.zone != a")
    assert not constraint.of_tasks
    assert not constraint.means(SHOP_DB)


def test_stored_text_that_cannot_be_read_holds_nowhere() -> None:
    constraint = lenient_constraint("node.zone ~ a")
    assert not constraint.matches(NODE)
    assert not constraint.holds_among([])
    assert not constraint.of_tasks
    assert constraint == lenient_constraint("node.zone ~ a")
    assert len({constraint, parse_constraint("node.role == manager")}) == 2
