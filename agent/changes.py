"""What the machine's users ask of the node's membership: init, join, leave, restore, unlock.

One at a time. Each leaves the node either as it was or as it was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator

import structlog
from msgspec import structs

from agent import identity as ids
from agent import local, restoring
from agent.managing import (
    FOLDER,
    etcd_version,
    found,
    go_on_alone,
    restoration,
    restored_identity,
    save,
)
from agent.membership import Membership
from agent.options import Settings
from agent.role import be_demoted
from agent.tenure import SERVE_WAIT_S, Tenure, set_aside
from swarm import errors, tls
from swarm.clock import Clock
from swarm.finishing import to_the_end
from swarm.ids import Rng
from swarm.rpc import Channel
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
# For a manager: the cluster's state may first have to move to etcd.
JOIN_MANAGER_WAIT_S = 60.0
STEP_DOWN_S = 40.0  # for the other managers to take over
RECONNECT_S = 10.0  # for a session with one of those
LOOK_S = 0.05


class Changes:
    """See the module; implements agent.local.Daemon."""

    def __init__(self, tenure: Tenure, settings: Settings, clock: Clock, rng: Rng) -> None:
        self._tenure = tenure
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._changing = asyncio.Lock()
        self._join_key = ""  # of a join whose answer may have been lost

    def info(self) -> GetNodeInfoResponse:
        return self._tenure.info()

    # -------------------------------------------------------------- coming in

    async def init(self, request: InitRequest) -> InitResponse:
        """Makes a cluster; when the manager cannot start, nothing stays behind."""
        async with self._changing:
            if request.force_new_cluster:
                return await self._go_on_alone(request)
            self._check_free()
            set_aside(self._settings.state_dir / FOLDER)
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
            if reason := await self._tenure.serve(identity):
                await self._tenure.forget()
                raise errors.Unavailable(reason)
            log.info("cluster_made", cluster_id=identity.cluster_id, node_id=identity.node_id)
            return self._made(identity)

    def _made(self, identity: ids.Identity) -> InitResponse:
        authority = self._tenure.manager().authority
        return InitResponse(
            node_id=identity.node_id,
            cluster_id=identity.cluster_id,
            worker_token=authority.worker(),
            manager_token=authority.manager(),
            addr=identity.advertise_addr,
        )

    async def join(self, request: JoinRequest) -> JoinResponse:
        """Joins a cluster and waits until it has taken the node, and its manager serves, if it
        joined as one. What fails for good is undone.
        """
        async with self._changing:
            self._check_free()
            set_aside(self._settings.state_dir / FOLDER)
            self._tenure.new_vault()
            listen = local.listen_address(request.listen_addr)
            if request.advertise_addr:
                advertise = local.advertise_address(request.advertise_addr, listen, ())
            else:
                if not request.remote_addrs:
                    raise errors.Invalid("name a manager to join, as HOST:2377")
                near = local.address_towards(request.remote_addrs[0])
                advertise = local.advertise_address(near, listen, ())
            key_pem, self._join_key = self._join_key or tls.new_key_pem(), ""
            try:
                identity = await ids.join(
                    token=request.token,
                    addresses=request.remote_addrs,
                    hostname=self._settings.hostname,
                    availability=request.availability,
                    listen_addr=listen,
                    advertise_addr=advertise,
                    data_path_addr=request.data_path_addr or local.host_of(advertise),
                    etcd_version=await etcd_version(),
                    key_pem=key_pem,
                )
            except (errors.Unavailable, errors.TimedOut, asyncio.CancelledError):
                self._join_key = key_pem  # so that the next try is the same node
                raise
            save(self._settings.state_dir, identity, self._tenure.vault)
            manager = identity.role == NodeRole.MANAGER
            wait_s = JOIN_MANAGER_WAIT_S if manager else JOIN_WAIT_S
            try:
                async with asyncio.timeout(wait_s):
                    await self._tenure.enter(identity)
                    failed = await self._taken_up()
            except TimeoutError:
                member = self._tenure.member
                reason = self._tenure.failure or (member.problem if member else "") or "no answer"
                what = "the manager here does not serve" if manager else "no manager took the node"
                raise errors.TimedOut(
                    f"{what} within {wait_s:g} s ({reason}); swarmd goes on trying, see "
                    "`swarmctl info`"
                ) from None
            if failed is not None:
                raise await self._undo_join(failed)
            return JoinResponse(node_id=identity.node_id, role=identity.role)

    async def _taken_up(self) -> errors.SwarmError | None:
        """Waits until the cluster has the node; or what keeps its manager from serving for good."""
        while True:
            member = self._tenure.member  # another one after a failure
            if member is not None and not self._tenure.error:
                if member.managing.lasting:
                    return member.managing.cause
                serves = member.identity.role != NodeRole.MANAGER or member.managing.serving
                if serves and member.first_session.is_set():
                    return None
            await asyncio.sleep(LOOK_S)

    async def _undo_join(self, cause: errors.SwarmError) -> errors.SwarmError:
        """As if the node had not come, as far as the others can be told; what to tell of it."""
        member = self._tenure.member
        assert member is not None
        rest = await self._hand_over(member)
        await member.leave()
        await self._tenure.forget()
        return type(cause)("; ".join((cause.message, *rest)))

    async def unlock(self, unlock_key: str) -> None:
        """Opens the keys at rest and becomes a member. Raises Denied for another key."""
        async with self._changing:
            if self._tenure.locked is None:
                raise errors.Conflict(
                    "swarm is not locked" if self._tenure.member else local.NO_PART
                )
            self._tenure.vault.unlock(unlock_key)
            identity = ids.load(self._settings.state_dir, self._tenure.vault)
            assert identity is not None
            self._tenure.locked = None
            log.info("swarmd_unlocked", node_id=identity.node_id)
            # It is unlocked, whether or not there are others already to go on with.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SERVE_WAIT_S):
                    await self._tenure.enter(identity)

    # -------------------------------------------------------------- going on

    async def _go_on_alone(self, request: InitRequest) -> InitResponse:
        """Makes this node the only manager of the cluster that it is in; tasks go on."""
        tenure = self._tenure
        if tenure.locked is not None:
            raise errors.Unavailable(local.LOCKED_FORCE)
        if tenure.member is None:
            raise errors.Conflict(local.FORCE_NOT_IN_SWARM)
        before = tenure.member.identity
        if before.role != NodeRole.MANAGER:
            raise errors.Conflict(local.FORCE_IS_WORKER)
        standing = tenure.member.managing.standing()
        if standing is not None and standing.in_touch:
            if standing.total < 2:
                raise errors.Conflict(local.FORCE_ALONE)
            raise errors.Conflict(
                f"the cluster works: {standing.reachable} of its {standing.total} managers can be "
                "reached, and those that are lost can be demoted and removed (`swarmctl node "
                "demote`, `swarmctl node rm`). --force-new-cluster would leave two clusters; it is "
                "for when too few managers are left to agree on anything"
            )
        listen = local.listen_address(request.listen_addr or before.listen_addr)
        advertise = before.advertise_addr
        if request.advertise_addr:
            advertise = local.advertise_address(request.advertise_addr, listen, ())
        identity = structs.replace(
            before,
            listen_addr=listen,
            advertise_addr=advertise,
            data_path_addr=request.data_path_addr or before.data_path_addr,
            managers=(advertise,),
        )
        reason = await to_the_end(self._force(identity, before))
        if reason:
            raise errors.Unavailable(
                f"the cluster is this manager's alone now, and it does not serve yet: {reason}"
            )
        log.warning("cluster_forced", cluster_id=identity.cluster_id, node_id=identity.node_id)
        return self._made(identity)

    async def _force(self, identity: ids.Identity, before: ids.Identity) -> str:
        """Why the manager does not serve, or empty. When it raises, all is as before."""
        tenure = self._tenure

        async def connect(address: str) -> Channel:
            return identity.channel(address)

        await tenure.exit()
        try:
            await go_on_alone(
                self._settings, identity, connect, clock=self._clock, vault=tenure.vault
            )
            save(self._settings.state_dir, identity, tenure.vault)
        except (OSError, errors.SwarmError):
            await tenure.serve(before)
            raise
        return await tenure.serve(identity)

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
            before = restoring.replaceable(
                member.identity if member else None, self._tenure.failure
            )
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

    # -------------------------------------------------------------- leaving

    async def leave(self, *, force: bool) -> tuple[str, ...]:
        """Leaves the cluster: stops and removes the node's tasks, and forgets all of it. What is
        left to be done elsewhere.
        """
        async with self._changing:
            member = self._tenure.member
            if self._tenure.locked is not None:
                if not force:
                    raise errors.Unavailable(local.LOCKED_LEAVE)
                rest = local.still_manager(self._settings.hostname, "it is locked")
                alone = self._tenure.locked.managers == (self._tenure.locked.advertise_addr,)
                await self._tenure.empty(self._tenure.locked, force=True)
                await self._tenure.forget()
                return () if alone else (rest,)
            if member is None:
                raise errors.Conflict(local.NO_PART)
            warnings: tuple[str, ...] = ()
            if member.identity.role == NodeRole.MANAGER:
                standing = member.managing.standing()
                alone = not member.others if standing is None else standing.total < 2
                if not force:
                    known = standing if standing is not None and standing.in_touch else None
                    raise errors.Conflict(local.why_not_leave(known, alone=alone))
                if not alone:
                    warnings = await self._hand_over(member)
            if self._tenure.error:
                await self._tenure.empty(member.identity, force=force)
            else:
                await member.leave()
            await self._tenure.forget()
            log.info("left_cluster", node_id=member.identity.node_id, warnings=warnings)
            return warnings

    async def _hand_over(self, member: Membership) -> tuple[str, ...]:
        """Becomes a worker first, so that the other managers do not go on counting on this one;
        what is left to be done on one of them, when that cannot be.
        """
        try:
            async with asyncio.timeout(STEP_DOWN_S):
                if self._tenure.error:  # nothing runs that could follow
                    await be_demoted(member.identity, member.others)
                    return ()
                await member.step_down()
        except errors.SwarmError as error:
            reason = error.message
        except TimeoutError:
            reason = f"the others have not let it go within {STEP_DOWN_S:g} s"
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONNECT_S):
                    while not member.connected:
                        await asyncio.sleep(LOOK_S)
            return ()
        log.warning("not_stepped_down", reason=reason)
        return (local.still_manager(self._settings.hostname, reason),)

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
