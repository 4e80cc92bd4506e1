"""A tar archive that came out of a task becomes local files, and never anything outside the folder
that was named.

Whoever runs in the task writes the archive, so nothing in it is trusted: names are walked part by
part below the folder's descriptor, no link on the way is followed, names with `..` are refused, and
a hard link's target is looked up in the same way. Links are made as they are but never gone
through. As in `docker cp` files belong to who copies them, permissions and times are kept, a folder
is not replaced by a file nor a file by a folder. Unlike there, set-user-id and set-group-id bits
are dropped from files, whose owner changes, and device nodes are not made: both would give what
runs in a task rights on this machine. What is left out is counted, and the copy is not complete
then.

Docker's rules: moby's archive.go, Unpack and createTarFile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from cli.copying.pack import problem
from cli.copying.rules import (
    Place,
    Target,
    asserts_dir,
    clean,
    join,
    keep_end,
    split_entry,
)
from swarm.errors import Conflict, Invalid, NotFound

__all__ = ["Unpacked", "destination_place", "unpack"]

LINKS_MAX = 10  # that a destination may lead over
PIECE_BYTES = 512 * 1024
_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Unpacked:
    """What became of an archive, so far."""

    entries: int = 0
    # What could not be made here, a sentence each.
    left_out: list[str] = field(default_factory=list)


def destination_place(path: str) -> Place:
    """Where a copy goes (ValidateOutputPath, CopyInfoDestinationPath). Raises NotFound, Denied,
    Invalid.
    """
    at = keep_end(clean(os.path.join(os.getcwd(), path)), path)
    folder = os.path.dirname(clean(at))
    try:
        if not os.path.isdir(folder):
            raise NotFound(f"there is no folder {folder} to copy to")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(at).st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise Invalid(f"{path} is neither a folder nor a file, so nothing is copied to it")
        for _ in range(LINKS_MAX):
            # A name that ends with a slash is looked up as what the link leads to.
            if not os.path.islink(at):
                break
            leads = os.readlink(at)
            at = leads if leads.startswith("/") else join(split_entry(at)[0], leads)
        else:
            raise Invalid(f"{path} leads over more than {LINKS_MAX} links")
        found = os.lstat(at)
    except FileNotFoundError:
        parent = split_entry(at)[0]
        if not os.path.isdir(parent):
            raise NotFound(f"there is no folder {parent} to copy to") from None
        return Place(at, exists=False)
    except NotADirectoryError:
        if asserts_dir(path):
            raise Invalid(f"{path} is a file, and no folder") from None
        raise NotFound(f"there is no folder {split_entry(at)[0]} to copy to") from None
    except OSError as error:
        raise problem(error, path) from None
    return Place(at, is_dir=stat.S_ISDIR(found.st_mode))


def unpack(archive: IO[bytes], into: Target, done: Unpacked) -> None:
    """Unpacks all of it; `done` grows. Raises Invalid, Conflict, Denied; what was unpacked before
    stays.
    """
    try:
        top = os.open(into.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise problem(error, into.folder) from None
    try:
        with tarfile.open(fileobj=archive, mode="r|", bufsize=PIECE_BYTES) as tar:
            _Unpacking(top, into, done).run(tar)
    except tarfile.TarError as error:
        raise Invalid(f"what comes out of the task is no tar archive: {error}") from None
    finally:
        os.close(top)


class _Unpacking:
    """One archive, below one open folder."""

    def __init__(self, top: int, into: Target, done: Unpacked) -> None:
        self._top = top
        self._into = into
        self._done = done
        # Folders' permissions and times, set when nothing is written into them any more.
        self._folders: list[tuple[str, int, float]] = []

    def run(self, tar: tarfile.TarFile) -> None:
        for member in tar:
            name = self._into.named(member.name + ("/" if member.isdir() else ""))
            where = _parts(name)
            shown = os.path.join(self._into.folder, *where)
            try:
                self._one(tar, member, where, shown)
            except FileExistsError:
                raise Conflict(f"{shown} was made by somebody else meanwhile") from None
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise Invalid(
                        f"{shown} would lead over a link or a file, and out of "
                        f"{self._into.folder} perhaps; nothing is written there"
                    ) from None
                error.filename = shown
                raise problem(error, shown) from None
            self._done.entries += 1
        for path, mode, changed in reversed(self._folders):
            with self._folder(_parts(path), make=False) as (descriptor, _):
                inner = os.open(path.rpartition("/")[2] or ".", _OPEN_DIR, dir_fd=descriptor)
                try:
                    os.fchmod(inner, mode)
                    os.utime(inner, (changed, changed))
                finally:
                    os.close(inner)

    def _one(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, where: list[str], shown: str
    ) -> None:
        if not where:
            return  # the folder itself, which exists
        with self._folder(where, make=True) as (folder, name):
            if not self._make_room(folder, name, shown, is_dir=member.isdir()):
                if member.isdir():
                    self._folders.append(("/".join(where), member.mode & 0o7777, member.mtime))
                return
            mode = member.mode & 0o777
            if member.isreg():
                self._file(tar, member, folder, name)
            elif member.isdir():
                os.mkdir(name, 0o700, dir_fd=folder)
                self._folders.append(("/".join(where), member.mode & 0o7777, member.mtime))
                return
            elif member.issym():
                os.symlink(member.linkname, name, dir_fd=folder)
            elif member.islnk():
                self._link(member, folder, name)
                return
            elif member.isfifo():
                os.mkfifo(name, mode, dir_fd=folder)
                os.chmod(name, mode, dir_fd=folder)
            else:
                what = "a device node" if member.isdev() else "of a kind that is not known here"
                self._done.left_out.append(f"{shown} is {what}, and was not made")
                return
            os.utime(name, (member.mtime, member.mtime), dir_fd=folder, follow_symlinks=False)

    def _make_room(self, folder: int, name: str, shown: str, *, is_dir: bool) -> bool:
        """Takes away what stands in the way; False: the folder is there already."""
        try:
            present = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return True
        if stat.S_ISDIR(present) and is_dir:
            return False
        if stat.S_ISDIR(present):
            raise Conflict(f"{shown} is a folder, and what is copied there is none")
        if is_dir:
            raise Conflict(f"{shown} is no folder, and what is copied there is one")
        os.unlink(name, dir_fd=folder)
        return True

    def _file(self, tar: tarfile.TarFile, member: tarfile.TarInfo, folder: int, name: str) -> None:
        data = tar.extractfile(member)
        assert data is not None, "a file has data"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=folder)
        with open(descriptor, "wb", buffering=0) as file:
            while piece := data.read(PIECE_BYTES):
                view = memoryview(piece)
                while view:  # a disk that gets full takes a part first
                    view = view[file.write(view) :]
            os.fchmod(descriptor, member.mode & 0o777)

    def _link(self, member: tarfile.TarInfo, folder: int, name: str) -> None:
        target = _parts(self._into.named(member.linkname))
        if not target:
            raise Invalid(f"{member.name} is a link to a folder")
        with self._folder(target, make=False) as (other, other_name):
            os.link(other_name, name, src_dir_fd=other, dst_dir_fd=folder, follow_symlinks=False)

    @contextlib.contextmanager
    def _folder(self, where: list[str], *, make: bool) -> Iterator[tuple[int, str]]:
        """The folder of an entry, open, and the entry's name in it. No link is followed."""
        descriptor = os.dup(self._top)
        try:
            for part in where[:-1]:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=descriptor)
                inner = os.open(part, _OPEN_DIR, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor, where[-1]
        finally:
            os.close(descriptor)


def _parts(name: str) -> list[str]:
    """Names from the folder on. Raises Invalid where it would leave the folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Invalid(f"the archive names {name!r}, which is outside; nothing is written there")
    return parts
