"""What the machine's users ask of the node's membership: init, join, leave, restore, unlock.

One at a time. Each leaves the node either as it was or as it was asked for.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator

import structlog

from agent import identity as ids
from agent import local, restoring
from agent.membership import found, restoration, restored_identity, save
from agent.options import Settings
from agent.tenure import Tenure, set_aside
from swarm import errors
from swarm.clock import Clock
from swarm.finishing import to_the_end
from swarm.ids import Rng
from swarm.v1 import (
    GetNodeInfoResponse,
    InitRequest,
    InitResponse,
    JoinRequest,
    JoinResponse,
    NodeRole,
    RestoreRequest,
    RestoreResponse,
)

log = structlog.get_logger("swarmd")

JOIN_WAIT_S = 20.0  # Docker's: then the join goes on in the background


class Changes:
    """See the module; implements agent.local.Daemon."""

    def __init__(self, tenure: Tenure, settings: Settings, clock: Clock, rng: Rng) -> None:
        self._tenure = tenure
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._changing = asyncio.Lock()

    def info(self) -> GetNodeInfoResponse:
        return self._tenure.info()

    async def init(self, request: InitRequest) -> InitResponse:
        """Makes a cluster; when the manager cannot start, nothing stays behind."""
        async with self._changing:
            self._check_free()
            set_aside(self._settings.state_dir / "manager")
            self._tenure.new_vault()
            listen = local.listen_address(request.listen_addr)
            identity = await found(
                self._settings,
                request,
                listen_addr=listen,
                advertise_addr=local.advertise_address(
                    request.advertise_addr,
                    listen,
                    # pyroute2 runs an event loop of its own.
                    await asyncio.to_thread(machine_addresses),
                ),
                clock=self._clock,
                rng=self._rng,
                vault=self._tenure.vault,
            )
            save(self._settings.state_dir, identity, self._tenure.vault)
            await self._tenure.enter(identity)
            if self._tenure.error:
                reason = self._tenure.error
                await self._tenure.forget()
                raise errors.Unavailable(reason)
            authority = self._tenure.manager().authority
            log.info("cluster_made", cluster_id=identity.cluster_id, node_id=identity.node_id)
            return InitResponse(
                node_id=identity.node_id,
                cluster_id=identity.cluster_id,
                worker_token=authority.worker(),
                manager_token=authority.manager(),
                addr=identity.advertise_addr,
            )

    async def join(self, request: JoinRequest) -> JoinResponse:
        """Joins a cluster and waits until the manager has taken the node."""
        async with self._changing:
            self._check_free()
            self._tenure.new_vault()
            listen = local.listen_address(request.listen_addr)
            if request.advertise_addr:
                advertise = local.advertise_address(request.advertise_addr, listen, ())
            else:
                if not request.remote_addrs:
                    raise errors.Invalid("name a manager to join, as HOST:2377")
                near = local.address_towards(request.remote_addrs[0])
                advertise = local.advertise_address(near, listen, ())
            identity = await ids.join(
                token=request.token,
                addresses=request.remote_addrs,
                hostname=self._settings.hostname,
                availability=request.availability,
                listen_addr=listen,
                advertise_addr=advertise,
                data_path_addr=request.data_path_addr or local.host_of(advertise),
            )
            save(self._settings.state_dir, identity, self._tenure.vault)
            await self._tenure.enter(identity)
            assert self._tenure.member is not None
            try:
                async with asyncio.timeout(JOIN_WAIT_S):
                    await self._tenure.member.first_session.wait()
            except TimeoutError:
                reason = self._tenure.error or self._tenure.member.problem or "no answer"
                raise errors.TimedOut(
                    f"the manager did not take the node within {JOIN_WAIT_S:g} s ({reason}); "
                    "swarmd goes on trying, see `swarmctl info`"
                ) from None
            return JoinResponse(node_id=identity.node_id, role=identity.role)

    async def restore(
        self, requests: AsyncIterator[RestoreRequest]
    ) -> AsyncGenerator[RestoreResponse, None]:
        """Becomes a cluster's manager again, from its backup; until the last message all is as it
        was.
        """
        # Before anything is refused: what is said to a client that is still sending is lost.
        start = await restoring.first(requests)
        async with self._changing:
            if self._tenure.locked is not None:
                raise errors.Unavailable(local.LOCKED_RESTORE)
            member = self._tenure.member
            before = restoring.replaceable(member.identity if member else None, self._tenure.error)
            place = restoring.Place(start, before, await asyncio.to_thread(machine_addresses))
            work = restoration(self._settings, self._clock)
            try:
                await work.begin()
                yield RestoreResponse()
                while not (request := await restoring.following(requests)).finish:
                    await work.feed(request.data)
                    yield RestoreResponse(bytes=work.taken)
                restored = await work.finish(place.choose)
                identity = restored_identity(
                    restored,
                    listen_addr=place.listen_addr,
                    advertise_addr=place.advertise_addr,
                    data_path_addr=place.data_path_addr,
                )
                # A caller that leaves now is too late to turn back.
                await to_the_end(
                    restoring.take_over(
                        self._tenure, self._settings.state_dir, work.install, identity, before
                    )
                )
            finally:
                await work.discard()
            log.info(
                "cluster_restored",
                cluster_id=restored.cluster_id,
                node_id=restored.node_id,
                backup_revision=restored.header.revision,
                revision=restored.revision,
            )
            yield RestoreResponse(
                bytes=work.taken,
                node_id=restored.node_id,
                cluster_id=restored.cluster_id,
                revision=restored.revision,
                backup_revision=restored.header.revision,
                addr=identity.advertise_addr,
                warnings=restored.warnings,
            )

    async def leave(self, *, force: bool) -> None:
        """Leaves the cluster: stops and removes the node's tasks, and forgets all of it."""
        async with self._changing:
            member = self._tenure.member
            if self._tenure.locked is not None:
                if not force:
                    raise errors.Unavailable(local.LOCKED_LEAVE)
                await self._tenure.empty(self._tenure.locked, force=True)
                await self._tenure.forget()
                return
            if member is None:
                raise errors.Conflict("This node is not part of a swarm")
            if member.identity.role == NodeRole.MANAGER and not force:
                raise errors.Conflict(
                    "You are attempting to leave the swarm on a node that is participating as a "
                    "manager. Removing the last manager erases all current state of the swarm. Use "
                    "`--force` to ignore this message."
                )
            if self._tenure.error:
                await self._tenure.empty(member.identity, force=force)
            else:
                await member.leave()
            await self._tenure.forget()
            log.info("left_cluster", node_id=member.identity.node_id)

    async def unlock(self, unlock_key: str) -> None:
        """Opens the keys at rest and becomes a member. Raises Denied for another key."""
        async with self._changing:
            if self._tenure.locked is None:
                raise errors.Conflict(
                    "swarm is not locked"
                    if self._tenure.member
                    else "This node is not part of a swarm"
                )
            self._tenure.vault.unlock(unlock_key)
            identity = ids.load(self._settings.state_dir, self._tenure.vault)
            assert identity is not None
            self._tenure.locked = None
            log.info("swarmd_unlocked", node_id=identity.node_id)
            await self._tenure.enter(identity)

    def _check_free(self) -> None:
        if self._tenure.member is not None or self._tenure.locked is not None:
            raise errors.Conflict(local.ALREADY)


def machine_addresses() -> tuple[str, ...]:
    """The machine's IPv4 addresses, in order of interface."""
    from pyroute2 import IPRoute  # 60 ms, needed by init only

    with IPRoute() as route:
        return tuple(
            value
            for message in route.get_addr(family=socket.AF_INET)
            for key, value in message["attrs"]
            if key == "IFA_LOCAL"
        )
