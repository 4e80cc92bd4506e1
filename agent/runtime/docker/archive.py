"""Files into and out of containers: the engine's archive calls, streamed.

The engine resolves paths inside the container's root, whether it runs or not, and its tar is passed
on as it is. GET, HEAD and PUT /containers/{id}/archive and the header with the path's facts are
Docker Engine API 1.40 and later; the header's mode is Go's os.FileMode, whose bits are those of
io/fs.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import stat
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator

from agent.runtime.base import PIECE_BYTES_MAX, Failed
from agent.runtime.docker.engine import Engine, Refusal
from agent.runtime.docker.events import inspect
from agent.runtime.docker.logs import parse_time
from agent.runtime.docker.owners import FILE_BYTES_MAX, given_to, owner_of
from swarm import errors
from swarm.v1 import FileStat

__all__ = ["archive", "extract", "file_stat", "unix_mode"]

HEADER = "X-Docker-Container-Path-Stat"
# The engine takes the next part, or answers after the last, within this; else it hangs.
IDLE_S_MAX = 120.0
# Two blocks of zeros end a tar archive (POSIX pax, "ustar Interchange Format").
_END = bytes(1024)
# io/fs.FileMode: type bits from the top, and the three that Unix has above the permissions.
_TYPES = {
    1 << 31: stat.S_IFDIR,
    1 << 27: stat.S_IFLNK,
    1 << 25: stat.S_IFIFO,
    1 << 24: stat.S_IFSOCK,
}
_DEVICE, _CHARACTER = 1 << 26, 1 << 21
_SPECIAL = {1 << 23: stat.S_ISUID, 1 << 22: stat.S_ISGID, 1 << 20: stat.S_ISVTX}


async def file_stat(engine: Engine, container_id: str, path: str) -> FileStat | None:
    """See Runtime."""
    try:
        headers = await engine.head(_call(container_id), params={"path": path})
    except Refusal as refusal:
        if refusal.status != 404:
            await _reason(engine, container_id, path)
            return None
        # The container, or the path in it.
        if await inspect(engine, container_id) is None:
            raise _gone() from None
        return None
    return _parsed(headers.get(HEADER, ""))


async def _reason(engine: Engine, container_id: str, path: str) -> None:
    """Asks again in a way that is answered in words. None: there is nothing at the path, which goes
    through what is no folder.
    """
    try:
        async with engine.stream("GET", _call(container_id), params={"path": path}):
            raise Failed(f"{path} cannot be looked at, and the engine does not tell why")
    except Refusal as refusal:
        if "not a directory" in refusal.message:
            return
        raise _refused(path, "cannot be looked at", refusal) from None


async def archive(engine: Engine, container_id: str, path: str) -> AsyncGenerator[bytes, None]:
    """See Runtime."""
    tail = b""
    try:
        async with engine.stream("GET", _call(container_id), params={"path": path}) as answer:
            while data := await engine.read(answer):
                tail = (tail + data[-len(_END) :])[-len(_END) :]
                for at in range(0, len(data), PIECE_BYTES_MAX):
                    yield data[at : at + PIECE_BYTES_MAX]
    except Refusal as refusal:
        raise _refused(path, "cannot be copied", refusal) from None
    # The engine ends its answer in order also when it could not go on.
    if tail != _END:
        raise Failed(f"{path}: the engine broke the archive off; see its log")


async def extract(
    engine: Engine,
    container_id: str,
    path: str,
    data: AsyncIterator[bytes],
    *,
    keep_kind: bool,
    keep_owner: bool,
) -> None:
    """See Runtime."""
    params = {"path": path}
    if keep_kind:
        params["noOverwriteDirNonDir"] = "1"
    if not keep_owner:
        data = given_to(data, *await _owner(engine, container_id))
    loop = asyncio.get_running_loop()
    broken: list[BaseException] = []
    try:
        async with asyncio.timeout(None) as limit:

            async def parts() -> AsyncIterator[bytes]:
                try:
                    async for part in data:
                        limit.reschedule(loop.time() + IDLE_S_MAX)
                        yield part
                        limit.reschedule(None)  # the sender may take its time
                except errors.SwarmError as error:
                    broken.append(error)
                    raise
                limit.reschedule(loop.time() + IDLE_S_MAX)

            async with engine.stream(
                "PUT",
                _call(container_id),
                params=params,
                data=parts(),
                headers={"Content-Type": "application/x-tar"},
                timeout_s=None,
            ):
                pass
    except Refusal as refusal:
        raise _refused(path, "cannot be copied to", refusal) from None
    except TimeoutError:
        raise errors.TimedOut(
            f"{path}: the engine has not gone on with the archive for {IDLE_S_MAX:g} s; see its log"
        ) from None
    except Exception:
        if broken:  # and not what the engine's client has made of it
            raise broken[0] from None
        raise


async def _owner(engine: Engine, container_id: str) -> tuple[int, int]:
    """Who the container runs as."""
    found = await inspect(engine, container_id)
    if found is None:
        raise _gone()

    async def read(path: str) -> str:
        return await _small_file(engine, container_id, path)

    return await owner_of(str(found["Config"].get("User") or ""), read)


async def _small_file(engine: Engine, container_id: str, path: str) -> str:
    """A file of the container; empty: there is none, or it is too large to be what it should."""
    data = b""
    try:
        async for piece in archive(engine, container_id, path):
            data += piece
            if len(data) > FILE_BYTES_MAX:
                return ""
    except errors.NotFound:
        return ""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            if info.isreg() and (file := tar.extractfile(info)) is not None:
                return file.read().decode(errors="replace")
    return ""


def _call(container_id: str) -> str:
    return f"containers/{container_id}/archive"


def _gone() -> errors.NotFound:
    return errors.NotFound("the task's container was removed")


def _refused(path: str, what: str, refusal: Refusal) -> errors.SwarmError:
    if refusal.status == 404:
        if "no such container" in refusal.message.lower():
            return _gone()
        return errors.NotFound(f"{path}: no such file or folder in the task")
    return Failed(f"{path} {what}: {refusal.message}")


def _parsed(header: str) -> FileStat:
    """Raises Failed."""
    try:
        said = json.loads(base64.b64decode(header))
        return FileStat(
            name=str(said["name"]),
            size_bytes=int(said["size"]),
            mode=unix_mode(int(said["mode"])),
            modified_at_ns=parse_time(str(said["mtime"])),
            link_target=str(said.get("linkTarget") or ""),
        )
    except (binascii.Error, ValueError, KeyError, TypeError) as error:
        raise Failed(f"the engine does not tell what is at the path ({error!r})") from None


def unix_mode(mode: int) -> int:
    """st_mode from Go's os.FileMode."""
    kind = next((unix for bit, unix in _TYPES.items() if mode & bit), 0)
    if not kind and mode & _DEVICE:
        kind = stat.S_IFCHR if mode & _CHARACTER else stat.S_IFBLK
    special = sum(unix for bit, unix in _SPECIAL.items() if mode & bit)
    return (kind or stat.S_IFREG) | special | mode & 0o777
