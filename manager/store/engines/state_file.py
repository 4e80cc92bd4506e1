"""The embedded engine's file: made, locked, opened, and refused when it is not what it should be.

SQLite is lenient: an empty file is a new database to it, and one that another process has open is
shared. For the only copy of a cluster's state each of these is an error that names the file and
says what to do. Called by the embedded engine only; all of it blocks.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Final

import structlog

from manager.store.engine import Corrupt
from swarm import errors, files
from swarm.clock import Clock

log = structlog.get_logger("store.embedded")

APPLICATION_ID: Final = 0x5357524D  # "SWRM", in the file's header
FORMAT: Final = 1  # in the header's user_version; a file of a later format is refused
CHECKPOINT_PAGES: Final = 4_000  # 16 MB of WAL, folded into the file in some 50 ms
WAL_BYTES_MAX: Final = 64 << 20  # what a checkpoint leaves of a WAL that grew larger
CACHE_KIB: Final = 32 << 10

_SCHEMA: Final = f"""
CREATE TABLE facts(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE rows(tbl INTEGER NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL,
  value BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY(tbl, id));
INSERT INTO facts VALUES('revision', 0), ('epoch', 0);
PRAGMA application_id={APPLICATION_ID};
PRAGMA user_version={FORMAT};
"""
_MAGIC: Final = b"SQLite format 3\0"
_HEADER_BYTES: Final = 100


def lock(path: Path) -> int:
    """Takes the file for this process, with its folder where that is missing; returns the open lock
    file. Raises Unavailable when another process has it.

    The lock is not on the file itself: the kernel drops POSIX locks, which SQLite uses, when the
    process closes any descriptor of the file.
    """
    lock_path = _beside(path, ".lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _not_opened(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise errors.Unavailable(
            f"state file {path} is in use by process {owner}; stop that swarmd, or choose another "
            "folder with --state-dir"
        ) from error
    except OSError as error:
        os.close(fd)
        raise _not_opened(path, error) from error
    return fd


def open_locked(path: Path, clock: Clock) -> sqlite3.Connection:
    """Opens the file, or makes it where there is none. Raises Corrupt and Unavailable.

    After an unclean stop (a WAL is left) its pages are checked first: about 1 s for each GB.
    """
    db: sqlite3.Connection | None = None
    try:
        if not path.exists():
            _check_not_lost(path)
            _create(path)
        _check_header(path)
        unclean = size(_beside(path, "-wal")) > 0
        db = _connect(path)
        # Again: a later version's change of format may be in the WAL still.
        _check_format(path, _pragma(db, "application_id"), _pragma(db, "user_version"))
        if unclean:
            _check_pages(path, db, clock)
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, OSError):
            raise _not_opened(path, error) from error
        if isinstance(error, sqlite3.Error):
            raise reading_failed(path, error) from error
        raise
    return db


def fact(path: Path, db: sqlite3.Connection, name: str) -> int:
    """One of the numbers kept beside the rows."""
    try:
        found = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    except sqlite3.Error as error:
        raise reading_failed(path, error) from error
    if found is None:
        raise damaged(path, f"its {name} is missing")
    return int(found[0])


def sizes(path: Path, db: sqlite3.Connection) -> tuple[int, int]:
    """Bytes of the file and its WAL, and bytes of the pages that hold something."""
    pages = _pragma(db, "page_count") - _pragma(db, "freelist_count")
    return size(path) + size(_beside(path, "-wal")), pages * _pragma(db, "page_size")


def reading_failed(path: Path, error: sqlite3.Error) -> errors.SwarmError:
    """What is said when SQLite cannot read the file."""
    if is_damage(error):
        return damaged(path, str(error))
    return errors.Unavailable(
        f"state file {path} cannot be opened and read: {error}; see whether its disk is full or "
        "failing"
    )


def damaged(path: Path, problem: str) -> Corrupt:
    """What is said when the file is not as it was written."""
    return Corrupt(
        f"state file {path} is damaged: {problem}. Keep a copy of it and of {path.name}-wal, and "
        "restore the state from a backup; without one, move both away and make a new cluster"
    )


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the file's content is wrong, rather than its disk or its use."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    # SQLITE_ERROR: a table is missing.
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


def size(path: Path) -> int:
    """A file's bytes; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _check_not_lost(path: Path) -> None:
    wal = _beside(path, "-wal")
    if size(wal):
        raise Corrupt(
            f"state file {path} is gone, and its latest changes in {wal} are of no use "
            f"without it; restore the state from a backup, or move {wal} away as well to "
            "begin anew"
        )


def _create(path: Path) -> None:
    """Makes the file whole or not at all: a crash leaves at most `<file>.new`."""
    temporary = _beside(path, ".new")
    for suffix in ("", "-wal", "-shm", "-journal"):
        _beside(temporary, suffix).unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    db = _connect(temporary)
    try:
        db.executescript(_SCHEMA)
    finally:
        db.close()  # folds the WAL into it, synced
    temporary.replace(path)
    files.sync_folder(path.parent)
    files.sync_folder(path.parent.parent)  # the folder itself may be new


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        # Set before the WAL is first used, this also keeps the WAL's index out of a shared file.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
        db.execute("PRAGMA synchronous=FULL")
        # On macOS only F_FULLFSYNC reaches the medium; elsewhere these change nothing.
        db.execute("PRAGMA fullfsync=ON")
        db.execute("PRAGMA checkpoint_fullfsync=ON")
        db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA journal_size_limit={WAL_BYTES_MAX}")
        db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        synchronous = _pragma(db, "synchronous")
        if mode != "wal" or synchronous != 2:
            raise errors.Unavailable(
                f"SQLite keeps {path} in mode {mode}, synchronous {synchronous}, where a commit "
                "may be lost with the power; put the state on a local disk"
            )
    except BaseException:
        db.close()
        raise
    return db


def _pragma(db: sqlite3.Connection, name: str) -> int:
    (value,) = db.execute(f"PRAGMA {name}").fetchone()
    return int(value)


def _check_header(path: Path) -> None:
    """What SQLite would mend or misread in silence: an empty or short file is a new one to it."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC) or len(header) < _HEADER_BYTES:
        found = f"begins with {header[:16]!r}" if header else "is empty"
        raise damaged(path, f"it {found}, which no state file does")
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    pages = int.from_bytes(header[28:32], "big")
    # With a WAL beside it the file may rightly be shorter than its header says.
    if size(path) < pages * page_bytes and not size(_beside(path, "-wal")):
        raise damaged(path, f"it was cut off: {size(path)} bytes of {pages * page_bytes}")
    # Here and not only through SQLite, for opening would turn a foreign file to WAL.
    _check_format(
        path,
        int.from_bytes(header[68:72], "big", signed=True),
        int.from_bytes(header[60:64], "big", signed=True),
    )


def _check_format(path: Path, application: int, found: int) -> None:
    if application != APPLICATION_ID:
        raise Corrupt(
            f"{path} is a SQLite file of another program (application id "
            f"{application:#x}); move it away, or choose another folder with --state-dir"
        )
    if found > FORMAT:
        raise Corrupt(
            f"state file {path} has format {found}, and this version reads formats up to "
            f"{FORMAT}; start the version that wrote it, or a later one"
        )


def _check_pages(path: Path, db: sqlite3.Connection, clock: Clock) -> None:
    started_s = clock.monotonic_s()
    problems = [text for (text,) in db.execute("PRAGMA quick_check(5)") if text != "ok"]
    log.info(
        "state_checked_after_unclean_stop",
        file=str(path),
        bytes=size(path),
        seconds=round(clock.monotonic_s() - started_s, 3),
    )
    if problems:
        raise damaged(path, "; ".join(problems))


def _not_opened(path: Path, error: OSError) -> errors.Unavailable:
    return errors.Unavailable(
        f"state file {path} cannot be opened: {error.strerror} ({error.filename}); make the folder "
        "writable for swarmd, or choose another with --state-dir"
    )


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
