"""swarmd: the daemon of one node.

Owns the process: arguments, the lock on the state folder, the unix socket, signals, and whether the
node is in a cluster. Being a member (manager, session, worker) is agent/membership.py. When swarmd
ends, tasks go on; the next one adopts them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import grp
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import structlog
import uvloop

from agent import identity as ids
from agent import local, metrics, restoring
from agent.membership import (
    Membership,
    Settings,
    found,
    restoration,
    restored_identity,
    save,
)
from swarm import __version__, errors, logs, rpc
from swarm.audit import Copy, Trail, copy_to
from swarm.clock import Clock, SystemClock
from swarm.finishing import to_the_end
from swarm.ids import Rng, system_rng
from swarm.v1 import (
    GetNodeInfoResponse,
    InitRequest,
    InitResponse,
    JoinRequest,
    JoinResponse,
    NodeRole,
    RestoreRequest,
    RestoreResponse,
)
from swarm.v1.services import CERTIFICATES_METHODS, CONTROL_METHODS, LOCAL_METHODS
from swarm.vault import FILE as VAULT_FILE
from swarm.vault import Vault

log = structlog.get_logger("swarmd")

JOIN_WAIT_S = 20.0  # Docker's: then the join goes on in the background
STOP_GRACE_S = 5.0
LOCK_WAIT_S, LOCK_RETRY_S = 3.0, 0.05
# How long to wait before a membership that failed is tried again; doubles.
RETRY_S_MIN, RETRY_S_MAX = 1.0, 30.0
_PASSING = (errors.Unavailable, errors.TimedOut, errors.Exhausted)
RELAY_PORT = 7946  # Swarm's port for traffic between nodes
SOCKET_PATH_MAX = 107  # bytes in sockaddr_un, less the final zero


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    state_dir: Path
    socket: Path
    settings: Settings
    metrics_addr: str
    audit_copies: tuple[Copy, ...] = ()


def default_paths() -> tuple[Path, Path]:
    """State folder and socket: the system's for root, the user's own otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/swarm"), Path("/run/swarm/swarmd.sock")
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "swarm"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return home, (Path(runtime) / "swarm" if runtime else home) / "swarmd.sock"


def parse(argv: Sequence[str]) -> tuple[Options, argparse.Namespace]:
    """Reads the command line; exits with a message and status 2 when it is wrong."""
    state_dir, socket_path = default_paths()
    parser = argparse.ArgumentParser(
        prog="swarmd",
        description="The daemon of one node. `swarmctl swarm init` makes a cluster, "
        "`swarm join` joins one.",
    )
    add = parser.add_argument
    add("--version", action="version", version=f"swarmd {__version__}")
    add("--state-dir", type=Path, default=state_dir, metavar="DIR", help="default: %(default)s")
    add("--socket", type=Path, metavar="PATH", help=f"unix socket (default: {socket_path})")
    add("--socket-group", metavar="GROUP", help="group that may use the socket beside its owner")
    add(
        "--docker-socket",
        default="/var/run/docker.sock",
        metavar="PATH",
        help="Docker's or Podman's socket, or `none` (default: %(default)s)",
    )
    add(
        "--runtimes",
        default="docker,process",
        metavar="LIST",
        help="what may run tasks here, first is the default (default: %(default)s)",
    )
    add("--hostname", default=socket.gethostname(), help="the node's name (default: %(default)s)")
    add(
        "--relay-port",
        type=int,
        default=RELAY_PORT,
        metavar="PORT",
        help="where other nodes reach tasks here (default: %(default)s)",
    )
    add(
        "--label",
        action="append",
        default=[],
        metavar="K=V",
        help="engine label for constraints; repeatable",
    )
    add("--metrics-addr", default="", metavar="HOST:PORT", help="serve Prometheus metrics here")
    add(
        "--audit-log",
        action="append",
        default=[],
        metavar="PATH|syslog:",
        help="write the audit trail here too, beside the state folder's audit/; repeatable",
    )
    add("--log-level", choices=logs.LEVELS, default="info", help="default: %(default)s")
    add("--log-format", choices=logs.FORMATS, default="auto", help="default: %(default)s")
    given = parser.parse_args(argv)
    labels = {}
    for label in given.label:
        key, equals, value = label.partition("=")
        if not key or not equals:
            parser.error(f"--label {label!r} is not of the form key=value")
        labels[key] = value
    runtimes = tuple(r.strip() for r in given.runtimes.split(",") if r.strip())
    if not runtimes or set(runtimes) - {"docker", "process"}:
        parser.error(f"--runtimes {given.runtimes!r}: name docker, process or both")
    if not 0 < given.relay_port < 65536:
        parser.error(f"--relay-port {given.relay_port}: a port is from 1 to 65535")
    state = given.state_dir.absolute()
    at = (given.socket or (socket_path if state == state_dir else state / "swarmd.sock")).absolute()
    if len(os.fsencode(at)) > SOCKET_PATH_MAX:
        parser.error(
            f"--socket {at}: longer than the {SOCKET_PATH_MAX} bytes a socket's path may have"
        )
    settings = Settings(
        state_dir=state,
        hostname=given.hostname,
        docker_socket="" if given.docker_socket == "none" else given.docker_socket,
        runtimes=runtimes,
        relay_port=given.relay_port,
        engine_labels=labels,
    )
    try:
        copies = tuple(copy_to(text) for text in given.audit_log)
    except errors.Invalid as error:
        parser.error(error.message)
    return Options(state, at, settings, given.metrics_addr, copies), given


