"""Brings a whole state into etcd, from another engine or a backup, and moves revisions up.

Rows go in as they are, in transactions of many, and `format` last: until then an engine refuses the
prefix, so a state is never loaded half. The key `filling` marks what is under way. Every write
compares it, so that of two who fill one prefix the later wins and the earlier fails; and it tells
what an attempt that died has left, which is cleared, from keys of somebody else, which are not.

Who was killed between the end of a fill and noting it elsewhere fills again: where the very same
state is there, and nothing was committed to it since, that is a success (`filled` holds its
digest). Any other state is a conflict.

A row's version becomes etcd's revision plus the base. The base is chosen above the revision that
the state had, so versions only grow over the move, and no version of an object means two things.

Called by the manager while no engine is open on the prefix.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

import structlog
from etcd3aio import _protobuf as pb

from manager.store.engine import Op, Row
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_requests import (
    Keys,
    at,
    base_of,
    created,
    delete,
    end_of,
    format_value,
    put,
    read,
)
from swarm import errors

__all__ = ["fill", "raise_base"]

log = structlog.get_logger("store.etcd")

R = TypeVar("R")

# One transaction's: an etcd of swarmd's takes five times as much. Measured: larger ones are no
# faster.
CHUNK_OPS: Final = 2_000
CHUNK_BYTES: Final = 2 << 20
CHUNKS_MAX: Final = 3  # under way at once: one is made while etcd writes another
TXN_S: Final = 15.0
# How long a write that failed or got no answer is tried again: elections, a restart of etcd.
PATIENCE_S: Final = 30.0
RETRY_S: Final = 0.2
# Above the revision that the state is said to have: what was numbered while it was being read.
MARGIN: Final = 1_000


async def fill(client: EtcdClient, *, prefix: str, rows: Iterable[Row], revision: int) -> int:
    """Writes all rows of a state that was at this revision; returns the store's revision at which
    it is whole.

    Raises Conflict (there is another state, or keys that are not the store's, under the prefix; or
    somebody else fills it), Exhausted (a row is larger than this etcd takes), Unavailable (etcd is
    away for longer than PATIENCE_S). A prefix that was not filled to the end is no state, and the
    next call clears it. Some 30,000 rows a second.
    """
    return await _Fill(client, Keys(prefix, ""), revision).run(rows)


async def raise_base(client: EtcdClient, *, prefix: str, by: int) -> int:
    """Adds to the base of the state under the prefix, for a state that may have lost its latest
    revisions: what comes is numbered above them. Returns the new base.

    Raises NotFound, Corrupt (another version's format), Unavailable. Repeated after a failure it
    adds once more at most, which is no harm.
    """
    keys = Keys(prefix, "")

    async def attempt() -> int:
        kvs = (await client.range(pb.RangeRequest(key=keys.format))).kvs
        if not kvs:
            raise errors.NotFound(f"{client.where} holds no state under {keys.prefix}")
        base = base_of(kvs[0].value, where=client.where, prefix=keys.prefix) + by
        answer = await client.txn(
            pb.TxnRequest(
                compare=[at(keys.format, kvs[0].mod_revision)],
                success=[put(keys.format, format_value(base))],
            )
        )
        if not answer.succeeded:
            raise errors.Unavailable(f"{client.where}: {keys.format!r} was written by another")
        return base

    return await _patiently(attempt)


class _Fill:
    """One attempt. `mark` is the mod_revision of the key `filling` while it is this one's."""

    def __init__(self, client: EtcdClient, keys: Keys, revision: int) -> None:
        self._client = client
        self._keys = keys
        self._revision = revision
        self._base = revision + MARGIN
        self._mark = 0
        self._ops_max = CHUNK_OPS
        self._bytes_max = CHUNK_BYTES
        self._written = 0
        self._digest = hashlib.sha256()

    async def run(self, rows: Iterable[Row]) -> int:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        chunks = self._chunks(rows)
        if not await _patiently(self._begin):
            return await self._found(chunks)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CHUNKS_MAX):
                    group.create_task(self._write_all(chunks))
        except ExceptionGroup as failed:
            raise _first(failed) from None
        revision = await _patiently(self._finish)
        log.info(
            "etcd_filled",
            where=self._client.where,
            prefix=self._keys.prefix,
            rows=self._written,
            base=self._base,
            revision=revision,
            seconds=round(loop.time() - begun_s, 2),
        )
        return revision

    # -------------------------------------------------------------- begin

    async def _begin(self) -> bool:
        """Marks the prefix and clears what an earlier attempt has left. False: a state is there."""
        keys = self._keys
        answer = await self._client.txn(
            pb.TxnRequest(success=[read(keys.format), read(keys.filling), _first_of(keys)])
        )
        format_, filling, some = (part.response_range.kvs for part in answer.responses)
        if format_:
            return False
        if some and not filling:
            raise errors.Conflict(
                f"{self._client.where} holds keys under {keys.prefix} that are no cluster's state "
                f"({bytes(some[0].key).decode(errors='replace')!r} is one); use another prefix"
            )
        before = filling[0].mod_revision if filling else 0
        answer = await self._client.txn(
            pb.TxnRequest(
                compare=[created(keys.format, 0), at(keys.filling, before)],
                success=[put(keys.filling, b"")],
            )
        )
        if not answer.succeeded:
            raise self._taken()
        self._mark = answer.header.revision
        if before:
            log.info("etcd_fill_begun_again", where=self._client.where, prefix=keys.prefix)
            await self._send([_delete_range(keys.all, keys.filling), _delete_after(keys)])
        return True

    async def _found(self, chunks: Iterator[list[Row]]) -> int:
        """The revision of the state that is there, if it is this one and as it was brought in."""
        for _ in chunks:
            await asyncio.sleep(0)
        keys = self._keys
        wanted = pb.TxnRequest(success=[read(keys.format), read(keys.filled), read(keys.head)])
        answer = await _patiently(lambda: self._client.txn(wanted))
        format_, filled, head = (part.response_range.kvs for part in answer.responses)
        ours = format_ and format_[0].value == format_value(self._base)
        if not ours or head or not filled or filled[0].value != self._digest.digest():
            raise errors.Conflict(
                f"{self._client.where} holds a state under {keys.prefix} already; use another "
                "prefix, or remove these keys if nobody needs that state any more"
            )
        log.info("etcd_filled_before", where=self._client.where, prefix=keys.prefix)
        return int(answer.header.revision) + self._base

    def _taken(self) -> errors.Conflict:
        return errors.Conflict(
            f"{self._client.where} is being given a state under {self._keys.prefix} by somebody "
            "else at this moment; only one may"
        )

    # -------------------------------------------------------------- rows

    def _chunks(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        chunk: list[Row] = []
        size = 0
        for row in rows:
            errors.invariant(
                row.version <= self._revision,
                f"row {row.id} is of revision {row.version}, above {self._revision}",
            )
            cost = len(row.value) + len(row.id)
            self._digest.update(b"%d/%s\0%d:" % (row.table, row.id.encode(), len(row.value)))
            self._digest.update(row.value)
            if chunk and (len(chunk) >= self._ops_max or size + cost > self._bytes_max):
                yield chunk
                chunk, size = [], 0
            chunk.append(row)
            size += cost
        if chunk:
            yield chunk

    async def _write_all(self, chunks: Iterator[list[Row]]) -> None:
        """Writes chunks until there are no more; several of these share the iterator."""
        for chunk in chunks:
            await self._write(chunk)
            # Reading and encoding the next one holds the loop for some milliseconds.
            await asyncio.sleep(0)

    async def _write(self, chunk: list[Row]) -> None:
        key = self._keys.row
        ops = [put(key(Op(r.table, r.id, None, None)), r.value) for r in chunk]
        try:
            await _patiently(lambda: self._send(ops))
        except errors.Exhausted as error:
            if len(chunk) == 1:
                row = chunk[0]
                raise errors.Exhausted(
                    f"row {row.id!r} of table {row.table} has {len(row.value)} bytes: "
                    f"{error.message}. Raise its --max-request-bytes"
                ) from error
            # This etcd's limits are not ours.
            half = len(chunk) // 2
            self._ops_max = min(self._ops_max, half)
            self._bytes_max = min(self._bytes_max, sum(len(r.value) for r in chunk) // 2)
            await self._write(chunk[:half])
            await self._write(chunk[half:])
        else:
            self._written += len(chunk)

    async def _send(self, ops: list[Any]) -> None:
        """Writes while the prefix is this attempt's; doing so twice is no harm."""
        answer = await self._client.txn(
            pb.TxnRequest(compare=[at(self._keys.filling, self._mark)], success=ops),
            timeout_s=TXN_S,
        )
        if not answer.succeeded:
            raise self._taken()

    # -------------------------------------------------------------- end

    async def _finish(self) -> int:
        """Makes it a state. Raises Internal where rows are missing."""
        keys = self._keys
        answer = await self._client.range(
            pb.RangeRequest(key=keys.rows, range_end=end_of(keys.rows), count_only=True),
            timeout_s=TXN_S,
        )
        errors.invariant(
            answer.count == self._written,
            f"{self._written} rows were written to {self._client.where}, and it has {answer.count}",
        )
        value = format_value(self._base)
        answer = await self._client.txn(
            pb.TxnRequest(
                compare=[at(keys.filling, self._mark), created(keys.format, 0)],
                success=[
                    put(keys.format, value),
                    put(keys.filled, self._digest.digest()),
                    delete(keys.filling),
                ],
                failure=[read(keys.format)],
            )
        )
        if not answer.succeeded:
            kvs = answer.responses[0].response_range.kvs
            # An earlier try may have got through without its answer.
            if not kvs or kvs[0].value != value:
                raise self._taken()
        return int(answer.header.revision) + self._base


async def _patiently(attempt: Callable[[], Awaitable[R]]) -> R:
    """Tries until it is done; for what may be done twice."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + PATIENCE_S
    while True:
        try:
            return await attempt()
        except (errors.Unavailable, errors.TimedOut) as error:
            if loop.time() > until_s:
                raise errors.Unavailable(error.message) from error
            log.info("etcd_fill_again", reason=error.message)
            await asyncio.sleep(RETRY_S)


def _first(failed: BaseExceptionGroup[Any]) -> BaseException:
    error = failed.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _first_of(keys: Keys) -> Any:
    """One key under the prefix, if there is any."""
    return pb.RequestOp(
        request_range=pb.RangeRequest(
            key=keys.all, range_end=end_of(keys.all), limit=1, keys_only=True
        )
    )


def _delete_range(start: bytes, end: bytes) -> Any:
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=start, range_end=end))


def _delete_after(keys: Keys) -> Any:
    return _delete_range(keys.filling + b"\0", end_of(keys.all))
