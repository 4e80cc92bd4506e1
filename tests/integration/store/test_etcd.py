"""The engine on a real etcd: what the store promises, over crashes, silence and compaction."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from etcd3aio import _protobuf as pb
from msgspec.structs import replace

from manager.store import Corrupt, Deposed, Draft, Op, Stale, Store, codec
from manager.store.engines import etcd as module
from manager.store.engines import etcd_writer as writer_module
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_requests import end_of
from manager.store.engines.etcd_requests import put as put_key
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import Kind, Node, Service, ServiceSpec, Task
from tests.etcd import Etcd
from tests.integration.store.stores import WAIT_S, Managers, engine_of, put, until

pytestmark = pytest.mark.slow


def count_up(draft: Draft) -> None:
    """Counts in a field that holds a number."""
    counter = draft.get(Node, "counter") or Node(id="counter")
    draft.put(replace(counter, certificate_expires_at_ns=counter.certificate_expires_at_ns + 1))


def counted(store: Store) -> int:
    counter = store.get(Node, "counter")
    return counter.certificate_expires_at_ns if counter else 0


def rows(store: Store) -> dict[str, Any]:
    return {t.id: t for t in store.all(Task)}


async def test_what_one_manager_writes_every_manager_has(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    await a.update(put(Task(id="t", slot=1), Service(id="s", spec=ServiceSpec(name="web"))))
    assert a.get(Task, "t") is not None, "a writer reads what it wrote"
    await engine_of(b).barrier()
    assert b.get(Task, "t") == a.get(Task, "t")
    await b.update(lambda d: d.delete(Task, "t"))
    await engine_of(a).barrier()
    assert a.get(Task, "t") is None
    late = await managers(shared, prefix)
    assert late.get(Service, "s") == a.get(Service, "s")
    assert late.get(Task, "t") is None


async def test_of_two_managers_that_change_one_object_one_is_stale(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    await a.update(put(Task(id="t", slot=0)))
    await engine_of(b).barrier()
    drafts = [s.draft() for s in (a, b)]
    for i, draft in enumerate(drafts):
        task = draft.get(Task, "t")
        assert task is not None
        draft.put(replace(task, slot=i + 1))
    results = await asyncio.gather(a.commit(drafts[0]), b.commit(drafts[1]), return_exceptions=True)
    assert sorted(type(r).__name__ for r in results) == ["Stale", "int"]
    loser = b if isinstance(results[1], Stale) else a
    task = loser.get(Task, "t")
    assert task is not None
    assert task.slot == (1 if loser is b else 2), "what it lost to is there to be read"


async def test_a_name_has_one_owner_whoever_claims_it(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    stores = [await managers(shared, prefix) for _ in range(2)]
    drafts = [s.draft() for s in stores]
    for i, draft in enumerate(drafts):
        draft.put(Service(id=f"s{i}", spec=ServiceSpec(name="web")))
    results = await asyncio.gather(
        *(s.commit(d) for s, d in zip(stores, drafts, strict=True)), return_exceptions=True
    )
    assert sorted(type(r).__name__ for r in results) == ["Stale", "int"]


async def test_no_increment_is_lost_and_no_manager_falls_behind(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    stores = [await managers(shared, prefix) for _ in range(3)]

    async def work(store: Store, number: int) -> None:
        rng = random.Random(number)
        for i in range(30):
            await store.update(count_up, attempts=200)
            await store.update(put(Task(id=f"{number}-{i}", slot=rng.randint(1, 9))))

    await asyncio.gather(*(work(s, i) for i, s in enumerate(stores)))
    for store in stores:
        await engine_of(store).barrier()
        assert counted(store) == 90
        assert rows(store) == rows(stores[0])
        assert len(rows(store)) == 90


async def test_many_single_commits_share_transactions(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    store = await managers(shared, prefix)
    before = store.revision
    await asyncio.gather(*(store.update(put(Task(id=f"t{i}"))) for i in range(500)))
    assert store.count(Task) == 500
    assert store.revision - before < 100, "commits that wait go together"


async def test_commits_of_one_group_do_not_see_each_other_half(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    """Two commits that each rely on what the other writes must not both succeed."""
    store = await managers(shared, prefix)
    await store.update(put(Task(id="a"), Task(id="b")))
    engine = engine_of(store)
    a, b = (t.meta.version for t in (store.get(Task, "a"), store.get(Task, "b")) if t and t.meta)
    results = await asyncio.gather(
        *(
            engine.commit([Op(Kind.TASK, f"f{i}", codec.encode(Task(id=f"f{i}")), 0)], [], None)
            for i in range(8)
        ),
        engine.commit([Op(Kind.TASK, "a", None, a)], [Op(Kind.TASK, "b", None, b)], None),
        engine.commit([Op(Kind.TASK, "b", None, b)], [Op(Kind.TASK, "a", None, a)], None),
        return_exceptions=True,
    )
    assert sum(isinstance(r, Stale) for r in results) == 1


async def test_all_rows_of_a_large_state_are_read(
    shared: Etcd, managers: Managers, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_KEYS", 100)
    store = await managers(shared, prefix)
    await store.update(put(*(Task(id=f"t{i:04}") for i in range(1001))))
    other = await managers(shared, prefix)
    assert rows(other) == rows(store)


async def test_a_commit_larger_than_a_message_of_grpc_is_followed(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    """The watch gets it in fragments, and it is still one commit."""
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    with b.watch(("kind", Kind.TASK)) as watch:
        label = "x" * 50_000
        await a.update(put(*(Task(id=f"n{i}", node_id=label) for i in range(100))))
        async with asyncio.timeout(WAIT_S):
            batch = await anext(watch)
    assert len(batch.changes) == 100
    with pytest.raises(errors.Exhausted, match="make it in parts"):
        await a.update(put(*(Task(id=f"m{i}", node_id=label) for i in range(300))))


async def test_the_second_manager_leads_when_the_first_resigns_and_the_first_writes_no_more(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    first = await a.engine.campaign("n1")
    waiting = asyncio.create_task(b.engine.campaign("n2"))
    await a.update(put(Task(id="t1")), fence=first)
    assert not waiting.done()
    await a.engine.resign(first)
    async with asyncio.timeout(WAIT_S):
        second = await waiting
        await a.engine.wait_deposed(first)
    assert second.epoch > first.epoch
    with pytest.raises(Deposed, match="n2 leads"):
        await a.update(put(Task(id="t2")), fence=first)
    await b.update(put(Task(id="t3")), fence=second)
    assert {t.id for t in b.all(Task)} == {"t1", "t3"}


async def test_a_leader_that_is_silent_deposes_itself_before_another_leads(
    own: Etcd, managers: Managers, prefix: str
) -> None:
    a = await managers(own, prefix)
    fence = await a.engine.campaign("n1")
    own.signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(WAIT_S):
            await a.engine.wait_deposed(fence)
    finally:
        own.signal(signal.SIGCONT)
    async with asyncio.timeout(WAIT_S):
        again = await a.engine.campaign("n1")
    assert again.epoch > fence.epoch
    with pytest.raises(Deposed):
        await a.update(put(Task(id="t")), fence=fence)


async def test_a_leader_whose_loop_stood_still_writes_nothing_after_its_successor(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    """What it does first when it goes on is a commit under its old fence."""
    a = await managers(shared, prefix)
    fence = await a.engine.campaign("n1")
    successor = subprocess.Popen(  # noqa: ASYNC220  # blocking is what this is about
        [sys.executable, "-c", SUCCESSOR, shared.endpoint, prefix], stdout=subprocess.PIPE
    )
    try:
        # The whole loop, renewals included, until the other process has led and written.
        assert successor.stdout is not None
        assert successor.stdout.readline() == b"written\n"
        with pytest.raises(Deposed):
            await a.update(put(Task(id="t1")), fence=fence)
        async with asyncio.timeout(WAIT_S):
            await a.engine.wait_deposed(fence)
        await engine_of(a).barrier()
        assert {t.id for t in a.all(Task)} == {"t2"}
        assert (await a.engine.campaign("n1")).epoch > fence.epoch
    finally:
        successor.kill()
        successor.communicate()


SUCCESSOR = """
import asyncio, sys
from manager.store import Store
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from swarm.clock import SystemClock
from swarm.v1 import Task

