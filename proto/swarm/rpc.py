"""gRPC as this project uses it: typed methods over frozen structs, one mapping of errors, one check
of callers.

Clients: `Channel` wraps a grpc.aio channel for the generated clients (swarm.v1.services). Servers:
`handler(...)` makes a generic handler from a generated method table and an object that implements
the service. Both ends speak protobuf on the wire; the class of an operating error travels as
trailing metadata, so that the other end raises the same class.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
)
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

# Read by gRPC when it is imported. Its C core writes a line to stderr for each refused handshake,
# which is the peer's doing and would fill logs; and its fork handlers are not needed, as children
# are started with exec at once.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from swarm import errors
from swarm.limits import MESSAGE_BYTES_MAX, request_bytes_max
from swarm.v1.structs import Caller, Message, decode, encode

if TYPE_CHECKING:
    from types import TracebackType

    from swarm.limits import Limits

# The message of a call that answers once comes right after the call begins; one that trickles in
# is not waited for any longer.
REQUEST_S_MAX = 60.0
CONNECTIONS_MAX = 12_000  # at a time, in one server: 10,000 nodes, and people
ERROR_KEY = "swarm-error"
# Metadata of a call: reads may be answered from what the manager knows, however old it is.
STALE_KEY = "swarm-stale"
_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Also how long a connection may take to be made: a busy manager, or one far away, needs some
    # seconds. A refused one is tried again after the initial back-off all the same.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)
_SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),
    # Clients ping every 10 s. Who pings faster than every 5 s is told so twice and then dropped.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.keepalive_permit_without_calls", 1),
    # A peer that is gone without a word is noticed, and its memory freed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Fewer than what gRPC lets wait for the event loop (1,000, then it refuses all that come), so
    # that one connection cannot fill that.
    ("grpc.max_concurrent_streams", 800),
    # Connections live as long as their owners like (sessions do for months): no maximum age.
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    # TLS and the first HTTP/2 frames: a thousand agents that come back at once take some seconds,
    # and they wait no longer than 5 s themselves.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
)

Metadata = tuple[tuple[str, str], ...]
Req = TypeVar("Req", bound=Message)
Resp = TypeVar("Resp", bound=Message)


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC of the contract."""

    path: str
    name: str
    request: type[Message]
    response: type[Message]
    client_streams: bool
    server_streams: bool
    callers: frozenset[Caller]
    without_manager: bool
    # Every call goes to the audit trail, not only denied ones.
    audited: bool = False


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is at the other end. `node_id` is set for node certificates, `name` for people's."""

    caller: Caller
    node_id: str = ""
    name: str = ""
    cluster_id: str = ""

    def __str__(self) -> str:
        """In records and in the log: "local", "admin ada", "manager ID", "join-worker"."""
        role = self.caller.name.lower().replace("_", "-")
        return f"{role} {self.name or self.node_id}".strip()


@dataclass(frozen=True, slots=True)
class Context:
    """What a method knows of its call."""

    identity: Identity
    # As gRPC writes it: "ipv4:10.0.0.1:4711", "unix:".
    peer: str
    # Of an audited call: its name in the audit trail and in the log.
    request_id: str = ""
    # What the audit trail says of the call; see `note`.
    notes: dict[str, object] = field(default_factory=dict, compare=False)
    # A read may be answered from what this manager knows; else it waits until that is all there is.
    stale: bool = False

    def note(self, **facts: object) -> None:
        """Facts for the audit trail: what, kind, name, object_id, revision (swarm.v1.AuditRecord),
        and others that are particular to the method. Never anything secret.
        """
        self.notes.update(facts)


class Audit(Protocol):
    """Where calls are recorded; swarm.audit.Trail is one."""

    def new_request_id(self) -> str: ...
    def ended(
        self,
        method: str,
        *,
        peer: str,
        who: str,
        request_id: str,
        notes: Mapping[str, object],
        error: BaseException | None,
    ) -> None: ...
    async def written(self) -> None: ...


