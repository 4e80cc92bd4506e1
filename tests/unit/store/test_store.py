from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from manager.store import (
    Batch,
    Corrupt,
    Deposed,
    Draft,
    Op,
    Stale,
    Store,
    Watch,
    WatchLost,
    codec,
    watch,
)
from manager.store.engines.memory import MemoryEngine
from swarm import errors
from swarm.clock import ManualClock
from swarm.v1 import Config, ConfigSpec, Kind, Node, Service, ServiceSpec, Task, TaskState


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def engine(clock: ManualClock) -> MemoryEngine:
    return MemoryEngine(clock)


@pytest.fixture
async def store(engine: MemoryEngine, clock: ManualClock) -> AsyncIterator[Store]:
    store = Store(engine, clock)
    await store.open()
    yield store
    store.check_invariants()
    await store.close()


def put(*objects: Any) -> Any:
    return lambda draft: [draft.put(o) for o in objects]


def web(id_: str = "s", name: str = "web") -> Service:
    return Service(id=id_, spec=ServiceSpec(name=name))


def count_up(draft: Draft) -> int:
    """Counts in a field that holds a number."""
    counter = draft.get(Node, "counter") or Node(id="counter")
    return draft.put(
        replace(counter, certificate_expires_at_ns=counter.certificate_expires_at_ns + 1)
    ).certificate_expires_at_ns


async def test_a_writer_reads_what_it_wrote(store: Store, clock: ManualClock) -> None:
    await store.update(put(Task(id="t", slot=1)))
    task = store.get(Task, "t")
    assert task is not None
    assert task.meta is not None
    assert (task.meta.version, task.meta.created_at_ns) == (store.revision, clock.now_ns())
    clock.advance(seconds=1)
    await store.update(put(replace(task, slot=2)))
    changed = store.get(Task, "t")
    assert changed is not None
    assert changed.meta is not None
    assert (changed.slot, changed.meta.version) == (2, 2)
    assert changed.meta.created_at_ns < changed.meta.updated_at_ns == clock.now_ns()


async def test_an_empty_draft_is_not_written(store: Store) -> None:
    await store.update(put(Task(id="t")))
    task = store.get(Task, "t")
    draft = store.draft()
    draft.put(replace(task))  # type: ignore[type-var]
    with store.watch(("all",)) as reader:
        assert await store.commit(draft) == store.revision == 1
        assert reader.pending == 0


async def test_a_draft_that_lost_a_race_is_stale_and_changes_nothing(store: Store) -> None:
    await store.update(put(Task(id="t", slot=1)))
    draft = store.draft()
    draft.put(replace(draft.get(Task, "t"), slot=2))  # type: ignore[type-var]
    draft.put(Task(id="other"))
    await store.update(lambda d: d.put(replace(d.get(Task, "t"), slot=3)))  # type: ignore[type-var]
    with pytest.raises(Stale, match="'t'"):
        await store.commit(draft)
    assert [t.slot for t in store.all(Task)] == [3]


async def test_a_draft_relies_on_what_it_required(store: Store) -> None:
    await store.update(put(Node(id="n"), Task(id="t")))
    draft = store.draft()
    draft.require(draft.get(Node, "n"))  # type: ignore[arg-type]
    draft.put(replace(draft.get(Task, "t"), node_id="n"))  # type: ignore[type-var]
    await store.update(lambda d: d.delete(Node, "n"))
    with pytest.raises(Stale):
        await store.commit(draft)


async def test_concurrent_updates_of_one_object_lose_nothing(store: Store) -> None:
    results = await asyncio.gather(*(store.update(count_up) for _ in range(300)))
    assert sorted(results) == list(range(1, 301))


async def test_update_gives_up_after_its_attempts(store: Store, engine: MemoryEngine) -> None:
    calls = 0

    def spoiled(draft: Draft) -> None:
        nonlocal calls
        calls += 1
        count_up(draft)
        engine._versions[Kind.NODE, "counter"] = 1_000 + calls  # somebody else, each time

    with pytest.raises(Stale):
        await store.update(spoiled, attempts=5)
    assert calls == 5
    engine._versions.clear()


