"""Watches for clients: changes of objects, gap-free, and how far services have come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from msgspec import structs

from manager.api.filters import merge, spec_labels, task_labels
from manager.api.lookup import CLASSES, find, name_of, served
from manager.api.present import present
from manager.api.problems import nearest
from manager.control import Causes, Tally, service_status
from manager.store import STACK_LABEL, Batch, Change, Store, Topic, Watch, WatchLost
from swarm import errors
from swarm.clock import SECOND_NS, Clock
from swarm.v1 import (
    Event,
    Filter,
    Kind,
    Node,
    Service,
    ServiceStatus,
    Stack,
    Task,
    WatchRequest,
    WatchResponse,
    WatchServicesRequest,
    WatchServicesResponse,
)

# Changes this close together become one message: a progress display needs no more.
COALESCE_S = 0.05
# A status costs as much as the service has tasks, 60 ms at 10,000: one watch takes a tenth of the
# manager's time at most, and is told once a second at least.
WATCH_SHARE = 10
COALESCE_S_MAX = 1.0
# A reader that has not looked at so many changes looks at everything instead.
CHANGES_MAX = 10_000
# Messages of a watch carry at most so many events; a larger commit takes several.
EVENTS_MAX = 500
FILTER_KEYS = ("action", "id", "name", "label", "service", "node", "stack")
ACTIONS = ("create", "update", "remove")


# ---------------------------------------------------------------- objects


async def watch_objects(
    store: Store, clock: Clock, request: WatchRequest
) -> AsyncGenerator[WatchResponse, None]:
    """Every change of the kinds from the given revision or time on, each once, until the given
    time. Raises Exhausted when the caller is too slow, or asks for a revision that is no longer
    kept; of a time only what is kept is given. Raises Unavailable when the manager stops.
    """
    kinds = frozenset(request.kinds or CLASSES)
    for kind in sorted(kinds):
        served(kind)
    chosen = _Chosen(store, request.filters)
    after, kept_from_ns = _begin(store, request)
    until_ns = request.until_ns
    with store.watch(*[("kind", k) for k in sorted(kinds)], from_revision=after) as watch:
        yield WatchResponse(kept_from_ns=kept_from_ns)
        while (batch := await _following(watch, clock, until_ns)) is not None:
            events = [e for c in batch.changes if (e := chosen.event(batch, c)) is not None]
            for i in range(0, len(events), EVENTS_MAX):
                yield WatchResponse(events=tuple(events[i : i + EVENTS_MAX]))


def _begin(store: Store, request: WatchRequest) -> tuple[int | None, int]:
    """The revision after which a watch begins, None: the present one; and from when on changes are
    kept, if that is later than asked for.
    """
    if request.from_revision < 0:
        raise errors.Invalid(f"from_revision {request.from_revision}: a revision is not negative")
    if request.from_revision and request.since_ns:
        raise errors.Invalid("begin a watch with a revision or with a time, not with both")
    if request.until_ns and request.since_ns > request.until_ns:
        raise errors.Invalid("since is later than until: there is nothing between them")
    if request.since_ns:
        return store.kept_since(request.since_ns)
    return (request.from_revision - 1 if request.from_revision else None), 0


async def _following(watch: Watch, clock: Clock, until_ns: int) -> Batch | None:
    """The next commit; None: the time has come. Raises Unavailable when the store was closed."""
    left_s = max(0.0, (until_ns - clock.now_ns()) / SECOND_NS) if until_ns else None
    if left_s == 0 and not watch.pending:
        return None
    try:
        async with asyncio.timeout(left_s):
            batch = await anext(watch, None)
    except TimeoutError:
        return None
    if batch is None:
        raise errors.Unavailable("the manager stops; go on at another one, or when it is back")
    return None if until_ns and batch.time_ns >= until_ns else batch


class _Chosen:
    """Which changes a watch's filters let through."""

    def __init__(self, store: Store, filters: Iterable[Filter]) -> None:
        self._store = store
        wanted = merge(filters)
        for key in wanted:
            if key not in FILTER_KEYS:
                raise errors.Invalid(
                    f"invalid filter {key!r} for events; accepted are {', '.join(FILTER_KEYS)}"
                    f"{nearest(key, FILTER_KEYS)}"
                )
        for action in wanted.get("action", ()):
            if action not in ACTIONS:
                raise errors.Invalid(
                    f"invalid action {action!r}; accepted are {', '.join(ACTIONS)}"
                    f"{nearest(action, ACTIONS)}"
                )
        self._wanted = {k: v for k, v in wanted.items() if v}
        # Resolved now: what is removed while the watch lasts must still match.
        self._services = {find(store, Service, r).id for r in wanted.get("service", ())}
        self._nodes = {find(store, Node, r).id for r in wanted.get("node", ())}

    def event(self, batch: Batch, change: Change) -> Event | None:
        o = change.new if change.new is not None else change.old
        action = "remove" if change.new is None else "create" if change.old is None else "update"
        if o is None or not self._passes(o, action):
            return None
        if action == "update" and o.meta.seen_version:
            return None  # sealed anew: nothing that anybody can see
        return Event(
            action=action,
            kind=change.kind,
            object=present(o),
            old=present(change.old) if action == "update" else None,
            revision=batch.revision,
            time_ns=batch.time_ns,
            who=batch.who,
        )

    def _passes(self, o: Any, action: str) -> bool:
        return all(self._test(key, values, o, action) for key, values in self._wanted.items())

    def _test(self, key: str, values: tuple[str, ...], o: Any, action: str) -> bool:
        match key:
            case "action":
                return action in values
            case "id":
                return any(o.id.startswith(v) for v in values)
            case "name":
                return any(name_of(o, self._store).startswith(v) for v in values)
            case "service":
                return (o.service_id if isinstance(o, Task) else o.id) in self._services
            case "node":
                return (o.node_id if isinstance(o, Task) else o.id) in self._nodes
            case "stack":
                return self._stack_of(o) in values
            case _:
                labels = self._labels_of(o)
                pairs = [v.partition("=") for v in values]
                return all(k in labels and (not sep or labels[k] == v) for k, sep, v in pairs)

    def _labels_of(self, o: Any) -> dict[str, str]:
        if isinstance(o, Task):
            return task_labels(self._store, o)
        return {} if isinstance(o, Stack) else spec_labels(self._store, o)

    def _stack_of(self, o: Any) -> str:
        if isinstance(o, Stack):
            return o.spec.name if o.spec else ""
        return self._labels_of(o).get(STACK_LABEL, "")


