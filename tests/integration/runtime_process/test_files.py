"""Files into tasks of the process runtime and out of them."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from agent.runtime.base import PIECE_BYTES_MAX, Failed
from swarm import errors
from swarm.v1 import ContainerSpec
from tests.integration.runtime_process.conftest import Harness, harness, work

TREE = "mkdir d; cd d; echo hi > f; ln f g; ln -s /etc/passwd l; mkfifo p; ln -s d ../dl"
SLEEP = ("sh", "-c", f"({TREE}); touch made; exec sleep 100")
ROOT = os.geteuid() == 0


class Copying:
    """A task with a tree of files in its working folder."""

    def __init__(self, held: Harness, job: Any, base: str) -> None:
        self.held = held
        self.job = job
        self.base = base

    async def take(self, path: str) -> bytes:
        runtime = self.held.runtime
        pieces = [p async for p in runtime.archive(self.job.task_id, path)]
        assert all(len(p) <= PIECE_BYTES_MAX for p in pieces)
        return b"".join(pieces)

    async def put(self, path: str, data: bytes, **flags: bool) -> None:
        flags = {"keep_kind": False, "keep_owner": False, **flags}
        await self.held.runtime.extract(self.job.task_id, path, parts(data), **flags)

    async def sh(self, script: str) -> str:
        code, output = await self.held.execute(self.job, "sh", "-c", f"cd {self.base}; {script}")
        assert code == 0, output
        return output


async def parts(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


def archive(*entries: tarfile.TarInfo, data: bytes = b"", mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for entry in entries:
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def entry(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.fixture(
    params=[pytest.param(True, marks=pytest.mark.root), False], ids=["isolated", "plain"]
)
async def copying(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Copying]:
    async with harness(tmp_path / "state", isolate=request.param) as held:
        job = work(*SLEEP)
        await held.run(job)
        base = str(held.folder / "tasks" / job.task_id / "work")
        made = Copying(held, job, base)
        await made.sh("while ! [ -e made ]; do sleep 0.01; done")
        yield made


async def test_files_come_out_under_their_last_name_and_go_in_again(copying: Copying) -> None:
    base = copying.base
    data = await copying.take(f"{base}/d")
    assert names(data) == ["d", "d/f", "d/g", "d/l", "d/p"]
    assert names(await copying.take(f"{base}/d/.")) == [".", "./f", "./g", "./l", "./p"]
    assert names(await copying.take(f"{base}/dl")) == ["dl"]
    assert names(await copying.take(f"{base}/dl/"))[:2] == ["dl", "dl/f"]
    await copying.sh("mkdir e; echo old > e/x")
    await copying.put(f"{base}/e", data)
    await copying.put(f"{base}/e/../e", data)  # once more, over what is there
    said = await copying.sh("cd e/d; cat f g; readlink l; stat -c %F p; stat -c %h f; cat ../x")
    assert said == "hi\nhi\n/etc/passwd\nfifo\n2\nold\n"
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at_s = tar.getmember("d").mtime
    assert float(await copying.sh("stat -c %.Y e/d")) == pytest.approx(at_s)


async def test_what_is_at_a_path(copying: Copying) -> None:
    base = copying.base
    await copying.sh("chmod 4751 d/f; ln -s dl dll")

    async def look(path: str) -> Any:
        return await copying.held.runtime.file_stat(copying.job.task_id, path)

    file = await look(f"{base}/d/f")
    assert (file.name, file.size_bytes, file.mode) == ("f", 3, stat.S_IFREG | 0o4751)
    assert file.modified_at_ns > 10**18
    link = await look(f"{base}/dll")
    assert (stat.S_ISLNK(link.mode), link.link_target) == (True, f"{base}/d")
    assert (await look("/")).name == "/"
    assert stat.S_ISDIR((await look(f"{base}/dll/")).mode)
    assert await look("/nope") is None
    assert await look(f"{base}/d/f/x") is None


async def test_compressed_archives_are_unpacked(copying: Copying) -> None:
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        data = archive(entry("z", size=5), data=b"hello", mode=mode)
        await copying.put(copying.base, data)
        assert await copying.sh("cat z; rm z") == "hello"


HOSTILE: list[tuple[tuple[tarfile.TarInfo, ...], str]] = [
    ((entry("../x"),), "../x: the archive's entry leads out of its folder"),
    ((entry("a/../../x"),), "leads out of its folder"),
    (
        (entry("out", type=tarfile.SYMTYPE, linkname="/tmp"), entry("out/x")),
        "/out: is no folder, and links are not followed",
    ),
    ((entry("h", type=tarfile.LNKTYPE, linkname="../../x"),), "leads out of its folder"),
    ((entry("h", type=tarfile.LNKTYPE, linkname="dl/f"),), "/dl: is no folder, and links"),
    ((entry("dl/x"),), "/dl: is no folder, and links are not followed"),
    ((entry("d", type=tarfile.REGTYPE),), "/d: a folder is not replaced by a file"),
    ((entry("dl", type=tarfile.DIRTYPE),), "/dl: a file is not replaced by a folder"),
]


async def test_archives_lead_nowhere_else(copying: Copying) -> None:
    for entries, message in HOSTILE:
        with pytest.raises(Failed) as caught:
            await copying.put(copying.base, archive(*entries), keep_kind=True)
        assert message in caught.value.message


async def test_absolute_names_lie_in_the_folder(copying: Copying) -> None:
    await copying.put(copying.base, archive(entry("/etc/new", size=1), data=b"x"))
    assert await copying.sh("cat etc/new") == "x"


async def test_what_is_in_the_way_is_replaced_unless_kinds_are_kept(copying: Copying) -> None:
    await copying.put(copying.base, archive(entry("d"), entry("dl", type=tarfile.DIRTYPE)))
    assert await copying.sh("stat -c %F d dl") == "regular empty file\ndirectory\n"


async def test_copies_that_cannot_be_done_say_why(copying: Copying) -> None:
    base = copying.base
    data = await copying.take(f"{base}/d")
    for path, message in (
        ("/nope", "/nope: no such file or directory"),
        (f"{base}/d/f", "d/f: not a directory"),
    ):
        with pytest.raises(Failed, match=message):
            await copying.put(path, data)
    with pytest.raises(Failed, match="/nope: no such file or directory"):
        await copying.take("/nope")
    with pytest.raises(Failed, match="the archive is damaged, or broke off"):
        await copying.put(base, data[:2000])
    with pytest.raises(Failed, match="the archive is damaged"):
        await copying.put(base, b"x" * 1000)
    await copying.held.runtime.stop(copying.job.task_id, signal="SIGKILL", grace_s=0)
    with pytest.raises(Failed, match="the process runtime keeps no files of what has ended"):
        await copying.take("/etc")


async def test_archive_that_breaks_off_is_not_taken_for_whole(copying: Copying) -> None:
    data = archive(entry("one", size=100_000), entry("two", size=100_000), data=b"x" * 100_000)

    async def breaking() -> AsyncIterator[bytes]:
        yield data[:150_000]
        raise errors.Unavailable("the archive broke off before its end")

    with pytest.raises(errors.Unavailable, match="broke off before its end"):
        await copying.held.runtime.extract(
            copying.job.task_id, copying.base, breaking(), keep_kind=False, keep_owner=False
        )


async def test_end_of_the_task_breaks_a_copy_off(copying: Copying) -> None:
    await copying.sh("head -c 30000000 /dev/zero > big")
    pieces = copying.held.runtime.archive(copying.job.task_id, f"{copying.base}/big")
    isolated = bool(copying.held.runtime._powers.isolated)
    async with aclosing(pieces) as opened:  # type: ignore[type-var]
        await anext(opened)
        await copying.held.runtime.stop(copying.job.task_id, signal="SIGKILL", grace_s=0)
        if isolated:  # else the helper is a process of its own, and the file is still there
            with pytest.raises(Failed, match="the task ended"):
                async for _ in opened:
                    pass


async def test_large_files_are_streamed_and_may_be_given_up(copying: Copying) -> None:
    await copying.sh("head -c 40000000 /dev/zero > big")
    assert len(await copying.take(f"{copying.base}/big")) > 40_000_000
    pieces = copying.held.runtime.archive(copying.job.task_id, f"{copying.base}/big")
    async with aclosing(pieces) as opened:  # type: ignore[type-var]
        await anext(opened)
    assert names(await copying.take("/etc/passwd")) == ["passwd"]


@pytest.mark.root
async def test_copy_may_do_what_the_tasks_user_may(tmp_path: Path) -> None:
    async with harness(tmp_path / "state", isolate=True) as held:
        job = work("sleep", "100", container=ContainerSpec(user="1234:56"))
        await held.run(job)
        made = Copying(held, job, "/tmp")
        with pytest.raises(Failed, match="/etc/shadow: permission denied"):
            await made.take("/etc/shadow")
        with pytest.raises(Failed, match="permission denied"):
            await made.put("/etc", archive(entry("from-a-test")))
        await made.put("/tmp", archive(entry("mine", uid=77, gid=77)))
        assert await made.sh("stat -c %u:%g mine") == "1234:56\n"
        with pytest.raises(Failed, match="may not give files to user 77"):
            await made.put("/tmp", archive(entry("its", uid=77, gid=77)), keep_owner=True)
        # Its /tmp is not the host's.
        assert not Path("/tmp/mine").exists()


@pytest.mark.root
async def test_owners_are_kept_if_asked_and_the_tasks_capabilities_hold(tmp_path: Path) -> None:
    async with harness(tmp_path / "state", isolate=True) as held:
        job = work("sleep", "100")
        await held.run(job)
        made = Copying(held, job, "/tmp")
        await made.put("/tmp", archive(entry("its", uid=77, gid=78)), keep_owner=True)
        assert await made.sh("stat -c %u:%g its") == "77:78\n"
        job = work("sleep", "100", container=ContainerSpec(capability_drop=("ALL",)))
        await held.run(job)
        made = Copying(held, job, "/tmp")
        with pytest.raises(Failed, match="may not give files to user 77"):
            await made.put("/tmp", archive(entry("its", uid=77, gid=78)), keep_owner=True)
