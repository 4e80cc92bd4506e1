"""Where on this machine files lie in memory only: the folders for secrets and configs.

What is in them can still be swapped out where the machine has unencrypted swap. It survives the
agent, not a restart of the machine.
"""

from __future__ import annotations

import os
from pathlib import Path

_MEMORY = ("tmpfs", "ramfs")


def memory_folder(name: str = "files") -> Path | None:
    """The first folder of this name that lies in memory and may be written; None: there is none.
    It may not exist yet.
    """
    candidates = [Path("/run/swarm") / name, Path(f"/dev/shm/swarm-{name}-{os.geteuid()}")]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.insert(1, Path(runtime) / "swarm" / name)
    for folder in candidates:
        nearest = next(p for p in (folder, *folder.parents) if p.exists())
        if filesystem(nearest) in _MEMORY and os.access(nearest, os.W_OK | os.X_OK):
            return folder
    return None


def covered_folders() -> tuple[Path, ...]:
    """The folders to hide from tasks that run as root and see the host's files, save for /dev/shm,
    which each has of its own. They are made, for what appears later would be in sight.
    """
    found = [memory_folder(name) for name in ("files", "process-files")]
    folders = tuple(f for f in found if f is not None and f.parent != Path("/dev/shm"))
    for folder in folders:
        # Tasks of other users look into their own folder only, whose name they are told.
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    return folders


def filesystem(path: Path) -> str:
    """The type of the file system that a path lies on."""
    wanted = os.path.realpath(path)
    best, kind = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        below = wanted == point or wanted.startswith(point.rstrip("/") + "/")
        if below and len(point) >= len(best):  # of mounts on one point the last one counts
            best, kind = point, rest.split()[0]
    return kind
