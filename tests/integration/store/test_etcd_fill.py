"""A state brought into a real etcd: whole or none, and its versions only grow."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from etcd3aio import _protobuf as pb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from manager.store import Corrupt, Op, Row, Stale, Store, codec
from manager.store.engines import etcd_fill
from manager.store.engines.embedded import EmbeddedEngine
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_fill import fill, raise_base
from manager.store.engines.etcd_requests import end_of, put
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import Config, ConfigSpec, Kind, Service, ServiceSpec, Task
from tests.etcd import Etcd
from tests.integration.store.stores import Managers, engine_of, until
from tests.integration.store.stores import put as put_objects

pytestmark = pytest.mark.slow

CLOCK = SystemClock()


@pytest.fixture
async def client(shared: Etcd) -> AsyncIterator[EtcdClient]:
    client = EtcdClient([shared.endpoint])
    yield client
    await client.close()


def some_rows(count: int, *, version: int = 1) -> list[Row]:
    return [
        Row(Kind.TASK, f"t{n}", version, codec.encode(Task(id=f"t{n}", slot=n)))
        for n in range(count)
    ]


def objects(store: Store) -> dict[str, Any]:
    found: list[Any] = [*store.all(Service), *store.all(Config), *store.all(Task)]
    return {o.id: o for o in found}


async def keys_under(client: EtcdClient, prefix: str) -> dict[bytes, bytes]:
    start = f"{prefix}/".encode()
    answer = await client.range(pb.RangeRequest(key=start, range_end=end_of(start)))
    return {bytes(kv.key): bytes(kv.value) for kv in answer.kvs}


async def test_an_embedded_state_goes_on_in_etcd_with_versions_that_only_grow(
    client: EtcdClient, shared: Etcd, managers: Managers, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "store.db"
    store = Store(EmbeddedEngine(path, CLOCK), CLOCK)
    await store.open()
    await store.update(
        put_objects(
            Service(id="s", spec=ServiceSpec(name="web")),
            Config(id="c", spec=ConfigSpec(name="conf", data=b"\0\xff")),
            Task(id="t", slot=1),
        )
    )
    for slot in range(2, 40):
        await store.update(put_objects(Task(id=f"t{slot}", slot=slot)))
    task = store.get(Task, "t")
    assert task is not None
    guarding = store.draft()
    guarding.put(replace(task, slot=99))
    guarding.guard("port/tcp/80")
    await store.commit(guarding)
    before = objects(store)
    revision = store.revision
    await store.close()

    engine = EmbeddedEngine(path, CLOCK)
    read, rows = await engine.load()
    assert read == revision
    whole_at = await fill(client, prefix=prefix, rows=rows, revision=read)
    await engine.close()

    moved = await managers(shared, prefix)
    after = objects(moved)
    assert moved.revision >= whole_at > revision
    assert moved.guarded("port/tcp/80") > revision
    assert after.keys() == before.keys()
    for id_, o in after.items():
        assert replace(o, meta=replace(o.meta, version=0)) == replace(
            before[id_], meta=replace(before[id_].meta, version=0)
        )
        assert revision < o.meta.version <= whole_at
    with pytest.raises(errors.Conflict):
        await moved.update(put_objects(Service(id="s2", spec=ServiceSpec(name="web"))))
    await moved.update(put_objects(Service(id="s2", spec=ServiceSpec(name="web2"))))
    # What was read before the move is stale after it, as what is absent is not.
    for op in (Op(Kind.TASK, "t", b"x", before["t"].meta.version), Op(Kind.TASK, "t", b"x", 0)):
        with pytest.raises(Stale):
            await moved.engine.commit([op], [], None)
    for version in range(1, whole_at, 251):
        with pytest.raises(Stale):
            await moved.engine.commit([Op(Kind.TASK, "absent", b"x", version)], [], None)


_prefixes = itertools.count()


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    revision=st.integers(1, 2**40),
    script=st.lists(st.sampled_from(["put", "delete", "raise"]), max_size=6),
)
def test_versions_only_grow_over_fills_and_raised_bases(
    shared: Etcd, revision: int, script: list[str]
) -> None:
    asyncio.run(_versions_only_grow(shared, f"/grow{next(_prefixes)}", revision, script))


async def _versions_only_grow(shared: Etcd, prefix: str, revision: int, script: list[str]) -> None:
    client = EtcdClient([shared.endpoint])
    rows = some_rows(3, version=revision)
    last = revision
    seen: dict[str, int] = {}

    def check(store: Store) -> None:
        for task in store.all(Task):
            assert task.meta is not None
            assert task.meta.version >= seen.get(task.id, revision + 1)
            assert task.meta.version <= store.revision
            seen[task.id] = task.meta.version

    try:
        last = await fill(client, prefix=prefix, rows=rows, revision=revision)
        assert last > revision
        for step in script:
            if step == "raise":
                before = last
                await raise_base(client, prefix=prefix, by=1_000)
                last += 1_000
            engine = EtcdEngine(
                EtcdClient([shared.endpoint]), clock=CLOCK, writer="m", prefix=prefix
            )
            store = Store(engine, CLOCK)
            await store.open()
            assert store.revision >= last
            check(store)
            if step == "put":
                before = store.revision
                await store.update(put_objects(Task(id="new"))) if not store.get(
                    Task, "new"
                ) else await store.update(lambda d: d.delete(Task, "new"))
                assert store.revision > before
            if step == "delete" and store.get(Task, "t1"):
                await store.update(lambda d: d.delete(Task, "t1"))
            check(store)
            last = store.revision
            store.check_invariants()
            await store.close()
    finally:
        await client.close()


async def test_a_prefix_that_holds_a_state_is_left_alone(
    client: EtcdClient, shared: Etcd, managers: Managers, prefix: str
) -> None:
    store = await managers(shared, prefix)
    await store.update(put_objects(Task(id="t")))
    before = await keys_under(client, prefix)
    with pytest.raises(errors.Conflict, match="holds a state"):
        await fill(client, prefix=prefix, rows=some_rows(3), revision=1)
    assert await keys_under(client, prefix) == before


async def test_the_same_state_may_be_brought_in_again_until_it_is_written_to(
    client: EtcdClient, shared: Etcd, managers: Managers, prefix: str
) -> None:
    """As by one that was killed before it had noted that the state is there."""
    await fill(client, prefix=prefix, rows=some_rows(3_000), revision=9)
    before = await keys_under(client, prefix)
    assert await fill(client, prefix=prefix, rows=some_rows(3_000), revision=9) > 9
    assert await keys_under(client, prefix) == before
    for rows, revision in ((some_rows(2_999), 9), (some_rows(3_000), 10)):
        with pytest.raises(errors.Conflict, match="holds a state"):
            await fill(client, prefix=prefix, rows=rows, revision=revision)
    store = await managers(shared, prefix)
    await store.update(put_objects(Task(id="later")))
    with pytest.raises(errors.Conflict, match="holds a state"):
        await fill(client, prefix=prefix, rows=some_rows(3_000), revision=9)


async def test_keys_of_somebody_else_are_left_alone(client: EtcdClient, prefix: str) -> None:
    theirs = f"{prefix}/config/database".encode()
    await client.txn(pb.TxnRequest(success=[put(theirs, b"precious")]))
    with pytest.raises(errors.Conflict, match="config/database"):
        await fill(client, prefix=prefix, rows=some_rows(3), revision=1)
    assert await keys_under(client, prefix) == {theirs: b"precious"}


async def test_nothing_outside_the_prefix_is_touched(
    client: EtcdClient, shared: Etcd, managers: Managers, prefix: str
) -> None:
    """Neither by a fill that clears leftovers, nor by an engine that is not to maintain etcd."""
    around = {f"{prefix}{suffix}".encode(): b"x" for suffix in ("", "-", "/../a", "0", "0/r/7/t0")}
    around = {
        key: value for key, value in around.items() if not key.startswith(f"{prefix}/".encode())
    }
    await client.txn(pb.TxnRequest(success=[put(key, value) for key, value in around.items()]))
    (first,) = (await client.range(pb.RangeRequest(key=prefix.encode()))).kvs
    await _die_half_way(client, prefix)
    await fill(client, prefix=prefix, rows=some_rows(100), revision=5)
    store = await managers(shared, prefix, maintain=False)
    await store.update(lambda draft: [draft.delete(Task, f"t{n}") for n in range(100)])
    await store.engine.forget("somebody")
    assert "compact" not in " ".join(str(task) for task in engine_of(store)._tasks)
    for key in around:
        (kv,) = (await client.range(pb.RangeRequest(key=key))).kvs
        assert kv.mod_revision == first.mod_revision
    old = await client.range(pb.RangeRequest(key=prefix.encode(), revision=first.mod_revision))
    assert len(old.kvs) == 1, "no revision was compacted away"


async def _die_half_way(client: EtcdClient, prefix: str) -> None:
    def breaking() -> Iterator[Row]:
        yield from some_rows(20_000)
        raise Corrupt("row 20000 is not as written")

    with pytest.raises(Corrupt, match="row 20000"):
        await fill(client, prefix=prefix, rows=breaking(), revision=9)


async def test_half_a_state_is_not_loaded_and_the_next_attempt_clears_it(
    client: EtcdClient, shared: Etcd, managers: Managers, prefix: str
) -> None:
    await _die_half_way(client, prefix)
    assert len(await keys_under(client, prefix)) > 1_000
    with pytest.raises(errors.Unavailable, match="does not hold all of it"):
        await managers(shared, prefix)
    await fill(client, prefix=prefix, rows=some_rows(7), revision=9)
    assert len(await keys_under(client, prefix)) == 7 + len(("format", "filled"))
    store = await managers(shared, prefix)
    assert store.count(Task) == 7


async def test_of_two_that_fill_one_prefix_the_later_wins_and_the_state_is_whole(
    client: EtcdClient, shared: Etcd, managers: Managers, prefix: str
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow:
        """The first one's client: it stops after its first rows."""

        where = client.where
        range = staticmethod(client.range)

        async def txn(self, request: Any, *, timeout_s: float = 5.0) -> Any:
            if len(request.success) > 100:
                begun.set()
                await go_on.wait()
            return await client.txn(request, timeout_s=timeout_s)

    one = asyncio.create_task(
        fill(Slow(), prefix=prefix, rows=some_rows(3_000), revision=9)  # type: ignore[arg-type]
    )
    await begun.wait()
    await fill(client, prefix=prefix, rows=some_rows(10), revision=50)
    go_on.set()
    with pytest.raises(errors.Conflict, match="somebody else"):
        await one
    store = await managers(shared, prefix)
    assert (store.count(Task), store.revision > 50) == (10, True)


