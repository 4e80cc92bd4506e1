"""Taking a cluster's backup from a client: the daemon's side of `swarmctl swarm restore`.

The client sends a message, waits for its answer, sends the next: so a refusal always reaches it,
which gRPC does not promise to a client that is still sending.
"""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from agent import identity as ids
from agent import local
from agent.managing import FOLDER, save
from agent.tenure import Tenure, set_aside
from swarm import errors, tls
from swarm.backup import Header
from swarm.v1 import NodeRole, RestoreRequest, RestoreStart
from swarm.vault import Vault

MESSAGE_S = 60.0  # a client that is silent for so long is given up
DATA_BYTES_MAX = 1 << 20


async def following(requests: AsyncIterator[RestoreRequest]) -> RestoreRequest:
    """The next message. Raises TimedOut, and Invalid when the client ended before its time."""
    try:
        async with asyncio.timeout(MESSAGE_S):
            request = await anext(requests, None)
    except TimeoutError:
        raise errors.TimedOut(
            f"the client sent nothing for {MESSAGE_S:g} s; nothing was changed, start again"
        ) from None
    if request is None:
        raise errors.Invalid("the client ended before it said that this was all; start again")
    if len(request.data) > DATA_BYTES_MAX:
        raise errors.Invalid(
            f"a message of {len(request.data)} bytes, the limit is {DATA_BYTES_MAX}"
        )
    return request


async def first(requests: AsyncIterator[RestoreRequest]) -> RestoreStart:
    """The settings. Raises Invalid."""
    request = await following(requests)
    if request.start is None or request.data or request.finish:
        raise errors.Invalid("the first message must say how to listen; use swarmctl")
    return request.start


class Place:
    """Where the restored manager is reached: as asked for, else as the node's identity or the
    backup has it.
    """

    def __init__(
        self,
        start: RestoreStart,
        before: ids.Identity | None,
        addresses: tuple[str, ...],
    ) -> None:
        self._start = start
        self._before = before
        self._addresses = addresses
        self.listen_addr = ""
        self.advertise_addr = ""

    def choose(self, header: Header) -> str:
        """The address others use, host:port; sets both. Raises Invalid, and Conflict where the
        backup is not of this node's cluster.
        """
        before = self._before
        if before is not None:
            check_same(before, header)
        given, known = self._start.advertise_addr, before.advertise_addr if before else header.addr
        if not given and known and (before is not None or self._ours(known)):
            given = known
        listen = self._start.listen_addr
        if not listen and before is not None and given == before.advertise_addr:
            listen = before.listen_addr
        if not listen and given:
            _, port = tls.split_address(given, default_port=local.LISTEN_PORT)
            listen = f"0.0.0.0:{port}"
        self.listen_addr = local.listen_address(listen)
        self.advertise_addr = local.advertise_address(given, self.listen_addr, self._addresses)
        return self.advertise_addr

    @property
    def data_path_addr(self) -> str:
        if self._start.data_path_addr:
            return self._start.data_path_addr
        if self._before is not None and self.advertise_addr == self._before.advertise_addr:
            return self._before.data_path_addr
        return local.host_of(self.advertise_addr)

    def _ours(self, address: str) -> bool:
        """Whether this machine is reached there, as far as can be told; a name may point here."""
        host = local.host_of(address)
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            return True
        return ip.is_loopback or host in self._addresses


def check_same(before: ids.Identity, header: Header) -> None:
    """A node may take up the backup of its own manager only. Raises Conflict."""
    if header.cluster_id != before.cluster_id:
        raise errors.Conflict(
            f"the backup is of cluster {header.cluster_id}, and this node is in cluster "
            f"{before.cluster_id}; leave that one first with `swarmctl swarm leave --force`"
        )
    if header.node_id != before.node_id:
        raise errors.Conflict(
            f"the backup was written by manager {header.node_id}, and this node is "
            f"{before.node_id} of that cluster; leave it first with `swarmctl swarm leave --force`"
        )


def replaceable(identity: ids.Identity | None, error: str) -> ids.Identity | None:
    """The identity that a restore goes on with; None: the node is in no cluster. Raises Conflict
    for a member that works.
    """
    if identity is None:
        return None
    if identity.role == NodeRole.MANAGER and error:
        return identity
    raise errors.Conflict(
        "This node is already part of a swarm, and its manager works or it is a worker. A backup "
        "is restored on a node that is in no cluster (`swarmctl swarm leave`), or in place on the "
        "manager whose state is damaged."
    )


async def take_over(
    tenure: Tenure,
    state_dir: Path,
    install: Callable[[Vault], Awaitable[None]],
    identity: ids.Identity,
    before: ids.Identity | None,
) -> None:
    """Begins to be the manager of what was restored; when that cannot be, all is as before."""
    await tenure.exit()
    folder = state_dir / FOLDER
    aside = set_aside(folder)
    try:
        if before is None:
            tenure.new_vault()
        await install(tenure.vault)
        save(state_dir, identity, tenure.vault)
        reason = await tenure.serve(identity)
    except (OSError, errors.SwarmError) as error:
        reason = str(error)
    if not reason:
        return
    await tenure.exit()
    shutil.rmtree(folder, ignore_errors=True)
    if aside is not None:
        aside.rename(folder)
    tenure.error = ""
    if before is None:
        ids.forget(state_dir)
        tenure.vault.forget()
    else:
        save(state_dir, before, tenure.vault)
        await tenure.enter(before)
    raise errors.Unavailable(f"the restored manager cannot start: {reason}; nothing was changed")