async def main():
    clock = SystemClock()
    engine = EtcdEngine(EtcdClient([sys.argv[1]]), clock=clock, writer="other", prefix=sys.argv[2])
    store = Store(engine, clock)
    await store.open()
    fence = await engine.campaign("n2")
    await store.update(lambda d: d.put(Task(id="t2")), fence=fence)
    await store.close()
    print("written", flush=True)

asyncio.run(main())
"""


async def test_a_campaign_that_is_cancelled_after_it_was_won_leaves_no_leader_behind(
    shared: Etcd, managers: Managers, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    behind = asyncio.Event()

    async def never(revision: int) -> None:
        behind.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(engine_of(a), "reached", never)
    campaign = asyncio.create_task(a.engine.campaign("n1"))
    await behind.wait()
    campaign.cancel()
    async with asyncio.timeout(WAIT_S):
        await b.engine.campaign("n2")


async def test_a_manager_that_is_started_anew_takes_its_own_leadership_over_at_once(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    fence = await a.engine.campaign("n1")
    async with asyncio.timeout(0.8):  # below the lease's time
        assert (await b.engine.campaign("n1")).epoch > fence.epoch


async def test_nothing_acknowledged_is_lost_when_etcd_is_killed_again_and_again(
    own: Etcd, managers: Managers, prefix: str
) -> None:
    stores = [await managers(own, prefix) for _ in range(2)]
    acknowledged: set[str] = set()
    unknown: set[str] = set()
    over = asyncio.Event()

    async def write(store: Store, number: int) -> None:
        for i in itertools.count():
            if over.is_set():
                return
            id_ = f"{number}-{i}"
            try:
                await store.update(put(Task(id=id_)))
            except errors.TimedOut:
                unknown.add(id_)
            except errors.Unavailable:
                await asyncio.sleep(0.02)
            else:
                acknowledged.add(id_)

    async with asyncio.TaskGroup() as group:
        for number, store in enumerate((*stores, *stores)):
            group.create_task(write(store, number))
        for _ in range(4):
            reached = len(acknowledged) + 50
            await until(lambda reached=reached: len(acknowledged) > reached)  # type: ignore[misc]
            own.kill()
            await asyncio.to_thread(own.start)
        over.set()
    late = await managers(own, prefix)
    for store in (*stores, late):
        await engine_of(store).barrier()
        found = set(rows(store))
        assert acknowledged <= found <= acknowledged | unknown
        assert rows(store) == rows(late)
    assert len(acknowledged) > 200


Txn = Callable[[Any], Any]


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Callable[[Store, Callable[[Txn, Any], Any]], None]:
    """Puts a function between a store's engine and etcd; it gets what sends, and the request."""

    def between(store: Store, work: Callable[[Txn, Any], Any]) -> None:
        client = engine_of(store)._client
        txn = client.txn

        async def wrapped(request: Any, *, timeout_s: float = 5.0) -> Any:
            return await work(lambda r: txn(r, timeout_s=timeout_s), request)

        monkeypatch.setattr(client, "txn", wrapped)

    return between


