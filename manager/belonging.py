"""This manager's own place among the managers of its cluster.

Owns what it says of itself in the store (that it serves, and where), that it notices when it is a
manager no more, that it can ask to be none, and its turn when all members of etcd have to start
anew.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from msgspec import structs

from manager.api.objects import update_node
from manager.api.roles import Here, is_manager
from manager.api.watching import dirty
from manager.ca import serving_role
from manager.keeper import announced, serving
from manager.store import Draft, Store
from manager.store.engines.etcd_member import Member
from manager.store.engines.etcd_members import Members
from swarm import errors
from swarm.v1 import Node, NodeRole

log = structlog.get_logger("manager")

RETRY_S: Final = 2.0
# Members whose roots have changed start anew one after the other, this far apart, and wait so long
# for the others to be whole.
RESTART_GAP_S, RESTART_WAIT_S, RESTART_LOOK_S = 5.0, 30.0, 0.5
STEP_DOWN_S: Final = 30.0


class Demoted(errors.SwarmError):
    """The cluster does not have this node as a manager any more."""


class Belonging:
    """One manager's; `here`: which one it is."""

    def __init__(self, store: Store, here: Here, *, addr: str) -> None:
        """`addr`: host:port of its API."""
        self._store = store
        self._here = here
        self._addr = addr
        # It is no manager any more.
        self.gone = asyncio.Event()
        # The roots that its member of etcd trusts are not the cluster's any more.
        self.roots_changed = asyncio.Event()

    async def enlist(self) -> None:
        """Tells the cluster that this manager serves, and where; once it shows as present, so that
        the leader does not take it for one that is gone.
        """
        engine = self._store.engine
        present = engine.present()
        while self._here.node_id not in present:
            present = await engine.present_changed(present)
        facts = await engine.facts()

        def enter(draft: Draft) -> None:
            node = draft.get(Node, self._here.node_id)
            if node is None or not is_manager(node):
                return
            after = announced(node, addr=self._addr, engine_version=facts.version)
            if after != node:
                draft.put(after)

        while True:
            try:
                await self._store.update(enter)
                return
            except (errors.Unavailable, errors.TimedOut, errors.Conflict) as error:
                log.warning("manager_not_enlisted", reason=error.message)
            await asyncio.sleep(RETRY_S)

    async def watch(self) -> None:
        """Raises Demoted once the store has this node as a manager no more."""
        node_id = self._here.node_id
        async with dirty(self._store, (("node", node_id),)) as changed:
            while True:
                node = self._store.get(Node, node_id)
                if node is None or serving_role(node) != NodeRole.MANAGER:
                    raise Demoted(f"node {node_id} is not a manager of the cluster any more")
                await changed.wait()
                changed.clear()

    def rank(self) -> int:
        """Its place among those that serve."""
        own = self._here.node_id
        return sorted({*serving(self._store), own}).index(own)

    async def restart_in_turn(self, member: Member, members: Members) -> None:
        """Starts the member of etcd anew when the roots have changed, which it reads at its start
        alone; one member after the other, while the others are whole.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self.roots_changed.wait()
            await asyncio.sleep(self.rank() * RESTART_GAP_S)
            until_s = loop.time() + RESTART_WAIT_S
            while not await members.all_healthy() and loop.time() < until_s:
                await asyncio.sleep(RESTART_LOOK_S)
            self.roots_changed.clear()  # whatever they are by now, it reads them
            log.info("etcd_restarted_for_new_roots")
            await member.restart()

    async def step_down(self) -> None:
        """Makes this node a worker; returns once the others have let it go. Raises Conflict with
        the reason where that cannot be, Unavailable when it takes too long.
        """
        node_id = self._here.node_id

        def change(draft: Draft) -> None:
            node = draft.get(Node, node_id)
            if node is not None and node.spec is not None:
                spec = structs.replace(node.spec, role=NodeRole.WORKER)
                update_node(draft, node, spec, here=self._here)

        await self._store.update(change)
        try:
            async with asyncio.timeout(STEP_DOWN_S):
                await self.gone.wait()
        except TimeoutError:
            raise errors.Unavailable(
                f"the other managers have not let this one go within {STEP_DOWN_S:g} s; see "
                "`swarmctl node ls` on one of them"
            ) from None
