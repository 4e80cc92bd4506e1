"""Being a member of a cluster: the manager (where the node is one), the worker and its session.

Lives from `run` until cancelled. Owns the node's identity while it runs: renewals, new roots, the
role and the list of managers are written to disk before they are used. What follows from the role
is agent/role.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress

import structlog
from msgspec import structs

from agent import identity as ids
from agent import metrics
from agent.description import About, Issuer, pids_of_host
from agent.gpus import Gpus
from agent.managing import FOLDER, Managing, Part, etcd_version, save
from agent.options import Settings
from agent.proxy import Proxy
from agent.role import Role
from agent.runtime.base import Runtime
from agent.runtime.docker import DockerRuntime
from agent.runtime.process import ProcessRuntime
from agent.session import Session
from agent.state import StateFile
from agent.usage import Meter
from agent.worker import Worker
from swarm import __version__, errors, tls
from swarm.audit import Trail
from swarm.clock import SECOND_NS, Clock
from swarm.ids import Rng
from swarm.rpc import Channel
from swarm.v1 import (
    ClusterInfo,
    IssueNodeCertificateRequest,
    IssueNodeCertificateResponse,
    NodeRole,
)
from swarm.vault import Vault

log = structlog.get_logger("membership")

PROBE_S = 2.0  # to look at what a manager that cannot be talked to presents
ETCD_LOOK_S = 10.0  # how often is looked whether etcd is there by now
GPU_LOOK_S = 3.0  # the first session waits so long for the GPUs; then the last known ones hold
LEAVE_TIMEOUT_S = 30.0  # to stop all tasks; longer than the usual grace period of 10 s


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
        self._clock = clock
        self._rng = rng
        self.identity = identity
        # The manager, where there is one, serves or has failed once.
        self.started = asyncio.Event()
        self._renew = asyncio.Event()
        self._renewing = asyncio.Lock()
        # A manager from the start that has not been let in before.
        self._new_manager = (
            identity.role == NodeRole.MANAGER and not (settings.state_dir / FOLDER).exists()
        )
        self.managing = Managing(
            settings,
            clock,
            rng,
            identity=lambda: self.identity,
            connect=self._connect,
            vault=vault,
            audit=audit,
            on_denied=self._renew.set,
        )
        self._role = Role(
            self.managing,
            state_dir=settings.state_dir,
            vault=vault,
            identity=lambda: self.identity,
            replace=self._replace,
            renew=self._renew,
            renewing=self._renewing,
            ask=lambda: functools.partial(ids.ask, self._known_elsewhere),
        )
        self._ingress = Proxy(
            relay_address=(_bind(identity.data_path_addr), settings.relay_port),
            listen_addresses=_published_at(identity.data_path_addr),
            clock=clock,
        )
        self._gpus = Gpus(
            clock=clock,
            inventory=settings.gpu_inventory,
            cache=settings.state_dir / "worker" / "gpus.json",
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
                pids=pids_of_host(),
            ),
            clock=clock,
            issuer=Issuer.of(identity.issuer),
        )
        self._gpus.on_change = self._tell_gpus
        self._tell_gpus()
        self._session = Session(
            self._worker,
            connect=self._connect,
            managers=identity.managers,
            rng=rng,
            on_cluster=self._learn,
            on_removed=self._removed,
            explain=self._explain,
            meter=Meter(
                self._worker.measurable,
                node_id=identity.node_id,
                clock=clock,
                folders=lambda: (*self._worker.folders().values(), settings.state_dir),
                gpus=self._gpus.loads,
            ),
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
                        gpus=self._gpus.hand_over,
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
                        gpus=self._gpus.hand_over,
                    )
                )
        return tuple(made)

    # -------------------------------------------------------------- life

    async def run(self) -> None:
        """Is a member until cancelled; tasks go on. Raises what keeps the node from being one; a
        manager that fails does not.
        """
        try:
            await self._ingress.start()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._role.run())
                group.create_task(self._gpus.run())
                looked = asyncio.Event()
                group.create_task(self._worker.run(looked.set))
                await looked.wait()
                settling = group.create_task(self._settle())
                if not self.others:
                    await settling  # nobody else could take the node up, or renew for it
                group.create_task(self._keep_certificate())
                group.create_task(self._look_for_etcd())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GPU_LOOK_S):
                        await self._gpus.looked.wait()
                self._talking = group.create_task(self._session.run())
        finally:
            await self._stop()

    def _tell_gpus(self) -> None:
        self._worker.use_gpus(self._gpus.gpus, self._gpus.problem, mps=self._gpus.mps)

    async def _look_for_etcd(self) -> None:
        """Somebody may install it so that the node can be promoted."""
        while not (found := await etcd_version()):
            await asyncio.sleep(ETCD_LOOK_S)
        self._worker.use_etcd(found)

    async def _settle(self) -> None:
        """Until the manager on this node serves or has failed, or there is none."""
        either = [
            asyncio.ensure_future(e.wait())
            for e in (self.managing.settled, self._role.worker_alone)
        ]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in either:
                waiting.cancel()
        self.started.set()

    async def _stop(self) -> None:
        await self._ingress.close()
        for runtime in self._runtimes:
            await runtime.close()

    async def leave(self) -> None:
        """Tells the managers, and stops and removes all of the node's tasks."""
        if self.identity.role != NodeRole.MANAGER or self.others:
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
            issue=self._issue,
            one_at_a_time=self._renewing,
        )

    async def _issue(self, request: IssueNodeCertificateRequest) -> IssueNodeCertificateResponse:
        """From the manager on this node if it can; see identity.renew."""
        part = self.managing.part
        if part is not None:
            try:
                return await part.issue_own(request)
            except (errors.Unavailable, errors.TimedOut):
                if not self.others:
                    raise
        return await ids.ask(self._known_elsewhere, request)

    @property
    def _known_elsewhere(self) -> ids.Identity:
        return structs.replace(self.identity, managers=self.others)

    async def _replace(self, identity: ids.Identity) -> None:
        """Raises Unavailable when the disk refuses; then all is as it was."""
        try:
            save(self._settings.state_dir, identity, self._vault)
        except OSError as error:
            raise errors.Unavailable(
                f"the node's identity cannot be written to {self._settings.state_dir}: "
                f"{error.strerror or error}; free space on its disk"
            ) from error
        before, self.identity = self.identity, identity
        self._worker.use_issuer(Issuer.of(identity.issuer))
        if self.managing.part is not None:
            self.managing.part.use_certificate(
                identity.key_pem, identity.certificate_pem, identity.root_ca_pem
            )
        if identity.role != before.role:
            log.info("role_changed", role=identity.role.name.lower())
            self._role.changed()
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

    async def step_down(self) -> None:
        """See agent.role."""
        await self._role.step_down(self.others)

    # -------------------------------------------------------------- what the daemon shows

    def manager(self) -> Part:
        """The manager that serves. Raises NotManager and Unavailable while it does not."""
        if self._role.demoted:
            raise errors.NotManager(
                "This node is not a swarm manager any more, and "
                f"{self._role.problem or 'is about to become a worker'}. Please run this command "
                "on a manager node."
            )
        return self.managing.manager()

    @property
    def others(self) -> tuple[str, ...]:
        """Where managers other than the one on this node are."""
        own = self.identity.advertise_addr if self.identity.role == NodeRole.MANAGER else ""
        return tuple(a for a in self.identity.managers if a != own)

    @property
    def coming_in(self) -> bool:
        """Whether it is a manager that the others have not let in yet."""
        return (
            self._new_manager
            and not self.managing.served
            and self.identity.role == NodeRole.MANAGER
        )

    @property
    def joined(self) -> bool:
        """Whether the node has been taken up since the start."""
        return self.managing.serving or (self.first_session.is_set() and not self.coming_in)

    @property
    def manager_problem(self) -> str:
        """Why the manager on this node does not serve; empty: it does, or there is none."""
        if self._role.problem:
            return f"the manager on this node was demoted, and {self._role.problem}"
        return self.managing.problem

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
        return (*self._worker.description().warnings, *self.managing.warnings)

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
