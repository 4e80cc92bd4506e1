"""The etcd binary of this machine: where it is, which version, whether it is of use."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from swarm import errors

INSTALL: Final = "install it with `apt-get install etcd-server`, or put `etcd` into PATH"
VERSION_MIN: Final = (3, 4)  # the first with members that do not vote yet
VERSION_S: Final = 5.0
_VERSION: Final = re.compile(r"etcd Version: (\S+)")


def binary() -> str | None:
    """Where etcd is; None: nowhere."""
    return shutil.which("etcd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/bin")


async def version(path: str | None = None) -> str:
    """Of etcd's binary, as "3.4.23"; empty where there is none, or it does not say. It is run once
    as long as it is the same file.
    """
    path = path or binary()
    if path is None:
        return ""
    try:
        changed_ns = Path(path).stat().st_mtime_ns
        return await asyncio.to_thread(_ask_version, path, changed_ns)
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.lru_cache(maxsize=8)
def _ask_version(path: str, changed_ns: int) -> str:
    del changed_ns  # of the key alone
    said = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=VERSION_S, check=True
    ).stdout
    found = _VERSION.search(said)
    return found[1] if found else ""


async def usable() -> str:
    """The binary's path. Raises Unsupported."""
    path = binary()
    if path is None:
        raise errors.Unsupported(f"several managers need etcd, and it is not here; {INSTALL}")
    found = await version(path)
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if numbers < VERSION_MIN:
        raise errors.Unsupported(
            f"{path} is etcd {found or 'of a version it does not tell'}; several managers need "
            f"{'.'.join(map(str, VERSION_MIN))} or later, for members that do not vote until they "
            f"have caught up; {INSTALL}"
        )
    return path