async def test_update_stops_when_its_function_raises(store: Store) -> None:
    def refuse(draft: Draft) -> None:
        draft.put(Task(id="t"))
        raise errors.Invalid("no")

    with pytest.raises(errors.Invalid):
        await store.update(refuse)
    assert (store.revision, store.count(Task)) == (0, 0)


async def test_of_two_who_take_a_name_at_once_one_gets_it(store: Store) -> None:
    results = await asyncio.gather(
        *(store.update(put(web(f"s{n}"))) for n in range(20)), return_exceptions=True
    )
    conflicts = [r for r in results if isinstance(r, errors.Conflict)]
    assert len(conflicts) == 19
    assert all("service name 'web' is taken by s" in c.message for c in conflicts)
    assert store.count(Service) == 1


async def test_names_are_freed_passed_on_and_swapped_by_renaming(store: Store) -> None:
    await store.update(put(web("s1", "a"), web("s2", "b")))

    def rename(draft: Draft, id_: str, name: str) -> None:
        draft.put(replace(draft.get(Service, id_), spec=ServiceSpec(name=name)))  # type: ignore[type-var]

    def rotate(draft: Draft) -> None:
        for id_, name in (("s1", "c"), ("s2", "a"), ("s1", "b")):
            rename(draft, id_, name)

    await store.update(rotate)
    store.check_invariants()
    assert [o.id for o in store.by(Service, "name", "a")] == ["s2"]
    assert [o.id for o in store.by(Service, "name", "b")] == ["s1"]

    def replace_one(draft: Draft) -> None:
        draft.delete(Service, "s1")
        draft.put(web("s3", "b"))

    await store.update(replace_one)
    store.check_invariants()
    await store.update(lambda d: d.delete(Service, "s3"))
    await store.update(put(web("s4", "b")))


async def test_a_deposed_leader_cannot_write(store: Store) -> None:
    old = await store.engine.campaign("n1")
    await store.update(put(Task(id="t")), fence=old)
    new = await store.engine.campaign("n1")
    assert new.epoch > old.epoch
    async with asyncio.timeout(5):
        await store.engine.wait_deposed(old)
    calls = 0

    def write(draft: Draft) -> None:
        nonlocal calls
        calls += 1
        draft.put(Task(id="u"))

    with pytest.raises(Deposed, match="epoch 1, and now n1 leads in epoch 2"):
        await store.update(write, fence=old)
    assert calls == 1
    await store.update(write, fence=new)


async def test_a_failed_commit_changes_nothing_and_the_next_works(
    store: Store, engine: MemoryEngine
) -> None:
    await store.update(put(web()))
    engine.failing = errors.Unavailable("disk full")
    with pytest.raises(errors.Unavailable):
        await store.update(put(Task(id="t")))
    assert store.get(Service, "s") is not None
    engine.failing = None
    await store.update(put(Task(id="t")))
    assert store.revision == 2


async def test_a_watch_has_no_gap_under_concurrent_commits(store: Store) -> None:
    rng = random.Random(5)

    async def follow(reader: Watch, until: int) -> tuple[list[int], dict[str, Task]]:
        revisions: list[int] = []
        mirror: dict[str, Task] = {}
        with reader:
            async for batch in reader:
                revisions.append(batch.revision)
                for change in batch.changes:
                    mirror.pop(change.id, None)
                    if change.new is not None:
                        mirror[change.id] = change.new
                if batch.revision == until:
                    break
        return revisions, mirror

    async def write() -> None:
        for _ in range(20):
            id_ = f"t{rng.randrange(30)}"

            def change(draft: Draft, id_: str = id_) -> None:
                task = draft.get(Task, id_)
                if task is not None and task.slot % 3 == 2:
                    draft.delete(Task, id_)
                else:
                    draft.put(replace(task, slot=task.slot + 1) if task else Task(id=id_))

            await store.update(change)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        early = group.create_task(follow(store.watch(("kind", Kind.TASK)), 400))
        for _ in range(20):
            group.create_task(write())
        for _ in range(5):  # some turns later, in the middle of the commits
            await asyncio.sleep(0)
        late = group.create_task(follow(store.watch(("all",), from_revision=0), 400))
    expected = list(range(1, 401)), {t.id: t for t in store.all(Task)}
    assert early.result() == late.result() == expected