class Swarmd:
    """The daemon; implements agent.local.Daemon."""

    def __init__(self, options: Options, clock: Clock, rng: Rng, *, group: int | None) -> None:
        self._options = options
        self._clock = clock
        self._rng = rng
        self._socket_group = group
        self._member: Membership | None = None
        # A manager whose keys need the unlock key: who it is, while nothing of it runs.
        self._locked: ids.Identity | None = None
        self._vault: Vault  # once the state folder is ours
        self._running: asyncio.Task[None] | None = None
        self._error = ""  # why the node is not what its identity says
        self._changing = asyncio.Lock()
        self._stop = asyncio.Event()
        self._audit = Trail(options.state_dir / "audit", clock, rng, copies=options.audit_copies)

    # -------------------------------------------------------------- life

    async def run(self) -> None:
        """Serves until asked to stop."""
        options = self._options
        options.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with _locked(options.state_dir):
            self._vault = Vault(options.state_dir / VAULT_FILE)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            served = await metrics.serve(options.metrics_addr) if options.metrics_addr else None
            metrics.BUILD.info({"version": __version__})
            lag = asyncio.create_task(metrics.watch_lag())
            auditing = asyncio.create_task(self._audit.run())
            server = await self._serve()
            try:
                identity = ids.load(options.state_dir, self._vault)
                log.info(
                    "swarmd_started", socket=str(options.socket), node=identity and identity.node_id
                )
                if identity is not None and identity.locked:
                    self._locked = identity
                    log.warning("swarmd_locked", what_to_do="run `swarmctl swarm unlock`")
                elif identity is not None:
                    await self._enter(identity)
                await self._stop.wait()
                log.info("swarmd_stopping")
            finally:
                lag.cancel()
                await server.stop(STOP_GRACE_S)
                await self._exit()
                auditing.cancel()
                await asyncio.gather(auditing, return_exceptions=True)
                options.socket.unlink(missing_ok=True)
                if served is not None:
                    await served.cleanup()

    async def _serve(self) -> Any:
        path = self._options.socket
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # ours: the state folder is locked
        server = rpc.server()
        server.add_generic_rpc_handlers(
            (
                rpc.handler(LOCAL_METHODS, local.LocalService(self), local.authorize, self._audit),
                rpc.handler(
                    CONTROL_METHODS,
                    local.gate(CONTROL_METHODS, lambda: self._manager().control),
                    local.authorize,
                    self._audit,
                ),
                rpc.handler(
                    CERTIFICATES_METHODS,
                    local.gate(CERTIFICATES_METHODS, lambda: self._manager().authority),
                    local.authorize,
                    self._audit,
                ),
            )
        )
        before = os.umask(0o117)  # the socket is born 0660
        try:
            try:
                server.add_insecure_port(f"unix:{path}")
            except RuntimeError as error:
                raise errors.Unavailable(f"cannot listen on {path}: {error}") from None
            await server.start()
        finally:
            os.umask(before)
        if self._socket_group is not None:
            os.chown(path, -1, self._socket_group)
        return server

    def _manager(self) -> Any:
        """The manager on this node. Raises NotManager with what to do."""
        if self._error:
            raise errors.Unavailable(self._error)
        if self._locked is not None:
            raise errors.Unavailable(local.LOCKED)
        if self._member is None:
            raise errors.NotManager(local.NOT_IN_SWARM)
        if self._member.identity.role != NodeRole.MANAGER:
            raise errors.NotManager(local.IS_WORKER)
        return self._member.manager()

    # -------------------------------------------------------------- membership

    async def _enter(self, identity: ids.Identity) -> None:
        """Begins to be a member; returns once the manager, if any, serves or has failed."""
        self._error = ""
        self._audit.node_id = identity.node_id
        begun = asyncio.Event()
        self._running = asyncio.create_task(self._be(self._make_member(identity), begun))
        await begun.wait()

    def _make_member(self, identity: ids.Identity) -> Membership:
        self._member = Membership(
            self._options.settings,
            identity,
            self._clock,
            self._rng,
            audit=self._audit,
            vault=self._vault,
        )
        return self._member

    async def _be(self, member: Membership, begun: asyncio.Event) -> None:
        """Is a member until cancelled. What may pass by itself, such as a full disk or a port that
        is taken, is tried again; what cannot waits, and is told, until swarmd is restarted.
        """
        loop = asyncio.get_running_loop()
        delay_s = RETRY_S_MIN
        while True:
            begun_s = loop.time()
            noting = asyncio.create_task(self._note_start(member, begun))
            passes = True
            try:
                await member.run()
            except* errors.SwarmError as group:
                self._error = "; ".join(str(e) for e in _leaves(group))
                passes = all(isinstance(e, _PASSING) for e in _leaves(group))
                log.error("membership_failed", reason=self._error)
            except* Exception as group:
                self._error = f"internal error: {_leaves(group)[0]!r}; swarmd's log has more"
                log.exception("membership_failed")
            finally:
                noting.cancel()
            begun.set()
            if not passes:
                return
            if loop.time() - begun_s > RETRY_S_MAX:
                delay_s = RETRY_S_MIN
            await asyncio.sleep(delay_s)
            delay_s = min(RETRY_S_MAX, delay_s * 2)
            log.info("membership_tried_again", node_id=member.identity.node_id)
            member = self._make_member(member.identity)

    async def _note_start(self, member: Membership, begun: asyncio.Event) -> None:
        await member.started.wait()
        self._error = ""
        begun.set()

    async def _exit(self) -> None:
        """Stops being a member for now; tasks go on."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._running = self._member = None

    def info(self) -> GetNodeInfoResponse:
        member = self._member
        if member is None and self._locked is not None:
            locked = self._locked
            return GetNodeInfoResponse(
                node_id=locked.node_id,
                cluster_id=locked.cluster_id,
                state="locked",
                error=local.LOCKED,
                role=locked.role,
                node_addr=locked.data_path_addr,
                managers=locked.managers,
                hostname=self._options.settings.hostname,
                version=__version__,
            )
        if member is None:
            return GetNodeInfoResponse(
                state="inactive", hostname=self._options.settings.hostname, version=__version__
            )
        identity = member.identity
        state = "error" if self._error else "active" if member.joined else "pending"
        return GetNodeInfoResponse(
            node_id=identity.node_id,
            cluster_id=identity.cluster_id,
            state=state,
            error=self._error or ("" if member.connected else member.problem),
            role=identity.role,
            control_available=identity.role == NodeRole.MANAGER and not self._error,
            node_addr=identity.data_path_addr,
            managers=identity.managers,
            hostname=self._options.settings.hostname,
            version=__version__,
            runtimes=member.runtimes,
            warnings=(*member.warnings, *filter(None, (self._audit.problem,))),
            connected=member.connected,
            tasks=member.tasks,
        )

    async def init(self, request: InitRequest) -> InitResponse:
        """Makes a cluster; when the manager cannot start, nothing stays behind."""
        async with self._changing:
            self._check_free()
            _set_aside(self._options.state_dir / "manager")
            self._new_vault()
            listen = local.listen_address(request.listen_addr)
            identity = await found(
                self._options.settings,
                request,
                listen_addr=listen,
                advertise_addr=local.advertise_address(
                    request.advertise_addr,
                    listen,
                    # pyroute2 runs an event loop of its own.
                    await asyncio.to_thread(machine_addresses),
                ),
                clock=self._clock,
                rng=self._rng,
                vault=self._vault,
            )
            save(self._options.state_dir, identity, self._vault)
            await self._enter(identity)
            if self._error:
                reason = self._error
                await self._forget()
                raise errors.Unavailable(reason)
            authority = self._manager().authority
            log.info("cluster_made", cluster_id=identity.cluster_id, node_id=identity.node_id)
            return InitResponse(
                node_id=identity.node_id,
                cluster_id=identity.cluster_id,
                worker_token=authority.worker(),
                manager_token=authority.manager(),
                addr=identity.advertise_addr,
            )

    async def join(self, request: JoinRequest) -> JoinResponse:
        """Joins a cluster and waits until the manager has taken the node."""
        async with self._changing:
            self._check_free()
            self._new_vault()
            listen = local.listen_address(request.listen_addr)
            if request.advertise_addr:
                advertise = local.advertise_address(request.advertise_addr, listen, ())
            else:
                if not request.remote_addrs:
                    raise errors.Invalid("name a manager to join, as HOST:2377")
                near = local.address_towards(request.remote_addrs[0])
                advertise = local.advertise_address(near, listen, ())
            identity = await ids.join(
                token=request.token,
                addresses=request.remote_addrs,
                hostname=self._options.settings.hostname,
                availability=request.availability,
                listen_addr=listen,
                advertise_addr=advertise,
                data_path_addr=request.data_path_addr or local.host_of(advertise),
            )
            save(self._options.state_dir, identity, self._vault)
            await self._enter(identity)
            assert self._member is not None
            try:
                async with asyncio.timeout(JOIN_WAIT_S):
                    await self._member.first_session.wait()
            except TimeoutError:
                raise errors.TimedOut(
                    f"the manager did not take the node within {JOIN_WAIT_S:g} s "
                    f"({self._error or self._member.problem or 'no answer'}); swarmd goes on "
                    "trying, see `swarmctl info`"
                ) from None
            return JoinResponse(node_id=identity.node_id, role=identity.role)

    async def restore(
        self, requests: AsyncIterator[RestoreRequest]
    ) -> AsyncGenerator[RestoreResponse, None]:
        """Becomes a cluster's manager again, from its backup; until the last message all is as it
        was.
        """
        # Before anything is refused: what is said to a client that is still sending is lost.
        start = await restoring.first(requests)
        async with self._changing:
            if self._locked is not None:
                raise errors.Unavailable(local.LOCKED_RESTORE)
            member = self._member
            before = restoring.replaceable(member.identity if member else None, self._error)
            place = restoring.Place(start, before, await asyncio.to_thread(machine_addresses))
            work = restoration(self._options.settings, self._clock)
            try:
                await work.begin()
                yield RestoreResponse()
                while not (request := await restoring.following(requests)).finish:
                    await work.feed(request.data)
                    yield RestoreResponse(bytes=work.taken)
                restored = await work.finish(place.choose)
                identity = restored_identity(
                    restored,
                    listen_addr=place.listen_addr,
                    advertise_addr=place.advertise_addr,
                    data_path_addr=place.data_path_addr,
                )
                # A caller that leaves now is too late to turn back.
                await to_the_end(self._take_over(work.install, identity, before))
            finally:
                await work.discard()
            log.info(
                "cluster_restored",
                cluster_id=restored.cluster_id,
                node_id=restored.node_id,
                backup_revision=restored.header.revision,
                revision=restored.revision,
            )
            yield RestoreResponse(
                bytes=work.taken,
                node_id=restored.node_id,
                cluster_id=restored.cluster_id,
                revision=restored.revision,
                backup_revision=restored.header.revision,
                addr=identity.advertise_addr,
                warnings=restored.warnings,
            )

    async def _take_over(
        self,
        install: Callable[[Vault], Awaitable[None]],
        identity: ids.Identity,
        before: ids.Identity | None,
    ) -> None:
        """Begins to be the manager of what was restored; when that cannot be, all is as before."""
        await self._exit()
        state_dir = self._options.state_dir
        folder = state_dir / "manager"
        aside = _set_aside(folder)
        try:
            if before is None:
                self._new_vault()
            await install(self._vault)
            save(state_dir, identity, self._vault)
            await self._enter(identity)
        except (OSError, errors.SwarmError) as error:
            self._error = str(error)
        if not self._error:
            return
        reason = self._error
        await self._exit()
        shutil.rmtree(folder, ignore_errors=True)
        if aside is not None:
            aside.rename(folder)
        self._error = ""
        if before is None:
            ids.forget(state_dir)
            self._vault.forget()
        else:
            save(state_dir, before, self._vault)
            await self._enter(before)
        raise errors.Unavailable(
            f"the restored manager cannot start: {reason}; nothing was changed"
        )

    async def leave(self, *, force: bool) -> None:
        """Leaves the cluster: stops and removes the node's tasks, and forgets all of it."""
        async with self._changing:
            member = self._member
            if self._locked is not None:
                if not force:
                    raise errors.Unavailable(local.LOCKED_LEAVE)
                await self._empty(self._locked, force=True)
                await self._forget()
                return
            if member is None:
                raise errors.Conflict("This node is not part of a swarm")
            if member.identity.role == NodeRole.MANAGER and not force:
                raise errors.Conflict(
                    "You are attempting to leave the swarm on a node that is participating as a "
                    "manager. Removing the last manager erases all current state of the swarm. Use "
                    "`--force` to ignore this message."
                )
            if self._error:
                await self._empty(member.identity, force=force)
            else:
                await member.leave()
            await self._forget()
            log.info("left_cluster", node_id=member.identity.node_id)

    async def unlock(self, unlock_key: str) -> None:
        """Opens the keys at rest and becomes a member. Raises Denied for another key."""
        async with self._changing:
            if self._locked is None:
                raise errors.Conflict(
                    "swarm is not locked" if self._member else "This node is not part of a swarm"
                )
            self._vault.unlock(unlock_key)
            identity = ids.load(self._options.state_dir, self._vault)
            assert identity is not None
            self._locked = None
            log.info("swarmd_unlocked", node_id=identity.node_id)
            await self._enter(identity)

    async def _empty(self, identity: ids.Identity, *, force: bool) -> None:
        """Ends the tasks of a membership that has failed. What keeps them from ending is an error
        unless `force`.
        """
        await self._exit()
        try:
            await self._make_member(identity).empty()
        except* errors.SwarmError as group:
            reason = "; ".join(str(e) for e in _leaves(group))
            log.warning("tasks_left_behind", reason=reason)
            if not force:
                raise errors.Unavailable(
                    f"the node's tasks cannot be ended: {reason}; put that right, or leave with "
                    "--force, which may leave tasks running"
                ) from None

    def _check_free(self) -> None:
        if self._member is not None or self._locked is not None:
            raise errors.Conflict(local.ALREADY)

    def _new_vault(self) -> None:
        """An earlier membership's key would not be this one's, and might be locked."""
        if self._vault.exists:
            _set_aside(self._vault.path)
            self._vault = Vault(self._vault.path)

    async def _forget(self) -> None:
        await self._exit()
        ids.forget(self._options.state_dir)
        self._vault.forget()
        self._locked = None
        for name in ("manager", "worker"):
            shutil.rmtree(self._options.state_dir / name, ignore_errors=True)
        self._error = ""


