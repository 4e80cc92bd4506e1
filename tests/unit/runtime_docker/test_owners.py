"""Tar streams whose entries get another owner as they pass."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.runtime.base import Failed
from agent.runtime.docker.archive import unix_mode
from agent.runtime.docker.owners import given_to, owner_of

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1)
ENTRIES = st.lists(
    st.tuples(
        st.one_of(NAMES, st.integers(1, 400).map(lambda n: "n" * n)),
        st.one_of(st.binary(max_size=2000), st.sampled_from(["dir", "link", "hard"])),
        st.one_of(st.integers(0, 70_000), st.integers(8**7, 2**32 - 2)),
    ),
    max_size=6,
)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def made(entries: list[tuple[str, bytes | str, int]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, what, uid in entries:
            info = tarfile.TarInfo(name)
            info.uid = info.gid = uid
            info.uname, info.gname = "ada", "grüppe"
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            data = what if isinstance(what, bytes) else b""
            info.size = len(data)
            kinds = {"dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}
            if isinstance(what, str):
                info.type = kinds[what]
                info.linkname = "t" * 120 if what != "dir" else ""
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(data: bytes) -> list[tuple[object, ...]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [
            (i.name, i.type, i.linkname, i.size, i.mtime, (f := tar.extractfile(i)) and f.read())
            if i.isreg()
            else (i.name, i.type, i.linkname, i.size, i.mtime)
            for i in tar
        ]


def owners(data: bytes) -> set[tuple[int, int, str, str]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {(i.uid, i.gid, i.uname, i.gname) for i in tar}


def change(data: bytes, uid: int, gid: int, *, size: int = 700) -> bytes:
    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(data), size):
            yield data[at : at + size]

    async def run() -> bytes:
        return b"".join([p async for p in given_to(parts(), uid, gid)])

    return asyncio.run(run())


@given(ENTRIES, st.sampled_from(FORMATS), st.integers(1, 3000), st.sampled_from([0, 1000, 8**7]))
@settings(deadline=None, max_examples=80)
def test_all_is_as_it_was_but_the_owner(
    entries: list[tuple[str, bytes | str, int]], form: int, size: int, uid: int
) -> None:
    try:
        before = made(entries, form)
    except (ValueError, UnicodeError):
        return  # more than that format can say
    after = change(before, uid, 7, size=size)
    assert read(after) == read(before)
    assert owners(after) == ({(uid, 7, "", "")} if entries else set())


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_archives_are_unpacked_on_the_way(mode: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        info = tarfile.TarInfo("f")
        info.size = 100_000
        tar.addfile(info, io.BytesIO(bytes(100_000)))
    after = change(buffer.getvalue(), 5, 6, size=10)
    assert owners(after) == {(5, 6, "", "")}


@pytest.mark.parametrize("data", [b"x" * 2000, b"\x1f\x8b" + b"x" * 2000])
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(Failed, match="no tar archive|compression is damaged"):
        change(data, 1, 1)


PASSWD = "root:x:0:0:root:/:/bin/sh\nada:x:1001:1002::/:/bin/sh\n# comment\nbad:x:y:z::\n"
GROUP = "root:x:0:\nusers:x:100:ada\n"


@pytest.mark.parametrize(
    ("user", "numbers"),
    [
        ("", (0, 0)),
        ("0", (0, 0)),
        ("1001", (1001, 1002)),
        ("4711", (4711, 0)),
        ("4711:12", (4711, 12)),
        ("ada", (1001, 1002)),
        ("ada:users", (1001, 100)),
        ("ada:12", (1001, 12)),
        ("12:users", (12, 100)),
    ],
)
async def test_users_are_those_of_the_container(user: str, numbers: tuple[int, int]) -> None:
    async def file(path: str) -> str:
        return {"/etc/passwd": PASSWD, "/etc/group": GROUP}[path]

    assert await owner_of(user, file) == numbers


@pytest.mark.parametrize(
    ("user", "message"), [("bob", "user 'bob' is not in"), ("ada:bob", "group 'bob' is not in")]
)
async def test_unknown_users_are_refused(user: str, message: str) -> None:
    async def file(path: str) -> str:
        return {"/etc/passwd": PASSWD, "/etc/group": GROUP}[path]

    with pytest.raises(Failed, match=message):
        await owner_of(user, file)


@pytest.mark.parametrize(
    ("go", "unix"),
    [
        (0o644, 0o100644),
        (1 << 31 | 0o755, 0o040755),
        (1 << 27 | 0o777, 0o120777),
        (1 << 23 | 0o755, 0o104755),
        (1 << 31 | 1 << 20 | 0o777, 0o041777),
        (1 << 26 | 0o660, 0o060660),
        (1 << 26 | 1 << 21 | 0o666, 0o020666),
        (1 << 25 | 0o600, 0o010600),
        (1 << 24 | 0o600, 0o140600),
    ],
)
def test_modes_are_the_kernels(go: int, unix: int) -> None:
    assert unix_mode(go) == unix
