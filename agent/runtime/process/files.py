"""Secrets and configs of tasks that have no mounts of their own: a folder in memory per task.

A file lies in it at its target path; the task finds the folder's name in SWARM_FILES. The folder is
the task's user's, and nobody else's. Without root, owners cannot be set: files belong to the user
that the agent and its tasks run as.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from agent.runtime.base import Failed, TaskFile, cause_of
from agent.runtime.memory import memory_folder
from agent.runtime.process.fields import Powers


class Files:
    """Folders of this node's tasks. `root` lies in memory; None: found on this machine."""

    def __init__(self, node_id: str, root: Path | None = None) -> None:
        root = root or memory_folder("process-files")
        self._folder = None if root is None else root / node_id

    def problems(self, files: Sequence[TaskFile], powers: Powers) -> list[str]:
        """Why the files cannot be shown as asked."""
        found = []
        if files and self._folder is None and not powers.isolated:
            found.append(
                "secrets and configs need a folder in memory, and neither /run, $XDG_RUNTIME_DIR "
                "nor /dev/shm is a tmpfs that swarmd may write to; mount one on /run"
            )
        for file in files:
            path = Path(file.target)
            if not path.is_absolute() or ".." in path.parts or path == Path("/"):
                found.append(f'file "{file.target}": must be an absolute path below /')
            mine = (file.uid in (0, os.geteuid())) and (file.gid in (0, os.getegid()))
            if not powers.root and not mine:
                found.append(
                    f'file "{file.target}": owner {file.uid}:{file.gid} needs root on the node, '
                    f"and {powers.lack}"
                )
        return found

    def write(
        self, task_id: str, files: Sequence[TaskFile], *, uid: int | None, gid: int | None
    ) -> Path:
        """Writes all files of a task that runs as this user (None: as ours); their folder. Raises
        Failed.
        """
        if self._folder is None:
            raise Failed("there is no folder in memory for secrets and configs on this node")
        folder = self._folder / task_id
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700, parents=True)
            for file in files:
                path = folder / file.target.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                # Owner and mode come before the data.
                with os.fdopen(handle, "wb") as stream:
                    if os.geteuid() == 0:
                        os.fchown(handle, file.uid, file.gid)
                    os.fchmod(handle, file.mode)
                    stream.write(file.data)
            if os.geteuid() == 0:
                os.chown(folder, uid or 0, gid or 0)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise Failed(
                f"cannot write secrets and configs to {folder}: {error.strerror}",
                cause=cause_of(error),
            ) from None
        return folder

    def remove(self, task_id: str) -> None:
        if self._folder is None:
            return
        shutil.rmtree(self._folder / task_id, ignore_errors=True)
        with contextlib.suppress(OSError):  # other tasks', or never made
            self._folder.rmdir()

    def keep(self, task_ids: Collection[str]) -> None:
        """Removes the files of all other tasks: of those that an agent which died had begun."""
        if self._folder is None or not self._folder.exists():
            return
        for left in sorted(set(os.listdir(self._folder)) - set(task_ids)):
            self.remove(left)
