"""Secrets and configs as files in memory, to be bind-mounted read-only into containers.

They lie below a folder in memory (agent/runtime/memory.py), one folder per task, so that no secret
is ever written to a disk. Files survive the agent, not a restart of the machine, and neither do the
containers that use them. Of an ordinary user's engine root is that user, and owns what is root's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from agent.runtime.base import Failed, Rejected, TaskFile, cause_of


class Files:
    """The files of one node's tasks. Methods block; they are quick, for nothing is on a disk."""

    def __init__(self, node_id: str, root: Path | None) -> None:
        self._folder = None if root is None else root / node_id
        # Between a new task's folder and the removal of an empty node's one; from any thread.
        self._changing = threading.Lock()

    def write(self, task_id: str, files: Sequence[TaskFile]) -> tuple[tuple[str, str], ...]:
        """Writes a task's files anew; pairs of path here and inside. Raises Rejected, Failed."""
        if not files:
            return ()
        if self._folder is None:
            raise Rejected(
                "secrets and configs need a folder in memory, and neither /run nor /dev/shm is a "
                "tmpfs on this node; mount one on /run"
            )
        folder = self._folder / task_id
        try:
            self.remove(task_id)
            with self._changing:
                folder.mkdir(mode=0o700, parents=True)
            return tuple(
                (_write(folder / str(number), file), file.target)
                for number, file in enumerate(files)
            )
        except OSError as error:
            self.remove(task_id)
            raise Failed(
                f"secrets and configs cannot be written to {folder}: {error}",
                cause=cause_of(error),
            ) from None

    def remove(self, task_id: str) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder / task_id, ignore_errors=True)
            self._tidy(self._folder)

    def _tidy(self, folder: Path) -> None:
        # It fails where other tasks have files, or there never were any.
        with self._changing, contextlib.suppress(OSError):
            folder.rmdir()

    def keep(self, task_ids: Iterable[str]) -> None:
        """Removes the files of all other tasks."""
        if self._folder is None or not self._folder.exists():
            return
        for left in set(os.listdir(self._folder)) - set(task_ids):
            self.remove(left)
        self._tidy(self._folder)


def _write(path: Path, file: TaskFile) -> str:
    # Born closed; owner and mode come before the data.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as out:
        uid, gid = file.uid or os.geteuid(), file.gid or os.getegid()
        if (uid, gid) != (os.geteuid(), os.getegid()):
            try:
                os.fchown(handle, uid, gid)
            except PermissionError:
                raise Rejected(
                    f"{file.target}: owner {file.uid}:{file.gid} can be given only where swarmd "
                    "runs as root"
                ) from None
        os.fchmod(handle, file.mode)
        out.write(file.data)
    return str(path)
