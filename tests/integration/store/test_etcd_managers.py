"""Several managers on a real etcd: who is there, who is in touch, who asked, and who goes first."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from etcd3aio import _protobuf as pb

from manager.allocator import PortLedger, give_subnets
from manager.store import TOUCH_S, Batch, Draft, Op, Stale, Store, codec
from manager.store.engines import etcd_presence
from manager.store.engines.etcd_client import EtcdClient
from swarm import errors
from swarm.v1 import (
    Endpoint,
    EndpointSpec,
    Kind,
    Network,
    NetworkSpec,
    PortConfig,
    Service,
    ServiceSpec,
    Task,
)
from tests.etcd import Etcd, members
from tests.integration.store.stores import WAIT_S, Managers, engine_of, put, until

pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def announced(store: Store, node_id: str) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(store.engine.announce(node_id))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, errors.Unavailable):
            await task


async def present_is(store: Store, *node_ids: str) -> None:
    """By what `present_changed` says, step by step."""
    async with asyncio.timeout(WAIT_S):
        known = store.engine.present()
        while known != set(node_ids):
            known = await store.engine.present_changed(known)
    assert store.engine.present() == set(node_ids)


# ---------------------------------------------------------------- presence


async def test_managers_see_each_other_come_and_go(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    assert a.engine.present() == frozenset()
    async with announced(a, "n1"):
        await present_is(a, "n1")
        await present_is(b, "n1")
        async with announced(b, "n2"):
            await present_is(a, "n1", "n2")
            late = await managers(shared, prefix)
            await present_is(late, "n1", "n2")
        async with asyncio.timeout(etcd_presence.LEASE_S / 2):
            await a.engine.present_changed(frozenset(("n1", "n2")))
        await present_is(late, "n1")
    await present_is(b)


async def test_a_manager_that_dies_is_absent_when_its_lease_is_over(
    shared: Etcd, managers: Managers, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    loop = asyncio.get_running_loop()
    async with announced(b, "n2"):
        await present_is(a, "n2")

        async def silent(*_: Any, **__: Any) -> int:
            raise errors.Unavailable("no answer")

        monkeypatch.setattr(engine_of(b)._client, "keep_alive", silent)
        begun_s = loop.time()
        await present_is(a)
        assert loop.time() - begun_s < etcd_presence.LEASE_S + 1.5
        monkeypatch.undo()
        await present_is(a, "n2")


async def test_a_manager_that_starts_anew_is_not_counted_out_by_its_earlier_lease(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b, again = [await managers(shared, prefix) for _ in range(3)]
    async with announced(b, "n"):
        await present_is(a, "n")
        async with announced(again, "n"):
            keys = engine_of(again)._keys
            client = engine_of(a)._client

            async def holder() -> int:
                answer = await client.range(pb.RangeRequest(key=keys.manager("n")))
                return answer.kvs[0].lease if answer.kvs else 0

            async with asyncio.timeout(WAIT_S):
                while await holder() != engine_of(again)._presence._lease:
                    await asyncio.sleep(0.01)
            await client.revoke(engine_of(b)._presence._lease)
            await engine_of(a).barrier()
            assert await holder()
            assert a.engine.present() == {"n"}


async def test_a_manager_that_is_there_comes_back_when_it_was_forgotten(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    async with announced(b, "n2"):
        await present_is(a, "n2")
        await a.engine.forget("n2")
        known = await a.engine.present_changed(frozenset(("n2",)))
        assert known == frozenset()
        await present_is(a, "n2")


async def test_presence_is_seen_after_a_compaction_that_was_slept_through(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    following = next(t for t in engine_of(a)._tasks if "_follow" in str(t.get_coro()))
    following.cancel()
    await asyncio.wait({following})
    async with announced(b, "n2"):
        await present_is(b, "n2")
        for n in range(3):
            await b.update(put(Task(id=f"t{n}")))
        status = await engine_of(b)._client.status()
        await engine_of(b)._client.compact(status.header.revision)
        engine_of(a)._spawn(engine_of(a)._follow())
        await present_is(a, "n2")
        await until(lambda: a.count(Task) == 3)


async def test_an_announcement_ends_with_its_engine(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    async with announced(b, "n2") as announcement:
        await present_is(a, "n2")
        await b.close()
        with pytest.raises(errors.Unavailable, match="is closed"):
            await announcement
        async with asyncio.timeout(1.0):
            await present_is(a)


async def test_what_a_forgotten_manager_had_sent_takes_no_effect(
    shared: Etcd, managers: Managers, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    client = engine_of(b)._client
    send, late = client.txn, asyncio.Queue[Any]()

    async def hold(request: Any, *, timeout_s: float = 5.0) -> Any:
        late.put_nowait(request)
        raise errors.TimedOut("the request is under way still")

    monkeypatch.setattr(client, "txn", hold)
    writing = asyncio.create_task(b.update(put(Task(id="t"))))
    request = await late.get()
    writing.cancel()
    await a.engine.forget(engine_of(b)._keys.writer.decode().rpartition("/")[2])
    assert not (await send(request)).succeeded
    monkeypatch.undo()
    await a.engine.barrier()
    assert a.get(Task, "t") is None


# ---------------------------------------------------------------- touch


@pytest.fixture
def three(tmp_path: Path) -> Any:
    made = members(tmp_path, 3)
    yield made
    for etcd in made:
        etcd.kill()


async def leader_of(etcds: list[Etcd]) -> Etcd:
    for etcd in etcds:
        client = EtcdClient([etcd.endpoint])
        status = await client.status()
        await client.close()
        if status.leader == status.header.member_id:
            return etcd
    raise AssertionError("no leader")


class Touch:
    """Notes how long an engine was out of touch, and when it was so first."""

    def __init__(self, store: Store) -> None:
        self.out_s = 0.0
        self.first_s: float | None = None
        self._engine = store.engine
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        last_s = begun_s = loop.time()
        while True:
            await asyncio.sleep(0.02)
            now_s = loop.time()
            if not self._engine.in_touch:
                self.out_s += now_s - last_s
                if self.first_s is None:
                    self.first_s = now_s - begun_s
            last_s = now_s

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


async def test_one_that_does_not_announce_is_in_touch(
    own: Etcd, managers: Managers, prefix: str
) -> None:
    store = await managers(own, prefix)
    own.kill()
    await asyncio.sleep(TOUCH_S + 0.3)
    assert store.engine.in_touch


async def test_an_election_of_etcds_leader_leaves_managers_in_touch(
    three: list[Etcd], managers: Managers, prefix: str
) -> None:
    leading = await leader_of(three)
    others = [etcd for etcd in three if etcd is not leading]
    stores = [await managers(etcd, prefix) for etcd in others]
    async with contextlib.AsyncExitStack() as stack:
        for number, store in enumerate(stores):
            await stack.enter_async_context(announced(store, f"n{number}"))
        for store in stores:
            await present_is(store, "n0", "n1")
        touches = [Touch(store) for store in stores]
        leading.kill()
        for store in stores:
            await store.engine.barrier()
        await asyncio.sleep(TOUCH_S * 1.5)
        for touch in touches:
            await touch.end()
            assert touch.out_s == 0.0
        for store in stores:
            assert store.engine.present() == {"n0", "n1"}


@pytest.mark.parametrize("cut_off", ["leader", "follower"])
async def test_one_that_is_cut_off_from_the_quorum_is_out_of_touch_until_it_is_back(
    three: list[Etcd], managers: Managers, prefix: str, cut_off: str
) -> None:
    leading = await leader_of(three)
    mine = leading if cut_off == "leader" else next(e for e in three if e is not leading)
    store = await managers(mine, prefix)
    async with announced(store, "n1"):
        await present_is(store, "n1")
        touch = Touch(store)
        for etcd in three:
            if etcd is not mine:
                etcd.signal(signal.SIGSTOP)
        await until(lambda: touch.first_s)
        assert touch.first_s is not None
        assert TOUCH_S - 0.7 < touch.first_s < TOUCH_S + 1.0
        with pytest.raises(errors.Unavailable):
            await store.engine.barrier()
        assert not store.engine.in_touch
        for etcd in three:
            etcd.signal(signal.SIGCONT)
        await until(lambda: store.engine.in_touch)
        await touch.end()
        await present_is(store, "n1")


async def test_one_whose_watch_shows_nothing_is_out_of_touch_though_etcd_answers(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    following = next(t for t in engine_of(a)._tasks if "_follow" in str(t.get_coro()))
    async with announced(a, "n1"):
        await present_is(a, "n1")
        following.cancel()
        await asyncio.sleep(TOUCH_S + 0.5)
        assert a.engine.in_touch, "nothing was missed"
        await b.update(put(Task(id="t")))
        await until(lambda: not a.engine.in_touch)
        engine_of(a)._spawn(engine_of(a)._follow())
        await until(lambda: a.engine.in_touch)
        assert a.get(Task, "t") is not None


async def test_announcing_costs_etcd_few_calls_and_no_revisions(
    own: Etcd, managers: Managers, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await managers(own, prefix)
    client = engine_of(store)._client
    async with announced(store, "n1"):
        await present_is(store, "n1")
        calls = 0
        for name in ("range", "txn", "keep_alive", "grant"):
            call = getattr(client, name)

            def counted(*args: Any, _call: Any = call, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                return _call(*args, **kwargs)

            monkeypatch.setattr(client, name, counted)
        before = (await client.status()).header.revision
        await asyncio.sleep(3.0)
        assert 6 <= calls <= 12
        assert (await client.status()).header.revision == before


# ---------------------------------------------------------------- who, facts


async def test_a_watch_on_another_manager_says_who_asked(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    readers = [store.watch(("all",)) for store in (a, b)]
    await a.update(put(Task(id="t1")), who="ada")
    await a.update(put(Task(id="t2")))
    await asyncio.gather(
        *(a.update(put(Task(id=f"g{n}")), who=("bob", "cy")[n % 2]) for n in range(40))
    )
    for reader in readers:
        said: dict[str, str] = {}
        async with asyncio.timeout(WAIT_S):
            while len(said) < 42:
                batch = await anext(reader)
                assert isinstance(batch, Batch)
                said.update((change.id, batch.who) for change in batch.changes)
        assert (said["t1"], said["t2"]) == ("ada", "")
        for n in range(40):
            assert ("bob", "cy")[n % 2] in said[f"g{n}"].split(", ")
        assert set(said.values()) <= {"ada", "", "bob", "cy", "bob, cy", "cy, bob"}


async def test_an_etcds_facts_are_its_own(shared: Etcd, managers: Managers, prefix: str) -> None:
    store = await managers(shared, prefix)
    await store.update(put(Task(id="t")))
    facts = await store.engine.facts()
    assert facts.version.startswith("etcd 3.")
    assert 0 < facts.bytes_used <= facts.bytes


# ---------------------------------------------------------------- guards


def publish(id_: str, published: int) -> Any:
    def change(draft: Draft) -> int:
        """As manager/api makes a service; the port that it got, or Conflict."""
        wanted = PortConfig(target_port=80, published_port=published)
        service = Service(id=id_, spec=ServiceSpec(name=id_, endpoint=EndpointSpec()))
        ports, clashes = PortLedger(draft).allocate([wanted], owner=service)
        if clashes:
            raise errors.Conflict(f"port {published} is taken by {clashes[0].holder.id}")
        draft.put(Service(id=id_, spec=ServiceSpec(name=id_), endpoint=Endpoint(ports=ports)))
        return ports[0].published_port

    return change


def join_up(id_: str) -> Any:
    def change(draft: Draft) -> str:
        spec = NetworkSpec(name=id_)
        ipam = give_subnets(draft, spec, pool=("10.0.0.0/8",), subnet_size=24)
        draft.put(Network(id=id_, spec=spec, ipam=ipam))
        return ipam[0].subnet

    return change


async def test_of_two_managers_that_choose_one_port_one_chooses_again(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    drafts = [a.draft(), b.draft()]
    assert [publish(n, 0)(d) for n, d in zip("ab", drafts, strict=True)] == [30_000, 30_000]
    await a.commit(drafts[0])
    with pytest.raises(Stale):
        await b.commit(drafts[1])
    assert await b.update(publish("b", 0)) == 30_001


async def test_of_two_managers_that_take_one_port_by_name_one_hears_of_the_clash(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    done = await asyncio.gather(
        a.update(publish("a", 8080)), b.update(publish("b", 8080)), return_exceptions=True
    )
    assert sorted(type(d).__name__ for d in done) == ["Conflict", "int"]
    assert "is taken by" in str(next(d for d in done if isinstance(d, errors.Conflict)))


async def test_managers_that_give_out_at_once_give_nothing_twice(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    stores = [await managers(shared, prefix) for _ in range(3)]
    rng = random.Random(7)

    async def work(number: int) -> tuple[int, str]:
        store = rng.choice(stores)
        port = await store.update(publish(f"s{number}", 0), attempts=100)
        return port, await store.update(join_up(f"n{number}"), attempts=100)

    given = await asyncio.gather(*(work(n) for n in range(24)))
    assert len({port for port, _ in given}) == 24
    assert len({subnet for _, subnet in given}) == 24


async def test_guards_are_loaded_and_followed_by_every_manager(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    await a.update(publish("s", 8080))
    await b.engine.barrier()
    late = await managers(shared, prefix)
    name = "port/tcp/8080"
    assert a.guarded(name) == b.guarded(name) == late.guarded(name) == a.revision > 0


async def test_a_commit_without_guards_touches_none(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a = await managers(shared, prefix)
    await a.update(publish("s", 8080))
    before = a.guarded("port/tcp/8080")
    fence = await a.engine.campaign("n1")
    await a.update(put(Task(id="t", service_id="s")), fence=fence)
    await a.engine.commit([Op(Kind.TASK, "u", codec.encode(Task(id="u")), 0)], [], fence)
    assert a.guarded("port/tcp/8080") == before < a.revision
