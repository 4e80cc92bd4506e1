"""Being a member of a cluster: the manager (where the node is one), the worker and its session.

Lives from `run` until cancelled. Owns the node's identity while it runs: renewals, new roots and
the list of managers are written to disk before they are used. The only place that starts a manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from pathlib import Path

import structlog
from msgspec import structs

from agent import identity as ids
from agent import metrics
from agent.description import About, Issuer
from agent.options import Settings
from agent.proxy import Proxy
from agent.runtime.base import Runtime
from agent.runtime.docker import DockerRuntime
from agent.runtime.process import ProcessRuntime
from agent.session import Session
from agent.state import StateFile
from agent.worker import Worker
from manager import main as manager_main
from swarm import __version__, errors, tls
from swarm.audit import Trail
from swarm.clock import SECOND_NS, Clock
from swarm.ids import Rng
from swarm.rpc import Channel
from swarm.v1 import ClusterInfo, InitRequest, NodeRole
from swarm.vault import Vault

log = structlog.get_logger("membership")

PROBE_S = 2.0  # to look at what a manager that cannot be talked to presents
LEAVE_TIMEOUT_S = 30.0  # to stop all tasks; longer than the usual grace period of 10 s


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
        settings.state_dir / "manager",
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


def restoration(settings: Settings, clock: Clock) -> manager_main.Restoration:
    """A restore into this node's manager folder."""
    return manager_main.Restoration(settings.state_dir / "manager", clock)


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


