"""The store: the tables in memory, the engine's log beneath them, and the watches on top.

It owns the one way in which state changes: a draft becomes rows with preconditions, the engine
makes them durable in one order, and each commit is applied on the event loop in that order, before
its writer resumes. So every reader on this loop sees whole commits only, and a writer reads what it
wrote. The store decides nothing about objects; it keeps unique names unique (see codec.NAMES).

Called by everything in the manager that reads or changes state. Commits are optimistic: a draft
remembers the versions it relied on, and a commit that lost a race is refused with Stale.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import structlog

from manager.store import codec, metrics
from manager.store.engine import Deposed, Engine, Fence, Op, Row, Stale
from manager.store.tables import BY_CLASS, BY_KIND, SCHEMAS, Change, Draft, Frozen, Tables
from manager.store.watch import Batch, Hub, Topic, Watch
from swarm import errors
from swarm.clock import Clock
from swarm.v1 import Kind, Message

log = structlog.get_logger("store")

T = TypeVar("T", bound=Message)
R = TypeVar("R")

ATTEMPTS: Final = 8
LOAD_CHUNK_ROWS: Final = 500  # decoded at a stretch while opening: some milliseconds


class Store:
    """The state of the cluster: a View, plus commits and watches.

    Use from one event loop. Between two awaits nothing changes, so what a plain function reads in
    one go is consistent.
    """

    def __init__(self, engine: Engine, clock: Clock, *, seal: codec.Seal | None = None) -> None:
        """`seal`: what keeps the cluster's keys unreadable below the store; see codec.SEALED."""
        self.engine = engine
        self._seal = seal
        # Held around draft and commit by those who write many tasks at a time, so that they do not
        # make each other's large drafts Stale.
        self.task_writer = asyncio.Lock()
        self._clock = clock
        self._tables = Tables()
        self._hub = Hub()
        self._names: dict[str, str] = {}  # rows of codec.NAMES: owner's id by row id
        # Objects whose rows are on their way to the engine, by the row's bytes: spares decoding
        # them when they come back. Equal bytes are equal objects.
        self._sent: dict[bytes, Message] = {}
        # Writers that lost a race queue here, so that however many change one object each of them
        # gets through.
        self._losers = asyncio.Lock()
        self._state = "new"

    async def open(self) -> None:
        """Loads the state and starts to follow the log.

        Raises Corrupt (nothing is loaded then) and Unavailable. Cost: reading and decoding all
        rows, about 10 µs each; other work on the loop goes on meanwhile.
        """
        errors.invariant(self._state == "new", f"open of a store that is {self._state}")
        self._state = "opening"
        try:
            revision, rows = await self.engine.load()
        except BaseException:
            self._state = "new"  # so that it can be tried again
            raise
        try:
            await self._load(revision, rows)
        except BaseException:
            await self.engine.close()
            self._state = "closed"
            raise
        self._hub.start(revision, self._clock.now_ns())
        self.engine.start(self._take)
        self._state = "open"

    async def close(self) -> None:
        """Finishes the commits under way, ends the watches, closes the engine. May be repeated."""
        if self._state in ("new", "closed"):
            return
        self._state = "closed"
        await self.engine.close()
        self._hub.close()

    async def _load(self, revision: int, rows: Iterable[Row]) -> None:
        where = self.engine.where
        tables = Tables()
        names: dict[str, str] = {}
        guards: dict[str, int] = {}
        chunk: list[tuple[Kind, str, Message | None]] = []
        for row in rows:
            if row.table == codec.NAMES:
                names[row.id] = _owner(row.id, row.value, where)
                continue
            if row.table == codec.GUARDS:
                guards[row.id] = _guard(row, where)
                continue
            kind, o = codec.decode_row(row, where=where, seal=self._seal)
            chunk.append((kind, row.id, o))
            if len(chunk) == LOAD_CHUNK_ROWS:
                tables.apply(revision, chunk)
                chunk = []
                await asyncio.sleep(0)
        tables.apply(revision, chunk, guards=guards)
        _check_names(tables, names, where)
        self._tables, self._names = tables, names

    # -------------------------------------------------------------- reading

    @property
    def revision(self) -> int:
        """The last commit that the tables hold."""
        return self._tables.revision

    def get(self, cls: type[T], id_: str) -> T | None:
        """One object by its whole id."""
        return self._tables.get(cls, id_)

    def all(self, cls: type[T]) -> Iterable[T]:
        """All objects of a kind, in no order to rely upon. Not to be kept across an await."""
        return self._tables.all(cls)

    def by(self, cls: type[T], index: str, key: Hashable) -> list[T]:
        """The objects under a key of an index, in no order to rely upon."""
        return self._tables.by(cls, index, key)

    def count(self, cls: type[Message]) -> int:
        """How many objects of a kind there are; constant time."""
        return self._tables.count(cls)

    def guarded(self, name: str) -> int:
        """The version of a guard; see Draft.guard."""
        return self._tables.guarded(name)

    def freeze(self) -> Frozen:
        """The present state as it will not change any more, for long work in another thread."""
        return self._tables.freeze()

    def watch(self, *topics: Topic, from_revision: int | None = None) -> Watch:
        """Commits that touch any of the topics, without a gap.

        All that come after this call; with `from_revision`, all later than that one. Raises
        WatchLost when these are no longer kept (watch.HISTORY_CHANGES_MAX), Exhausted when too many
        watches are open.
        """
        self._check_open()
        return self._hub.watch(*topics, revision=self.revision, from_revision=from_revision)

    def kept_since(self, time_ns: int) -> tuple[int, int]:
        """For a watch of the past by time: its `from_revision`; and the time before which commits
        that were wanted are no longer kept, 0: none were.
        """
        return self._hub.kept_since(time_ns)

    # -------------------------------------------------------------- writing

    def draft(self, *, who: str = "") -> Draft:
        """An empty draft over the present state, on somebody's behalf."""
        return Draft(self._tables, now_ns=self._clock.now_ns(), who=who)

    async def commit(self, draft: Draft, *, fence: Fence | None = None, who: str = "") -> int:
        """Makes the draft's changes durable, all or none; returns the revision they have. `who`
        asked for them, for watches.

        A draft without changes is not written and returns the present revision. Raises Stale (the
        state it relied on has changed, or `fence` is no longer the leadership), Unavailable
        (nothing was written) and TimedOut (unknown). Cancelling the caller does not undo the
        commit.
        """
        self._check_open()
        changes = draft.changes()
        if not changes:
            return self.revision
        ops, requires = self._plan(changes, draft.expected, draft.guards)
        started_s = self._clock.monotonic_s()
        outcome = metrics.FAILED
        try:
            revision = await self.engine.commit(ops, requires, fence, who)
            outcome = metrics.COMMITTED
            metrics.COMMIT_SECONDS.observe(self._clock.monotonic_s() - started_s)
            return revision
        except Stale:
            outcome = metrics.STALE
            raise
        finally:
            outcome.inc()
            for op in ops:
                if op.value is not None:
                    self._sent.pop(op.value, None)

    async def update(
        self,
        fn: Callable[[Draft], R],
        *,
        fence: Fence | None = None,
        attempts: int = ATTEMPTS,
        who: str = "",
    ) -> R:
        """Runs `fn` on a fresh draft and commits; again, on a fresh draft, when that was Stale.

        `fn` may run several times and raises to give up. Raises what `fn` and `commit` raise; Stale
        only after `attempts`, which takes that many others to win against it in a row; Deposed at
        once.
        """
        try:
            return await self._attempt(fn, fence, who)
        except Stale as error:
            if attempts <= 1 or isinstance(error, Deposed):
                raise
        async with self._losers:
            for _ in range(attempts - 2):
                try:
                    return await self._attempt(fn, fence, who)
                except Deposed:
                    raise
                except Stale:
                    continue
            return await self._attempt(fn, fence, who)

    async def _attempt(self, fn: Callable[[Draft], R], fence: Fence | None, who: str) -> R:
        draft = self.draft(who=who)
        result = fn(draft)
        await self.commit(draft, fence=fence, who=who)
        return result

    def _plan(
        self,
        changes: Sequence[Change],
        expected: Mapping[tuple[Kind, str], int],
        guards: Mapping[str, int],
    ) -> tuple[list[Op], list[Op]]:
        """The rows to write, and those that must not have changed though they are not written."""
        ops: list[Op] = []
        claims: dict[str, str | None] = {}
        freed: set[str] = set()
        for change in changes:
            kind, id_, new = change.kind, change.id, change.new
            value = None
            if new is not None:
                value = codec.encode(new, self._seal)
                self._sent[value] = new
            ops.append(Op(kind, id_, value, expected[kind, id_]))
            if BY_KIND[kind].unique_name:
                _plan_name(change, claims, freed)
        written = {(c.kind, c.id) for c in changes} if len(expected) > len(changes) else ()
        requires = [
            Op(kind, id_, None, version)
            for (kind, id_), version in expected.items()
            if written and (kind, id_) not in written
        ]
        for row, owner in claims.items():
            # A name given up in the same commit is held by an object whose own row is checked.
            must_be = None if row in freed else 0
            value = codec.encode_owner(owner) if owner is not None else None
            ops.append(Op(codec.NAMES, row, value, must_be))
        ops.extend(Op(codec.GUARDS, name, codec.GUARD, at) for name, at in guards.items())
        return ops, requires

    # -------------------------------------------------------------- the log

    def _take(self, revision: int, time_ns: int, ops: Sequence[Op], who: str) -> None:
        """Applies one commit of the log; the engine calls it in order."""
        incoming: list[tuple[Kind, str, Message | None]] = []
        guards: dict[str, int] = {}
        for op in ops:
            table, value = op.table, op.value
            if table == codec.NAMES:
                if value is None:
                    self._names.pop(op.id, None)
                else:
                    self._names[op.id] = _owner(op.id, value, self.engine.where)
                continue
            if table == codec.GUARDS:
                guards[op.id] = revision if value is not None else 0
                continue
            if value is None:
                incoming.append((Kind(table), op.id, None))
                continue
            sent = self._sent.get(value)
            if sent is not None and BY_CLASS[type(sent)].kind == table:
                incoming.append((BY_CLASS[type(sent)].kind, op.id, codec.stamped(sent, revision)))
            else:
                kind, o = codec.decode_row(
                    Row(table, op.id, revision, value), where=self.engine.where, seal=self._seal
                )
                incoming.append((kind, op.id, o))
        changes = self._tables.apply(revision, incoming, guards=guards)
        metrics.CHANGES.inc(len(changes))
        metrics.REVISION.set(revision)
        self._hub.dispatch(Batch(revision, time_ns, changes, who))

    def _check_open(self) -> None:
        if self._state != "open":
            raise errors.Unavailable(f"the store is {self._state}; try again, or another manager")

    def check_invariants(self) -> None:
        """Tables, names and watches agree among themselves; for tests."""
        self._tables.check_invariants()
        self._hub.check_invariants()
        errors.invariant(self._names == _names_of(self._tables), "unique names are off")
        for schema in SCHEMAS:
            for o in self._tables.all(schema.cls):
                meta = o.meta  # type: ignore[attr-defined]  # every stored class has one
                errors.invariant(
                    meta is not None and 0 < meta.version <= self.revision,
                    f"{schema.kind.name} {o} has no version of this store",
                )


