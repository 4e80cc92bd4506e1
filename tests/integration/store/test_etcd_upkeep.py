"""Upkeep of a real etcd: room made again after it was full, and files that shrink, in turn."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from etcd3aio import _protobuf as pb

from manager.store import Draft, Store
from manager.store.engines import etcd_upkeep
from manager.store.engines.etcd_client import EtcdClient, Full
from manager.store.engines.etcd_upkeep import SLOT_S, SLOTS, Upkeep
from swarm import errors
from swarm.clock import ManualClock
from swarm.v1 import Task
from tests.integration.store.etcd_lab import CLOCK, Lab, eventually, open_lab, task_ids, until

pytestmark = pytest.mark.slow

QUOTA_BYTES = 16 << 20
LARGE = "x" * 200_000


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path.name) as made:
        yield made


@asynccontextmanager
async def upkeep(lab: Lab, name: str, *, rank: int = 0) -> AsyncIterator[EtcdClient]:
    """Beside the member, until the block ends; the client is the test's to use too."""
    client = EtcdClient([lab.members[name].endpoint])
    work = Upkeep(client, clock=CLOCK, rank=lambda: rank, quota_bytes=QUOTA_BYTES)
    running = asyncio.create_task(work.run())
    try:
        yield client
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()


async def put(store: Store, task: Task) -> None:
    def change(draft: Draft) -> None:
        known = draft.get(Task, task.id)
        draft.put(Task(id=task.id, node_id=task.node_id, meta=known.meta if known else None))

    await store.update(change)


def remove(task_id: str, draft: Draft) -> None:
    draft.delete(Task, task_id)


async def fill(store: Store, *, ids: int) -> str:
    """Writes until it is refused; what is said then. `ids`: how many objects, again and again."""
    for i in itertools.count():
        try:
            await put(store, Task(id=f"t{i % ids}", node_id=f"{i}{LARGE}"))
        except (errors.Unavailable, errors.TimedOut) as error:
            return error.message
    raise AssertionError


async def test_without_upkeep_a_full_etcd_stays_full(lab: Lab) -> None:
    """What the others here rely on."""
    lab.make("n1", quota_bytes=QUOTA_BYTES)
    await lab.start("n1")
    store = await lab.store("n1")
    assert "is full" in await fill(store, ids=3)
    client = EtcdClient([lab.members["n1"].endpoint])
    status = await client.status()
    await client.compact(status.header.revision, physical=True)
    await client.defragment()
    assert (await client.status()).dbSize < QUOTA_BYTES / 4
    with pytest.raises(errors.Unavailable, match="is full"):
        await put(store, Task(id="more"))
    assert [a.kind for a in await client.alarms()] == ["NOSPACE"]
    await client.close()


@pytest.mark.parametrize("count", [1, 3])
async def test_an_etcd_filled_by_old_revisions_takes_changes_again_by_itself(
    lab: Lab, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_upkeep, "LOOK_S", 1.0)
    names = [f"n{i + 1}" for i in range(count)]
    for name in names:
        if name == "n1":
            lab.make(name, quota_bytes=QUOTA_BYTES)
            await lab.start(name)
        else:
            await lab.grown(name, quota_bytes=QUOTA_BYTES)
    store = await lab.store("n1")
    assert "is full" in await fill(store, ids=3)
    began_s = CLOCK.monotonic_s()
    ready = [upkeep(lab, name, rank=i) for i, name in enumerate(names)]
    async with ready[0] as client:
        rest = [await r.__aenter__() for r in ready[1:]]
        try:
            await eventually(lambda: put(store, Task(id="more")), within_s=40)
            print(
                f"{count} members: took changes again after {CLOCK.monotonic_s() - began_s:.1f} s"
            )
            async with asyncio.timeout(40):
                for c in (client, *rest):
                    while await c.alarms() or (await c.status()).dbSize > QUOTA_BYTES / 2:
                        await asyncio.sleep(0.1)
        finally:
            for r in ready[1:]:
                await r.__aexit__(None, None, None)
    assert task_ids(store) == {"t0", "t1", "t2", "more"}


