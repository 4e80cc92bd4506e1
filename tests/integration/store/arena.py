"""Three managers' stores on three real etcd members, clients at work on them, and faults.

Each engine reaches its own member through a forwarder, and the members each other, so that both can
be cut. Clients create, change and delete a few objects and read them behind a barrier; candidates
hand leadership round and write under their fences, deposed ones too; a watch on each store notes
all commits; each manager is announced and says whether it is in touch with the log. `judge` says
whether all of that was right.
"""

from __future__ import annotations

import asyncio
import bisect
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from manager.store import TOUCH_S, Deposed, Draft, Fence, Stale, Store
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_fill import fill
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import Task
from tests.etcd import Etcd
from tests.forwarder import Forwarder
from tests.linearizability import (
    Action,
    Commit,
    Operation,
    Outcome,
    check,
    check_acknowledged,
    check_barriers,
    check_fences,
    check_watches,
)
from tests.ports import free_ports

CLOCK = SystemClock()
MANAGERS = 3
CLIENTS = 3  # of each manager
KEYS = 6
PAUSE_S = 0.02  # of a client between two operations, twice that at most
WAIT_S = 30.0
LED = "led"  # the object that leaders write
TERM_S = 1.0  # after which a leader resigns of its own
LOOK_EVERY_S = 0.02


@dataclass(slots=True)
class Manager:
    """One manager's store, the member it uses, and the ways to both."""

    name: str
    etcd: Etcd
    clients: Forwarder  # from the engine to its member
    peers: Forwarder  # from the other members to its member
    store: Store
    log: list[Commit]
    # When it believed itself in touch with the log, and how far it knew the log then.
    touched: list[tuple[float, int]] = field(default_factory=list)

    @property
    def engine(self) -> EtcdEngine:
        assert isinstance(self.store.engine, EtcdEngine)
        return self.store.engine


