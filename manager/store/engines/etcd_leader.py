"""Leadership among managers: one key on a lease.

Whoever puts the key while it is absent leads until the lease is over or the key is deleted; the
key's create_revision is the epoch, which a fenced commit compares. The fence alone makes a deposed
leader harmless, no clock has to be right for that. So the lease is as short as etcd makes it: it
decides how soon another manager leads after a leader's death. And the leader itself gives up later
than the lease: while etcd elects its own leader nobody can renew, and nobody's lease ends.
(Leases: Gray and Cheriton, SOSP 1989; fences in the place of clocks: Kleppmann, "How to do
distributed locking", 2016.)
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import structlog
from etcd3aio import _protobuf as pb

from manager.store.engine import Fence
from manager.store.engines.etcd_client import ANSWER_S, EtcdClient
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("store.etcd")

# etcd makes it at least one and a half of its election timeouts; after an election it lasts one
# election timeout longer. Measured with 2 s: a new leader 3.5 to 4.2 s after a leader and its etcd
# were killed; with 1 s 2.1 to 3.2 s.
LEASE_S: Final = 1
RENEW_EVERY_S: Final = 0.25
SILENT_S: Final = 2.0  # after which a leader that cannot renew believes no more that it leads
LOOK_S: Final = 10.0  # a candidate looks again though the log has shown no end of the leadership
RETRY_S: Final = 0.2


class Leadership:
    """This manager's part in it. `present` is who leads as far as the log has shown."""

    def __init__(self, client: EtcdClient, key: bytes, clock: Clock) -> None:
        self.key = key
        self.present: Fence | None = None
        self._client = client
        self._clock = clock
        self._mine: Fence | None = None
        self._noted = 0  # the revision that `present` is of
        self._lease = 0
        self._renewing: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def leads(self) -> bool:
        return self._mine is not None

    def note(self, kv: Any | None, revision: int) -> None:
        """The key as it was at the revision; None: absent. News that are older than what is known
        are no news: the log may show an end that a campaign has seen already.
        """
        if revision < self._noted:
            return
        self._noted = revision
        self.present = Fence(kv.value.decode(), kv.create_revision) if kv is not None else None
        if self._mine is not None and self.present != self._mine:
            self._lose("the key is another's" if kv is not None else "the key is gone")
        self._wake()

    async def look(self) -> None:
        """Reads the key: what happened to it while nobody watched. Raises Unavailable."""
        answer = await self._client.range(pb.RangeRequest(key=self.key), timeout_s=ANSWER_S)
        self.note(answer.kvs[0] if answer.kvs else None, answer.header.revision)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def campaign(self, node_id: str) -> Fence:
        """Until this manager leads. An earlier leadership of the same node is ended: a node runs
        one manager, so that one is dead.
        """
        while True:
            changed = self._changed
            try:
                fence = await self._attempt(node_id)
            except errors.SwarmError as error:
                log.info("campaign_failed", reason=error.message)
                await self._drop_lease()
                await asyncio.sleep(RETRY_S)
                continue
            if fence is not None:
                return fence
            # What the leader's renewals do to the key is nothing, so that the log is silent for as
            # long as it leads; a watch that is made anew looks.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await changed.wait()

    async def _attempt(self, node_id: str) -> Fence | None:
        # One that a campaign which was cancelled has left may be nearly over.
        await self._drop_lease()
        asked_s = self._clock.monotonic_s()
        self._lease, _ = await self._client.grant(LEASE_S)
        answer = await self._client.txn(
            pb.TxnRequest(
                compare=[
                    pb.Compare(
                        key=self.key,
                        target=pb.Compare.CREATE,
                        result=pb.Compare.EQUAL,
                        create_revision=0,
                    )
                ],
                success=[
                    pb.RequestOp(
                        request_put=pb.PutRequest(
                            key=self.key, value=node_id.encode(), lease=self._lease
                        )
                    )
                ],
                failure=[pb.RequestOp(request_range=pb.RangeRequest(key=self.key))],
            ),
            timeout_s=ANSWER_S,
        )
        if not answer.succeeded:
            lease, self._lease = self._lease, 0
            await self._client.revoke(lease)
            kvs = answer.responses[0].response_range.kvs
            if kvs:
                self.note(kvs[0], answer.header.revision)
                if kvs[0].value == node_id.encode():
                    await self._client.revoke(kvs[0].lease)
                    return await self._attempt(node_id)
            return None
        fence = Fence(node_id, answer.header.revision)
        if self._noted > fence.epoch and self.present != fence:
            # It was over before the answer came.
            await self._drop_lease()
            return None
        self._mine = self.present = fence
        self._noted = max(self._noted, fence.epoch)
        if self._renewing is not None:
            self._renewing.cancel()  # of an earlier leadership
        self._renewing = asyncio.get_running_loop().create_task(self._renew(fence, asked_s))
        return fence

    async def _renew(self, fence: Fence, asked_s: float) -> None:
        """Keeps the lease while this manager leads."""
        while self._mine == fence:
            await asyncio.sleep(RENEW_EVERY_S)
            left_s = asked_s + SILENT_S - self._clock.monotonic_s()
            if left_s <= 0:
                self._lose("its lease could not be renewed in time")
                return
            again_s = self._clock.monotonic_s()
            try:
                # Not all the time that is left: a call may be lost, and the next one get through.
                granted_s = await self._client.keep_alive(self._lease, timeout_s=left_s / 2)
            except errors.SwarmError as error:
                log.info("lease_not_renewed", reason=error.message)
                continue
            if self._mine == fence and not granted_s:
                self._lose("its lease is over")
            asked_s = again_s

    def _lose(self, reason: str) -> None:
        log.warning("leadership_lost", node_id=self._mine and self._mine.node_id, reason=reason)
        self._mine = None
        self._lease = 0
        self._wake()

    async def wait_deposed(self, fence: Fence) -> None:
        """Until this leadership is over."""
        while self._mine == fence:
            await self._changed.wait()

    async def resign(self, fence: Fence) -> None:
        """Gives leadership up at once, so that another manager need not wait for the lease."""
        if self._mine != fence:
            return
        self._mine = None
        self._wake()
        await self._drop_lease()

    def abandon(self, fence: Fence) -> None:
        """Renews no more, for nobody is there to lead; the lease ends by itself."""
        if self._mine == fence:
            self._mine = None
            self._wake()

    async def _drop_lease(self) -> None:
        lease, self._lease = self._lease, 0
        if lease:
            try:
                await self._client.revoke(lease)
            except errors.SwarmError as error:
                log.info("lease_not_revoked", reason=error.message)

    async def close(self) -> None:
        """Resigns and ends the renewals."""
        self._mine = None
        self._wake()
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._drop_lease()
