"""The small process that stands above each task of the process runtime, and outlives the agent.

One process per task, in a session of its own. It starts the task, writes its output to the log
files, carries out a stop that was asked for even if the agent has died since, ends what the task
leaves behind, and writes the exit code in one step. It never restarts anything.

Standard library only, started with `-I -S`: 12 ms and 3 MiB of its own memory instead of 40 ms and
15 MiB with the project's libraries. The modes are the first argument: `run` (plan on fd 0), `exec`
(plan on the fd given; standard streams are the command's), `copy` (as `exec`; standard streams are
an archive's) and `probe`.

Conversation with the agent on fd 0, a socket: the plan (marshal) and end of line; `pid N` once the
namespaces exist; `go` from the agent; `started` or `failed errno text`. After that the socket is
closed and files speak: `pids` (who runs), `stop` (signal and grace period, then SIGUSR1), `exit`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # C half of `signal`: see inside.py
import contextlib
import fcntl
import marshal
import os
import select
import sys
import time
import traceback
from collections.abc import Callable

from agent.runtime.process import inside as inside
from agent.runtime.process import leaving as leaving
from agent.runtime.process.inside import Plan

CHUNK_BYTES = 65_536
LINE_BYTES_MAX = 16_384  # Docker's; what is longer is written in pieces
SIGUSR1, SIGCHLD, SIGKILL = _signal.SIGUSR1, _signal.SIGCHLD, 9
EXIT_BYTES = 40  # more than an exit code and a time take
REAP_LIMIT_S = 10.0  # how long processes in the kernel's hands may delay the exit's report


# ------------------------------------------------------------------ log files


class LogWriter:
    """Numbered files in one folder; each line `<unix ns> <o|e> <data>`, or with O or E where the
    task's own line goes on in the next of that stream. The oldest go.
    """

    def __init__(self, folder: str, *, file_bytes_max: int, files_max: int, tty: bool) -> None:
        self._folder = folder
        self._tty = tty  # a terminal turns "\n" into "\r\n"
        self._file_bytes_max = file_bytes_max
        self._files_max = files_max
        self._number = 0
        self._size = 0
        self._fd = -1
        self._rest = {b"o": b"", b"e": b""}
        self._unfinished: set[bytes] = set()  # streams whose last line goes on
        self._lost = 0
        self._next()

    def feed(self, stream: bytes, data: bytes) -> None:
        """Takes output as it comes; whole lines are written, the rest is kept."""
        lines = (self._rest[stream] + data).split(b"\n")
        self._rest[stream] = lines.pop()
        if self._tty:
            lines = [line.removesuffix(b"\r") for line in lines]
        self._write(stream, lines)
        if len(self._rest[stream]) > LINE_BYTES_MAX:
            self._write(stream, [self._rest[stream]], ended=False)
            self._rest[stream] = b""

    def close(self) -> None:
        for stream, rest in self._rest.items():
            if rest or stream in self._unfinished:
                self._write(stream, [rest])
        os.close(self._fd)

    def _write(self, stream: bytes, lines: list[bytes], *, ended: bool = True) -> None:
        if not lines:
            return
        (self._unfinished.discard if ended else self._unfinished.add)(stream)
        now_ns = _now_ns()
        prefix, unfinished = b"%d %s " % (now_ns, stream), b"%d %s " % (now_ns, stream.upper())
        out = []
        for line in lines:
            for start in range(0, len(line) or 1, LINE_BYTES_MAX):
                last = ended and start + LINE_BYTES_MAX >= len(line)
                piece = line[start : start + LINE_BYTES_MAX]
                out.append((prefix if last else unfinished) + piece + b"\n")
        if self._lost:
            out.insert(0, b"%d e [%d bytes of output lost: disk full]\n" % (_now_ns(), self._lost))
            self._lost = 0
        block: list[bytes] = []
        for entry in out:
            if self._size and self._size + len(entry) > self._file_bytes_max:
                self._flush(block)
                block = []
                self._next()
            block.append(entry)
            self._size += len(entry)
        self._flush(block)

    def _flush(self, entries: list[bytes]) -> None:
        view = memoryview(b"".join(entries))
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            # The task must not stand still because its log cannot be written.
            self._lost += len(view)

    def _next(self) -> None:
        self._size = 0
        path = f"{self._folder}/{self._number + 1:08d}"
        try:
            fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError:
            if self._fd < 0:
                raise
            return  # no room for a new file: the old one grows by as much again
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._number += 1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._folder}/{self._number - self._files_max:08d}")


class NoLog:
    """For log driver `none`: the output is read, so that the task never blocks, and dropped."""

    def feed(self, stream: bytes, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass


def _now_ns() -> int:
    return time.time_ns()  # noqa: TID251  imports nothing of the project; only stamps log lines


# ------------------------------------------------------------------ run


def supervise() -> None:
    """Mode `run`: one task from its start to its exit file."""
    plan = _read_plan(0)
    os.setsid()
    os.chdir("/")
    for number in (_signal.SIGHUP, _signal.SIGINT, _signal.SIGTERM, _signal.SIGPIPE):
        _signal.signal(number, _signal.SIG_IGN)
    wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    for number in (SIGCHLD, SIGUSR1):
        _signal.signal(number, lambda *_: None)
    inside.prctl(inside.PR_SET_CHILD_SUBREAPER, 1)
    # Held by us and the task's init for life: tells an agent that restarts in the middle of a start
    # that the start goes on.
    try:
        lock = os.open(f"{plan['folder']}/lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        task = _Running(plan, wake_r)
    except OSError as error:
        _fail(error)
        return
    try:
        task.start()
    except OSError as error:
        _fail(error)
        task.kill_all()
        return
    code = task.follow()
    task.kill_all()
    task.finish(code)


def _fail(error: OSError) -> None:
    text = f"failed {error.errno or 0} {error.strerror or error}"
    if error.filename:
        text += f": {os.fsdecode(error.filename)}"
    with contextlib.suppress(OSError):  # the agent is gone; nobody waits for the reason
        os.write(0, text.replace("\n", " ").encode() + b"\n")


class _Running:
    """One task's processes, output and stop request."""

    def __init__(self, plan: Plan, wake: int) -> None:
        self._plan = plan
        self._wake = wake
        self._folder: str = plan["folder"]
        self._outputs: dict[int, bytes] = {}
        self._keep: list[int] = []  # write ends held open for the task's sake
        self._deadline: float | None = None
        self._signalled = 0
        self._main = 0
        log = plan["log"]
        self._log: LogWriter | NoLog = NoLog()
        if log is not None:
            self._log = LogWriter(
                f"{self._folder}/log", file_bytes_max=log[0], files_max=log[1], tty=plan["tty"]
            )

    def start(self) -> None:
        """Forks, and returns once the command runs. Raises OSError with the step that went
        wrong.
        """
        plan = self._plan
        stdio = self._streams()
        ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
        go_r, go_w = os.pipe2(os.O_CLOEXEC)
        error_r, error_w = os.pipe2(os.O_CLOEXEC)
        if plan["isolate"]:
            inside.unshare(inside.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            os.close(go_w)
            os.close(ready_r)
            _child(plan, stdio, ready_w, go_r, error_w)
        self._main = pid
        for fd in {*stdio, ready_w, go_r, error_w}:
            os.close(fd)
        if os.read(ready_r, 1):
            os.write(0, b"pid %d\n" % pid)
            if os.read(0, 3) != b"go\n":
                raise OSError(103, "the agent went away while it started the task")
            os.write(go_w, b"g")
        report = b""
        while data := os.read(error_r, 4096):
            report += data
        for fd in (ready_r, go_w, error_r):
            os.close(fd)
        if report:
            number, _, text = report.decode(errors="replace").partition(" ")
            raise OSError(int(number), text)
        self._write_file("pids", f"{_boot_id()} {_birth(os.getpid())} {_birth(pid)}\n")
        self._reserve_exit()
        with contextlib.suppress(OSError):  # the agent died: the next one finds the task running
            os.write(0, b"started\n")
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.close(null)

    def _streams(self) -> tuple[int, int, int]:
        if self._plan["tty"]:
            master, slave = os.openpty()
            os.set_blocking(master, False)
            self._outputs[master] = b"o"
            self._keep.append(master)
            return slave, slave, slave
        if self._plan["open_stdin"]:
            stdin, held = os.pipe2(os.O_CLOEXEC)
            self._keep.append(held)
        else:
            stdin = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        fds = [stdin]
        for stream in (b"o", b"e"):
            read, write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(read, False)
            self._outputs[read] = stream
            fds.append(write)
        return fds[0], fds[1], fds[2]

    def follow(self) -> int:
        """Pumps output and waits; returns the main process's exit code."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for fd in self._outputs:
            poll.register(fd, select.POLLIN)
        self._look_for_stop()
        while True:
            for fd, _ in poll.poll(self._wait_ms()):
                if fd == self._wake:
                    os.read(fd, 4096)
                    self._look_for_stop()
                elif not self._pump(fd):
                    poll.unregister(fd)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._deadline = None
                _kill(self._main, SIGKILL)
            if (code := self._reap()) is not None:
                return code

    def _wait_ms(self) -> int:
        if self._deadline is None:
            return -1
        return max(0, int((self._deadline - time.monotonic()) * 1000) + 1)

    def _pump(self, fd: int) -> bool:
        """Moves one chunk to the log; False at the end of the stream."""
        try:
            data = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            return True
        except OSError:  # a terminal whose other side is closed
            data = b""
        if not data:
            return False
        self._log.feed(self._outputs[fd], data)
        return True

    def _reap(self) -> int | None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid == self._main:
                return inside.exit_code(status)

    def _look_for_stop(self) -> None:
        """Obeys the `stop` file: a signal at once, SIGKILL after the grace period."""
        try:
            with open(f"{self._folder}/stop", encoding="ascii") as file:
                number, grace_s = file.read().split()
        except FileNotFoundError:
            return
        if self._signalled != int(number):
            self._signalled = int(number)
            _kill(self._main, self._signalled)
        deadline = time.monotonic() + float(grace_s)
        self._deadline = min(self._deadline or deadline, deadline)

    def kill_all(self) -> None:
        """Ends every process that is left: orphans become ours, so none can hide."""
        if self._main:
            _kill(self._main, SIGKILL)
        limit = time.monotonic() + REAP_LIMIT_S
        while time.monotonic() < limit:
            for pid in _children():
                _kill(pid, SIGKILL)
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                select.select([self._wake], [], [], 0.05)

    def finish(self, code: int) -> None:
        """Takes the last output and writes the exit file."""
        for fd in self._outputs:
            with contextlib.suppress(OSError):
                while data := os.read(fd, CHUNK_BYTES):
                    self._log.feed(self._outputs[fd], data)
        self._log.close()
        # Over what was reserved, without giving its place back first.
        self._write_file("exit", f"{code} {_now_ns()}\n".ljust(EXIT_BYTES), truncate=0)

    def _reserve_exit(self) -> None:
        """Takes the room for the exit file now, so that a full disk does not lose the exit code."""
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            handle = os.open(f"{self._folder}/exit.new", flags, 0o600)
            try:
                os.write(handle, b" " * EXIT_BYTES)
            finally:
                os.close(handle)

    def _write_file(self, name: str, text: str, truncate: int = os.O_TRUNC) -> None:
        path = f"{self._folder}/{name}"
        handle = os.open(path + ".new", os.O_CREAT | truncate | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        os.write(handle, text.encode())
        os.fsync(handle)
        os.close(handle)
        os.replace(path + ".new", path)


def _child(plan: Plan, stdio: tuple[int, int, int], ready: int, go: int, report: int) -> None:
    """The forked child: process 1 of the task's namespaces, or the task itself. Never returns."""
    try:
        try:
            inside.prctl(inside.PR_SET_PDEATHSIG, SIGKILL)
            groups = inside.open_groups(plan["cgroups"])
            if plan["isolate"]:
                inside.enter_namespaces(plan)
            os.write(ready, b"r")
            if not os.read(go, 1):
                os._exit(125)  # the supervisor died
            if plan["isolate"]:
                inside.settle_namespaces(plan)
            if not plan["init"]:
                inside.become(plan, stdio, groups)
            main = os.fork()
            if main == 0:
                inside.become(plan, stdio, groups)
        except OSError as error:
            text = error.strerror or str(error)
            if error.filename:
                text += f": {os.fsdecode(error.filename)}"
            os.write(report, f"{error.errno or 5} {text}".encode())
            os._exit(125)
        # Only the task may hold these: its output ends when it ends, `report` when it executes.
        for fd in {*stdio, report, *groups}:
            os.close(fd)
        os._exit(inside.run_init(main))
    except BaseException:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            os.write(report, b"5 defect in the supervisor; see supervisor.log in the task's folder")
        os._exit(125)


# ------------------------------------------------------------------ exec and probe


def execute(plan_fd: int, carry_out: Callable[[Plan], str] | None = None) -> None:
    """Mode `exec`: runs a command beside a task, in its namespaces, on this process's streams. Mode
    `copy`: does what `carry_out` does with the plan's order, as the task.
    """
    os.set_inheritable(plan_fd, False)
    plan = _read_plan(plan_fd)
    inside.prctl(inside.PR_SET_PDEATHSIG, _signal.SIGTERM)
    leavable = "drains" in plan
    says = leaving.stand_before(plan_fd, plan["drains"]) if leavable else -1
    try:
        outputs = leaving.Outputs(plan, says) if leavable else None
        groups = inside.open_groups(plan["cgroups"])
        spaces = [
            os.open(f"/proc/{plan['pid']}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            for name in plan["namespaces"]
        ]
        if _birth(plan["pid"]).split()[1] != plan["birth"]:
            raise OSError(3, "the task has ended")
        for fd in spaces:
            inside.setns(fd)
            os.close(fd)
    except OSError as error:
        _complain(error, plan_fd)
    main = os.fork()
    if main == 0:
        try:
            if carry_out is not None:
                inside.impersonate(plan)
                problem = carry_out(plan["order"])
                os.write(plan_fd, problem.encode(errors="replace")[:4096])
                os._exit(1 if problem else 0)
            inside.become(plan, (0, 1, 2), groups)
        except OSError as error:
            _complain(error, plan_fd)

    def end(*_: object) -> None:
        """The agent gave up or died: the command goes, with what it started."""
        for kill in (os.killpg, os.kill):  # it may not lead its group yet
            with contextlib.suppress(ProcessLookupError):
                kill(main, SIGKILL)

    _signal.signal(_signal.SIGTERM, end)
    if outputs is not None:
        outputs.follow(main, plan_fd, end)
    os.close(plan_fd)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os._exit(inside.exit_code(os.waitpid(main, 0)[1]))


def _complain(error: OSError, plan_fd: int) -> None:
    """Reports that the command could not be run, on the plan's socket; ends this process."""
    name = f": {os.fsdecode(error.filename)}" if error.filename else ""
    os.write(plan_fd, f"{error.strerror or error}{name}".encode())
    os._exit(127 if error.errno == 2 else 126)


def probe() -> None:
    """Mode `probe`: says in one line whether namespaces and mounts may be made; `ok` or why not."""
    try:
        inside.unshare(inside.CLONE_NEWPID | inside.CLONE_NEWNS | inside.CLONE_NEWIPC)
        inside.unshare(inside.CLONE_NEWUTS | inside.CLONE_NEWNET)
        inside.mount("", "/", flags=inside.MS_REC | inside.MS_SLAVE)
        inside.mount("probe", "/tmp", "tmpfs")
    except OSError as error:
        os.write(1, f"{error.strerror or error}\n".encode())
        return
    os.write(1, b"ok\n")


# ------------------------------------------------------------------ small things


def _read_plan(fd: int) -> Plan:
    """A length in eight bytes, then the plan."""
    size = int.from_bytes(_read_exactly(fd, 8), "big")
    plan: Plan = marshal.loads(_read_exactly(fd, size))
    return plan


def _read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = os.read(fd, min(size - len(data), 1 << 20))
        if not more:
            sys.exit(0)  # the agent went away before it said what to do
        data += more
    return data


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children() -> list[int]:
    me = os.getpid()
    try:
        with open(f"/proc/{me}/task/{me}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdigit() and _stat(int(name))[1] == str(me):
                    found.append(int(name))
        return found


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on: 0 state, 1 parent, 19 start time in ticks since boot."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _birth(pid: int) -> str:
    return f"{pid} {_stat(pid)[19]}"


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def main() -> None:
    """The process's entry; spawn.py says how it is started."""
    mode = sys.argv[1]
    if mode == "run":
        supervise()
    elif mode == "exec":
        execute(int(sys.argv[2]))
    elif mode == "copy":
        # Only here: it takes 20 ms.
        from agent.runtime.process import tree

        execute(int(sys.argv[2]), tree.run)
    else:
        probe()
