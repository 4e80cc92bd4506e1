"""The node's membership over the life of swarmd: none, locked, or one that runs.

Owns that a membership which fails is tried again, or told, and what the node says of it all. Being
a member is agent/membership.py, which looks after its manager itself; what people ask for is
agent/changes.py.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import structlog
from msgspec import structs

from agent import identity as ids
from agent import local
from agent.managing import FOLDER, PASSING, Part, leaves
from agent.membership import Membership
from agent.options import Settings
from swarm import __version__, errors
from swarm.audit import Trail
from swarm.clock import Clock
from swarm.ids import Rng
from swarm.v1 import GetNodeInfoResponse, NodeRole
from swarm.vault import FILE as VAULT_FILE
from swarm.vault import Vault

log = structlog.get_logger("swarmd")

# How long to wait before a membership that failed is tried again; doubles.
RETRY_S_MIN, RETRY_S_MAX = 1.0, 30.0
SERVE_WAIT_S = 45.0  # for the manager of a cluster that was just made, forced, restored, unlocked
LOOK_S = 0.05


class Tenure:
    """See the module. The state folder is this process's alone."""

    def __init__(self, settings: Settings, clock: Clock, rng: Rng, *, audit: Trail) -> None:
        """Raises Invalid for a damaged key at rest."""
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._audit = audit
        self.vault = Vault(settings.state_dir / VAULT_FILE)
        self.member: Membership | None = None
        # A manager whose keys need the unlock key: who it is, while nothing of it runs.
        self.locked: ids.Identity | None = None
        self.error = ""  # why the node is no member at all
        self._running: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Takes up the membership that the state folder tells of, if there is one."""
        identity = ids.load(self._settings.state_dir, self.vault)
        log.info("swarmd_started", node=identity and identity.node_id)
        if identity is not None and identity.locked:
            self.locked = identity
            log.warning("swarmd_locked", what_to_do="run `swarmctl swarm unlock`")
        elif identity is not None:
            await self.enter(identity)

    def manager(self) -> Part:
        """The manager on this node. Raises NotManager with what to do."""
        if self.error:
            raise errors.Unavailable(self.error)
        if self.locked is not None:
            raise errors.Unavailable(local.LOCKED)
        if self.member is None:
            raise errors.NotManager(local.NOT_IN_SWARM)
        if self.member.identity.role != NodeRole.MANAGER:
            raise errors.NotManager(local.IS_WORKER)
        return self.member.manager()

    async def enter(self, identity: ids.Identity) -> None:
        """Begins to be a member; returns once the manager, if any, serves or has failed. It goes on
        when the caller is cancelled.
        """
        self.error = ""
        self._audit.node_id = identity.node_id
        begun = asyncio.Event()
        self._running = asyncio.create_task(self._be(self._make_member(identity), begun))
        await begun.wait()

    async def serve(self, identity: ids.Identity) -> str:
        """Begins to be a member as `enter` does, and waits until its manager serves; why it does
        not, or empty.
        """
        try:
            async with asyncio.timeout(SERVE_WAIT_S):
                await self.enter(identity)
                while self.member is not None and self.member.managing.waiting:
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            why = self.failure or "swarmd's log may say why"
            return f"the manager does not serve within {SERVE_WAIT_S:g} s: {why}"
        return self.failure

    def _make_member(self, identity: ids.Identity) -> Membership:
        self.member = Membership(
            self._settings,
            identity,
            self._clock,
            self._rng,
            audit=self._audit,
            vault=self.vault,
        )
        return self.member

    async def _be(self, member: Membership, begun: asyncio.Event) -> None:
        """Is a member until cancelled. What may pass by itself, such as a full disk or a port that
        is taken, is tried again; what cannot waits, and is told, until swarmd is restarted.
        """
        try:
            await self._keep_being(member, begun)
        finally:
            begun.set()

    async def _keep_being(self, member: Membership, begun: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        delay_s = RETRY_S_MIN
        while True:
            begun_s = loop.time()
            noting = asyncio.create_task(self._note_start(member, begun))
            passes = True
            try:
                await member.run()
            except* errors.SwarmError as group:
                self.error = "; ".join(str(e) for e in leaves(group))
                passes = all(isinstance(e, PASSING) for e in leaves(group))
                log.error("membership_failed", reason=self.error)
            except* Exception as group:
                self.error = f"internal error: {next(leaves(group))!r}; swarmd's log has more"
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
        self.error = ""
        begun.set()

    async def exit(self) -> None:
        """Stops being a member for now; tasks go on."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._running = self.member = None

    @property
    def failure(self) -> str:
        """Why the node is not what its identity says: no member, or no manager; empty: it is."""
        manager = self.member.manager_problem if self.member is not None else ""
        return "; ".join(filter(None, (self.error, manager)))

    def info(self) -> GetNodeInfoResponse:
        member, locked = self.member, self.locked
        who = member.identity if member is not None else locked
        if who is None:
            return GetNodeInfoResponse(
                state="inactive", hostname=self._settings.hostname, version=__version__
            )
        out = GetNodeInfoResponse(
            node_id=who.node_id,
            cluster_id=who.cluster_id,
            role=who.role,
            node_addr=who.data_path_addr,
            managers=who.managers,
            hostname=self._settings.hostname,
            version=__version__,
        )
        if member is None:
            return structs.replace(out, state="locked", error=local.LOCKED)
        return structs.replace(
            out,
            state=self._state(member),
            error=self.failure or ("" if member.connected else member.problem),
            control_available=not self.error and member.managing.serving,
            runtimes=member.runtimes,
            warnings=(*member.warnings, *filter(None, (self._audit.problem,))),
            connected=member.connected,
            tasks=member.tasks,
        )

    def _state(self, member: Membership) -> str:
        """A manager that others have still to let in is pending, whatever keeps them from it, as
        long as that may pass.
        """
        if self.error or member.managing.lasting or (self.failure and not member.coming_in):
            return "error"
        return "active" if member.joined else "pending"

    async def empty(self, identity: ids.Identity, *, force: bool) -> None:
        """Ends the tasks of a membership that has failed. What keeps them from ending is an error
        unless `force`.
        """
        await self.exit()
        try:
            await self._make_member(identity).empty()
        except* errors.SwarmError as group:
            reason = "; ".join(str(e) for e in leaves(group))
            log.warning("tasks_left_behind", reason=reason)
            if not force:
                raise errors.Unavailable(
                    f"the node's tasks cannot be ended: {reason}; put that right, or leave with "
                    "--force, which may leave tasks running"
                ) from None

    def new_vault(self) -> None:
        """An earlier membership's key would not be this one's, and might be locked."""
        if self.vault.exists:
            set_aside(self.vault.path)
            self.vault = Vault(self.vault.path)

    async def forget(self) -> None:
        await self.exit()
        ids.forget(self._settings.state_dir)
        self.vault.forget()
        self.locked = None
        for name in (FOLDER, "worker"):
            shutil.rmtree(self._settings.state_dir / name, ignore_errors=True)
        self.error = ""


def set_aside(path: Path) -> Path | None:
    """Renames what an earlier membership left behind; state is never deleted on a guess."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    log.warning("old_state_set_aside", path=str(aside))
    return aside
