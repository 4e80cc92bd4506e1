"""What one caller may ask of a server."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from swarm import errors, limits
from swarm.clock import ManualClock
from swarm.limits import Buckets, Limits, Rate
from swarm.rpc import Identity, Method
from swarm.v1 import Caller
from swarm.v1 import services as sv

METHODS: dict[str, Method] = {
    m.name: m for name, table in vars(sv).items() if name.endswith("_METHODS") for m in table
}
ANN = Identity(Caller.ADMIN, name="ann")
W1 = Identity(Caller.WORKER, node_id="w1")
JOINER = Identity(Caller.JOIN_WORKER)
PEER = "ipv4:10.0.0.1:4711"


def let_in(made: Limits, identity: Identity, name: str, peer: str = PEER) -> bool:
    try:
        made.admit(identity, METHODS[name], peer)
    except errors.Exhausted:
        return False
    return True


@given(
    st.floats(0.5, 1000),
    st.integers(1, 100),
    st.lists(st.floats(0, 0.5), min_size=1, max_size=300),
)
def test_never_more_than_the_burst_and_the_rate_over_any_time(
    per_s: float, burst: int, gaps: list[float]
) -> None:
    buckets, now_s, taken = Buckets(Rate(per_s, burst)), 0.0, []
    for gap_s in gaps:
        now_s += gap_s
        if buckets.take("a", now_s) == 0:
            taken.append(now_s)
    for i, first_s in enumerate(taken):
        for count, last_s in enumerate(taken[i:], 1):
            assert count <= burst + per_s * (last_s - first_s + 1e-5)


def test_who_waits_as_long_as_it_is_told_is_let_in() -> None:
    buckets, now_s = Buckets(Rate(7, 3)), 5.0
    for _ in range(50):
        wait_s = buckets.take("a", now_s)
        if wait_s:
            assert buckets.take("a", now_s + wait_s * 0.9) > 0
            assert buckets.take("a", now_s + wait_s + 1e-9) == 0
            now_s += wait_s + 1e-9


def test_refused_calls_cost_the_caller_nothing() -> None:
    buckets = Buckets(Rate(1, 1))
    assert buckets.take("a", 0) == 0
    for _ in range(100):
        assert buckets.take("a", 0.5) == pytest.approx(0.5, abs=1e-5)
    assert buckets.take("a", 1.0) == 0


def test_buckets_are_forgotten() -> None:
    buckets, rng = Buckets(Rate(10, 10), buckets_max=100), random.Random(1)
    for i in range(5_000):
        buckets.take(rng.random(), i / 1000)
        assert len(buckets) <= 100
    for i in range(200):
        buckets.take(i, 1e6 + i)
    assert len(buckets) <= 100


def test_callers_do_not_share_their_limits() -> None:
    made = Limits(ManualClock(), calls=Rate(1, 2))
    assert [let_in(made, ANN, "get_info") for _ in range(3)] == [True, True, False]
    assert let_in(made, Identity(Caller.ADMIN, name="bob"), "get_info")
    assert let_in(made, W1, "issue_node_certificate")


def test_local_users_are_not_limited() -> None:
    made = Limits(ManualClock(), calls=Rate(1, 1))
    assert all(let_in(made, Identity(Caller.LOCAL), "get_info") for _ in range(50))


def test_refusal_says_who_what_how_much_and_when_again() -> None:
    made = Limits(ManualClock())
    for _ in range(1_000):
        made.admit(ANN, METHODS["get_info"], PEER)
    with pytest.raises(
        errors.Exhausted,
        match=r"admin ann: too many calls \(the limit is 500 a second, 1,000 at once\); try again "
        r"in 0\.01 s",
    ):
        made.admit(ANN, METHODS["get_info"], PEER)


def test_a_thousand_nodes_of_one_address_join_within_50_seconds() -> None:
    clock = ManualClock()
    made, joined, tries = Limits(clock), 0, 0
    while joined < 1_000:
        joined += let_in(made, JOINER, "issue_node_certificate")
        tries += 1
        clock.advance(seconds=1 / 40)
        assert clock.monotonic_s() < 50
    assert tries > 1_000


def test_joins_count_by_token_and_address() -> None:
    made = Limits(ManualClock(), joins=Rate(1, 1))
    name = "issue_node_certificate"
    assert let_in(made, JOINER, name)
    assert not let_in(made, JOINER, name, "ipv4:10.0.0.1:4712")
    assert let_in(made, JOINER, name, "ipv4:10.0.0.2:4711")
    assert let_in(made, Identity(Caller.JOIN_MANAGER), name)


def test_streams_are_bounded_and_come_free() -> None:
    made = Limits(ManualClock())
    held = [made.admit(ANN, METHODS["logs"], PEER) for _ in range(200)]
    with pytest.raises(errors.Exhausted, match="admin ann has 200 streams open at this manager"):
        made.admit(ANN, METHODS["watch"], PEER)
    assert let_in(made, ANN, "get_info")
    assert let_in(made, W1, "session")
    made.ended(held.pop())
    assert let_in(made, ANN, "exec")
    for one in (*held, ""):
        made.ended(one)
    made.check_invariants()


def test_calls_denied_too_often_are_refused_unlooked_at_and_no_others() -> None:
    clock = ManualClock()
    made, method, other = Limits(clock), METHODS["get_info"], METHODS["session"]
    for _ in range(20):
        made.check_denied(method, b"pem", PEER)
        made.denied(method, b"pem", PEER)
    with pytest.raises(errors.Exhausted, match="10.0.0.1: too many denied calls of GetInfo"):
        made.check_denied(method, b"pem", "ipv4:10.0.0.1:1")
    made.check_denied(other, b"pem", PEER)
    made.check_denied(method, b"other", PEER)
    made.check_denied(method, b"pem", "ipv4:10.0.0.2:4711")
    clock.advance(seconds=0.1)
    made.check_denied(method, b"pem", PEER)


def test_refusals_of_one_caller_are_logged_now_and_then() -> None:
    clock = ManualClock()
    made = Limits(clock, calls=Rate(1, 1))
    with capture_logs() as logs:
        for _ in range(100):
            let_in(made, ANN, "get_info")
            clock.advance(seconds=0.15)
    assert [entry["who"] for entry in logs] == ["admin ann"] * 2


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.1:4711", "10.0.0.1"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:4711", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::9%5D:4711", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:10.0.0.1]:4711", "10.0.0.1"),
        ("ipv6:[fe80::1%eth0]:4711", "fe80::/64"),
        ("unix:", "unix:"),
        ("odd", "odd"),
        ("ipv6:nonsense", "ipv6:nonsense"),
    ],
)
def test_a_peers_host_is_without_its_port(peer: str, host: str) -> None:
    assert limits.host_of(peer) == host


def test_every_method_has_a_limit_of_its_size_below_the_servers() -> None:
    sizes = {m.path: limits.request_bytes_max(m.path) for m in METHODS.values()}
    assert sizes["/swarm.v1.Control/DeployStack"] == limits.MESSAGE_BYTES_MAX
    assert sizes["/swarm.v1.Certificates/IssueNodeCertificate"] == 64 << 10
    assert max(sizes.values()) <= limits.MESSAGE_BYTES_MAX
    services = {path.rpartition(".")[2].partition("/")[0] for path in sizes}
    assert services <= set(limits.REQUEST_BYTES_MAX)
