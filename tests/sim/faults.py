"""What goes wrong, and its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.sim.disk import DiskEngine
from tests.sim.log import LOG
from tests.sim.loop import Life
from tests.sim.net import Noise
from tests.sim.plan import Item
from tests.sim.processes import Agent, Manager

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


class Faults:
    """`act` lasts as long as the fault. At `heal` all that is broken is mended."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._net = cluster.net

    async def act(self, item: Item) -> None:
        await getattr(self, f"_{item.kind}")(item)

    def heal(self) -> None:
        cluster = self._cluster
        cluster.note("all faults end")
        self._net.noise.clear()
        for a, b in sorted(self._net.cuts):
            self._net.heal(a, b)
        if cluster.log is not None:
            cluster.log.slow_s = 0.0
        for manager in cluster.managers:
            manager.wanted = True
            manager.resume()
            manager.start()
            if isinstance(manager.engine, DiskEngine):
                manager.engine.full, manager.engine.slow_s = False, 0.0
        for agent in cluster.agents:
            agent.wanted = True
            agent.resume()
            agent.start()
            agent.engine.hung_until_s = 0.0
            agent.engine.slow_s = 0.0
            agent.clock.skew_s = 0.0

    # -------------------------------------------------------------- agents

    def _agent(self, item: Item) -> Agent:
        agents = self._cluster.agents
        return agents[min(len(agents) - 1, int(item.lot(0) * len(agents)))]

    async def _agent_crash(self, item: Item) -> None:
        agent = self._agent(item)
        agent.kill()
        await asyncio.sleep(item.lasts_s * item.lot(1))
        agent.start()

    async def _agent_stop(self, item: Item) -> None:
        agent = self._agent(item)
        agent.wanted = False
        agent.stop()
        await asyncio.sleep(item.lasts_s)
        agent.wanted = True
        agent.start()

    async def _agent_pause(self, item: Item) -> None:
        agent = self._agent(item)
        agent.pause()
        await asyncio.sleep(item.lasts_s)
        agent.resume()

    async def _machine_off(self, item: Item) -> None:
        agent = self._agent(item)
        agent.power_off()
        await asyncio.sleep(item.lasts_s)
        agent.start()

    async def _state_damaged(self, item: Item) -> None:
        agent = self._agent(item)
        agent.kill()
        agent.disk.damaged = True
        await asyncio.sleep(1 + item.lot(1) * 5)
        agent.start()

    async def _clock(self, item: Item) -> None:
        agent = self._agent(item)
        agent.clock.skew_s = (item.lot(1) - 0.5) * 1200
        self._cluster.note(f"{agent.host_name}: clock off by {agent.clock.skew_s:.0f} s")
        await asyncio.sleep(item.lasts_s * 3)
        agent.clock.skew_s = 0.0

    async def _slow_pulls(self, item: Item) -> None:
        agent = self._agent(item)
        agent.engine.slow_s = 5 + item.lot(1) * 40
        await asyncio.sleep(item.lasts_s)
        agent.engine.slow_s = 0.0

    async def _engine_hangs(self, item: Item) -> None:
        agent = self._agent(item)
        now_s = self._cluster.loop.now_s
        agent.engine.hung_until_s = now_s + item.lasts_s
        self._cluster.note(f"{agent.host_name}: engine hangs for {item.lasts_s:.0f} s")

    async def _engine_restarts(self, item: Item) -> None:
        agent = self._agent(item)
        self._cluster.note(f"{agent.host_name}: engine restarts")
        for box in agent.engine.running():
            agent.engine.exit(box, 137, "the engine was restarted")
        agent.engine.hung_until_s = self._cluster.loop.now_s + 1 + item.lot(1) * 5

    async def _containers_die(self, item: Item) -> None:
        agent = self._agent(item)
        for i, box in enumerate(agent.engine.running()):
            if item.lot(i + 1) < 0.5:
                agent.engine.exit(box, 137, "out of memory")

    # -------------------------------------------------------------- network

    async def _cuts(self, item: Item, pairs: list[tuple[str, str]]) -> None:
        self._cluster.note(f"cut: {', '.join(f'{a}>{b}' for a, b in pairs)}")
        for a, b in pairs:
            self._net.cut(a, b)
        await asyncio.sleep(item.lasts_s)
        self._cluster.note(f"healed: {', '.join(f'{a}>{b}' for a, b in pairs)}")
        for a, b in pairs:
            self._net.heal(a, b)

    async def _cut_agent(self, item: Item) -> None:
        """From all managers, or from one; some agents at once."""
        cluster = self._cluster
        count = 1 + int(item.lot(1) ** 3 * len(cluster.agents) / 2)
        begin = int(item.lot(0) * len(cluster.agents))
        agents = (cluster.agents + cluster.agents)[begin : begin + count]
        managers = cluster.managers if item.lot(2) < 0.6 else [self._manager(item)]
        pairs = [(a.host_name, m.host) for a in agents for m in managers]
        await self._cuts(item, pairs + [(b, a) for a, b in pairs])

    async def _cut_one_way(self, item: Item) -> None:
        agent = self._agent(item)
        up = item.lot(1) < 0.5
        pairs = [(agent.host_name, m.host) for m in self._cluster.managers]
        await self._cuts(item, pairs if up else [(b, a) for a, b in pairs])

    async def _cut_manager(self, item: Item) -> None:
        """From all agents; the log is reached."""
        manager = self._manager(item)
        pairs = [(a.host_name, manager.host) for a in self._cluster.agents]
        await self._cuts(item, pairs + [(b, a) for a, b in pairs])

    async def _cut_from_log(self, item: Item) -> None:
        if self._cluster.log is None:
            return
        host = self._manager(item).host
        pairs = [(host, LOG), (LOG, host)] if item.lot(1) < 0.6 else [(LOG, host)]
        await self._cuts(item, pairs)

    async def _noise(self, item: Item) -> None:
        agent = self._agent(item)
        noise = Noise(
            drop=0.02 * item.lot(1), double=0.1 * item.lot(2), swap=0.1 * item.lot(3),
            late_s=item.lot(4) ** 3 * 2,
        )  # fmt: skip
        host = agent.host_name if item.lot(5) < 0.7 else self._manager(item).host
        self._cluster.note(f"{host}: noise")
        self._net.noise[host] = noise
        await asyncio.sleep(item.lasts_s * 2)
        self._net.noise.pop(host, None)

    async def _late(self, item: Item) -> None:
        host = self._manager(item).host if item.lot(1) < 0.5 else LOG
        self._cluster.note(f"{host}: messages are late")
        self._net.noise[host] = Noise(late_s=0.2 + item.lot(2) * 2)
        await asyncio.sleep(item.lasts_s)
        self._net.noise.pop(host, None)

    # -------------------------------------------------------------- managers

    def _manager(self, item: Item) -> Manager:
        """Often the leader."""
        cluster = self._cluster
        leader = cluster.leader()
        if leader is not None and item.lot(10) < 0.5:
            return leader
        return cluster.managers[int(item.lot(9) * len(cluster.managers))]

    async def _manager_crash(self, item: Item) -> None:
        manager = self._manager(item)
        manager.kill(silent=item.lot(1) < 0.4)
        await asyncio.sleep(1 + item.lasts_s * item.lot(2))
        manager.start()

    async def _manager_stop(self, item: Item) -> None:
        manager = self._manager(item)
        manager.wanted = False
        manager.stop()
        await asyncio.sleep(1 + item.lasts_s * item.lot(2))
        manager.wanted = True
        manager.start()

    async def _manager_pause(self, item: Item) -> None:
        manager = self._manager(item)
        if manager.proc is None or manager.proc.life != Life.RUNS:
            return
        manager.pause()
        await asyncio.sleep(item.lasts_s * 0.5)
        manager.resume()

    async def _slow_log(self, item: Item) -> None:
        cluster = self._cluster
        slow_s = 0.05 + item.lot(1) ** 2 * 2
        cluster.note("the log is slow")
        if cluster.log is not None:
            cluster.log.slow_s = slow_s
        for manager in cluster.managers:
            if isinstance(manager.engine, DiskEngine):
                manager.engine.slow_s = slow_s
        await asyncio.sleep(item.lasts_s)
        if cluster.log is not None:
            cluster.log.slow_s = 0.0
        for manager in cluster.managers:
            if isinstance(manager.engine, DiskEngine):
                manager.engine.slow_s = 0.0

    async def _disk_full(self, item: Item) -> None:
        for manager in self._cluster.managers:
            engine = manager.engine
            if isinstance(engine, DiskEngine):
                self._cluster.note(f"{manager.host}: disk full")
                engine.full = True
                await asyncio.sleep(item.lasts_s)
                engine.full = False
