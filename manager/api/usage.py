"""What nodes and their tasks use, as one stream.

One relay per node that is concerned: the node measures itself and its tasks in one go (the agent's
part), and here names, slots and GPUs are filled in. Tasks and nodes that come and go are followed;
a relay that breaks (the node's session moved to another manager) is opened again. A node that
cannot be measured becomes a sentence in `problems`, once until it is heard again.

Bounded: of each node only the newest measurement waits for a slow caller, with the newest line of
each task; so many nodes, and so many lines a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import structlog
from msgspec import structs

from manager.api.lookup import find, name_of
from manager.api.relays import Relays
from manager.api.watching import dirty, stack_name
from manager.store import Store, Topic
from swarm import errors, states
from swarm.clock import SECOND_NS
from swarm.v1 import (
    Kind,
    Node,
    NodeState,
    NodeUsage,
    RelayRequest,
    Service,
    StatsRequest,
    StatsResponse,
    Task,
    TaskState,
    TaskStats,
    UsageOptions,
)

log = structlog.get_logger("api")

# Streams of one call.
NODES_MAX = 1000
# Lines of nodes and tasks that one call may bring a second. A line costs a manager 10 us: 1,000
# tasks on 20 nodes each second take it 1 % of a core.
LINES_PER_S_MAX = 10_000
PERIOD_NS_MIN, PERIOD_NS_DEFAULT, PERIOD_NS_MAX = (
    SECOND_NS // 5,
    SECOND_NS,
    3600 * SECOND_NS,
)
# A node that cannot be measured is asked again after a pause, which doubles.
RETRY_S_MIN, RETRY_S_MAX = 0.2, 10.0
# Where there are only two measurements, it is given up after so long.
ONCE_S_MAX = 5.0
# A broken relay is a problem only when it lasts: a session that moves takes a moment.
SILENT_S = 3.0
# Measurements this close together become one message, as do changes of what is concerned.
GATHER_S = 0.05
SETTLE_S = 0.5


@dataclass(slots=True)
class _Followed:
    """A node of the call."""

    reader: asyncio.Task[None]
    options: UsageOptions
    # Not given out yet: the newest, or with `once` all of them.
    waiting: list[NodeUsage] = field(default_factory=list)


class UsageReader:
    """One call: which nodes are concerned, and what they have said."""

    def __init__(self, store: Store, relays: Relays, request: StatsRequest) -> None:
        """Raises NotFound, Invalid, Exhausted."""
        self._store = store
        self._relays = relays
        self._request = request
        self._chosen = _Chosen(store, request)
        concerned = self._chosen.concerned()
        self._period_ns = _period_ns(request, concerned, self._chosen)
        self._nodes: dict[str, _Followed] = {}
        self._names: dict[str, _Names] = {}  # by task
        self._problems: list[str] = []
        self._told_many = False
        self._woken = asyncio.Event()
        self._failure: BaseException | None = None  # a defect of ours, for the caller's log

    async def read(self) -> AsyncGenerator[StatsResponse, None]:
        """Measurements until the caller ends the call; with `once` two of each node."""
        follower: asyncio.Task[None] | None = None
        ending: list[asyncio.Task[None]] = []
        try:
            self._follow_nodes(ending)
            if not self._request.once:
                follower = asyncio.create_task(self._follow(ending), name="stats follow")
            while True:
                over = self._request.once and all(n.reader.done() for n in self._nodes.values())
                if self._failure is not None:
                    raise self._failure
                response = self._take()
                if response is not None:
                    yield response
                elif over:
                    return
                else:
                    await self._woken.wait()
                    await asyncio.sleep(GATHER_S)
                self._woken.clear()
        finally:
            tasks = [n.reader for n in self._nodes.values()] + ending
            if follower is not None:
                tasks.append(follower)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self) -> StatsResponse | None:
        """What has been heard since the last message; of each node one measurement."""
        nodes = [n.waiting.pop(0) for n in self._nodes.values() if n.waiting]
        problems, self._problems = self._problems, []
        if not nodes and not problems:
            return None
        return StatsResponse(nodes=tuple(nodes), problems=tuple(problems))

    # -------------------------------------------------------------- which nodes

    async def _follow(self, ending: list[asyncio.Task[None]]) -> None:
        """Opens and ends relays as tasks and nodes come and go."""
        topics: tuple[Topic, ...] = (("kind", Kind.NODE),)
        if not self._chosen.everything:
            topics += tuple(("service", i) for i in self._chosen.watched())
        try:
            async with dirty(self._store, topics) as changed:
                while True:
                    await changed.wait()
                    changed.clear()
                    self._follow_nodes(ending)
                    ending[:] = [task for task in ending if not task.done()]
                    await asyncio.sleep(SETTLE_S)
        except Exception as error:
            self._failure = error
            self._woken.set()

    def _follow_nodes(self, ending: list[asyncio.Task[None]]) -> None:
        concerned = self._chosen.concerned()
        for node_id in [i for i in self._nodes if i not in concerned]:
            followed = self._nodes.pop(node_id)
            followed.reader.cancel()
            ending.append(followed.reader)
        for node_id, options in concerned.items():
            followed_now = self._nodes.get(node_id)
            if followed_now is not None and followed_now.options == options:
                continue
            if followed_now is None and len(self._nodes) >= NODES_MAX:
                if not self._told_many:
                    self._told_many = True
                    self._note(f"more than {NODES_MAX} nodes are concerned; the rest is left out")
                return
            if followed_now is not None:
                followed_now.reader.cancel()
                ending.append(followed_now.reader)
            self._begin(node_id, options)

    def _begin(self, node_id: str, options: UsageOptions) -> None:
        reader = asyncio.create_task(self._read_node(node_id, options), name="stats relay")
        self._nodes[node_id] = _Followed(reader, options)
        reader.add_done_callback(self._ended)

    def _ended(self, reader: asyncio.Task[None]) -> None:
        if not reader.cancelled() and reader.exception() is not None:
            self._failure = reader.exception()
        self._woken.set()

    def _note(self, problem: str) -> None:
        self._problems.append(problem)
        self._woken.set()

    # -------------------------------------------------------------- one node

    async def _read_node(self, node_id: str, options: UsageOptions) -> None:
        """Measurements of one node for as long as the call lasts, over sessions that move."""
        once = self._request.once
        asked = structs.replace(options, period_ns=self._period_ns, once=once)
        loop = asyncio.get_running_loop()
        heard_s, told, pause_s = loop.time(), "", RETRY_S_MIN
        while True:
            why = ""
            try:
                async with self._relays.open(node_id, RelayRequest(usage=asked)) as relay:
                    async for frame in relay.frames():
                        if frame.usage is not None:
                            heard_s, told, pause_s = loop.time(), "", RETRY_S_MIN
                            self._heard(node_id, frame.usage)
                        elif frame.error is not None:
                            # It answers, and will not be better off in a moment.
                            why, heard_s = frame.error, float("-inf")
                            break
                        elif frame.end:
                            break
            except errors.SwarmError as error:
                why = error.message
            if once and not why:
                return
            down = self._down(node_id)
            silent_s = loop.time() - heard_s
            over = once and (down or silent_s > ONCE_S_MAX)
            if why and why != told and (down or over or silent_s > SILENT_S):
                told = why
                self._note(f"{self._subject(node_id)} cannot be measured: {why}")
            if over:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_S_MAX)

    def _down(self, node_id: str) -> bool:
        node = self._store.get(Node, node_id)
        return node is None or node.status is None or node.status.state != NodeState.READY

    def _subject(self, node_id: str) -> str:
        down = " (which is down)" if self._down(node_id) else ""
        return f"node {self._node_name(node_id)}{down}"

    def _node_name(self, node_id: str) -> str:
        node = self._store.get(Node, node_id)
        return name_of(node) if node is not None else node_id

    def _heard(self, node_id: str, usage: NodeUsage) -> None:
        followed = self._nodes.get(node_id)
        if followed is None or followed.reader is not asyncio.current_task():
            return
        name = self._node_name(node_id)
        for problem in usage.problems:
            self._problems.append(f"node {name}: {problem}")
        usage = structs.replace(
            usage,
            node_id=node_id,
            node_name=name,
            problems=(),
            tasks=tuple(self._named(stats) for stats in usage.tasks),
        )
        if followed.waiting and not self._request.once:
            usage = _newest(followed.waiting.pop(), usage)
        followed.waiting.append(usage)
        self._woken.set()

    def _named(self, stats: TaskStats) -> TaskStats:
        names = self._names.get(stats.task_id)
        if names is None:
            task = self._store.get(Task, stats.task_id)
            if task is None:
                return stats
            if len(self._names) > 2 * self._store.count(Task):
                self._names.clear()
            service = self._store.get(Service, task.service_id)
            names = self._names[task.id] = _Names(
                name_of(service) if service is not None else task.service_id,
                task.slot,
                task.assigned_gpus,
            )
        return structs.replace(stats, service_name=names.service, slot=names.slot, gpus=names.gpus)


@dataclass(frozen=True, slots=True)
class _Names:
    """What the manager knows of a task that its node does not tell; it never changes."""

    service: str
    slot: int
    gpus: tuple[str, ...]


def _newest(old: NodeUsage, new: NodeUsage) -> NodeUsage:
    """The newer measurement, with the older lines of the tasks that it has none of."""
    ids = {stats.task_id for stats in new.tasks}
    kept = tuple(stats for stats in old.tasks if stats.task_id not in ids)
    return structs.replace(new, tasks=kept + new.tasks) if kept else new


# ---------------------------------------------------------------- what is asked for


class _Chosen:
    """Which tasks and nodes a request is for."""

    def __init__(self, store: Store, request: StatsRequest) -> None:
        """Raises NotFound, Invalid."""
        self._store = store
        services = [find(store, Service, ref).id for ref in request.services]
        if request.stack:
            name = stack_name(store, request.stack)
            services.extend(s.id for s in store.by(Service, "stack", name))
        self.services = tuple(sorted(set(services)))
        self.tasks = tuple(sorted({find(store, Task, ref).id for ref in request.tasks}))
        self.nodes = tuple(sorted({find(store, Node, ref).id for ref in request.nodes}))
        self.everything = not (self.services or self.tasks or self.nodes or request.stack)
        self._nodes_only = request.nodes_only

    def concerned(self) -> dict[str, UsageOptions]:
        """What to ask of which node."""
        store, out = self._store, {}
        if self.everything:
            whole = UsageOptions(node_only=self._nodes_only)
            return {node.id: whole for node in sorted(store.all(Node), key=lambda n: n.id)}
        on = [t for i in self.tasks if (t := store.get(Task, i)) is not None]
        for service_id in self.services:
            on += store.by(Task, "service", service_id)
        part = UsageOptions(
            task_ids=self.tasks, service_ids=self.services, node_only=self._nodes_only
        )
        for node_id in sorted({task.node_id for task in on if _is_there(task)}):
            out[node_id] = part
        for node_id in self.nodes:
            if store.get(Node, node_id) is not None:
                out[node_id] = UsageOptions(node_only=self._nodes_only)
        return out

    def watched(self) -> set[str]:
        """The services whose tasks may move to other nodes."""
        tasks = (self._store.get(Task, i) for i in self.tasks)
        return {*self.services, *(t.service_id for t in tasks if t is not None)}

    def lines(self, concerned: dict[str, UsageOptions]) -> int:
        """Lines of one round of measurements, as things are."""
        if self._nodes_only:
            return len(concerned)
        if self.everything:
            return len(concerned) + self._store.count(Task)
        tasks = len(self.tasks)
        for service_id in self.services:
            tasks += len(self._store.by(Task, "service", service_id))
        for node_id in self.nodes:
            tasks += len(self._store.by(Task, "node", node_id))
        return len(concerned) + tasks


def _is_there(task: Task) -> bool:
    """Whether the task's node has something of it to measure, now or soon."""
    if not task.node_id or task.status is None:
        return False
    return task.status.state >= TaskState.ASSIGNED and not states.ended(task.status.state)


