"""A connection to etcd: the channel, the calls the engine makes, and what their errors mean.

It stands on the stubs and messages of `etcd3aio`. Its own client facade is not used: it sets no
channel options, so that answers end at 4 MiB, and asks for no fragmented watches.

The one thing decided here is whether a failed call can have had an effect: `Unavailable` means that
it had none and never will, `TimedOut` that nobody knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from etcd3aio import _protobuf as pb

from swarm import errors

# etcd's --max-request-bytes as swarmd sets it, and room for the frame around it.
MESSAGE_BYTES_MAX: Final = 64 << 20
CALL_S: Final = 5.0
# After this long without an answer one that is awaited urgently counts as lost; an election of
# etcd's leader, which loses what is under way, takes 0.6 to 1.2 s.
ANSWER_S: Final = 1.5
CONNECT_S: Final = 2.0

# Words for what was not done and never will be. Of etcd's own (api/v3rpc/rpctypes/errors.go) only
# those that it says before it proposes anything: not "server stopped", nor "leader changed", nor
# "request timed out".
_REFUSED: Final = (
    "etcdserver: no leader",
    "etcdserver: too many requests",
    "etcdserver: not capable",
    "etcdserver: rpc not supported for learner",
    "raft proposal dropped",
    # gRPC's, of calls that were not sent.
    "failed to connect to all addresses",
    "connections to all backends failing",
)
_FULL: Final = "database space exceeded"
_TOO_MANY: Final = (
    "too many operations in txn request",
    "request is too large",
    "grpc: received message larger than max",
)


class Full(errors.TimedOut):
    """etcd has no room. It says so before it takes a change, and also after the one that made it
    full; so the change was made or never will be, and a read tells.
    """


class Compacted(errors.Unavailable):
    """The revision that was asked for is forgotten."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM of what proves this side and what the other side is checked with. `name`: the name that
    the server's certificate must hold; empty: the endpoint's host.
    """

    roots: bytes
    key: bytes
    chain: bytes
    name: str = ""


class EtcdClient:
    """One channel to one or several endpoints ("host:port")."""

    def __init__(self, endpoints: Sequence[str], *, tls: Tls | None = None) -> None:
        errors.invariant(endpoints, "an etcd client needs an endpoint")
        self.where = f"etcd at {', '.join(endpoints)}"
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.lb_policy_name", "round_robin" if len(endpoints) > 1 else "pick_first"),
            ("grpc.keepalive_time_ms", 5_000),
            ("grpc.keepalive_timeout_ms", 2_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # Without this an idle watch is pinged twice and then never again, so that a connection
            # which went silent would not be noticed.
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Despite its name, how long a connection may take to be made.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # The engine knows which calls may be made again; the channel does not.
            ("grpc.enable_retries", 0),
        ]
        target = endpoints[0] if len(endpoints) == 1 else f"ipv4:{','.join(endpoints)}"
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            if tls.name:
                options.append(("grpc.ssl_target_name_override", tls.name))
            credentials = grpc.ssl_channel_credentials(tls.roots, tls.key, tls.chain)
            self._channel = grpc.aio.secure_channel(target, credentials, options=options)
        self._kv: Any = pb.KVStub(self._channel)
        self._lease: Any = pb.LeaseStub(self._channel)
        self._watch: Any = pb.WatchStub(self._channel)
        self._maintenance: Any = pb.MaintenanceStub(self._channel)

    async def close(self) -> None:
        """Ends the channel and with it every stream."""
        await self._channel.close()

    # -------------------------------------------------------------- keys

    async def range(self, request: Any, *, timeout_s: float = CALL_S) -> Any:
        """Reads keys. Raises Unavailable: reading again is always right."""
        try:
            return await self._kv.Range(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, writes=False) from error

    async def txn(self, request: Any, *, timeout_s: float = CALL_S) -> Any:
        """One transaction. Raises Unavailable (nothing was done), TimedOut (unknown), Exhausted
        (more than this etcd takes at once).
        """
        try:
            return await self._kv.Txn(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, writes=True) from error

    async def compact(self, revision: int) -> None:
        """Forgets what was before the revision; one already forgotten is no error."""
        try:
            await self._kv.Compact(pb.CompactionRequest(revision=revision), timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.OUT_OF_RANGE:
                raise self._failed(error, writes=False) from error

    async def watch(self, request: Any) -> Any:
        """The call of one watch: iterate over its answers until it breaks (grpc.aio.AioRpcError),
        and cancel it. Raises Unavailable.
        """
        call = self._watch.Watch()
        try:
            # By hand: an iterator of requests that waits is not ended with a call that breaks.
            await call.write(request)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, writes=False) from error
        except asyncio.InvalidStateError as error:
            raise self._ended() from error
        except BaseException:
            call.cancel()
            raise
        return call

    # -------------------------------------------------------------- leases

    async def grant(self, ttl_s: int) -> tuple[int, int]:
        """A lease: its id, and the seconds it lasts, which may be more than asked for."""
        try:
            answer = await self._lease.LeaseGrant(pb.LeaseGrantRequest(TTL=ttl_s), timeout=ANSWER_S)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, writes=True) from error
        return answer.ID, answer.TTL

    async def revoke(self, lease: int) -> None:
        """Ends a lease with its keys; one that is over is no error."""
        try:
            await self._lease.LeaseRevoke(pb.LeaseRevokeRequest(ID=lease), timeout=ANSWER_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise self._failed(error, writes=True) from error

    async def keep_alive(self, lease: int, *, timeout_s: float) -> int:
        """Renews a lease; the seconds it has now, 0: it is over."""
        call = self._lease.LeaseKeepAlive(timeout=timeout_s)
        try:
            await call.write(pb.LeaseKeepAliveRequest(ID=lease))
            answer = await call.read()
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, writes=False) from error
        except asyncio.InvalidStateError as error:
            raise self._ended() from error
        finally:
            call.cancel()
        return 0 if answer is grpc.aio.EOF else int(answer.TTL)

    # -------------------------------------------------------------- the server

    async def status(self) -> Any:
        """The member that answers: version, sizes, leader."""
        try:
            return await self._maintenance.Status(pb.StatusRequest(), timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error, writes=False) from error

    def _ended(self) -> errors.Unavailable:
        """A stream that ended before it was written to."""
        return errors.Unavailable(f"{self.where} does not answer; try again later")

    def _failed(self, error: grpc.aio.AioRpcError, *, writes: bool) -> errors.SwarmError:
        details = error.details() or ""
        code = error.code()
        if _FULL in details:
            return (Full if writes else errors.Unavailable)(
                f"{self.where} is full ({details}). Give it more room (--quota-backend-bytes) or "
                "compact and defragment it, and disarm its alarm"
            )
        if "required revision has been compacted" in details:
            return Compacted(f"{self.where} has forgotten what was asked for: {details}")
        if any(words in details for words in _TOO_MANY):
            return errors.Exhausted(f"{self.where} takes no change as large as this: {details}")
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return errors.Denied(f"{self.where} refuses this manager: {details}")
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED):
            return errors.Internal(f"{self.where} does not take what it is asked: {details}")
        if not writes or any(words in details for words in _REFUSED):
            return errors.Unavailable(
                f"{self.where} does not answer: {details or code.name}; try again later, or "
                "another manager"
            )
        return errors.TimedOut(
            f"{self.where} did not say in time whether it took the change: {details or code.name}"
        )
