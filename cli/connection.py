"""Where swarmctl connects, and the connection.

Which address counts, first found: --host, --context, SWARM_HOST, SWARM_CONTEXT, the current
context, the local daemon's socket. A unix socket needs no credentials; tcp needs the client
certificate of a context (`swarmctl context create` makes one), or the files ca.pem, cert.pem and
key.pem in SWARM_CERT_PATH.

grpc is imported on the first connection, not before: help and completion do without.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cli.contexts import Contexts, Credentials
from cli.settings import Settings, settings
from swarm.errors import Denied, Invalid, Unavailable

if TYPE_CHECKING:
    import asyncio
    from types import TracebackType

    from swarm.rpc import Channel, Metadata
    from swarm.v1.services import CertificatesClient, ControlClient, LocalClient

__all__ = ["Connection", "Target", "call", "default_socket", "resolve"]

CONNECT_S = 5.0  # seconds until one of a remote cluster's managers must be reached
ROOT_SOCKET = "/run/swarm/swarmd.sock"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """One place to connect to; a remote cluster has several addresses that serve the same."""

    # The path of a unix socket; empty: remote.
    socket: str = ""
    addresses: tuple[str, ...] = ()
    credentials: Credentials | None = None
    # The context it comes from; empty: none.
    context: str = ""
    # The context whose credentials these are; empty: none.
    owner: str = ""

    def __str__(self) -> str:
        return f"unix://{self.socket}" if self.socket else f"tcp://{','.join(self.addresses)}"


def default_socket(settings: Settings, *, root: bool) -> str:
    """The local daemon's socket: the user's own where one runs, else the system's."""
    if root:
        return ROOT_SOCKET
    env = settings.environment
    state = env.get("XDG_STATE_HOME") or str(
        Path(env.get("HOME", "~")).expanduser() / ".local/state"
    )
    runtime = env.get("XDG_RUNTIME_DIR")
    own = [f"{base}/swarm/swarmd.sock" for base in (runtime, state) if base]
    return next((path for path in (*own, ROOT_SOCKET) if os.path.exists(path)), own[0])


def resolve(settings: Settings) -> Target:
    """The target that the options and the environment name. Raises Invalid, NotFound."""
    env = settings.environment
    if settings.host:
        return parse_host(settings.host, settings, origin="--host")
    if not settings.context_name and env.get("SWARM_HOST"):
        return parse_host(env["SWARM_HOST"], settings, origin="SWARM_HOST")
    contexts = Contexts(settings.config_dir)
    name = settings.context_name or env.get("SWARM_CONTEXT") or contexts.current()
    if not name or name == "default":
        return Target(socket=default_socket(settings, root=os.geteuid() == 0))
    context = contexts.get(name)
    if context.socket:
        return Target(socket=context.socket, context=name)
    return Target(
        addresses=context.addresses, credentials=context.credentials, context=name, owner=name
    )


def parse_host(text: str, settings: Settings, *, origin: str) -> Target:
    """unix:///path or tcp://host:port[,host:port]."""
    scheme, separator, rest = text.partition("://")
    if scheme == "unix" and rest.startswith("/"):
        return Target(socket=rest)
    if not separator and text.startswith("/"):
        return Target(socket=text)
    if scheme != "tcp" or not rest:
        raise Invalid(
            f"{origin}: {text!r} is not an address; write unix:///path or tcp://host:port"
        )
    addresses = tuple(_address(part, origin) for part in rest.rstrip("/").split(","))
    folder = settings.environment.get("SWARM_CERT_PATH")
    if folder:
        return Target(addresses=addresses, credentials=Credentials.from_folder(Path(folder)))
    contexts = Contexts(settings.config_dir)
    for context in contexts.all():
        if context.credentials and set(addresses) & set(context.addresses):
            name = context.name
            return Target(addresses=addresses, credentials=context.credentials, owner=name)
    raise Invalid(
        f"{origin}: {text} needs a client certificate, and no context has one for it. On a "
        "manager, run "
        "`swarmctl context create NAME` and `swarmctl context export NAME`, here `swarmctl context "
        "import NAME FILE`; or "
        "set SWARM_CERT_PATH to a folder with ca.pem, cert.pem and key.pem."
    )


def _address(text: str, origin: str) -> str:
    host, separator, port = text.rpartition(":")
    if not separator or not host or (":" in host and not host.startswith("[")):
        host, port = text, "2377"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise Invalid(
            f"{origin}: {text!r} has no valid port; write tcp://host:port with 1 to 65535"
        )
    return f"{host}:{port}"