def _period_ns(request: StatsRequest, concerned: dict[str, UsageOptions], chosen: _Chosen) -> int:
    """Raises Invalid, Exhausted."""
    if len(concerned) > NODES_MAX:
        raise errors.Exhausted(
            f"{len(concerned):,} nodes are concerned, and one call measures at most {NODES_MAX:,}; "
            "name some of the nodes, services or tasks"
        )
    lines = chosen.lines(concerned)
    least_ns = max(PERIOD_NS_MIN, lines * SECOND_NS // LINES_PER_S_MAX)
    period_ns = request.period_ns
    if not period_ns:
        return max(PERIOD_NS_DEFAULT, least_ns)
    if not PERIOD_NS_MIN <= period_ns <= PERIOD_NS_MAX:
        raise errors.Invalid(
            f"a period of {period_ns / SECOND_NS:g} s: it must be from "
            f"{PERIOD_NS_MIN / SECOND_NS:g} s to {PERIOD_NS_MAX // SECOND_NS:,} s"
        )
    if period_ns < least_ns:
        raise errors.Exhausted(
            f"{lines:,} nodes and tasks every {period_ns / SECOND_NS:g} s are more than one call "
            f"brings ({LINES_PER_S_MAX:,} a second); ask for a period of at least "
            f"{least_ns / SECOND_NS:.1f} s, for nodes only, or name fewer"
        )
    return period_ns
