"""Processes and cgroups of test hosts: started apart from this process, told by pid and start time,
ended for good.

A pid alone is not enough: it may belong to another process by the time a later run cleans up. So a
process is recorded with the tick at which it started (/proc/PID/stat, field 22).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
POLL_S = 0.01
KILL_TIMEOUT_S = 15.0
_ENDED = "ZX"  # states of a process that has ended and was not waited for


class TestbedError(Exception):
    """What went wrong on the test bed, and what to do."""

    __test__ = False


@dataclass(frozen=True, slots=True)
class Process:
    """One process, for sure."""

    pid: int
    start_tick: int

    def alive(self) -> bool:
        """Whether it still runs; one that ended and was not waited for does not count."""
        found = _stat(self.pid)
        return found is not None and found[1] == self.start_tick and found[0] not in _ENDED

    def signal(self, number: int) -> None:
        """Sends a signal if it still runs."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time."""
        return poll(lambda: _reap(self.pid) or not self.alive(), timeout_s)

    def end(self, *, grace_s: float) -> None:
        """SIGTERM, then SIGKILL."""
        self.signal(signal.SIGTERM)
        if not self.wait(grace_s):
            self.signal(signal.SIGKILL)
            if not self.wait(KILL_TIMEOUT_S):
                raise TestbedError(f"process {self.pid} does not end after SIGKILL")


def identify(pid: int) -> Process:
    """The process that has this pid now."""
    found = _stat(pid)
    if found is None:
        raise TestbedError(f"process {pid} is gone")
    return Process(pid, found[1])


def runs(pid: int) -> bool:
    """Whether a process has this pid that has not ended."""
    found = _stat(pid)
    return found is not None and found[0] not in _ENDED


def spawn(argv: Sequence[str | Path], *, output: Path, env: dict[str, str]) -> Process:
    """Starts a process in a session of its own; what it says is appended to a file."""
    with output.open("ab") as log:
        started = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
        )
    started.returncode = 0  # whoever brings the bed down ends it, perhaps another process
    return identify(started.pid)


def run(
    argv: Sequence[str | Path],
    *,
    check: bool = True,
    stdin: bytes | None = None,
    timeout_s: float = 60.0,
) -> str:
    """Runs a command; its standard output. Raises TestbedError with what it said."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, check=False, timeout=timeout_s
        )
    except FileNotFoundError:
        raise TestbedError(f"{words[0]} is not installed; `make test` installs it") from None
    except subprocess.TimeoutExpired:
        raise TestbedError(f"`{' '.join(words)}` did not end within {timeout_s:g} s") from None
    if check and done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise TestbedError(f"`{' '.join(words)}` ended with {done.returncode}: {said}")
    return done.stdout.decode(errors="replace")


def poll(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition came true within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


# ------------------------------------------------------------------ groups of processes


def cgroup_homes() -> tuple[Path, ...]:
    """The cgroup hierarchies in which a host's processes are kept together: those that no
    container engine or daemon moves its own processes out of. With cgroup v2 there is one.
    """
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return (CGROUP_ROOT,)
    found = tuple(CGROUP_ROOT / name for name in ("systemd", "unified"))
    return tuple(path for path in found if (path / "cgroup.procs").exists())


def enter_cgroup(pid: int, name: str) -> None:
    """Puts a process, and all that it will start, into the named cgroup."""
    for home in cgroup_homes():
        folder = home / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text(str(pid))


def cgroup_folders(name: str) -> list[Path]:
    """The cgroups of this name in all hierarchies, with those below, deepest first."""
    roots = [CGROUP_ROOT / name, *CGROUP_ROOT.glob(f"*/{name}")]
    folders = [
        Path(folder)
        for root in roots
        if root.is_dir()
        for folder, _, _ in os.walk(root, topdown=False)
    ]
    return sorted(set(folders), key=lambda path: -len(path.parts))


def processes_of(cgroup: str, namespaces: Iterable[tuple[str, str]]) -> set[int]:
    """Pids in the cgroup, in one of the namespaces (kind, identity), or descended from these."""
    found: set[int] = set()
    for folder in cgroup_folders(cgroup):
        with contextlib.suppress(OSError):
            found.update(int(pid) for pid in (folder / "cgroup.procs").read_text().split())
    wanted = set(namespaces)
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        with contextlib.suppress(OSError, ValueError):
            parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        if any(namespace(pid, kind) == identity for kind, identity in wanted):
            found.add(pid)
    for pid in parents:
        line = []
        ancestor = pid
        while ancestor > 1 and ancestor not in found:
            line.append(ancestor)
            ancestor = parents.get(ancestor, 0)
        if ancestor in found:
            found.update(line)
    found.discard(os.getpid())
    return found


def namespace(pid: int, kind: str) -> str:
    """The identity of a process' namespace; empty when it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def kill_all(cgroup: str, namespaces: Iterable[tuple[str, str]]) -> None:
    """Kills until nothing is left, then removes the cgroups."""
    wanted = tuple(namespaces)

    def gone() -> bool:
        left = processes_of(cgroup, wanted)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _reap(pid)
        return not any(runs(pid) for pid in left)

    if not poll(gone, KILL_TIMEOUT_S):
        left = sorted(processes_of(cgroup, wanted))
        raise TestbedError(f"processes {left} of {cgroup} do not end after SIGKILL")

    def removed() -> bool:
        for folder in cgroup_folders(cgroup):
            with contextlib.suppress(OSError):  # busy until the kernel has let go of the last one
                folder.rmdir()
        return not cgroup_folders(cgroup)

    if not poll(removed, KILL_TIMEOUT_S):
        raise TestbedError(f"cgroups {[str(p) for p in cgroup_folders(cgroup)]} are busy")


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def _reap(pid: int) -> bool:
    """Waits for the process if it is a child of this one that has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False