# Tells who calls, or raises Denied. Gets the method and gRPC's auth context ({} on a unix socket).
Authorize = Callable[[Method, "dict[str, list[bytes]]"], Identity]


def server() -> Any:
    """A grpc.aio server with this project's limits; ports are added by the caller."""
    return grpc.aio.server(options=_SERVER_OPTIONS, maximum_concurrent_rpcs=20_000)


def handler(
    methods: Iterable[Method],
    servicer: object,
    authorize: Authorize,
    audit: Audit | None = None,
    limits: Limits | None = None,
) -> grpc.GenericRpcHandler:
    """Serves the methods from the servicer's methods of the same names, after `authorize` and then
    `limits` have let the caller in; nothing it sends is read before. `audit` gets every call of an
    audited method, and every denied one, less those that a limit stopped.
    """
    table = {
        m.path: _handler(m, getattr(servicer, m.name), _Door(m, authorize, audit, limits))
        for m in methods
    }

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc is untyped
        def service(self, details: Any) -> Any:
            return table.get(details.method)

    return Handler()


def _handler(method: Method, target: Callable[..., Any], door: _Door) -> Any:
    # Also methods that take one message are served as streams of messages, which is the same on
    # the wire: gRPC reads the one message of a unary method before the method may say no.
    coding = {
        "request_deserializer": partial(_decoded, method, request_bytes_max(method.path)),
        "response_serializer": encode,
    }
    if not method.server_streams:
        return grpc.stream_unary_rpc_method_handler(partial(_unary, door, target), **coding)
    return grpc.stream_stream_rpc_method_handler(partial(_stream, door, target), **coding)


def _decoded(method: Method, bytes_max: int, data: bytes) -> Message:
    """The message, when somebody asks for it. Raises Exhausted, Invalid."""
    if len(data) > bytes_max:
        raise errors.Exhausted(
            f"a message to {method.name} has {len(data):,} bytes, and the limit is {bytes_max:,}; "
            "send fewer or smaller objects at once"
        )
    try:
        return decode(method.request, data)
    except (DecodeError, ValueError) as error:  # a ValueError: of an enum, or of text
        raise errors.Invalid(
            f"what came is no {method.request.__name__}, which {method.name} takes ({error}); the "
            "client is of another version, damaged, or none of this cluster"
        ) from None


@dataclass(frozen=True, slots=True)
class _Door:
    """What a method's callers have to pass."""

    method: Method
    authorize: Authorize
    audit: Audit | None
    limits: Limits | None


class _Call:
    """One call, from the door to the audit trail."""

    __slots__ = ("_door", "_grpc", "_held", "_limited", "made")

    def __init__(self, door: _Door, grpc_context: Any) -> None:
        self._door = door
        self._grpc = grpc_context
        self._held = ""  # of the limits
        self._limited = False
        self.made: Context | None = None

    def admit(self) -> Context:
        """Raises Denied, Exhausted."""
        method, audit = self._door.method, self._door.audit
        peer, auth = self._grpc.peer(), self._grpc.auth_context()
        identity = self._identified(auth, peer)
        request_id = audit.new_request_id() if audit is not None and method.audited else ""
        stale = (STALE_KEY, "1") in (self._grpc.invocation_metadata() or ())
        self.made = Context(identity, peer, request_id, stale=stale)
        return self.made

    def _identified(self, auth: dict[str, list[bytes]], peer: str) -> Identity:
        method, limits = self._door.method, self._door.limits
        if limits is None:
            return self._door.authorize(method, auth)
        certificate = next(iter(auth.get("x509_pem_cert", ())), b"")
        self._limited = True  # unless it comes through
        limits.check_denied(method, certificate, peer)
        try:
            identity = self._door.authorize(method, auth)
        except errors.Denied:
            limits.denied(method, certificate, peer)
            self._limited = False
            raise
        self._held = limits.admit(identity, method, peer)
        self._limited = False
        return identity

    async def request(self) -> Any:
        """The one message of a call that has one. Raises Invalid, TimedOut."""
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                message = await self._grpc.read()
        except TimeoutError:
            raise errors.TimedOut(
                f"the message to {self._door.method.name} did not come within "
                f"{REQUEST_S_MAX:g} s; nothing was done"
            ) from None
        if message is grpc.aio.EOF:
            raise errors.Invalid(f"{self._door.method.name} takes a message, and none came")
        return message

    def ended(self, error: BaseException | None) -> bool:
        """Records the call, if it is one to be recorded; whether it was. To be called once."""
        if self._door.limits is not None:
            self._door.limits.ended(self._held)
        method, audit = self._door.method, self._door.audit
        denied = isinstance(error, errors.Denied)
        if audit is None or self._limited or not (method.audited or denied):
            return False
        made = self.made
        audit.ended(
            method.path.rsplit("/", 1)[1],
            peer=made.peer if made is not None else self._grpc.peer(),
            who=str(made.identity) if made is not None else getattr(error, "who", ""),
            request_id=made.request_id if made is not None else "",
            notes=made.notes if made is not None else {},
            error=error,
        )
        return True

    async def settled(self, error: BaseException | None) -> None:
        """Records the call; returns when the record is on the disk, or the disk has refused it."""
        if self.ended(error) and self._door.audit is not None:
            await self._door.audit.written()


