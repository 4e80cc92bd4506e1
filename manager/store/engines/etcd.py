"""The log of several managers: etcd, which keeps it with Raft.

One key an object, under a prefix: `<prefix>/r/<table>/<id>`. A row's version is its key's
mod_revision, the store's revision is etcd's, so that preconditions are compares which etcd itself
judges. `<prefix>/head` is written with every commit and says when and by whom; `<prefix>/leader`
hangs on the leader's lease, and its create_revision is the epoch: a fenced commit compares it.

Commits that wait are sent together as one transaction of nested ones, each with its own compares
(etcd judges all of them on the state before; so only commits that touch nothing the others of the
group write go together). They share a revision. A single stream of RPCs takes some 2,000 a second;
a group carries hundreds of commits.

Every manager follows one watch of the prefix and reports commits in its order, whoever made them.
Its own it reports without waiting for the watch when none can lie between. After a compaction that
it slept through it reads everything and reports the difference.

When an answer is lost, the watch tells: after a linearizable read, a commit that the log does not
show is reported as TimedOut (it may still be on its way inside etcd), one that it shows as done.

Invariants: `on_commit` is called once for each revision, in order; `_versions` holds each row's
mod_revision at `_applied`; nothing is acknowledged before etcd has it on a quorum of disks.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import msgspec
import structlog
from etcd3aio import _protobuf as pb

from manager.store.engine import Corrupt, Fence, OnCommit, Op, Row, Stale
from manager.store.engines import preconditions
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_leader import Leadership
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("store.etcd")

FORMAT: Final = b"1"
OPS_MAX: Final = 10_000  # of one transaction; swarmd starts etcd with --max-txn-ops above it
BYTES_MAX: Final = 8 << 20  # likewise --max-request-bytes
GROUPS_MAX: Final = 4  # transactions under way at once
QUEUE_COMMITS_MAX: Final = 20_000
PAGE_KEYS: Final = 2_000
COMMIT_S: Final = 10.0  # the longest that a commit's outcome is waited for
BACKOFF_S_MIN: Final = 0.05
BACKOFF_S_MAX: Final = 1.0
# Revisions that are kept for those who read the log after a break; older ones are compacted away.
KEPT_REVISIONS: Final = 20_000
COMPACT_EVERY_S: Final = 60.0


class _Head(msgspec.Struct, array_like=True, frozen=True):
    """What every commit writes beside its rows."""

    time_ns: int
    writer: str
    number: int


_HEADS: Final = msgspec.msgpack.Decoder(_Head)


@dataclass(slots=True, eq=False)
class _Commit:
    ops: Sequence[Op]
    requires: Sequence[Op]
    fence: Fence | None
    done: asyncio.Future[int]
    size: int = 0


@dataclass(slots=True, eq=False)
class _Group:
    """Commits sent together. `seen`: the revision at which the log shows them, once it does."""

    number: int
    commits: list[_Commit]
    seen: tuple[int, frozenset[tuple[int, str]]] | None = None


@dataclass(slots=True)
class _Own:
    """Ops of this engine's own commits that the watch has not shown yet."""

    time_ns: int
    ops: list[Op] = field(default_factory=list)


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
        self._writer = writer
        self._maintain = maintain
        self._prefix = prefix.rstrip("/")
        self._rows_prefix = f"{self._prefix}/r/"
        self._head = f"{self._prefix}/head".encode()
        self.leadership = Leadership(client, f"{self._prefix}/leader".encode(), clock)
        self._on_commit: OnCommit | None = None
        self._versions: preconditions.Versions = {}
        self._applied = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._own: dict[int, _Own] = {}
        self._queue: deque[_Commit] = deque()
        self._sent: dict[int, _Group] = {}
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._broken: errors.SwarmError | None = None
        self._failed = asyncio.Event()

    # -------------------------------------------------------------- opening

    async def load(self) -> tuple[int, Iterable[Row]]:
        """All rows at one revision. Raises Corrupt for a prefix of another format, Unavailable."""
        await self._claim_format()
        revision, rows = await self._read_rows()
        self._applied = revision
        self._versions = {(r.table, r.id): r.version for r in rows}
        return revision, rows

    async def _claim_format(self) -> None:
        key = f"{self._prefix}/format".encode()
        answer = await self._client.txn(
            pb.TxnRequest(
                compare=[_created(key, 0)],
                success=[_put(key, FORMAT)],
                failure=[_range(key)],
            )
        )
        if answer.succeeded:
            return
        found = answer.responses[0].response_range.kvs
        if found and found[0].value != FORMAT:
            raise Corrupt(
                f"{self.where} holds a state of format {bytes(found[0].value)!r} under "
                f"{self._prefix}, and this version knows {FORMAT!r}; upgrade swarmd"
            )

    async def _read_rows(self) -> tuple[int, list[Row]]:
        start = self._rows_prefix.encode()
        end = _end(start)
        revision = 0
        rows: list[Row] = []
        while True:
            answer = await self._client.range(
                pb.RangeRequest(key=start, range_end=end, limit=PAGE_KEYS, revision=revision)
            )
            revision = revision or answer.header.revision
            for kv in answer.kvs:
                table, id_ = self._row_of(kv.key)
                rows.append(Row(table, id_, kv.mod_revision, kv.value))
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

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

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
        prefix = f"{self._prefix}/".encode()
        create = pb.WatchCreateRequest(
            key=prefix, range_end=_end(prefix), start_revision=self._applied + 1, fragment=True
        )
        events: list[Any] = []
        watch = self._client.watch(pb.WatchRequest(create_request=create))
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(watch.cancel)  # type: ignore[attr-defined]  # a grpc.aio call
            await self.leadership.look()
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

    def _take(self, events: Sequence[Any]) -> None:
        """Applies what the watch has shown: whole revisions, in order."""
        start = 0
        for i, event in enumerate(events):
            revision = event.kv.mod_revision
            if i + 1 == len(events) or events[i + 1].kv.mod_revision != revision:
                if revision > self._applied:
                    self._take_revision(revision, events[start : i + 1])
                start = i + 1

    def _take_revision(self, revision: int, events: Sequence[Any]) -> None:
        head: _Head | None = None
        rows = []
        for event in events:
            key = event.kv.key
            if key == self._head:
                head = _HEADS.decode(event.kv.value)
            elif key == self.leadership.key:
                self.leadership.note(None if event.type else event.kv, revision)
            elif key.startswith(self._rows_prefix.encode()):
                rows.append(event)
        own = self._own.get(revision)
        if own is not None:
            self._advance(revision, own.time_ns, own.ops)
            return
        ops = []
        for event in rows:
            table, id_ = self._row_of(event.kv.key)
            ops.append(Op(table, id_, None if event.type else event.kv.value, None))
        self._advance(revision, head.time_ns if head else self._clock.now_ns(), ops)
        if head is not None and head.writer == self._writer and head.number in self._sent:
            # Its answer is late, or lost.
            self._sent[head.number].seen = revision, frozenset((o.table, o.id) for o in ops)

    def _advance(self, revision: int, time_ns: int, ops: Sequence[Op]) -> None:
        """The log has come to this revision. After a defect the tables are behind for good."""
        if self._broken is not None:
            return
        self._own.pop(revision, None)
        self._applied = revision
        if ops:
            for op in ops:
                if op.value is None:
                    self._versions.pop((op.table, op.id), None)
                else:
                    self._versions[op.table, op.id] = revision
            assert self._on_commit is not None
            try:
                self._on_commit(revision, time_ns, ops)
            except BaseException:
                self._give_up(
                    errors.Internal(
                        f"revision {revision} of {self.where} could not be applied; restart swarmd"
                    )
                )
                raise
        while self._waiting and self._waiting[0][0] <= revision:
            future = heapq.heappop(self._waiting)[2]
            if not future.done():
                future.set_result(None)

    def _advance_own(self) -> None:
        """Reports own commits that follow directly upon what is known."""
        while (own := self._own.get(self._applied + 1)) is not None:
            self._advance(self._applied + 1, own.time_ns, own.ops)

    async def _resync(self) -> None:
        """Reads all rows and reports what differs, as the commits that last wrote each row; in
        between the tables show states that never were together, but every row was so.
        """
        revision, rows = await self._read_rows()
        changed: dict[int, list[Op]] = {}
        present = set()
        for row in rows:
            key = (row.table, row.id)
            present.add(key)
            if self._versions.get(key) != row.version:
                changed.setdefault(row.version, []).append(Op(row.table, row.id, row.value, None))
        gone = [Op(t, i, None, None) for t, i in sorted(self._versions.keys() - present)]
        changed.setdefault(revision, []).extend(gone)
        for version in sorted(changed):
            if version > self._applied:
                self._advance(version, self._clock.now_ns(), changed[version])
        self._own = {r: own for r, own in self._own.items() if r > self._applied}

    def _row_of(self, key: bytes) -> tuple[int, str]:
        table, _, id_ = key.decode().removeprefix(self._rows_prefix).partition("/")
        try:
            return int(table), id_
        except ValueError:
            raise Corrupt(
                f"{self.where} holds a key {key!r} that is none of ours; remove it, or use another "
                "prefix"
            ) from None

    async def _reached(self, revision: int) -> None:
        """Until the log has come to the revision."""
        if revision <= self._applied:
            return
        future = asyncio.get_running_loop().create_future()
        self._number += 1
        heapq.heappush(self._waiting, (revision, self._number, future))
        await future

    async def barrier(self) -> None:
        """Until everything is known that was committed before this call, by whichever manager.
        Raises Unavailable where there is no quorum.
        """
        async with self._in_time("it was not seen how far the log goes"):
            answer = await self._client.range(pb.RangeRequest(key=self._head))
            if answer.kvs:
                await self._reached(answer.kvs[0].mod_revision)

    @contextlib.asynccontextmanager
    async def _in_time(self, what: str) -> Any:
        try:
            async with asyncio.timeout(COMMIT_S):
                yield
        except TimeoutError:
            raise errors.Unavailable(f"{self.where} does not answer: {what}") from None

    # -------------------------------------------------------------- writing

    async def commit(self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None) -> int:
        """See Engine. Raises Exhausted besides: more than one transaction may hold."""
        self._check_open()
        if len(self._queue) >= QUEUE_COMMITS_MAX:
            raise errors.Unavailable(
                f"{len(self._queue)} commits wait for {self.where}, the most that may; try again "
                "later"
            )
        size = sum(len(op.value) + len(op.id) for op in ops if op.value is not None)
        if len(ops) + len(requires) > OPS_MAX or size > BYTES_MAX:
            raise errors.Exhausted(
                f"a change of {len(ops)} objects and {size} bytes is more than {self.where} takes "
                f"at once ({OPS_MAX} objects, {BYTES_MAX} bytes); make it in parts"
            )
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._queue.append(_Commit(ops, requires, fence, done, size))
        self._pump()
        return await done

    def _pump(self) -> None:
        """Sends what waits, as long as there is room."""
        while self._queue and len(self._sent) < GROUPS_MAX and not self._closing:
            self._number += 1
            group = _Group(self._number, self._next_group())
            self._sent[group.number] = group
            self._spawn(self._send(group))

    def _next_group(self) -> list[_Commit]:
        """Commits from the queue's head that have nothing to do with each other."""
        chosen: list[_Commit] = []
        written: set[tuple[int, str]] = set()
        touched: set[tuple[int, str]] = set()
        ops = size = 0
        while self._queue:
            commit = self._queue[0]
            writes = {(o.table, o.id) for o in commit.ops}
            uses = writes | {(o.table, o.id) for o in commit.requires}
            ops += len(commit.ops) + len(commit.requires)
            size += commit.size
            full = ops > OPS_MAX or size > BYTES_MAX
            if chosen and (full or uses & written or writes & touched):
                break
            written |= writes
            touched |= uses
            chosen.append(self._queue.popleft())
        return chosen

    async def _send(self, group: _Group) -> None:
        """One transaction, and its commits' answers."""
        time_ns = self._clock.now_ns()
        head = msgspec.msgpack.encode(_Head(time_ns, self._writer, group.number))
        request = pb.TxnRequest(success=[_put(self._head, head)])
        for commit in group.commits:
            request.success.append(pb.RequestOp(request_txn=self._request(commit)))
        try:
            answer = await self._client.txn(request, timeout_s=COMMIT_S)
        except errors.TimedOut as error:
            await self._find_out(group, error)
        except errors.SwarmError as error:
            self._answer(group, [error] * len(group.commits))
        else:
            revision = answer.header.revision
            parts = [r.response_txn for r in answer.responses[1:]]
            won = [p.succeeded for p in parts]
            if revision > self._applied:
                ops = [op for c, yes in zip(group.commits, won, strict=True) if yes for op in c.ops]
                self._own[revision] = _Own(time_ns, ops)
                self._advance_own()
                await self._reached(revision)
            self._answer(
                group,
                [
                    revision if yes else self._lost(commit)
                    for commit, yes in zip(group.commits, won, strict=True)
                ],
            )

    def _request(self, commit: _Commit) -> Any:
        compare = [
            _at(self._key(op), op.expected)
            for ops in (commit.requires, commit.ops)
            for op in ops
            if op.expected is not None
        ]
        if commit.fence is not None:
            compare.append(_created(self.leadership.key, commit.fence.epoch))
        return pb.TxnRequest(
            compare=compare,
            success=[
                _put(self._key(op), op.value) if op.value is not None else _delete(self._key(op))
                for op in commit.ops
            ],
        )

    def _key(self, op: Op) -> bytes:
        return f"{self._rows_prefix}{op.table}/{op.id}".encode()

    def _lost(self, commit: _Commit) -> errors.SwarmError:
        """Why etcd refused it; what it lost to is known by now."""
        return (
            preconditions.deposed(commit.fence, self.leadership.present)
            or preconditions.problem(
                commit.ops, commit.requires, latest={}, versions=self._versions
            )
            or Stale("a row was changed and changed back meanwhile; read again and repeat")
        )

    async def _find_out(self, group: _Group, error: errors.TimedOut) -> None:
        """The answer was lost: the log says whether the commits were made."""
        try:
            async with asyncio.timeout(COMMIT_S):
                while group.seen is None:
                    try:
                        answer = await self._client.range(pb.RangeRequest(key=self._head))
                    except errors.Unavailable:
                        await asyncio.sleep(BACKOFF_S_MAX)
                        continue
                    if answer.kvs:
                        await self._reached(answer.kvs[0].mod_revision)
                    break
        except TimeoutError:
            log.info("etcd_outcome_unknown", where=self.where, commits=len(group.commits))
        results: list[int | errors.SwarmError] = []
        for commit in group.commits:
            if group.seen is None:
                results.append(errors.TimedOut(error.message))
            elif any((op.table, op.id) in group.seen[1] for op in commit.ops):
                results.append(group.seen[0])
            else:
                results.append(self._lost(commit))
        self._answer(group, results)

    def _answer(self, group: _Group, results: Sequence[int | errors.SwarmError]) -> None:
        del self._sent[group.number]
        for commit, result in zip(group.commits, results, strict=True):
            if commit.done.done():
                continue
            if isinstance(result, int):
                commit.done.set_result(result)
            else:
                # One instance raised twice mixes its tracebacks.
                commit.done.set_exception(type(result)(result.message))
        self._pump()

    def _check_open(self) -> None:
        if self._broken is not None:
            raise type(self._broken)(self._broken.message)
        if self._on_commit is None or self._closing:
            raise errors.Unavailable(f"the engine on {self.where} is closed; try again later")

    # -------------------------------------------------------------- leadership and upkeep

    async def campaign(self, node_id: str) -> Fence:
        """See Engine. Waits while another manager's lease lasts."""
        self._check_open()
        fence = await self.leadership.campaign(node_id)
        # What earlier leaders wrote is known before this one decides anything.
        await self._reached(fence.epoch)
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

    def _give_up(self, why: errors.SwarmError) -> None:
        self._broken = why
        self._failed.set()
        self._end_waiting(why)

    def _end_waiting(self, why: errors.SwarmError) -> None:
        for commit in (*self._queue, *(c for g in self._sent.values() for c in g.commits)):
            if not commit.done.done():
                commit.done.set_exception(type(why)(why.message))
        self._queue.clear()

    async def close(self) -> None:
        """Finishes the commits under way, gives leadership up and ends the watch."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COMMIT_S):
                while self._sent and self._broken is None:
                    group = next(iter(self._sent.values()))
                    await asyncio.wait([c.done for c in group.commits])
        self._end_waiting(errors.Unavailable(f"the engine on {self.where} is closed"))
        await self.leadership.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()


# ------------------------------------------------------------------ requests


def _end(prefix: bytes) -> bytes:
    """The first key after all that begin with the prefix."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _put(key: bytes, value: bytes) -> Any:
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))


def _delete(key: bytes) -> Any:
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))


def _range(key: bytes) -> Any:
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def _at(key: bytes, revision: int) -> Any:
    return pb.Compare(
        key=key, target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=revision
    )


def _created(key: bytes, revision: int) -> Any:
    return pb.Compare(
        key=key, target=pb.Compare.CREATE, result=pb.Compare.EQUAL, create_revision=revision
    )