class Arena:
    """`managers`, and what has happened so far. Times are the clock's, in seconds."""

    def __init__(self, managers: Sequence[Manager], seed: int) -> None:
        self.managers = managers
        self.history: list[Operation] = []
        self.led: list[tuple[float, Fence]] = []
        self.handing_round = True
        self.over = asyncio.Event()
        self._seed = seed
        self._values = 0

    # -------------------------------------------------------------- faults' helpers

    async def leader(self) -> Manager:
        """The one whose member leads etcd."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for manager in self.managers:
                    client = EtcdClient([manager.etcd.endpoint])
                    try:
                        status = await client.status()
                    except errors.Unavailable:
                        continue
                    finally:
                        await client.close()
                    if status.leader and status.leader == status.header.member_id:
                        return manager
                await asyncio.sleep(0.02)

    def others(self, *but: Manager) -> list[Manager]:
        return [m for m in self.managers if m not in but]

    async def until(self, check: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not check():
                await asyncio.sleep(0.005)

    async def work(self, seconds: float, managers: Sequence[Manager] = ()) -> None:
        """Lets time pass while clients work."""
        await asyncio.sleep(seconds)
        await self.progress(managers)

    async def progress(self, managers: Sequence[Manager] = ()) -> float:
        """Until clients of each of these managers (all) got a write through that they begin from
        now on; the time of the first such answer.
        """
        now_s = CLOCK.monotonic_s()
        start = len(self.history)
        names = {m.name for m in managers or self.managers}

        def won() -> dict[str, float]:
            return {
                op.client.partition(".")[0]: op.returned
                for op in reversed(self.history[start:])
                if op.invoked >= now_s and op.outcome is Outcome.OK and op.action is Action.PUT
            }

        await self.until(lambda: names <= won().keys())
        return min(at for name, at in won().items() if name in names)

    # -------------------------------------------------------------- who works

    async def client(self, manager: Manager, number: int) -> None:
        """One client of one manager: one operation after another."""
        rng = random.Random(f"{self._seed}/{manager.name}/{number}")
        name = f"{manager.name}.{number}"
        while not self.over.is_set():
            action = rng.choice([Action.READ, Action.READ, Action.PUT, Action.PUT, Action.DELETE])
            op = await self._perform(manager, name, f"k{rng.randrange(KEYS)}", action)
            if op is not None:
                self.history.append(op)
            await asyncio.sleep(rng.random() * 2 * PAUSE_S)

    async def _perform(
        self, manager: Manager, client: str, key: str, action: Action
    ) -> Operation | None:
        store = manager.store
        known = store.get(Task, key)
        if action is Action.DELETE and known is None:
            return None
        self._values += 1
        op = Operation(
            client,
            key,
            action,
            CLOCK.monotonic_s(),
            0.0,
            value=self._values if action is Action.PUT else None,
            expected=version_of(known) if action is not Action.READ else None,
        )
        outcome, version = Outcome.OK, 0
        try:
            if action is Action.READ:
                await manager.engine.barrier()
                known = store.get(Task, key)
                version = version_of(known)
            else:
                draft = store.draft()
                if action is Action.DELETE:
                    draft.delete(Task, key)
                else:
                    changed = known or Task(id=key)
                    draft.put(msgspec.structs.replace(changed, slot=self._values))
                version = await store.commit(draft)
        except Stale:
            outcome = Outcome.REFUSED
        except errors.Unavailable:
            outcome = Outcome.FAILED
        except errors.TimedOut:
            outcome = Outcome.UNKNOWN
        value = op.value
        if action is Action.READ and known is not None:
            value = known.slot
        return Operation(
            client,
            key,
            action,
            op.invoked,
            CLOCK.monotonic_s(),
            outcome,
            value,
            op.expected,
            version,
            store.revision,
        )

    async def candidate(self, manager: Manager) -> None:
        """Leads when it can, writes under its fence until that is refused, and resigns after a
        while so that another may.
        """
        while not self.over.is_set():
            campaign = asyncio.create_task(manager.engine.campaign(manager.name))
            ending = asyncio.create_task(self.over.wait())
            await asyncio.wait({campaign, ending}, return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            if not campaign.done():
                campaign.cancel()
                await asyncio.gather(campaign, return_exceptions=True)
                return
            fence = campaign.result()
            self.led.append((CLOCK.monotonic_s(), fence))
            await self._lead(manager, fence)

    async def _lead(self, manager: Manager, fence: Fence) -> None:
        until_s = CLOCK.monotonic_s() + TERM_S

        def write(draft: Draft) -> None:
            known = draft.get(Task, LED) or Task(id=LED)
            draft.put(msgspec.structs.replace(known, slot=known.slot + 1, spec_version=fence.epoch))

        while not self.over.is_set():
            if self.handing_round and CLOCK.monotonic_s() > until_s:
                await manager.engine.resign(fence)
            # It does not ask whether it still leads: the fence has to tell.
            try:
                await manager.store.update(write, fence=fence)
            except Deposed:
                return
            except (errors.Unavailable, errors.TimedOut, Stale):
                pass
            await asyncio.sleep(PAUSE_S)

    async def observe(self, manager: Manager) -> None:
        """Notes every commit that a watch of everything shows."""
        with manager.store.watch(("all",)) as watch:
            async for batch in watch:
                changes = [
                    (c.id, None if c.new is None else (c.new.slot, c.new.spec_version))
                    for c in batch.changes
                ]
                manager.log.append(Commit(batch.revision, tuple(sorted(changes))))

    async def announce(self, manager: Manager) -> None:
        """Announces it, and notes when it is in touch."""
        async with asyncio.TaskGroup() as group:
            group.create_task(manager.engine.announce(manager.name))
            while True:
                if manager.engine.in_touch:
                    manager.touched.append((CLOCK.monotonic_s(), manager.store.revision))
                await asyncio.sleep(LOOK_EVERY_S)

    # -------------------------------------------------------------- the judgement

    async def judge(self) -> None:
        """After the clients have ended: whether all that they were told was right, and all stores
        hold the same.
        """
        for manager in self.managers:
            await manager.engine.barrier()
        newest = max(m.store.revision for m in self.managers)
        await self.until(lambda: all(m.store.revision >= newest for m in self.managers))
        tables = [{t.id: t for t in m.store.all(Task)} for m in self.managers]
        assert tables[0] == tables[1] == tables[2]
        await self.until(lambda: len({len(m.log) for m in self.managers}) == 1)
        log = self.managers[0].log
        fenced = [
            (commit.revision, value[1])
            for commit in log
            for key, value in commit.changes
            if key == LED and isinstance(value, tuple)
        ]
        plain = [
            Commit(
                c.revision, tuple((k, v[0] if isinstance(v, tuple) else v) for k, v in c.changes)
            )
            for c in log
        ]
        versions = {(k, v): c.revision for c in plain for k, v in c.changes if v is not None}
        problems = [
            *check_watches({m.name: m.log for m in self.managers}),
            *check_acknowledged(self.history, plain),
            *check_barriers(self.history),
            *check_fences(fenced),
            *self._check_touch(),
            *(str(v) for v in check(self.history, versions)),
        ]
        assert not problems, f"seed {self._seed}:\n" + "\n".join(problems[:5])
        for manager in self.managers:
            manager.store.check_invariants()

    def _check_touch(self) -> Iterator[str]:
        """Whoever is in touch knows all that was acknowledged TOUCH_S ago and before."""
        newest, acknowledged = 0, []
        for op in sorted(self.history, key=lambda op: op.returned):
            if op.outcome is Outcome.OK and op.action is not Action.READ:
                newest = max(newest, op.version)
                acknowledged.append((op.returned, newest))
        for manager in self.managers:
            for at_s, known in manager.touched:
                before = bisect.bisect_left(acknowledged, (at_s - TOUCH_S, 0))
                if before and known < acknowledged[before - 1][1]:
                    yield (
                        f"{manager.name} was in touch at {at_s:.3f} and knew revision {known}, "
                        f"while {acknowledged[before - 1]} was acknowledged"
                    )

    def told(self) -> str:
        """What happened, in one line."""
        count = {o: sum(op.outcome is o for op in self.history) for o in Outcome}
        slowest = max((op.returned - op.invoked for op in self.history), default=0.0)
        words = ", ".join(f"{n} {o.value}" for o, n in count.items())
        return (
            f"{len(self.history)} operations ({words}; slowest {slowest:.1f} s), "
            f"{len(self.led)} leaderships, {len(self.managers[0].log)} commits"
        )


def version_of(task: Task | None) -> int:
    return task.meta.version if task is not None and task.meta is not None else 0


@asynccontextmanager
async def arena(
    folder: Path, *, seed: int = 1, folder_of: Callable[[str], Path] | None = None
) -> AsyncIterator[Arena]:
    """Everything running; at the end clients stop and the history is judged."""
    async with AsyncExitStack() as stack:
        managers = await _managers(folder, stack, folder_of or (lambda name: folder))
        made = Arena(managers, seed)
        async with asyncio.TaskGroup() as watching:
            watches = [
                watching.create_task(work(m))
                for m in managers
                for work in (made.observe, made.announce)
            ]
            await asyncio.sleep(0)
            try:
                async with asyncio.TaskGroup() as group:
                    for manager in managers:
                        group.create_task(made.candidate(manager))
                        for number in range(CLIENTS):
                            group.create_task(made.client(manager, number))
                    try:
                        await made.work(0.5)
                        yield made
                        await made.progress()
                    finally:
                        made.over.set()
                await made.judge()
            finally:
                for watch in watches:
                    watch.cancel()
        print(made.told())


async def _managers(
    folder: Path, stack: AsyncExitStack, folder_of: Callable[[str], Path]
) -> list[Manager]:
    names = [f"m{i + 1}" for i in range(MANAGERS)]
    peers: dict[str, Forwarder] = {}
    for name, port in zip(names, free_ports(MANAGERS), strict=True):
        peers[name] = Forwarder(f"127.0.0.1:{port}")
        await peers[name].start()
        stack.push_async_callback(peers[name].close)
    urls = {name: f"http://{way.endpoint}" for name, way in peers.items()}
    etcds = {}
    for name in names:
        listen = f"http://{peers[name].target}"
        etcd = Etcd(folder_of(name), "--listen-peer-urls", listen, name=name, peers=urls)
        etcds[name] = etcd
        stack.callback(etcd.kill)
        etcd.start(wait=False)
    for etcd in etcds.values():
        await asyncio.to_thread(etcd.wait_ready)
    # A state that was moved here: its revisions are not etcd's.
    client = EtcdClient([etcds[names[0]].endpoint])
    await fill(client, prefix="/swarm", rows=(), revision=1_000_000)
    await client.close()
    managers = []
    for name in names:
        clients = Forwarder(etcds[name].endpoint)
        await clients.start()
        stack.push_async_callback(clients.close)
        engine = EtcdEngine(EtcdClient([clients.endpoint]), clock=CLOCK, writer=name)
        store = Store(engine, CLOCK)
        await store.open()
        stack.push_async_callback(store.close)
        managers.append(Manager(name, etcds[name], clients, peers[name], store, []))
    return managers