class Connection:
    """Clients over one channel, which may be one to several managers; an asynchronous context
    manager.
    """

    def __init__(self, target: Target, *, stale: bool = False) -> None:
        """`stale`: reads are answered from what the manager knows, however old it is."""
        self.target = target
        self._stale = stale
        self._channel: Channel | None = None
        self._credentials = target.credentials
        self._renewing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Connection:
        import asyncio

        self._channel = await self._connect()
        if self._credentials is not None:
            self._renewing = asyncio.create_task(self.renew())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._renewing is not None:
            import asyncio

            if error is not None:
                self._renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewing
        if self._channel is not None:
            await self._channel.close()

    async def renew(self) -> None:
        """Renews this client's certificate where that is due; done beside each remote command."""
        if self._credentials is None:
            return
        import asyncio

        from cli.renewal import keep_good

        if self._renewing is not None and asyncio.current_task() is not self._renewing:
            await self._renewing

        self._credentials = await keep_good(
            self._credentials,
            context=self.target.owner,
            contexts=Contexts(settings().config_dir),
            control=self.control,
            certificates=self.certificates,
        )

    @property
    def control(self) -> ControlClient:
        from swarm.v1.services import ControlClient

        return ControlClient(self._open)

    @property
    def local(self) -> LocalClient:
        """The daemon's own service. Raises Invalid for a remote target: only its socket has it."""
        from swarm.v1.services import LocalClient

        if not self.target.socket:
            raise Invalid(
                f"this command works on the node itself and {self.target} is remote; run it on "
                "that "
                "node, or choose its socket with --host unix:///path"
            )
        return LocalClient(self._open)

    @property
    def certificates(self) -> CertificatesClient:
        from swarm.v1.services import CertificatesClient

        return CertificatesClient(self._open)

    @property
    def _open(self) -> Channel:
        assert self._channel is not None, "used inside `async with` only"
        return self._channel

    async def _connect(self) -> Channel:
        # grpc's own log would mix with the answers; failures come as errors anyway.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        if self.target.socket:
            check_socket(self.target.socket)
        from swarm.rpc import STALE_KEY, Channel

        metadata: Metadata = ((STALE_KEY, "1"),) if self._stale else ()
        if self.target.socket:
            return Channel.unix(self.target.socket, metadata=metadata)
        return await self._remote(metadata)

    async def _remote(self, metadata: Metadata) -> Channel:
        from cli.managers import Managers
        from swarm import tls
        from swarm.rpc import Channel

        assert self.target.credentials is not None
        mine = self.target.credentials
        credentials = tls.client_credentials(mine.root_ca_pem, mine.key_pem, mine.certificate_pem)

        def make(address: str) -> Channel:
            return Channel.tls(address, credentials, server_name=tls.SERVER_NAME, metadata=metadata)

        managers = Managers(self.target.addresses, make, connect_s=CONNECT_S)
        try:
            await managers.ready(timeout_s=CONNECT_S)
        except Unavailable:
            await managers.close()
        except BaseException:
            await managers.close()
            raise
        else:
            return managers
        from cli.renewal import why_refused

        for address in self.target.addresses:
            if why := await why_refused(mine, address, context=self.target.owner):
                raise Denied(why)
        raise Unavailable(
            f"no manager answers at {' or '.join(self.target.addresses)} within {CONNECT_S:g} s; "
            "check that "
            "one runs there, that the port is open, and that this client's certificate is still "
            "valid"
        )


def check_socket(path: str) -> None:
    """Says what is wrong with the socket before gRPC does it in its own words. Raises Unavailable,
    Denied.
    """
    start = (
        "Start the daemon with `swarmd` (or `systemctl start swarmd`), or name another with --host "
        "or SWARM_HOST."
    )
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        mode = stat.S_IFSOCK
    except OSError as error:
        why = "there is no such socket" if error.errno == errno.ENOENT else str(error.strerror)
        raise Unavailable(f"no swarmd answers at {path}: {why}. {start}") from None
    if not stat.S_ISSOCK(mode):
        raise Invalid(f"{path} is not a socket; name swarmd's with --host unix:///path")
    if not os.access(path, os.R_OK | os.W_OK):
        raise Denied(
            f"{path} may not be opened by this user; run swarmctl as root, or join the group that "
            "owns the socket"
        )
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(path)
        except OSError as error:
            raise Unavailable(
                f"no swarmd answers at {path}: {(error.strerror or str(error)).lower()}. {start}"
            ) from None


def call(work: Callable[[Connection], Awaitable[T]]) -> T:
    """Runs asynchronous work with a connection, from a synchronous command."""
    import asyncio

    from cli.waking import woken_by_signals

    target, stale = resolve(settings()), settings().stale

    async def connected() -> T:
        with woken_by_signals():
            async with Connection(target, stale=stale) as connection:
                return await work(connection)

    return asyncio.run(connected())
