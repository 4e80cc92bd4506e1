"""`swarmctl cp` does what `docker cp` does, and nothing outside of what was named."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cli.commands.cp import Told, copy
from cli.copying.pack import packed, source_place
from cli.copying.rules import Target, base, clean, parent, split, split_entry
from cli.copying.unpack import Unpacked, unpack
from swarm.errors import Conflict, Invalid, SwarmError
from tests.integration.cli import copies
from tests.integration.cli.conftest import COMMAND, Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.fake_files import FakeFiles
from tests.integration.cli.screen import ScreenProcess


@pytest.fixture
def files(cluster: FakeCluster, tmp_path: Path) -> FakeFiles:
    (tmp_path / "task").mkdir()
    cluster.files = FakeFiles(tmp_path / "task")
    return cluster.files


class Connection:
    """Without a network between: there are hundreds of copies."""

    def __init__(self, control: FakeFiles) -> None:
        self.control = control


# Docker cannot unpack `folder/.` in what is a link to a folder and ends with a slash.
DOCKER_STUMBLES = {f"out {words}/. to_into/" for words in ("-- dir", "-- dlink", "-L dlink")}


@pytest.mark.parametrize("into", [True, False], ids=["into", "out"])
@pytest.mark.parametrize("words", copies.SOURCES)
async def test_every_copy_does_what_docker_does(
    files: FakeFiles, tmp_path: Path, words: str, *, into: bool
) -> None:
    golden = copies.golden()
    here, there = tmp_path / "here", files.root / "w" / "t"
    connection: Any = Connection(files)
    differ = []
    for case in copies.cases():
        if case.into is not into or words != f"{'-L ' * case.follow}{case.source}":
            continue
        copies.plant(here, "here")
        copies.plant(there, "there")
        ours, theirs = f"{here}/{case.source}", f"task:/w/t/{case.destination}"
        if not into:
            ours, theirs = f"task:/w/t/{case.source}", f"{here}/{case.destination}"
        changed = there if into else here
        before = copies.listed(changed)
        try:
            code = await copy(connection, ours, theirs, Told(quiet=True), follow=case.follow)
            assert code == 0
            did = copies.change(before, copies.listed(changed))
        except SwarmError:
            did = "error"
        if did != golden[str(case)] and str(case) not in DOCKER_STUMBLES:
            differ.append(f"{case}\n  docker: {golden[str(case)]}\n  here:   {did}")
    assert not differ, "\n".join(differ)


# ------------------------------------------------------------------ streams and results


def test_an_archive_on_standard_input_and_output(cli: Cli, files: FakeFiles) -> None:
    (files.root / "data").mkdir()
    (files.root / "data" / "big").write_bytes(os.urandom(300_000))
    done = cli.process("cp", "web:/data", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert tar.getnames() == ["data", "data/big"]
    (files.root / "other").mkdir()
    again = cli.process("cp", "-a", "-", "web:/other", stdin=done.stdout)
    assert again.returncode == 0, again
    assert again.stderr == b"Successfully copied 307kB to web:/other\n"
    copied = (files.root / "other" / "data" / "big").read_bytes()
    assert copied == (files.root / "data" / "big").read_bytes()
    start = files.starts[-1]
    assert (start.task, start.keep_owner, start.keep_kind) == ("web", True, True)
    nowhere = cli.process("cp", "-", "web:/data/big", stdin=done.stdout)
    assert (nowhere.returncode, b"must be a folder" in nowhere.stderr) == (2, True)


def test_quiet_says_nothing(cli: Cli, files: FakeFiles, tmp_path: Path) -> None:
    (files.root / "a").write_text("x")
    assert cli("cp", "-q", "web:/a", str(tmp_path / "b")).err == ""
    assert (tmp_path / "b").read_text() == "x"
    assert cli("cp", "web:/a", str(tmp_path / "b")).err == (
        f"Successfully copied 10.2kB to {tmp_path}/b\n"
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("a:/x", "b:/x"), "copying between tasks is not supported"),
        (("x", "y"), "name a task on one of the two sides"),
        (("./a:x", "y"), "name a task on one of the two sides"),
        (("a:", "y"), "give a path on both sides"),
        (("a:/none", "/tmp"), "a: /none: no such file or folder"),
        (("/none", "a:/tmp"), "/none: no such file or directory"),
        (("-", "a:/tmp/"), "must be a folder"),
        (("a:/x", "/no/such/folder/x"), "there is no folder /no/such/folder to copy to"),
        (("a:/x", "/dev/null"), "/dev/null is neither a folder nor a file"),
    ],
)
def test_what_makes_no_sense_is_refused(
    cli: Cli, files: FakeFiles, words: tuple[str, str], text: str
) -> None:
    answer = cli("cp", *words)
    assert answer.code in (2, 4, 12) and text in answer.err, answer
    assert "not complete" not in answer.err


def test_a_part_of_a_copy_is_no_success(cli: Cli, files: FakeFiles, tmp_path: Path) -> None:
    (files.root / "big").write_bytes(bytes(500_000))
    files.break_after = 200_000
    answer = cli("cp", "web:/big", str(tmp_path / "copy"))
    assert answer.code == 5
    assert (
        f"Warning: the copy is not complete: a part of it may be in {tmp_path}/copy" in answer.err
    )
    assert "Error: the task has ended" in answer.err
    (tmp_path / "large").write_bytes(bytes(2_000_000))
    answer = cli("cp", "-q", str(tmp_path / "large"), "web:/")
    assert answer.code == 5
    assert "the copy is not complete" in answer.err and "no space left" in answer.err


def test_a_file_that_gets_shorter_breaks_the_copy_off(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(bytes(2_000_000))
    pieces = packed(source_place(str(file), follow=False))
    for _ in range(2):
        next(pieces)
    os.truncate(file, 10)
    with pytest.raises(Invalid, match="got shorter while it was read"):
        list(pieces)


def test_an_archive_that_broke_off_here_is_not_ended(cli: Cli, files: FakeFiles) -> None:
    # The kernel says that it has 4096 bytes, and gives less.
    shorter = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not os.path.exists(shorter):
        pytest.skip(f"{shorter} is not here")
    answer = cli("cp", shorter, "web:/")
    assert answer.code == 2
    assert f"Error: {shorter} got shorter while it was read" in answer.err
    assert os.listdir(files.root) == []


def test_progress_is_drawn_on_a_terminal(cli: Cli, files: FakeFiles, tmp_path: Path) -> None:
    (files.root / "big").write_bytes(bytes(3_000_000))
    command = [*COMMAND, "cp", "web:/big", str(tmp_path / "copy")]
    with ScreenProcess(command, cli.environment(), columns=200) as process:
        process.expect(b"Copying to ")
        assert process.wait() == 0
        assert process.lines()[0] == f"Successfully copied 3.01MB to {tmp_path}/copy"


# ------------------------------------------------------------------ what is not trusted


def archive(*members: tuple[str, dict[str, Any]]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, fields in members:
            info = tarfile.TarInfo(name)
            data = fields.pop("data", b"")
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return io.BytesIO(out.getvalue())


EVIL = {"data": b"evil"}


@pytest.mark.parametrize(
    "members",
    [
        [("../out", EVIL)],
        [("a/../../out", EVIL)],
        [("link", {"type": tarfile.SYMTYPE, "linkname": ".."}), ("link/out", EVIL)],
        [("l", {"type": tarfile.SYMTYPE, "linkname": "{top}"}), ("l/out", EVIL)],
        [("l", {"type": tarfile.SYMTYPE, "linkname": "{top}/out"}), ("l", EVIL), ("l/x", EVIL)],
        [("hard", {"type": tarfile.LNKTYPE, "linkname": "../victim"}), ("hard", EVIL)],
        [("hard", {"type": tarfile.LNKTYPE, "linkname": "{top}/victim"})],
        [
            ("l", {"type": tarfile.SYMTYPE, "linkname": "{top}"}),
            ("hard", {"type": tarfile.LNKTYPE, "linkname": "l/victim"}),
        ],
        [("d", {"type": tarfile.DIRTYPE}), ("d", {"type": tarfile.SYMTYPE, "linkname": "{top}"})],
    ],
)
def test_nothing_is_written_outside(tmp_path: Path, members: list[tuple[str, Any]]) -> None:
    (tmp_path / "victim").write_text("safe")
    (tmp_path / "into").mkdir()
    copied = [
        (name, {k: v.format(top=tmp_path) if k == "linkname" else v for k, v in fields.items()})
        for name, fields in members
    ]
    with pytest.raises(SwarmError):
        unpack(archive(*copied), Target(str(tmp_path / "into")), Unpacked())
    assert sorted(os.listdir(tmp_path)) == ["into", "victim"]
    assert (tmp_path / "victim").read_text() == "safe"
    assert os.stat(tmp_path / "victim").st_nlink == 1


def test_absolute_names_are_below_the_folder(tmp_path: Path) -> None:
    unpack(archive(("/etc/x", {"data": b"1"})), Target(str(tmp_path)), Unpacked())
    assert (tmp_path / "etc" / "x").read_bytes() == b"1"


def test_what_was_a_link_here_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("safe")
    into = tmp_path / "into"
    into.mkdir()
    (into / "file").symlink_to(tmp_path / "victim")
    unpack(archive(("file", {"data": b"new"})), Target(str(into)), Unpacked())
    assert (into / "file").read_bytes() == b"new" and not (into / "file").is_symlink()
    assert (tmp_path / "victim").read_text() == "safe"
    (into / "folder").symlink_to(tmp_path)
    with pytest.raises(Conflict, match="is no folder"):
        unpack(archive(("folder", {"type": tarfile.DIRTYPE})), Target(str(into)), Unpacked())


def test_devices_are_left_out_and_dangerous_bits_dropped(
    cli: Cli, files: FakeFiles, tmp_path: Path
) -> None:
    held = archive(
        ("x", {"type": tarfile.DIRTYPE, "mode": 0o750, "mtime": 1000}),
        ("x/su", {"data": b"1", "mode": 0o6755, "mtime": 2000}),
        ("x/dev", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
        ("x/pipe", {"type": tarfile.FIFOTYPE, "mode": 0o640}),
        ("x/hard", {"type": tarfile.LNKTYPE, "linkname": "x/su"}),
    )
    (files.root / "x").mkdir()
    files.archive = held.getvalue()
    answer = cli("cp", "web:/x", str(tmp_path / "y"))
    assert answer.code == 1
    assert f"Warning: {tmp_path}/y/dev is a device node, and was not made\n" in answer.err
    assert "not complete" in answer.err and "Success" not in answer.err
    top = tmp_path / "y"
    assert sorted(os.listdir(top)) == ["hard", "pipe", "su"]
    assert (top / "su").stat().st_mode & 0o7777 == 0o755 and (top / "su").stat().st_nlink == 2
    assert (top.stat().st_mode & 0o7777, top.stat().st_mtime) == (0o750, 1000)
    assert (top / "pipe").is_fifo()


def test_names_of_any_bytes_and_links_and_holes_come_through(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    strange = os.fsencode(str(source)) + b"/\xff\n" + b"n" * 200
    Path(os.fsdecode(strange)).write_text("1")
    (source / "hard").hardlink_to(os.fsdecode(strange))
    (source / "dangling").symlink_to("../../nowhere")
    (source / "empty").touch()
    (source / "folder").mkdir(mode=0o500)
    data = b"".join(packed(source_place(f"{source}/.", follow=False)))
    (tmp_path / "copy").mkdir()
    done = Unpacked()
    unpack(io.BytesIO(data), Target(str(tmp_path / "copy")), done)
    assert sorted(os.listdir(os.fsencode(tmp_path / "copy"))) == sorted(
        os.listdir(os.fsencode(source))
    )
    assert (tmp_path / "copy" / "hard").stat().st_nlink == 2
    assert os.readlink(tmp_path / "copy" / "dangling") == "../../nowhere"
    assert (tmp_path / "copy" / "folder").stat().st_mode & 0o777 == 0o500
    listed = subprocess.run(("tar", "t"), input=data, capture_output=True, check=True)
    assert len(listed.stdout.splitlines()) == 6


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("web:/x", ("web", "/x")),
        ("/a:b", ("", "/a:b")),
        ("./a:b", ("", "./a:b")),
        ("../a:b", ("", "../a:b")),
        ("a", ("", "a")),
        ("web:x:y", ("web", "x:y")),
    ],
)
def test_an_argument_names_a_task_or_a_path(argument: str, meant: tuple[str, str]) -> None:
    assert split(argument) == meant


@pytest.mark.parametrize(
    ("path", "cleaned", "last", "folder", "entry"),
    [
        ("/a/b/", "/a/b", "b", "/a/b", ("/a", "b")),
        ("/a/b/.", "/a/b", ".", "/a/b", ("/a/b", ".")),
        ("a//../b", "b", "b", ".", (".", "b")),
        ("/..", "/", "..", "/", ("/", "/")),
        ("../x", "../x", "x", "..", ("..", "x")),
        ("", ".", ".", ".", (".", ".")),
        (".", ".", ".", ".", (".", ".")),
        ("/", "/", "/", "/", ("/", "/")),
    ],
)
def test_paths_are_go_s(
    path: str, cleaned: str, last: str, folder: str, entry: tuple[str, str]
) -> None:
    assert (clean(path), base(path), parent(path)) == (cleaned, last, folder)
    assert split_entry(path) == entry


def test_a_disk_that_takes_only_a_part_is_no_success(tmp_path: Path) -> None:
    data = archive(("file", {"data": bytes(1500)}))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(SwarmError, match="file"):
            unpack(data, Target(str(tmp_path)), Unpacked())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
