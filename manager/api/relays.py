"""Logs and exec: streams between a client and the nodes that run the tasks.

The dispatcher opens a relay to one task's node (`Relays`, what this module asks of it); here the
lines of many relays become one stream, roughly in the order in which they were written, and one
relay becomes a session with a command. A node that cannot be read becomes a sentence in `problems`,
and the rest goes on. Logs of a node whose agent goes to another manager are read on from where they
were, nothing lost or doubled; a command's session ends then, as nobody knows what it has done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Protocol

import structlog
from msgspec import structs

from manager.api.lookup import find, name_of
from manager.api.merging import Merger, Source
from manager.api.watching import dirty, stack_name
from manager.control.slots import lost_at_ns
from manager.scheduler import requirement_of, spec_of_version
from manager.store import Store, Topic, View
from swarm import errors, states
from swarm.v1 import (
    ExecInput,
    ExecOutput,
    LogLine,
    LogOptions,
    LogsRequest,
    LogsResponse,
    Node,
    NodeState,
    RelayFrame,
    RelayRequest,
    Service,
    Task,
    TaskState,
)

log = structlog.get_logger("api")

ENGINE_UNRESPONSIVE = "engine_unresponsive"  # RuntimeProblem.cause
# Relays of one call; each is a stream of its own on some node.
RELAYS_MAX = 300
# How long logs whose relay has broken are tried to be read on, and how often. What is followed is
# tried for as long as it is there, in the end more seldom, and people are told after RESUME_S.
RESUME_S, RESUME_PAUSE_S, RESUME_PAUSE_S_MAX = 10.0, 0.2, 5.0


# What else is said of a task that is not kept any more.
REMOVED = "; the task was removed, and its logs with it"


class Relay(Protocol):
    """One open stream to a task's node."""

    def frames(self) -> AsyncIterator[RelayFrame]:
        """What the node sends, until it ends. Raises Unavailable when the node is lost."""
        ...

    async def send(self, frame: RelayFrame) -> None:
        """Raises Unavailable when the node is lost."""
        ...


class Relays(Protocol):
    """Opens relays; the dispatcher's part."""

    def open(self, node_id: str, request: RelayRequest) -> AbstractAsyncContextManager[Relay]:
        """A stream for the request, whose id is filled in. Raises Unavailable when the node has no
        session or does not answer.
        """
        ...


# ---------------------------------------------------------------- logs


