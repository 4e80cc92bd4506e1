"""The audit trail of one node: who asked for what, when, from where, and what came of it.

Owns the records' file format, their bounded keeping and the reading of them. Servers hand every
call of an audited method, and every denied call, to `Trail.ended` (swarm/rpc.py does). The trail of
a node is the calls that this node answered; with several managers each has its own, and
`--audit-log` can gather them in one place.

    <folder>/audit-000007.jsonl      one JSON object a line, appended, the highest number is written

Durability: a record is queued when the call has ended and the answer waits until it is on the disk
(`written`), so an answered change is in the trail. A crash between a commit and its record loses
the record of a change that nobody was told of. What the disk refuses does not stop the cluster: the
change stands, the record waits in memory (PENDING_MAX, then the oldest go and a record says how
many), and `problem` says so until it is written. The state's own disk is usually the same one, and
refuses the changes itself then.

Never here: the data of secrets and configs, tokens, commands and their environment, messages of
errors (they repeat what was asked) but for those of denied calls, which are this project's own
words.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import structlog

from swarm import errors
from swarm.clock import SECOND_NS, Clock
from swarm.files import sync_folder
from swarm.ids import Rng, new_id
from swarm.v1.structs import AuditRecord

log = structlog.get_logger("audit")

FILE_BYTES_MAX: Final = 8 << 20
FILES_MAX: Final = 8  # 64 MiB: some 200,000 records
PENDING_MAX: Final = 10_000  # that the disk has not taken: some 5 MB
LINE_BYTES_MAX: Final = 16 << 10
RETRY_S: Final = 1.0
SYSLOG_S: Final = 5.0  # a daemon that takes nothing for so long is tried again later
WRITTEN_S_MAX: Final = 2.0  # an answer waits no longer for a disk that hangs
# Denied calls cost their caller nothing, so they must not push the trail's records out; nor may one
# caller's hide another's, so the first of each caller and method is written beyond that.
DENIED_WINDOW_S, DENIED_MAX, DENIED_FIRST_MAX = 10.0, 100, 1_000
READ_RECORDS: Final = 500
DAMAGED_MAX: Final = 20
_NAME = re.compile(r"audit-(\d{6,})\.jsonl")
_SYSLOG_PRIORITY: Final = 10 * 8 + 5  # authpriv.notice
FILTERS: Final = ("who", "what", "kind", "name", "object", "method", "outcome")


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Which records are wanted; see ListAuditRequest."""

    since_ns: int = 0
    until_ns: int = 0
    limit: int = 0
    filters: Mapping[str, frozenset[str]] = {}

    def passes(self, record: AuditRecord) -> bool:
        if record.time_ns < self.since_ns or (self.until_ns and record.time_ns >= self.until_ns):
            return False
        return all(_field(record, key) in values for key, values in self.filters.items())


def _field(record: AuditRecord, key: str) -> str:
    value: str = getattr(record, "object_id" if key == "object" else key)
    return value


