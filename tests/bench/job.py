"""What a job costs the leader, for each of its tasks that finishes.

    python -m tests.bench.job --tasks 50000 --nodes 1000

One process holds a leader: the embedded store on a disk, the control loop with its scheduler, the
dispatcher. The agents are played in it: each has a session with the dispatcher (not over gRPC) and
the agent's own outbox, and reports each state of each of its tasks in a batch that it waits to have
acknowledged; what they themselves take is measured and left out. `ms_per_finished_task`: processor
time of the leader, all threads, from the job's creation until it is complete. `--curve` measures
jobs of 1,000, 10,000 and 100,000 tasks, each in a process of its own, and says how much the dearest
costs over the cheapest.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop

from agent.outbox import Outbox
from manager.ca import Sealer
from manager.control import ControlLoop
from manager.dispatcher import Dispatcher
from manager.garbage import settle
from manager.store import Draft, Store
from manager.store.engines.embedded import EmbeddedEngine
from swarm import logs, rpc
from swarm.clock import SystemClock
from swarm.ids import seeded_rng
from swarm.rpc import Context
from swarm.v1 import (
    AgentMessage,
    Assignments,
    Availability,
    Caller,
    Cluster,
    ClusterSpec,
    ContainerSpec,
    ContainerStatus,
    Heartbeat,
    Hello,
    JobSpec,
    JobState,
    Keyring,
    ManagerMessage,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Platform,
    ReplicatedJob,
    ResourceRequirements,
    Resources,
    Service,
    ServiceMode,
    ServiceRevision,
    ServiceSpec,
    TaskReport,
    TaskSpec,
    TaskState,
    TaskStatus,
)
from tests.fakes.waiting import until

CPU = 1_000_000_000
CURVE = (1_000, 10_000, 100_000)
# What an agent reports of a task that does as it should.
STEPS = (
    TaskState.PREPARING,
    TaskState.READY,
    TaskState.STARTING,
    TaskState.RUNNING,
    TaskState.COMPLETE,
)
HEARTBEAT_S = 4.0
CONNECT_S = 120.0


class Played:
    """Processor time that the agents have taken, which is not the leader's."""

    def __init__(self) -> None:
        self.s = 0.0


class PlayedAgent:
    """One node: takes its tasks through their states, one each time that the last is written."""

    def __init__(self, node_id: str, dispatcher: Dispatcher, played: Played) -> None:
        self._node_id = node_id
        self._dispatcher = dispatcher
        self._played = played
        self._outbox = Outbox(self._wake)
        self._something = asyncio.Event()
        self._steps: dict[str, int] = {}
        self._under_way: tuple[TaskReport, ...] = ()
        self._beats = 0
        self._beat = False

    def _wake(self) -> None:
        self._something.set()

    def beat(self) -> None:
        """Lets the manager hear that the node is there."""
        self._beat = True
        self._something.set()

    async def run(self) -> None:
        """One session, until cancelled."""
        context = Context(rpc.Identity(Caller.WORKER, node_id=self._node_id), "ipv4:10.0.0.1:1")
        async for message in self._dispatcher.session(self._says(), context):
            begun_s = time.thread_time()
            self._hears(message)
            self._played.s += time.thread_time() - begun_s

    async def _says(self) -> AsyncIterator[AgentMessage]:
        yield AgentMessage(hello=Hello(protocol=1, description=description(self._node_id)))
        while True:
            await self._something.wait()
            if self._beat:
                self._beat = False
                self._beats += 1
                yield AgentMessage(heartbeat=Heartbeat(sequence=self._beats))
            begun_s = time.thread_time()
            self._something.clear()
            batch = self._outbox.take()
            if batch is not None:
                self._under_way = batch.reports
            self._played.s += time.thread_time() - begun_s
            if batch is not None:
                yield AgentMessage(statuses=batch)

    def _hears(self, message: ManagerMessage) -> None:
        if message.assignments is not None:
            self._assigned(message.assignments)
        elif message.statuses is not None:
            reports, self._under_way = self._under_way, ()
            self._outbox.acknowledged(message.statuses.sequence)
            for report in reports:
                self._steps[report.task_id] += 1
                self._report(report.task_id)

    def _assigned(self, assignments: Assignments) -> None:
        for assignment in assignments.tasks:
            assert assignment.task is not None
            if assignment.task.id not in self._steps:
                self._steps[assignment.task.id] = 0
                self._report(assignment.task.id)

    def _report(self, task_id: str) -> None:
        step = self._steps[task_id]
        if step == len(STEPS):
            return
        state = STEPS[step]
        container = None
        if state >= TaskState.STARTING:
            code = 0 if state == TaskState.COMPLETE else None
            container = ContainerStatus(container_id="c" * 64, pid=1, exit_code=code)
        status = TaskStatus(
            state=state,
            timestamp_ns=time.time_ns(),
            message=state.name.lower(),
            container=container,
        )
        self._outbox.put(TaskReport(task_id=task_id, status=status))


