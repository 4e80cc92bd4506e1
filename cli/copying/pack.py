"""Local files as a tar archive, in pieces.

The archive has the form that Docker's CLI sends (moby's TarResource): POSIX pax, the entry itself
first, folders before what is in them, in order of name; of the path `a/.` the entries are called
`./…`. Links are entries of their own, never followed; a file with several names is packed once;
sockets are left out. A file that changes while it is read breaks the copy off where it got
shorter; what it grew by is left out.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

from cli.copying.rules import (
    Place,
    clean,
    keep_end,
    rebase,
    rebased,
    split_entry,
)
from swarm.errors import Denied, Invalid, NotFound, SwarmError

__all__ = ["packed", "problem", "source_place"]

PIECE_BYTES = 512 * 1024
_CAPABILITY = "security.capability"


def source_place(path: str, *, follow: bool) -> Place:
    """What is to be copied (CopyInfoSourcePath). Raises NotFound, Denied, Invalid."""
    absolute = keep_end(clean(os.path.join(os.getcwd(), path)), path)
    try:
        if follow:
            resolved, name = rebase(absolute, os.path.realpath(absolute, strict=True))
        else:
            folder, _, last = absolute.rpartition("/")
            resolved = f"{os.path.realpath(folder or '/', strict=True).rstrip('/')}/{last}"
            name = ""
            if absolute.endswith("/") and os.path.basename(absolute[:-1]) != os.path.basename(
                resolved.rstrip("/")
            ):
                name = os.path.basename(absolute[:-1])
        found = os.lstat(resolved)
    except OSError as error:
        raise problem(error, path) from None
    return Place(resolved, is_dir=stat.S_ISDIR(found.st_mode), rebase_name=name)


def packed(source: Place, rename: tuple[str, str] = ("", "")) -> Iterator[bytes]:
    """The archive. `rename`: what of the names becomes what. Raises operating errors."""
    folder, entry = split_entry(source.path)
    links: dict[tuple[int, int], str] = {}
    for path, name in _entries(Path(folder), entry):
        if source.rebase_name:
            # Of the path / the base is /, which is no part of a name.
            new = "" if source.rebase_name == "/" else source.rebase_name
            name = name.replace(entry, new, 1)
        if rename[0] != rename[1]:
            name = rebased(name, *rename)
        yield from _one(path, name, links)
    # Two blocks of zeros are the end (POSIX pax).
    yield bytes(1024)


def _entries(folder: Path, entry: str) -> Iterator[tuple[str, str]]:
    """Paths and the names that they have in the archive."""
    top = os.path.join(folder, entry)
    prefix = "" if entry == "/" else entry
    yield top, prefix or "/"
    if not stat.S_ISDIR(_lstat(top).st_mode):
        return
    waiting = [(top, prefix)]
    while waiting:
        path, name = waiting.pop()
        try:
            with os.scandir(path) as scan:
                found = sorted(scan, key=lambda item: item.name)
        except OSError as error:
            raise problem(error, path) from None
        below = []
        for item in found:
            inner = f"{name}/{item.name}".lstrip("/")
            yield item.path, inner
            if item.is_dir(follow_symlinks=False):
                below.append((item.path, inner))
        waiting += reversed(below)


def _one(path: str, name: str, links: dict[tuple[int, int], str]) -> Iterator[bytes]:
    found = _lstat(path)
    mode = found.st_mode
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = stat.S_IMODE(mode), int(found.st_mtime)
    info.uid, info.gid = found.st_uid, found.st_gid
    if stat.S_ISREG(mode):
        key = (found.st_dev, found.st_ino)
        if found.st_nlink > 1 and key in links:
            info.type, info.linkname = tarfile.LNKTYPE, links[key]
        else:
            links[key] = name
            yield from _file(path, info)
            return
    elif stat.S_ISDIR(mode):
        info.type, info.name = tarfile.DIRTYPE, f"{name.rstrip('/')}/"
    elif stat.S_ISLNK(mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif stat.S_ISFIFO(mode):
        info.type = tarfile.FIFOTYPE
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        info.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
    else:
        return  # a socket is its owner's
    yield _head(info)


def _file(path: str, info: tarfile.TarInfo) -> Iterator[bytes]:
    try:
        # Not a link, should somebody have put one here since.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            info.size = os.fstat(descriptor).st_size
            if _CAPABILITY in os.listxattr(descriptor):
                value = os.getxattr(descriptor, _CAPABILITY).decode("utf-8", "surrogateescape")
                info.pax_headers = {f"SCHILY.xattr.{_CAPABILITY}": value}
            yield _head(info)
            left = info.size
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                if not piece:
                    raise Invalid(
                        f"{path} got shorter while it was read; copy it when nothing writes to it"
                    )
                left -= len(piece)
                yield piece
    except OSError as error:
        raise problem(error, path) from None
    if info.size % tarfile.BLOCKSIZE:
        yield bytes(tarfile.BLOCKSIZE - info.size % tarfile.BLOCKSIZE)


def _head(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _lstat(path: str) -> os.stat_result:
    try:
        return os.lstat(path)
    except OSError as error:
        raise problem(error, path) from None


def problem(error: OSError, path: str) -> SwarmError:
    """What went wrong with a local path."""
    why = (error.strerror or str(error)).lower()
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{error.filename or path}: {why}")
    if isinstance(error, PermissionError):
        return Denied(f"{error.filename or path}: {why}")
    return Invalid(f"{error.filename or path}: {why}")
