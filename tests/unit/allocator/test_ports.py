"""Published ports: never two services on one ingress port."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manager.allocator import (
    DYNAMIC_FIRST,
    DYNAMIC_LAST,
    PortLedger,
    Taken,
    allocate_ports,
    ports_taken,
)
from manager.store import Draft, Tables
from swarm import errors
from swarm.v1 import Endpoint, Kind, PortConfig, Service, ServiceSpec

NONE = Taken()


def view(*services: Service) -> Tables:
    tables = Tables()
    tables.apply(1, [(Kind.SERVICE, s.id, s) for s in services])
    return tables


def service(id_: str, *ports: PortConfig, pending_delete: bool = False) -> Service:
    return Service(
        id=id_,
        spec=ServiceSpec(name=id_),
        endpoint=Endpoint(ports=ports),
        pending_delete=pending_delete,
    )


def port(published: int, target: int = 80, mode: str = "", protocol: str = "") -> PortConfig:
    return PortConfig(
        target_port=target, published_port=published, publish_mode=mode, protocol=protocol
    )


def test_port_left_to_the_cluster_is_the_lowest_free_one():
    taken = ports_taken(view(service("a", port(DYNAMIC_FIRST))))
    assert allocate_ports([port(0)], taken=taken) == ((port(DYNAMIC_FIRST + 1),), ())


def test_ports_given_out_before_stay_the_same():
    before = [port(30005, target=80), port(30001, target=443)]
    given_out, _ = allocate_ports(
        [port(0, target=443), port(0, target=80), port(0, target=80)], before=before, taken=NONE
    )
    assert [p.published_port for p in given_out] == [30001, 30005, 30000]


def test_named_port_is_not_given_to_a_neighbour_left_to_the_cluster():
    ports, clashes = allocate_ports([port(0, target=1), port(30000, target=2)], taken=NONE)
    assert [p.published_port for p in ports] == [30001, 30000]
    assert clashes == ()


def test_ingress_port_of_another_service_is_a_clash_that_names_it():
    taken = ports_taken(view(service("a", port(80))))
    _, (clash,) = allocate_ports([port(81), port(80)], taken=taken)
    assert (clash.index, clash.holder.id) == (1, "a")


@pytest.mark.parametrize(
    ("theirs", "mine", "clashes"),
    [
        pytest.param("ingress", "ingress", True, id="ingress beside ingress"),
        pytest.param("host", "ingress", True, id="ingress beside host"),
        pytest.param("ingress", "host", True, id="host beside ingress"),
        pytest.param("host", "host", False, id="host ports are the scheduler's matter"),
    ],
)
def test_modes(theirs: str, mine: str, clashes: bool):
    taken = ports_taken(view(service("a", port(80, mode=theirs))))
    _, found = allocate_ports([port(80, mode=mine)], taken=taken)
    assert bool(found) is clashes


def test_protocols_are_apart():
    taken = ports_taken(view(service("a", port(53, protocol="udp"))))
    assert allocate_ports([port(53, protocol="tcp")], taken=taken)[1] == ()


def test_service_on_its_way_out_has_given_its_ports_up():
    taken = ports_taken(view(service("a", port(80), pending_delete=True)))
    assert allocate_ports([port(80)], taken=taken)[1] == ()


def test_own_ports_are_no_clash():
    taken = ports_taken(view(service("a", port(80))))
    assert allocate_ports([port(80)], taken=taken, owner="a")[1] == ()


def test_host_port_left_open_stays_for_its_node_to_choose():
    assert allocate_ports([port(0, mode="host")], taken=NONE)[0] == (port(0, mode="host"),)


def test_used_up_range_says_what_to_do():
    everything = view(service("a", *[port(p) for p in range(DYNAMIC_FIRST, DYNAMIC_LAST + 1)]))
    with pytest.raises(errors.Exhausted, match="name a published port outside of this range"):
        allocate_ports([port(0)], taken=ports_taken(everything))


PORTS = st.builds(
    port,
    st.one_of(st.just(0), st.integers(29_998, 30_012)),
    target=st.integers(1, 4),
    mode=st.sampled_from(["", "ingress", "host"]),
    protocol=st.sampled_from(["", "tcp", "udp"]),
)


@settings(deadline=None)
@given(st.lists(st.lists(PORTS, max_size=4), max_size=12), st.randoms(use_true_random=False))
def test_no_two_services_ever_have_one_ingress_port(wishes: list[list[PortConfig]], rnd):
    have: dict[str, Any] = {}
    for wanted in wishes:
        id_ = rnd.choice(["a", "b", "c", "d"])
        named = [p for p in wanted if p.published_port]
        if len({((p.protocol or "tcp"), p.published_port) for p in named}) < len(named):
            continue  # twice in one service is refused before
        before = have[id_].endpoint.ports if id_ in have else ()
        taken = ports_taken(view(*have.values()))
        ports, clashes = allocate_ports(wanted, before=before, taken=taken, owner=id_)
        if clashes:
            continue
        have[id_] = service(id_, *ports)
        held: dict[tuple[str, int], str] = {}
        for s in have.values():
            for p in s.endpoint.ports:
                if p.publish_mode == "host":
                    continue
                key = (p.protocol or "tcp", p.published_port)
                assert p.published_port
                assert key not in held
                held[key] = s.id
        again, _ = allocate_ports(wanted, before=ports, taken=taken, owner=id_)
        assert again == ports, "an unchanged spec keeps its ports"


@pytest.mark.parametrize(
    ("before", "wanted", "guarded"),
    [
        pytest.param([], [port(0)], {"port/tcp/30000"}, id="chosen by the cluster"),
        pytest.param([], [port(80)], {"port/tcp/80"}, id="named"),
        pytest.param([], [port(53, protocol="udp")], {"port/udp/53"}, id="udp"),
        pytest.param([], [port(80, mode="host")], {"port/tcp/80"}, id="host"),
        pytest.param([], [port(0, mode="host")], set(), id="chosen by the node"),
        pytest.param([port(80)], [port(80, protocol="tcp")], set(), id="kept"),
        pytest.param([port(30000)], [port(0)], set(), id="kept, the cluster's"),
        pytest.param([port(80), port(81)], [port(81), port(82)], {"port/tcp/82"}, id="one more"),
        pytest.param([port(80, mode="host")], [port(80)], {"port/tcp/80"}, id="other mode"),
        pytest.param([port(80)], [], set(), id="given up"),
    ],
)
def test_what_a_service_newly_gets_is_guarded(
    before: list[PortConfig], wanted: list[PortConfig], guarded: set[str]
) -> None:
    owner = service("a", *before)
    draft = Draft(view(owner), now_ns=0)
    PortLedger(draft).allocate(wanted, owner=owner)
    assert draft.guards.keys() == guarded


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(PORTS, max_size=3)), max_size=10))
def test_ledger_of_a_transaction_tells_what_a_fresh_look_would(changes):
    have: dict[str, Any] = {}
    ledger = PortLedger(Draft(view(), now_ns=0))
    for id_, wanted in changes:
        before = have.get(id_)
        owner = before or service(id_)
        ports, clashes = ledger.allocate(wanted, owner=owner)
        fresh = PortLedger(Draft(view(*have.values()), now_ns=0)).allocate(wanted, owner=owner)
        assert (ports, [c.index for c in clashes]) == (fresh[0], [c.index for c in fresh[1]])
        if clashes:
            continue
        have[id_] = service(id_, *ports)
        ledger.enter(before, have[id_])