def machine_addresses() -> tuple[str, ...]:
    """The machine's IPv4 addresses, in order of interface."""
    from pyroute2 import IPRoute  # 60 ms, needed by init only

    with IPRoute() as route:
        return tuple(
            value
            for message in route.get_addr(family=socket.AF_INET)
            for key, value in message["attrs"]
            if key == "IFA_LOCAL"
        )


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [
        leaf
        for e in group.exceptions
        for leaf in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])
    ]


def _set_aside(path: Path) -> Path | None:
    """Renames what an earlier membership left behind; state is never deleted on a guess."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    log.warning("old_state_set_aside", path=str(aside))
    return aside


@contextlib.asynccontextmanager
async def _locked(state_dir: Path) -> AsyncIterator[None]:
    """Holds the state folder for this process. Raises Conflict when another swarmd has it.

    A killed swarmd holds it until the last of its threads is gone, so it is worth a short wait.
    """
    deadline_s = asyncio.get_running_loop().time() + LOCK_WAIT_S
    file: IO[str] = (state_dir / "lock").open("a+")
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if asyncio.get_running_loop().time() < deadline_s:
                    await asyncio.sleep(LOCK_RETRY_S)
                    continue
                file.seek(0)
                raise errors.Conflict(
                    f"another swarmd (pid {file.read().strip() or 'unknown'}) uses {state_dir}; "
                    "stop it, or give this one a folder of its own with --state-dir"
                ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def main(argv: Sequence[str] | None = None) -> None:
    """The command `swarmd`."""
    options, given = parse(sys.argv[1:] if argv is None else argv)
    logs.configure(level=given.log_level, form=given.log_format)
    try:
        group = grp.getgrnam(given.socket_group).gr_gid if given.socket_group else None
        uvloop.run(Swarmd(options, SystemClock(), system_rng(), group=group).run())
    except errors.SwarmError as error:
        sys.stderr.write(f"swarmd: {error.message}\n")
        sys.exit(errors.mapping(error).exit_code)
    except (OSError, KeyError) as error:
        sys.stderr.write(f"swarmd: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