async def beat(agents: list[PlayedAgent]) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        for agent in agents:
            agent.beat()


def description(node_id: str, *, cores: int = 16) -> NodeDescription:
    return NodeDescription(
        hostname=node_id,
        platform=Platform(architecture="x86_64", os="linux"),
        resources=Resources(cpu_nano=cores * CPU, memory_bytes=64 << 30, pids=32_768),
        runtimes=("docker",),
    )


def fill(draft: Draft, nodes: int) -> None:
    draft.put(Cluster(id="c", spec=ClusterSpec(name="default"), root_ca_pem="root"))
    draft.put(Keyring(id="c", relay_key=b"r" * 32))
    for i in range(nodes):
        spec = NodeSpec(role=NodeRole.WORKER, availability=Availability.ACTIVE)
        draft.put(Node(id=f"node{i:05}", spec=spec, status=NodeStatus(state=NodeState.UNKNOWN)))


def start(draft: Draft, tasks: int) -> None:
    """The job: each task asks for a core, so that a node runs 16 at a time."""
    reservations = Resources(cpu_nano=CPU, memory_bytes=1 << 30)
    spec = ServiceSpec(
        name="batch",
        task=TaskSpec(
            container=ContainerSpec(image="batch:1", command=("work",)),
            resources=ResourceRequirements(reservations=reservations),
        ),
        mode=ServiceMode(
            replicated_job=ReplicatedJob(max_concurrent=tasks, total_completions=tasks)
        ),
        job=JobSpec(),
    )
    draft.put(Service(id="s", spec=spec, spec_version=1, task_version=1))
    draft.put(ServiceRevision(id="s.1", service_id="s", spec_version=1, spec=spec))


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(tasks: int, nodes: int) -> None:
    clock, played = SystemClock(), Played()
    with tempfile.TemporaryDirectory() as name:
        engine = EmbeddedEngine(Path(name) / "store.db", clock)
        store = Store(engine, clock)
        await store.open()
        await store.update(lambda draft: fill(draft, nodes))
        dispatcher = Dispatcher(
            store, clock, seeded_rng(1), sealer=Sealer(b"k" * 32), node_id="manager"
        )
        fence = await engine.campaign("manager")
        loop = ControlLoop(store, clock, seeded_rng(2), fence=fence)
        agents = [PlayedAgent(f"node{i:05}", dispatcher, played) for i in range(nodes)]
        running = [asyncio.create_task(dispatcher.run()), asyncio.create_task(loop.run())]
        await asyncio.sleep(0)
        running += [asyncio.create_task(agent.run()) for agent in agents]
        running.append(asyncio.create_task(beat(agents)))
        ready = lambda: sum(  # noqa: E731
            1 for n in store.all(Node) if n.status and n.status.state == NodeState.READY
        )
        await until(lambda: ready() == nodes, timeout_s=CONNECT_S, what=ready)
        await asyncio.sleep(0.5)
        settle()
        await job(store, tasks, nodes, played)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await store.close()


async def job(store: Store, tasks: int, nodes: int, played: Played) -> None:
    """Runs it and prints what it took."""
    cpu, wall, agents = cpu_s(), time.monotonic(), played.s
    revision = store.revision
    await store.update(lambda draft: start(draft, tasks))
    while True:
        service = store.get(Service, "s")
        assert service is not None
        status = service.job_status
        if status is not None and status.state == JobState.COMPLETE:
            break
        await asyncio.sleep(0.05)
    assert status.completed == tasks, status
    agents = played.s - agents
    leader = cpu_s() - cpu - agents
    wall = time.monotonic() - wall
    print(
        f"tasks={tasks} nodes={nodes} wall_s={wall:.1f} agents_s={agents:.1f} "
        f"commits={store.revision - revision} tasks_per_s={tasks / wall:.0f} "
        f"ms_per_finished_task={1000 * leader / tasks:.3f}"
    )


async def curve(nodes: int) -> None:
    """Each size in a process of its own."""
    costs = []
    for tasks in CURVE:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.job"),
            *("--tasks", str(tasks), "--nodes", str(nodes)),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        print(out.decode(), end="", flush=True)
        found = re.search(r"ms_per_finished_task=([0-9.]+)", out.decode())
        assert found is not None, "a run has failed"
        costs.append(float(found[1]))
    print(
        f"sizes={','.join(map(str, CURVE))} "
        f"dearest_over_cheapest={max(costs) / min(costs):.2f} ms_per_finished_task={max(costs):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=50_000)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--curve", action="store_true", help="1,000, 10,000 and 100,000 tasks")
    given = parser.parse_args()
    logs.configure(level="error")
    if given.curve:
        uvloop.run(curve(given.nodes))
    else:
        uvloop.run(measure(given.tasks, given.nodes))


if __name__ == "__main__":
    main()