def is_group(request: Any) -> bool:
    return any(op.HasField("request_txn") for op in request.success)


async def test_a_lost_answer_is_found_in_the_log(
    own: Etcd, managers: Managers, prefix: str, through: Any
) -> None:
    store = await managers(own, prefix)

    async def lose(send: Txn, request: Any) -> Any:
        answer = await send(request)
        if is_group(request):
            raise errors.TimedOut("the answer was lost")
        return answer

    through(store, lose)
    await store.update(put(Task(id="t")))
    assert store.get(Task, "t") is not None
    draft = store.draft()
    draft.put(Task(id="t2", slot=1))
    await store.update(put(Task(id="t2", slot=2)))
    with pytest.raises(Stale):
        await store.commit(draft)


async def test_a_lost_request_is_sent_again_and_its_late_arrival_changes_nothing(
    own: Etcd, managers: Managers, prefix: str, through: Any
) -> None:
    """The create arrives after its repetition and after the object's deletion."""
    store = await managers(own, prefix)
    late: list[Callable[[], Any]] = []

    async def lose_the_first(send: Txn, request: Any) -> Any:
        if is_group(request) and not late:
            late.append(lambda: send(request))
            raise errors.TimedOut("the request was lost")
        return await send(request)

    through(store, lose_the_first)
    await store.update(put(Task(id="t", slot=1)))
    await store.update(lambda d: d.delete(Task, "t"))
    answer = await late[0]()
    assert not answer.succeeded
    await engine_of(store).barrier()
    assert store.get(Task, "t") is None


