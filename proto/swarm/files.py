"""Files that must be whole or not there; sockets' paths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

SOCKET_PATH_MAX: Final = 107  # bytes in sockaddr_un, less the final zero


def write_private(path: Path, data: bytes) -> None:
    """Replaces a file in one step, for its owner only; it is on the disk when this returns."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes names created, replaced or removed in a folder survive power loss."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
