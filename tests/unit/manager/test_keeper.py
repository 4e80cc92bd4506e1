"""The leader's care for the set of managers, over a store in memory and members in a list."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec import structs

from manager.keeper import NEWCOMER_S, Keeper, announced
from manager.store import Draft, Fence, Store
from manager.store.engines.etcd_members import Peer
from manager.store.engines.memory import MemoryEngine
from swarm import errors
from swarm.clock import ManualClock
from swarm.v1 import ManagerStatus, Node, NodeRole, NodeSpec, Reachability
from tests.fakes.waiting import until

LEADER = "m1"


class Engine(MemoryEngine):
    """Managers come and go as the test says."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.here: frozenset[str] = frozenset()
        self.news = asyncio.Event()
        self.forgotten: list[str] = []

        async def changed(known: frozenset[str]) -> frozenset[str]:
            while self.here == known:
                await self.news.wait()
                self.news.clear()
            return self.here

        async def forget(node_id: str) -> None:
            self.forgotten.append(node_id)

        self.present, self.present_changed, self.forget = lambda: self.here, changed, forget

    def show(self, *names: str) -> None:
        self.here = frozenset(names)
        self.news.set()


class Members:
    """etcd's members. `failing` makes removals fail."""

    def __init__(self, *peers: Peer) -> None:
        self.peers = list(peers)
        self.failing = False

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.peers]

    async def list(self) -> tuple[Peer, ...]:
        return tuple(self.peers)

    async def remove(self, url: str) -> None:
        if self.failing:
            raise errors.Unavailable("no quorum")
        self.peers = [p for p in self.peers if p.url != url]


def peer(name: str, *, learner: bool = False) -> Peer:
    return Peer(hash(name) & 0xFFFF, name, f"https://{name or 'new'}:2380", learner)


def manager(name: str, *, role: NodeRole = NodeRole.MANAGER) -> Node:
    return Node(
        id=name,
        spec=NodeSpec(role=role),
        manager_status=ManagerStatus(addr=f"{name}:2377", reachability=Reachability.REACHABLE),
    )


class Bed:
    def __init__(self, store: Store, engine: Engine, members: Members, clock: ManualClock) -> None:
        self.store, self.engine, self.members, self.clock = store, engine, members, clock
        self.fence: Fence
        self.keeping: asyncio.Task[None]

    def status(self, name: str) -> ManagerStatus | None:
        node = self.store.get(Node, name)
        assert node is not None
        return node.manager_status

    async def put(self, *nodes: Node) -> None:
        def change(draft: Draft) -> None:
            for node in nodes:
                found = draft.get(Node, node.id)
                draft.put(structs.replace(node, meta=found.meta if found else None))

        await self.store.update(change)

    async def demote(self, name: str) -> None:
        def change(draft: Draft) -> None:
            node = draft.get(Node, name)
            assert node is not None
            draft.put(structs.replace(node, spec=NodeSpec(role=NodeRole.WORKER)))

        await self.store.update(change)


@contextlib.asynccontextmanager
async def bed(*names: str, here: tuple[str, ...] | None = None) -> AsyncIterator[Bed]:
    clock = ManualClock()
    engine = Engine(clock)
    store = Store(engine, clock)
    await store.open()
    members = Members(*(peer(n) for n in names))
    made = Bed(store, engine, members, clock)
    await made.put(*(manager(n) for n in names))
    engine.show(*(names if here is None else here))
    made.fence = await engine.campaign(LEADER)
    some: Any = members
    keeper = Keeper(store, clock, node_id=LEADER, fence=made.fence, members=some)
    made.keeping = asyncio.create_task(keeper.run())
    try:
        yield made
    finally:
        made.keeping.cancel()
        await asyncio.gather(made.keeping, return_exceptions=True)
        await store.close()