# What grpc raises when a call's connection is gone, or a channel is used after its end.
_LOST = (grpc.aio.UsageError, grpc.aio.InternalError)


async def _unary(
    door: _Door, target: Callable[..., Awaitable[Any]], _: AsyncIterator[Any], context: Any
) -> Any:
    call = _Call(door, context)
    try:
        made = call.admit()
        result = await _called(target, await call.request(), made)
    except asyncio.CancelledError as error:
        call.ended(error)
        raise
    except Exception as error:  # told to the caller and logged
        await call.settled(error)
        await _abort(door.method, error, context)
    else:
        await call.settled(None)
        return result


async def _called(target: Callable[..., Awaitable[Any]], request: Any, made: Context) -> Any:
    try:
        return await target(request, made)
    except _LOST as error:
        # Of a channel that the method uses itself, not of this call's connection.
        raise RuntimeError(repr(error)) from error


async def _stream(
    door: _Door,
    target: Callable[..., AsyncGenerator[Any, None]],
    messages: AsyncIterator[Any],
    context: Any,
) -> AsyncIterator[Any]:
    call = _Call(door, context)
    try:
        made = call.admit()
        request = messages if door.method.client_streams else await call.request()
        # Closed here, so that a servicer's clean-up runs when its caller leaves, not when the
        # garbage collector comes by.
        async with aclosing(target(request, made)) as responses:
            async for response in responses:
                yield response
    except (asyncio.CancelledError, GeneratorExit) as error:
        call.ended(error)
        raise
    except Exception as error:  # told to the caller and logged
        await call.settled(error)
        await _abort(door.method, error, context)
    else:
        await call.settled(None)


async def _abort(method: Method, error: Exception, context: Any) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, _LOST):
        return  # the connection is gone, nobody is left to tell
    if not isinstance(error, errors.SwarmError):
        import structlog  # costs clients 0.1 s, and they never come here

        structlog.get_logger("rpc").error("rpc_failed", method=method.path, exc_info=error)
        error = errors.Internal(
            f"internal error in {method.name}: {error!r}; the manager's log has more"
        )
    code = getattr(grpc.StatusCode, errors.mapping(error).grpc)
    # A class that is not of the contract travels as its nearest base that is.
    known = (kind.__name__ for kind in type(error).__mro__ if kind.__name__ in errors.BY_NAME)
    name = next(known, errors.Internal.__name__)
    await context.abort(code, error.message, ((ERROR_KEY, name),))


class NoAnswer(errors.Unavailable):
    """The other end cannot be reached, or was lost before it had answered: what was asked for may
    have been done. An Unavailable that is none was said by the other end, which has done nothing.
    """


