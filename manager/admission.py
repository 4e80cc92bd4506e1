"""How a node becomes one of several managers.

The newcomer asks a manager that it knows: `Admit` adds its member of etcd, which does not vote yet,
and tells it the sealing key; `Enfranchise` gives the member its vote once it has caught up. Both
may be asked again, by a newcomer that was killed in between. A member that does not vote counts in
no quorum, so that one that never comes harms nobody; the keeper removes it after a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol, TypeVar

import structlog

from manager.ca import Sealer
from manager.store.engines.etcd_members import Members, Peer
from swarm import errors
from swarm.rpc import Channel, Context
from swarm.v1 import (
    AdmitRequest,
    AdmitResponse,
    EnfranchiseRequest,
    EnfranchiseResponse,
    EtcdAccess,
    EtcdPeer,
    ForwardFrame,
    RelayFrame,
)
from swarm.v1.services import ManagersClient

log = structlog.get_logger("admission")

CALL_S: Final = 30.0
VOTE_S: Final = 75.0  # longer than a learner may take to catch up
ADMIT_S: Final = 60.0  # how long the managers are asked; the state may have to move first
RETRY_S: Final = 0.5

T = TypeVar("T")
Connect = Callable[[str], Awaitable[Channel]]


class Forwarding(Protocol):
    """The dispatcher's part of what managers ask of each other."""

    def forward(
        self, request: AsyncIterator[ForwardFrame], context: Context
    ) -> AsyncIterator[RelayFrame]: ...


class Admissions:
    """Implements the contract's Managers service."""

    def __init__(
        self,
        *,
        sealer: Sealer,
        prefix: str,
        members: Members | None,
        access: EtcdAccess | None,
        begin_move: Callable[[], None],
        barrier: Callable[[], Awaitable[None]],
        forwarding: Forwarding,
    ) -> None:
        """`members`: of the etcd that swarmd runs; None: it is another's, reached by `access`, or
        the state is in the embedded store, and `begin_move` begins to move it. Raises Unsupported.
        """
        self._sealer = sealer
        self._prefix = prefix
        self._members = members
        self._access = access
        self._begin_move = begin_move
        self._barrier = barrier
        self._forwarding = forwarding
        self._one_at_a_time = asyncio.Lock()

    async def admit(self, request: AdmitRequest, context: Context) -> AdmitResponse:
        """See the contract. Raises Unavailable, Exhausted (another one is coming in), Conflict."""
        node_id = context.identity.node_id
        context.note(what="admit", kind="manager", object_id=node_id)
        if self._members is None and self._access is None:
            self._begin_move()
            raise errors.Unavailable(
                "the cluster's state is being moved to etcd, which several managers need; try "
                "again in a moment"
            )
        await self._barrier()
        peers: tuple[Peer, ...] = ()
        if self._members is not None:
            async with self._one_at_a_time:
                peers = await self._let_in(self._members, node_id, request)
        log.info("manager_admitted", node_id=node_id, peer_url=request.peer_url)
        return AdmitResponse(
            seal_key=self._sealer.key,
            prefix=self._prefix,
            peers=tuple(
                EtcdPeer(name=node_id if p.url == request.peer_url else p.name, url=p.url)
                for p in peers
            ),
            etcd=self._access,
        )

    async def _let_in(
        self, members: Members, node_id: str, request: AdmitRequest
    ) -> tuple[Peer, ...]:
        """All members, the node's too."""
        url = request.peer_url
        if not url.startswith("https://"):
            raise errors.Invalid(f"peer_url {url!r}: give the https URL of the node's etcd member")
        known = await members.list()
        of_url = next((p for p in known if p.url == url), None)
        of_node = next((p for p in known if p.name == node_id), None)
        if of_url is not None and of_url.name not in ("", node_id):
            raise errors.Conflict(
                f"another manager, node {of_url.name}, has the etcd member at {url}; advertise "
                "another address or, with --peer-port, another port, or demote that one"
            )
        if request.has_data and of_url is None and of_node is None:
            raise errors.Conflict(f"no etcd member is at {url}; the node has to come in anew")
        if not request.has_data and of_node is not None:
            # Its vote would be one that has forgotten what it agreed to.
            log.warning("member_lost_its_state", node_id=node_id, peer_url=of_node.url)
            await members.remove(of_node.url)
        return await members.add(url)

    async def enfranchise(
        self, request: EnfranchiseRequest, context: Context
    ) -> EnfranchiseResponse:
        """See the contract. Raises TimedOut (it has not caught up), NotFound, Unavailable."""
        context.note(what="enfranchise", kind="manager", object_id=context.identity.node_id)
        if self._members is not None:
            await self._members.promote(request.peer_url)
            log.info("manager_enfranchised", node_id=context.identity.node_id)
        return EnfranchiseResponse()

    def forward(
        self, request: AsyncIterator[ForwardFrame], context: Context
    ) -> AsyncIterator[RelayFrame]:
        """See the contract."""
        return self._forwarding.forward(request, context)


# ------------------------------------------------------------------ the newcomer's side


class Managers:
    """The other managers, asked one after the other until one answers."""

    def __init__(
        self, addresses: Callable[[], tuple[str, ...]], own: str, connect: Connect
    ) -> None:
        self._addresses = addresses
        self._own = own
        self._connect = connect

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(a for a in self._addresses() if a != self._own)

    async def admit(self, request: AdmitRequest) -> AdmitResponse:
        """Raises what the last one said when none lets the node in for ADMIT_S."""
        return await self._ask(lambda c: c.admit(request, timeout_s=CALL_S))

    async def enfranchise(self, peer_url: str) -> None:
        """Raises as `admit`."""
        request = EnfranchiseRequest(peer_url=peer_url)
        await self._ask(lambda c: c.enfranchise(request, timeout_s=VOTE_S))

    async def _ask(self, call: Callable[[ManagersClient], Awaitable[T]]) -> T:
        until_s = asyncio.get_running_loop().time() + ADMIT_S
        while True:
            problem: errors.SwarmError = errors.Unavailable("no other manager's address is known")
            for address in self.others:
                try:
                    async with await self._connect(address) as channel:
                        return await call(ManagersClient(channel))
                except (errors.Unavailable, errors.TimedOut, errors.Exhausted) as error:
                    problem = error
            if asyncio.get_running_loop().time() > until_s:
                raise errors.Unavailable(
                    f"no manager lets this node in: {problem.message}"
                ) from problem
            log.info("not_admitted_yet", reason=problem.message)
            await asyncio.sleep(RETRY_S)