async def test_the_store_says_who_leads_and_who_can_be_reached() -> None:
    async with bed("m1", "m2", "m3", here=("m1", "m2")) as b:
        await until(lambda: b.status("m3").reachability == Reachability.UNREACHABLE)  # type: ignore[union-attr]
        leads = {n: s.leader for n in ("m1", "m2", "m3") if (s := b.status(n)) is not None}
        assert leads == {"m1": True, "m2": False, "m3": False}
        b.engine.show("m1", "m2", "m3")
        await until(lambda: b.status("m3").reachability == Reachability.REACHABLE)  # type: ignore[union-attr]


async def test_a_demoted_manager_leaves_etcd_before_the_store_calls_it_a_worker() -> None:
    async with bed("m1", "m2", "m3") as b:
        b.members.failing = True
        await b.demote("m3")
        await asyncio.sleep(0.1)
        assert b.status("m3") is not None, "its node changed while it still had a vote"
        b.members.failing = False
        await until(lambda: b.status("m3") is None, timeout_s=5)
        assert b.members.names == ["m1", "m2"]
        assert b.engine.forgotten == ["m3"]


async def test_a_manager_whose_going_would_end_the_quorum_stays() -> None:
    async with bed("m1", "m2", "m3", here=("m1", "m3")) as b:
        await b.demote("m3")
        await asyncio.sleep(0.2)
        assert b.members.names == ["m1", "m2", "m3"]
        b.engine.show("m1", "m2", "m3")
        await until(lambda: b.members.names == ["m1", "m2"], timeout_s=5)


async def test_a_dead_manager_can_be_let_go() -> None:
    async with bed("m1", "m2", "m3", here=("m1", "m2")) as b:
        await b.demote("m3")
        await until(lambda: b.status("m3") is None, timeout_s=5)
        assert b.members.names == ["m1", "m2"]


async def test_a_leader_that_is_to_go_leads_no_more() -> None:
    async with bed("m1", "m2") as b:
        await b.demote("m1")
        await asyncio.wait_for(b.keeping, 5)
        assert b.members.names == ["m1", "m2"], "the next leader lets it go"


async def test_members_without_a_manager_are_removed() -> None:
    async with bed("m1", "m2", "m3") as b:
        b.members.peers.append(peer("removed"))
        await b.put(manager("m2"))  # wakes the keeper
        await until(lambda: "removed" not in b.members.names, timeout_s=5)


async def test_a_newcomer_has_its_time_to_come() -> None:
    async with bed("m1") as b:
        b.members.peers.append(peer("", learner=True))
        for _ in range(3):
            await b.put(manager("m1"))
            await asyncio.sleep(0.02)
        assert "" in b.members.names
        b.clock.advance(seconds=NEWCOMER_S + 1)
        await b.put(manager("m1"))
        await until(lambda: "" not in b.members.names, timeout_s=5)


async def test_a_deposed_keeper_enters_nothing() -> None:
    async with bed("m1", "m2", "m3") as b:
        await until(lambda: b.status("m1").leader)  # type: ignore[union-attr]
        await b.engine.campaign("m2")
        b.engine.show("m1")
        await asyncio.sleep(0.1)
        assert b.status("m2").reachability == Reachability.REACHABLE  # type: ignore[union-attr]


def test_a_manager_that_serves_says_where() -> None:
    node = announced(Node(id="m9"), addr="h:2377", engine_version="etcd 3.4.23")
    assert node.manager_status == ManagerStatus(
        addr="h:2377", engine_version="etcd 3.4.23", reachability=Reachability.REACHABLE
    )
    kept = structs.replace(
        node,
        manager_status=ManagerStatus(
            leader=True, addr="old:1", reachability=Reachability.UNREACHABLE
        ),
    )
    status = announced(kept, addr="h:2377", engine_version="").manager_status
    assert status is not None and status.leader and status.addr == "h:2377"
    assert status.reachability == Reachability.UNREACHABLE, "the leader says who can be reached"


@pytest.mark.parametrize("count", [1, 2])
async def test_nothing_is_written_when_nothing_changes(count: int) -> None:
    async with bed("m1", *(["m2"] * (count - 1))) as b:
        await until(lambda: b.status("m1").leader)  # type: ignore[union-attr]
        await asyncio.sleep(0.05)
        before = b.store.revision
        await asyncio.sleep(0.1)
        assert b.store.revision == before