def _plan_name(change: Change, claims: dict[str, str | None], freed: set[str]) -> None:
    before = _name(change.kind, change.old)
    after = _name(change.kind, change.new)
    if before == after:
        return
    if before is not None:
        freed.add(before)
        claims.setdefault(before, None)
    if after is not None:
        claims[after] = change.id


def _name(kind: Kind, o: Any) -> str | None:
    return codec.name_row(kind, o.spec.name) if o is not None and o.spec is not None else None


def _names_of(tables: Tables) -> dict[str, str]:
    return {
        row: o.id
        for schema in SCHEMAS
        if schema.unique_name
        for o in _any(tables.all(schema.cls))
        if (row := _name(schema.kind, o)) is not None
    }


def _any(objects: Iterable[Any]) -> Iterable[Any]:
    return objects


def _owner(row: str, value: bytes, where: str) -> str:
    try:
        return codec.decode_owner(value)
    except ValueError as error:
        raise codec.corrupt(codec.NAMES, row, str(error), where=where) from error


def _guard(row: Row, where: str) -> int:
    try:
        codec.check_guard(row.value)
    except ValueError as error:
        raise codec.corrupt(codec.GUARDS, row.id, str(error), where=where) from error
    return row.version


def _check_names(tables: Tables, names: Mapping[str, str], where: str) -> None:
    expected = _names_of(tables)
    for row in sorted(expected.keys() | names.keys()):
        if expected.get(row) != names.get(row):
            raise codec.corrupt(
                codec.NAMES,
                row,
                f"it names {names.get(row)} while the objects say {expected.get(row)}",
                where=where,
            )