class LogReader:
    """One logs call: which tasks, their relays, and what they have said."""

    def __init__(self, store: Store, relays: Relays, request: LogsRequest) -> None:
        self._store = store
        self._relays = relays
        self._request = request
        self._options = _options(request.options)
        self._services, self._tasks = _chosen(store, request)
        self._seen: set[str] = set()
        self._readers: set[asyncio.Task[None]] = set()
        self._merger = Merger(follow=self._options.follow)
        self._problems: list[str] = []
        self._full = False
        self._failure: BaseException | None = None  # a defect of ours, for the caller's log

    async def read(self) -> AsyncGenerator[LogsResponse, None]:
        """Lines until all tasks have said what they had; with `follow`, until the services are gone
        or the caller ends the call.
        """
        watcher: asyncio.Task[None] | None = None
        try:
            self._open_new(first=True)
            if self._options.follow:
                self._merger.hold_open()
                watcher = asyncio.create_task(self._follow(), name="logs follow")
            async with aclosing(self._merger.batches()) as batches:
                async for lines in batches:
                    if self._failure is not None:
                        raise self._failure
                    if lines or self._problems:
                        problems, self._problems = tuple(self._problems), []
                        yield LogsResponse(lines=lines, problems=problems)
            if self._problems:
                yield LogsResponse(problems=tuple(self._problems))
        finally:
            ending = [*self._readers, *([watcher] if watcher is not None else [])]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    def _current(self) -> list[Task]:
        """Tasks that may have said something: those that a node has been given."""
        tasks = [t for id_ in self._tasks if (t := self._store.get(Task, id_)) is not None]
        for service_id in self._services:
            tasks.extend(self._store.by(Task, "service", service_id))
        ready = [t for t in tasks if t.node_id and has_begun(t)]
        return sorted(ready, key=lambda t: (t.meta.created_at_ns if t.meta else 0, t.id))

    def _open_new(self, *, first: bool) -> None:
        for task in self._current():
            if task.id in self._seen:
                continue
            if len(self._readers) >= RELAYS_MAX:
                if not self._full:
                    self._full = True
                    self._problems.append(
                        f"more than {RELAYS_MAX} tasks match, which is the most that one call "
                        "reads at a time; name fewer services, or single tasks"
                    )
                return
            self._seen.add(task.id)
            source = self._merger.source(late=not first)
            # A task that began while we follow is read from its start.
            options = self._options if first else structs.replace(self._options, tail=-1)
            reader = asyncio.create_task(self._read_one(task, source, options), name="logs relay")
            self._readers.add(reader)
            reader.add_done_callback(self._reader_ended)

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        self._readers.discard(reader)
        if not reader.cancelled() and reader.exception() is not None:
            self._failure = reader.exception()
            self._merger.wake()

    async def _read_one(self, task: Task, source: Source, options: LogOptions) -> None:
        """Until all is read that there will be. What is followed is read over every break: a node
        that is away may come back, and with it the rest of what was said.
        """
        stamp = _Stamp(self._store, task)
        place = _Place(options, asyncio.get_running_loop().time())
        pause_s, told = RESUME_PAUSE_S, False
        try:
            while (broken := await self._read_on(task, source, place, stamp)) is not None:
                if place.broken():
                    pause_s, told = RESUME_PAUSE_S, False
                now = self._store.get(Task, task.id)
                there, ready = now is not None, self._ready(task)
                again = place.hopeful(refused=broken.refused or broken.lasts) and ready
                if not again and (not told or not there):
                    told = True
                    self._note(
                        f"{stamp.subject(self._store)}{broken.why}{'' if there else REMOVED}"
                    )
                waits = now is not None and (ready or not _has_ended(now))
                if not again and not (waits and place.resumable(refused=broken.refused)):
                    return
                await asyncio.sleep(pause_s)
                if told:
                    pause_s = min(2 * pause_s, RESUME_PAUSE_S_MAX)
        finally:
            source.close()

    def _ready(self, task: Task) -> bool:
        node = self._store.get(Node, task.node_id)
        return bool(node and node.status and node.status.state == NodeState.READY)

    async def _read_on(
        self, task: Task, source: Source, place: _Place, stamp: _Stamp
    ) -> _Broken | None:
        """Reads to the end. When the relay breaks, or cannot be opened: why."""
        try:
            check_engine(self._store, task)
        except errors.Unavailable as error:
            return _Broken(f" cannot be read: {error.message}", lasts=True)
        try:
            request = RelayRequest(task_id=task.id, logs=place.options())
            async with self._relays.open(task.node_id, request) as relay:
                place.opened()
                async for frame in relay.frames():
                    if frame.error is not None:
                        return _Broken(f": {frame.error}", refused=True)
                    if frame.end:
                        return None
                    if frame.logs is not None:
                        for problem in frame.logs.problems:
                            self._note(f"{stamp.subject(self._store)}: {problem}")
                        lines = place.new(frame.logs.lines)
                        await source.put([stamp.on(line) for line in lines])
        except errors.SwarmError as error:
            final = not isinstance(error, errors.Unavailable)
            return _Broken(f" cannot be read: {error.message}", refused=final)
        return None

    def _note(self, problem: str) -> None:
        self._problems.append(problem)
        self._merger.wake()

    async def _follow(self) -> None:
        """Opens relays for tasks that begin while the call lasts."""
        services = {*self._services, *self._services_of_tasks()}
        topics: tuple[Topic, ...] = tuple(("service", i) for i in sorted(services))
        try:
            async with dirty(self._store, topics) as changed:
                while self._more_may_come():
                    await changed.wait()
                    changed.clear()
                    self._full = False
                    self._open_new(first=False)
        except errors.SwarmError as error:
            self._note(error.message)
        finally:
            self._merger.release()

    def _services_of_tasks(self) -> list[str]:
        tasks = (self._store.get(Task, i) for i in self._tasks)
        return [t.service_id for t in tasks if t is not None]

    def _more_may_come(self) -> bool:
        """Whether a task may still begin: one of a service, or a single one that has not yet."""
        if any(self._store.get(Service, i) is not None for i in self._services):
            return True
        waiting = (self._store.get(Task, i) for i in self._tasks if i not in self._seen)
        return any(
            t is not None and not (t.status and states.ended(t.status.state)) for t in waiting
        )


@dataclass(frozen=True, slots=True)
class _Broken:
    """Why one task's lines came to no end."""

    why: str  # after the task's name
    # It is not a matter of the way there: the node has said so.
    refused: bool = False
    # It has been so for a while: it is told at once.
    lasts: bool = False