class Channel:
    """A connection to one or several servers that serve the same; safe to share between calls."""

    def __init__(self, channel: Any, target: str, *, metadata: Metadata = ()) -> None:
        """`metadata` goes with each call."""
        self._channel = channel
        self.target = target
        self._metadata = metadata
        self._calls: dict[str, Any] = {}

    @classmethod
    def unix(cls, path: str, *, metadata: Metadata = ()) -> Channel:
        """To a daemon's unix socket, where file permissions say who may."""
        # grpc would send the socket's path as authority, with characters HTTP/2 forbids.
        options = (*_CHANNEL_OPTIONS, ("grpc.default_authority", "localhost"))
        channel = grpc.aio.insecure_channel(f"unix:{path}", options=options)
        return cls(channel, path, metadata=metadata)

    @classmethod
    def tls(
        cls, address: str, credentials: Any, *, server_name: str, metadata: Metadata = ()
    ) -> Channel:
        """To host:port with mutual TLS; the server's certificate must name `server_name`."""
        options = (*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server_name))
        channel = grpc.aio.secure_channel(address, credentials, options=options)
        return cls(channel, address, metadata=metadata)

    async def ready(self, *, timeout_s: float, once: bool = False) -> None:
        """Waits until the connection stands. Raises Unavailable; with `once` as soon as a try has
        failed, else after `timeout_s`, in which it is tried again and again.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    state = self._channel.get_state(try_to_connect=True)
                    if state is grpc.ChannelConnectivity.READY:
                        return
                    if once and state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise NoAnswer(f"{self.target} cannot be connected to")
                    await self._channel.wait_for_state_change(state)
        except TimeoutError:
            raise NoAnswer(f"{self.target} does not answer within {timeout_s:g} s") from None

    async def unary_unary(
        self, method: Method, response: type[Resp], request: Message, timeout_s: float | None
    ) -> Resp:
        call = self._call(method, self._channel.unary_unary)
        try:
            return await call(  # type: ignore[no-any-return]
                request, timeout=timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.target) from None

    def unary_stream(
        self, method: Method, response: type[Resp], request: Message, timeout_s: float | None
    ) -> AsyncIterator[Resp]:
        call = self._call(method, self._channel.unary_stream)
        return self._responses(lambda: call(request, timeout=timeout_s, metadata=self._metadata))

    def stream_stream(
        self,
        method: Method,
        response: type[Resp],
        request: AsyncIterable[Any],
        timeout_s: float | None,
    ) -> AsyncIterator[Resp]:
        call = self._call(method, self._channel.stream_stream)
        return self._responses(lambda: call(request, timeout=timeout_s, metadata=self._metadata))

    async def _responses(self, start: Callable[[], Any]) -> AsyncIterator[Any]:
        call = start()
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.target) from None
        finally:
            call.cancel()

    def _call(self, method: Method, kind: Callable[..., Any]) -> Any:
        found = self._calls.get(method.path)
        if found is None:
            found = self._calls[method.path] = kind(
                method.path,
                request_serializer=encode,
                response_deserializer=partial(decode, method.response),
            )
        return found

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


_BY_STATUS: dict[str, type[errors.SwarmError]] = {
    mapping.grpc: kind for kind, mapping in errors.TABLE.items() if kind is not errors.NotManager
} | {"UNAUTHENTICATED": errors.Denied, "CANCELLED": errors.Unavailable, "UNKNOWN": errors.Internal}


def from_rpc(error: grpc.aio.AioRpcError, target: str) -> errors.SwarmError:
    """The operating error that the other end raised, or the one that fits what went wrong on the
    way.
    """
    details = error.details() or error.code().name.lower()
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY and value in errors.BY_NAME:
            return errors.BY_NAME[value](details)
    kind = _BY_STATUS.get(error.code().name, errors.Internal)
    if kind is errors.Unavailable:
        return NoAnswer(f"{target} does not answer: {details}")
    if kind is errors.Exhausted and "message larger than max" in details:
        details = (
            f"the message is larger than the limit of {MESSAGE_BYTES_MAX} bytes ({details}); "
            "send fewer or smaller objects at once"
        )
    return kind(details)
