"""Watches for clients: changes of objects, gap-free, and how far services have come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from manager.api.filters import merge, spec_labels, task_labels
from manager.api.lookup import CLASSES, find, name_of, served
from manager.api.present import present
from manager.api.problems import nearest
from manager.control import service_status
from manager.store import STACK_LABEL, Batch, Change, Store, Topic, WatchLost
from swarm import errors
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
# Messages of a watch carry at most so many events; a larger commit takes several.
EVENTS_MAX = 500
FILTER_KEYS = ("action", "id", "name", "label", "service", "node", "stack")
ACTIONS = ("create", "update", "remove")


# ---------------------------------------------------------------- objects


async def watch_objects(store: Store, request: WatchRequest) -> AsyncGenerator[WatchResponse, None]:
    """Every change of the kinds from the given revision on, each once. Raises Exhausted when the
    caller is too slow, or asks for more of the past than is kept.
    """
    kinds = frozenset(request.kinds or CLASSES)
    for kind in sorted(kinds):
        served(kind)
    chosen = _Chosen(store, request.filters)
    if request.from_revision < 0:
        raise errors.Invalid(f"from_revision {request.from_revision}: a revision is not negative")
    after = request.from_revision - 1 if request.from_revision else None
    with store.watch(*[("kind", k) for k in sorted(kinds)], from_revision=after) as watch:
        yield WatchResponse()
        async for batch in watch:
            events = [e for c in batch.changes if (e := chosen.event(batch, c)) is not None]
            for i in range(0, len(events), EVENTS_MAX):
                yield WatchResponse(events=tuple(events[i : i + EVENTS_MAX]))


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
        return Event(
            action=action,
            kind=change.kind,
            object=present(o),
            old=present(change.old) if action == "update" else None,
            revision=batch.revision,
            time_ns=batch.time_ns,
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
    store: Store, request: WatchServicesRequest
) -> AsyncGenerator[WatchServicesResponse, None]:
    """Statuses at once, then after each change; ends when all of the services are gone. Raises
    NotFound for a service or stack that does not exist.
    """
    chosen = _Services(store, request)
    async with dirty(store, chosen.topics) as changed:
        last: tuple[ServiceStatus, ...] | None = None
        while True:
            changed.clear()
            statuses = chosen.statuses()
            if statuses != last:
                yield WatchServicesResponse(statuses=statuses, revision=store.revision)
                last = statuses
            if all(s.removed for s in statuses):
                return
            await changed.wait()
            await asyncio.sleep(COALESCE_S)


class _Services:
    """The services of one request. Those of a stack are found anew each time, so that what a later
    deploy adds is shown as well; those seen once stay in the list when they are gone.
    """

    def __init__(self, store: Store, request: WatchServicesRequest) -> None:
        self._store = store
        self._stack = request.stack
        self._names: dict[str, str] = {}  # by id
        for ref in request.services:
            service = find(store, Service, ref)
            self._names[service.id] = name_of(service)
        if request.stack:
            self._stack = stack_name(store, request.stack)
        elif not request.services:
            raise errors.Invalid("name the services, or the stack, to be watched")
        self._of_stack()
        # The nodes tell why a task is not placed, so their changes count as well.
        services: list[Topic] = [("service", i) for i in sorted(self._names)]
        kinds: list[Topic] = [("kind", Kind.NODE)]
        if self._stack:
            services, kinds = [], [*kinds, ("kind", Kind.SERVICE), ("kind", Kind.TASK)]
        self.topics = (*services, *kinds)

    def _of_stack(self) -> None:
        if self._stack:
            for service in self._store.by(Service, "stack", self._stack):
                self._names.setdefault(service.id, name_of(service))

    def statuses(self) -> tuple[ServiceStatus, ...]:
        self._of_stack()
        out = []
        for id_, name in sorted(self._names.items(), key=lambda item: item[1]):
            service = self._store.get(Service, id_)
            if service is None:
                out.append(ServiceStatus(service_id=id_, name=name, removed=True, converged=True))
            else:
                out.append(service_status(self._store, service))
        return tuple(out)


def stack_name(store: Store, ref: str) -> str:
    """The stack's name from its name or id; one that exists only as labels of services counts.
    Raises NotFound.
    """
    if store.by(Service, "stack", ref):
        return ref
    return name_of(find(store, Stack, ref))


class Dirty:
    """Tells a reader that something changed since it last looked. The reader looks at the tables
    afresh each time and so misses nothing; falling behind costs a new watch and no more.
    """

    def __init__(self, store: Store, topics: tuple[Topic, ...]) -> None:
        self._store = store
        self._topics = topics
        self._changed = asyncio.Event()
        self._ended = False

    async def wait(self) -> None:
        """Returns after the next change. Raises Unavailable when the store was closed."""
        await self._changed.wait()
        if self._ended:
            raise errors.Unavailable("the manager is stopping; try again, or another manager")

    def clear(self) -> None:
        """The reader looks now. The end is not forgotten."""
        if not self._ended:
            self._changed.clear()

    async def listen(self) -> None:
        try:
            while True:
                try:
                    with self._store.watch(*self._topics) as watch:
                        self._changed.set()
                        async for _ in watch:
                            self._changed.set()
                    return
                except WatchLost:
                    continue
        finally:
            self._ended = True
            self._changed.set()


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
