"""The manager part of a node, for as long as the node's role is manager.

The one place that imports manager. Owns that a manager which fails is tried again, or told, while
worker, session and published ports go on; what the node's role is, is agent/membership.py's.

What passes by itself (a port that is taken, a full disk, too few of the other managers) is tried
again with a pause that grows; what does not, such as a damaged state, waits until swarmd is
restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from agent import identity as ids
from agent.options import Settings
from manager import main as manager_main
from swarm import __version__, errors, tls
from swarm.audit import Trail
from swarm.clock import Clock
from swarm.ids import Rng
from swarm.rpc import Channel
from swarm.v1 import (
    InitRequest,
    IssueNodeCertificateRequest,
    IssueNodeCertificateResponse,
    Node,
    NodeRole,
    Reachability,
)
from swarm.vault import Vault

log = structlog.get_logger("membership")

FOLDER = "manager"  # in the node's state folder
RETRY_S_MIN, RETRY_S_MAX = 1.0, 30.0
PASSING = (errors.Unavailable, errors.TimedOut, errors.Exhausted)

Demoted = manager_main.Demoted
Connect = Callable[[str], Awaitable[Channel]]


class Part(Protocol):
    """What is used of manager.main.Manager."""

    problems: dict[str, str]
    # The services that swarmd's socket passes on to, and the state.
    control: Any
    authority: Any
    store: Any

    async def start(self, waiting: Callable[[str], None]) -> None: ...
    async def run(self, ready: Callable[[], None]) -> None: ...
    async def stop(self) -> None: ...
    def use_certificate(self, key_pem: str, certificate_pem: str, root_ca_pem: str) -> None: ...
    async def issue_own(
        self, request: IssueNodeCertificateRequest
    ) -> IssueNodeCertificateResponse: ...
    async def step_down(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Standing:
    """The managers as this one knows them, itself among them. `in_touch`: what it knows is new."""

    reachable: int
    total: int
    in_touch: bool


class Managing:
    """See the module. `run` while the role is manager; again when it is so again."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        rng: Rng,
        *,
        identity: Callable[[], ids.Identity],
        connect: Connect,
        vault: Vault,
        audit: Trail | None = None,
        on_denied: Callable[[], None] = lambda: None,
        make: Callable[..., Part] = manager_main.Manager,
    ) -> None:
        """`identity`: the node's, as it is now; `connect`: to another manager, as the node;
        `on_denied` is called when the others take the node for no manager.
        """
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._identity = identity
        self._connect = connect
        self._vault = vault
        self._audit = audit
        self._on_denied = on_denied
        self._make = make
        self._part: Part | None = None
        # It serves, or has failed once.
        self.settled = asyncio.Event()
        self.serving = False
        self.served = False  # it has at least once
        self.problem = ""  # why it does not serve
        self.cause: errors.SwarmError | None = None  # the same, as it was raised
        self.lasting = False  # it does not pass by itself
        self.waiting = False  # it has begun, and goes on as soon as others are there

    async def run(self) -> None:
        """Until cancelled. Raises Demoted: the cluster does not have it as a manager."""
        loop = asyncio.get_running_loop()
        delay_s = RETRY_S_MIN
        try:
            while True:
                begun_s = loop.time()
                again_s = delay_s
                try:
                    await self._serve()
                    again_s = 0.0  # it asks for that, to begin anew with what has changed
                    log.info("manager_begins_anew")
                except Exception as error:
                    self._failed(error)
                self.settled.set()
                if self.lasting:
                    await loop.create_future()
                if loop.time() - begun_s > RETRY_S_MAX:
                    delay_s = again_s = RETRY_S_MIN
                await asyncio.sleep(again_s)
                if again_s:
                    delay_s = min(RETRY_S_MAX, delay_s * 2)
                    log.info("manager_tried_again")
        finally:
            self.settled.clear()
            self._well()

    async def _serve(self) -> None:
        make_vault(self._vault)
        part = self._make(
            manager_settings(self._settings, self._identity, self._connect),
            self._clock,
            self._rng,
            vault=self._vault,
            audit=self._audit,
        )
        await part.start(self._waits)
        self._part = part
        try:
            await part.run(self._ready)
        finally:
            self.serving = False
            self._part = None
            await part.stop()

    def _waits(self, why: str) -> None:
        """It has begun, and cannot go on before others are there."""
        self.problem, self.waiting = why, True
        self.settled.set()

    def _ready(self) -> None:
        self.serving = self.served = True
        self._well()
        self.settled.set()

    def _well(self) -> None:
        self.problem, self.cause, self.lasting, self.waiting = "", None, False, False

    def _failed(self, error: Exception) -> None:
        """Raises Demoted."""
        self.waiting = False
        causes = list(leaves(error))
        for cause in causes:
            if isinstance(cause, Demoted):
                log.warning("manager_demoted", reason=cause.message)
                raise cause from None
        defects = [c for c in causes if not isinstance(c, errors.SwarmError)]
        if defects:
            self.problem = f"internal error: {defects[0]!r}; swarmd's log has more"
            self.lasting = False
            log.exception("manager_failed")
            return
        self.cause = next(c for c in causes if isinstance(c, errors.SwarmError))
        self.problem = "; ".join(dict.fromkeys(str(c) for c in causes))
        # Refused as one that is none: it may be so, and then its next certificate says it.
        denied = [c for c in causes if type(c) is errors.Denied]
        if denied:
            self._on_denied()
        self.lasting = not denied and not all(isinstance(c, PASSING) for c in causes)
        log.error("manager_failed", reason=self.problem)

    # -------------------------------------------------------------- while it runs

    @property
    def part(self) -> Part | None:
        """The manager, once its state is loaded."""
        return self._part

    def manager(self) -> Part:
        """The manager that serves. Raises Unavailable while it does not."""
        if self._part is None or not self.serving:
            raise errors.Unavailable(
                self.problem or "the manager on this node is starting; try again in a moment"
            )
        return self._part

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._part.problems.values()) if self._part is not None else ()

    def standing(self) -> Standing | None:
        """None: it does not serve, so that nobody knows."""
        part = self._part
        if part is None or not self.serving:
            return None
        managers = [n.manager_status for n in part.store.all(Node) if n.manager_status is not None]
        return Standing(
            reachable=sum(m.reachability == Reachability.REACHABLE for m in managers),
            total=len(managers),
            in_touch=part.store.engine.in_touch,
        )


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors within groups of errors."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def manager_settings(
    settings: Settings, identity: Callable[[], ids.Identity], connect: Connect
) -> manager_main.Settings:
    """What the node tells its manager."""
    own = identity()
    return manager_main.Settings(
        state_dir=settings.state_dir / FOLDER,
        node_id=own.node_id,
        listen_addr=own.listen_addr,
        advertise_addr=own.advertise_addr,
        key_pem=own.key_pem,
        certificate_pem=own.certificate_pem,
        version=__version__,
        root_ca_pem=own.root_ca_pem,
        peer_port=settings.peer_port,
        managers=lambda: identity().managers,
        connect=connect,
    )


