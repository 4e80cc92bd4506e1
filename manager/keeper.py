"""The leader's care for the set of managers.

Runs on the leader alone. It enters which managers are there and who leads, and lets managers go
that are to be workers: it takes their member out of etcd first, and only then does the store call
them no managers any more, which is what makes their nodes change (see ca.serving_role). Members
that belong to no manager go as well: of nodes that were removed, and of newcomers that never came.

A leader that is to go itself leads no more (`Keeper.run` returns), so that the next one lets it go.
Acts outside the store need no fence: a member is removed because its node is to be no manager, and
if that is not so any more, its manager notices and comes in anew.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from msgspec import structs

from manager.api.roles import is_manager
from manager.api.watching import dirty
from manager.store import Draft, Fence, Store, View
from manager.store.engines.etcd_members import Members, Peer
from swarm import errors
from swarm.clock import SECOND_NS, Clock
from swarm.v1 import Kind, ManagerStatus, Node, Reachability

log = structlog.get_logger("keeper")

LOOK_S: Final = 10.0  # members are looked at this often, whatever the store says
RETRY_S: Final = 1.0
# A newcomer that does not vote after this long is not coming.
NEWCOMER_S: Final = 180.0


def serving(view: View) -> dict[str, Node]:
    """The managers that have served, by id, those that are to go among them."""
    return {n.id: n for n in view.all(Node) if n.manager_status is not None}


class Keeper:
    """`run` while this manager leads."""

    def __init__(
        self, store: Store, clock: Clock, *, node_id: str, fence: Fence, members: Members | None
    ) -> None:
        """`members`: of the etcd that swarmd runs; None: there are none to care for."""
        self._store = store
        self._clock = clock
        self._node_id = node_id
        self._fence = fence
        self._members = members
        # Newcomers to etcd by url: since when they are known here.
        self._newcomers: dict[str, int] = {}

    async def run(self) -> None:
        """Until cancelled, or until this node is to be no manager any more."""
        engine = self._store.engine
        async with dirty(self._store, (("kind", Kind.NODE),)) as changed:
            while not self._leaves():
                changed.clear()
                known = engine.present()
                wait_s = LOOK_S if await self._look() else RETRY_S
                waiting = (
                    asyncio.create_task(changed.wait(wait_s)),
                    asyncio.create_task(engine.present_changed(known)),
                )
                try:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in waiting:
                        task.cancel()
                    heard, _ = await asyncio.gather(*waiting, return_exceptions=True)
                if isinstance(heard, errors.SwarmError):
                    raise heard  # the store was closed

    def _leaves(self) -> bool:
        own = self._store.get(Node, self._node_id)
        others = [n for n in self._store.all(Node) if n.id != self._node_id and is_manager(n)]
        return own is not None and not is_manager(own) and bool(others)

    async def _look(self) -> bool:
        """Puts right what is not; False: not everything could be."""
        try:
            await self._store.update(self._enter, fence=self._fence)
            if self._members is not None:
                await self._sweep(self._members)
            for node_id in sorted(serving(self._store)):
                node = self._store.get(Node, node_id)
                if node is not None and node_id != self._node_id and not is_manager(node):
                    await self._let_go(node_id)
            return True
        except (errors.Unavailable, errors.TimedOut, errors.Conflict) as error:
            log.warning("managers_not_looked_after", reason=error.message)
            return False

    def _enter(self, draft: Draft) -> None:
        """Who is there and who leads."""
        present = self._store.engine.present()
        for node in serving(draft).values():
            assert node.manager_status is not None
            there = node.id == self._node_id or node.id in present
            status = structs.replace(
                node.manager_status,
                leader=node.id == self._node_id,
                reachability=Reachability.REACHABLE if there else Reachability.UNREACHABLE,
            )
            if status != node.manager_status:
                draft.put(structs.replace(node, manager_status=status))

    # -------------------------------------------------------------- letting go

    async def _let_go(self, node_id: str) -> None:
        members = self._members
        if members is not None:
            peers = await members.list()
            peer = next((p for p in peers if p.name == node_id), None)
            if peer is not None:
                self._check_quorum(peers, node_id)
                await members.remove(peer.url)

        def clear(draft: Draft) -> None:
            node = draft.get(Node, node_id)
            if node is not None and not is_manager(node):
                draft.put(structs.replace(node, manager_status=None))

        await self._store.update(clear, fence=self._fence)
        await self._store.engine.forget(node_id)
        log.info("manager_let_go", node_id=node_id)

    def _check_quorum(self, peers: tuple[Peer, ...], node_id: str) -> None:
        """Raises Conflict when too few of those that stay are there. The API has checked it as
        well, but somebody may have gone since.
        """
        staying = [p.name for p in peers if p.name != node_id and not p.learner]
        present = self._store.engine.present() | {self._node_id}
        there = sum(name in present for name in staying)
        if there < len(staying) // 2 + 1:
            raise errors.Conflict(
                f"node {node_id} stays a manager for now: of the {len(staying)} others only "
                f"{there} can be reached, too few to go on without it"
            )

    async def _sweep(self, members: Members) -> None:
        """Removes members that belong to no manager."""
        now_ns = self._clock.now_ns()
        peers = await members.list()
        coming = {p.url for p in peers if p.learner or not p.name}
        self._newcomers = {u: since for u, since in self._newcomers.items() if u in coming}
        for peer in peers:
            if peer.url in coming:
                since_ns = self._newcomers.setdefault(peer.url, now_ns)
                if now_ns - since_ns < NEWCOMER_S * SECOND_NS:
                    continue
            else:
                node = self._store.get(Node, peer.name)
                if node is not None and (is_manager(node) or node.manager_status is not None):
                    continue
                self._check_quorum(peers, peer.name)
            log.warning("member_without_manager", name=peer.name, url=peer.url)
            await members.remove(peer.url)
            if peer.name:
                await self._store.engine.forget(peer.name)


def announced(node: Node, *, addr: str, engine_version: str) -> Node:
    """The node as a manager that serves at this address."""
    status = node.manager_status or ManagerStatus()
    return structs.replace(
        node,
        manager_status=structs.replace(
            status,
            addr=addr,
            engine_version=engine_version,
            reachability=status.reachability or Reachability.REACHABLE,
        ),
    )