class Trail:
    """The trail of one node. `open`, then keep `run` running; `put` from the event loop."""

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        rng: Rng,
        *,
        copies: Sequence[Copy] = (),
        file_bytes_max: int = FILE_BYTES_MAX,
        files_max: int = FILES_MAX,
    ) -> None:
        self._clock = clock
        self._rng = rng
        # Of the cluster this node is in; set by whoever knows.
        self.node_id = ""
        self._files = _Files(folder, file_bytes_max, files_max)
        self._own = _Outlet(str(folder), self._files.write, clock)
        self._outlets = (self._own, *(_Outlet(c.name, c.write, clock) for c in copies))
        self._window_s = 0.0
        self._denied = 0  # in this window
        self._denied_first: set[tuple[str, str]] = set()
        self._left_out = 0

    @property
    def problem(self) -> str:
        """What keeps records from being written; empty: nothing."""
        return "; ".join(o.problem for o in self._outlets if o.problem)

    def new_request_id(self) -> str:
        return new_id(self._rng)

    async def run(self) -> None:
        """Writes records until cancelled; then what is left, as far as the disk takes it."""
        for outlet in self._outlets:
            outlet.running = True
        try:
            async with asyncio.TaskGroup() as group:
                for outlet in self._outlets:
                    group.create_task(outlet.run())
        finally:
            for outlet in self._outlets:
                outlet.last()
            self._files.close()

    # -------------------------------------------------------------- records

    def ended(
        self,
        method: str,
        *,
        peer: str,
        who: str,
        request_id: str,
        notes: Mapping[str, object],
        error: BaseException | None,
    ) -> None:
        """A call has ended, well or with `error`."""
        outcome, told = _outcome(error)
        if outcome == "denied" and not self._room(who, method):
            return
        known = {
            k: notes[k] for k in ("what", "kind", "name", "object_id", "revision") if k in notes
        }
        more = {k: str(v) for k, v in notes.items() if k not in known}
        if outcome == "denied" and self._left_out:
            more["left_out"] = str(self._left_out)
            self._left_out = 0
        self.put(
            AuditRecord(
                time_ns=self._clock.now_ns(),
                request_id=request_id,
                node_id=self.node_id,
                who=who,
                peer=peer,
                method=method,
                outcome=outcome,
                error=told,
                more=more,
                **known,  # type: ignore[arg-type]  # as servicers note them
            )
        )

    def _room(self, who: str, method: str) -> bool:
        """Whether another denied call is written; the next one that is tells of the rest."""
        now_s = self._clock.monotonic_s()
        if now_s - self._window_s >= DENIED_WINDOW_S:
            self._window_s = now_s
            self._denied = 0
            self._denied_first.clear()
        if (who, method) not in self._denied_first and len(self._denied_first) < DENIED_FIRST_MAX:
            self._denied_first.add((who, method))
            return True
        self._denied += 1
        if self._denied <= DENIED_MAX:
            return True
        self._left_out += 1
        return False

    def put(self, record: AuditRecord) -> None:
        """Queues a record; see `written`."""
        line = encode(record)
        for outlet in self._outlets:
            outlet.put(line)

    async def written(self) -> None:
        """Waits until what was put is on the disk, or has been refused by it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(WRITTEN_S_MAX):
                await self._own.written()

    # -------------------------------------------------------------- reading

    async def read(self, query: Query) -> AsyncGenerator[tuple[list[AuditRecord], list[str]], None]:
        """The records that match, oldest first, in batches, with what cannot be read: file, line,
        why. Raises Invalid for a filter that is not known, Unavailable.
        """
        for key in query.filters:
            if key not in FILTERS:
                raise errors.Invalid(
                    f"invalid filter {key!r} for audit records; accepted are {', '.join(FILTERS)}"
                )
        await self.written()
        last: deque[AuditRecord] = deque(maxlen=query.limit or None)
        found = self._files.read(query)
        while (batch := await asyncio.to_thread(next, found, None)) is not None:
            records, damaged = batch
            if query.limit:
                last.extend(records)
                records = []
            if records or damaged:
                yield records, damaged
        kept = list(last)
        for at in range(0, len(kept), READ_RECORDS):
            yield kept[at : at + READ_RECORDS], []


def encode(record: AuditRecord) -> bytes:
    """One line. Too long a record loses `more`, then the end of its texts."""
    when = datetime.fromtimestamp(record.time_ns // SECOND_NS, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = record.time_ns % SECOND_NS
    head = {"time": f"{when}.{fraction:09d}Z"}
    line = msgspec.json.encode(head | msgspec.to_builtins(record))
    if len(line) > LINE_BYTES_MAX:
        texts = {
            f: value[:256]
            for f in record.__struct_fields__
            if isinstance(value := getattr(record, f), str)
        }
        short = msgspec.structs.replace(record, more={"shortened": "yes"}, **texts)
        line = msgspec.json.encode(head | msgspec.to_builtins(short))
    return line + b"\n"


_DECODER: Final = msgspec.json.Decoder(AuditRecord)


def _outcome(error: BaseException | None) -> tuple[str, str]:
    """Outcome and what is told of the error."""
    match error:
        case None:
            return "done", ""
        case errors.Denied():
            return "denied", f"{type(error).__name__}: {error.message}"
        case errors.TimedOut():
            return "unknown", "TimedOut"
        case asyncio.CancelledError() | GeneratorExit():
            return "unknown", "the caller left"
        case _:
            return "failed", type(error).__name__


# ------------------------------------------------------------------ writing


class _Outlet:
    """Takes lines to one place, in batches, one batch at a time."""

    def __init__(self, name: str, write: Callable[[Sequence[bytes]], None], clock: Clock) -> None:
        self._name = name
        self._write = write
        self._clock = clock
        self._pending: deque[bytes] = deque()
        self._lost = 0
        self._wake = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []
        self.running = False
        self.problem = ""

    def put(self, line: bytes) -> None:
        if len(self._pending) >= PENDING_MAX:
            self._pending.popleft()
            self._lost += 1
        self._pending.append(line)
        self._wake.set()

    async def written(self) -> None:
        """Returns once the next attempt to write has ended; at once where the last one failed."""
        if not self.running or self.problem or not (self._pending or self._waiters):
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    async def run(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                if not await self._attempt():
                    await asyncio.sleep(RETRY_S)
                    self._wake.set()
        finally:
            self.running = False
            self._release()

    async def _attempt(self) -> bool:
        batch = self._take()
        waiters, self._waiters = self._waiters, []
        writing = asyncio.ensure_future(asyncio.to_thread(self._write, batch))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})  # a thread cannot be cancelled
            if writing.exception() is not None:
                self._pending.extendleft(reversed(batch))
            raise
        except OSError as error:
            self._pending.extendleft(reversed(batch))
            self._failed(error)
            return False
        else:
            if self.problem:
                log.info("audit_written_again", to=self._name)
                self.problem = ""
            return True
        finally:
            self._release(waiters)

    def _take(self) -> list[bytes]:
        batch = list(self._pending)
        self._pending.clear()
        if self._lost:
            lost, self._lost = self._lost, 0
            record = AuditRecord(
                time_ns=self._clock.now_ns(), outcome="lost", more={"records": str(lost)}
            )
            batch.insert(0, encode(record))
        return batch

    def _failed(self, error: OSError) -> None:
        problem = (
            f"audit records cannot be written to {self._name}: {error.strerror or error}; "
            f"changes go on, up to {PENDING_MAX} records wait in memory. Free space on its disk, "
            "or see to what takes them"
        )
        if not self.problem:
            log.error("audit_not_written", to=self._name, reason=error.strerror or str(error))
        self.problem = problem

    def _release(self, waiters: Sequence[asyncio.Future[None]] | None = None) -> None:
        if waiters is None:
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def last(self) -> None:
        """Writes what is left, blocking; at the end of the daemon."""
        batch = self._take()
        if not batch:
            return
        try:
            self._write(batch)
        except OSError as error:
            log.error("audit_records_lost", to=self._name, records=len(batch), reason=str(error))


class _Files:
    """The numbered files of one folder. `write` is for one thread at a time."""

    def __init__(self, folder: Path, file_bytes_max: int, files_max: int) -> None:
        self._folder = folder
        self._bytes_max = file_bytes_max
        self._files_max = files_max
        self._number = 0
        self._size = 0
        self._fd = -1

    def write(self, lines: Sequence[bytes]) -> None:
        """Appends and syncs. Raises OSError; then nothing of it is there."""
        data = b"".join(lines)
        if self._fd < 0:
            self._open()
        if self._size and self._size + len(data) > self._bytes_max:
            self._next(self._number + 1)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError:
            with suppress(OSError):  # else a later line would follow the half of this one
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        """A later write opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        numbers = [n for n, _ in self._list()]
        self._next(numbers[-1] if numbers else 1)
        self._cut_torn()

    def _cut_torn(self) -> None:
        """A line that a crash left unfinished was answered to nobody."""
        data = os.pread(self._fd, LINE_BYTES_MAX + 1, max(0, self._size - LINE_BYTES_MAX - 1))
        if data and not data.endswith(b"\n"):
            torn = len(data) - (data.rfind(b"\n") + 1)
            os.ftruncate(self._fd, self._size - torn)
            self._size -= torn
            log.warning("audit_torn_line_cut", file=str(self._path(self._number)), bytes=torn)

    def _next(self, number: int) -> None:
        path = self._path(number)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.close()
        self._fd, self._number, self._size = fd, number, os.fstat(fd).st_size
        for _, old in self._list()[: -self._files_max]:
            old.unlink(missing_ok=True)
        sync_folder(self._folder)

    def _path(self, number: int) -> Path:
        return self._folder / f"audit-{number:06d}.jsonl"

    def _list(self) -> list[tuple[int, Path]]:
        found = []
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if match := _NAME.fullmatch(path.name):
                found.append((int(match[1]), path))
        return sorted(found)

    def read(self, query: Query) -> Iterator[tuple[list[AuditRecord], list[str]]]:
        """Batches of READ_RECORDS lines looked at, so that one step is short."""
        told = 0
        for _, path in self._list():
            records: list[AuditRecord] = []
            damaged: list[str] = []
            try:
                file = path.open("rb")
            except FileNotFoundError:  # rotated away meanwhile
                continue
            with file:
                for number, line in enumerate(file, 1):
                    try:
                        record = _DECODER.decode(line)
                    except msgspec.DecodeError as error:
                        told += 1
                        if told <= DAMAGED_MAX:
                            damaged.append(f"{path}, line {number}: {error}")
                        continue
                    if query.passes(record):
                        records.append(record)
                    if number % READ_RECORDS == 0:
                        yield records, damaged
                        records, damaged = [], []
            yield records, damaged