async def test_a_lost_answer_to_a_manager_that_was_forgotten_is_waited_for_in_the_log(
    own: Etcd, managers: Managers, prefix: str, through: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is late: what it has not shown yet is not taken for what was never done."""
    store = await managers(own, prefix)
    other = await managers(own, prefix)
    engine = engine_of(store)
    asked = 0
    held: list[Any] = []

    async def lose(send: Txn, request: Any) -> Any:
        nonlocal asked
        asked += 1
        answer = await send(request)
        if is_group(request):
            await engine_of(other).forget(engine._writer._name)
            raise errors.TimedOut("the answer was lost")
        return answer

    through(store, lose)
    take = engine._take
    monkeypatch.setattr(engine, "_take", held.append)
    writing = asyncio.create_task(store.update(put(Task(id="t"))))
    await until(lambda: asked >= 2 and held)  # it was sent, and disowned
    await asyncio.sleep(0.1)
    assert not writing.done()
    monkeypatch.setattr(engine, "_take", take)
    for events in held:
        take(events)
    await writing
    assert asked == 2, "it was not sent again"
    assert store.get(Task, "t") is not None


async def test_an_engine_that_was_abandoned_waits_for_nothing(
    own: Etcd, managers: Managers, prefix: str, through: Any
) -> None:
    store = await managers(own, prefix)
    asked = asyncio.Event()

    async def never(send: Txn, request: Any) -> Any:
        asked.set()
        raise errors.TimedOut("no answer comes")

    through(store, never)
    writing = asyncio.create_task(store.update(put(Task(id="t"))))
    failing = asyncio.create_task(engine_of(store).wait_failed())
    await asked.wait()
    engine_of(store).abandon()
    with pytest.raises(errors.TimedOut, match="not this manager's any more"):
        await writing
    with pytest.raises(errors.Unavailable, match="ask another manager"):
        await store.update(put(Task(id="t2")))
    with pytest.raises(errors.Unavailable):
        await engine_of(store).barrier()
    assert not engine_of(store).in_touch
    async with asyncio.timeout(writer_module.COMMIT_S / 2):
        await store.close()
    assert not failing.done(), "it is no failure"
    failing.cancel()


async def test_an_earlier_life_of_a_manager_writes_nothing_once_the_next_has_begun(
    own: Etcd, managers: Managers, prefix: str, through: Any
) -> None:
    store = await managers(own, prefix)
    late: list[Callable[[], Any]] = []

    async def lose(send: Txn, request: Any) -> Any:
        late.append(lambda: send(request))
        raise errors.TimedOut("the request was lost")

    through(store, lose)
    writing = asyncio.create_task(store.update(put(Task(id="t"))))
    await until(lambda: late)
    writing.cancel()
    engine = EtcdEngine(EtcdClient([own.endpoint]), clock=SystemClock(), writer="m0", prefix=prefix)
    await engine.load()
    try:
        assert not (await late[0]()).succeeded
    finally:
        await engine.close()


async def test_what_became_of_a_change_is_unknown_only_where_etcd_does_not_come_back(
    own: Etcd, managers: Managers, prefix: str, through: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "COMMIT_S", 1.0)
    store = await managers(own, prefix)

    async def never(send: Txn, request: Any) -> Any:
        raise errors.TimedOut("the request was lost")

    through(store, never)
    with pytest.raises(errors.TimedOut):
        await store.update(put(Task(id="t2")))


async def test_an_engine_is_closed_in_time_though_nobody_waits_for_what_is_under_way(
    own: Etcd, managers: Managers, prefix: str, through: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "COMMIT_S", 0.5)
    store = await managers(own, prefix)
    held = asyncio.Event()

    async def hold(send: Txn, request: Any) -> Any:
        held.set()
        await asyncio.Event().wait()

    through(store, hold)
    cancelled = asyncio.create_task(store.update(put(Task(id="t1"))))
    await held.wait()
    cancelled.cancel()
    kept = asyncio.create_task(store.update(put(Task(id="t2"))))
    await until(lambda: len(engine_of(store)._writer._sent) == 2)
    async with asyncio.timeout(WAIT_S):
        await store.close()
    with pytest.raises(errors.TimedOut, match="before it was told"):
        await kept
    with pytest.raises(asyncio.CancelledError):
        await cancelled


async def test_commits_go_in_smaller_groups_where_etcd_takes_no_large_ones(
    tmp_path: Path, managers: Managers, prefix: str
) -> None:
    etcd = Etcd(tmp_path, "--max-txn-ops", "16")
    etcd.start()
    try:
        store = await managers(etcd, prefix)
        await asyncio.gather(*(store.update(put(Task(id=f"t{i}"))) for i in range(200)))
        assert store.count(Task) == 200
        with pytest.raises(errors.Exhausted):
            await store.update(put(*(Task(id=f"u{i}") for i in range(20))))
    finally:
        etcd.kill()


async def test_a_full_etcd_changes_nothing_that_it_says_it_did_not(
    tmp_path: Path, managers: Managers, prefix: str
) -> None:
    """The transaction that makes it full is refused in words, and made all the same."""
    etcd = Etcd(tmp_path, "--quota-backend-bytes", str(8 << 20))
    etcd.start()
    try:
        store = await managers(etcd, prefix)
        done: set[str] = set()
        refused: dict[str, str] = {}

        async def write(number: int) -> None:
            for i in itertools.count():
                id_ = f"{number}-{i}"
                try:
                    await store.update(put(Task(id=id_, node_id="x" * 100_000)))
                    done.add(id_)
                except errors.Unavailable as error:
                    refused[id_] = error.message
                    return

        async with asyncio.timeout(60):
            await asyncio.gather(*(write(n) for n in range(8)))
        assert done and all("is full" in message for message in refused.values())
        late = await tasks_in(etcd, prefix)
        assert set(late) == done
    finally:
        etcd.kill()


async def tasks_in(etcd: Etcd, prefix: str) -> list[str]:
    """The ids of all tasks, as etcd has them."""
    client = EtcdClient([etcd.endpoint])
    try:
        start = f"{prefix}/r/{Kind.TASK:d}/".encode()
        answer = await client.range(
            pb.RangeRequest(key=start, range_end=end_of(start), keys_only=True)
        )
        return [kv.key.decode().rsplit("/", 1)[1] for kv in answer.kvs]
    finally:
        await client.close()


async def test_a_compaction_that_was_slept_through_loses_nothing(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    a, b = await managers(shared, prefix), await managers(shared, prefix)
    await a.update(put(*(Task(id=f"t{i}") for i in range(5))))
    await engine_of(b).barrier()
    # Its watch ends, and what it then asks for is gone.
    engine = engine_of(b)
    follower = next(t for t in engine._tasks if "_follow" in repr(t))
    follower.cancel()
    await asyncio.wait([follower])
    await a.update(lambda d: d.delete(Task, "t1"))
    await a.update(put(Task(id="t9", slot=9)))
    two = a.get(Task, "t2")
    assert two is not None
    await a.update(put(replace(two, slot=7)))
    await engine_of(a)._client.compact(a.revision)
    with b.watch(("kind", Kind.TASK)) as watch:
        engine._spawn(engine._follow())
        seen: dict[str, Any] = {}
        async with asyncio.timeout(WAIT_S):
            while len(seen) < 3:
                for change in (await anext(watch)).changes:
                    seen[change.id] = change.new
    assert {k: v and v.slot for k, v in seen.items()} == {"t1": None, "t9": 9, "t2": 7}
    assert rows(a) == rows(b)


async def test_a_foreign_state_is_refused_by_name(
    shared: Etcd, managers: Managers, prefix: str
) -> None:
    client = EtcdClient([shared.endpoint])
    try:
        await client.txn(pb.TxnRequest(success=[put_key(f"{prefix}/format".encode(), b"7")]))
        with pytest.raises(Corrupt, match="upgrade swarmd"):
            await managers(shared, prefix)
    finally:
        await client.close()


async def test_without_etcd_a_commit_says_that_nothing_was_changed(
    own: Etcd, managers: Managers, prefix: str
) -> None:
    store = await managers(own, prefix)
    own.kill()
    with pytest.raises((errors.Unavailable, errors.TimedOut)):
        await store.update(put(Task(id="t")))
    own.start()

    async def works() -> bool:
        try:
            await store.update(put(Task(id="t2")))
        except errors.Unavailable:
            return False
        return True

    async with asyncio.timeout(WAIT_S):
        while not await works():
            await asyncio.sleep(0.05)
