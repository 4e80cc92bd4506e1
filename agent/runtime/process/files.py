"""Secrets and configs of tasks that have no mounts of their own: a folder in memory per task.

The folder is below $XDG_RUNTIME_DIR, or /dev/shm; both are tmpfs, so that a secret reaches no disk.
A file lies in it at its target path; the task finds the folder's name in SWARM_FILES. Owners cannot
be set without root: files belong to the user that the task runs as.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from agent.runtime.base import Failed, TaskFile
from agent.runtime.process.fields import Powers


class Files:
    """Folders of this node's tasks."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id

    def problems(self, files: Sequence[TaskFile], powers: Powers) -> list[str]:
        """Why the files cannot be shown as asked."""
        found = []
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

    def write(self, task_id: str, files: Sequence[TaskFile]) -> Path:
        """Writes all files of a task; their folder. Raises Failed."""
        folder = self._base() / task_id
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700, parents=True)
            for file in files:
                path = folder / file.target.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                with os.fdopen(handle, "wb") as stream:
                    stream.write(file.data)
                    if os.geteuid() == 0:
                        os.fchown(handle, file.uid, file.gid)
                    os.fchmod(handle, file.mode)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise Failed(
                f"cannot write secrets and configs to {folder}: {error.strerror}"
            ) from None
        return folder

    def remove(self, task_id: str) -> None:
        folder = self._base() / task_id
        shutil.rmtree(folder, ignore_errors=True)
        for empty in (folder.parent,):
            try:
                empty.rmdir()
            except OSError:  # other tasks', or never made
                return

    def _base(self) -> Path:
        memory = os.environ.get("XDG_RUNTIME_DIR")
        root = Path(memory) if memory and os.access(memory, os.W_OK) else Path("/dev/shm")
        return root / f"swarm-files-{os.geteuid()}-{self._node_id}"