async def test_what_a_watch_tells_adds_up_to_the_tables(store: Store) -> None:
    await store.update(put(*(Task(id=f"t{n}", node_id=f"n{n % 3}") for n in range(9))))
    mirror = {t.id: t for t in store.by(Task, "node", "n1")}
    reader = store.watch(("node", "n1"))

    def churn(draft: Draft, turn: int) -> None:
        for task in list(draft.all(Task)):
            if (turn + len(task.id) + task.slot) % 2:
                node_id = f"n{(int(task.node_id[1:]) + turn) % 3}"
                draft.put(replace(task, node_id=node_id, slot=task.slot + 1))

    for turn in range(10):
        await store.update(lambda d, turn=turn: churn(d, turn))  # type: ignore[misc]
    reader._hub.forget(reader)
    while reader.pending:
        for change in (await anext(reader)).changes:
            if change.new is None or change.new.node_id != "n1":
                mirror.pop(change.id, None)
            else:
                mirror[change.id] = change.new
    assert mirror == {t.id: t for t in store.by(Task, "node", "n1")}


async def test_a_watch_that_asks_too_far_back_is_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "HISTORY_CHANGES_MAX", 2)
    for _ in range(5):
        await store.update(count_up)
    with pytest.raises(WatchLost):
        store.watch(("all",), from_revision=1)
    with store.watch(("all",), from_revision=3) as reader:
        assert (await anext(reader)).revision == 4


async def test_a_restarted_store_has_the_same_state(
    store: Store, engine: MemoryEngine, clock: ManualClock
) -> None:
    await store.update(put(web(), Task(id="t", desired_state=TaskState.RUNNING), Node(id="n")))
    await store.update(put(Config(id="c", spec=ConfigSpec(name="conf", data=b"x"))))
    await store.update(lambda d: d.delete(Node, "n"))
    before = [store.get(Service, "s"), store.get(Task, "t"), store.get(Config, "c")]
    await store.close()
    again = Store(engine, clock)
    await again.open()
    assert [again.get(Service, "s"), again.get(Task, "t"), again.get(Config, "c")] == before
    assert (again.revision, again.count(Node)) == (3, 0)
    again.check_invariants()
    with pytest.raises(errors.Conflict):
        await again.update(put(web("s2")))
    with pytest.raises(WatchLost):
        again.watch(("all",), from_revision=2)
    await again.close()


async def test_commits_of_another_manager_are_followed(store: Store, engine: MemoryEngine) -> None:
    reader = store.watch(("kind", Kind.TASK))
    value = codec.encode(Task(id="t", slot=4))
    await engine.commit([Op(Kind.TASK, "t", value, 0)], [], None, "ada")
    await engine.commit([Op(Kind.TASK, "t", None, 1)], [], None)
    one, two = await anext(reader), await anext(reader)
    assert isinstance(one, Batch)
    assert (one.changes[0].old, one.changes[0].new.slot) == (None, 4)
    assert (two.changes[0].old.slot, two.changes[0].new) == (4, None)
    assert one.changes[0].new.meta.version == 1
    assert isinstance(two, Batch)
    assert (one.who, two.who) == ("ada", "")


# ---------------------------------------------------------------- guards


def take_lowest(draft: Draft) -> int:
    """Gives out a number by looking at all tasks, as ports are given out."""
    taken = {task.slot for task in draft.all(Task)}
    number = next(n for n in range(1, 100) if n not in taken)
    draft.put(Task(id=f"t{number}-{len(taken)}-{id(draft)}", slot=number))
    draft.guard(f"number/{number}")
    return number


async def test_of_two_who_find_the_same_free_one_goes_again(store: Store) -> None:
    drafts = [store.draft(), store.draft()]
    assert [take_lowest(draft) for draft in drafts] == [1, 1]
    await store.commit(drafts[0])
    with pytest.raises(Stale):
        await store.commit(drafts[1])
    assert await store.update(take_lowest) == 2
    given = await asyncio.gather(*(store.update(take_lowest) for _ in range(20)))
    assert sorted(given) == list(range(3, 23))


async def test_different_guards_do_not_hinder_each_other(store: Store) -> None:
    one, two = store.draft(), store.draft()
    for draft, name in ((one, "a"), (two, "b")):
        draft.put(Task(id=name))
        draft.guard(name)
    await store.commit(one)
    await store.commit(two)
    assert (store.guarded("a"), store.guarded("b"), store.guarded("c")) == (1, 2, 0)


