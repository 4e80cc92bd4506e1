"""The log of several managers: etcd, which keeps it with Raft.

One key an object, under a prefix: `<prefix>/r/<table>/<id>`. A row's version is its key's
mod_revision and the store's revision is etcd's, both plus a constant (see etcd_requests), so that
preconditions are compares which etcd itself judges. `<prefix>/head` is written with every commit
and says when and by whom; `<prefix>/leader` hangs on the leader's lease, and its create_revision is
the epoch: a fenced commit compares it.

Every manager follows one watch of the prefix and reports commits in its order, whoever made them.
Its own (etcd_writer) it reports without waiting for the watch when none can lie between. After a
compaction that it slept through it reads everything and reports the difference.

Invariants: `on_commit` is called once for each revision, in order; `_versions` holds each row's
version at `_applied`; revisions are etcd's in here, and the store's, with the base, in `_versions`,
in ops and in whatever callers see; nothing is acknowledged before etcd has it on a quorum of disks.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import heapq
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import msgspec
import structlog
from etcd3aio import _protobuf as pb

from manager.store.engine import Corrupt, EngineFacts, Fence, OnCommit, Op, Row, Stale
from manager.store.engines import preconditions
from manager.store.engines.etcd_client import ANSWER_S, Compacted, EtcdClient
from manager.store.engines.etcd_leader import Leadership
from manager.store.engines.etcd_presence import Presence
from manager.store.engines.etcd_requests import (
    FORMAT,
    Head,
    Keys,
    base_of,
    created,
    delete,
    end_of,
    newest,
    put,
    read,
)
from manager.store.engines.etcd_writer import PATIENCE_S, Commit, Writer
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("store.etcd")

PAGE_KEYS: Final = 2_000
BARRIER_S: Final = 10.0  # the longest that a reader is kept waiting
BACKOFF_S_MIN: Final = 0.05
BACKOFF_S_MAX: Final = 1.0
# Revisions that are kept for those who read the log after a break; older ones are compacted away.
KEPT_REVISIONS: Final = 20_000
COMPACT_EVERY_S: Final = 60.0


_HEADS: Final = msgspec.msgpack.Decoder(Head)


@dataclass(slots=True)
class _Seen:
    """What one revision brought: of the log, or of an own commit that the watch has not shown."""

    time_ns: int
    ops: Sequence[Op]
    who: str = ""


class EtcdEngine:
    """See Engine for what its methods promise.

    `writer` tells this manager's commits from others'; no two that live at once may share it.
    `maintain`: whether old revisions are compacted by the leader; not where the etcd is another's.
    """

    name = "etcd"

    def __init__(
        self,
        client: EtcdClient,
        *,
        clock: Clock,
        writer: str,
        prefix: str = "/swarm",
        maintain: bool = True,
    ) -> None:
        self.where = client.where
        self._client = client
        self._clock = clock
        self._maintain = maintain
        self._keys = Keys(prefix, writer)
        self.leadership = Leadership(client, self._keys.leader, clock)
        self._presence = Presence(client, self._keys, clock, self._catch_up)
        self._writer = Writer(
            client, keys=self._keys, name=writer, clock=clock, following=self, spawn=self._spawn
        )
        self.base = 0  # see Following
        self.breaks = 0
        self._on_commit: OnCommit | None = None
        self._versions: preconditions.Versions = {}
        self._applied = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._own: dict[int, _Seen] = {}
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._broken: errors.SwarmError | None = None
        self._failed = asyncio.Event()

    # -------------------------------------------------------------- opening

    async def load(self) -> tuple[int, Iterable[Row]]:
        """All rows at one revision. Raises Corrupt for a prefix of another format, Unavailable."""
        try:
            self.base = await self._claim_format()
            await self._writer.begin()
        except errors.TimedOut as error:
            raise errors.Unavailable(error.message) from error  # doing these again is no harm
        revision, rows = await self._read_rows()
        self._applied = revision
        self._versions = {(r.table, r.id): r.version for r in rows}
        return revision + self.base, rows

    async def _claim_format(self) -> int:
        """The base of what is there; where nothing is, a state begins here."""
        key, filling = self._keys.format, self._keys.filling
        answer = await self._client.txn(
            pb.TxnRequest(
                compare=[created(key, 0), created(filling, 0)],
                success=[put(key, FORMAT)],
                failure=[read(key)],
            )
        )
        if answer.succeeded:
            return 0
        found = answer.responses[0].response_range.kvs
        if not found:
            raise errors.Unavailable(
                f"{self.where} is being given a state under {self._keys.prefix}, and does not "
                "hold all of it; if nothing brings it there any more, begin again"
            )
        return base_of(found[0].value, where=self.where, prefix=self._keys.prefix)

    async def _read_rows(self) -> tuple[int, list[Row]]:
        """All rows at one revision, in pages; from the start when that one is compacted away."""
        while True:
            try:
                return await self._read_pages()
            except Compacted as error:
                log.info("etcd_read_again", where=self.where, reason=error.message)

    async def _read_pages(self) -> tuple[int, list[Row]]:
        start = self._keys.rows
        end = end_of(start)
        revision = 0
        rows: list[Row] = []
        while True:
            answer = await self._client.range(
                pb.RangeRequest(key=start, range_end=end, limit=PAGE_KEYS, revision=revision)
            )
            revision = revision or answer.header.revision
            for kv in answer.kvs:
                table, id_ = self._keys.row_of(kv.key, where=self.where)
                rows.append(Row(table, id_, kv.mod_revision + self.base, kv.value))
            if not answer.more:
                return revision, rows
            start = answer.kvs[-1].key + b"\0"

    def start(self, on_commit: OnCommit) -> None:
        """Begins to follow the log and to write."""
        errors.invariant(self._on_commit is None, "start of an engine that runs")
        self._on_commit = on_commit
        self._spawn(self._follow())
        if self._maintain:
            self._spawn(self._compact())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("etcd_engine_defect", where=self.where, exc_info=error)
            if self._broken is None:
                self._give_up(
                    error
                    if isinstance(error, errors.SwarmError)
                    else errors.Internal(f"the engine on {self.where} has a defect: {error!r}")
                )

    # -------------------------------------------------------------- following

    async def _follow(self) -> None:
        """Reads the log for ever, over breaks of the connection."""
        backoff_s = BACKOFF_S_MIN
        while True:
            before = self._applied
            try:
                await self._read_log()
            except grpc.aio.AioRpcError as error:
                log.info("etcd_watch_broken", where=self.where, reason=error.details())
            except errors.Unavailable as error:
                log.info("etcd_watch_broken", where=self.where, reason=error.message)
            backoff_s = BACKOFF_S_MIN if self._applied > before else backoff_s
            await asyncio.sleep(backoff_s)
            backoff_s = min(BACKOFF_S_MAX, backoff_s * 2)

    async def _read_log(self) -> None:
        """One watch, until it ends."""
        create = pb.WatchCreateRequest(
            key=self._keys.all,
            range_end=end_of(self._keys.all),
            start_revision=self._applied + 1,
            fragment=True,
        )
        events: list[Any] = []
        watch = await self._client.watch(pb.WatchRequest(create_request=create))
        with contextlib.ExitStack() as stack:
            stack.callback(watch.cancel)
            await self._look()
            async for answer in watch:
                if answer.compact_revision:
                    log.warning("etcd_log_compacted", where=self.where, at=self._applied)
                    await self._resync()
                    return
                if answer.canceled:
                    raise errors.Unavailable(
                        f"{self.where} ended the watch: {answer.cancel_reason}"
                    )
                events.extend(answer.events)
                if not answer.fragment:
                    self._take(events)
                    events = []

    async def _look(self) -> None:
        """Reads what hangs on leases: it may have changed while nobody watched. Raises Unavailable,
        and Corrupt where the state itself is another one now.
        """
        await self.leadership.look()
        keys = self._keys
        found = await self._client.range(pb.RangeRequest(key=keys.format), timeout_s=ANSWER_S)
        self._check_base(found.kvs[0].value if found.kvs else b"")
        managers = pb.RangeRequest(
            key=keys.managers, range_end=end_of(keys.managers), keys_only=True
        )
        found = await self._client.range(managers, timeout_s=ANSWER_S)
        self._presence.look([kv.key for kv in found.kvs], found.header.revision)

    def _check_base(self, value: bytes) -> None:
        """Raises Corrupt unless the key `format` is what it was when the state was loaded."""
        if not value or base_of(value, where=self.where, prefix=self._keys.prefix) != self.base:
            raise Corrupt(
                f"the state under {self._keys.prefix} of {self.where} was replaced while this "
                "manager ran; restart swarmd, which loads the new one"
            )

    def _take(self, events: Sequence[Any]) -> None:
        """Applies what the watch has shown: whole revisions, in order."""
        revisions = [event.kv.mod_revision for event in events]
        start = 0
        # What was reported as an own commit is skipped without a look at it: most of it.
        while start < len(events):
            revision = revisions[start]
            end = bisect.bisect_right(revisions, revision, start)
            if revision > self._applied:
                self._take_revision(revision, events[start:end])
            start = end

    def _take_revision(self, revision: int, events: Sequence[Any]) -> None:
        own = self._own.get(revision)
        if own is not None:
            self._advance(revision, own)
            return
        head: Head | None = None
        ops = []
        for event in events:
            kv = event.kv
            key = kv.key
            if key.startswith(self._keys.rows):
                table, id_ = self._keys.row_of(key, where=self.where)
                ops.append(Op(table, id_, None if event.type else kv.value, None))
            elif key == self._keys.head:
                head = _HEADS.decode(kv.value)
            elif key == self.leadership.key:
                self.leadership.note(None if event.type else kv, revision)
            elif key.startswith(self._keys.managers):
                self._presence.note(key, there=not event.type, revision=revision)
            elif key == self._keys.format:
                self._check_base(b"" if event.type else kv.value)
        commit = _Seen(head.time_ns, ops, head.who) if head else _Seen(self._clock.now_ns(), ops)
        self._advance(revision, commit)
        if head is not None:
            self._writer.show(head, revision, ops)

    def _advance(self, revision: int, commit: _Seen) -> None:
        """The log has come to this revision. After a defect the tables are behind for good."""
        if self._broken is not None:
            return
        self._own.pop(revision, None)
        self._applied = revision
        if commit.ops:
            version = revision + self.base
            for op in commit.ops:
                if op.value is None:
                    self._versions.pop((op.table, op.id), None)
                else:
                    self._versions[op.table, op.id] = version
            assert self._on_commit is not None
            try:
                self._on_commit(version, commit.time_ns, commit.ops, commit.who)
            except BaseException:
                self._give_up(
                    errors.Internal(
                        f"revision {version} of {self.where} could not be applied; restart swarmd"
                    )
                )
                raise
        while self._waiting and self._waiting[0][0] <= revision:
            future = heapq.heappop(self._waiting)[2]
            if not future.done():
                future.set_result(None)

    def take_own(self, revision: int, time_ns: int, ops: Sequence[Op], who: str) -> None:
        """See Following. Reports own commits that follow directly upon what is known."""
        if revision > self._applied:
            self._own[revision] = _Seen(time_ns, ops, who)
        while (own := self._own.get(self._applied + 1)) is not None:
            self._advance(self._applied + 1, own)

    async def _resync(self) -> None:
        """Reads all rows and reports what differs, as the commits that last wrote each row; in
        between the tables show states that never were together, but every row was so. Nobody gets
        to see these: there is no await between.
        """
        self.breaks += 1
        revision, rows = await self._read_rows()
        changed: dict[int, list[Op]] = {}
        present = set()
        for row in rows:
            key = (row.table, row.id)
            present.add(key)
            if self._versions.get(key) != row.version:
                op = Op(row.table, row.id, row.value, None)
                changed.setdefault(row.version - self.base, []).append(op)
        gone = [Op(t, i, None, None) for t, i in sorted(self._versions.keys() - present)]
        changed.setdefault(revision, []).extend(gone)
        for at in sorted(changed):
            if at > self._applied:
                self._advance(at, _Seen(self._clock.now_ns(), changed[at]))
        self._own = {r: own for r, own in self._own.items() if r > self._applied}

    async def reached(self, revision: int) -> None:
        """See Following. Raises why this engine follows no more."""
        if self._broken is not None:
            raise type(self._broken)(self._broken.message)
        if revision <= self._applied:
            return
        future = asyncio.get_running_loop().create_future()
        self._number += 1
        heapq.heappush(self._waiting, (revision, self._number, future))
        await future

    async def barrier(self) -> None:
        """See Engine. Waits for an election of etcd's leader."""
        self._check_open()
        loop = asyncio.get_running_loop()
        patient_until_s = loop.time() + PATIENCE_S
        by_writing = False
        try:
            async with asyncio.timeout(BARRIER_S):
                while True:
                    try:
                        await self._catch_up(by_writing)
                        return
                    except (errors.Unavailable, errors.TimedOut) as error:
                        self._check_open()
                        if by_writing and loop.time() > patient_until_s:
                            raise errors.Unavailable(error.message) from error
                        by_writing = not by_writing
                        await asyncio.sleep(BACKOFF_S_MIN)
        except TimeoutError:
            raise errors.Unavailable(
                f"{self.where} does not show how far the log goes; try again later, or another "
                "manager"
            ) from None

    async def _catch_up(self, by_writing: bool) -> None:
        await self.reached(await newest(self._client, self._keys, by_writing=by_writing))

    # -------------------------------------------------------------- writing

    async def commit(
        self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None, who: str = ""
    ) -> int:
        """See Engine. Raises Exhausted besides: more than one transaction may hold."""
        self._check_open()
        return await self._writer.add(ops, requires, fence, who).done + self.base

    def why_lost(self, commit: Commit) -> errors.SwarmError:
        """See Following."""
        return (
            preconditions.deposed(commit.fence, self.leadership.present)
            or preconditions.problem(
                commit.ops, commit.requires, latest={}, versions=self._versions
            )
            or Stale("a row was changed and changed back meanwhile; read again and repeat")
        )

    def _check_open(self) -> None:
        if self._broken is not None:
            raise type(self._broken)(self._broken.message)
        if self._on_commit is None or self._closing:
            raise errors.Unavailable(f"the engine on {self.where} is closed; try again later")

    # -------------------------------------------------------------- managers

    @property
    def in_touch(self) -> bool:
        """See Engine."""
        return self._broken is None and self._presence.in_touch

    async def announce(self, node_id: str) -> None:
        """See Engine. Raises Unavailable once the engine is closed."""
        self._check_open()
        await self._presence.announce(node_id)

    def present(self) -> frozenset[str]:
        """See Engine."""
        return self._presence.present

    async def present_changed(self, known: frozenset[str]) -> frozenset[str]:
        """See Engine."""
        return await self._presence.present_changed(known)

    async def forget(self, node_id: str) -> None:
        """See Engine."""
        self._check_open()
        keys = self._keys
        await self._client.txn(
            pb.TxnRequest(success=[delete(keys.writer_of(node_id)), delete(keys.manager(node_id))])
        )

    async def facts(self) -> EngineFacts:
        """See Engine. Of the member that answers."""
        status = await self._client.status()
        return EngineFacts(f"etcd {status.version}", status.dbSize, status.dbSizeInUse)

    # -------------------------------------------------------------- leadership and upkeep

    async def campaign(self, node_id: str) -> Fence:
        """See Engine. Waits while another manager's lease lasts."""
        self._check_open()
        fence = await self.leadership.campaign(node_id)
        # What earlier leaders wrote is known before this one decides anything.
        try:
            await self.reached(fence.epoch)
        except BaseException:
            self.leadership.abandon(fence)
            raise
        return fence

    async def resign(self, fence: Fence) -> None:
        """See Engine."""
        await self.leadership.resign(fence)

    async def wait_deposed(self, fence: Fence) -> None:
        """See Engine."""
        await self.leadership.wait_deposed(fence)

    async def wait_failed(self) -> errors.SwarmError:
        """See Engine: a defect, or rows of an unknown format. etcd that is away is waited for."""
        await self._failed.wait()
        assert self._broken is not None
        return type(self._broken)(self._broken.message)

    async def _compact(self) -> None:
        """The leader forgets old revisions, so that etcd does not grow with every change."""
        done = 0
        while True:
            await asyncio.sleep(COMPACT_EVERY_S)
            revision = self._applied - KEPT_REVISIONS
            if not self.leadership.leads or revision <= done:
                continue
            try:
                await self._client.compact(revision)
                done = revision
            except errors.SwarmError as error:
                log.warning("etcd_compaction_failed", where=self.where, reason=error.message)

    def abandon(self) -> None:
        """The log is this manager's no more and will not answer it again: commits under way end as
        TimedOut, all else as Unavailable, and `close` waits for nothing. Not a failure that
        `wait_failed` tells of.
        """
        if self._broken is None:
            self._end_all(
                errors.Unavailable(
                    f"{self.where} is not this manager's any more; ask another manager"
                )
            )

    def _give_up(self, why: errors.SwarmError) -> None:
        self._end_all(why)
        self._failed.set()

    def _end_all(self, why: errors.SwarmError) -> None:
        self._broken = why
        self._writer.fail(
            waiting=why, sent=errors.TimedOut(f"{why.message}; whether it was changed is not known")
        )
        self._end_waiting(why)

    def _end_waiting(self, why: errors.SwarmError) -> None:
        for _, _, future in self._waiting:
            if not future.done():
                future.set_exception(type(why)(why.message))
                future.exception()  # whoever waited may be gone
        self._waiting.clear()

    async def close(self) -> None:
        """Finishes the commits under way, gives leadership up and ends the watch. Takes as long as
        etcd does not answer, but COMMIT_S and a call's time at most; where the engine is broken or
        abandoned nothing is waited for.
        """
        if self._closing:
            return
        self._closing = True
        await self._writer.close(wait=self._broken is None)
        self._end_waiting(errors.Unavailable(f"the engine on {self.where} is closed"))
        await self._presence.close()
        await self.leadership.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()
