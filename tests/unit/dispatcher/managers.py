"""Several managers over one log, and agents, in virtual time: mark tests with `looptime`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from agent.session import Session
from manager.ca import Sealer
from manager.dispatcher import Dispatcher
from manager.store import Draft, Store
from swarm import errors
from swarm.clock import SECOND_NS
from swarm.ids import seeded_rng
from swarm.v1 import (
    AgentMessage,
    Cluster,
    ClusterInfo,
    ClusterSpec,
    Hello,
    Keyring,
    Kind,
    ManagerMessage,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    TaskReport,
)
from swarm.v1.services import DispatcherClient
from tests.fakes.cut_log import CutEngine, CutLog
from tests.fakes.wire import Wire
from tests.fakes.worker import idle_worker

NOW_NS = 1_700_000_000 * SECOND_NS


class LoopClock:
    """The loop's time, which is virtual in these tests."""

    def now_ns(self) -> int:
        return NOW_NS + round(self.monotonic_s() * SECOND_NS)

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()


def address(manager_id: str) -> str:
    return f"{manager_id}:2377"


class Manager:
    """One manager's store and dispatcher."""

    def __init__(self, cluster: Managers, manager_id: str) -> None:
        self.id = manager_id
        self._cluster = cluster
        self.engine: CutEngine
        self.store: Store
        self.dispatcher: Dispatcher
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.engine = self._cluster.log.engine(announced=self.id)
        self.store = Store(self.engine, self._cluster.clock)
        await self.store.open()
        self.dispatcher = Dispatcher(
            self.store,
            self._cluster.clock,
            seeded_rng(self._cluster.number()),
            sealer=Sealer(b"k" * 32),
            node_id=self.id,
            connect=self._cluster.wire.connector(self.id),
        )
        self._running = asyncio.create_task(self.dispatcher.run())
        self._cluster.wire.serve(address(self.id), self.dispatcher)

    async def stop(self) -> None:
        """In order: says goodbye."""
        await self._end()
        self._cluster.wire.kill(address(self.id))
        self._cluster.log.leave(self.id)

    async def kill(self) -> None:
        """As `kill -9` does; others see it missing 3 s later."""
        self.engine.lag()
        self._cluster.wire.kill(address(self.id))
        await self._end()
        self._cluster.missing_after(self.id, 3.0)

    async def vanish(self) -> None:
        """Its machine has no power any more."""
        self.engine.lag()
        self._cluster.wire.vanish(address(self.id))
        await self._end()
        self._cluster.missing_after(self.id, 3.0)

    async def _end(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None
            # What was said last goes out.
            await asyncio.sleep(0.01)
            await self.store.close()

    def held(self) -> set[str]:
        """The nodes with a session here."""
        return {n for n, s in self.dispatcher._sessions.items() if not s.ended}


class Agent:
    """One node's session."""

    def __init__(self, cluster: Managers, node_id: str) -> None:
        self.id = node_id
        self._cluster = cluster
        self.session: Session
        self._running: asyncio.Task[None] | None = None

    async def start(self, *managers: str) -> None:
        """Knows these managers at first, all by default."""
        known = managers or tuple(self._cluster.managers)
        self.session = Session(
            idle_worker(self.id),
            connect=self._cluster.wire.connector(self.id),
            managers=[address(m) for m in known],
            rng=seeded_rng(self._cluster.number()),
            on_cluster=self._learn,
        )
        self._running = asyncio.create_task(self.session.run())

    async def _learn(self, info: ClusterInfo) -> None:
        return None

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    @property
    def running(self) -> bool:
        return self._running is not None


class Managers:
    """The cluster."""

    def __init__(self, seed: int) -> None:
        self.clock = LoopClock()
        self.log = CutLog(self.clock)
        self.wire = Wire()
        self.managers: dict[str, Manager] = {}
        self.agents: dict[str, Agent] = {}
        self._seed = seed
        self._count = 0
        self._timers: list[asyncio.TimerHandle] = []
        self.states: list[tuple[float, str, NodeState]] = []  # all that nodes went through
        self._noting: asyncio.Task[None] | None = None
        self.store: Store  # one more reader of the log

    def number(self) -> int:
        """Another seed each time."""
        self._count += 1
        return self._seed * 1000 + self._count

    def missing_after(self, manager_id: str, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_later(seconds, self.log.leave, manager_id))

    async def begin(self, managers: int, nodes: int) -> None:
        self.store = Store(self.log.engine(), self.clock)
        await self.store.open()
        names = [f"m{i + 1}" for i in range(managers)]

        def fill(draft: Draft) -> None:
            spec = ClusterSpec(name="default")
            draft.put(Cluster(id="cluster", spec=spec, root_ca_pem="root"))
            draft.put(Keyring(id="cluster", relay_key=b"r" * 32))
            for name in names:
                draft.put(
                    Node(
                        id=name,
                        spec=NodeSpec(role=NodeRole.MANAGER),
                        status=NodeStatus(state=NodeState.DOWN),
                        manager_status=ManagerStatus(addr=address(name)),
                    )
                )
            for i in range(nodes):
                draft.put(
                    Node(
                        id=f"n{i + 1}",
                        spec=NodeSpec(role=NodeRole.WORKER),
                        description=NodeDescription(hostname=f"n{i + 1}"),
                        status=NodeStatus(state=NodeState.DOWN),
                    )
                )

        await self.store.update(fill)
        self._noting = asyncio.create_task(self._note())
        self.managers = {name: Manager(self, name) for name in names}
        self.agents = {f"n{i + 1}": Agent(self, f"n{i + 1}") for i in range(nodes)}
        for manager in self.managers.values():
            await manager.start()

    async def _note(self) -> None:
        before: dict[str, NodeState] = {}
        with self.store.watch(("kind", Kind.NODE)) as watch:
            async for batch in watch:
                for change in batch.changes:
                    if isinstance(change.new, Node) and change.new.status:
                        state = change.new.status.state
                        if before.get(change.id) != state:
                            before[change.id] = state
                            self.states.append((self.clock.monotonic_s(), change.id, state))

    async def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for agent in self.agents.values():
            await agent.stop()
        for manager in self.managers.values():
            await manager._end()
        await self.wire.close()
        if self._noting is not None:
            self._noting.cancel()
            await asyncio.gather(self._noting, return_exceptions=True)
        await self.store.close()

    # -------------------------------------------------------------- looking

    def status(self, node_id: str) -> NodeStatus:
        node = self.store.get(Node, node_id)
        assert node is not None and node.status is not None
        return node.status

    def downs(self, node_id: str) -> list[float]:
        """When the node went down."""
        return [at for at, n, state in self.states if n == node_id and state == NodeState.DOWN]

    def holder(self, node_id: str) -> str | None:
        """The one manager with a session of the node; None: there is not exactly one."""
        found = [m.id for m in self.managers.values() if node_id in m.held()]
        return found[0] if len(found) == 1 else None

    def settled(self) -> bool:
        """Whether each running agent has one session, and the store says where."""
        for agent in self.agents.values():
            status = self.status(agent.id)
            if not agent.running:
                if status.state != NodeState.DOWN:
                    return False
            elif not (
                agent.session.connected
                and status.state == NodeState.READY
                and status.manager_id == self.holder(agent.id)
            ):
                return False
        return True

    def summary(self) -> dict[str, object]:
        return {
            a.id: (a.running and a.session.problem, self.holder(a.id), self.status(a.id))
            for a in self.agents.values()
        }


@contextlib.asynccontextmanager
async def cluster(managers: int, nodes: int, *, seed: int = 0) -> AsyncIterator[Managers]:
    made = Managers(seed)
    await made.begin(managers, nodes)
    try:
        yield made
    finally:
        await made.close()


async def within(
    seconds: float, condition: Callable[[], object], what: Callable[[], object] = str
) -> float:
    """Waits for it in virtual time; how long that took."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    while not condition():
        assert loop.time() - begun_s <= seconds, f"not within {seconds:g} s: {what()}"
        await asyncio.sleep(0.01)
    return loop.time() - begun_s


class Raw:
    """A session spoken message by message; see tests/integration/dispatcher for the agent's own."""

    def __init__(self, made: Managers, manager_id: str, node_id: str) -> None:
        self._made = made
        self._address = address(manager_id)
        self._node_id = node_id
        self._out: asyncio.Queue[AgentMessage] = asyncio.Queue()
        self.heard: list[ManagerMessage] = []
        self.error: errors.SwarmError | None = None
        self._talking: asyncio.Task[None] | None = None

    async def open(self, *tasks: TaskReport) -> Raw:
        """Says hello and hears the welcome."""
        description = NodeDescription(hostname=self._node_id)
        self.say(AgentMessage(hello=Hello(protocol=1, description=description, tasks=tasks)))
        self._talking = asyncio.create_task(self._talk())
        await within(5, lambda: self.heard or self.error)
        return self

    def say(self, message: AgentMessage) -> None:
        self._out.put_nowait(message)

    async def _says(self) -> AsyncIterator[AgentMessage]:
        while True:
            yield await self._out.get()

    async def _talk(self) -> None:
        channel = await self._made.wire.connector(self._node_id)(self._address)
        try:
            async for message in DispatcherClient(channel).session(self._says()):
                self.heard.append(message)
        except errors.SwarmError as error:
            self.error = error

    @property
    def goodbye(self) -> str:
        return next((m.goodbye.reason for m in self.heard if m.goodbye is not None), "")

    def ended(self) -> bool:
        return self._talking is not None and self._talking.done()

    async def close(self) -> None:
        if self._talking is not None:
            self._talking.cancel()
            await asyncio.gather(self._talking, return_exceptions=True)
