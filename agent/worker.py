"""All tasks of this node: what the managers want of them, what the runtimes say of them, and what
is still to be told.

The worker is the only one that changes a task's machine (agent/task_machine.py) and carries out its
effects. It is one state on one event loop: an event is taken in, decided and recorded without an
await; only the runtimes' operations are coroutines, at most one per task. It goes on whether or not
a manager answers. Invariants: a task is removed from the host only on a manager's word (desired
state REMOVE, or a full assignment that does not name it); the data of secrets is in memory only.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from msgspec import structs

from agent import description, equipment, templates
from agent import task_machine as tm
from agent.disks import Disks
from agent.gpus import unlimited
from agent.hosts import Host, Looking, Snapshot
from agent.ingress import Ingress, LocalTarget
from agent.metrics import TASKS
from agent.network_use import NetworkUse
from agent.outbox import Outbox
from agent.published import Published
from agent.runtime.base import (
    DISK_FULL,
    ENGINE_FAILED,
    ENGINE_UNRESPONSIVE,
    UNSUPPORTED,
    Event,
    EventKind,
    Failed,
    Found,
    Rejected,
    Runtime,
    TaskFile,
    Work,
)
from agent.state import Record, StateFile
from agent.usage import Measurable
from swarm import errors, states
from swarm.clock import SECOND_NS, Clock
from swarm.v1 import (
    Assignment,
    Assignments,
    ClusterInfo,
    ConfigData,
    ContainerSpec,
    Gpu,
    Network,
    NodeDescription,
    RuntimeProblem,
    SecretData,
    Task,
    TaskReport,
    TaskSpec,
    TaskState,
    TaskStatus,
)

log = structlog.get_logger("worker")

STOP_GRACE_NS = 10 * SECOND_NS  # Docker's default
# An operation that a stop finds under way may end by itself this long. Most do; a container that
# was asked for and not waited for would appear after the clean-up. A pull is cancelled then.
ABANDON_AFTER_S = 2.0
# How long a task that is to stop may go on with answers, at most; never longer than its grace.
ANSWERS_S_MAX = 5.0
# The session begins at the latest after this, even if a runtime does not answer.
LOOK_AROUND_S = 5.0
# An engine that goes away so often while it prepares or starts a task does so because of the task.
INTERRUPTIONS_MAX = 3
DISK_LOOK_S = 1.0
GPU_WARNINGS_MAX = 5  # tasks whose part of a GPU does not hold; more are not named


@dataclass(slots=True, eq=False)
class _Entry:
    """One task."""

    assignment: Assignment
    machine: tm.Machine
    # None: no runtime of this node can run it; `unfit` says why.
    host: Host | None
    unfit: str
    networks: frozenset[str] = frozenset()
    operation: asyncio.Task[None] | None = None
    # How often its runtime went away in the middle of an operation.
    interruptions: int = 0
    abandoned: bool = False  # the operation's end was asked for
    cancelled: bool = False  # … and its time was up

    @property
    def task(self) -> Task:
        assert self.assignment.task is not None
        return self.assignment.task


@dataclass(slots=True)
class _Supplies:
    """What tasks use, as the managers sent it."""

    secrets: dict[str, SecretData] = field(default_factory=dict)
    configs: dict[str, ConfigData] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)

    def take(self, message: Assignments) -> None:
        for known, removed in (
            (self.secrets, message.removed_secrets),
            (self.configs, message.removed_configs),
            (self.networks, message.removed_networks),
        ):
            for id_ in removed:
                known.pop(id_, None)
        self.secrets.update((s.id, s) for s in message.secrets)
        self.configs.update((c.id, c) for c in message.configs)
        self.networks.update((n.id, n) for n in message.networks)


class Worker:
    """See the module. `run` until cancelled; all other methods are for the same event loop.

    The runtimes and the ingress belong to the caller, who connects neither and closes both.
    """

    def __init__(
        self,
        *,
        runtimes: Sequence[Runtime],
        ingress: Ingress,
        state: StateFile,
        about: description.About,
        clock: Clock,
        issuer: description.Issuer = description.Issuer(),  # noqa: B008  # frozen
    ) -> None:
        self._hosts = [Host(r, clock) for r in runtimes]
        self._disks = Disks(self.folders, self._changed, clock)
        state.on_change = self._changed
        self._ingress = ingress
        self._state = state
        self._about = about
        self._issuer = issuer
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._supplies = _Supplies()
        self._published = Published()
        self._publish = asyncio.Event()
        self._ingress_problems: tuple[str, ...] = ()
        self._gpus: tuple[Gpu, ...] = ()
        self._gpu_problem = ""
        self._mps = ""
        # Tasks found on the host that no manager wants, being removed.
        self._strays: set[str] = set()
        # A manager has said since the start what is this node's; only then may strays go.
        self._confirmed = False
        self._networks = NetworkUse(self._spawn)
        self._group: asyncio.TaskGroup | None = None
        self._emptied = asyncio.Event()
        self.outbox = Outbox(self._changed)
        # Called when there may be something new to tell; the session sets it.
        self.on_change: Callable[[], None] = lambda: None

    # -------------------------------------------------------------- life

    async def run(self, ready: Callable[[], None]) -> None:
        """Works until cancelled; then tasks go on without the agent. `ready` is called once the
        host was looked at (or took too long), so that a session can tell of all tasks.
        """
        records = await self._state.open()
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for record in records:
                    self._restore(record)
                group.create_task(self._state.run())
                group.create_task(self._keep_published())
                group.create_task(self._disks.run())
                looked = [asyncio.Event() for _ in self._hosts]
                for host, event in zip(self._hosts, looked, strict=True):
                    group.create_task(self._follow(host, event))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AROUND_S):
                        for event in looked:
                            await event.wait()
                ready()
        finally:
            self._group = None
            await self._state.close()

    async def _follow(self, host: Host, looked: asyncio.Event) -> None:
        ran: frozenset[str] = frozenset()  # tasks that ran before the runtime was asked
        async for item in host.followed():
            match item:
                case None:
                    looked.set()
                    self._changed()
                case Looking():
                    ran = frozenset(
                        i for i, e in self._entries.items() if e.machine.have == tm.Have.RUNNING
                    )
                case Snapshot():
                    self._locate(host, item.found, ran)
                    with contextlib.suppress(TimeoutError):  # so that the first session knows
                        async with asyncio.timeout(DISK_LOOK_S):
                            await self._disks.measured()
                    looked.set()
                    self._changed()
                case Event():
                    self._heard(item)

    def _restore(self, record: Record) -> None:
        host, unfit = self._host_for(record.assignment.spec)
        task = record.assignment.task
        assert task is not None
        machine = tm.begin(record.status, task.desired_state, equipped=False)
        self._enter(_Entry(record.assignment, machine, host, unfit))
        if host is None:
            self._post(task.id, tm.Located(None))

    def _locate(self, host: Host, found: dict[str, Found], ran: frozenset[str]) -> None:
        """The runtime said what it holds; for the first time, or again after it was away. Only what
        `ran` before it looked can have ended by then: a task that was started while it looked may
        be missing, or not be running yet, in what it saw.
        """
        log.info("runtime_ready", runtime=host.name, found=len(found))
        for entry in list(self._entries.values()):
            if entry.host is not host:
                continue
            mine = found.pop(entry.task.id, None)
            if not entry.machine.located:
                self._post(entry.task.id, tm.Located(mine))
            elif entry.machine.have == tm.Have.RUNNING and entry.task.id in ran:
                if mine is None:
                    self._post(entry.task.id, tm.Exited(tm.Exit(255, "it is gone")))
                elif mine.started is None:
                    self._post(entry.task.id, tm.Exited(tm.exit_of(mine)))
        host.found = found
        if self._confirmed:
            self._discard_strays()

    def _heard(self, event: Event) -> None:
        match event.kind:
            case EventKind.HEALTHY:
                self._post(event.task_id, tm.Healthy())
            case EventKind.UNHEALTHY:
                self._post(event.task_id, tm.Unhealthy(event.message))
            case EventKind.EXITED:
                self._post(event.task_id, tm.Exited(tm.exit_of(event)))

    # -------------------------------------------------------------- what managers say

    def assign(self, message: Assignments) -> None:
        """Takes a manager's word. Assignments of one session must come in order."""
        if message.full:
            self._supplies = _Supplies()
        self._supplies.take(message)
        for assignment in message.tasks:
            self._assign(assignment)
        for task_id in message.removed_tasks:
            self._unassign(task_id)
        if message.full:
            named = {a.task.id for a in message.tasks if a.task is not None}
            for task_id in [t for t in self._entries if t not in named]:
                self._unassign(task_id)
            self._confirmed = True
            self._discard_strays()
        self._take_ingress(message)

    def _assign(self, assignment: Assignment) -> None:
        task = assignment.task
        if task is None:
            return
        entry = self._entries.get(task.id)
        if entry is None:
            entry = self._admit(assignment, task)
        elif assignment != entry.assignment:
            if assignment.spec is None:  # the spec is gone from the cluster; ours is as good
                assignment = structs.replace(assignment, spec=entry.assignment.spec)
            entry.assignment = assignment
            self._use_networks(entry)
        self._record(entry)
        self._post(task.id, tm.Assigned(task.desired_state, equipped=True))

    def _admit(self, assignment: Assignment, task: Task) -> _Entry:
        """Makes an entry for a task that is new here, or whose record was lost."""
        holder = next((h for h in self._hosts if task.id in h.found), None)
        host, unfit = (holder, "") if holder else self._host_for(assignment.spec)
        status = task.status or TaskStatus(state=TaskState.ASSIGNED)
        machine = tm.begin(status, task.desired_state, equipped=True)
        entry = _Entry(assignment, machine, host, unfit)
        self._enter(entry)
        if host is None or host.ready:
            self._post(task.id, tm.Located(host.found.pop(task.id, None) if host else None))
        return entry

    def _unassign(self, task_id: str) -> None:
        self._post(task_id, tm.Assigned(TaskState.REMOVE, equipped=False))

    def _discard_strays(self) -> None:
        """Removes what was found of tasks that are not this node's."""
        for host in self._hosts:
            strays, host.found = host.found, {}
            for task_id in strays:
                log.info("stray_task_removed", task_id=task_id, runtime=host.name)
                self._strays.add(task_id)
                self._spawn(self._discard(host, task_id))

    async def _discard(self, host: Host, task_id: str) -> None:
        await host.stop(task_id, signal="", grace_s=STOP_GRACE_NS / SECOND_NS)
        await host.remove(task_id)
        self._strays.discard(task_id)
        self._check_emptied()

    def use_cluster(self, info: ClusterInfo) -> None:
        """Takes the key with which nodes reach each other's tasks."""
        if info.relay_key:
            self._ingress.set_key(info.relay_key)

    def use_issuer(self, issuer: description.Issuer) -> None:
        """Takes who issued the certificate that the node uses from now on."""
        if issuer != self._issuer:
            self._issuer = issuer
            self.on_change()

    def use_etcd(self, version: str) -> None:
        """Takes which etcd there is on the machine from now on."""
        if version != self._about.etcd_version:
            self._about = dataclasses.replace(self._about, etcd_version=version)
            self.on_change()

    def use_gpus(self, gpus: tuple[Gpu, ...], problem: str, *, mps: str = "") -> None:
        """Takes the GPUs that the node has from now on, why these may not be all, and where MPS
        has its pipes.
        """
        if (gpus, problem, mps) != (self._gpus, self._gpu_problem, self._mps):
            self._gpus, self._gpu_problem, self._mps = gpus, problem, mps
            self.on_change()

    def _unlimited(self, entry: _Entry) -> str:
        """Why the task's part of a GPU does not hold; empty: it does."""
        spec, claimed = entry.assignment.spec, entry.task.assigned_gpus
        return unlimited(spec, claimed, self._gpus, self._mps) if claimed else ""

    async def empty(self, *, timeout_s: float) -> bool:
        """Stops and removes all tasks, as when no manager wants them; whether that was done in
        time.
        """
        self.assign(Assignments(full=True))
        try:
            async with asyncio.timeout(timeout_s):
                while self._entries or self._strays:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            return False
        return True

    def _check_emptied(self) -> None:
        if not self._entries and not self._strays:
            self._emptied.set()

    # -------------------------------------------------------------- what the session asks

    def reports(self) -> tuple[TaskReport, ...]:
        """Every task with its state, for a session's Hello."""
        return tuple(self._report_of(e) for e in self._entries.values())

    def description(self) -> NodeDescription:
        """The node as it is now."""
        used = {e.host for e in self._entries.values()}
        told = [h for h in self._hosts if h.ready or h in used]
        warnings = [
            f"runtime {h.name} does not answer: {h.problem}"
            for h in self._hosts
            if h.problem and h not in told
        ]
        warnings += [said for said in (self._state.problem, self._state.lack) if said]
        if self._gpu_problem:
            warnings.append(self._gpu_problem)
        warnings += [
            f"task {entry.assignment.name or task_id}: {why}"
            for task_id, entry in sorted(self._entries.items())
            if entry.task.assigned_gpus and (why := self._unlimited(entry))
        ][:GPU_WARNINGS_MAX]
        return description.describe(
            self._about,
            [h.description for h in self._hosts if h.ready],
            warnings=(*warnings, *self._ingress_problems),
            issuer=self._issuer,
            gpus=self._gpus,
            problems=[p for h in told for p in self._problems(h)],
        )

    def _problems(self, host: Host) -> Iterator[RuntimeProblem]:
        """Why a runtime takes no tasks."""
        runtimes = host.description.runtimes or (host.name,)
        if host.problem:
            message = f"{host.name} does not answer: {host.problem}"
            yield RuntimeProblem(
                runtimes=runtimes,
                message=message,
                since_ns=host.since_ns,
                cause=ENGINE_UNRESPONSIVE,
            )
        if (full := self._disks.full.get(host.name)) is not None:
            yield RuntimeProblem(
                runtimes=runtimes, message=full.message, since_ns=full.since_ns, cause=DISK_FULL
            )

    def folders(self) -> dict[str, Path]:
        """Where its runtimes keep tasks, as far as that is known; the first one first."""
        return {h.name: f for h in self._hosts if (f := h.description.folder) is not None}

    def runtime_of(self, task_id: str) -> Runtime:
        """Where a task's logs are. Raises NotFound."""
        entry = self._entries.get(task_id)
        if entry is None or entry.host is None:
            raise errors.NotFound(f"task {task_id} is not on this node")
        return entry.host.runtime

    def measurable(self) -> list[Measurable]:
        """The tasks that run."""
        return [
            Measurable(task_id, e.task.service_id, e.assignment.name or task_id, e.host.runtime)
            for task_id, e in self._entries.items()
            if e.host is not None and e.machine.have is tm.Have.RUNNING
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def _changed(self) -> None:
        self.on_change()

    # -------------------------------------------------------------- one task

    def _enter(self, entry: _Entry) -> None:
        self._entries[entry.task.id] = entry
        self._use_networks(entry)
        TASKS.set(len(self._entries))

    def _host_for(self, spec: TaskSpec | None) -> tuple[Host | None, str]:
        """The runtime for a task, or why there is none."""
        if spec is None:
            return None, "its specification is not in the cluster any more"
        if not self._hosts:
            return None, "this node runs no tasks: it was started without a runtime"
        wanted = spec.runtime
        if not wanted:
            return self._hosts[0], ""
        for host in self._hosts:
            if wanted == host.name or wanted in host.description.runtimes:
                return host, ""
        for host in self._hosts:
            if not host.ready and host.name != "process" and wanted != "process":
                return host, ""  # it has not said yet what it offers
        offered = [n for h in self._hosts for n in (h.description.runtimes or (h.name,))]
        return None, (
            f"runtime {wanted!r} is not offered by this node, which has: {', '.join(offered)}; "
            "name one of them, or install it in the node's engine"
        )

    def _post(self, task_id: str, event: tm.Event) -> None:
        """Lets a task's machine take an event, and carries out what follows."""
        entry = self._entries.get(task_id)
        if entry is None:
            return
        now_ns = self._clock.now_ns()
        entry.machine, effects = tm.step(entry.machine, event, now_ns=now_ns)
        for effect in effects:
            self._perform(entry, effect)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None] | None:
        """Starts a coroutine of the worker's group; None when the worker is just ending."""
        assert self._group is not None
        try:
            return self._group.create_task(work)
        except RuntimeError:  # the group was cancelled in this very turn of the loop
            work.close()
            return None

    def _perform(self, entry: _Entry, effect: tm.Effect) -> None:
        task_id = entry.task.id
        match effect:
            case tm.Report():
                self._record(entry)
                self.outbox.put(self._report_of(entry))
                log.debug("task_state", task_id=task_id, state=entry.machine.state.name.lower())
            case tm.Run(doing):
                entry.abandoned = entry.cancelled = False
                entry.operation = self._spawn(self._operate(entry, doing))
            case tm.Abandon():
                if entry.operation is not None and not entry.abandoned:
                    entry.abandoned = True
                    self._spawn(self._abandon(entry, entry.operation))
            case tm.Expose(started):
                if started.address:
                    target = LocalTarget(started.address, started.port_map)
                    self._ingress.set_target(task_id, target)
            case tm.Hide():
                self._ingress.set_target(task_id, None)
            case tm.Forget():
                self._forget(entry)

    async def _operate(self, entry: _Entry, doing: tm.Doing) -> None:
        event = await self._result(entry, doing)
        entry.operation = None
        self._post(entry.task.id, event)

    async def _result(self, entry: _Entry, doing: tm.Doing) -> tm.Event:
        """Carries out one operation; what became of it."""
        host, task_id = entry.host, entry.task.id
        if host is None:
            return _of_nothing(doing, entry.unfit)
        try:
            match doing:
                case tm.Doing.PREPARE:
                    await self._networks.free(host, entry.networks)
                    await host.prepare(await self._work(entry))
                    return tm.Prepared()
                case tm.Doing.START:
                    work = await self._work(entry)
                    if not states.wanted(entry.machine.desired):
                        return _not_wanted()
                    started = await host.start(work)
                    notes = [n for n in (started.note, self._unlimited(entry)) if n]
                    return tm.DidStart(dataclasses.replace(started, note="; ".join(notes)))
                case tm.Doing.STOP:
                    container = _container(entry.assignment)
                    grace_ns = container.stop_grace_period_ns
                    if entry.machine.failure is None:
                        await self._finish_answers(task_id, grace_ns)
                    code = await host.stop(
                        task_id,
                        signal=container.stop_signal,
                        grace_s=(STOP_GRACE_NS if grace_ns is None else grace_ns) / SECOND_NS,
                    )
                    return tm.DidStop(code)
                case _:
                    await host.remove(task_id)
                    return tm.DidRemove()
        except (Rejected, Failed) as error:
            if error.cause == DISK_FULL:
                self._disks.look()
            return tm.Refused(
                error.message, rejected=isinstance(error, Rejected), cause=error.cause
            )
        except errors.SwarmError as error:
            if await host.interrupted(error) and entry.interruptions < INTERRUPTIONS_MAX:
                entry.interruptions += 1
                log.info("operation_interrupted", task_id=task_id, reason=error.message)
                return tm.Interrupted()
            return tm.Refused(error.message, rejected=False, cause=ENGINE_FAILED)
        except asyncio.CancelledError:
            this = asyncio.current_task()
            # One cancellation is ours; another one ends the worker.
            if not entry.cancelled or this is None or this.uncancel() > 0:
                raise
            return _not_wanted()

    async def _finish_answers(self, task_id: str, grace_ns: int | None) -> None:
        """Lets a task that is hidden already answer what it was asked through published ports,
        before it hears that it is to stop: many programs end at once then.
        """
        grace_s = (STOP_GRACE_NS if grace_ns is None else grace_ns) / SECOND_NS
        timeout_s = min(grace_s, ANSWERS_S_MAX)
        if not await self._ingress.finished(task_id, timeout_s=timeout_s):
            log.debug("stopped_while_answering", task_id=task_id, waited_s=timeout_s)

    async def _abandon(self, entry: _Entry, operation: asyncio.Task[None]) -> None:
        await asyncio.wait({operation}, timeout=ABANDON_AFTER_S)
        if entry.operation is operation and not operation.done():
            entry.cancelled = True
            operation.cancel()

    async def _work(self, entry: _Entry) -> Work:
        assignment, supplies = entry.assignment, self._supplies
        for attachment in entry.task.networks:
            if attachment.network_id not in supplies.networks:
                raise Rejected(
                    f"network {attachment.network_id} is not in the cluster any more; create it "
                    "again and update the service"
                )
        container = _container(assignment)
        secrets, configs = dict(supplies.secrets), dict(supplies.configs)
        values = templates.values_of(
            assignment, hostname=self._about.hostname, platform=description.platform_of_host()
        )

        def expand() -> tuple[ContainerSpec, tuple[TaskFile, ...]]:
            expanded = templates.expand(container, values)
            return expanded, equipment.files(expanded, secrets, configs, values)

        if templates.in_use(container, secrets, configs):
            # It may take some tenths of a second before a template's limits end it.
            expanded, files = await asyncio.to_thread(expand)
        else:
            expanded, files = expand()
        spec = structs.replace(assignment.spec or TaskSpec(), container=expanded)
        networks = self._supplies.networks
        return Work(
            assignment=structs.replace(assignment, spec=spec),
            files=files,
            networks={n: networks[n] for n in sorted(entry.networks & set(networks))},
        )

    def _forget(self, entry: _Entry) -> None:
        task_id = entry.task.id
        del self._entries[task_id]
        TASKS.set(len(self._entries))
        self._state.drop(task_id)
        if entry.host is not None:
            self._networks.leave(entry.host, task_id, entry.networks)
        self.outbox.put(structs.replace(self._report_of(entry), removed=True))
        self._check_emptied()

    def _record(self, entry: _Entry) -> None:
        self._state.put(Record(entry.assignment, entry.machine.status))

    def _report_of(self, entry: _Entry) -> TaskReport:
        started = entry.machine.started
        return TaskReport(
            task_id=entry.task.id,
            status=entry.machine.status,
            host_ports=started.host_ports if started else (),
            networks=started.networks if started else (),
        )

    # -------------------------------------------------------------- networks

    def _use_networks(self, entry: _Entry) -> None:
        """Notes which networks the task is on; they stay until the last of their tasks is gone."""
        spec = entry.assignment.spec
        targets = {n.target for n in spec.networks} if spec else set()
        used = {a.network_id for a in entry.task.networks}
        for network in self._supplies.networks.values():
            if network.id in targets or (network.spec and network.spec.name in targets):
                used.add(network.id)
        entry.networks = frozenset(entry.networks | used)
        if entry.host is not None:
            self._networks.join(entry.host, entry.task.id, entry.networks)

    # -------------------------------------------------------------- published ports

    def _take_ingress(self, message: Assignments) -> None:
        if self._published.take(message):
            self._publish.set()

    async def _keep_published(self) -> None:
        while True:
            await self._publish.wait()
            self._publish.clear()
            problems = await self._ingress.apply(self._published.services())
            if problems != self._ingress_problems:
                self._ingress_problems = problems
                for problem in problems:
                    log.warning("port_not_published", reason=problem)
                self._changed()


def _container(assignment: Assignment) -> ContainerSpec:
    return (assignment.spec and assignment.spec.container) or ContainerSpec()


def _not_wanted() -> tm.Event:
    return tm.Refused("abandoned: the task is not wanted any more", rejected=False)


def _of_nothing(doing: tm.Doing, why: str) -> tm.Event:
    """The result of an operation on a task that no runtime holds or could hold."""
    match doing:
        case tm.Doing.STOP:
            return tm.DidStop(None)
        case tm.Doing.REMOVE | tm.Doing.CLEAN:
            return tm.DidRemove()
        case _:
            return tm.Refused(why, rejected=True, cause=UNSUPPORTED)