# ---------------------------------------------------------------- services


async def watch_services(
    store: Store, clock: Clock, request: WatchServicesRequest
) -> AsyncGenerator[WatchServicesResponse, None]:
    """Statuses at once, then after each change, and when time alone has made a difference: a
    service has run for as long as it is watched. Ends when all of the services are gone. Raises
    NotFound for a service or stack that does not exist.
    """
    chosen = _Services(store, request)
    revision = 0
    while True:
        topics = chosen.topics()
        async with dirty(store, topics) as changed:
            while chosen.topics() == topics:
                begun_s = clock.monotonic_s()
                told = changed.take()
                # A later revision may be in the tables, but only what was told of is looked at.
                revision = max(revision, store.revision if told is None else changed.revision)
                differs = chosen.refresh(told, clock.now_ns())
                pause_s = WATCH_SHARE * (clock.monotonic_s() - begun_s)
                if differs:
                    yield WatchServicesResponse(statuses=chosen.statuses(), revision=revision)
                if chosen.over:
                    return
                if await changed.wait(chosen.wait_s(clock.now_ns())):
                    await asyncio.sleep(min(COALESCE_S_MAX, max(COALESCE_S, pause_s)))


class _Services:
    """The services of one request and their latest statuses. Those of a stack that a later deploy
    adds are taken in when they come; those seen once stay in the list when they are gone.

    A change makes the statuses anew that it can be about: those of the changed service, or of the
    service of a changed task; of the services that look at it (`_reads`: depends_on); and with a
    change of a node, of those that wait or have a task on each node. So a change costs the services
    concerned, however many are watched; of jobs not even that, but what changed (Tally).
    """

    def __init__(self, store: Store, request: WatchServicesRequest) -> None:
        self._store = store
        self._stack = request.stack
        self._names: dict[str, str] = {}  # by id
        self._known: dict[str, ServiceStatus] = {}
        self._settles_ns: dict[str, int] = {}  # when time makes a difference
        self._tallies: dict[str, Tally] = {}  # of jobs
        # Names of the services that it depends on, and those on.
        self._reads: dict[str, frozenset[str]] = {}
        self._topics: tuple[Topic, ...] | None = None  # None: to be worked out
        for ref in request.services:
            service = find(store, Service, ref)
            self._names[service.id] = name_of(service)
        if request.stack:
            self._stack = stack_name(store, request.stack)
            for service in store.by(Service, "stack", self._stack):
                self._names.setdefault(service.id, name_of(service))
        elif not request.services:
            raise errors.Invalid("name the services, or the stack, to be watched")
        for service_id in self._names:
            self._note_reads(service_id, store.get(Service, service_id))

    def topics(self) -> tuple[Topic, ...]:
        """What has to be heard of. It grows when a service comes that was not there."""
        if self._topics is not None:
            return self._topics
        names = frozenset[str]().union(*self._reads.values())
        others = {s.id for name in names for s in self._store.by(Service, "name", name)}
        found: list[Topic] = [("service", i) for i in sorted(others | self._names.keys())]
        # The nodes tell why a task is not placed.
        found.append(("kind", Kind.NODE))
        if self._stack or names:
            # Those that are named need not exist yet.
            found.append(("kind", Kind.SERVICE))
        self._topics = tuple(found)
        return self._topics

    def refresh(self, changes: Iterable[Change] | None, now_ns: int) -> bool:
        """Works the statuses out that changed or whose time has come; None: all. Whether any is
        another than before.
        """
        due = {i for i, at_ns in self._settles_ns.items() if at_ns <= now_ns}
        if changes is None:
            if self._stack:
                for service in self._store.by(Service, "stack", self._stack):
                    self._names.setdefault(service.id, name_of(service))
            self._topics = None
            self._tallies = {}
            concerned = set(self._names)
        else:
            concerned = due | self._concerned(changes)
        differs = False
        causes = Causes(self._store, now_ns)
        for service_id in concerned:
            status = self._status(service_id, now_ns, causes)
            before = self._known.get(service_id)
            self._known[service_id] = status
            differs |= before is None or not _same(before, status)
        return differs

    def _concerned(self, changes: Iterable[Change]) -> set[str]:
        """Ids of the watched services that the changes may be about."""
        found: set[str] = set()
        names: set[str] = set()
        nodes = False
        for change in changes:
            o = change.new if change.new is not None else change.old
            if isinstance(o, Task):
                found.add(o.service_id)
                if (tally := self._tallies.get(o.service_id)) is not None:
                    tally.note(o, self._store)
            elif isinstance(o, Service):
                found.add(o.id)
                self._topics = None
                names.update(name_of(v) for v in (change.old, change.new) if v is not None)
                if self._stack and o.id not in self._names and _in_stack(o, self._stack):
                    self._names[o.id] = name_of(o)
            else:
                nodes = nodes or _shape(change.old) != _shape(change.new)
                if _silent(change.old) != _silent(change.new):
                    # Nobody knows any more of tasks that ran, or again.
                    found.update(self._known)
        if nodes:
            found.update(i for i in self._known if self._asks_nodes(i))
        for service_id in found:
            service = self._store.get(Service, service_id)
            if service is not None:
                names.add(name_of(service))
        found.update(i for i, reads in self._reads.items() if reads & names)
        return found & self._names.keys()

    def _asks_nodes(self, service_id: str) -> bool:
        """Whether the status depends on nodes: something waits or stops, or each node counts."""
        status = self._known[service_id]
        service = self._store.get(Service, service_id)
        mode = service.spec.mode if service is not None and service.spec is not None else None
        per_node = mode is not None and bool(mode.global_service or mode.global_job)
        return per_node or not status.converged or status.settles_in_ns > 0

    def _status(self, service_id: str, now_ns: int, causes: Causes) -> ServiceStatus:
        service = self._store.get(Service, service_id)
        self._settles_ns.pop(service_id, None)
        self._note_reads(service_id, service)
        if service is None:
            return ServiceStatus(
                service_id=service_id, name=self._names[service_id], removed=True, converged=True
            )
        tally = Tally.of(self._store, service, self._tallies.pop(service_id, None))
        if tally is not None:
            self._tallies[service_id] = tally
        status = service_status(self._store, service, now_ns, causes, tally)
        if status.settles_in_ns:
            self._settles_ns[service_id] = now_ns + status.settles_in_ns
        return status

    def _note_reads(self, service_id: str, service: Service | None) -> None:
        """A service that waits for another is stuck when that one is, so it reads on through it."""
        names: set[str] = set()
        ahead = [service] if service is not None else []
        while ahead:
            spec = ahead.pop().spec
            for dependency in spec.depends_on if spec is not None else ():
                if dependency.service not in names:
                    names.add(dependency.service)
                    ahead += self._store.by(Service, "name", dependency.service)
        if names:
            self._reads[service_id] = frozenset(names)
        else:
            self._reads.pop(service_id, None)

    def wait_s(self, now_ns: int) -> float | None:
        """How long until time alone makes a difference; None: it will not."""
        if not self._settles_ns:
            return None
        return max(0.0, (min(self._settles_ns.values()) - now_ns) / SECOND_NS)

    def statuses(self) -> tuple[ServiceStatus, ...]:
        """The latest, by name."""
        return tuple(sorted(self._known.values(), key=lambda s: (s.name, s.service_id)))

    @property
    def over(self) -> bool:
        """Whether all of the services are gone."""
        return all(status.removed for status in self._known.values())


