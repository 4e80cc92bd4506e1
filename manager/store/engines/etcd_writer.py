"""The writing side of the etcd engine: from waiting commits to transactions and their answers.

Commits that wait are sent together as one transaction of nested ones, each with its own compares
(etcd judges all of them on the state before; so only commits that touch nothing the others of the
group write go together). They share a revision. A single stream of RPCs takes some 2,000 a second;
a group carries hundreds of commits.

An answer can be lost: with a connection, or inside etcd with its leader. The transaction may then
have taken effect, may still do so, or never will. To know, the writer disowns it: every transaction
compares the writer's generation (the mod_revision of a key of its own), and a write of that key
begins a new one, after which nothing of the old one can take effect. Once the log has come to that
write it either shows the group, or the group is not in it for good and is sent again. So each
commit takes effect once or not at all, and a commit whose answer was lost ends in TimedOut only
where etcd does not come back in time. A manager begins a new generation when it starts, so nothing
that an earlier life has sent shows up later. (Kafka's producers fence their own past in this way:
KIP-98, producer epochs.)

Invariants: a commit is acknowledged after the log has come to its revision; Unavailable is said
only of what has not taken effect and never will.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
import structlog
from etcd3aio import _protobuf as pb

from manager.store.engine import Fence, Op
from manager.store.engines.etcd_client import ANSWER_S, EtcdClient, Full
from manager.store.engines.etcd_requests import Head, Keys, at, created, delete, put, read
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("store.etcd")

OPS_MAX: Final = 10_000  # of one transaction; swarmd starts etcd with --max-txn-ops above it
BYTES_MAX: Final = 8 << 20  # likewise --max-request-bytes
GROUPS_MAX: Final = 4  # transactions under way at once
QUEUE_COMMITS_MAX: Final = 20_000
QUEUE_S: Final = 10.0  # the longest that a commit waits to be sent
COMMIT_S: Final = 10.0  # the longest that a sent commit's outcome is waited for
# How long what etcd refused for want of a leader, or could not be sent, is tried again: an election
# and a restart of etcd's process.
PATIENCE_S: Final = 3.0
RETRY_S_MIN: Final = 0.05
RETRY_S_MAX: Final = 0.5

Result = int | errors.SwarmError


class Following(Protocol):
    """What the writer asks of the one who follows the log. Revisions are etcd's here, but those
    that a commit expects are the store's.
    """

    @property
    def base(self) -> int:
        """What the store's revisions are above etcd's."""
        ...

    @property
    def breaks(self) -> int:
        """How often a part of the log was not seen, so that what is not in it proves nothing."""
        ...

    def take_own(self, revision: int, time_ns: int, ops: Sequence[Op], who: str) -> None:
        """An own group has this revision; the log need not be waited for to report it."""
        ...

    async def reached(self, revision: int) -> None:
        """Until the log has come to the revision."""
        ...

    def why_lost(self, commit: Commit) -> errors.SwarmError:
        """Why etcd refused a commit, as far as the log has come."""
        ...


@dataclass(slots=True, eq=False)
class Commit:
    ops: Sequence[Op]
    requires: Sequence[Op]
    fence: Fence | None
    who: str
    done: asyncio.Future[int]
    size: int = 0
    until_s: float = 0.0  # to be sent by then; the loop's time


@dataclass(slots=True, eq=False)
class _Group:
    """Commits sent together. `seen`: the revision at which the log shows them and the rows that
    they wrote there, once it does.
    """

    number: int
    commits: list[Commit]
    seen: tuple[int, frozenset[tuple[int, str]]] | None = None

    @property
    def who(self) -> str:
        """Who asked for any of it: they share a revision."""
        return ", ".join(dict.fromkeys(c.who for c in self.commits if c.who))


class Writer:
    """The queue of commits and what is under way. `name` tells this manager from others."""

    def __init__(
        self,
        client: EtcdClient,
        *,
        keys: Keys,
        name: str,
        clock: Clock,
        following: Following,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._client = client
        self._where = client.where
        self._keys = keys
        self._name = name
        self._clock = clock
        self._following = following
        self._spawn = spawn
        self._queue: deque[Commit] = deque()
        self._sent: dict[int, _Group] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._number = 0
        self._commits_max = QUEUE_COMMITS_MAX  # of one group, as far as this etcd takes them
        self._generation = 0
        self._disowned_at = 0  # nothing of earlier generations takes effect from this revision on
        self._disowning = asyncio.Lock()
        self._closing = False

    async def begin(self) -> None:
        """Begins a generation: nothing that an earlier life of this manager sent can take effect
        from here on.
        """
        answer = await self._client.txn(pb.TxnRequest(success=[put(self._keys.writer, b"")]))
        self._generation = self._disowned_at = answer.header.revision

    def add(
        self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None, who: str
    ) -> Commit:
        """Queues a commit; its `done` tells how it ended. Raises Unavailable (the queue is full)
        and Exhausted (more than one transaction may hold).
        """
        if len(self._queue) >= QUEUE_COMMITS_MAX:
            raise errors.Unavailable(
                f"{len(self._queue)} commits wait for {self._where}, the most that may; try again "
                "later"
            )
        size = sum(len(op.value) + len(op.id) for op in ops if op.value is not None)
        if len(ops) + len(requires) > OPS_MAX or size > BYTES_MAX:
            raise errors.Exhausted(
                f"a change of {len(ops)} objects and {size} bytes is more than {self._where} takes "
                f"at once ({OPS_MAX} objects, {BYTES_MAX} bytes); make it in parts"
            )
        loop = asyncio.get_running_loop()
        done, until_s = loop.create_future(), loop.time() + QUEUE_S
        commit = Commit(ops, requires, fence, who, done, size, until_s)
        self._queue.append(commit)
        self._pump()
        return commit

    def show(self, head: Head, revision: int, ops: Sequence[Op]) -> None:
        """The log has come to a group that this manager sent: its answer is late, or lost."""
        if head.writer == self._name and (group := self._sent.get(head.number)) is not None:
            group.seen = revision, frozenset((op.table, op.id) for op in ops)

    def _pump(self) -> None:
        """Sends what waits, as long as there is room."""
        now_s = asyncio.get_running_loop().time()
        while self._queue and self._queue[0].until_s < now_s:
            _end(
                self._queue.popleft(),
                errors.Unavailable(
                    f"{self._where} did not get to this change within {QUEUE_S:g} s; nothing was "
                    "changed. Try again later"
                ),
            )
        while self._queue and len(self._sent) < GROUPS_MAX and not self._closing:
            self._number += 1
            group = _Group(self._number, self._next_group())
            self._sent[group.number] = group
            task = self._spawn(self._send(group))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    def _next_group(self) -> list[Commit]:
        """Commits from the queue's head that have nothing to do with each other."""
        chosen: list[Commit] = []
        written: set[tuple[int, str]] = set()
        touched: set[tuple[int, str]] = set()
        ops = size = 0
        while self._queue and len(chosen) < self._commits_max:
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

    # -------------------------------------------------------------- one group

    async def _send(self, group: _Group) -> None:
        results = await self._outcome(group)
        del self._sent[group.number]
        for commit, result in zip(group.commits, results, strict=True):
            _end(commit, result)
        self._pump()

    async def _outcome(self, group: _Group) -> Sequence[Result]:
        """Sends the group until it is known what became of it."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        retry_s = RETRY_S_MIN
        while True:
            generation, breaks = self._generation, self._following.breaks
            time_ns = self._clock.now_ns()
            try:
                # Too early costs a write of the generation, no more: what was only slow is found in
                # the log.
                answer = await self._client.txn(
                    self._transaction(group, generation, time_ns), timeout_s=ANSWER_S
                )
            except errors.TimedOut as error:
                known = await self._find_out(group, generation, error, begun_s + COMMIT_S)
                if group.seen is not None:
                    return self._shown(group, group.seen)
                if not known or breaks != self._following.breaks:
                    log.info("etcd_outcome_unknown", where=self._where, commits=len(group.commits))
                    return [error] * len(group.commits)
                if isinstance(error, Full):
                    return [errors.Unavailable(error.message)] * len(group.commits)
            except errors.Unavailable as error:
                if self._closing or loop.time() + retry_s > begun_s + PATIENCE_S:
                    return [error] * len(group.commits)
                await asyncio.sleep(retry_s)
                retry_s = min(RETRY_S_MAX, retry_s * 2)
            except errors.Exhausted as error:
                if len(group.commits) == 1:
                    return [error]
                # Each of them may be small enough by itself; this etcd's limits are not ours.
                self._commits_max = len(group.commits) // 2
                self._queue.extendleft(reversed(group.commits))
                group.commits = []
                return []
            except errors.SwarmError as error:
                return [error] * len(group.commits)
            else:
                if answer.succeeded:
                    return await self._done(group, answer, time_ns)
                # Nothing of this generation can be done any more; nothing of this group was.
                if not await self._find_out(group, generation, None, begun_s + COMMIT_S):
                    return [self._away()] * len(group.commits)
            if self._closing:
                return [self._away()] * len(group.commits)

    def _transaction(self, group: _Group, generation: int, time_ns: int) -> Any:
        head = msgspec.msgpack.encode(Head(time_ns, self._name, group.number, group.who))
        request = pb.TxnRequest(
            compare=[at(self._keys.writer, generation)], success=[put(self._keys.head, head)]
        )
        for commit in group.commits:
            request.success.append(pb.RequestOp(request_txn=self._nested(commit)))
        return request

    def _nested(self, commit: Commit) -> Any:
        row, base = self._keys.row, self._following.base
        compare = [
            at(row(op), op.expected and _below(op.expected, base))
            for ops in (commit.requires, commit.ops)
            for op in ops
            if op.expected is not None
        ]
        if commit.fence is not None:
            compare.append(created(self._keys.leader, commit.fence.epoch))
        return pb.TxnRequest(
            compare=compare,
            success=[
                put(row(op), op.value) if op.value is not None else delete(row(op))
                for op in commit.ops
            ],
        )

    async def _done(self, group: _Group, answer: Any, time_ns: int) -> list[Result]:
        """Its commits' results, once the log has come to it."""
        revision = answer.header.revision
        parts = [part.response_txn.succeeded for part in answer.responses[1:]]
        won = list(zip(group.commits, parts, strict=True))
        ops = [op for c, yes in won if yes for op in c.ops]
        self._following.take_own(revision, time_ns, ops, group.who)
        try:
            async with asyncio.timeout(COMMIT_S):
                await self._following.reached(revision)
        except TimeoutError:
            taken = errors.TimedOut(
                f"{self._where} took the change, and its log does not come through to this "
                "manager, which cannot show it"
            )
            return [taken if yes else self._away() for _, yes in won]
        return [revision if yes else self._following.why_lost(commit) for commit, yes in won]

    def _shown(self, group: _Group, seen: tuple[int, frozenset[tuple[int, str]]]) -> list[Result]:
        revision, rows = seen
        return [
            revision
            if any((op.table, op.id) in rows for op in commit.ops)
            else self._following.why_lost(commit)
            for commit in group.commits
        ]

    def _away(self) -> errors.Unavailable:
        return errors.Unavailable(
            f"{self._where} does not answer; nothing was changed. Try again later, or another "
            "manager"
        )

    # -------------------------------------------------------------- lost answers

    async def _find_out(
        self, group: _Group, generation: int, error: errors.TimedOut | None, until_s: float
    ) -> bool:
        """Until the log says what became of the group; False: it cannot be known in time."""
        retry_s = RETRY_S_MIN
        try:
            async with asyncio.timeout_at(until_s):
                while group.seen is None:
                    try:
                        if isinstance(error, Full):
                            # The answer is final, and a full etcd takes no new generation.
                            end = await self._head_revision()
                        else:
                            end = await self._disown(generation)
                        await self._following.reached(end)
                        break
                    except errors.SwarmError:
                        await asyncio.sleep(retry_s)
                        retry_s = min(RETRY_S_MAX, retry_s * 2)
        except TimeoutError:
            return group.seen is not None
        return True

    async def _head_revision(self) -> int:
        answer = await self._client.range(pb.RangeRequest(key=self._keys.head))
        return answer.kvs[0].mod_revision if answer.kvs else 0

    async def _disown(self, generation: int) -> int:
        """Sees to it that nothing of that generation takes effect any more; the revision from
        which on that is so.
        """
        async with self._disowning:
            if self._generation == generation:
                key = self._keys.writer
                answer = await self._client.txn(
                    pb.TxnRequest(
                        compare=[at(key, generation)], success=[put(key, b"")], failure=[read(key)]
                    ),
                    timeout_s=ANSWER_S,
                )
                if answer.succeeded:
                    self._generation = self._disowned_at = answer.header.revision
                else:
                    # An earlier try got through after all, a namesake of this manager is about, or
                    # the others have forgotten it: then its key is gone since nobody knows when.
                    found = answer.responses[0].response_range.kvs
                    self._generation = found[0].mod_revision if found else 0
                    self._disowned_at = self._generation or answer.header.revision
                log.info("etcd_answer_lost", where=self._where, generation=self._generation)
            return self._disowned_at

    # -------------------------------------------------------------- the end

    def fail(self, *, waiting: errors.SwarmError, sent: errors.SwarmError) -> None:
        """Ends all commits: those that wait have changed nothing, those sent nobody knows."""
        for commit in self._queue:
            _end(commit, waiting)
        self._queue.clear()
        for group in self._sent.values():
            for commit in group.commits:
                _end(commit, sent)

    async def close(self, *, wait: bool) -> None:
        """Sends nothing new, and waits, where that may help, for what is under way, COMMIT_S at
        most.
        """
        self._closing = True
        if self._sending and wait:
            await asyncio.wait(set(self._sending), timeout=COMMIT_S)
        self.fail(
            waiting=errors.Unavailable(f"the engine on {self._where} is closed"),
            sent=errors.TimedOut(
                f"the engine on {self._where} was closed before it was told whether the change was "
                "taken"
            ),
        )


def _below(version: int, base: int) -> int:
    """etcd's revision of a version. One from before the base is nobody's: -1, for 0 is absence."""
    return version - base if version > base else -1


def _end(commit: Commit, result: Result) -> None:
    """Tells the caller, if it still waits."""
    if commit.done.done():
        return
    if isinstance(result, int):
        commit.done.set_result(result)
        return
    # One instance raised twice mixes its tracebacks.
    commit.done.set_exception(type(result)(result.message))
    commit.done.exception()  # a caller that is cancelled at this very moment does not ask for it
