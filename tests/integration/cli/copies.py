"""Copies to compare with Docker's: what is where before, which sources and destinations, and what
has changed after.

Both sides hold the same tree. `python -m tests.integration.cli.copies` runs `docker cp` for each
case on an engine of its own (root, deploy/testbed) and writes what Docker did to `copies.txt`,
which the tests hold swarmctl against: a line per case, of direction, options, source, destination
and either `error` or what is new, with kinds as `find -type` writes them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).with_name("copies.txt")
SOURCES = (
    *("file", "file/", "dir", "dir/", "dir/.", "link", "dlink", "dlink/", "dlink/."),
    *("broken", "missing", "-L link", "-L dlink", "-L dlink/.", "-L broken"),
)
DESTINATIONS = (
    *("new", "new/", "new/.", "into", "into/", "into/.", "old", "old/", "no/new"),
    *("to_into", "to_old", "to_new", "to_into/", "clash"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One copy."""

    into: bool
    follow: bool
    source: str
    destination: str

    def __str__(self) -> str:
        options = "-L" if self.follow else "--"
        return f"{'into' if self.into else 'out'} {options} {self.source} {self.destination}"


def cases() -> Iterator[Case]:
    for into in (True, False):
        for words in SOURCES:
            for destination in DESTINATIONS:
                yield Case(into, words.startswith("-L "), words.split()[-1], destination)


def plant(top: Path, mark: str) -> None:
    """The tree, whose files contain where they are from."""
    if top.exists():
        shutil.rmtree(top)
    for folder in ("dir/sub", "into", "clash/file", "clash/link"):
        (top / folder).mkdir(parents=True)
    for name in ("file", "dir/a", "dir/sub/b", "into/kept", "old", "clash/dir"):
        (top / name).write_text(f"{mark} {name}")
    for name, leads in (
        ("link", "file"),
        ("dlink", "dir"),
        ("dir/inner", "a"),
        ("broken", "nowhere"),
        ("to_into", "into"),
        ("to_old", "old"),
        ("to_new", "made"),
    ):
        (top / name).symlink_to(leads)


def listed(top: Path) -> dict[str, str]:
    """What is below a folder, by path."""
    found = {}
    for folder, folders, files in os.walk(top):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if path.is_symlink():
                text = f"l:{os.readlink(path)}"
            else:
                text = "d" if path.is_dir() else f"f:{path.read_text()}"
            found[str(path.relative_to(top))] = text
    return found


def change(before: dict[str, str], after: dict[str, str]) -> str:
    """What is new or different, in one line."""
    parts = [f"{path}={after[path]}" for path in sorted(after) if before.get(path) != after[path]]
    parts += [f"-{path}" for path in sorted(before) if path not in after]
    return "; ".join(parts) or "nothing"


def golden() -> dict[str, str]:
    """What Docker did, by case."""
    lines = GOLDEN.read_text().splitlines()
    return dict(line.split(" : ", 1) for line in lines if line and not line.startswith("#"))


def main() -> None:
    from deploy.testbed import Bed

    opened = Bed.open(f"copies-{os.getpid()}")
    try:
        (host,) = opened.docker_hosts(1)
        socket = {**os.environ, "DOCKER_HOST": f"unix://{host.docker_socket}"}
        work = Path(sys.argv[1])
        here, there = work / "here", work / "there"
        there.mkdir(parents=True)
        docker = (
            "docker",
            "run",
            "-d",
            "--name",
            "task",
            "-v",
            f"{there}:/w",
            "busybox",
            "sleep",
            "9999",
        )
        subprocess.run(docker, check=True, env=socket)
        version = subprocess.run(
            ("docker", "--version"), capture_output=True, text=True, check=True
        )
        lines = [f"# {version.stdout.strip()}; see copies.py"]
        for case in cases():
            plant(here, "here")
            for old in there.iterdir():
                shutil.rmtree(old)
            plant(there / "t", "there")
            ours, theirs = f"{here}/{case.source}", f"task:/w/t/{case.destination}"
            if not case.into:
                ours, theirs = f"task:/w/t/{case.source}", f"{here}/{case.destination}"
            options = ("-L",) if case.follow else ()
            changed = there / "t" if case.into else here
            before = listed(changed)
            done = subprocess.run(
                ("docker", "cp", *options, ours, theirs),
                env=socket,
                capture_output=True,
                check=False,
            )
            after = listed(changed)
            text = change(before, after)
            lines.append(f"{case} : {text if done.returncode == 0 else 'error'}")
            if done.returncode and text != "nothing":
                print(case, "error, but", text, done.stderr)
        GOLDEN.write_text("\n".join(lines) + "\n")
    finally:
        opened.down()


if __name__ == "__main__":
    main()
