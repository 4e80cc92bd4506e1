"""One manager and many agents: how long until all have a session, and what tasks cost then.

`python -m tests.bench.sessions --agents 1000 --tasks 5000` runs the manager in this process and the
agents, each with its own session and a runtime in memory, in another. The last line is key=value:
`connect_s` until all agents have a session, `deploy_s` from the commit of the tasks until the store
has all of them running, `idle_cores` what the manager uses while nothing but heartbeats happen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop
from msgspec import structs

from agent.description import About
from agent.session import Session
from agent.state import StateFile
from agent.worker import Worker
from manager.ca import Sealer
from manager.dispatcher import Dispatcher
from manager.store import Draft, Store
from manager.store.engines.embedded import EmbeddedEngine
from swarm import logs, rpc
from swarm.clock import SystemClock
from swarm.ids import new_id, seeded_rng
from swarm.rpc import Context
from swarm.v1 import (
    AgentMessage,
    Caller,
    Cluster,
    ClusterInfo,
    ClusterSpec,
    ContainerSpec,
    Endpoint,
    Keyring,
    ManagerMessage,
    Node,
    NodeState,
    NodeStatus,
    PortConfig,
    RelayFrame,
    Service,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)
from swarm.v1.services import DISPATCHER_METHODS
from tests.fakes.runtime import FakeIngress, FakeRuntime
from tests.fakes.waiting import until

TIMEOUT_S = 120.0
IDLE_S = 5.0


class _Trusting:
    """The dispatcher for agents without certificates: their hostname is their id."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def session(
        self, request: AsyncIterator[AgentMessage], context: Context
    ) -> AsyncIterator[ManagerMessage]:
        first = await anext(request)
        assert first.hello is not None and first.hello.description is not None
        identity = rpc.Identity(Caller.WORKER, node_id=first.hello.description.hostname)

        async def messages() -> AsyncIterator[AgentMessage]:
            yield first
            async for message in request:
                yield message

        async for answer in self._dispatcher.session(messages(), Context(identity, context.peer)):
            yield answer

    def relay(
        self, request: AsyncIterator[RelayFrame], context: Context
    ) -> AsyncIterator[RelayFrame]:
        return self._dispatcher.relay(request, context)


def node_ids(count: int) -> list[str]:
    return [f"node{i:05d}" for i in range(count)]


# ------------------------------------------------------------------ the agents' process


async def be_agents(count: int, socket: str, folder: Path) -> None:
    """Runs so many agents until standard input ends."""
    rng = seeded_rng(7)

    async def connect(address: str) -> rpc.Channel:
        return rpc.Channel.unix(address)

    async def learn(_: ClusterInfo) -> None: ...

    async with asyncio.TaskGroup() as group:
        for node_id in node_ids(count):
            worker = Worker(
                runtimes=[FakeRuntime()],
                ingress=FakeIngress(),
                state=StateFile(folder / node_id),
                about=About(node_id, "bench", data_path_addr="10.0.0.1", data_path_port=1),
                clock=SystemClock(),
            )
            group.create_task(worker.run(lambda: None))
            session = Session(worker, connect=connect, managers=[socket], rng=rng, on_cluster=learn)
            group.create_task(session.run())
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, sys.stdin.read)
        raise SystemExit


# ------------------------------------------------------------------ the manager's process


async def be_manager(agents: int, tasks: int, *, ports: bool) -> None:
    clock = SystemClock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store(EmbeddedEngine(folder / "store.db", clock), clock)
        await store.open()
        await store.update(lambda draft: _fill(draft, agents, ports=ports))
        dispatcher = Dispatcher(
            store, clock, seeded_rng(1), sealer=Sealer(b"k" * 32), node_id="manager"
        )
        server = rpc.server()
        anyone = rpc.Identity(Caller.WORKER)
        server.add_generic_rpc_handlers(
            (rpc.handler(DISPATCHER_METHODS, _Trusting(dispatcher), lambda *_: anyone),)
        )
        socket = str(folder / "manager.sock")
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        running = asyncio.create_task(dispatcher.run())
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.sessions", "--be-agents", socket),
            *("--agents", str(agents), "--folder", name),
            stdin=asyncio.subprocess.PIPE,
        )
        try:
            await _measure(store, agents, tasks)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):
                    await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await server.stop(1)
            await store.close()


def _fill(draft: Draft, agents: int, *, ports: bool) -> None:
    draft.put(Cluster(id="c", spec=ClusterSpec(name="default"), root_ca_pem="root"))
    draft.put(Keyring(id="c", relay_key=b"r" * 32))
    for node_id in node_ids(agents):
        draft.put(Node(id=node_id, status=NodeStatus(state=NodeState.UNKNOWN)))
    spec = ServiceSpec(name="web", task=TaskSpec(container=ContainerSpec(image="web:1")))
    published = (PortConfig(target_port=80, published_port=8080),) if ports else ()
    draft.put(Service(id="s", spec=spec, spec_version=1, endpoint=Endpoint(ports=published)))
    draft.put(ServiceRevision(id="s.1", service_id="s", spec_version=1, spec=spec))


async def _measure(store: Store, agents: int, tasks: int) -> None:
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    ready = lambda: sum(  # noqa: E731
        1 for n in store.all(Node) if n.status and n.status.state == NodeState.READY
    )
    await until(lambda: ready() == agents, timeout_s=TIMEOUT_S, what=ready)
    connect_s = loop.time() - begin_s
    cpu_s = _cpu_s()
    await asyncio.sleep(IDLE_S)
    idle_cores = (_cpu_s() - cpu_s) / IDLE_S
    rng, ids = seeded_rng(3), node_ids(agents)

    def place(draft: Draft) -> None:
        for i in range(tasks):
            draft.put(
                Task(
                    id=new_id(rng),
                    service_id="s",
                    spec_version=1,
                    slot=i + 1,
                    node_id=ids[i % agents],
                    desired_state=TaskState.RUNNING,
                    status=TaskStatus(state=TaskState.ASSIGNED),
                )
            )

    begin_s, cpu_s = loop.time(), _cpu_s()
    await store.update(place)
    running = lambda: sum(  # noqa: E731
        1 for t in store.all(Task) if t.status and t.status.state == TaskState.RUNNING
    )
    deadline_s = begin_s + TIMEOUT_S
    while running() < tasks:
        assert loop.time() < deadline_s, f"{running()} of {tasks} run"
        await asyncio.sleep(0.05)
    deploy_s, deploy_cpu_s = loop.time() - begin_s, _cpu_s() - cpu_s
    begin_s = loop.time()

    def remove(draft: Draft) -> None:
        for task in list(draft.all(Task)):
            draft.put(structs.replace(task, desired_state=TaskState.REMOVE))

    await store.update(remove)
    await until(lambda: store.count(Task) == 0, timeout_s=TIMEOUT_S)
    remove_s = loop.time() - begin_s
    down = agents - ready()
    print(
        f"agents={agents} tasks={tasks} connect_s={connect_s:.2f} idle_cores={idle_cores:.3f} "
        f"deploy_s={deploy_s:.2f} deploy_manager_cpu_s={deploy_cpu_s:.2f} "
        f"remove_s={remove_s:.2f} nodes_down={down}"
    )


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--ports", action="store_true", help="publish a port of the service")
    parser.add_argument("--be-agents", metavar="SOCKET", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    logs.configure(level="error")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, given.agents * 10)), hard))
    if given.be_agents:
        uvloop.run(be_agents(given.agents, given.be_agents, given.folder))
    else:
        uvloop.run(be_manager(given.agents, given.tasks, ports=given.ports))


if __name__ == "__main__":
    main()
