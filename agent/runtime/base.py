"""What the worker asks of a runtime: prepare, start, stop and remove tasks, and say what became of
them.

A runtime keeps no desired state and decides nothing. Its names on the host (container name, cgroup,
state folder) carry the task id, so that after a restart of the agent, or of the machine, it finds
its tasks again. All methods may be called for different tasks at once; for one task the worker
calls them one after the other.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from swarm import errors
from swarm.v1 import (
    Assignment,
    ContainerStatus,
    EngineDescription,
    ExecInput,
    ExecOutput,
    ExecStart,
    FileStat,
    LogLine,
    LogOptions,
    Network,
    NetworkAttachment,
    PortConfig,
    Resources,
    TaskStats,
)

# Values of TaskStatus.cause: why a task went wrong where that is known for certain. The first ones
# say that another try at the same place is of no use, the next ones that another node may be
# better, the last ones what the task itself did.
IMAGE_MISSING = "image_missing"
IMAGE_DENIED = "image_denied"
UNSUPPORTED = "unsupported"
PROGRAM_MISSING = "program_missing"
IMAGE_UNREACHABLE = "image_unreachable"
DISK_FULL = "disk_full"
ENGINE_FAILED = "engine_failed"
UNHEALTHY = "unhealthy"
OOM = "oom"
# Characters of a healthcheck's output that go into a message.
OUTPUT_MAX = 200
# A value of RuntimeProblem.cause, beside DISK_FULL.
ENGINE_UNRESPONSIVE = "engine_unresponsive"


class Rejected(errors.SwarmError):
    """The task cannot run here as it is specified: no such image, bad option. Becomes state
    REJECTED, with the cause, one of those above, where it is known.
    """

    def __init__(self, message: str, *, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class Failed(errors.SwarmError):
    """The runtime could not do it this time. Becomes state FAILED, with the cause where it is
    known.
    """

    def __init__(self, message: str, *, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


def cause_of(error: OSError) -> str:
    """The cause that an error of the system amounts to; empty: none of those above."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DISK_FULL
    node = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EROFS)
    return ENGINE_FAILED if error.errno in node else ""


def failed_checks(count: int, output: str) -> str:
    """What is said of a healthcheck that has failed so often in a row; 0: not known."""
    output = " ".join(output.split())[:OUTPUT_MAX]
    if not count:
        return output
    return f"{count} check{'' if count == 1 else 's'} failed: {output}"


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A secret or config that appears inside the task."""

    target: str  # absolute path inside
    data: bytes
    uid: int = 0
    gid: int = 0
    mode: int = 0o444
    secret: bool = False  # must never reach a disk


@dataclass(frozen=True, slots=True)
class Work:
    """All that a runtime needs to run one task."""

    assignment: Assignment
    files: tuple[TaskFile, ...] = ()
    # By id: the networks that assignment.task.networks or spec.networks refer to.
    networks: Mapping[str, Network] = field(default_factory=dict)

    @property
    def task_id(self) -> str:
        task = self.assignment.task
        assert task is not None
        return task.id


@dataclass(frozen=True, slots=True)
class Started:
    """What is known once a task runs."""

    container: ContainerStatus
    # Address at which this host reaches the task's ports; empty: it has none.
    address: str = ""
    # Target port -> port at `address`, where they differ (tasks that share the host's network).
    port_map: Mapping[int, int] = field(default_factory=dict)
    host_ports: tuple[PortConfig, ...] = ()
    networks: tuple[NetworkAttachment, ...] = ()
    # False: it has a healthcheck that has not passed yet.
    healthy: bool = True
    # What the node could not do for it, for its status; empty: nothing.
    note: str = ""


class EventKind(Enum):
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to a running task without being asked for."""

    task_id: str
    kind: EventKind
    exit_code: int = 0
    message: str = ""  # "out of memory", the healthcheck's last output …
    cause: str = ""  # of an end, as in TaskStatus
    # Somebody else made it end, or the engine's own end did: exit code 0 is no success then.
    forced: bool = False


