"""A client of an etcd that somebody else runs: TLS of both sides, several endpoints, failover."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from etcd3aio import _protobuf as pb

from manager.store import Draft, Store
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient, Tls, access_client
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import EtcdAccess, Task
from tests import etcd
from tests.etcd import Ca, Etcd

pytestmark = pytest.mark.slow

CLOCK = SystemClock()
WAIT_S = 20.0
CA = Ca()


def put(task: Task, draft: Draft) -> None:
    draft.put(task)


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Etcd]]:
    made = etcd.members(tmp_path, 3, ca=CA)
    yield made
    for member in made:
        member.kill()


async def test_keys_are_never_shown() -> None:
    access = CA.access("10.0.0.1:2379", "etcd.example:2379")
    client = access_client(access)
    assert client.where == "etcd at 10.0.0.1:2379, etcd.example:2379"
    for connection in client._connections:
        assert "PRIVATE" not in repr(vars(connection))
    assert "PRIVATE" not in repr(vars(client))
    assert "secret" not in repr(Tls(b"roots", b"secret", b"chain"))
    await client.close()


async def test_a_closed_client_does_nothing_and_says_so() -> None:
    client = EtcdClient(["127.0.0.1:1"])
    await client.close()
    for call in (
        client.txn(pb.TxnRequest()),
        client.range(pb.RangeRequest(key=b"k")),
        client.grant(3),
        client.revoke(1),
        client.compact(5),
        client.status(),
    ):
        with pytest.raises(errors.Unavailable, match="this manager stops"):
            await call


@pytest.mark.parametrize(
    ("access", "why"),
    [
        (EtcdAccess(), "no endpoint"),
        (EtcdAccess(endpoints=("https://a:1",)), "https://a:1"),
        (EtcdAccess(endpoints=("a",)), "give HOST:PORT"),
        (EtcdAccess(endpoints=("a:70000",)), "give HOST:PORT"),
        (EtcdAccess(endpoints=("a:1",), certificate_pem="x", key_pem="y"), "no root"),
        (EtcdAccess(endpoints=("a:1",), ca_pem="x"), "etcd's root"),
        (EtcdAccess(endpoints=("a:1",), ca_pem=CA.root_pem, key_pem="y"), "its certificate"),
        (
            EtcdAccess(
                endpoints=("a:1",), ca_pem=CA.root_pem, certificate_pem=CA.root_pem, key_pem="y"
            ),
            "no private key",
        ),
    ],
)
def test_access_that_cannot_be_right_is_refused(access: EtcdAccess, why: str) -> None:
    with pytest.raises(errors.Invalid, match=why):
        access_client(access)


async def test_a_store_goes_on_when_the_member_it_uses_is_killed(three: list[Etcd]) -> None:
    client = access_client(CA.access(*(m.endpoint for m in three)))
    store = Store(EtcdEngine(client, clock=CLOCK, writer="w"), CLOCK)
    await store.open()
    try:
        for round_, member in enumerate(three):
            member.kill()
            began = CLOCK.monotonic_s()
            async with asyncio.timeout(WAIT_S):
                while True:
                    try:
                        await store.update(partial(put, Task(id=f"t{round_}")))
                        break
                    except (errors.Unavailable, errors.TimedOut):
                        await asyncio.sleep(0.05)
            print(f"member {round_} killed: written after {CLOCK.monotonic_s() - began:.2f} s")
            assert isinstance(store.engine, EtcdEngine)
            await store.engine.barrier()
            assert {t.id for t in store.all(Task)} == {f"t{n}" for n in range(round_ + 1)}
            await asyncio.to_thread(member.start)
    finally:
        await store.close()


async def test_who_has_no_certificate_or_trusts_another_root_is_not_served(
    three: list[Etcd],
) -> None:
    endpoint = three[0].endpoint
    read = pb.RangeRequest(key=b"k")
    for access in (
        EtcdAccess(endpoints=(endpoint,)),
        EtcdAccess(endpoints=(endpoint,), ca_pem=CA.root_pem),
        Ca().access(endpoint),
    ):
        client = access_client(access)
        with pytest.raises(errors.Unavailable, match=endpoint):
            await client.range(read)
        await client.close()
    client = access_client(CA.access(endpoint))
    await client.range(read)
    await client.close()


async def test_each_endpoint_is_reached_under_its_own_name(three: list[Etcd]) -> None:
    _, port = three[0].endpoint.split(":")
    # The certificates hold 127.0.0.1 alone.
    client = access_client(CA.access(f"localhost:{port}", three[1].endpoint))
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(errors.Unavailable):
            await client.range(pb.RangeRequest(key=b"k"))
        await client.range(pb.RangeRequest(key=b"k"))
    await client.close()