class _Place:
    """How far one task's lines were read, and so where to go on when the relay has broken.

    Lines of one stream (stdout or stderr) are in order of time, the two may overlap a little. So
    they are read again from OVERLAP_NS before the earlier of the two places, and what was read
    before is left out: of each stream what is older than its last line, and as many of that line's
    time as there were.
    """

    OVERLAP_NS = 1_000_000_000

    def __init__(self, options: LogOptions, begun_s: float = 0.0) -> None:
        self._options = options
        self._begun_s = begun_s
        self._first_ns = 0
        self._last: dict[int, tuple[int, int]] = {}  # by stream: time of the last, how many of it
        self._skip: dict[int, int] = {}
        self._opened_s: float | None = None
        self._broken_s: float | None = None  # since when it breaks without having come on
        self._timeless = False  # there are lines without a time

    def options(self) -> LogOptions:
        """To read from here on."""
        if not self._last:
            return self._options
        self._skip = {stream: count for stream, (_, count) in self._last.items()}
        since_ns = min(at_ns for at_ns, _ in self._last.values()) - self.OVERLAP_NS
        # What a tail had cut off stays so.
        cut_ns = self._first_ns if self._options.tail >= 0 else 0
        since_ns = max(1, since_ns, cut_ns, self._options.since_ns)
        return structs.replace(self._options, tail=-1, since_ns=since_ns)

    def opened(self) -> None:
        """The node answers."""
        self._opened_s = asyncio.get_running_loop().time()

    def broken(self) -> bool:
        """The relay broke, or could not be opened. Whether it had come on since the last time."""
        now_s = asyncio.get_running_loop().time()
        opened_s, self._opened_s = self._opened_s, None
        stood = opened_s is not None and now_s - opened_s > RESUME_S
        came_on = self._broken_s is None or stood
        if came_on:
            # What could not be opened at once has had its time since the begin.
            self._broken_s = now_s if opened_s is not None else self._begun_s
        return came_on

    def hopeful(self, *, refused: bool) -> bool:
        """Whether it is too soon to speak of a problem: it began, or came on, since RESUME_S."""
        if refused or self._timeless or self._broken_s is None:
            return False
        return asyncio.get_running_loop().time() - self._broken_s < RESUME_S

    def resumable(self, *, refused: bool) -> bool:
        """Whether it is worth while to wait for what is away: where it is followed, and the node
        has not refused from the start.
        """
        return self._options.follow and not self._timeless and (bool(self._last) or not refused)

    def new(self, lines: Sequence[LogLine]) -> list[LogLine]:
        """Those of the lines that were not read before."""
        if lines:
            self._broken_s = None
        out = []
        for line in lines:
            at_ns, stream = line.timestamp_ns, int(line.stream)
            last_ns, count = self._last.get(stream, (0, 0))
            if stream in self._skip:
                if at_ns < last_ns:
                    continue
                if at_ns == last_ns and self._skip[stream] > 0:
                    self._skip[stream] -= 1
                    continue
                del self._skip[stream]
            self._timeless = self._timeless or not at_ns
            self._first_ns = min(self._first_ns or at_ns, at_ns)
            self._last[stream] = (at_ns, count + 1 if at_ns == last_ns else 1)
            out.append(line)
        return out


class _Stamp:
    """What the manager knows of a line that its node does not."""

    def __init__(self, view: View, task: Task) -> None:
        service = view.get(Service, task.service_id)
        node = view.get(Node, task.node_id)
        self._fields = {
            "task_id": task.id,
            "service_name": name_of(service) if service is not None else task.service_id,
            "slot": task.slot,
            "node_id": task.node_id,
            "node_name": name_of(node) if node is not None else task.node_id,
        }
        self._name = f"task {name_of(task, view)} ({task.id})"

    def subject(self, view: View) -> str:
        """The task and its node as that is now."""
        node = view.get(Node, str(self._fields["node_id"]))
        down = node is not None and node.status and node.status.state != NodeState.READY
        return (
            f"{self._name} on node {self._fields['node_name']}{' (which is down)' if down else ''}"
        )

    def on(self, line: LogLine) -> LogLine:
        return structs.replace(line, **self._fields)


def _options(options: LogOptions | None) -> LogOptions:
    """Both streams unless one is chosen. Raises Invalid."""
    options = options or LogOptions(tail=-1)
    if options.tail < -1:
        raise errors.Invalid(f"tail {options.tail}: give a number of lines, or -1 for all")
    if options.until_ns and options.since_ns > options.until_ns:
        raise errors.Invalid("since is later than until, so there can be no lines")
    if not options.stdout and not options.stderr:
        options = structs.replace(options, stdout=True, stderr=True)
    return options


