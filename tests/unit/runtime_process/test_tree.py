"""Unpacking while the task changes what is unpacked."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from agent.runtime.process import tree


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_link_put_in_the_place_of_what_was_unpacked_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    info = tarfile.TarInfo("it")
    info.type, info.mode, info.mtime = kind, 0o4777, 7
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(info)
    buffer.seek(0)
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("secret")
    victim.chmod(0o600)
    before = victim.stat()

    def swap(*_: object, **__: object) -> None:
        (folder / "it").rename(folder / "moved")
        (folder / "it").symlink_to(victim)

    monkeypatch.setattr(os, "chown", swap)
    root = os.open(folder, os.O_RDONLY)
    unpacking = tree._Unpacking(root, str(folder), keep_kind=False, keep_owner=True)
    # Of a folder it is noticed, as its time is set at the end.
    refused = pytest.raises(tree.Trouble, match="links are not followed")
    with (
        refused if kind == tarfile.DIRTYPE else contextlib.nullcontext(),
        tarfile.open(fileobj=buffer, mode="r|", tarinfo=tree._Entry) as tar,
    ):
        unpacking.take(tar)
    os.close(root)
    after = victim.stat()
    assert (stat.S_IMODE(after.st_mode), after.st_mtime_ns) == (0o600, before.st_mtime_ns)
