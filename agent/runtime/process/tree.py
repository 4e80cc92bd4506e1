"""Reads and writes files for a copy, as the task itself would.

Runs in a helper process (mode `copy` of supervisor.py) that has entered the task's namespaces and
taken on its user and capabilities: what the kernel lets the task see and change is all that a copy
can, and a link cannot lead out of the task's root. Not in the task's cgroups, whose limits are not
for our memory. Nothing is imported once inside, for the files there are the task's.

Names and kinds of what is copied are as the engine's archive calls have them: an archive's entries
begin with the path's last name; into a folder, a file takes the place of a file, and folders are
merged. Beyond the engine: an archive's own links are never written through.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from typing import IO, Any, Self

# Needed to read compressed archives, which tarfile loads when it meets one.
import bz2 as _bz2  # noqa: F401  # isort: skip
import lzma as _lzma  # noqa: F401  # isort: skip
import zlib as _zlib  # noqa: F401  # isort: skip

BLOCK_BYTES = 256 * 1024
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Their names come from files and libraries inside, which are not ours to run.
tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined]


_Truncated: type[tarfile.TarError] = tarfile.TruncatedHeaderError  # type: ignore[attr-defined]
_Invalid: type[tarfile.TarError] = tarfile.InvalidHeaderError  # type: ignore[attr-defined]


class Trouble(Exception):
    """What went wrong, for people."""


def run(order: dict[str, Any]) -> str:
    """Carries an order out on standard input and output. Returns what went wrong; empty: all
    done.
    """
    try:
        match order["what"]:
            case "stat":
                os.write(1, json.dumps(look(order["path"])).encode())
            case "archive":
                pack(order["path"])
            case "extract":
                unpack(order["path"], keep_kind=order["keep_kind"], keep_owner=order["keep_owner"])
    except Trouble as trouble:
        return str(trouble)
    except BrokenPipeError:
        return "nobody reads the archive any more"
    except OSError as error:
        name = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"{name}{(error.strerror or str(error)).lower()}"
    except tarfile.TarError as error:
        return f"what came is no whole tar archive: {error}"
    except Exception as error:  # or nobody would hear of it
        return f"defect in the copying process: {error!r}"
    return ""


def absolute(path: str) -> str:
    """Cleaned and from the root; an end that says `the folder itself` (/ or /.) is kept."""
    clean = "/" + posixpath.normpath("/" + path).lstrip("/")
    if clean == "/":
        return "/"
    if posixpath.basename(path) == ".":
        return clean + "/."
    return clean + "/" if path.endswith("/") else clean


def last_name(path: str) -> str:
    """Of an absolute path; `/` of the root."""
    return posixpath.basename(path.rstrip("/")) or "/"


# ------------------------------------------------------------------ stat


def look(path: str) -> dict[str, Any] | None:
    """Of what is at the path, and where a link leads in the end; None: there is nothing."""
    path = absolute(path)
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    link = os.path.realpath(path) if stat.S_ISLNK(found.st_mode) else ""
    return {
        "name": last_name(path),
        "size_bytes": found.st_size,
        "mode": found.st_mode,
        "modified_at_ns": found.st_mtime_ns,
        "link_target": link,
    }


# ------------------------------------------------------------------ out of the task


def pack(path: str) -> None:
    """Writes the archive to standard output. What vanishes meanwhile is left out."""
    path = absolute(path)
    os.lstat(path)  # the one thing that must be there
    with (
        open(1, "wb", buffering=BLOCK_BYTES, closefd=False) as output,
        tarfile.open(fileobj=output, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for real, name in _walk(path, last_name(path)):
            try:
                info = tar.gettarinfo(real, name)
                if info is None:  # a socket, which no archive can hold
                    continue
                info.name = name.rstrip("/") or "/"
                if not info.isreg():
                    tar.addfile(info)
                    continue
                # No link that has been put there since, and no waiting for a FIFO's other end.
                handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            with open(handle, "rb", buffering=0) as file:
                found = os.fstat(handle)
                if not stat.S_ISREG(found.st_mode):
                    continue
                _add(tar, info, file, real)
                _forget(tar, (found.st_ino, found.st_dev) if found.st_nlink == 1 else None)


def _forget(tar: Any, inode: tuple[int, int] | None = None) -> None:
    """Tarfile remembers all entries, for those who ask again; a tree may have millions. Of a file
    with one name it need not remember the inode either.
    """
    tar.members.clear()
    tar.inodes.pop(inode, None)


def _add(tar: tarfile.TarFile, info: tarfile.TarInfo, file: IO[bytes], path: str) -> None:
    try:
        tar.addfile(info, file)
    except OSError as error:
        if error.errno is not None:
            raise
        raise Trouble(f"{path}: it became shorter while it was copied") from None


def _walk(path: str, name: str) -> Iterator[tuple[str, str]]:
    """A file, or a folder with all below it: where it is, and its name in the archive."""
    waiting = [(path, name)]
    while waiting:
        real, name = waiting.pop()
        yield real, name
        # A path that ends in a slash names what a link leads to.
        if not stat.S_ISDIR(_mode(real)):
            continue
        try:
            entries = sorted(os.listdir(real), reverse=True)
        except FileNotFoundError:
            continue
        waiting += [(posixpath.join(real, e), posixpath.join(name, e)) for e in entries]


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


# ------------------------------------------------------------------ into the task


def unpack(path: str, *, keep_kind: bool, keep_owner: bool) -> None:
    """Unpacks the archive on standard input in the folder."""
    path = absolute(path)
    root = os.open(path, _FOLDER)
    os.umask(0)
    try:
        with open(0, "rb", buffering=BLOCK_BYTES, closefd=False) as source:
            with tarfile.open(fileobj=source, mode="r|*", tarinfo=_Entry) as tar:
                _Unpacking(root, path, keep_kind=keep_kind, keep_owner=keep_owner).take(tar)
            while source.read(BLOCK_BYTES):
                pass  # padding behind the end
    finally:
        os.close(root)


class _Entry(tarfile.TarInfo):
    """An entry whose header must be whole: tarfile takes a damaged one for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except (_Truncated, _Invalid) as error:
            raise Trouble(f"the archive is damaged, or broke off: {error}") from None


