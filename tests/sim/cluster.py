"""One simulated cluster: its machines, its log or state file, and how it is begun and ended."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Any

from manager.store import Draft, Store
from manager.store.engine import Fence, Op
from manager.store.engines import embedded
from manager.store.engines.memory import MemoryEngine
from swarm.clock import SECOND_NS
from swarm.ids import new_id
from swarm.v1 import (
    Availability,
    ClusterSpec,
    Keyring,
    ManagerStatus,
    Node,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
)
from swarm.v1 import Cluster as ClusterObject
from tests.sim.checks import Safety
from tests.sim.disk import DiskEngine, ManagerDisk
from tests.sim.log import Commit, SimEngine, SimLog
from tests.sim.loop import Proc, SimClock, SimLoop, SimTask
from tests.sim.net import Net
from tests.sim.plan import Plan
from tests.sim.processes import Agent, Manager
from tests.sim.trace import Trace, Violation

HEARTBEAT_S = 5


class Cluster:
    """`begin`, then the loop runs, then `end`."""

    def __init__(self, plan: Plan, trace: Trace) -> None:
        self.plan, self.trace = plan, trace
        self.loop = SimLoop()  # type: ignore[abstract]  # of a loop what is used here
        self.loop.on_defect = self.defect
        self.violation: Violation | None = None
        self.procs: list[Proc] = []
        self._rng = random.Random(f"cluster {plan.seed}")
        self.clock = SimClock(self.loop)
        self.net = Net(self.loop, random.Random(f"net {plan.seed}"), self.note)
        self.log: SimLog | None = None
        self.disk: ManagerDisk | None = None
        self.safety = Safety(self)
        self.net.on_down = self.safety.told
        self.net.on_up = self.safety.heard
        if plan.managers > 1:
            self.log = SimLog(self.loop, self.net, random.Random(f"log {plan.seed}"))
        else:
            self.disk = ManagerDisk(random.Random(f"disk {plan.seed}"), plan.seed)
        # What was written and not answered when a manager with a file crashed.
        self._unanswered: list[embedded.Results] = []
        self.managers = [Manager(self, i + 1, new_id(self._rng)) for i in range(plan.managers)]
        self.agents = [self._agent(i + 1) for i in range(plan.nodes)]

    def _agent(self, number: int) -> Agent:
        safety = self.safety
        return Agent(
            self, number, new_id(self._rng), begun=safety.container_begun,
            ended=safety.container_ended,
        )  # fmt: skip

    # -------------------------------------------------------------- for all parts

    def note(self, text: str) -> None:
        if not self.safety.over:
            self.trace.note(self.loop.now_s, text)

    def draw(self, below: int) -> int:
        return self._rng.randrange(below)

    def violate(self, rule: str, text: str) -> None:
        """The first one ends the run."""
        if self.violation is None and not self.safety.over:
            self.violation = Violation(rule, text, self.loop.now_s)
            self.note(f"VIOLATION {rule}: {text}")
            self.loop.halt()

    def defect(self, where: str, error: BaseException | None, what: str) -> None:
        """Something that nobody expects."""
        text = f"{where}: {what}: {error!r}"
        if error is not None and error.__traceback__ is not None:
            frames = []
            tb: TracebackType | None = error.__traceback__
            while tb is not None:
                code = tb.tb_frame.f_code
                frames.append(f"{code.co_filename.rpartition('/')[2]}:{tb.tb_lineno}")
                tb = tb.tb_next
            text += f" ({' > '.join(frames[-6:])})"
        self.violate("defect", text)

    def loop_tasks(self, proc: Proc | None) -> list[SimTask]:
        return [
            t for t in asyncio.all_tasks(self.loop) if isinstance(t, SimTask) and t.proc is proc
        ]

    # -------------------------------------------------------------- the log, or the file

    def make_engine(self, manager: Manager) -> SimEngine | DiskEngine:
        if self.log is not None:
            return self.log.engine(manager.host, manager.clock)
        assert self.disk is not None
        return _Watched(self, self.disk, manager.clock, self.loop)

    def crash_engine(self, manager: Manager, engine: SimEngine | DiskEngine | None) -> str:
        if isinstance(engine, SimEngine):
            assert self.log is not None
            self.log.drop(engine)
            return "as it is"
        assert isinstance(engine, DiskEngine) and self.disk is not None
        if engine.pending:
            self._unanswered.append(engine.pending)
        how = self.disk.crash(engine)
        engine.let_go()
        return how

    def end_engine(self, manager: Manager, engine: SimEngine | DiskEngine | None) -> None:
        if isinstance(engine, SimEngine):
            assert self.log is not None
            self.log.drop(engine)
        elif engine is not None:
            engine.let_go()

    def loaded(self, revision: int, rows: list[Any]) -> None:
        """What a manager with a file has read when it began."""
        unanswered, self._unanswered = self._unanswered, []
        self.safety.loaded(revision, rows, unanswered)

    # -------------------------------------------------------------- begin

    def begin(self) -> None:
        self.loop.spawn(None, self._boot())

    async def _boot(self) -> None:
        engine: Any
        ops: list[Op] = []
        if self.log is not None:
            engine = MemoryEngine(self.clock)
        else:
            assert self.disk is not None
            engine = DiskEngine(self.disk, self.clock, self.loop)
        store = Store(engine, self.clock)
        await store.open()
        take = engine._on_commit

        def note(revision: int, time_ns: int, written: Any, who: str) -> None:
            ops.extend(written)
            take(revision, time_ns, written, who)

        engine._on_commit = note
        await store.update(self._fill)
        await store.close()
        commit = Commit(1, self.clock.now_ns(), ops, "", None)
        self.safety.committed(commit, None)
        if self.log is not None:
            log = self.log
            log.append(commit.time_ns, ops, "", None)
            self.log.on_commit = lambda c: self.safety.committed(c, log.leader)
        for manager in self.managers:
            manager.start()
        for agent in self.agents:
            self.loop.outside(0.1 + self.draw(1000) / 1000, agent.start)

    def _fill(self, draft: Draft) -> None:
        spec = ClusterSpec(
            name="default",
            heartbeat_period_ns=HEARTBEAT_S * SECOND_NS,
            task_history_limit=(5, 5, 2, 1, 0)[self.draw(5)],
        )
        draft.put(
            ClusterObject(
                id="cluster",
                spec=spec,
                root_ca_pem="root",
                default_addr_pool=("10.0.0.0/8",),
                subnet_size=24,
            )
        )
        draft.put(Keyring(id="cluster", relay_key=b"r" * 32))
        for manager in self.managers:
            draft.put(
                Node(
                    id=manager.node_id,
                    spec=NodeSpec(role=NodeRole.MANAGER, availability=Availability.DRAIN),
                    status=NodeStatus(state=NodeState.DOWN),
                    manager_status=ManagerStatus(addr=manager.address),
                )
            )
        for agent in self.agents:
            draft.put(self.node_of(agent))

    def node_of(self, agent: Agent) -> Node:
        zone = "abc"[agent.number % 3]
        return Node(
            id=agent.node_id,
            spec=NodeSpec(
                role=NodeRole.WORKER,
                availability=Availability.ACTIVE,
                labels={"zone": zone},
            ),
            status=NodeStatus(state=NodeState.DOWN),
        )

    # -------------------------------------------------------------- end

    def end(self) -> None:
        """Nothing of it is left behind."""
        self.safety.over = True
        for manager in self.managers:
            manager.wanted = False
        for agent in self.agents:
            agent.wanted = False
        self.loop.bury(self.procs)
        if self.disk is not None:
            self.disk.remove()

    def leader(self) -> Manager | None:
        for manager in self.managers:
            if manager.up and manager.control_loop() is not None:
                return manager
        return None


class _Watched(DiskEngine):
    """Tells the cluster what it reads and writes."""

    def __init__(self, cluster: Cluster, disk: ManagerDisk, clock: SimClock, loop: SimLoop) -> None:
        super().__init__(disk, clock, loop)
        self._cluster = cluster
        self.on_written = self._tell_written

    async def load(self) -> tuple[int, Any]:
        revision, rows = await super().load()
        read = list(rows)
        self._cluster.loaded(revision, read)
        return revision, read

    def _tell_written(self, results: embedded.Results) -> None:
        for commit, result, time_ns in results:
            if isinstance(result, int):
                fence: Fence | None = commit.fence
                self._cluster.safety.committed(
                    Commit(result, time_ns, commit.ops, commit.who, fence), self._fence
                )
