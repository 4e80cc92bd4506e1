"""When a rotation of the root begins and ends, and what is trusted meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec import structs
from structlog.testing import capture_logs

from manager.ca import Rotations, objects, rotation
from manager.store import Draft, Store
from manager.store.engines.memory import MemoryEngine
from swarm import errors, tls
from swarm.clock import ManualClock
from swarm.v1 import Cluster, ClusterSpec, Keyring, Node, NodeDescription
from tests.fakes.waiting import until

CLOCK = ManualClock()


def issued(root_pem: str) -> NodeDescription:
    """What a node with a certificate of this root says of itself."""
    root = tls.load_certificates(root_pem)[0]
    return NodeDescription(cert_issuer_public_key=tls.public_key_der(root))


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    store = Store(MemoryEngine(CLOCK), CLOCK)
    await store.open()
    pem, key = tls.new_root(now_ns=CLOCK.now_ns(), cluster_id="c")
    keyring = Keyring(
        id="c",
        root_ca_key_pem=key,
        worker_token_secret=tls.new_token_secret(),
        manager_token_secret=tls.new_token_secret(),
    )

    def fill(draft: Draft) -> None:
        draft.put(Cluster(id="c", spec=ClusterSpec(name="default"), root_ca_pem=pem))
        draft.put(keyring)
        for name in "ab":
            draft.put(Node(id=name, description=issued(pem)))

    await store.update(fill)
    yield store
    await store.close()


async def begin(store: Store, *own: str) -> tuple[str, ...]:
    """The roots after a rotation was begun."""
    pem, key = own or ("", "")
    await store.update(lambda d: rotation.begin(d, root_pem=pem, root_key_pem=key))
    return roots(store)


def roots(store: Store) -> tuple[str, ...]:
    return tls.split_pem(objects(store)[0].root_ca_pem)


async def moves(store: Store, node_id: str, root_pem: str) -> None:
    """The node reports a certificate of that root."""

    def change(draft: Draft) -> None:
        node = draft.get(Node, node_id)
        assert node is not None
        draft.put(structs.replace(node, description=issued(root_pem)))

    await store.update(change)


async def test_new_root_signs_and_the_old_one_vouches_for_it(store: Store) -> None:
    (old,) = roots(store)
    before = objects(store)[1]
    assert (await begin(store))[1:] == (old,)
    cluster, keyring = objects(store)
    new = tls.load_certificates(cluster.root_ca_pem)[0]
    cross = tls.load_certificates(cluster.root_cross_pem)[0]
    assert cluster.root_rotation_in_progress
    assert tls.issued_by(cross, tls.load_certificates(old)[0])
    assert tls.public_key_der(cross) == tls.public_key_der(new)
    assert cross.subject == new.subject
    assert tls.load_key(keyring.root_ca_key_pem).public_key() == new.public_key()
    assert keyring.old_root_ca_key_pem == before.root_ca_key_pem
    assert keyring.worker_token_secret != before.worker_token_secret
    assert keyring.manager_token_secret != before.manager_token_secret


async def test_rotation_ends_once_the_last_node_has_moved(store: Store) -> None:
    new, _ = await begin(store)
    assert [n.id for n in rotation.waiting(store)] == ["a", "b"]
    await moves(store, "a", new)
    assert not await store.update(rotation.finish)
    await moves(store, "b", new)
    assert await store.update(rotation.finish)
    cluster, keyring = objects(store)
    assert roots(store) == (new,)
    assert (cluster.root_cross_pem, cluster.root_rotation_in_progress) == ("", False)
    assert keyring.old_root_ca_key_pem == ""
    assert not await store.update(rotation.finish), "twice is the same as once"


async def test_removed_and_revoked_nodes_are_not_waited_for(store: Store) -> None:
    new, _ = await begin(store)
    await moves(store, "a", new)

    def revoke(draft: Draft) -> None:
        node = draft.get(Node, "b")
        assert node is not None
        draft.put(structs.replace(node, revoked=True))

    await store.update(revoke)
    assert rotation.waiting(store) == []
    await store.update(lambda d: d.delete(Node, "b"))
    assert await store.update(rotation.finish)


async def test_further_rotation_supersedes_and_keeps_what_nodes_need(store: Store) -> None:
    (old,) = roots(store)
    second, _ = await begin(store)
    await moves(store, "a", second)
    third, *rest = await begin(store)
    assert rest == [old, second], "one node has a certificate of the second"
    cross = tls.load_certificates(objects(store)[0].root_cross_pem)[0]
    assert tls.issued_by(cross, tls.load_certificates(old)[0]), "which all nodes trust"
    await moves(store, "a", third)
    fourth, *rest = await begin(store)
    assert rest == [old, third], "nobody needs the second any more"
    for name in "ab":
        await moves(store, name, fourth)
    assert await store.update(rotation.finish)
    assert roots(store) == (fourth,)


async def test_root_of_ones_own_is_taken_or_refused_with_the_reason(store: Store) -> None:
    (old,) = roots(store)
    now_ns = CLOCK.now_ns()
    pem, key = tls.new_root(now_ns=now_ns, cluster_id="mine")
    leaf = tls.sign(
        tls.load_csr(tls.csr_pem(key)),
        root_pem=pem,
        root_key_pem=key,
        common_name="x",
        unit="",
        organization="",
        now_ns=now_ns,
        lifetime_ns=10**15,
    )
    expired, expired_key = tls.new_root(now_ns=now_ns - 21 * 365 * 86400 * 10**9, cluster_id="c")
    token_ca = tls.token_ca("a" * 25)
    for own, message in (
        ((pem, tls.new_key_pem()), "not that of the certificate"),
        ((leaf, key), "must hold one certificate, it holds 2"),
        ((tls.split_pem(leaf)[0], key), "must be a root, signed with its own key"),
        ((expired, expired_key), "it is valid from"),
        (token_ca, "its path length is 0"),
        ((old, objects(store)[1].root_ca_key_pem), "the cluster has this root's key already"),
        (("PEM", "KEY"), "not a certificate in PEM"),
    ):
        with pytest.raises(errors.Invalid, match=message):
            await begin(store, *own)
    assert roots(store) == (old,)
    assert await begin(store, pem, key) == (*tls.split_pem(pem), old)


async def test_ends_by_itself_and_a_store_that_cannot_write_delays_it_only(store: Store) -> None:
    new, _ = await begin(store)
    for name in "ab":
        await moves(store, name, new)
    engine = store.engine
    assert isinstance(engine, MemoryEngine)
    engine.failing = errors.Unavailable("the disk is full")
    with capture_logs() as logs:
        running = asyncio.create_task(Rotations(store).run())
        try:
            await until(lambda: any(e["event"] == "root_rotation_not_finished" for e in logs))
            assert len(roots(store)) == 2
            engine.failing = None
            await until(lambda: roots(store) == (new,))
            again, _ = await begin(store)
            for name in "ab":
                await moves(store, name, again)
            await until(lambda: roots(store) == (again,))
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