class _Unpacking:
    """One archive on its way into one folder. Files are named relative to folders that are open, so
    that nothing that changes meanwhile leads elsewhere.
    """

    def __init__(self, root: int, path: str, *, keep_kind: bool, keep_owner: bool) -> None:
        self._root = root
        self._path = path
        self._keep_kind = keep_kind
        self._keep_owner = keep_owner
        self._times: list[tuple[list[str], float]] = []

    def take(self, tar: tarfile.TarFile) -> None:
        while (info := tar.next()) is not None:
            _forget(tar)
            words = _words(info.name)
            if not words:
                continue  # the folder itself
            parent = self._open(words[:-1], make=True)
            try:
                self._take_one(tar, info, parent, words)
            finally:
                os.close(parent)
        # At the end, for what is put into a folder changes its time.
        for words, at_s in reversed(self._times):
            folder = self._open(words, make=False)
            try:
                os.utime(folder, (at_s, at_s))
            finally:
                os.close(folder)

    def _open(self, words: list[str], *, make: bool) -> int:
        """A folder below the root, never through a link."""
        folder = os.dup(self._root)
        for number, word in enumerate(words):
            try:
                try:
                    below = os.open(word, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                except FileNotFoundError:
                    if not make:
                        raise
                    os.mkdir(word, 0o755, dir_fd=folder)
                    below = os.open(word, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                name = self._name(words[: number + 1])
                raise Trouble(f"{name}: is no folder, and links are not followed") from None
            finally:
                os.close(folder)
            folder = below
        return folder

    def _name(self, words: list[str]) -> str:
        return posixpath.join(self._path, *words)

    def _take_one(
        self, tar: tarfile.TarFile, info: tarfile.TarInfo, parent: int, words: list[str]
    ) -> None:
        name = words[-1]
        there = self._make_way(info, parent, name, words)
        if info.isdir():
            if not there:
                os.mkdir(name, 0o755, dir_fd=parent)
            folder = self._open(words, make=False)
            try:
                self._dress(info, folder, words)
            finally:
                os.close(folder)
            self._times.append((words, info.mtime))
        elif info.isreg():
            self._write(tar, info, parent, words)
        elif info.issym():
            os.symlink(info.linkname, name, dir_fd=parent)
            self._dress_name(info, parent, words)
        elif info.islnk():
            self._link(info, parent, name)  # its owner, mode and time are the other name's
        elif info.isfifo():
            os.mkfifo(name, info.mode & 0o777, dir_fd=parent)
            self._dress_name(info, parent, words)
        elif info.ischr() or info.isblk():
            kind = stat.S_IFCHR if info.ischr() else stat.S_IFBLK
            device = os.makedev(info.devmajor, info.devminor)
            os.mknod(name, kind | info.mode & 0o777, device, dir_fd=parent)
            self._dress_name(info, parent, words)
        else:
            raise Trouble(f"{info.name}: an entry of a kind that cannot be unpacked")

    def _make_way(self, info: tarfile.TarInfo, parent: int, name: str, words: list[str]) -> bool:
        """Removes what is in the way; whether it is a folder that is there already."""
        try:
            mode = os.lstat(name, dir_fd=parent).st_mode
        except FileNotFoundError:
            return False
        folder = stat.S_ISDIR(mode)
        if folder and info.isdir():
            return True
        if self._keep_kind and folder != info.isdir():
            one, other = ("folder", "file") if folder else ("file", "folder")
            raise Trouble(f"{self._name(words)}: a {one} is not replaced by a {other}")
        _remove(parent, name, folder=folder)
        return False

    def _write(
        self, tar: tarfile.TarFile, info: tarfile.TarInfo, parent: int, words: list[str]
    ) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        data = tar.extractfile(info)
        assert data is not None
        with open(os.open(words[-1], flags, 0o600, dir_fd=parent), "wb", buffering=0) as file:
            while block := data.read(BLOCK_BYTES):
                view = memoryview(block)
                try:
                    while view:
                        view = view[file.write(view) :]
                except OSError as error:
                    error.filename = self._name(words)
                    raise
            self._dress(info, file.fileno(), words)
            os.utime(file.fileno(), (info.mtime, info.mtime))

    def _link(self, info: tarfile.TarInfo, parent: int, name: str) -> None:
        target = _words(info.linkname)
        if not target:
            raise Trouble(f"{info.name}: a hard link to the folder itself")
        other = self._open(target[:-1], make=False)
        try:
            os.link(target[-1], name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(other)

    def _dress(self, info: tarfile.TarInfo, handle: int, words: list[str]) -> None:
        """Owner, then mode, which a change of owner takes bits from. By handle: the task may have
        put a link to some other file in its place meanwhile.
        """
        if self._keep_owner:
            with self._owning(info, words):
                os.chown(handle, info.uid, info.gid)
        os.chmod(handle, info.mode & 0o7777)

    def _dress_name(self, info: tarfile.TarInfo, parent: int, words: list[str]) -> None:
        """Of what cannot be opened, or not without consequences; it was made with its mode."""
        name = words[-1]
        if self._keep_owner:
            with self._owning(info, words):
                os.chown(name, info.uid, info.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, (info.mtime, info.mtime), dir_fd=parent, follow_symlinks=False)

    @contextlib.contextmanager
    def _owning(self, info: tarfile.TarInfo, words: list[str]) -> Iterator[None]:
        try:
            yield
        except PermissionError:
            raise Trouble(
                f"{self._name(words)}: the task's user may not give files to user {info.uid}; "
                "copy without keeping owners"
            ) from None


def _words(name: str) -> list[str]:
    """The parts of an entry's name. Raises Trouble when it leads out of the folder."""
    words = [word for word in name.split("/") if word not in ("", ".")]
    if ".." in words:
        raise Trouble(f"{name}: the archive's entry leads out of its folder")
    return words


def _remove(parent: int, name: str, *, folder: bool) -> None:
    """Removes a file, or a folder with all below it, never through a link."""
    if not folder:
        os.unlink(name, dir_fd=parent)
        return
    below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
    try:
        with os.scandir(below) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for entry, is_folder in found:
            _remove(below, entry, folder=is_folder)
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=parent)
