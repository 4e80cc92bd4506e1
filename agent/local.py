"""What every swarmd answers on its unix socket: who am I, init, join, leave, restore, unlock; and
the manager's services where one runs.
manager's services where one runs.

On a node without a manager the control API answers what Docker answers: that this is no manager,
and what to do.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol

import structlog

from swarm import errors, tls
from swarm.rpc import Context, Identity, Method
from swarm.v1 import (
    Caller,
    GetNodeInfoRequest,
    GetNodeInfoResponse,
    InitRequest,
    InitResponse,
    JoinRequest,
    JoinResponse,
    LeaveRequest,
    LeaveResponse,
    RestoreRequest,
    RestoreResponse,
    UnlockRequest,
    UnlockResponse,
)

log = structlog.get_logger("local")

LISTEN_PORT = 2377
NOT_IN_SWARM = (
    'This node is not a swarm manager. Use "swarmctl swarm init" or "swarmctl swarm join" to '
    "connect this node to swarm and try again."
)
IS_WORKER = (
    "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. "
    "Please run this command on a manager node or promote the current node to a manager."
)
ALREADY = (
    'This node is already part of a swarm. Use "swarmctl swarm leave" to leave this swarm and join '
    "another one."
)

LOCKED = (
    "Swarm is encrypted and needs to be unlocked before it can be used. "
    'Please use "swarmctl swarm unlock" to unlock it.'
)
LOCKED_RESTORE = (
    "The manager on this node is locked. Open it with `swarmctl swarm unlock` and see whether it "
    "works, or give it up with `swarmctl swarm leave --force`; then a backup can be restored here."
)
NO_PART = "This node is not part of a swarm"
LOCKED_FORCE = (
    "The manager on this node is locked. Open it with `swarmctl swarm unlock`; then "
    "--force-new-cluster can go on with its state."
)
FORCE_NOT_IN_SWARM = (
    "--force-new-cluster goes on with the state of a cluster that has lost its other managers, and "
    "this node is in no cluster; leave the flag out to make a new one, or run it on a manager"
)
FORCE_ALONE = (
    "This manager is the only one of its cluster, and it works: --force-new-cluster has nothing to "
    "do. A state that is lost or damaged comes back from a backup: `swarmctl swarm restore FILE`"
)
FORCE_IS_WORKER = (
    "--force-new-cluster goes on with a manager's state, and this node is a worker, which has "
    "none; run it on a manager that is left, or restore a backup (`swarmctl swarm restore`)"
)
LOCKED_LEAVE = (
    "Swarm is encrypted and locked. Please unlock it first or use `--force` to ignore this message."
)


def authorize(method: Method, auth: dict[str, list[bytes]]) -> Identity:
    """Whoever may open the socket is a local user."""
    if Caller.LOCAL not in method.callers:
        denied = errors.Denied(f"{method.path} is not for local users")
        denied.who = str(Identity(Caller.LOCAL))
        raise denied
    return Identity(Caller.LOCAL)


def gate(methods: tuple[Method, ...], target: Callable[[], Awaitable[object]]) -> object:
    """An object with the service's methods that passes each call on to `target()`, looked up call
    by call.
    """

    def unary(name: str) -> Any:
        async def call(request: Any, context: Context) -> Any:
            return await getattr(await target(), name)(request, context)

        return call

    def stream(name: str) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            async for response in getattr(await target(), name)(request, context):
                yield response

        return call

    class Gate:
        pass

    out = Gate()
    for method in methods:
        make = stream if method.server_streams else unary
        setattr(out, method.name, make(method.name))
    return out


class LocalService:
    """The contract's Local service over a daemon (see agent/daemon.py)."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def get_node_info(
        self, request: GetNodeInfoRequest, context: Context
    ) -> GetNodeInfoResponse:
        return self._daemon.info()

    async def init(self, request: InitRequest, context: Context) -> InitResponse:
        context.note(what="init", kind="cluster")
        answer = await self._daemon.init(request)
        context.note(object_id=answer.cluster_id)
        return answer

    async def join(self, request: JoinRequest, context: Context) -> JoinResponse:
        context.note(what="join", kind="node")
        answer = await self._daemon.join(request)
        context.note(object_id=answer.node_id, role=answer.role.name.lower())
        return answer

    async def leave(self, request: LeaveRequest, context: Context) -> LeaveResponse:
        node_id = self._daemon.info().node_id
        context.note(what="leave", kind="node", object_id=node_id, force=request.force)
        return LeaveResponse(warnings=await self._daemon.leave(force=request.force))

    async def restore(
        self, request: AsyncIterator[RestoreRequest], context: Context
    ) -> AsyncGenerator[RestoreResponse, None]:
        context.note(what="restore", kind="cluster")
        async with aclosing(self._daemon.restore(request)) as answers:
            async for answer in answers:
                if answer.cluster_id:
                    context.note(object_id=answer.cluster_id, revision=answer.revision)
                yield answer

    async def unlock(self, request: UnlockRequest, context: Context) -> UnlockResponse:
        context.note(what="unlock", kind="node", object_id=self._daemon.info().node_id)
        await self._daemon.unlock(request.unlock_key)
        return UnlockResponse()


