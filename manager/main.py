"""One manager: the store, the leader's work, and the services that it answers, wired together.

`bootstrap` makes a new cluster's state, `force_new_cluster` makes one manager of what is left of
several. A `Manager` serves it: over mutual TLS to nodes and people elsewhere, and, through swarmd's
unix socket, to the machine's own users. Every manager serves; one of them leads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from msgspec import structs
from prometheus_client import REGISTRY, CollectorRegistry

from manager import founding, garbage
from manager import place as places
from manager.admission import Admissions
from manager.api import ControlService, NodeFacts
from manager.api.roles import Here
from manager.belonging import Belonging
from manager.belonging import Demoted as Demoted  # for the node's daemon
from manager.ca import (
    Authority,
    Autolock,
    DataKeys,
    Rotations,
    objects,
)
from manager.dispatcher import Dispatcher
from manager.founding import bootstrap as bootstrap  # for the node's daemon
from manager.founding import check_etcd as check_etcd
from manager.leading import Leading
from manager.metrics import ClusterCollector
from manager.opening import Node as Site
from manager.opening import Opened, Removal, open_state
from manager.place import Place
from manager.restore import Restoration as Restoration
from manager.restore import Restored as Restored
from manager.store import Corrupt, Store
from manager.store.engines import etcd_binary
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_member import Member, Removed
from manager.store.engines.etcd_members import Members
from manager.store.engines.etcd_upkeep import Upkeep
from swarm import errors, rpc, tls
from swarm.audit import Trail
from swarm.clock import SECOND_NS, Clock
from swarm.ids import Rng
from swarm.limits import Limits
from swarm.v1 import (
    Caller,
    IssueNodeCertificateRequest,
    IssueNodeCertificateResponse,
)
from swarm.v1.services import (
    CERTIFICATES_METHODS,
    CONTROL_METHODS,
    DISPATCHER_METHODS,
    MANAGERS_METHODS,
)
from swarm.vault import Vault

log = structlog.get_logger("manager")

STOP_GRACE_S = 2.0
# A part of the manager that a defect has ended begins again after such a pause, doubled each time
# until it has lasted for the longest of them.
RESTART_S_MIN, RESTART_S_MAX = 0.2, 30.0
CAMPAIGN_S_MAX = 2.0
# After a move to etcd that failed: no further one is begun for as long.
MOVE_AGAIN_NS = 60 * SECOND_NS
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


async def etcd_version() -> str:
    """Of the etcd that was found on this machine; empty: there is none."""
    return await etcd_binary.version()


async def force_new_cluster(settings: Settings, clock: Clock, vault: Vault) -> list[str]:
    """See manager.founding; `vault`: the key of its node, not locked."""
    return await founding.force_new_cluster(_site(settings), vault, clock)


class _Anew(Exception):
    """The manager has to be started again."""


class Manager:
    """A manager that serves. `start`, then `run` until cancelled, then `stop`. What it consists of
    is there once it has started.
    """

    store: Store
    authority: Authority
    control: ControlService

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        rng: Rng,
        *,
        vault: Vault,
        audit: Trail | None = None,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        """`vault`: the key of its node, not locked. `registry`: where its metrics are shown."""
        self._registry = registry
        self._settings = settings
        self._audit = audit
        self._clock = clock
        self._rng = rng
        self._vault = vault
        self._place = Place(format=places.FORMAT)
        self._certificate = (settings.key_pem, settings.certificate_pem)
        self._server: Any = None
        self._member: Member | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._upkeep: EtcdClient | None = None
        self._members: Members | None = None
        # The state has to move before a further manager can come in.
        self._move = asyncio.Event()
        # What does not work, or wants somebody's attention, by part; empty: nothing.
        self.problems: dict[str, str] = {}
        # What the TLS server presents and trusts, and whether it knows; read on gRPC's threads.
        self._offered: tuple[str, str, str] | None = None

    # -------------------------------------------------------------- starting

    async def start(self, waiting: Callable[[str], None] = lambda why: None) -> None:
        """Opens the state, loads it and opens the port. Without a quorum this takes as long as it
        is gone; `waiting` is told. Raises Corrupt, Unavailable (port taken), Unsupported (no etcd
        here), Demoted.
        """
        try:
            opened = await open_state(
                _site(self._settings, self._certificate), self._vault, self._clock
            )
        except Removal as error:
            raise Demoted(error.message) from error
        self._place = opened.place
        if opened.place.move_failed:
            self.problems["move"] = f"the state was not moved to etcd: {opened.place.move_failed}"
        self._member = opened.member
        try:
            self._wire(opened)
            await self._load(waiting)
            self._check_whole()
            await self._open_port()
        except BaseException:
            await self._close()
            raise
        self._registry.register(self._collector)
        log.info(
            "manager_serving",
            addr=self._settings.listen_addr,
            store=self.store.engine.name,
            revision=self.store.revision,
        )

    def _wire(self, opened: Opened) -> None:
        """Makes the parts, which begin nothing."""
        settings, clock, rng, sealer = self._settings, self._clock, self._rng, opened.sealer
        self.store = Store(opened.engine, clock, seal=sealer)
        if opened.member is not None:
            self._supervising = asyncio.create_task(opened.member.run())
            self._members = Members(opened.member.endpoint)
            self._upkeep = EtcdClient([opened.member.endpoint])
        self._belonging = Belonging(
            self.store,
            Here(settings.node_id, opened.place.external),
            addr=settings.advertise_addr,
        )
        self._data_keys = DataKeys(self.store, clock, sealer)
        self._autolock = Autolock(self.store, self._vault, report=self._report_lock)
        self.authority = Authority(
            self.store,
            clock,
            check_admits=self._check_admits,
            external_etcd=opened.place.external,
        )
        self._dispatcher = Dispatcher(
            self.store,
            clock,
            rng,
            sealer=sealer,
            node_id=settings.node_id,
            connect=_site(self._settings, self._certificate).connect,
        )
        self._admissions = Admissions(
            sealer=sealer,
            prefix=opened.place.prefix,
            members=self._members,
            access=opened.access,
            begin_move=self._begin_move,
            barrier=self.store.engine.barrier,
            forwarding=self._dispatcher,
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
                external_etcd=opened.place.external,
            ),
            audit=self._audit,
            barrier=self.store.engine.barrier,
        )
        self._collector = ClusterCollector(self.store)

    async def _load(self, waiting: Callable[[str], None]) -> None:
        """Loads the state, once there is a quorum to load it from."""
        delay_s = RESTART_S_MIN
        while True:
            try:
                await self._unless_removed(self.store.open())
            except errors.Unavailable as error:
                if self._member is None:
                    raise
                waiting(
                    f"too few of the cluster's managers are there to go on ({error.message}); "
                    "start the others, or, where they are gone for good, run `swarmctl swarm init "
                    "--force-new-cluster` here"
                )
                log.warning("state_not_loaded", reason=error.message, retry_s=delay_s)
            else:
                garbage.settle()
                return
            await asyncio.sleep(delay_s)
            delay_s = min(CAMPAIGN_S_MAX, delay_s * 2)

    async def _unless_removed(self, work: Awaitable[None]) -> None:
        """Does the work. Raises Demoted when etcd says meanwhile that this member is none."""
        doing = asyncio.ensure_future(work)
        waiting = {doing, self._supervising} if self._supervising is not None else {doing}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                await self._supervise()
            await doing
        finally:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)

    async def _supervise(self) -> None:
        """For as long as the member of etcd is looked after. Raises Demoted when it was removed."""
        assert self._supervising is not None
        try:
            await asyncio.shield(self._supervising)
        except Removed as error:
            # Nobody must wait for answers that never come: the node, without a session while its
            # certificate is not renewed, would be taken for down meanwhile.
            if isinstance(engine := self.store.engine, EtcdEngine):
                engine.abandon()
            raise Demoted(error.message) from error

    def _check_whole(self) -> None:
        """Raises Corrupt unless the state is that of this node's cluster, keys included."""
        where = self.store.engine.where
        try:
            cluster, _ = objects(self.store)
        except errors.Internal:
            raise Corrupt(
                f"{self._noun} {where} holds no cluster; restore a backup with `swarmctl swarm "
                "restore FILE`"
            ) from None
        mine = tls.facts(tls.load_certificates(self._settings.certificate_pem)[0]).organization
        if cluster.id != mine:
            raise Corrupt(
                f"{self._noun} {where} is of cluster {cluster.id}, and this node is in cluster "
                f"{mine}; put the file of this cluster back, or restore a backup of it with "
                "`swarmctl swarm restore FILE`"
            )

    @property
    def _noun(self) -> str:
        return "state file" if self._place.engine == places.EMBEDDED else "the state in"

    async def _open_port(self) -> None:
        server, limits = rpc.server(), Limits(self._clock)
        authorize = self.authority.authorize
        server.add_generic_rpc_handlers(
            (
                rpc.handler(CONTROL_METHODS, self.control, authorize, self._audit, limits),
                rpc.handler(DISPATCHER_METHODS, self._dispatcher, authorize, self._audit, limits),
                rpc.handler(CERTIFICATES_METHODS, self.authority, authorize, self._audit, limits),
                rpc.handler(MANAGERS_METHODS, self._admissions, authorize, self._audit, limits),
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
            await server.stop(None)
            raise errors.Unavailable(
                f"cannot listen on {listen}: the port is taken or the address is not this "
                "machine's; choose another with --listen-addr"
            )
        try:
            await server.start()
        except BaseException:
            await server.stop(None)
            raise
        self._server = server

    def use_certificate(self, key_pem: str, certificate_pem: str, root_ca_pem: str = "") -> None:
        """From now on new connections are answered with this certificate. `root_ca_pem`: the roots
        that the node trusts by now.
        """
        self._certificate = (key_pem, certificate_pem)
        if self._member is not None and self._member.use_certificate(
            key_pem=key_pem,
            certificate_pem=certificate_pem,
            root_ca_pem=root_ca_pem or self._settings.root_ca_pem,
        ):
            self._belonging.roots_changed.set()

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

    # -------------------------------------------------------------- several managers

    def _check_admits(self) -> None:
        """Raises Unsupported, Unavailable where a further manager cannot come in."""
        if self._place.engine == places.ETCD:
            return
        if etcd_binary.binary() is None:
            raise errors.Unsupported(
                "this cluster keeps its state in the embedded store, which has one manager. "
                "Several need etcd, on each of them, and this manager's machine has none: "
                f"{etcd_binary.INSTALL}. Or join as a worker (`swarmctl swarm join-token worker`)"
            )
        again_ns = self._place.move_failed_at_ns + MOVE_AGAIN_NS
        if self._place.move_failed and self._clock.now_ns() < again_ns:
            raise errors.Unavailable(
                f"the state could not be moved to etcd: {self._place.move_failed}; put that right, "
                "and try again in a minute"
            )

    def _begin_move(self) -> None:
        self._check_admits()
        self._move.set()

    async def _move_when_asked(self) -> None:
        """The move itself is the next start's: nothing may serve meanwhile."""
        await self._move.wait()
        moving = structs.replace(
            self._place,
            to=places.ETCD,
            fresh=False,
            prefix=places.PREFIX,
            move_failed="",
            move_failed_at_ns=0,
        )
        try:
            places.save(self._settings.state_dir, moving)
        except OSError as error:
            raise errors.Unavailable(
                f"{self._settings.state_dir} cannot be written: {error.strerror or error}"
            ) from error
        raise _Anew

    async def step_down(self) -> None:
        """Makes this node a worker; returns once the others have let it go. Raises Conflict with
        the reason where that cannot be, Unavailable when it takes too long.
        """
        await self._belonging.step_down()

    # -------------------------------------------------------------- running

    async def run(self, ready: Callable[[], None]) -> None:
        """Serves agents and, while this manager leads, runs the control loop; until cancelled, or
        until it wants to begin anew (its state is to be moved), which it does by returning.

        Raises Demoted, and what only an operator can put right: the state file failed.
        """
        demoted: Demoted | None = None
        belonging = self._belonging
        leading = Leading(
            self.store,
            self._clock,
            self._rng,
            node_id=self._settings.node_id,
            dispatcher=self._dispatcher,
            members=self._members,
            problems=self.problems,
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep("dispatcher", self._dispatcher.run))
                group.create_task(self._keep("api", self.control.run))
                group.create_task(self._keep("control loop", leading.run))
                group.create_task(self._keep("root rotation", Rotations(self.store).run))
                group.create_task(self._keep("data keys", self._data_keys.run))
                group.create_task(self._keep("autolock", self._autolock.run))
                group.create_task(self._keep("presence", self._announce))
                group.create_task(self._keep("enlisting", belonging.enlist))
                group.create_task(belonging.watch())
                group.create_task(self._watch_store())
                if self._upkeep is not None:
                    group.create_task(self._supervise())
                    group.create_task(self._keep("member's restart", self._restart_in_turn))
                    upkeep = Upkeep(self._upkeep, clock=self._clock, rank=belonging.rank)
                    group.create_task(self._keep("etcd's upkeep", upkeep.run))
                else:
                    group.create_task(self._move_when_asked())
                ready()
        except* Demoted as group_:
            demoted = _first(group_)
        except* _Anew:
            log.info("manager_begins_anew")
        if demoted is not None:
            belonging.gone.set()
            raise Demoted(demoted.message)

    async def _restart_in_turn(self) -> None:
        assert self._member is not None and self._members is not None
        await self._belonging.restart_in_turn(self._member, self._members)

    async def _announce(self) -> None:
        await self.store.engine.announce(self._settings.node_id)

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

    async def stop(self) -> None:
        """Ends all calls and closes the store; what was acknowledged is kept."""
        if self._server is not None:
            self._registry.unregister(self._collector)
            await self._server.stop(STOP_GRACE_S)
            self._server = None
        await self._close()

    async def _close(self) -> None:
        if hasattr(self, "store"):
            await self.store.close()
        for client in (self._members, self._upkeep):
            if client is not None:
                await client.close()
        if self._member is not None:
            await self._member.stop()
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)


def _cause(error: BaseException) -> BaseException:
    """The first error within groups of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _site(settings: Settings, certificate: tuple[str, str] = ("", "")) -> Site:
    """`certificate`: key and certificate where they were renewed since."""

    async def nobody(address: str) -> rpc.Channel:
        raise errors.Unavailable(f"this manager reaches no others, {address} included")

    key_pem, certificate_pem = certificate
    return Site(
        folder=settings.state_dir,
        node_id=settings.node_id,
        listen_addr=settings.listen_addr,
        advertise_addr=settings.advertise_addr,
        peer_port=settings.peer_port,
        key_pem=key_pem or settings.key_pem,
        certificate_pem=certificate_pem or settings.certificate_pem,
        root_ca_pem=settings.root_ca_pem,
        managers=settings.managers,
        connect=settings.connect or nobody,
    )


def _first(group: BaseExceptionGroup[Demoted]) -> Demoted:
    error: BaseException = _cause(group)
    assert isinstance(error, Demoted)
    return error


def _operating(error: Exception) -> bool:
    """Whether an operating error is the cause, or one of several."""
    if isinstance(error, ExceptionGroup):
        return any(_operating(e) for e in error.exceptions)
    return isinstance(error, errors.SwarmError)
