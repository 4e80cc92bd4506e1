"""What one of the managers does for all: the control loop, the care for the managers, and the nodes
of managers that are gone. Every manager runs this; the engine says which of them leads.
"""

from __future__ import annotations

import asyncio

import structlog

from manager.api.roles import is_manager
from manager.api.watching import dirty
from manager.control import ControlLoop
from manager.dispatcher import Dispatcher
from manager.keeper import Keeper
from manager.store import Fence, Store
from manager.store.engines.etcd_members import Members
from swarm import errors
from swarm.clock import Clock
from swarm.ids import Rng
from swarm.v1 import Node

log = structlog.get_logger("manager")

RETRY_S_MIN, RETRY_S_MAX = 0.2, 2.0


class Leading:
    """`run` until cancelled."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        rng: Rng,
        *,
        node_id: str,
        dispatcher: Dispatcher,
        members: Members | None,
        problems: dict[str, str],
    ) -> None:
        """`members`: see Keeper. `problems` is told why there is no leadership."""
        self._store = store
        self._clock = clock
        self._rng = rng
        self._node_id = node_id
        self._dispatcher = dispatcher
        self._members = members
        self._problems = problems

    async def run(self) -> None:
        """Leads whenever it is this manager's turn."""
        engine, node_id = self._store.engine, self._node_id
        while True:
            await self._until_manager()
            fence = await self._campaign()
            log.info("leadership_won", epoch=fence.epoch)
            loop = ControlLoop(self._store, self._clock, self._rng, fence=fence)
            keeper = Keeper(
                self._store, self._clock, node_id=node_id, fence=fence, members=self._members
            )
            tasks = tuple(
                asyncio.ensure_future(part)
                for part in (loop.run(), keeper.run(), engine.wait_deposed(fence))
            )
            self._dispatcher.lead(True)
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    await task
                log.warning("leadership_lost", epoch=fence.epoch)
            finally:
                self._dispatcher.lead(False)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._resign(fence)

    async def _resign(self, fence: Fence) -> None:
        """So that another need not wait; one that cannot be told waits."""
        try:
            await self._store.engine.resign(fence)
        except errors.SwarmError as error:
            log.info("not_resigned", reason=error.message)

    async def _until_manager(self) -> None:
        """A node that is to be a worker leads no more."""
        async with dirty(self._store, (("node", self._node_id),)) as changed:
            while (node := self._store.get(Node, self._node_id)) is not None and not is_manager(
                node
            ):
                await changed.wait()
                changed.clear()

    async def _campaign(self) -> Fence:
        """Leadership, however long a disk that is full keeps it from being written: meanwhile the
        manager answers what is asked of it.
        """
        delay_s = RETRY_S_MIN
        while True:
            try:
                fence = await self._store.engine.campaign(self._node_id)
            except errors.Unavailable as error:
                self._problems["leadership"] = error.message
                log.warning("leadership_not_won", reason=error.message, retry_s=delay_s)
            else:
                self._problems.pop("leadership", None)
                return fence
            await asyncio.sleep(delay_s)
            delay_s = min(RETRY_S_MAX, delay_s * 2)