async def test_an_etcd_full_of_objects_lets_them_be_removed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the store itself, although what removes needs a little room too."""
    monkeypatch.setattr(etcd_upkeep, "LOOK_S", 1.0)
    monkeypatch.setattr(etcd_upkeep, "SCARCE_S", 3.0)
    lab.make("n1", quota_bytes=QUOTA_BYTES)
    await lab.start("n1")
    store = await lab.store("n1")
    member = lab.members["n1"]
    async with upkeep(lab, "n1") as client:
        assert "is full" in await fill(store, ids=1_000)
        full = sorted(task_ids(store))
        assert (await client.status()).dbSize > QUOTA_BYTES
        pid = member.pid
        await member.restart()
        await until(lambda: member.pid not in (pid, None) and not member.problem)
        for id_ in full[: len(full) // 2]:
            await eventually(partial(store.update, partial(remove, id_)), within_s=40)
        await eventually(lambda: put(store, Task(id="more", node_id=LARGE)), within_s=40)
        async with asyncio.timeout(40):
            while await client.alarms():
                await asyncio.sleep(0.1)
    assert task_ids(store) == {*full[len(full) // 2 :], "more"}


async def test_an_etcd_emptied_beneath_the_store_is_in_use_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_upkeep, "LOOK_S", 1.0)
    lab.make("n1", quota_bytes=QUOTA_BYTES)
    await lab.start("n1")
    client = EtcdClient([lab.members["n1"].endpoint])

    async def write(key: str) -> None:
        put = pb.RequestOp(request_put=pb.PutRequest(key=key.encode(), value=LARGE.encode()))
        await client.txn(pb.TxnRequest(success=[put]))

    await eventually(lambda: write("k"))
    said: Exception | None = None
    for i in itertools.count():
        try:
            await write(f"k{i}")
        except errors.SwarmError as error:
            said = error
            break
    assert isinstance(said, Full)
    delete = pb.DeleteRangeRequest(key=b"k", range_end=b"l")
    await client.txn(pb.TxnRequest(success=[pb.RequestOp(request_delete_range=delete)]))
    async with upkeep(lab, "n1"):
        await eventually(lambda: write("more"), within_s=40)
    await client.close()


class Wasteful:
    """A client whose member has far more than it uses."""

    where = "here"

    def __init__(self) -> None:
        self.size, self.used = 300 << 20, 20 << 20
        self.defragmented = 0

    async def status(self) -> Any:
        return pb.StatusResponse(dbSize=self.size, dbSizeInUse=self.used)

    async def defragment(self) -> None:
        self.defragmented += 1
        self.size = self.used


async def test_members_defragment_one_at_a_time() -> None:
    clock = ManualClock()
    clients = [Wasteful() for _ in range(3)]
    works = [
        Upkeep(c, clock=clock, rank=lambda r=i: r)  # type: ignore[arg-type,misc]
        for i, c in enumerate(clients)
    ]
    moments: dict[int, float] = {}
    for _ in range(int(SLOTS * SLOT_S / 5) + 1):
        for i, work in enumerate(works):
            await work.look()
            if clients[i].defragmented:
                moments.setdefault(i, clock.monotonic_s())
        clock.advance(seconds=5)
    assert [c.defragmented for c in clients] == [1, 1, 1]
    times = sorted(moments.values())
    assert all(b - a >= SLOT_S / 2 for a, b in itertools.pairwise(times))


@pytest.mark.parametrize(
    ("size", "used", "rank"),
    [
        (60 << 20, 1 << 20, 0),  # too little to gain
        (300 << 20, 200 << 20, 0),  # most of it in use
        (300 << 20, 20 << 20, -1),  # not among those present
    ],
)
async def test_what_is_not_worth_it_is_left(size: int, used: int, rank: int) -> None:
    clock, client = ManualClock(), Wasteful()
    client.size, client.used = size, used
    work = Upkeep(client, clock=clock, rank=lambda: rank)  # type: ignore[arg-type]
    for _ in range(int(SLOTS * SLOT_S / 5) + 1):
        await work.look()
        clock.advance(seconds=5)
    assert client.defragmented == 0


async def test_a_real_file_shrinks_in_its_turn(lab: Lab) -> None:
    await lab.founded()
    client = EtcdClient([lab.members["n1"].endpoint])
    value = b"x" * (1 << 20)
    ops = [pb.RequestOp(request_put=pb.PutRequest(key=b"k", value=value))]
    await eventually(lambda: client.txn(pb.TxnRequest(success=ops)))
    for _ in range(100):
        await client.txn(pb.TxnRequest(success=ops))
    before = await client.status()
    await client.compact(before.header.revision, physical=True)
    clock = ManualClock(now_ns=0)
    work = Upkeep(client, clock=clock, rank=lambda: 0)

    async def shrunk() -> bool:
        # What is used etcd tells when something has been written since.
        await client.txn(pb.TxnRequest(success=ops))
        await work.look()
        return bool((await client.status()).dbSize < 8 << 20)

    async with asyncio.timeout(20):
        while not await shrunk():
            await asyncio.sleep(0.1)
    assert before.dbSize > 80 << 20
    await client.close()
