"""One manager: the store, the leader's control loop, and the services that it answers, wired
together.

`bootstrap` makes a new cluster's state. A `Manager` serves it: over mutual TLS to nodes and people
elsewhere, and, through swarmd's unix socket, to the machine's own users.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from prometheus_client import REGISTRY

from manager.api import ControlService, NodeFacts
from manager.ca import (
    Authority,
    Autolock,
    DataKeys,
    NewCluster,
    Rotations,
    Sealer,
    load_key,
    load_or_make_key,
    new_cluster,
    objects,
)
from manager.control import ControlLoop
from manager.dispatcher import Dispatcher
from manager.metrics import ClusterCollector
from manager.restore import SEAL_FILE, STORE_FILE
from manager.restore import Restoration as Restoration  # for the node's daemon
from manager.restore import Restored as Restored
from manager.store import Corrupt, Draft, Fence, Store
from manager.store.engines.embedded import EmbeddedEngine
from swarm import errors, rpc, tls
from swarm.audit import Trail
from swarm.clock import Clock
from swarm.ids import Rng
from swarm.v1 import (
    Caller,
    InitRequest,
    IssueNodeCertificateRequest,
    IssueNodeCertificateResponse,
)
from swarm.v1.services import CERTIFICATES_METHODS, CONTROL_METHODS, DISPATCHER_METHODS
from swarm.vault import Vault

log = structlog.get_logger("manager")

STOP_GRACE_S = 2.0
# A part of the manager that a defect has ended begins again after such a pause, doubled each time
# until it has lasted for the longest of them.
RESTART_S_MIN, RESTART_S_MAX = 0.2, 30.0
CAMPAIGN_S_MAX = 2.0
DATA_PATH_PORT = 4789  # Swarm's
SUBNET_SIZE = 24  # Swarm's
PEER_PORT = 2380  # etcd's own


@dataclass(frozen=True, slots=True)
class Settings:
    """What a manager is told by its node. Addresses are host:port."""

    state_dir: Path
    node_id: str
    listen_addr: str
    advertise_addr: str
    key_pem: str
    certificate_pem: str
    version: str
    root_ca_pem: str = ""
    # Where the member of etcd that runs here is reached by the others', on the same hosts.
    peer_port: int = PEER_PORT
    # The managers that the node knows.
    managers: Callable[[], tuple[str, ...]] = tuple
    # A connection to one of them as this node.
    connect: Callable[[str], Awaitable[rpc.Channel]] | None = None


class Demoted(errors.SwarmError):
    """The cluster does not have this node as a manager any more."""


async def bootstrap(
    state_dir: Path,
    request: InitRequest,
    *,
    vault: Vault,
    hostname: str,
    advertise_addr: str,
    clock: Clock,
    rng: Rng,
) -> NewCluster:
    """Makes a new cluster and writes its first objects, all of them or none.

    Raises Invalid, and Unsupported for what this version does not have.
    """
    if request.store not in ("", "auto", "embedded"):
        raise errors.Unsupported(
            f"store {request.store!r} is not offered by this version; use --store embedded, "
            "which serves one manager"
        )
    if request.force_new_cluster:
        raise errors.Unsupported(
            "--force-new-cluster goes on with the state of a cluster that has lost its other "
            "managers, and the embedded store has one manager: on its node the cluster is still "
            "there (`swarmctl info`), and where its state is lost or damaged, a backup brings it "
            "back: `swarmctl swarm restore FILE`"
        )
    new = new_cluster(
        now_ns=clock.now_ns(),
        rng=rng,
        spec=request.spec,
        hostname=hostname,
        advertise_addr=advertise_addr,
        data_path_port=request.data_path_port or DATA_PATH_PORT,
        availability=request.availability,
        engine=EmbeddedEngine.name,
        addr_pool=request.default_addr_pool,
        subnet_size=request.subnet_size or SUBNET_SIZE,
    )
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    sealer = Sealer(load_or_make_key(state_dir / SEAL_FILE, vault))
    store = Store(EmbeddedEngine(state_dir / STORE_FILE, clock), clock, seal=sealer)
    await store.open()
    try:

        def fill(draft: Draft) -> None:
            draft.put(new.cluster)
            draft.put(new.keyring)
            draft.put(new.node)

        await store.update(fill)
    finally:
        await store.close()
    return new


class Manager:
    """A manager that serves. `start`, then `run` until cancelled, then `stop`."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        rng: Rng,
        *,
        vault: Vault,
        audit: Trail | None = None,
    ) -> None:
        """`vault`: the key of its node, not locked."""
        self._settings = settings
        self._audit = audit
        self._clock = clock
        self._rng = rng
        state_dir = settings.state_dir
        sealer = Sealer(_existing_key(state_dir, vault))
        self.store = Store(EmbeddedEngine(state_dir / STORE_FILE, clock), clock, seal=sealer)
        self._data_keys = DataKeys(self.store, clock, sealer)
        self._autolock = Autolock(self.store, vault, report=self._report_lock)
        self.authority = Authority(self.store, clock, rng)
        self._dispatcher = Dispatcher(
            self.store, clock, rng, sealer=sealer, node_id=settings.node_id
        )
        self.control = ControlService(
            self.store,
            clock,
            rng,
            sealer=sealer,
            relays=self._dispatcher.relays,
            tokens=self.authority,
            unlock_keys=self._autolock,
            facts=NodeFacts(
                node_id=settings.node_id,
                advertise_addr=settings.advertise_addr,
                version=settings.version,
            ),
            audit=audit,
        )
        self._certificate = (settings.key_pem, settings.certificate_pem)
        self._server: Any = None
        # What does not work, or wants somebody's attention, by part; empty: nothing.
        self.problems: dict[str, str] = {}
        self._collector = ClusterCollector(self.store)
        # What the TLS server presents and trusts, and whether it knows; read on gRPC's threads.
        self._offered: tuple[str, str, str] | None = None

    async def start(self) -> None:
        """Loads the state and opens the port. Raises Corrupt, Unavailable (port taken)."""
        await self.store.open()
        try:
            self._check_whole()
            await self._open_port()
        except BaseException:
            await self.store.close()
            raise
        REGISTRY.register(self._collector)
        log.info("manager_serving", addr=self._settings.listen_addr, revision=self.store.revision)

    def _check_whole(self) -> None:
        """Raises Corrupt unless the state is that of this node's cluster, keys included."""
        where = self.store.engine.where
        try:
            cluster, _ = objects(self.store)
        except errors.Internal:
            raise Corrupt(
                f"state file {where} holds no cluster; restore a backup with `swarmctl swarm "
                "restore FILE`"
            ) from None
        mine = tls.facts(tls.load_certificates(self._settings.certificate_pem)[0]).organization
        if cluster.id != mine:
            raise Corrupt(
                f"state file {where} is of cluster {cluster.id}, and this node is in cluster "
                f"{mine}; put the file of this cluster back, or restore a backup of it with "
                "`swarmctl swarm restore FILE`"
            )

    async def _open_port(self) -> None:
        server = rpc.server()
        authorize = self.authority.authorize
        server.add_generic_rpc_handlers(
            (
                rpc.handler(CONTROL_METHODS, self.control, authorize, self._audit),
                rpc.handler(DISPATCHER_METHODS, self._dispatcher, authorize, self._audit),
                rpc.handler(CERTIFICATES_METHODS, self.authority, authorize, self._audit),
            )
        )
        listen = self._settings.listen_addr
        credentials = grpc.dynamic_ssl_server_credentials(
            self._fetch(), self._fetch_changed, require_client_authentication=True
        )
        try:
            port = server.add_secure_port(listen, credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise errors.Unavailable(
                f"cannot listen on {listen}: the port is taken or the address is not this "
                "machine's; choose another with --listen-addr"
            )
        await server.start()
        self._server = server

    def use_certificate(self, key_pem: str, certificate_pem: str, root_ca_pem: str = "") -> None:
        """From now on new connections are answered with this certificate. `root_ca_pem`: the roots
        that the node trusts by now.
        """
        self._certificate = (key_pem, certificate_pem)

    async def issue_own(self, request: IssueNodeCertificateRequest) -> IssueNodeCertificateResponse:
        """A certificate for the node that this manager is on."""
        own = rpc.Identity(Caller.MANAGER, node_id=self._settings.node_id)
        return await self.authority.issue_node_certificate(request, rpc.Context(own, ""))

    def _current(self) -> tuple[str, str, str]:
        key_pem, certificate_pem = self._certificate
        return key_pem, self.authority.chain(certificate_pem), self.authority.trusted_pem()

    def _fetch(self) -> Any:
        self._offered = key_pem, certificate_pem, trusted_pem = self._current()
        return grpc.ssl_server_certificate_configuration(
            [(key_pem.encode(), certificate_pem.encode())], root_certificates=trusted_pem.encode()
        )

    def _fetch_changed(self) -> Any:
        """Called by gRPC for each new connection; None: nothing has changed."""
        return None if self._current() == self._offered else self._fetch()

    def _report_lock(self, problem: str) -> None:
        if problem:
            self.problems["autolock"] = problem
        else:
            self.problems.pop("autolock", None)

    async def run(self, ready: Callable[[], None]) -> None:
        """Serves agents and, while this manager leads, runs the control loop; until cancelled.

        Raises what only an operator can put right: the state file failed.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep("dispatcher", self._dispatcher.run))
            group.create_task(self._keep("api", self.control.run))
            group.create_task(self._keep("control loop", self._lead))
            group.create_task(self._keep("root rotation", Rotations(self.store).run))
            group.create_task(self._keep("data keys", self._data_keys.run))
            group.create_task(self._keep("autolock", self._autolock.run))
            group.create_task(self._watch_store())
            ready()

    async def _keep(self, part: str, run: Callable[[], Awaitable[None]]) -> None:
        """Runs a part, and again when a defect has ended it: each begins with what the store
        holds, so it can. Operating errors are passed on.
        """
        loop = asyncio.get_running_loop()
        delay_s = RESTART_S_MIN
        while True:
            begun_s = loop.time()
            well = loop.call_later(RESTART_S_MAX, self.problems.pop, part, None)
            try:
                await run()
                return
            except Exception as error:
                if _operating(error):
                    raise
                self.problems[part] = (
                    f"the manager's {part} failed ({_cause(error)!r}) and was started again; "
                    "swarmd's log has more"
                )
                log.exception("manager_part_failed", part=part, restart_s=delay_s)
            finally:
                well.cancel()
            if loop.time() - begun_s > RESTART_S_MAX:
                delay_s = RESTART_S_MIN
            await asyncio.sleep(delay_s)
            delay_s = min(RESTART_S_MAX, delay_s * 2)

    async def _watch_store(self) -> None:
        """Raises once the store can write no more: a manager that only reads would look alive."""
        error = await self.store.engine.wait_failed()
        log.error("state_file_failed", reason=error.message)
        # Trying again by itself cannot help, which Unavailable would suggest.
        raise errors.Internal(error.message) if isinstance(error, errors.Unavailable) else error

    async def _lead(self) -> None:
        engine = self.store.engine
        while True:
            fence = await self._campaign()
            log.info("leadership_won", epoch=fence.epoch)
            loop = ControlLoop(self.store, self._clock, self._rng, fence=fence)
            leading = asyncio.ensure_future(loop.run())
            deposed = asyncio.ensure_future(engine.wait_deposed(fence))
            try:
                await asyncio.wait({leading, deposed}, return_when=asyncio.FIRST_COMPLETED)
                if leading.done():
                    await leading
                log.warning("leadership_lost", epoch=fence.epoch)
            finally:
                for task in (leading, deposed):
                    task.cancel()
                await asyncio.gather(leading, deposed, return_exceptions=True)

    async def _campaign(self) -> Fence:
        """Leadership, however long a disk that is full keeps it from being written: meanwhile the
        manager answers what is asked of it.
        """
        delay_s = RESTART_S_MIN
        while True:
            try:
                fence = await self.store.engine.campaign(self._settings.node_id)
            except errors.Unavailable as error:
                self.problems["leadership"] = error.message
                log.warning("leadership_not_won", reason=error.message, retry_s=delay_s)
            else:
                self.problems.pop("leadership", None)
                return fence
            await asyncio.sleep(delay_s)
            delay_s = min(CAMPAIGN_S_MAX, delay_s * 2)

    async def stop(self) -> None:
        """Ends all calls and closes the store; what was acknowledged is kept."""
        if self._server is not None:
            REGISTRY.unregister(self._collector)
            await self._server.stop(STOP_GRACE_S)
            self._server = None
        await self.store.close()


def _existing_key(state_dir: Path, vault: Vault) -> bytes:
    """The sealing key of a state that is there. Raises Corrupt where one of the two is missing:
    a new file in its place would look like a whole state.
    """
    path = state_dir / STORE_FILE
    if not path.exists() and not path.with_name(path.name + "-wal").exists():
        raise Corrupt(
            f"state file {path} is gone; put it back, or restore a backup with `swarmctl swarm "
            "restore FILE`"
        )
    return load_key(state_dir / SEAL_FILE, vault)


def _cause(error: BaseException) -> BaseException:
    """The first error within groups of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _operating(error: Exception) -> bool:
    """Whether an operating error is the cause, or one of several."""
    if isinstance(error, ExceptionGroup):
        return any(_operating(e) for e in error.exceptions)
    return isinstance(error, errors.SwarmError)