class Daemon(Protocol):
    """What the service asks of the daemon."""

    def info(self) -> GetNodeInfoResponse: ...
    async def init(self, request: InitRequest) -> InitResponse: ...
    async def join(self, request: JoinRequest) -> JoinResponse: ...
    async def leave(self, *, force: bool) -> tuple[str, ...]: ...
    def restore(
        self, requests: AsyncIterator[RestoreRequest]
    ) -> AsyncGenerator[RestoreResponse, None]: ...
    async def unlock(self, unlock_key: str) -> None: ...


class Standing(Protocol):
    """How many managers there are, and how many of them can be reached."""

    @property
    def reachable(self) -> int: ...
    @property
    def total(self) -> int: ...


def why_not_leave(standing: Standing | None, *, alone: bool) -> str:
    """Why a manager does not leave without --force, in Docker's words where they fit. `alone`:
    there is no other manager. `standing` is None where this one does not know.
    """
    said = [
        "You are attempting to leave the swarm on a node that is participating as a manager.",
    ]
    if alone:
        said.append("Removing the last manager erases all current state of the swarm.")
        return " ".join([*said, "Use `--force` to ignore this message."])
    if standing is None:
        said.append("Doing so may lose the consensus of your cluster.")
    else:
        left, there = standing.total - 1, standing.reachable - 1
        if there >= left // 2 + 1:
            said.append(
                f"With `--force` it is demoted first, which leaves {there} managers out of {left}. "
                "`swarmctl node demote` on it does the same, and keeps the node."
            )
            return " ".join([*said, "Use `--force` to suppress this message."])
        said.append(
            f"Removing this node leaves {there} managers out of {left}. Without a Raft quorum your "
            "swarm will be inaccessible."
        )
    return " ".join(
        [
            *said,
            "The only way to restore a swarm that has lost consensus is to reinitialize it with "
            "`--force-new-cluster`. Use `--force` to suppress this message.",
        ]
    )


def still_manager(hostname: str, reason: str) -> str:
    """What has to be done about a manager that has gone without the others' knowing."""
    return (
        f"the cluster may still count {hostname} among its managers: {reason}. On another manager, "
        f"run `swarmctl node demote {hostname}` and then `swarmctl node rm --force {hostname}`"
    )


def listen_address(given: str) -> str:
    """host:port to listen on; all addresses and the usual port by default."""
    return tls.join_address(*tls.split_address(given or "0.0.0.0", default_port=LISTEN_PORT))


def advertise_address(given: str, listen_addr: str, addresses: tuple[str, ...]) -> str:
    """host:port under which others reach this node.

    `addresses` are the machine's. Without a given one: the listening address if it is one of its
    own, else the machine's only address that is not loopback. Raises Invalid where there is a
    choice, naming what can be chosen.
    """
    host, port = tls.split_address(listen_addr)
    if given:
        return tls.join_address(*tls.split_address(given, default_port=port))
    if not ipaddress.ip_address(host).is_unspecified:
        return tls.join_address(host, port)
    choice = [a for a in addresses if not ipaddress.ip_address(a).is_loopback]
    if len(choice) == 1:
        return tls.join_address(choice[0], port)
    if not choice:
        raise errors.Invalid(
            "this machine has no address other than loopback; name the one that other nodes can "
            "reach with --advertise-addr (127.0.0.1 for a cluster on this machine alone)"
        )
    raise errors.Invalid(
        f"could not choose an IP address to advertise since this system has multiple addresses "
        f"({', '.join(choice)}); specify one with --advertise-addr"
    )


def host_of(address: str) -> str:
    """The host of host:port."""
    return tls.split_address(address)[0]


def address_towards(target: str) -> str:
    """The address from which this machine reaches host:port. Sends nothing."""
    host, port = tls.split_address(target)
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with socket.socket(infos[0][0], socket.SOCK_DGRAM) as probe:
            probe.connect(infos[0][4])
            return str(probe.getsockname()[0])
    except OSError as error:
        raise errors.Unavailable(f"{target} cannot be reached: {error.strerror or error}") from None