async def test_an_etcd_with_its_own_limits_gets_smaller_transactions(
    tmp_path: Path, managers: Managers, prefix: str
) -> None:
    etcd = Etcd(tmp_path, "--max-txn-ops", "128", "--max-request-bytes", str(1536 << 10))
    etcd.start()
    client = EtcdClient([etcd.endpoint])
    large = [
        Row(
            Kind.CONFIG,
            f"c{n}",
            1,
            codec.encode(Config(id=f"c{n}", spec=ConfigSpec(name=f"c{n}", data=bytes(900_000)))),
        )
        for n in range(8)
    ]
    names = [
        Row(codec.NAMES, codec.name_row(Kind.CONFIG, f"c{n}"), 1, codec.encode_owner(f"c{n}"))
        for n in range(8)
    ]
    try:
        await fill(client, prefix=prefix, rows=[*some_rows(1_000), *large, *names], revision=1)
        store = await managers(etcd, prefix)
        assert (store.count(Task), store.count(Config)) == (1_000, 8)
        too_large = Row(Kind.TASK, "huge", 1, bytes(2 << 20))
        with pytest.raises(errors.Exhausted, match=r"row 'huge' of table \d+ has 2097152 bytes"):
            await fill(client, prefix=prefix + "b", rows=[too_large], revision=1)
        await store.close()
    finally:
        await client.close()
        etcd.kill()