# ------------------------------------------------------------------ copies


@dataclass(frozen=True, slots=True)
class Copy:
    """Another place for the records; `write` blocks, raises OSError, and takes all or some."""

    name: str
    write: Callable[[Sequence[bytes]], None]


def copy_to(text: str) -> Copy:
    """`syslog:`, `syslog:SOCKET` or a file's path. Raises Invalid."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "syslog":
        if rest and not rest.startswith("/"):
            raise errors.Invalid(
                f"--audit-log {text!r}: write syslog: for /dev/log, or syslog:/path of a socket"
            )
        return Copy(text, _Syslog(rest or "/dev/log").write)
    if not text:
        raise errors.Invalid("--audit-log: name a file, or syslog:")
    return Copy(text, _Appended(Path(text).absolute()).write)


@dataclass(frozen=True, slots=True)
class _Appended:
    """A file that others rotate: opened anew for each batch, so that it may be moved away."""

    path: Path

    def write(self, lines: Sequence[bytes]) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            try:
                rest = memoryview(b"".join(lines))
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
            except OSError as error:
                # Not a file at all (a pipe, a terminal): there is nothing to sync.
                if not rest and error.errno in (22, 95):
                    return
                with suppress(OSError):
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class _Syslog:
    """The local syslog daemon's datagram socket, in the form of RFC 3164 that all of them read."""

    path: str

    def write(self, lines: Sequence[bytes]) -> None:
        tag = f"<{_SYSLOG_PRIORITY}>swarmd[{os.getpid()}]: ".encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
            daemon.settimeout(SYSLOG_S)
            daemon.connect(self.path)
            for line in lines:
                daemon.send(tag + line.rstrip(b"\n"))
