from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.store import Batch, Change, Topic, Watch, WatchLost, watch
from manager.store.tables import BY_CLASS
from manager.store.watch import Hub, topics_of
from swarm import errors
from swarm.v1 import Kind, Node, Service, Task


def task(id_: str, *, node: str = "", service: str = "s") -> Task:
    return Task(id=id_, node_id=node, service_id=service)


def change(old: Any, new: Any) -> Change:
    some = new if new is not None else old
    return Change(BY_CLASS[type(some)].kind, some.id, old, new)


def batch(revision: int, *changes: Change) -> Batch:
    return Batch(revision, 0, changes)


def drain(watch: Watch) -> list[Batch]:
    return list(watch._batches)


def opened(hub: Hub, *topics: Topic, revision: int = 0, since: int | None = None) -> Watch:
    return hub.watch(*topics, revision=revision, from_revision=since)


@pytest.mark.parametrize(
    ("old", "new", "topics"),
    [
        pytest.param(
            None,
            task("t", node="n"),
            {("kind", Kind.TASK), ("service", "s"), ("node", "n")},
            id="task placed",
        ),
        pytest.param(None, task("t"), {("kind", Kind.TASK), ("service", "s")}, id="task waiting"),
        pytest.param(
            task("t", node="n"),
            task("t", node="m"),
            {("kind", Kind.TASK), ("service", "s"), ("node", "n"), ("node", "m")},
            id="task moved",
        ),
        pytest.param(
            task("t", node="n"),
            None,
            {("kind", Kind.TASK), ("service", "s"), ("node", "n")},
            id="task removed",
        ),
        pytest.param(None, Node(id="n"), {("kind", Kind.NODE), ("node", "n")}, id="node"),
        pytest.param(
            None, Service(id="s"), {("kind", Kind.SERVICE), ("service", "s")}, id="service"
        ),
    ],
)
def test_a_change_concerns(old: Any, new: Any, topics: set[Topic]) -> None:
    assert set(topics_of(change(old, new))) == topics
    assert len(topics_of(change(old, new))) == len(topics)


async def test_each_gets_its_own_changes_in_order() -> None:
    hub = Hub()
    everything, of_n, of_s = (
        opened(hub, ("all",)),
        opened(hub, ("node", "n")),
        opened(hub, ("service", "s"), ("kind", Kind.TASK)),
    )
    on_n, on_m = change(None, task("a", node="n")), change(None, task("b", node="m", service="z"))
    node = change(None, Node(id="n"))
    hub.dispatch(batch(1, on_n, on_m, node))
    hub.dispatch(batch(2, on_m))
    hub.check_invariants()
    assert [b.changes for b in drain(everything)] == [(on_n, on_m, node), (on_m,)]
    assert [b.changes for b in drain(of_n)] == [(on_n, node)]
    assert [(b.revision, b.changes) for b in drain(of_s)] == [(1, (on_n, on_m)), (2, (on_m,))]
    assert [(await anext(everything)).revision, (await anext(everything)).revision] == [1, 2]


events = st.lists(
    st.lists(
        st.builds(
            lambda id_, old, new: change(task(id_, node=old) if old else None, task(id_, node=new)),
            st.sampled_from("tuv"),
            st.sampled_from(["", "n", "m"]),
            st.sampled_from(["", "n", "m"]),
        ),
        min_size=1,
        max_size=4,
    ),
    max_size=8,
)


@given(events, st.data())
def test_a_watch_from_a_revision_sees_what_one_open_since_then_saw(
    commits: list[list[Change]], data: st.DataObject
) -> None:
    hub = Hub()
    wanted: list[Topic] = data.draw(
        st.lists(
            st.sampled_from([("all",), ("node", "n"), ("service", "s"), ("kind", Kind.TASK)]),
            min_size=1,
            unique=True,
        )
    )
    since = data.draw(st.integers(0, len(commits)))
    early: Watch | None = None
    for revision, changes in enumerate(commits, start=1):
        if revision == since + 1:
            early = opened(hub, *wanted, revision=since)
        hub.dispatch(batch(revision, *changes))
    late = opened(hub, *wanted, revision=len(commits), since=since)
    assert drain(late) == (drain(early) if early is not None else [])
    hub.check_invariants()


async def test_a_watch_from_the_future_waits_for_it() -> None:
    hub = Hub()
    ahead = opened(hub, ("all",), revision=0, since=2)
    for revision in (1, 2, 3):
        hub.dispatch(batch(revision, change(None, task("t"))))
    assert [b.revision for b in drain(ahead)] == [3]