async def test_answers_that_are_lost_and_restarts_lose_no_row(
    own: Etcd, managers: Managers, prefix: str
) -> None:
    client = EtcdClient([own.endpoint])
    send, rng, sent = client.txn, random.Random(4), 0

    async def lose(request: Any, *, timeout_s: float = 5.0) -> Any:
        nonlocal sent
        answer = await send(request, timeout_s=timeout_s)
        sent += 1
        if rng.random() < 0.4:
            raise errors.TimedOut("the answer was lost")
        return answer

    client.txn = lose  # type: ignore[method-assign]
    try:
        filling = asyncio.create_task(
            fill(client, prefix=prefix, rows=some_rows(20_000), revision=9)
        )
        await until(lambda: sent > 8)
        own.kill()
        await asyncio.to_thread(own.start)
        await filling
    finally:
        await client.close()
    store = await managers(own, prefix)
    assert store.count(Task) == 20_000


async def test_an_etcd_that_does_not_come_back_ends_the_fill_and_leaves_no_state(
    own: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_fill, "PATIENCE_S", 0.5)
    client = EtcdClient([own.endpoint])
    try:
        own.kill()
        with pytest.raises(errors.Unavailable):
            await fill(client, prefix=prefix, rows=some_rows(5), revision=9)
    finally:
        await client.close()


async def test_the_base_of_no_state_cannot_be_raised(client: EtcdClient, prefix: str) -> None:
    with pytest.raises(errors.NotFound, match="holds no state"):
        await raise_base(client, prefix=prefix, by=1)


async def test_a_manager_whose_state_was_renumbered_stops_writing(
    client: EtcdClient, shared: Etcd, managers: Managers, prefix: str
) -> None:
    store = await managers(shared, prefix)
    await store.update(put_objects(Task(id="t")))
    await raise_base(client, prefix=prefix, by=1_000)
    async with asyncio.timeout(5):
        error = await store.engine.wait_failed()
    assert "was replaced while this manager ran" in error.message
    assert not store.engine.in_touch
    with pytest.raises(Corrupt):
        await store.update(put_objects(Task(id="u")))