class Membership:
    """See the module."""

    def __init__(
        self,
        settings: Settings,
        identity: ids.Identity,
        clock: Clock,
        rng: Rng,
        *,
        vault: Vault,
        audit: Trail | None = None,
    ) -> None:
        """`vault`: the node's key at rest, not locked; only managers have one."""
        self._settings = settings
        self._vault = vault
        self._audit = audit
        self._clock = clock
        self._rng = rng
        self.identity = identity
        # The manager serves, where there is one.
        self.started = asyncio.Event()
        self._renew = asyncio.Event()
        self._manager: manager_main.Manager | None = None
        self._ingress = Proxy(
            relay_address=(_bind(identity.data_path_addr), settings.relay_port),
            listen_addresses=_published_at(identity.data_path_addr),
            clock=clock,
        )
        self._runtimes = self._make_runtimes()
        self._worker = Worker(
            runtimes=self._runtimes,
            ingress=self._ingress,
            state=StateFile(settings.state_dir / "worker"),
            about=About(
                hostname=settings.hostname,
                version=__version__,
                data_path_addr=identity.data_path_addr,
                data_path_port=settings.relay_port,
                engine_labels=settings.engine_labels,
            ),
            clock=clock,
            issuer=Issuer.of(identity.issuer),
        )
        self._session = Session(
            self._worker,
            connect=self._connect,
            managers=identity.managers,
            rng=rng,
            on_cluster=self._learn,
            on_removed=self._removed,
            explain=self._explain,
        )
        self._talking: asyncio.Task[None] | None = None
        self.first_session = self._session.first

    def _make_runtimes(self) -> tuple[Runtime, ...]:
        settings, identity = self._settings, self.identity
        made: list[Runtime] = []
        for name in settings.runtimes:
            if name == "docker" and settings.docker_socket:
                made.append(
                    DockerRuntime(
                        socket=settings.docker_socket,
                        node_id=identity.node_id,
                        cluster_id=identity.cluster_id,
                        clock=self._clock,
                    )
                )
            elif name == "process":
                made.append(
                    ProcessRuntime(
                        folder=settings.state_dir / "worker",
                        node_id=identity.node_id,
                        bind_address=identity.data_path_addr,
                        clock=self._clock,
                        rng=self._rng,
                        host_ports=self._ingress,
                        hide=settings.state_dir,
                    )
                )
        return tuple(made)

    # -------------------------------------------------------------- life

    async def run(self) -> None:
        """Is a member until cancelled; tasks go on. Raises what keeps the node from being one."""
        try:
            await self._ingress.start()
            if self.identity.role == NodeRole.MANAGER:
                await self._start_manager()
            async with asyncio.TaskGroup() as group:
                if self._manager is not None:
                    serving = asyncio.Event()
                    group.create_task(self._manager.run(serving.set))
                    await serving.wait()
                self.started.set()
                looked = asyncio.Event()
                group.create_task(self._worker.run(looked.set))
                group.create_task(self._keep_certificate())
                await looked.wait()
                self._talking = group.create_task(self._session.run())
        finally:
            await self._stop()

    async def _start_manager(self) -> None:
        identity = self.identity
        make_vault(self._vault)
        manager = manager_main.Manager(
            manager_main.Settings(
                state_dir=self._settings.state_dir / "manager",
                node_id=identity.node_id,
                listen_addr=identity.listen_addr,
                advertise_addr=identity.advertise_addr,
                key_pem=identity.key_pem,
                certificate_pem=identity.certificate_pem,
                version=__version__,
            ),
            self._clock,
            self._rng,
            audit=self._audit,
            vault=self._vault,
        )
        await manager.start()
        self._manager = manager

    async def _stop(self) -> None:
        if self._manager is not None:
            await self._manager.stop()
            self._manager = None
        await self._ingress.close()
        for runtime in self._runtimes:
            await runtime.close()

    async def leave(self) -> None:
        """Tells the managers, and stops and removes all of the node's tasks."""
        if self._manager is None:
            await self._session.leave()
        # Else a manager would go on assigning tasks to a node that is being emptied.
        if self._talking is not None:
            self._talking.cancel()
        await self._empty()

    async def empty(self) -> None:
        """In place of `run`, when that cannot be: stops and removes all of the node's tasks."""
        try:
            await self._ingress.start()
            async with asyncio.TaskGroup() as group:
                looked = asyncio.Event()
                working = group.create_task(self._worker.run(looked.set))
                await looked.wait()
                await self._empty()
                working.cancel()
        finally:
            await self._stop()

    async def _empty(self) -> None:
        if not await self._worker.empty(timeout_s=LEAVE_TIMEOUT_S):
            log.warning("tasks_left_behind", tasks=len(self._worker))

    # -------------------------------------------------------------- identity

    async def _connect(self, address: str) -> Channel:
        return self.identity.channel(address)

    async def _explain(self, address: str) -> str:
        identity = self.identity
        why = await asyncio.to_thread(
            tls.why_strangers,
            address,
            identity.certificate_pem,
            identity.root_ca_pem,
            timeout_s=PROBE_S,
        )
        return why and f"{why}; leave the swarm and join again with a fresh token"

    async def _keep_certificate(self) -> None:
        self._show_expiry()
        await ids.keep_renewed(
            lambda: self.identity,
            self._replace,
            clock=self._clock,
            rng=self._rng,
            wake=self._renew,
            issue=self._manager.issue_own if self._manager is not None else None,
        )

    async def _replace(self, identity: ids.Identity) -> None:
        """Raises Unavailable when the disk refuses; then all is as it was."""
        try:
            save(self._settings.state_dir, identity, self._vault)
        except OSError as error:
            raise errors.Unavailable(
                f"the node's identity cannot be written to {self._settings.state_dir}: "
                f"{error.strerror or error}; free space on its disk"
            ) from error
        self.identity = identity
        self._worker.use_issuer(Issuer.of(identity.issuer))
        if self._manager is not None:
            self._manager.use_certificate(identity.key_pem, identity.certificate_pem)
        self._show_expiry()

    def _show_expiry(self) -> None:
        certificate = tls.load_certificates(self.identity.certificate_pem)[0]
        metrics.CERTIFICATE_EXPIRY.set(tls.facts(certificate).not_after_ns / SECOND_NS)

    async def _learn(self, info: ClusterInfo) -> None:
        """The managers, the roots, or the node's role changed."""
        known = structs.replace(
            self.identity,
            managers=info.managers or self.identity.managers,
            root_ca_pem=info.root_ca_pem or self.identity.root_ca_pem,
        )
        if known != self.identity:
            try:
                await self._replace(known)
            except errors.Unavailable as error:
                # The session knows them, and the next one brings them again.
                log.warning("cluster_facts_not_written", reason=error.message)
        changed = info.role not in (NodeRole.UNSPECIFIED, self.identity.role)
        if changed or self.identity.outdated:
            self._renew.set()

    def _removed(self) -> None:
        log.error("removed_from_cluster", what_to_do="run `swarmctl swarm leave` on this node")

    # -------------------------------------------------------------- what the daemon shows

    def manager(self) -> manager_main.Manager:
        """The manager that serves. Raises Unavailable while it does not."""
        if self._manager is None:
            raise errors.Unavailable("the manager on this node is starting; try again in a moment")
        return self._manager

    @property
    def joined(self) -> bool:
        """Whether a manager has taken the node up since the start."""
        return self.first_session.is_set() or self._manager is not None

    @property
    def connected(self) -> bool:
        return self._session.connected

    @property
    def problem(self) -> str:
        facts = tls.facts(tls.load_certificates(self.identity.certificate_pem)[0])
        if facts.not_after_ns <= self._clock.now_ns():
            return (
                "Swarm certificates have expired. To replace them, leave the swarm and join again."
            )
        return self._session.problem

    @property
    def runtimes(self) -> tuple[str, ...]:
        return self._worker.description().runtimes

    @property
    def warnings(self) -> tuple[str, ...]:
        mine = self._manager.problems.values() if self._manager is not None else ()
        return (*self._worker.description().warnings, *mine)

    @property
    def tasks(self) -> int:
        return len(self._worker)


def _bind(address: str) -> str:
    """Where to listen for other nodes: a loopback address alone, else all."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address).is_loopback:
            return address
    return "0.0.0.0"  # the address may be one that a router maps to this machine


def _published_at(address: str) -> tuple[str, ...]:
    """Where published ports are opened. Nodes on loopback addresses share a machine, so each keeps
    to its own address.
    """
    bind = _bind(address)
    return (bind,) if bind == address else ("0.0.0.0", "::")