async def found(
    settings: Settings,
    request: InitRequest,
    *,
    listen_addr: str,
    advertise_addr: str,
    clock: Clock,
    rng: Rng,
    vault: Vault,
) -> ids.Identity:
    """Makes a new cluster's state; the node's identity as its first manager."""
    make_vault(vault)
    new = await manager_main.bootstrap(
        settings.state_dir / FOLDER,
        request,
        vault=vault,
        hostname=settings.hostname,
        advertise_addr=advertise_addr,
        clock=clock,
        rng=rng,
    )
    return ids.Identity(
        format=ids.FORMAT,
        node_id=new.node.id,
        cluster_id=new.cluster.id,
        role=NodeRole.MANAGER,
        key_pem=new.key_pem,
        certificate_pem=new.certificate_pem,
        root_ca_pem=new.cluster.root_ca_pem,
        listen_addr=listen_addr,
        advertise_addr=advertise_addr,
        data_path_addr=request.data_path_addr or tls.split_address(advertise_addr)[0],
        managers=(advertise_addr,),
    )


async def go_on_alone(
    settings: Settings, identity: ids.Identity, connect: Connect, *, clock: Clock, vault: Vault
) -> None:
    """Makes the node the only manager of its cluster, while nothing of its manager runs. Raises
    Conflict and Unsupported where there is no need or no way, Corrupt, Unavailable.
    """
    await manager_main.force_new_cluster(
        manager_settings(settings, lambda: identity, connect), clock, vault
    )


async def etcd_version() -> str:
    """Of the etcd that was found on this machine; empty: there is none."""
    return await manager_main.etcd_version()


def restoration(settings: Settings, clock: Clock) -> manager_main.Restoration:
    """A restore into this node's manager folder."""
    return manager_main.Restoration(settings.state_dir / FOLDER, clock)


def restored_identity(
    restored: manager_main.Restored, *, listen_addr: str, advertise_addr: str, data_path_addr: str
) -> ids.Identity:
    """The node's identity as the restored cluster's manager."""
    return ids.Identity(
        format=ids.FORMAT,
        node_id=restored.node_id,
        cluster_id=restored.cluster_id,
        role=NodeRole.MANAGER,
        key_pem=restored.key_pem,
        certificate_pem=restored.certificate_pem,
        root_ca_pem=restored.root_ca_pem,
        listen_addr=listen_addr,
        advertise_addr=advertise_addr,
        data_path_addr=data_path_addr,
        managers=(advertise_addr,),
    )


def make_vault(vault: Vault) -> None:
    """Makes the node's key at rest, unless it has one. Raises Unavailable when the disk refuses."""
    try:
        vault.make()
    except OSError as error:
        raise errors.Unavailable(
            f"{vault.path} cannot be written: {error.strerror or error}; free space on its disk"
        ) from error


def save(state_dir: Path, identity: ids.Identity, vault: Vault) -> None:
    """Writes the identity, a manager's with its key sealed. Raises OSError."""
    sealing = identity.role == NodeRole.MANAGER
    if sealing:
        vault.make()
    ids.save(state_dir, identity, vault if sealing else None)