def test_history_that_is_gone_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HISTORY_CHANGES_MAX", 5)
    hub = Hub()
    hub.start(10)
    for revision in range(11, 31):
        hub.dispatch(batch(revision, change(None, task("t"))))
        hub.check_invariants()
    with pytest.raises(WatchLost, match="since revision 24 are no longer kept, the oldest kept"):
        opened(hub, ("all",), revision=30, since=24)
    kept = opened(hub, ("all",), revision=30, since=25)
    assert [b.revision for b in drain(kept)] == [26, 27, 28, 29, 30]


def test_what_was_before_the_state_was_loaded_is_not_kept() -> None:
    hub = Hub()
    hub.start(10)
    with pytest.raises(WatchLost):
        opened(hub, ("all",), revision=10, since=9)
    assert drain(opened(hub, ("all",), revision=10, since=10)) == []


async def test_a_reader_that_falls_behind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "QUEUED_CHANGES_MAX", 3)
    hub = Hub()
    slow, fast = opened(hub, ("all",)), opened(hub, ("all",))
    for revision in range(1, 6):
        hub.dispatch(batch(revision, change(None, task("t"))))
        assert (await anext(fast)).revision == revision
    with pytest.raises(WatchLost, match="fell behind: 3 changes wait"):
        await anext(slow)
    with pytest.raises(StopAsyncIteration):
        await anext(slow)
    hub.check_invariants()
    hub.dispatch(batch(6, change(None, task("t"))))
    assert slow.pending == 0
    assert (await anext(fast)).revision == 6


async def test_a_single_commit_beyond_the_limit_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "QUEUED_CHANGES_MAX", 3)
    hub = Hub()
    reader = opened(hub, ("all",))
    hub.dispatch(batch(1, *(change(None, task(f"t{n}")) for n in range(10))))
    assert len((await anext(reader)).changes) == 10


async def test_a_waiting_reader_is_woken_by_a_change_and_by_closing() -> None:
    hub = Hub()
    reader = opened(hub, ("all",))
    async with asyncio.timeout(5):
        async with asyncio.TaskGroup() as group:
            first = group.create_task(anext(reader))
            await asyncio.sleep(0)
            hub.dispatch(batch(1, change(None, task("t"))))
        assert first.result().revision == 1

        async def rest() -> list[Batch]:
            return [b async for b in reader]

        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(rest())
            await asyncio.sleep(0)
            reader.close()
        assert waiting.result() == []
    reader.close()
    hub.check_invariants()


async def test_a_cancelled_wait_loses_nothing() -> None:
    hub = Hub()
    reader = opened(hub, ("all",))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await anext(reader)
    hub.dispatch(batch(1, change(None, task("t"))))
    assert (await anext(reader)).revision == 1


async def test_closing_the_hub_lets_readers_finish_what_is_queued() -> None:
    hub = Hub()
    reader = opened(hub, ("all",))
    hub.dispatch(batch(1, change(None, task("t"))))
    hub.close()
    assert [b.revision async for b in reader] == [1]


def test_the_number_of_watches_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WATCHES_MAX", 2)
    hub = Hub()
    with opened(hub, ("all",)):
        opened(hub, ("node", "n"))
        with pytest.raises(errors.Exhausted, match="2 watches are open"):
            opened(hub, ("all",))
    opened(hub, ("all",))


def test_only_those_concerned_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    watches = {n: opened(hub, ("node", f"n{n}")) for n in range(2_000)}
    touched = []
    push = Watch._push

    def spy(self: Watch, batch: Batch) -> None:
        touched.append(self)
        push(self, batch)

    monkeypatch.setattr(Watch, "_push", spy)
    hub.dispatch(batch(1, change(None, task("t", node="n7")), change(None, Node(id="n9"))))
    assert touched == [watches[7], watches[9]]


# ------------------------------------------------------------------ the past by time


def timed(revision: int, time_ns: int) -> Batch:
    return Batch(revision, time_ns, (change(None, task(f"t{revision}")),))


@pytest.mark.parametrize(
    ("since_ns", "after", "lost_ns"),
    [(50, 9, 100), (100, 9, 0), (150, 10, 0), (200, 10, 0), (201, 11, 0), (301, 12, 0)],
)
def test_a_time_leads_to_the_revision_before_it(since_ns: int, after: int, lost_ns: int) -> None:
    hub = Hub()
    hub.start(9, 100)
    for revision, time_ns in ((10, 110), (11, 200), (12, 300)):
        hub.dispatch(timed(revision, time_ns))
    assert hub.kept_since(since_ns) == (after, lost_ns)
    hub.watch(("all",), revision=12, from_revision=after)  # is kept


def test_a_time_before_what_is_kept_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HISTORY_CHANGES_MAX", 2)
    hub = Hub()
    hub.start(0, 100)
    for revision in range(1, 6):
        hub.dispatch(timed(revision, 100 + revision))
    assert hub.kept_since(101) == (3, 103)
    assert hub.kept_since(104) == (3, 0)
    assert Hub().kept_since(5) == (0, 0)
