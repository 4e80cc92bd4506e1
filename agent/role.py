"""What follows from the node's role while it is a member: a manager beside the worker, or none.

A worker that is to be a manager hears so in its session and gets a manager's certificate; with that
a manager is started here. A manager that is none any more hears so from its own manager, which ends
(Demoted), or from another one; it gets a worker's certificate from another manager. Only once that
is on the disk do the manager's state and the node's key at rest go: what is in there is the
cluster's, and lives on elsewhere. Worker, session and published ports notice nothing of all this.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from msgspec import structs

from agent import identity as ids
from agent.managing import FOLDER, Demoted, Managing
from swarm import errors
from swarm.v1 import GetRequest, Kind, NodeRole, Spec, UpdateRequest
from swarm.v1.services import ControlClient
from swarm.vault import Vault

log = structlog.get_logger("membership")

# While others take this node's manager out, they still answer that it is one.
DEMOTION_S = 10.0
RETRY_S_MIN, RETRY_S_MAX = 0.2, 10.0
LOOK_S = 2.0  # how often a node that steps down asks what it is
ASK_S = 10.0  # for another manager's answer


class Role:
    """See the module. `run` while the node is a member."""

    def __init__(
        self,
        managing: Managing,
        *,
        state_dir: Path,
        vault: Vault,
        identity: Callable[[], ids.Identity],
        replace: Callable[[ids.Identity], Awaitable[None]],
        renew: asyncio.Event,
        renewing: asyncio.Lock,
        ask: Callable[[], ids.Issue],
    ) -> None:
        """`replace` makes another identity the node's, on the disk first, and calls `changed`;
        `renew` asks for a renewal, which holds `renewing`; `ask` is how other managers are asked
        for a certificate.
        """
        self._managing = managing
        self._state_dir = state_dir
        self._vault = vault
        self._identity = identity
        self._replace = replace
        self._renew = renew
        self._renewing = renewing
        self._ask = ask
        self._changed = asyncio.Event()
        # There is no manager here, nor anything of one.
        self.worker_alone = asyncio.Event()
        # The manager here was demoted, and others have not said yet what the node is.
        self.demoted = False
        self.problem = ""  # why they have not

    def changed(self) -> None:
        """The role is another one."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._changed.clear()
            if self._is_manager:
                self.worker_alone.clear()
                if await self._manage():
                    self.demoted = True
                    await self._hear()
                    self.demoted, self.problem = False, ""
            else:
                await self._drop()
                self.worker_alone.set()
                await self._changed.wait()

    @property
    def _is_manager(self) -> bool:
        return self._identity().role == NodeRole.MANAGER

    async def _manage(self) -> bool:
        """Runs the manager. True: the cluster does not have it as one; False: the role is another
        one.
        """
        running = asyncio.create_task(self._managing.run())
        changed = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait({running, changed}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                return False
            error = running.exception()
            if error is not None and not isinstance(error, Demoted):
                raise error
            return True
        finally:
            await _end(running, changed)

    async def _hear(self) -> None:
        """Until other managers have said what this node is: a worker; or, when it was promoted
        again in the meantime, a manager, which then comes in anew.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + DEMOTION_S
        delay_s = RETRY_S_MIN
        while self._is_manager:
            try:
                async with self._renewing:
                    renewed = await ids.renew(self._identity(), issue=self._ask())
                    again = renewed.role == NodeRole.MANAGER
                    if not again or loop.time() > until_s:
                        await self._replace(renewed)
                        if again:
                            await self._remove_state()
                        return
                reason = "the other managers still count it among them"
            except errors.Removed as error:
                self.problem = error.message
                log.error("removed_from_cluster", reason=error.message)
                await loop.create_future()
            except errors.SwarmError as error:
                reason = error.message
            self.problem = f"it waits for the others to say what it is: {reason}"
            log.warning("role_not_known_yet", reason=reason, retry_s=delay_s)
            await _wait(self._changed, delay_s)
            delay_s = min(RETRY_S_MAX, delay_s * 2)

    async def _drop(self) -> None:
        """Also what a swarmd that was killed in between has left."""
        try:
            self._vault.forget()
        except OSError as error:
            log.warning("node_key_not_removed", reason=str(error))
        await self._remove_state()

    async def _remove_state(self) -> None:
        folder = self._state_dir / FOLDER
        if folder.exists():
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            log.info("manager_state_removed", path=str(folder))

    # -------------------------------------------------------------- stepping down

    async def step_down(self, others: tuple[str, ...]) -> None:
        """Becomes a worker, if the other managers can do without this one. `others`: where they
        are. Raises Conflict and Unavailable when it cannot be.
        """
        part = self._managing.part if self._managing.serving else None
        asking = asyncio.create_task(
            part.step_down() if part is not None else be_demoted(self._identity(), others)
        )
        turned = asyncio.create_task(self.worker_alone.wait())
        try:
            await asyncio.wait({asking, turned}, return_when=asyncio.FIRST_COMPLETED)
            # On its way out the manager may end before it can answer.
            ended = part is not None and self._managing.part is not part
            if not turned.done() and not ended and (error := asking.exception()) is not None:
                raise error
            while not turned.done():
                self._renew.set()
                await asyncio.wait({turned}, timeout=LOOK_S)
        finally:
            await _end(asking, turned)


async def be_demoted(identity: ids.Identity, managers: tuple[str, ...]) -> None:
    """Has one of the managers enter this node as a worker. Raises Conflict, Invalid (there is no
    other), Unavailable.
    """
    problems = []
    for address in managers:
        try:
            async with identity.channel(address) as channel:
                await _demote(ControlClient(channel), identity.node_id)
                return
        except errors.Removed:
            raise
        except errors.Denied:
            return  # it is none any more, and its next certificate says so
        except (errors.Unavailable, errors.TimedOut) as error:
            problems.append(error.message)
    raise errors.Unavailable("; ".join(problems) or "no other manager is known")


async def _demote(control: ControlClient, node_id: str) -> None:
    found = (await control.get(GetRequest(kind=Kind.NODE, ref=node_id), timeout_s=ASK_S)).object
    node = found.node if found is not None else None
    if node is None or node.spec is None or node.meta is None:
        raise errors.Internal(f"the manager's answer holds no node {node_id}")
    spec = structs.replace(node.spec, role=NodeRole.WORKER)
    await control.update(
        UpdateRequest(kind=Kind.NODE, id=node.id, version=node.meta.version, spec=Spec(node=spec)),
        timeout_s=ASK_S,
    )


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, or the time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return


async def _end(*tasks: asyncio.Task[None] | asyncio.Task[bool]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