class Phase(Enum):
    """How far a task that was found on the host has come."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Found:
    """A task of this cluster that exists on the host; from `adopt`."""

    task_id: str
    phase: Phase
    started: Started | None = None  # set when running
    exit_code: int = 0
    message: str = ""
    cause: str = ""  # as in Event
    forced: bool = False


@dataclass(frozen=True, slots=True)
class Description:
    """What a runtime offers, for NodeDescription."""

    runtimes: tuple[str, ...]  # values of TaskSpec.runtime
    resources: Resources
    engine: EngineDescription | None = None
    warnings: tuple[str, ...] = ()  # what it cannot enforce, one sentence each
    # Where it keeps tasks, as this machine sees it; None: not to be seen from here.
    folder: Path | None = None


class Runtime(Protocol):
    """One way to run tasks on this host."""

    name: str  # "docker" or "process"

    async def connect(self) -> None:
        """Makes sure the runtime answers. Raises Unavailable with what to do about it."""
        ...

    async def ping(self) -> None:
        """Returns soon if the runtime answers. Raises Unavailable, TimedOut."""
        ...

    async def describe(self) -> Description: ...

    async def adopt(self) -> tuple[Found, ...]:
        """All tasks of this node that exist on the host; afterwards their events are reported."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """Events of all tasks until the runtime is closed; reconnects by itself, losing none."""
        ...

    async def prepare(self, work: Work) -> None:
        """Gets the image, makes volumes and networks, creates the task without starting it. Raises
        Rejected, Failed; Unavailable or TimedOut when nobody knows whether it was done, and then it
        may be called again once `adopt` has told what there is.
        """
        ...

    async def start(self, work: Work) -> Started:
        """Starts a prepared task. Raises as `prepare` does. A second call for a running task
        returns the same.
        """
        ...

    async def stop(self, task_id: str, *, signal: str, grace_s: float) -> int | None:
        """Signal, then SIGKILL after the grace period; returns the exit code, None if it never ran
        or is gone.
        """
        ...

    async def remove(self, task_id: str) -> None:
        """Removes all that `prepare` made for this task alone; does nothing if there is nothing."""
        ...

    async def release_network(self, network_id: str) -> None:
        """No task of this node uses the network any more: removes what was made for it."""
        ...

    def logs(self, task_id: str, options: LogOptions) -> AsyncIterator[LogLine]: ...

    def exec(
        self,
        task_id: str,
        start: ExecStart,
        stdin: AsyncIterator[ExecInput],
        left: asyncio.Event | None = None,
    ) -> AsyncGenerator[ExecOutput]:
        """Runs a command inside; the last output has `exit_code`. Where the caller closes this
        before, the command ends if the runtime can end it; but once `left` is set it goes on,
        whatever becomes of the agent. Raises Rejected when it cannot be run.
        """
        ...

    async def stats(self, task_id: str) -> TaskStats: ...

    async def file_stat(self, task_id: str, path: str) -> FileStat | None:
        """What is at the path inside the task, a link itself and not what it points to; None: there
        is nothing. Raises Failed, NotFound: there is no such task any more.
        """
        ...

    def archive(self, task_id: str, path: str) -> AsyncIterator[bytes]:
        """A tar archive of the file or folder, under its last name, in pieces of at most
        PIECE_BYTES_MAX; what is not given to its end is not whole. Raises NotFound, Failed.
        """
        ...

    async def extract(
        self,
        task_id: str,
        path: str,
        data: AsyncIterator[bytes],
        *,
        keep_kind: bool,
        keep_owner: bool,
    ) -> None:
        """Unpacks a tar archive in the folder `path`. An error, of `data` too, leaves what is
        unpacked until then. See CopyStart for the two flags. Raises NotFound, Failed.
        """
        ...

    async def close(self) -> None:
        """Lets go of the runtime; tasks go on."""
        ...


# Of an archive that comes out of a task. A stream keeps some tens of them in memory.
PIECE_BYTES_MAX = 128 * 1024
