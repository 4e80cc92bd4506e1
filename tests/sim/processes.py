"""The processes of a cluster: managers and agents, each wired from the real parts.

As manager/main.py and agent/daemon.py wire them, without ports, TLS and etcd.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agent.description import About
from agent.session import Session
from agent.worker import Worker
from manager.api import ControlService, NodeFacts
from manager.ca import Authority, Sealer
from manager.control import ControlLoop
from manager.dispatcher import Dispatcher
from manager.leading import Leading
from manager.store import Store, Watch
from swarm import errors
from swarm.ids import seeded_rng
from swarm.rpc import Identity
from swarm.v1 import ClusterInfo, Gpu
from tests.fakes.runtime import FakeIngress
from tests.sim.disk import AgentDisk, DiskEngine, SimStateFile
from tests.sim.host import Box, Host, SimRuntime
from tests.sim.log import LEASE_S, SimEngine
from tests.sim.loop import Life, Proc, SimClock, SimTask

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

SEAL = b"k" * 32
RESTART_S = 2.0


class Services:
    """What a manager answers."""

    def __init__(
        self, dispatcher: Dispatcher, control: ControlService, authority: Authority
    ) -> None:
        self.session, self.relay = dispatcher.session, dispatcher.relay
        self.control = control
        self._authority = authority

    def admit(self, identity: Identity) -> None:
        """Raises Removed for a node that is not in the cluster any more, as each call does."""
        self._authority._check_member(identity, renews=False)


class Manager:
    """One manager's machine: its process, restarted by whoever looks after processes."""

    def __init__(self, cluster: Cluster, number: int, node_id: str) -> None:
        self.cluster = cluster
        self.host = f"m{number}"
        self.node_id = node_id
        self.address = f"{self.host}:2377"
        self.clock = SimClock(cluster.loop)
        self.proc: Proc | None = None
        self.engine: SimEngine | DiskEngine | None = None
        self.store: Store | None = None
        self.dispatcher: Dispatcher | None = None
        self.wanted = True
        self._main: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self.proc is not None and self.proc.life == Life.RUNS

    def start(self) -> None:
        if self.proc is not None:
            return
        cluster = self.cluster
        proc = self.proc = Proc(self.host)
        cluster.procs.append(proc)
        cluster.note(f"{self.host} starts")
        self.engine = cluster.make_engine(self)
        self._main = cluster.loop.spawn(proc, self._run(proc, self.engine))

    async def _run(self, proc: Proc, engine: SimEngine | DiskEngine) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                if isinstance(engine, SimEngine):
                    group.create_task(engine.follow())
                await self._serve(proc, engine, group)
        except* errors.SwarmError as group_:
            self.cluster.note(f"{self.host} ends: {_first(group_)}")
        except* Exception as group_:
            self.cluster.defect(self.host, _first(group_), "ended a manager")
        finally:
            if self.store is not None and self.proc is proc:
                await self.store.close()
            self.cluster.loop.outside(0, self._ended, proc)

    async def _serve(
        self, proc: Proc, engine: SimEngine | DiskEngine, group: asyncio.TaskGroup
    ) -> None:
        cluster, clock = self.cluster, self.clock
        store = Store(engine, clock)
        while True:
            try:
                await store.open()
                break
            except errors.Unavailable:
                await asyncio.sleep(0.5)
        self.store = store
        rng = seeded_rng(cluster.draw(1 << 30))
        sealer = Sealer(SEAL)
        self.dispatcher = Dispatcher(store, clock, rng, sealer=sealer, node_id=self.node_id)
        unused: Any = _Unused()
        authority = Authority(store, clock)
        control = ControlService(
            store,
            clock,
            rng,
            sealer=sealer,
            relays=self.dispatcher.relays,
            tokens=unused,
            unlock_keys=unused,
            facts=NodeFacts(self.node_id, self.address, "sim"),
            barrier=engine.barrier,
            answers=cluster.net.answers(self.host),
        )
        leading = Leading(
            store, clock, rng, node_id=self.node_id, dispatcher=self.dispatcher, members=None,
            problems={},
        )  # fmt: skip
        group.create_task(self.dispatcher.run())
        group.create_task(control.run())
        group.create_task(leading.run())
        group.create_task(engine.announce(self.node_id))
        cluster.net.serve(self.address, Services(self.dispatcher, control, authority), proc)

    def control_loop(self) -> tuple[ControlLoop, Watch] | None:
        """The one that runs and what it hears by, found as a debugger would."""
        for task in self.cluster.loop_tasks(self.proc):
            coro: Any = task.get_coro()
            if getattr(coro, "__qualname__", "") == "ControlLoop.run" and coro.cr_frame is not None:
                found, watch = (coro.cr_frame.f_locals.get(n) for n in ("self", "watch"))
                if isinstance(found, ControlLoop) and isinstance(watch, Watch):
                    return found, watch
        return None

    # -------------------------------------------------------------- ends

    def stop(self) -> None:
        """In order, as with SIGTERM."""
        if self.proc is not None and self._main is not None:
            self.cluster.note(f"{self.host} is stopped")
            self.cluster.loop.resume(self.proc)
            self._main.cancel()

    def kill(self, *, silent: bool = False) -> None:
        """`silent`: the machine is gone with it."""
        proc = self.proc
        if proc is None:
            return
        cluster = self.cluster
        how = cluster.crash_engine(self, self.engine)
        cluster.note(f"{self.host} is killed{' with its machine' if silent else ''}: log {how}")
        cluster.loop.kill(proc)
        self._gone(silent=silent)

    def _ended(self, proc: Proc) -> None:
        """It ended by itself."""
        if self.proc is proc:
            self.cluster.end_engine(self, self.engine)
            self.cluster.note(f"{self.host} has ended")
            self.cluster.loop.kill(proc)
            self._gone(silent=False)
            if self.wanted:
                self.cluster.loop.outside(RESTART_S, self.start)

    def _gone(self, *, silent: bool) -> None:
        self.cluster.net.unserve(self.address, silent=silent)
        if self.proc is not None:
            self.cluster.net.client_died(self.proc, silent=silent)
        self.proc = self.engine = self.store = self.dispatcher = None
        self._main = None

    def pause(self) -> None:
        if self.proc is None:
            return
        self.cluster.note(f"{self.host} is paused")
        self.cluster.loop.pause(self.proc)
        proc, engine = self.proc, self.engine

        def forsake() -> None:
            if proc.life == Life.PAUSED and isinstance(engine, SimEngine):
                engine._log.forsake(engine)

        self.cluster.loop.outside(LEASE_S, forsake)

    def resume(self) -> None:
        if self.proc is not None and self.proc.life == Life.PAUSED:
            self.cluster.note(f"{self.host} goes on")
            self.cluster.loop.resume(self.proc)


