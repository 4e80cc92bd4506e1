"""Which managers are there, and whether this one is in touch with the log.

Each manager keeps a key `m/<node_id>` on a lease: it shows for as long as its manager reaches the
log, goes at once with one that ends in order, and within the lease with one that dies. Everybody
follows these keys through the same watch as the rows.

A renewed lease does not prove that this manager's knowledge is fresh: etcd's leader answers a
renewal by its own clock, for up to an election timeout after it has lost the others, and the watch
may hang where single calls get through. So touch is what a barrier is, asked for all the time: the
log has come to a revision that a quorum named after the question. Then what this manager knows was
all of the log when the question was asked.

Called by the etcd engine alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import structlog
from etcd3aio import _protobuf as pb

from manager.store.engine import TOUCH_S
from manager.store.engines.etcd_client import ANSWER_S, EtcdClient
from manager.store.engines.etcd_requests import Keys
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("store.etcd")

LEASE_S: Final = 3
RENEW_EVERY_S: Final = 0.75
PROBE_EVERY_S: Final = 0.5
# One question's time: short enough that two of them fit into TOUCH_S beside an election that
# swallows the first.
PROBE_S: Final = 0.75
RETRY_S_MIN: Final = 0.1
RETRY_S_MAX: Final = 0.5

CatchUp = Callable[[bool], Awaitable[None]]
"""Until the log has come to where it was at the call. True: asks with a write, which etcd answers
where it leaves a read waiting.
"""


class Presence:
    """Who is announced as far as the log has shown, and this manager's own announcement."""

    def __init__(self, client: EtcdClient, keys: Keys, clock: Clock, catch_up: CatchUp) -> None:
        self._client = client
        self._keys = keys
        self._clock = clock
        self._catch_up = catch_up
        self.present: frozenset[str] = frozenset()
        self._changed = asyncio.Event()
        self._seen = 0  # the revision that `present` is of
        self._touched_s: float | None = None  # monotonic; None: never announced
        self._lease = 0
        self._own = b""  # the key
        self._placed = 0  # the revision at which it was put
        self._taken_away = asyncio.Event()
        self._announcing = 0
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()

    # -------------------------------------------------------------- what the log shows

    def note(self, key: bytes, *, there: bool, revision: int) -> None:
        """The log has come to a change of a manager's key."""
        if revision <= self._seen:
            return
        self._seen = revision
        node_id = frozenset((self._keys.manager_of(key),))
        self._show(self.present | node_id if there else self.present - node_id)

    def look(self, keys: Iterable[bytes], revision: int) -> None:
        """All managers' keys, as they were read at a revision."""
        if revision < self._seen:
            return
        self._seen = revision
        self._show(frozenset(self._keys.manager_of(key) for key in keys))

    def _show(self, present: frozenset[str]) -> None:
        own = self._keys.manager_of(self._own)
        if own and self._seen > self._placed > 0 and own not in present:
            self._taken_away.set()
        if present == self.present:
            return
        log.info("managers_present", nodes=sorted(present))
        self.present = present
        self._changed.set()
        self._changed = asyncio.Event()

    async def present_changed(self, known: frozenset[str]) -> frozenset[str]:
        """See Engine."""
        while self.present == known:
            await self._changed.wait()
        return self.present

    # -------------------------------------------------------------- this manager

    @property
    def in_touch(self) -> bool:
        """See Engine."""
        return self._touched_s is None or self._clock.monotonic_s() - self._touched_s <= TOUCH_S

    async def announce(self, node_id: str) -> None:
        """See Engine. Raises Unavailable once the engine is closed."""
        if self._touched_s is None:
            self._touched_s = self._clock.monotonic_s()  # the state was loaded just now
        self._own = self._keys.manager(node_id)
        self._announcing += 1
        try:
            async with asyncio.TaskGroup() as group:
                work = [group.create_task(w) for w in (self._keep_key(), self._keep_touch())]
                await self._closing.wait()
                for task in work:
                    task.cancel()
        finally:
            self._own = b""
            await self._drop_lease()
            self._announcing -= 1
            self._ended.set()
        raise errors.Unavailable(f"the engine on {self._client.where} is closed")

    async def _keep_key(self) -> None:
        """Keeps the key on its lease, over whatever befalls either."""
        retry_s = RETRY_S_MIN
        while True:
            try:
                if not self._lease or self._taken_away.is_set():
                    await self._put()
                elif not await self._client.keep_alive(self._lease, timeout_s=RENEW_EVERY_S):
                    log.info("presence_lease_over", where=self._client.where)
                    self._lease = 0
                    continue
            except errors.SwarmError as error:
                if retry_s == RETRY_S_MIN:  # of a row of failures the first
                    log.info("presence_not_renewed", where=self._client.where, reason=error.message)
                await asyncio.sleep(retry_s)
                retry_s = min(RETRY_S_MAX, retry_s * 2)
                continue
            retry_s = RETRY_S_MIN
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_EVERY_S):
                    await self._taken_away.wait()

    async def _put(self) -> None:
        await self._drop_lease()
        self._lease, _ = await self._client.grant(LEASE_S)
        self._taken_away.clear()
        self._placed = 0
        try:
            answer = await self._client.txn(
                pb.TxnRequest(
                    success=[
                        pb.RequestOp(request_put=pb.PutRequest(key=self._own, lease=self._lease))
                    ]
                ),
                timeout_s=ANSWER_S,
            )
        except BaseException:
            # It may be there or not: the next try puts it on a lease of its own.
            self._taken_away.set()
            raise
        self._placed = answer.header.revision
        if self._seen > self._placed and self._keys.manager_of(self._own) not in self.present:
            self._taken_away.set()

    async def _keep_touch(self) -> None:
        """Asks how far the log goes, twice a second while it is answered."""
        by_writing = told = False
        retry_s = RETRY_S_MIN
        while True:
            asked_s = self._clock.monotonic_s()
            try:
                async with asyncio.timeout(PROBE_S):
                    await self._catch_up(by_writing)
            except (errors.SwarmError, TimeoutError):
                if not self.in_touch and not told:
                    told = True
                    log.warning("log_out_of_touch", where=self._client.where)
                by_writing = not by_writing
                await asyncio.sleep(retry_s)
                retry_s = min(RETRY_S_MAX, retry_s * 2)
                continue
            self._touched_s = asked_s
            if told:
                log.info("log_in_touch_again", where=self._client.where)
            by_writing, told, retry_s = False, False, RETRY_S_MIN
            await asyncio.sleep(PROBE_EVERY_S)

    async def _drop_lease(self) -> None:
        lease, self._lease = self._lease, 0
        if lease:
            try:
                await self._client.revoke(lease)
            except errors.SwarmError as error:
                log.info("lease_not_revoked", reason=error.message)

    async def close(self) -> None:
        """Ends the announcement, if there is one."""
        self._closing.set()
        while self._announcing:
            self._ended.clear()
            await self._ended.wait()
