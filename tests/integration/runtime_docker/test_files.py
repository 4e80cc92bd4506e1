"""Files into containers and out of them."""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import AsyncIterator

import pytest

from agent.runtime.base import PIECE_BYTES_MAX, Failed, Work
from swarm import errors
from swarm.v1 import ContainerSpec
from tests.integration.runtime_docker.conftest import Harness

pytestmark = [pytest.mark.docker, pytest.mark.root]
TREE = (
    "mkdir -p /home/d && cd /home/d && echo hi > f && ln f g && ln -s /etc/passwd l && mkfifo p"
    " && ln -s d ../dl"
)


async def parts(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def take(docker: Harness, work: Work, path: str) -> bytes:
    pieces = [p async for p in docker.runtime.archive(work.task_id, path)]
    assert all(len(p) <= PIECE_BYTES_MAX for p in pieces)
    return b"".join(pieces)


async def put(
    docker: Harness,
    work: Work,
    path: str,
    data: bytes,
    *,
    keep_kind: bool = False,
    keep_owner: bool = False,
) -> None:
    await docker.runtime.extract(
        work.task_id, path, parts(data), keep_kind=keep_kind, keep_owner=keep_owner
    )


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


def one_file(name: str, data: bytes, uid: int, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        info = tarfile.TarInfo(name)
        info.size, info.uid, info.gid, info.uname = len(data), uid, uid, "somebody"
        tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


async def test_files_come_out_under_their_last_name_and_go_in_again(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    assert await docker.inside(work, "sh", "-c", TREE) == (0, "")
    data = await take(docker, work, "/home/d")
    assert names(data) == ["d", "d/f", "d/g", "d/l", "d/p"]
    assert names(await take(docker, work, "/home/d/.")) == [".", "./f", "./g", "./l", "./p"]
    assert names(await take(docker, work, "/home/dl")) == ["dl"]
    assert names(await take(docker, work, "/home/dl/"))[:2] == ["dl", "dl/f"]
    assert await docker.inside(work, "mkdir", "/home/e") == (0, "")
    await put(docker, work, "/home/e", data)
    said = (await docker.inside(work, "sh", "-c", "cd /home/e/d; cat f g; readlink l; ls -l"))[1]
    assert said.startswith("hi\nhi\n/etc/passwd\n")
    # What is stopped still has its files.
    await docker.runtime.stop(work.task_id, signal="SIGKILL", grace_s=0)
    assert names(await take(docker, work, "/home/e")) == ["e", *(f"e/{n}" for n in names(data))]
    await put(docker, work, "/home/e", data)


async def test_what_is_at_a_path(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    await docker.inside(work, "sh", "-c", TREE + "; ln -s dl ../dll; chmod 4751 f")
    look = docker.runtime.file_stat
    file = await look(work.task_id, "/home/d/f")
    assert file is not None
    assert (file.name, file.size_bytes, file.mode) == ("f", 3, stat.S_IFREG | 0o4751)
    assert file.modified_at_ns > 10**18
    link = await look(work.task_id, "/home/dll")
    assert link is not None
    assert (stat.S_ISLNK(link.mode), link.link_target) == (True, "/home/d")
    root = await look(work.task_id, "/")
    assert root is not None
    assert (root.name, stat.S_ISDIR(root.mode)) == ("/", True)
    assert await look(work.task_id, "/nope") is None
    assert await look(work.task_id, "/home/d/f/x") is None
    # Out of the container leads no link.
    await docker.inside(work, "ln", "-s", "../../../../../../../etc/shadow", "/home/out")
    out = await look(work.task_id, "/home/out")
    assert out is not None
    assert out.link_target == "/etc/shadow"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
async def test_files_belong_to_the_tasks_user_unless_owners_are_kept(
    docker: Harness, mode: str
) -> None:
    work, _ = await docker.run("sleep", "100", container=ContainerSpec(user="1234:56"))
    await docker.inside(work, "mkdir", "/tmp/in")
    await put(docker, work, "/tmp/in", one_file("mine", b"abc" * 1000, 77, mode))
    await put(docker, work, "/tmp/in", one_file("its", b"abc", 77, mode), keep_owner=True)
    said = await docker.inside(work, "stat", "-c", "%n %u:%g", "/tmp/in/mine", "/tmp/in/its")
    assert said == (0, "/tmp/in/mine 1234:56\n/tmp/in/its 77:77\n")


async def test_user_by_name_is_the_containers(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100", container=ContainerSpec(user="nobody"))
    await put(docker, work, "/tmp", one_file("x", b"", 0))
    code, uid = await docker.inside(work, "id", "-u")
    assert await docker.inside(work, "stat", "-c", "%u", "/tmp/x") == (code, uid)


async def test_copies_that_cannot_be_done_say_why(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    await docker.inside(work, "sh", "-c", TREE)
    data = await take(docker, work, "/home/d")
    with pytest.raises(errors.NotFound, match="/nope: no such file or folder in the task"):
        await take(docker, work, "/nope")
    with pytest.raises(errors.NotFound, match="/nope: no such file or folder in the task"):
        await put(docker, work, "/nope", data)
    with pytest.raises(Failed, match="extraction point is not a directory"):
        await put(docker, work, "/home/d/f", data)
    with pytest.raises(Failed, match="unexpected EOF"):
        await put(docker, work, "/home", data[:2000])
    with pytest.raises(Failed, match="cannot overwrite"):
        await put(docker, work, "/home/", one_file("d", b"", 0), keep_kind=True)
    with pytest.raises(Failed, match="what came is no tar archive"):
        await put(docker, work, "/home", b"x" * 1000)
    await docker.runtime.remove(work.task_id)
    with pytest.raises(errors.NotFound, match="no container on this node"):
        await take(docker, work, "/etc")


async def test_archive_that_breaks_off_ends_with_the_reason(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    data = one_file("big", b"x" * 100_000, 0)

    async def breaking() -> AsyncIterator[bytes]:
        yield data[:50_000]
        raise errors.Unavailable("the archive broke off before its end")

    with pytest.raises(errors.Unavailable, match="broke off before its end"):
        await docker.runtime.extract(
            work.task_id, "/tmp", breaking(), keep_kind=False, keep_owner=False
        )


async def test_large_files_are_streamed(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    await docker.inside(work, "sh", "-c", "head -c 40000000 /dev/zero > /tmp/big")
    total = 0
    async for piece in docker.runtime.archive(work.task_id, "/tmp/big"):
        total += len(piece)
    assert total > 40_000_000
    # Given up in the middle, the next one works all the same.
    pieces = docker.runtime.archive(work.task_id, "/tmp/big")
    async for _piece in pieces:
        break
    await pieces.aclose()  # type: ignore[attr-defined]
    assert names(await take(docker, work, "/etc/hostname")) == ["hostname"]
