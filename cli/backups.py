"""Backup files on this machine: written, checked and read piece by piece, sealed or not.

Owns the file's handling (private, whole or not there) and the passphrase. The formats are
swarm/backup.py and swarm/backup_seal.py; every byte that is written or read passes their checks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from swarm.backup import Header, Reader
from swarm.errors import Conflict, Denied, Invalid, NotFound, Unavailable

__all__ = ["Sink", "passphrase", "read", "summary", "verify"]

PIECE_BYTES: Final = 1 << 20
PASSPHRASE_BYTES_MAX: Final = 4096
_SEALED: Final = b"\xfe"  # how the store marks rows that only the manager can open


def passphrase(path: str) -> bytes | None:
    """The first line of a file; None: none was named. Raises Invalid, NotFound."""
    if not path:
        return None
    try:
        with open(path, "rb") as file:
            line = file.readline(PASSPHRASE_BYTES_MAX + 2).rstrip(b"\r\n")
    except FileNotFoundError:
        raise NotFound(f"--passphrase-file {path}: there is no such file") from None
    except OSError as error:
        raise Invalid(f"--passphrase-file {path}: {error.strerror or error}") from None
    if not line:
        raise Invalid(f"--passphrase-file {path}: its first line is empty")
    if len(line) > PASSPHRASE_BYTES_MAX:
        raise Invalid(f"--passphrase-file {path}: its first line is longer than 4096 bytes")
    return line


def read(path: str, secret: bytes | None) -> Iterator[bytes]:
    """The backup's bytes, opened where they are sealed; "-" is standard input. Raises Corrupt,
    Denied, NotFound, Invalid.
    """
    name = "standard input" if path == "-" else path
    with _source(path) as file:
        start = file.read(PIECE_BYTES)
        if not start.startswith(b"SWRMSEAL"):
            while start:
                yield start
                start = _more(file, name)
            return
        if secret is None:
            raise Denied(f"{name} is sealed with a passphrase; name its file: --passphrase-file")
        from swarm.backup_seal import Opener

        opener = Opener(secret, name=name)
        while start:
            yield opener.update(start)
            start = _more(file, name)
        yield opener.finish()


def _more(file: IO[bytes], name: str) -> bytes:
    try:
        return file.read(PIECE_BYTES)
    except OSError as error:
        raise Unavailable(f"{name} cannot be read: {error.strerror or error}") from None


@contextmanager
def _source(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such backup") from None
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror or error}") from None
    with file:
        yield file


def verify(path: str, secret: bytes | None) -> Header:
    """Reads all of it. Raises Corrupt as soon as something is wrong."""
    reader = Reader(name="standard input" if path == "-" else path)
    for data in read(path, secret):
        check_rows(reader, data)
    return reader.finish()


def check_rows(reader: Reader, data: bytes) -> None:
    """Takes bytes in, and looks into each row as far as a client can."""
    import msgspec

    for row in reader.feed(data):
        if row.value[:1] == _SEALED:
            continue
        try:
            found = msgspec.msgpack.decode(memoryview(row.value)[1:])
            sound = isinstance(found, dict) and found.get("id") == row.id
        except msgspec.DecodeError:
            sound = False
        if not sound:
            raise reader.corrupt(f"object {row.id!r} of table {row.table} cannot be read")


def summary(header: Header) -> str:
    """What a backup holds, in two lines."""
    from cli.times import rfc3339

    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(header.counts.items()))
    name = f" ({header.cluster_name})" if header.cluster_name else ""
    return (
        f"cluster {header.cluster_id}{name}, revision {header.revision}, "
        f"{rfc3339(header.time_ns)}, written by manager {header.node_id} ({header.version})\n"
        f"{header.rows} objects: {counts}"
    )


class Sink:
    """A backup being written to a file or to standard output; a context manager. What is not
    `done` at the end is removed: no half backup stays under the name.
    """

    def __init__(self, path: str, secret: bytes | None, *, force: bool) -> None:
        self._path = path
        self._part = Path(f"{path}.part")
        self._force = force
        self._reader = Reader(name="the backup as it came from the manager")
        self._sealing = None
        if secret is not None:
            from swarm.backup_seal import Sealing

            self._sealing = Sealing(secret)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Sink:
        """Raises Conflict when the file is there, Invalid when it cannot be made."""
        if self._path == "-":
            if sys.stdout.isatty():
                raise Invalid("standard output is a terminal; write to a file or a pipe")
            # Not through a buffer, which would be emptied when nobody can be told any more.
            self._file = open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)
            return self
        if os.path.lexists(self._path) and not self._force:
            raise Conflict(f"{self._path} exists; choose another name, or replace it with --force")
        try:
            self._part.unlink(missing_ok=True)
            fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Invalid(f"{self._part} cannot be written: {error.strerror or error}") from None
        self._file = os.fdopen(fd, "wb")
        return self

    def write(self, data: bytes) -> None:
        """Raises Corrupt for what is no whole backup, Unavailable when the disk refuses."""
        check_rows(self._reader, data)
        self._put(self._sealing.update(data) if self._sealing is not None else data)

    def done(self) -> Header:
        """All of it came: the file gets its name, and is on the disk."""
        header = self._reader.finish()
        if self._sealing is not None:
            self._put(self._sealing.finish())
        assert self._file is not None
        try:
            self._file.flush()
            if self._path != "-":
                os.fsync(self._file.fileno())
                self._file.close()
                self._part.replace(self._path)
                from swarm.files import sync_folder

                sync_folder(Path(self._path).absolute().parent)
        except OSError as error:
            raise self._failed(error) from None
        return header

    @property
    def taken(self) -> int:
        """Bytes of the backup itself."""
        return self._reader.taken

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> Unavailable:
        where = "standard output" if self._path == "-" else str(self._part)
        return Unavailable(
            f"{where} cannot be written: {error.strerror or error}; no backup was made"
        )

    def __exit__(self, *_: object) -> None:
        if self._path == "-" or self._file is None:
            return
        with suppress(OSError):  # what the disk did not take is gone anyway
            self._file.close()
        self._part.unlink(missing_ok=True)
