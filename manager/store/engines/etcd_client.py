"""A connection to etcd: the channel, the calls the engine makes, and what their errors mean.

It stands on the stubs and messages of `etcd3aio`. Its own client facade is not used: it sets no
channel options, so that answers end at 4 MiB, and asks for no fragmented watches.

Of several endpoints one is used at a time, and the next one once it fails: each is then reached
under its own name, which TLS checks, and what a manager reads does not go back and forth between
members that are ahead and behind.

The one thing decided here is whether a failed call can have had an effect: `Unavailable` means that
it had none and never will, `TimedOut` that nobody knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from etcd3aio import _protobuf as pb

from swarm import errors
from swarm.tls import load_certificates
from swarm.v1 import EtcdAccess

# etcd's --max-request-bytes as swarmd sets it, and room for the frame around it.
MESSAGE_BYTES_MAX: Final = 64 << 20
CALL_S: Final = 5.0
# After this long without an answer one that is awaited urgently counts as lost; an election of
# etcd's leader, which loses what is under way, takes 0.6 to 1.2 s.
ANSWER_S: Final = 1.5
UPKEEP_S: Final = 600.0  # compaction and defragmentation take about 10 s for each GB

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
# Calls that end badly, and those that are not begun because the client is closed.
_ERRORS: Final = (grpc.aio.AioRpcError, grpc.aio.UsageError)
# The package types its own names alone.
_AlarmType: Any = vars(pb)["rpc_pb2"].AlarmType
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
class Alarm:
    """A member's alarm: NOSPACE (no member takes changes that need room) or CORRUPT."""

    member_id: int
    kind: str


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM of what proves this side and what the other side is checked with. `name`: the name that
    the server's certificate must hold; empty: the endpoint's host.
    """

    roots: bytes
    key: bytes | None = field(default=None, repr=False)
    chain: bytes | None = None
    name: str = ""


def access_client(access: EtcdAccess) -> EtcdClient:
    """A client of an etcd that somebody else runs. Raises Invalid for what cannot be right."""
    if not access.endpoints:
        raise errors.Invalid("no endpoint of etcd is given; give its members as HOST:PORT")
    for endpoint in access.endpoints:
        host, _, port = endpoint.rpartition(":")
        if not host or "/" in endpoint or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise errors.Invalid(f"etcd's endpoint {endpoint!r}: give HOST:PORT")
    if not access.ca_pem:
        if access.certificate_pem or access.key_pem:
            raise errors.Invalid(
                "a certificate for etcd is given, and no root to check etcd's own with; give the "
                "root's too"
            )
        return EtcdClient(access.endpoints)
    if bool(access.certificate_pem) != bool(access.key_pem):
        raise errors.Invalid("a certificate for etcd needs its key, and a key its certificate")
    _check_pem("etcd's root", access.ca_pem)
    key = chain = None
    if access.key_pem:
        _check_pem("the certificate for etcd", access.certificate_pem)
        try:
            load_pem_private_key(access.key_pem.encode(), password=None)
        except (ValueError, TypeError) as error:
            raise errors.Invalid(f"the key for etcd is no private key in PEM: {error}") from None
        key, chain = access.key_pem.encode(), access.certificate_pem.encode()
    return EtcdClient(access.endpoints, tls=Tls(access.ca_pem.encode(), key, chain))


def _check_pem(what: str, pem: str) -> None:
    try:
        load_certificates(pem)
    except errors.Invalid as error:
        raise errors.Invalid(f"{what}: {error.message}") from None


class _Connection:
    """The channel to one endpoint, and its stubs."""

    def __init__(self, endpoint: str, tls: Tls | None) -> None:
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
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
        if tls is None:
            self.channel = grpc.aio.insecure_channel(endpoint, options=options)
        else:
            if tls.name:
                options.append(("grpc.ssl_target_name_override", tls.name))
            credentials = grpc.ssl_channel_credentials(tls.roots, tls.key, tls.chain)
            self.channel = grpc.aio.secure_channel(endpoint, credentials, options=options)
        self.kv: Any = pb.KVStub(self.channel)
        self.lease: Any = pb.LeaseStub(self.channel)
        self.watch: Any = pb.WatchStub(self.channel)
        self.maintenance: Any = pb.MaintenanceStub(self.channel)


class EtcdClient:
    """Connections to one or several endpoints ("host:port") of one etcd, one in use."""

    def __init__(self, endpoints: Sequence[str], *, tls: Tls | None = None) -> None:
        errors.invariant(endpoints, "an etcd client needs an endpoint")
        self.where = f"etcd at {', '.join(endpoints)}"
        self._connections = [_Connection(endpoint, tls) for endpoint in endpoints]
        self._used = 0

    async def close(self) -> None:
        """Ends the channels and with them every stream."""
        for connection in self._connections:
            await connection.channel.close()

    @property
    def _now(self) -> _Connection:
        return self._connections[self._used]

    def _leave(self, connection: _Connection) -> None:
        """Goes to the next endpoint, unless another call has done so."""
        if self._now is connection:
            self._used = (self._used + 1) % len(self._connections)

    # -------------------------------------------------------------- keys

    async def range(self, request: Any, *, timeout_s: float = CALL_S) -> Any:
        """Reads keys. Raises Unavailable: reading again is always right."""
        on = self._now
        try:
            return await on.kv.Range(request, timeout=timeout_s)
        except _ERRORS as error:
            raise self._failed(on, error, writes=False) from error

    async def txn(self, request: Any, *, timeout_s: float = CALL_S) -> Any:
        """One transaction. Raises Unavailable (nothing was done), TimedOut (unknown), Exhausted
        (more than this etcd takes at once).
        """
        on = self._now
        try:
            return await on.kv.Txn(request, timeout=timeout_s)
        except _ERRORS as error:
            raise self._failed(on, error, writes=True) from error

    async def compact(self, revision: int, *, physical: bool = False) -> None:
        """Forgets what was before the revision; one already forgotten is no error. `physical`: its
        room can be used again when this returns.
        """
        on = self._now
        try:
            await on.kv.Compact(
                pb.CompactionRequest(revision=revision, physical=physical),
                timeout=UPKEEP_S if physical else CALL_S,
            )
        except _ERRORS as error:
            if not _is(error, grpc.StatusCode.OUT_OF_RANGE):
                raise self._failed(on, error, writes=False) from error

    async def watch(self, request: Any) -> Any:
        """The call of one watch: iterate over its answers until it breaks (grpc.aio.AioRpcError),
        and cancel it. Raises Unavailable.
        """
        # A watch breaks at its reader; that its endpoint is gone the channel alone tells here.
        if self._now.channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            self._leave(self._now)
        on = self._now
        call = on.watch.Watch()
        try:
            # By hand: an iterator of requests that waits is not ended with a call that breaks.
            await call.write(request)
        except _ERRORS as error:
            raise self._failed(on, error, writes=False) from error
        except asyncio.InvalidStateError as error:
            raise self._ended() from error
        except BaseException:
            call.cancel()
            raise
        return call

    # -------------------------------------------------------------- leases

    async def grant(self, ttl_s: int) -> tuple[int, int]:
        """A lease: its id, and the seconds it lasts, which may be more than asked for."""
        on = self._now
        try:
            answer = await on.lease.LeaseGrant(pb.LeaseGrantRequest(TTL=ttl_s), timeout=ANSWER_S)
        except _ERRORS as error:
            raise self._failed(on, error, writes=True) from error
        return answer.ID, answer.TTL

    async def revoke(self, lease: int) -> None:
        """Ends a lease with its keys; one that is over is no error."""
        on = self._now
        try:
            await on.lease.LeaseRevoke(pb.LeaseRevokeRequest(ID=lease), timeout=ANSWER_S)
        except _ERRORS as error:
            if not _is(error, grpc.StatusCode.NOT_FOUND):
                raise self._failed(on, error, writes=True) from error

    async def keep_alive(self, lease: int, *, timeout_s: float) -> int:
        """Renews a lease; the seconds it has now, 0: it is over."""
        on = self._now
        call = on.lease.LeaseKeepAlive(timeout=timeout_s)
        try:
            await call.write(pb.LeaseKeepAliveRequest(ID=lease))
            answer = await call.read()
        except _ERRORS as error:
            raise self._failed(on, error, writes=False) from error
        except asyncio.InvalidStateError as error:
            raise self._ended() from error
        finally:
            call.cancel()
        return 0 if answer is grpc.aio.EOF else int(answer.TTL)

    # -------------------------------------------------------------- the server

    async def status(self) -> Any:
        """The member that answers: version, sizes, leader."""
        on = self._now
        try:
            return await on.maintenance.Status(pb.StatusRequest(), timeout=CALL_S)
        except _ERRORS as error:
            raise self._failed(on, error, writes=False) from error

    async def defragment(self) -> None:
        """Gives back what the member's file has and does not use. The member answers nothing while
        it does. Raises Unavailable; doing it again is harmless.
        """
        on = self._now
        try:
            await on.maintenance.Defragment(pb.DefragmentRequest(), timeout=UPKEEP_S)
        except _ERRORS as error:
            raise self._failed(on, error, writes=False) from error

    async def alarms(self) -> tuple[Alarm, ...]:
        """Those that are raised. Raises Unavailable."""
        request = pb.AlarmRequest(action=pb.AlarmRequest.GET)
        on = self._now
        try:
            answer = await on.maintenance.Alarm(request, timeout=CALL_S)
        except _ERRORS as error:
            raise self._failed(on, error, writes=False) from error
        return tuple(Alarm(a.memberID, _AlarmType.Name(a.alarm)) for a in answer.alarms)

    async def disarm(self, alarm: Alarm) -> None:
        """Ends an alarm; one that is over is no error. Raises Unavailable; again is harmless."""
        request = pb.AlarmRequest(
            action=pb.AlarmRequest.DEACTIVATE,
            memberID=alarm.member_id,
            alarm=_AlarmType.Value(alarm.kind),
        )
        on = self._now
        try:
            await on.maintenance.Alarm(request, timeout=CALL_S)
        except _ERRORS as error:
            raise self._failed(on, error, writes=False) from error

    def _ended(self) -> errors.Unavailable:
        """A stream that ended before it was written to."""
        return errors.Unavailable(f"{self.where} does not answer; try again later")

    def _failed(
        self, on: _Connection, error: grpc.RpcError | grpc.aio.UsageError, *, writes: bool
    ) -> errors.SwarmError:
        if not isinstance(error, grpc.aio.AioRpcError):
            return errors.Unavailable(
                f"{self.where} is not asked any more: this manager stops; try again, or another "
                "manager"
            )
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
        self._leave(on)
        if not writes or any(words in details for words in _REFUSED):
            return errors.Unavailable(
                f"{self.where} does not answer: {details or code.name}; try again later, or "
                "another manager"
            )
        return errors.TimedOut(
            f"{self.where} did not say in time whether it took the change: {details or code.name}"
        )


def _is(error: Exception, code: grpc.StatusCode) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is code
