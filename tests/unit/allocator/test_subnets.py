"""Subnets: the lowest free one, never two that overlap."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Network, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manager.allocator import (
    allocate_ipam,
    free_subnet,
    give_subnets,
    hosts_in_use,
    overlap,
    subnets_in_use,
)
from manager.store import Draft, Tables
from swarm import errors
from swarm.v1 import (
    IpamConfig,
    IpamOptions,
    Kind,
    ManagerStatus,
    Network,
    NetworkSpec,
    Node,
    NodeDescription,
    NodeStatus,
)

POOL = ("10.0.0.0/8",)


def test_first_network_gets_the_first_subnet_and_its_first_address_as_gateway():
    assert allocate_ipam(NetworkSpec(), pool=POOL, subnet_size=24, taken=()) == (
        IpamConfig(subnet="10.0.0.0/24", gateway="10.0.0.1"),
    )


@pytest.mark.parametrize(
    ("spec", "guarded"),
    [
        pytest.param(NetworkSpec(), True, id="chosen"),
        pytest.param(
            NetworkSpec(ipv4=False, ipam=IpamOptions(configs=(IpamConfig(subnet="fd00::/64"),))),
            True,
            id="named",
        ),
        pytest.param(NetworkSpec(ipv4=False), False, id="none"),
    ],
)
def test_subnets_are_guarded_where_any_is_given_out(spec: NetworkSpec, guarded: bool) -> None:
    draft = Draft(Tables(), now_ns=0)
    assert bool(give_subnets(draft, spec, pool=POOL, subnet_size=24)) is guarded
    assert bool(draft.guards) is guarded


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        pytest.param(["10.0.0.0/24"], "10.0.1.0/24", id="next"),
        pytest.param(["10.0.1.0/24"], "10.0.0.0/24", id="gap"),
        pytest.param(["10.0.0.0/16", "10.0.3.0/24"], "10.1.0.0/24", id="nested"),
        pytest.param(["10.0.0.128/25", "10.0.1.7/32"], "10.0.2.0/24", id="smaller blocks"),
        pytest.param(["0.0.0.0/5", "fd00::/8"], "10.0.0.0/24", id="others"),
    ],
)
def test_lowest_free_subnet(taken: list[str], expected: str):
    chosen = free_subnet(pool=POOL, subnet_size=24, taken=[ip_network(t) for t in taken])
    assert str(chosen) == expected


def test_next_pool_is_used_when_the_first_is_full():
    pool = ("10.9.0.0/24", "10.8.0.0/16")
    assert str(free_subnet(pool=pool, subnet_size=24, taken=[IPv4Network("10.9.0.0/24")])) == (
        "10.8.0.0/24"
    )


def test_used_up_pool_says_what_to_do():
    with pytest.raises(errors.Exhausted, match="no free /24 subnet is left"):
        free_subnet(pool=("10.0.0.0/24",), subnet_size=24, taken=[IPv4Network("10.0.0.0/30")])


def test_named_subnet_is_kept_and_gets_a_gateway():
    spec = NetworkSpec(ipam=IpamOptions(configs=(IpamConfig(subnet="10.55.0.0/24"),)))
    assert allocate_ipam(spec, pool=POOL, subnet_size=24, taken=()) == (
        IpamConfig(subnet="10.55.0.0/24", gateway="10.55.0.1"),
    )


def test_ipv6_subnet_comes_beside_a_chosen_ipv4_one():
    spec = NetworkSpec(ipv6=True, ipam=IpamOptions(configs=(IpamConfig(subnet="fd01::/64"),)))
    found = allocate_ipam(spec, pool=POOL, subnet_size=24, taken=())
    assert [c.subnet for c in found] == ["fd01::/64", "10.0.0.0/24"]


def test_nodes_own_surroundings_are_left_alone():
    nodes = [
        Node(id="a", status=NodeStatus(addr="10.0.3.7")),
        Node(id="b", description=NodeDescription(data_path_addr="10.1.0.9")),
        Node(id="c", manager_status=ManagerStatus(addr="10.2.0.1:2377")),
        Node(id="d", status=NodeStatus(addr="node-d.example")),
    ]
    tables = Tables()
    tables.apply(1, [(Kind.NODE, n.id, n) for n in nodes])
    (config,) = allocate_ipam(
        NetworkSpec(), pool=POOL, subnet_size=24, taken=(), avoid=hosts_in_use(tables)
    )
    assert config.subnet == "10.3.0.0/24"


def test_subnets_of_all_networks_but_one_are_in_use():
    tables = Tables()
    for i in (1, 2):
        n = Network(id=f"n{i}", ipam=(IpamConfig(subnet=f"10.0.{i}.0/24"),))
        tables.apply(i, [(Kind.NETWORK, n.id, n)])
    assert [str(s) for s in subnets_in_use(tables, but="n1")] == ["10.0.2.0/24"]


SUBNETS = st.builds(
    lambda base, prefix: IPv4Network((0x0A000000 + base * 64, prefix), strict=False),
    st.integers(0, 64),
    st.integers(20, 30),
)


@settings(deadline=None)
@given(st.lists(SUBNETS, max_size=20), st.integers(22, 27))
def test_chosen_subnet_is_free_and_there_is_no_lower_one(taken: list[IPv4Network], size: int):
    chosen = free_subnet(pool=("10.0.0.0/12",), subnet_size=size, taken=taken)
    assert not any(overlap(chosen, t) for t in taken)
    lower = itertools.takewhile(
        lambda s: s < chosen, IPv4Network("10.0.0.0/12").subnets(new_prefix=size)
    )
    assert all(any(overlap(s, t) for t in taken) for s in lower)
