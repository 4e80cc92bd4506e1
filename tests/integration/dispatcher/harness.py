"""Managers' stores and dispatchers, and agents with fake runtimes, over real gRPC on unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from msgspec import structs

from agent.description import About
from agent.session import Session
from agent.state import StateFile
from agent.usage import Meter
from agent.worker import Worker
from manager.ca import Sealer
from manager.dispatcher import Dispatcher
from manager.store import Draft, Store
from manager.store.engines.embedded import EmbeddedEngine
from swarm import rpc
from swarm.clock import SECOND_NS, SystemClock
from swarm.ids import new_id, seeded_rng
from swarm.v1 import (
    Caller,
    Cluster,
    ClusterInfo,
    ClusterSpec,
    ContainerSpec,
    Endpoint,
    Keyring,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    PortConfig,
    Service,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)
from swarm.v1.services import DISPATCHER_METHODS, MANAGERS_METHODS
from tests.fakes.cut_log import CutLog
from tests.fakes.runtime import FakeIngress, FakeRuntime
from tests.fakes.waiting import until

HEARTBEAT_NS = 100_000_000
MANAGERS_SOCKET = "managers.sock"
CONTAINER = ContainerSpec(image="busybox")
SPEC = TaskSpec(container=CONTAINER)


class Manager:
    """Store and dispatcher of one manager; each node gets a socket on which it is itself."""

    def __init__(self, folder: Path, *, name: str = "manager", log: CutLog | None = None) -> None:
        """`log`: what it shares with other managers, whose folders are beside its own."""
        self.folder = folder
        self.name = name
        self._log = log
        self.clock = SystemClock()
        self.rng = seeded_rng(sum(name.encode()))
        self.sealer = Sealer(b"k" * 32)
        self.store: Store
        self.dispatcher: Dispatcher
        self._running: asyncio.Task[None] | None = None
        self._servers: list[Any] = []
        self._nodes: list[str] = []

    async def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.store = Store(
            self._log.engine(announced=self.name)
            if self._log is not None
            else EmbeddedEngine(self.folder / "store.db", self.clock),
            self.clock,
        )
        await self.store.open()
        self.dispatcher = Dispatcher(
            self.store,
            self.clock,
            self.rng,
            sealer=self.sealer,
            node_id=self.name,
            connect=self._reach,
        )
        self._running = asyncio.create_task(self.dispatcher.run())
        for node_id in self._nodes:
            await self._serve(node_id)
        if self._log is not None:
            await self._serve_managers()

    async def stop(self) -> None:
        if self._running is None:
            return
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        self._running = None
        for server in self._servers:
            await server.stop(0.5)
        self._servers = []
        await self.store.close()

    async def kill(self) -> None:
        """As `kill -9` does, which others see in the log a little later."""
        for server in self._servers:
            await server.stop(None)
        self._servers = []
        await self.stop()
        if self._log is not None:
            self._log.leave(self.name)

    async def make_cluster(self, *, heartbeat_ns: int = HEARTBEAT_NS) -> None:
        def fill(draft: Draft) -> None:
            spec = ClusterSpec(name="default", heartbeat_period_ns=heartbeat_ns)
            draft.put(Cluster(id="cluster", spec=spec, root_ca_pem="root"))
            draft.put(Keyring(id="cluster", relay_key=b"r" * 32))

        await self.store.update(fill)

    async def add_node(self, node_id: str) -> None:
        node = Node(
            id=node_id,
            spec=NodeSpec(role=NodeRole.WORKER),
            description=NodeDescription(hostname=node_id),
            status=NodeStatus(state=NodeState.UNKNOWN),
        )
        await self.store.update(lambda draft: draft.put(node))
        await self.know_node(node_id)

    async def know_node(self, node_id: str) -> None:
        """Listens for a node that another manager has made."""
        self._nodes.append(node_id)
        await self._serve(node_id)

    async def _reach(self, address: str) -> rpc.Channel:
        """Another manager, at the address that the store has of it."""
        return rpc.Channel.unix(str(self.folder.parent / host(address) / MANAGERS_SOCKET))

    async def _serve_managers(self) -> None:
        identity = rpc.Identity(Caller.MANAGER, node_id="other", cluster_id="cluster")
        server = rpc.server()
        forwarding = [m for m in MANAGERS_METHODS if m.name == "forward"]
        server.add_generic_rpc_handlers(
            (rpc.handler(forwarding, self.dispatcher, lambda *_: identity),)
        )
        path = self.folder / MANAGERS_SOCKET
        path.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        self._servers.append(server)

    async def _serve(self, node_id: str) -> None:
        identity = rpc.Identity(Caller.WORKER, node_id=node_id, cluster_id="cluster")
        server = rpc.server()
        server.add_generic_rpc_handlers(
            (rpc.handler(DISPATCHER_METHODS, self.dispatcher, lambda *_: identity),)
        )
        path = self.socket(node_id)
        Path(path).unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        self._servers.append(server)

    def socket(self, node_id: str) -> str:
        return str(self.folder / f"{node_id}.sock")

    # -------------------------------------------------------------- what the control loop does

    async def add_service(
        self,
        name: str,
        spec: TaskSpec = SPEC,
        *,
        ports: tuple[PortConfig, ...] = (),
        change: Callable[[ServiceRevision], ServiceRevision] = lambda r: r,
    ) -> str:
        service_id = f"s-{name}"
        service_spec = ServiceSpec(name=name, task=spec, labels={"tier": "front"})

        def fill(draft: Draft) -> None:
            draft.put(
                Service(
                    id=service_id, spec=service_spec, spec_version=1, endpoint=Endpoint(ports=ports)
                )
            )
            draft.put(
                change(
                    ServiceRevision(
                        id=f"{service_id}.1",
                        service_id=service_id,
                        spec_version=1,
                        spec=service_spec,
                    )
                )
            )

        await self.store.update(fill)
        return service_id

    async def add_tasks(
        self,
        service_id: str,
        node_id: str,
        count: int = 1,
        *,
        desired: TaskState = TaskState.RUNNING,
        change: Callable[[Task], Task] = lambda t: t,
    ) -> list[str]:
        slots = len(self.store.by(Task, "service", service_id))
        tasks = [
            change(
                Task(
                    id=new_id(self.rng),
                    service_id=service_id,
                    spec_version=1,
                    slot=slots + i + 1,
                    node_id=node_id,
                    desired_state=desired,
                    status=TaskStatus(state=TaskState.ASSIGNED, timestamp_ns=self.clock.now_ns()),
                )
            )
            for i in range(count)
        ]

        def fill(draft: Draft) -> None:
            for task in tasks:
                draft.put(task)

        await self.store.update(fill)
        return [t.id for t in tasks]

    async def want(self, state: TaskState, *task_ids: str) -> None:
        def change(draft: Draft) -> None:
            for task_id in task_ids:
                if (task := draft.get(Task, task_id)) is not None:
                    draft.put(structs.replace(task, desired_state=state))

        await self.store.update(change)

    # -------------------------------------------------------------- looking

    def state(self, task_id: str) -> TaskState | None:
        task = self.store.get(Task, task_id)
        return task.status.state if task is not None and task.status is not None else None

    def status(self, task_id: str) -> TaskStatus:
        task = self.store.get(Task, task_id)
        assert task is not None and task.status is not None
        return task.status

    def node_status(self, node_id: str) -> NodeStatus:
        node = self.store.get(Node, node_id)
        assert node is not None and node.status is not None
        return node.status

    async def reach(self, state: TaskState, *task_ids: str, timeout_s: float = 10.0) -> None:
        await until(
            lambda: all(self.state(t) == state for t in task_ids),
            timeout_s=timeout_s,
            what=lambda: [self.state(t) for t in task_ids],
        )

    async def node_reaches(self, node_id: str, state: NodeState, timeout_s: float = 10.0) -> None:
        await until(
            lambda: self.node_status(node_id).state == state,
            timeout_s=timeout_s,
            what=lambda: self.node_status(node_id),
        )


class Agent:
    """One node's agent; its runtime outlives it."""

    def __init__(self, manager: Manager, node_id: str, folder: Path) -> None:
        self.manager = manager
        self.node_id = node_id
        self.runtime = FakeRuntime()
        self.ingress = FakeIngress()
        self.folder = folder
        self.clusters: list[ClusterInfo] = []
        self.removed = asyncio.Event()
        self.worker: Worker
        self.session: Session
        self._lives = 0
        self._running: asyncio.Task[None] | None = None

    async def start(self, *managers: str) -> None:
        """Knows these managers at first, its own by default."""
        self.worker = Worker(
            runtimes=[self.runtime],
            ingress=self.ingress,
            state=StateFile(self.folder),
            about=About(self.node_id, "1.0", data_path_addr="10.0.0.1", data_path_port=7946),
            clock=self.manager.clock,
        )
        self.session = Session(
            self.worker,
            connect=self._connect,
            managers=managers or [self.manager.socket(self.node_id)],
            rng=seeded_rng(2),
            on_cluster=self._learn,
            on_removed=self.removed.set,
            meter=Meter(
                self.worker.measurable,
                node_id=self.node_id,
                clock=self.manager.clock,
                folders=lambda: (self.folder,),
            ),
        )
        ready = asyncio.Event()
        self._running = asyncio.create_task(self._run(ready))
        await ready.wait()

    async def _run(self, ready: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.worker.run(ready.set))
            await ready.wait()
            group.create_task(self.session.run())

    async def _connect(self, manager: str) -> rpc.Channel:
        if manager.startswith("/"):
            return rpc.Channel.unix(manager)
        return rpc.Channel.unix(
            str(self.manager.folder.parent / host(manager) / f"{self.node_id}.sock")
        )

    async def _learn(self, info: ClusterInfo) -> None:
        self.clusters.append(info)

    async def kill(self) -> None:
        """Ends the agent as `kill -9` does: the next one sees the files as they were at this
        moment.
        """
        self._lives += 1
        copy = self.folder.with_name(f"{self.node_id}-{self._lives}")
        shutil.copytree(self.folder, copy)
        self.folder = copy
        await self.stop()
        self.ingress = FakeIngress()

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def connected(self) -> None:
        await until(lambda: self.session.connected, what=lambda: self.session.problem)