def _same(a: ServiceStatus, b: ServiceStatus) -> bool:
    """Whether the statuses tell the same; the time that passes is no news."""
    return structs.replace(a, settles_in_ns=0) == structs.replace(b, settles_in_ns=0)


def _silent(node: Any) -> Any:
    """The node's runtimes that do not answer."""
    return node and node.status and node.status.unresponsive_since_ns


def _shape(node: Any) -> Any:
    """What of a node statuses depend on."""
    if node is None:
        return None
    return (node.status and node.status.state, node.spec, node.description, node.revoked)


def _in_stack(service: Service, stack: str) -> bool:
    return bool(service.spec and service.spec.labels.get(STACK_LABEL) == stack)


def stack_name(store: Store, ref: str) -> str:
    """The stack's name from its name or id; one that exists only as labels of services counts.
    Raises NotFound.
    """
    if store.by(Service, "stack", ref):
        return ref
    return name_of(find(store, Stack, ref))


class Dirty:
    """Tells a reader that something changed since it last looked. The reader looks at the tables
    afresh each time and so misses nothing; falling behind costs a new watch and no more. A reader
    of many objects can `take` the changes, to look at these alone.
    """

    def __init__(self, store: Store, topics: tuple[Topic, ...]) -> None:
        self._store = store
        self._topics = topics
        self._changed = asyncio.Event()
        self._ended = False
        self._changes: list[Change] | None = None
        # Of the last commit that was heard of.
        self.revision = 0

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Returns after the next change, or when the time is over: False. Raises Unavailable when
        the store was closed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        if self._ended:
            raise errors.Unavailable("the manager is stopping; try again, or another manager")
        return True

    def take(self) -> tuple[Change, ...] | None:
        """The changes since the reader last looked; None: all has to be looked at afresh. The
        reader looks now.
        """
        changes = self._changes
        self.clear()
        return None if changes is None else tuple(changes)

    def clear(self) -> None:
        """The reader looks now. The end is not forgotten."""
        self._changes = []
        if not self._ended:
            self._changed.clear()

    async def listen(self) -> None:
        try:
            while True:
                try:
                    with self._store.watch(*self._topics) as watch:
                        self._changes = None
                        self._changed.set()
                        async for batch in watch:
                            self._note(batch)
                            self._changed.set()
                    return
                except WatchLost:
                    continue
        finally:
            self._ended = True
            self._changed.set()

    def _note(self, batch: Batch) -> None:
        self.revision = batch.revision
        if self._changes is None:
            return
        if len(self._changes) + len(batch.changes) > CHANGES_MAX:
            self._changes = None
        else:
            self._changes.extend(batch.changes)


@asynccontextmanager
async def dirty(store: Store, topics: tuple[Topic, ...]) -> AsyncIterator[Dirty]:
    """A Dirty that listens for as long as the block lasts."""
    changed = Dirty(store, topics)
    listener = asyncio.create_task(changed.listen(), name="api watch")
    try:
        yield changed
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
