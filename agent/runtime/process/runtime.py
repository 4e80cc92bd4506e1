"""The process runtime: tasks as host processes, with limits, namespaces and addresses of their own
where the agent may make them.

Owns the folders `tasks/<task id>` and `volumes/<name>` below its state folder, the node's cgroup
subtree, bridge and port numbers. Each task stands under a supervisor process (supervisor.py)
that outlives the agent; the agent watches supervisors by pidfd, reads what they write, and runs
healthchecks. Invariants: a task that runs has a record on disk from before it was started; an exit
is reported once per agent life and its outcome kept on disk; what is made for a task is named by
its id and goes with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import structlog

from agent.gpus import HandOver, Handover, as_claimed, given_to
from agent.ingress import LocalTarget
from agent.runtime.base import (
    ENGINE_FAILED,
    OOM,
    UNSUPPORTED,
    Description,
    Event,
    EventKind,
    Failed,
    Found,
    Phase,
    Rejected,
    Started,
    Work,
)
from agent.runtime.memory import covered_folders
from agent.runtime.process import archive as process_archive
from agent.runtime.process import cgroup as process_cgroup
from agent.runtime.process import checks as process_checks
from agent.runtime.process import exec as process_exec
from agent.runtime.process import fields as process_fields
from agent.runtime.process import health as process_health
from agent.runtime.process import logs as process_logs
from agent.runtime.process import plan as process_plan
from agent.runtime.process import ports as process_ports
from agent.runtime.process import spawn as process_spawn
from agent.runtime.process import state as process_state
from agent.runtime.process import stats as process_stats
from agent.runtime.process import task as process_task
from agent.runtime.process.events import Events
from agent.runtime.process.fields import Powers
from agent.runtime.process.files import Files
from agent.runtime.process.health import Schedule
from agent.runtime.process.net import DEFAULT_POOL, Bridge
from agent.runtime.process.plan import Layout, Ports
from agent.runtime.process.ports import HostNetworkPorts, HostPorts
from agent.runtime.process.state import Outcome, Record
from agent.runtime.process.task import Task
from swarm import errors
from swarm.clock import Clock
from swarm.ids import Rng, system_rng
from swarm.v1 import (
    Assignment,
    ContainerSpec,
    ExecInput,
    ExecOutput,
    ExecStart,
    FileStat,
    LogLine,
    LogOptions,
    PortConfig,
    Resources,
    TaskSpec,
    TaskStats,
)

log = structlog.get_logger("process_runtime")

STOP_MARGIN_S = 15.0  # beyond the grace period, until the supervisor itself is given up
REMOVE_TRIES = 50  # a tenth of a second apart, for cgroups whose processes are still going
SETTLE_S = 5.0  # how long adopt waits for a start that the former agent was in the middle of
KILLED = 137
_NANO = 1_000_000_000


class ProcessRuntime:
    """Implements agent.runtime.base.Runtime.

    `bind_address` is where tasks that share the host's network listen; `hide` is kept out of
    isolated tasks' sight. `isolate` False: no namespaces, even as root. `gpus` says what a task
    that claims GPUs is given.
    """

    name = "process"

    def __init__(
        self,
        *,
        folder: Path,
        node_id: str,
        clock: Clock,
        rng: Rng | None = None,
        bind_address: str = "127.0.0.1",
        host_ports: HostPorts | None = None,
        subnet_pool: str = DEFAULT_POOL,
        cgroup_root: Path = Path("/sys/fs/cgroup"),
        cgroup_parent: str = "swarm",
        hide: Path | None = None,
        isolate: bool = True,
        gpus: HandOver = as_claimed,
    ) -> None:
        self._state = folder.absolute()
        self._hide = (hide or folder).absolute()
        self._node_id = node_id
        self._clock = clock
        self._host_ports = host_ports
        self._cgroup_at = (cgroup_root, cgroup_parent)
        self._wish_isolation = isolate
        self._gpus = gpus
        self._ports = HostNetworkPorts(bind_address, (rng or system_rng()).getrandbits(16))
        self._bridge = Bridge(node_id, self._state, subnet_pool)
        self._files = Files(node_id)
        self._powers = Powers(root=False, isolated=False)
        self._cgroups: process_cgroup.Cgroups | None = None
        self._warnings: tuple[str, ...] = ()
        self._tasks: dict[str, Task] = {}
        self._events = Events()
        self._jobs: set[asyncio.Task[None]] = set()

    # -------------------------------------------------------------- the node

    async def connect(self) -> None:
        if platform.system() != "Linux":
            raise errors.Unavailable("the process runtime needs Linux; use docker on this node")
        try:
            for name in ("tasks", "volumes"):
                (self._state / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise errors.Unavailable(
                f"process runtime: cannot write to {error.filename}: {error.strerror}; make it "
                "writable for swarmd's user, or choose another --state-dir"
            ) from None
        root = os.geteuid() == 0
        why_not = "it does not run as root"
        if root and self._wish_isolation:
            why_not = await process_spawn.probe()
        own_score = int(Path("/proc/self/oom_score_adj").read_text())
        isolated = root and self._wish_isolation and not why_not
        self._powers = Powers(root=root, isolated=isolated, oom_score_adj=own_score)
        base, parent = self._cgroup_at
        self._cgroups = process_cgroup.detect(base, parent, self._node_id)
        missing = ("all",) if self._cgroups is None else self._cgroups.missing
        self._warnings = process_fields.shortcomings(self._powers, missing, why_not)

    async def ping(self) -> None:
        """It is the agent itself."""

    async def describe(self) -> Description:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cpus = len(os.sched_getaffinity(0))
        return Description(
            runtimes=("process",),
            resources=Resources(cpu_nano=cpus * _NANO, memory_bytes=memory),
            folder=self._state,
            warnings=(
                *self._warnings,
                *self._bridge.warnings,
                *process_fields.gpu_warnings(self._gpus(()), self._cgroups),
            ),
        )

    async def adopt(self) -> tuple[Found, ...]:
        known = set(self._tasks)  # by this agent: it may be starting them just now
        found = []
        for folder in sorted((self._state / "tasks").iterdir()):
            record = process_state.load_record(folder)
            if record is None:  # the agent died before the task was prepared
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                continue
            await self._settle(folder)
            found.append(await self._adopt_one(Task(record, folder)))
        running = {f.task_id for f in found if f.phase is Phase.RUNNING}
        self._files.keep(running | known)
        await self._bridge.sweep()
        return tuple(found)

    async def _settle(self, folder: Path) -> None:
        """Waits for a start to get through or fail that the former agent was in the middle of."""
        deadline = self._clock.monotonic_s() + SETTLE_S
        while (
            not process_state.was_started(folder)
            and process_state.is_locked(folder)
            and self._clock.monotonic_s() < deadline
        ):
            await asyncio.sleep(0.02)

    async def _adopt_one(self, task: Task) -> Found:
        record = task.record
        known = self._tasks.get(record.task_id)
        if known is not None and known.running:  # an earlier look at the host broke off after it
            return Found(record.task_id, Phase.RUNNING, started=process_task.started(known))
        self._tasks[record.task_id] = task
        if record.leased and record.address:
            self._bridge.adopt(record.task_id, record.address)
        elif not record.isolated:
            self._ports.adopt(record.task_id, record.port_map.values())
        if not process_state.was_started(task.folder):
            return Found(record.task_id, Phase.CREATED)
        task.pids = process_state.load_pids(task.folder)
        if self._open(task):
            self._watch(task)
            if record.healthy is False:  # it may not have been heard, and is not said again
                self._tell_health(task, healthy=False)
            if record.isolated and record.host_ports and self._host_ports is not None:
                await self._publish_again(task)
            return Found(record.task_id, Phase.RUNNING, started=process_task.started(task))
        outcome = self._settle_outcome(task)
        await self._release(task)
        return Found(
            record.task_id,
            Phase.EXITED,
            exit_code=outcome.exit_code,
            message=outcome.message,
            cause=outcome.cause,
        )

    def events(self) -> AsyncIterator[Event]:
        return self._events.stream()

    async def close(self) -> None:
        """Lets go of the tasks, which go on; ends what runs for them in the agent."""
        self._events.close()
        loop = asyncio.get_running_loop()
        for task in self._tasks.values():
            if task.pidfd >= 0:
                loop.remove_reader(task.pidfd)
                os.close(task.pidfd)
                task.pidfd = -1
            if task.health is not None:
                task.health.cancel()
                self._jobs.add(task.health)
        jobs, self._jobs = self._jobs, set()
        await asyncio.gather(*jobs, return_exceptions=True)
        if not self._tasks and self._cgroups is not None:
            self._cgroups.destroy_node()
        self._tasks.clear()
        self._bridge.close()

    async def release_network(self, network_id: str) -> None:
        """Nothing is made for a network alone: tasks share the node's bridge."""

    # -------------------------------------------------------------- prepare and start

    async def prepare(self, work: Work) -> None:
        assignment, spec, container = _parts(work)
        problems = process_fields.check(spec, self._powers)
        problems += process_ports.problems(assignment, self._ports.bind_address, self._powers)
        if (
            self._powers.isolated
            and self._host_ports is None
            and process_ports.host_ports(assignment)
        ):
            problems.append("ports: publish mode host is not available on this node")
        who = process_plan.Identity()
        try:
            process_plan.parse_signal(container.stop_signal)
            if self._powers.root:
                who = process_plan.identity(container)
        except Rejected as error:
            problems.append(error.message)
        problems += process_plan.source_problems(container, self._powers)
        problems += self._files.problems(work.files, self._powers)
        problems += process_fields.gpu_problems(self._given(assignment))
        if problems:
            raise Rejected("; ".join(problems), cause=UNSUPPORTED)
        folder = self._folder(work.task_id)
        layout = self._layout(folder)
        try:
            for name in ("work", "log", "root"):
                (folder / name).mkdir(mode=0o755, parents=True, exist_ok=True)
            if who.uid is not None and who.gid is not None:
                os.chown(layout.work, who.uid, who.gid)
            if self._powers.isolated:
                for mount in container.mounts:
                    if mount.type == "volume":
                        process_plan.volume_path(mount, layout).mkdir(parents=True, exist_ok=True)
            process_state.save_record(folder, Record(task_id=work.task_id))
        except OSError as error:
            raise process_task.trouble(f"cannot prepare {folder}", error) from None
        self._tasks.setdefault(work.task_id, Task(Record(task_id=work.task_id), folder))

    async def start(self, work: Work) -> Started:
        task = self._tasks.get(work.task_id)
        if task is None:
            raise Failed("the task is not prepared on this node")
        if task.running:
            return process_task.started(task)
        if process_state.was_started(task.folder):
            raise Failed("the task has run already; a retry is a new task")
        try:
            task.record = await self._make_record(work)
            await self._launch(task, work)
            if task.record.isolated and task.record.host_ports:
                task.record = await self._publish(task.record)
                process_state.save_record(task.folder, task.record)
        except BaseException as error:
            await self._undo(task)
            if isinstance(error, OSError):
                raise process_task.trouble("cannot start the task", error) from error
            if isinstance(error, errors.SwarmError) and not isinstance(error, (Rejected, Failed)):
                raise Failed(error.message, cause=ENGINE_FAILED) from error
            raise
        self._watch(task)
        return process_task.started(task)

    def _given(self, assignment: Assignment) -> Handover:
        return given_to(assignment, self._gpus)

    async def _make_record(self, work: Work) -> Record:
        """Gives the task its address, ports and files, and writes down what must be known of it."""
        assignment, spec, container = _parts(work)
        task_id, powers = work.task_id, self._powers
        drivers = [n.spec.driver.name for n in work.networks.values() if n.spec and n.spec.driver]
        shared = not powers.isolated or process_plan.shares_host_network(spec, drivers)
        who = process_plan.identity(container) if powers.root else process_plan.Identity()
        address, leased, files_dir = "", False, ""
        host_ports: tuple[PortConfig, ...] = ()
        if shared:
            actual, host_ports = self._ports.take(task_id, assignment.ports)
            address = self._ports.bind_address
        else:
            actual = dict(process_ports.identity_map(assignment.ports))
            host_ports = process_ports.host_ports(assignment)
            if container.network_mode != "none":
                lease = await self._bridge.lease(task_id)
                address, leased = lease.address, True
        if work.files and not powers.isolated:
            files_dir = str(self._files.write(task_id, work.files, uid=who.uid, gid=who.gid))
        layout = self._layout(self._folder(task_id))
        namespaces = tuple(n for n in process_plan.NAMESPACES if not (shared and n == "net"))
        record = Record(
            task_id=task_id,
            address=address,
            leased=leased,
            port_map=actual if shared else {},
            host_ports=host_ports,
            isolated=not shared,
            namespaces=namespaces if powers.isolated else (),
            cwd=container.dir or str(layout.work),
            env=process_plan.environment(
                assignment,
                Ports("0.0.0.0" if not shared else self._ports.bind_address, actual),
                home=who.home or str(layout.work),
                files=files_dir,
                gpus=self._given(assignment),
            ),
            credentials=process_plan.credentials(container, powers, who),
            stop_signal=container.stop_signal,
            health=container.healthcheck,
            started_at_ns=self._clock.now_ns(),
            files_dir=files_dir,
        )
        process_state.save_record(layout.folder, record)
        return record

    async def _launch(self, task: Task, work: Work) -> None:
        """Starts the supervisor and leads it to the point where the command runs."""
        assignment, spec, container = _parts(work)
        record = task.record
        given = self._given(assignment)
        groups: tuple[Path, ...] = ()
        if self._cgroups is not None:
            groups = self._cgroups.create(work.task_id, process_plan.limits(spec, given))
        plan = process_plan.make(
            assignment,
            self._layout(task.folder),
            self._powers,
            hide=(self._hide, *covered_folders()),
            who=process_plan.identity(container) if self._powers.root else process_plan.Identity(),
            env=record.env,
            lease=self._bridge.leased(work.task_id) if record.leased else None,
            host_network=not record.isolated,
            files=work.files,
            cgroups=groups,
            shared=given.shared_paths,
        )
        supervisor = process_spawn.Supervisor(task.folder)
        try:
            pid = await supervisor.give(plan)
            if record.leased:
                await self._bridge.attach(work.task_id, pid)
            await supervisor.go()
        except BaseException:
            await supervisor.abandon()
            raise
        supervisor.close()
        task.pids = process_state.load_pids(task.folder)
        task.pidfd = supervisor.pidfd

    async def _publish(self, record: Record) -> Record:
        assert self._host_ports is not None
        ports = await self._host_ports.publish(
            record.task_id, record.host_ports, LocalTarget(record.address, record.port_map)
        )
        return msgspec.structs.replace(record, host_ports=ports)

    async def _publish_again(self, task: Task) -> None:
        """For a task that was found running. Its port may have been taken while no agent listened;
        then this task has failed, and no other has.
        """
        try:
            await self._publish(task.record)
        except errors.SwarmError as error:
            text = f"its port cannot be opened again: {error.message}"
            self._events.put(Event(task.record.task_id, EventKind.UNHEALTHY, message=text))

    async def _undo(self, task: Task) -> None:
        """After a start that failed: nothing of it is left, so that nothing runs unseen."""
        if task.running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(task.pidfd, signal.SIGKILL)
            await process_spawn.ended(task.pidfd)
            self._close(task)
        await self._release(task)

    # -------------------------------------------------------------- while it runs

    def _open(self, task: Task) -> bool:
        """Takes hold of the supervisor of a task that was found; False: it is gone."""
        # The exit is written last, so a supervisor that still lives then has nothing more to say.
        if task.pids is None or process_state.load_exit(task.folder) is not None:
            return False
        handle = process_state.open_pidfd(task.pids.supervisor, task.pids.supervisor_birth)
        if handle is None:
            return False
        task.pidfd = handle
        return True

    def _watch(self, task: Task) -> None:
        asyncio.get_running_loop().add_reader(task.pidfd, self._ended, task)
        plan = process_health.schedule(task.record.health)
        if plan is not None:
            task.health = asyncio.create_task(self._check_health(task, plan))

    def _ended(self, task: Task) -> None:
        asyncio.get_running_loop().remove_reader(task.pidfd)
        self._close(task)
        outcome = self._settle_outcome(task)
        if task.health is not None:
            task.health.cancel()
        self._events.put(
            Event(
                task.record.task_id,
                EventKind.EXITED,
                outcome.exit_code,
                outcome.message,
                cause=outcome.cause,
            )
        )
        self._job(self._release(task))
        task.exited.set()

    def _close(self, task: Task) -> None:
        os.close(task.pidfd)
        task.pidfd = -1
        if task.pids is not None:
            process_spawn.reap(task.pids.supervisor)

    def _settle_outcome(self, task: Task) -> Outcome:
        """How the task ended; found out once, then kept."""
        outcome = task.outcome or process_state.load_outcome(task.folder)
        if outcome is None:
            code, message, cause = process_state.load_exit(task.folder), "", ""
            if code is None:
                code, message = KILLED, "its supervisor was killed, or the machine was restarted"
            if self._cgroups is not None and self._cgroups.oom_kills(task.record.task_id):
                message = "out of memory: a process was killed at the memory limit"
                cause = OOM if code else ""
            outcome = Outcome(code, message, cause)
            process_task.try_to_save(task, lambda: process_state.save_outcome(task.folder, outcome))
        task.outcome = outcome
        return outcome

    async def _release(self, task: Task) -> None:
        """Gives back what only a running task needs."""
        task_id = task.record.task_id
        self._ports.release(task_id)
        self._files.remove(task_id)
        if self._host_ports is not None:
            await self._host_ports.withdraw(task_id)
        if task.record.leased:
            try:
                await self._bridge.release(task_id)
            except errors.Unavailable as error:
                log.warning("network_not_released", task_id=task_id, reason=error.message)
        if self._cgroups is not None:
            for _ in range(REMOVE_TRIES):
                if self._cgroups.destroy(task_id):
                    return
                await asyncio.sleep(0.1)
            log.warning("cgroup_not_removed", task_id=task_id)

    def _job(self, work: Coroutine[Any, Any, None]) -> None:
        job = asyncio.create_task(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _check_health(self, task: Task, plan: Schedule) -> None:
        record = task.record
        age_s = (self._clock.now_ns() - record.started_at_ns) / _NANO

        def report(healthy: bool, said: str) -> None:
            task.record = msgspec.structs.replace(task.record, healthy=healthy, unhealthy=said)
            process_task.try_to_save(
                task, lambda: process_state.save_record(task.folder, task.record)
            )
            self._tell_health(task, healthy=healthy)

        await process_checks.watch(
            plan,
            lambda schedule: process_checks.probe(self._exec_plan(task), schedule),
            report,
            self._clock,
            started_s=self._clock.monotonic_s() - max(0.0, age_s),
            healthy=record.healthy,
        )

    def _tell_health(self, task: Task, *, healthy: bool) -> None:
        kind = EventKind.HEALTHY if healthy else EventKind.UNHEALTHY
        self._events.put(Event(task.record.task_id, kind, message=task.record.unhealthy))

    # -------------------------------------------------------------- stop and remove

    async def stop(self, task_id: str, *, signal: str, grace_s: float) -> int | None:
        task = self._tasks.get(task_id)
        if task is None:
            return None
        if task.running:
            number = process_plan.parse_signal(signal or task.record.stop_signal)
            await self._stop(task, number, grace_s)
        return None if task.outcome is None else task.outcome.exit_code

    async def _stop(self, task: Task, number: int, grace_s: float) -> None:
        try:
            process_state.request_stop(task.folder, number, max(0.0, grace_s))
        except OSError as error:  # a full disk must not make tasks that nobody can stop
            log.warning("stop_not_written", task_id=task.record.task_id, reason=str(error))
            process_state.signal_main(task.pids, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await task.exited.wait()
            process_state.signal_main(task.pids, signal.SIGKILL)
            grace_s = 0.0
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(task.pidfd, signal.SIGUSR1)
        try:
            async with asyncio.timeout(grace_s + STOP_MARGIN_S):
                await task.exited.wait()
        except TimeoutError:
            log.warning("supervisor_killed", task_id=task.record.task_id)
            # The task dies with it.
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(task.pidfd, signal.SIGKILL)
            await task.exited.wait()

    async def remove(self, task_id: str) -> None:
        task = self._tasks.get(task_id)
        folder = self._folder(task_id)
        if task is None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            return
        if task.running:
            await self._stop(task, int(signal.SIGKILL), 0.0)
        if task.health is not None:
            task.health.cancel()
            await asyncio.gather(task.health, return_exceptions=True)
        await self._release(task)
        del self._tasks[task_id]
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if not self._tasks and self._cgroups is not None:
            self._cgroups.destroy_node()

    # -------------------------------------------------------------- looking inside

    def logs(self, task_id: str, options: LogOptions) -> AsyncIterator[LogLine]:
        task = self._tasks.get(task_id)
        if task is None:
            raise errors.NotFound(f"task {task_id} is not on this node any more")
        return process_logs.read(task.folder / "log", task_id, options, lambda: not task.running)

    def exec(
        self,
        task_id: str,
        start: ExecStart,
        stdin: AsyncIterator[ExecInput],
        left: asyncio.Event | None = None,
    ) -> AsyncGenerator[ExecOutput]:
        task = self._tasks.get(task_id)
        if task is None or not task.running:
            raise Rejected(f"task {task_id} does not run on this node")
        plan = process_exec.ordered(self._exec_plan(task), start, self._powers)
        return process_exec.run(plan, start.size, stdin, left)

    def _exec_plan(self, task: Task) -> dict[str, Any]:
        record, pids = task.record, task.pids
        assert pids is not None
        groups = self._cgroups.procs(record.task_id) if self._cgroups is not None else ()
        return {
            "pid": pids.main,
            "birth": pids.main_birth,
            "namespaces": list(record.namespaces),
            "cgroups": [str(path) for path in groups],
            "env": dict(record.env),
            "cwd": record.cwd,
            "cwd_ours": False,
            "oom_score_adj": None,
            "rlimits": [],
            "tty": False,
            **record.credentials,
        }

    async def file_stat(self, task_id: str, path: str) -> FileStat | None:
        return await process_archive.file_stat(self._copy_plan(task_id), path)

    def archive(self, task_id: str, path: str) -> AsyncIterator[bytes]:
        return process_archive.archive(self._copy_plan(task_id), path)

    async def extract(
        self,
        task_id: str,
        path: str,
        data: AsyncIterator[bytes],
        *,
        keep_kind: bool,
        keep_owner: bool,
    ) -> None:
        plan = self._copy_plan(task_id)
        await process_archive.extract(plan, path, data, keep_kind=keep_kind, keep_owner=keep_owner)

    def _copy_plan(self, task_id: str) -> dict[str, Any]:
        task = self._tasks.get(task_id)
        if task is None or not task.running:
            raise process_archive.NotRunning()
        return self._exec_plan(task)

    async def stats(self, task_id: str) -> TaskStats:
        task = self._tasks.get(task_id)
        if task is None or task.pids is None:
            raise errors.NotFound(f"task {task_id} does not run on this node")
        usage = process_cgroup.Usage() if self._cgroups is None else self._cgroups.usage(task_id)
        return await asyncio.to_thread(
            process_stats.read,
            task_id,
            task.pids.main,
            usage,
            self._clock.now_ns(),
            own_network="net" in task.record.namespaces,
        )

    # -------------------------------------------------------------- small things

    def _folder(self, task_id: str) -> Path:
        errors.invariant(task_id.isalnum(), f"task id {task_id!r} is no name of a folder")
        return self._state / "tasks" / task_id

    def _layout(self, folder: Path) -> Layout:
        return Layout(folder=folder, volumes=self._state / "volumes")


def _parts(work: Work) -> tuple[Assignment, TaskSpec, ContainerSpec]:
    spec = work.assignment.spec or TaskSpec()
    return work.assignment, spec, spec.container or ContainerSpec()