@contextlib.asynccontextmanager
async def cluster(
    folder: Path, *node_ids: str, heartbeat_ns: int = HEARTBEAT_NS, start: bool = True
) -> AsyncIterator[tuple[Manager, list[Agent]]]:
    """A manager and agents, all up unless told otherwise."""
    manager = Manager(folder)
    await manager.start()
    agents: list[Agent] = []
    try:
        await manager.make_cluster(heartbeat_ns=heartbeat_ns)
        for node_id in node_ids:
            await manager.add_node(node_id)
            agent = Agent(manager, node_id, folder / node_id)
            agents.append(agent)
            if start:
                await agent.start()
                await agent.connected()
        yield manager, agents
    finally:
        for agent in agents:
            await agent.stop()
            await agent.runtime.close()
        await manager.stop()


@contextlib.asynccontextmanager
async def managers(
    folder: Path, count: int, *node_ids: str, heartbeat_ns: int = SECOND_NS
) -> AsyncIterator[tuple[list[Manager], list[Agent]]]:
    """Managers m1, m2, … over one log, and agents that know the first of them; the agents' sessions
    are there.
    """
    log = CutLog(SystemClock())
    made = [Manager(folder / f"m{i + 1}", name=f"m{i + 1}", log=log) for i in range(count)]
    agents: list[Agent] = []
    try:
        for manager in made:
            await manager.start()
        await made[0].make_cluster(heartbeat_ns=heartbeat_ns)

        def fill(draft: Draft) -> None:
            for manager in made:
                draft.put(
                    Node(
                        id=manager.name,
                        spec=NodeSpec(role=NodeRole.MANAGER),
                        status=NodeStatus(state=NodeState.DOWN),
                        manager_status=ManagerStatus(addr=address(manager.name)),
                    )
                )

        await made[0].store.update(fill)
        for node_id in node_ids:
            await made[0].add_node(node_id)
            for manager in made[1:]:
                await manager.know_node(node_id)
            agent = Agent(made[0], node_id, folder / node_id)
            agents.append(agent)
            await agent.start(address("m1"))
            await agent.connected()
            await made[0].node_reaches(node_id, NodeState.READY)
        yield made, agents
    finally:
        for agent in agents:
            await agent.stop()
            await agent.runtime.close()
        for manager in made:
            await manager.stop()


def address(name: str) -> str:
    """What the store has as a manager's address."""
    return f"{name}:2377"


def host(addr: str) -> str:
    """Which manager that is."""
    return addr.partition(":")[0]