def _chosen(store: Store, request: LogsRequest) -> tuple[list[str], list[str]]:
    """Ids of the services and of the single tasks. Raises NotFound, Invalid."""
    if not (request.services or request.tasks or request.stack):
        raise errors.Invalid("name the services, tasks or the stack whose logs are wanted")
    services = [find(store, Service, ref).id for ref in request.services]
    if request.stack:
        name = stack_name(store, request.stack)
        services.extend(s.id for s in store.by(Service, "stack", name))
    tasks = [find(store, Task, ref).id for ref in request.tasks]
    return sorted(set(services)), sorted(set(tasks))


def _has_ended(task: Task) -> bool:
    return task.status is not None and states.ended(task.status.state)


def has_begun(task: Task) -> bool:
    """Whether the task has had a container: one that never started has nothing to say."""
    status = task.status
    if status is None:
        return False
    if states.ended(status.state):
        return status.container is not None
    return status.state >= TaskState.STARTING


# ---------------------------------------------------------------- exec


async def run_exec(
    view: View,
    relays: Relays,
    inputs: AsyncIterator[ExecInput],
    *,
    who: str,
    note: Callable[..., None] = lambda **_: None,
) -> AsyncGenerator[ExecOutput, None]:
    """Runs a command inside a task; relays both ways until it ends. Raises Invalid, NotFound,
    Conflict (the task does not run, or the command could not be started), Unavailable.
    """
    first = await anext(aiter(inputs), None)
    if first is None or first.start is None:
        raise errors.Invalid("the first message must say which command to run in which task")
    start = first.start
    if not start.command:
        raise errors.Invalid("give the command to run")
    task = one_task(view, start.task, runs, "a command can only run in a task that is running")
    check_engine(view, task)
    request = RelayRequest(task_id=task.id, exec=structs.replace(start, task=task.id))
    # Without the command: people put passwords there.
    log.info("exec", who=who, task_id=task.id, node_id=task.node_id, tty=start.tty)
    note(what="exec", kind="task", name=name_of(task, view), object_id=task.id, tty=start.tty)
    async with relays.open(task.node_id, request) as relay:
        left = asyncio.Event()
        sender = asyncio.create_task(_send_inputs(relay, inputs, left), name="exec input")
        try:
            async for frame in relay.frames():
                if frame.error is not None:
                    raise errors.Conflict(f"task {name_of(task, view)}: {frame.error}")
                if frame.output is not None:
                    yield frame.output
                    if frame.output.exit_code is not None:
                        return
                if frame.end:
                    break
            if left.is_set():
                return
            raise errors.Unavailable(
                f"task {name_of(task, view)}: the stream ended before the command did; whether it "
                "still runs is unknown"
            )
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)


async def _send_inputs(relay: Relay, inputs: AsyncIterator[ExecInput], left: asyncio.Event) -> None:
    """Until the caller has no more to say, which closes the command's input even if it did not say
    so; or until it leaves the command.
    """
    closed = False
    async for message in inputs:
        closed = closed or bool(message.stdin_closed)
        if message.detach:
            left.set()
        await relay.send(RelayFrame(input=message))
        if message.detach:
            return
    if not closed:
        await relay.send(RelayFrame(input=ExecInput(stdin_closed=True)))


def one_task(view: View, ref: str, fits: Callable[[Task], bool], need: str) -> Task:
    """A task by id, name or prefix, which must fit; or the first running task of a service. `need`
    ends a sentence that says that it does not fit.
    """
    for service in view.by(Service, "name", ref) if ref else []:
        running = [t for t in view.by(Task, "service", service.id) if runs(t)]
        if not running:
            raise errors.Conflict(
                f'service "{ref}" has no running task; `swarmctl service ps {ref}` tells why'
            )
        return min(running, key=lambda t: (t.slot, t.id))
    task = find(view, Task, ref)
    if not fits(task):
        state = states.label(task.status.state) if task.status else "new"
        raise errors.Conflict(f"task {name_of(task, view)} ({task.id}) is {state}; {need}")
    return task


def check_engine(view: View, task: Task) -> None:
    """Raises Unavailable where the engine that has the task is known not to answer: the node would
    ask it in vain, for as long as a call to it may take.
    """
    node = view.get(Node, task.node_id)
    if node is None or node.description is None:
        return
    spec = spec_of_version(view, task.service_id, task.spec_version)
    if not lost_at_ns(node, requirement_of(spec).static.hindrance):
        return
    said = (p.message for p in node.description.runtime_problems if p.cause == ENGINE_UNRESPONSIVE)
    raise errors.Unavailable(
        f"node {name_of(node)}: {next(said, 'its engine does not answer')}; try again when it does"
    )


def runs(task: Task) -> bool:
    return (
        bool(task.node_id)
        and task.status is not None
        and (task.status.state in (TaskState.STARTING, TaskState.RUNNING))
    )