class Agent:
    """One worker's machine: disk, engine, agent."""

    def __init__(
        self,
        cluster: Cluster,
        number: int,
        node_id: str,
        *,
        begun: Callable[[Host, Box], None],
        ended: Callable[[Host, Box], None],
    ) -> None:
        self.cluster = cluster
        self.number = number
        self.host_name = f"n{number}"
        self.node_id = node_id
        rng = random.Random(f"host {cluster.plan.seed} {number}")
        self.clock = SimClock(cluster.loop)
        self.disk = AgentDisk(rng)
        self.engine = Host(cluster.loop, rng, self.host_name, begun=begun, ended=ended)
        self.proc: Proc | None = None
        self.worker: Worker | None = None
        self.session: Session | None = None
        self.wanted = True
        self.removed = False
        self.gpus: tuple[Gpu, ...] = ()
        if number % 4 == 0:
            self.gpus = tuple(
                Gpu(uuid=f"GPU-{number}-{i}", index=i, model="A100", memory_bytes=40 << 30,
                    healthy=True)
                for i in range(2)
            )  # fmt: skip
        self._main: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self.proc is not None and self.proc.life == Life.RUNS

    def start(self) -> None:
        if self.proc is not None or self.removed:
            return
        proc = self.proc = Proc(self.host_name)
        self.cluster.procs.append(proc)
        self.cluster.note(f"{self.host_name} starts")
        self._main = self.cluster.loop.spawn(proc, self._run(proc))

    async def _run(self, proc: Proc) -> None:
        cluster = self.cluster
        worker = self.worker = Worker(
            runtimes=[SimRuntime(self.engine)],
            ingress=FakeIngress(),
            state=SimStateFile(self.disk),
            about=About(self.host_name, "sim"),
            clock=self.clock,
        )
        worker.use_gpus(self.gpus, "")
        self.session = Session(
            worker,
            connect=cluster.net.connector(self.host_name, self.node_id),
            managers=[m.address for m in cluster.managers],
            rng=seeded_rng(cluster.draw(1 << 30)),
            on_cluster=self._learn,
            on_removed=self._removed,
        )
        ready = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(worker.run(ready.set))
                await ready.wait()
                group.create_task(self.session.run())
        except* errors.SwarmError as group_:
            self.cluster.note(f"{self.host_name} ends: {_first(group_)}")
        except* Exception as group_:
            self.cluster.defect(self.host_name, _first(group_), "ended an agent")
        finally:
            cluster.loop.outside(0, self._ended, proc)

    async def _learn(self, info: ClusterInfo) -> None:
        return None

    def _removed(self) -> None:
        """The node is not in the cluster any more: as swarmd does, it empties itself and waits to
        be joined again.
        """
        if not self.removed:
            self.removed = True
            self.cluster.note(f"{self.host_name} was removed")

    # -------------------------------------------------------------- ends

    def stop(self) -> None:
        if self.proc is not None and self._main is not None:
            self.cluster.note(f"{self.host_name} is stopped")
            self.cluster.loop.resume(self.proc)
            self._main.cancel()

    def kill(self, *, silent: bool = False) -> None:
        if self.proc is None:
            return
        self.cluster.note(f"{self.host_name} is killed")
        self.cluster.loop.kill(self.proc)
        self._gone(silent=silent)

    def power_off(self) -> None:
        """The machine is off: its containers end, its last writes may be lost."""
        lost = self.disk.lose_power()
        self.cluster.note(f"{self.host_name} is off, {lost} writes lost")
        self.kill(silent=True)
        self.engine.lose_power()

    def _ended(self, proc: Proc) -> None:
        if self.proc is proc:
            self.cluster.note(f"{self.host_name} has ended")
            self.cluster.loop.kill(proc)
            self._gone(silent=False)
            if self.wanted:
                self.cluster.loop.outside(RESTART_S, self.start)

    def _gone(self, *, silent: bool) -> None:
        if self.proc is not None:
            self.cluster.net.client_died(self.proc, silent=silent)
        self.engine.runtime = None
        self.proc = self.worker = self.session = self._main = None

    def pause(self) -> None:
        if self.proc is not None:
            self.cluster.note(f"{self.host_name} is paused")
            self.cluster.loop.pause(self.proc)

    def resume(self) -> None:
        if self.proc is not None and self.proc.life == Life.PAUSED:
            self.cluster.note(f"{self.host_name} goes on")
            self.cluster.loop.resume(self.proc)


class _Unused:
    """Parts of a manager that no simulated operation reaches."""

    async def settle(self) -> None:
        return None


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def tasks_of(loop_tasks: list[SimTask], proc: Proc | None) -> list[SimTask]:
    return sorted((t for t in loop_tasks if t.proc is proc), key=lambda t: t.number)
