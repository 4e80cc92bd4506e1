"""A task's folder: what the process runtime knows of a task across restarts of the agent.

    task.json      the record, written by the agent before the task starts
    lock           held by the supervisor and the task's init while either lives
    pids           boot id, supervisor and main process, each with its start time; by the supervisor
    stop           signal and grace period in seconds; by the agent
    exit           exit code and time; by the supervisor, last
    outcome.json   exit code and reason as they were reported; by the agent
    log/           output; work/ the working directory; volumes/ unnamed volumes; root/ mount point

A process is told by pid and start time within one boot, so that a pid that was given to another
process is never taken for the task.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from swarm.files import write_private
from swarm.v1 import HealthConfig, PortConfig

RECORD = "task.json"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent must know again. Fields are only ever added."""

    task_id: str
    version: int = 1
    address: str = ""
    leased: bool = False  # the address is of the node's bridge
    port_map: dict[int, int] = {}
    host_ports: tuple[PortConfig, ...] = ()
    isolated: bool = False
    namespaces: tuple[str, ...] = ()
    cwd: str = "/"
    env: dict[str, str] = {}
    credentials: dict[str, Any] = {}
    stop_signal: str = ""
    health: HealthConfig | None = None
    healthy: bool | None = None  # as last reported
    unhealthy: str = ""  # what was said of its health when that was reported last
    started_at_ns: int = 0
    files_dir: str = ""  # secrets and configs of a task without mounts of its own


class Outcome(msgspec.Struct, frozen=True):
    """How it ended."""

    exit_code: int
    message: str = ""
    cause: str = ""  # as in TaskStatus


@dataclass(frozen=True, slots=True)
class Pids:
    """The processes of a task that was started."""

    supervisor: int
    supervisor_birth: str
    main: int
    main_birth: str


def birth(pid: int) -> str | None:
    """The start time of a process in ticks since boot; None: there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    words = stat.rpartition(")")[2].split()
    return None if words[0] in "ZX" else words[19]


def load_record(folder: Path) -> Record | None:
    """None: there is none that can be read."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=Record)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def save_record(folder: Path, record: Record) -> None:
    write_private(folder / RECORD, msgspec.json.encode(record))


def load_outcome(folder: Path) -> Outcome | None:
    try:
        return msgspec.json.decode((folder / "outcome.json").read_bytes(), type=Outcome)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def save_outcome(folder: Path, outcome: Outcome) -> None:
    write_private(folder / "outcome.json", msgspec.json.encode(outcome))


def load_exit(folder: Path) -> int | None:
    """The exit code that the supervisor wrote."""
    try:
        return int((folder / "exit").read_text().split()[0])
    except (FileNotFoundError, ValueError, IndexError):
        return None


def was_started(folder: Path) -> bool:
    return (folder / "pids").exists()


def load_pids(folder: Path) -> Pids | None:
    """None: it was never started, or in an earlier boot."""
    try:
        boot, *words = (folder / "pids").read_text().split()
        if boot != Path("/proc/sys/kernel/random/boot_id").read_text().strip():
            return None
        return Pids(int(words[0]), words[1], int(words[2]), words[3])
    except (FileNotFoundError, ValueError, IndexError):
        return None


def is_locked(folder: Path) -> bool:
    """Whether a supervisor holds the folder."""
    try:
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with os.fdopen(handle):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def request_stop(folder: Path, number: int, grace_s: float) -> None:
    """What the supervisor obeys once it gets SIGUSR1, or when it has started."""
    write_private(folder / "stop", f"{number} {grace_s:.3f}\n".encode())


def open_pidfd(pid: int, born: str) -> int | None:
    """A handle on exactly this process; None: it is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # The handle is on whoever has the pid now; the start time tells who that is.
    if birth(pid) == born:
        return handle
    with contextlib.suppress(OSError):
        os.close(handle)
    return None


def signal_main(pids: Pids | None, number: int) -> None:
    """Signals the main process without its supervisor."""
    handle = pids and open_pidfd(pids.main, pids.main_birth)
    if not handle:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)