async def test_a_guard_without_a_change_is_not_written(store: Store) -> None:
    draft = store.draft()
    draft.guard("a")
    await store.commit(draft)
    assert (store.revision, store.guarded("a")) == (0, 0)


async def test_guards_are_known_after_a_restart_and_no_watch_shows_them(
    store: Store, engine: MemoryEngine, clock: ManualClock
) -> None:
    reader = store.watch(("all",))
    await store.update(take_lowest)
    batch = await anext(reader)
    assert isinstance(batch, Batch)
    assert [change.kind for change in batch.changes] == [Kind.TASK]
    await store.close()
    again = Store(engine, clock)
    await again.open()
    assert again.guarded("number/1") == again.freeze().guarded("number/1") == 1
    draft = again.draft()
    draft.put(Task(id="x"))
    draft.guard("number/1")
    await again.commit(draft)
    again.check_invariants()
    await again.close()


async def test_a_guard_that_another_manager_removed_counts_as_never_written(
    store: Store, engine: MemoryEngine
) -> None:
    await store.update(take_lowest)
    await engine.commit([Op(codec.GUARDS, "number/1", None, 1)], [], None)
    assert store.guarded("number/1") == 0
    draft = store.draft()
    draft.put(Task(id="x"))
    draft.guard("number/1")
    await store.commit(draft)


async def test_a_cancelled_writers_commit_is_applied_all_the_same(
    engine: MemoryEngine, clock: ManualClock
) -> None:
    store = Store(engine, clock)
    await store.open()
    gate = asyncio.Event()
    commit = engine.commit

    async def slow(*args: Any) -> int:
        async def later() -> int:
            await gate.wait()
            return await commit(*args)

        return await asyncio.shield(asyncio.ensure_future(later()))

    engine.commit = slow  # type: ignore[method-assign, assignment]
    writing = asyncio.ensure_future(store.update(put(Task(id="t", slot=3))))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    reader = store.watch(("all",))
    gate.set()
    async with asyncio.timeout(5):
        await anext(reader)
    assert [t.slot for t in store.all(Task)] == [3]
    assert store._sent == {}
    await store.close()


@pytest.mark.parametrize(
    ("op", "says"),
    [
        pytest.param(Op(Kind.TASK, "t9", b"\x01garbage", 0), "row task 't9'", id="object"),
        pytest.param(Op(codec.NAMES, "4/web", b"\x07", 0), "row table 128 '4/web'", id="name"),
        pytest.param(Op(codec.GUARDS, "p", b"\x07", 0), "row table 129 'p'", id="guard"),
        pytest.param(
            Op(codec.NAMES, "4/web", codec.encode_owner("nobody"), 0), "nobody", id="orphaned name"
        ),
    ],
)
async def test_a_corrupt_row_is_named_and_nothing_is_loaded(
    engine: MemoryEngine, clock: ManualClock, op: Op, says: str
) -> None:
    engine.start(lambda *_: None)
    await engine.commit([Op(Kind.TASK, "t1", codec.encode(Task(id="t1")), 0), op], [], None)
    store = Store(engine, clock)
    with pytest.raises(Corrupt, match=says):
        await store.open()
    assert store.count(Task) == 0
    with pytest.raises(errors.Unavailable, match="store is closed"):
        await store.update(put(Task(id="x")))


async def test_a_closed_store_refuses_and_its_watches_end(store: Store) -> None:
    reader = store.watch(("all",))
    await store.close()
    await store.close()
    assert [b async for b in reader] == []
    with pytest.raises(errors.Unavailable):
        await store.update(count_up)
    with pytest.raises(errors.Unavailable):
        store.watch(("all",))


async def test_the_task_writer_makes_writers_of_many_tasks_take_turns(store: Store) -> None:
    await store.update(put(*(Task(id=f"t{n}") for n in range(50))))
    attempts = 0

    async def touch_all() -> None:
        nonlocal attempts
        async with store.task_writer:
            draft = store.draft()
            for task in draft.all(Task):
                draft.put(replace(task, slot=task.slot + 1))
            attempts += 1
            await store.commit(draft)

    await asyncio.gather(*(touch_all() for _ in range(10)))
    assert {t.slot for t in store.all(Task)} == {10}
    assert attempts == 10
