"""The services that every node listens for, with where their replicas are.

One table for all sessions, kept up from the store's changes. What has changed of it is packed once
and the same bytes go to every agent that knows as much: named whole to each of a thousand agents at
each change, a service of 10,000 backends kept a manager busy for minutes.

Each change of a service has a number. A session remembers the number of what it has sent, and
`packed` makes the difference from there to now, or the whole service where the difference is no
longer known or is not smaller.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from msgspec import structs

from manager.store import View
from swarm.v1 import (
    Backend,
    IngressChange,
    IngressService,
    IngressUpdate,
    Node,
    PortConfig,
    Service,
    Task,
    TaskState,
    encode,
)

# As in TaskStatus.cause: its healthcheck has failed and it is being stopped.
UNHEALTHY = "unhealthy"
# Changes of a service that are remembered: sessions lag behind by one or two.
CHANGES_MAX = 32
# Half of the ids' bytes are no chance; more effort saves little more.
ZLIB_LEVEL = 1


@dataclass(slots=True)
class _Listed:
    """A service in the table."""

    head: IngressService  # without backends
    backends: dict[str, Backend]
    number: int
    # What each of the last changes, by their numbers, was about: ids of tasks.
    changes: deque[tuple[int, frozenset[str]]] = field(
        default_factory=lambda: deque(maxlen=CHANGES_MAX)
    )
    # The number from which on the changes tell everything.
    since: int = 0
    whole: IngressService | None = None

    def service(self) -> IngressService:
        """The service with all its backends, in order of their tasks."""
        if self.whole is None:
            backends = tuple(self.backends[i] for i in sorted(self.backends))
            self.whole = structs.replace(self.head, backends=backends)
        return self.whole

    def changed_since(self, number: int) -> set[str] | None:
        """The tasks of all changes after that one; None: that is not known any more."""
        if number < self.since:
            return None
        out: set[str] = set()
        for changed, task_ids in self.changes:
            if changed > number:
                out |= task_ids
        return out


class _Services(Mapping[str, IngressService]):
    """The services as messages, made when they are asked for."""

    def __init__(self, listed: dict[str, _Listed]) -> None:
        self._listed = listed

    def __getitem__(self, service_id: str) -> IngressService:
        return self._listed[service_id].service()

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __contains__(self, service_id: object) -> bool:
        return service_id in self._listed

    def __len__(self) -> int:
        return len(self._listed)


class IngressTable:
    """Built from a view; `rebuild`, or `update` where only tasks have changed, after changes."""

    def __init__(self) -> None:
        self._listed: dict[str, _Listed] = {}
        self.services: Mapping[str, IngressService] = _Services(self._listed)
        self._number = 0
        # By what the sessions know and have to hear of; for as long as the table stays as it is.
        self._packed: dict[tuple[tuple[str, int], ...], bytes] = {}

    def numbers(self) -> dict[str, int]:
        """What a session knows that has been sent all."""
        return {service_id: listed.number for service_id, listed in self._listed.items()}

    def number(self, service_id: str) -> int:
        """Of a service's last change."""
        return self._listed[service_id].number

    def load(self, view: View) -> set[str]:
        """Builds everything anew; returns the ids of the services that differ from before."""
        ids = {s.id for s in view.all(Service)} | self._listed.keys()
        return self.rebuild(view, ids)

    def rebuild(self, view: View, service_ids: Iterable[str]) -> set[str]:
        """Builds these anew; returns the ids of those that differ from before. O(their tasks)."""
        wanted: dict[str, set[str]] = {}
        for service_id in service_ids:
            listed = self._listed.get(service_id)
            before = listed.backends if listed is not None else {}
            now = (t.id for t in view.by(Task, "service", service_id) if serves(t))
            wanted[service_id] = before.keys() | set(now)
        return self.update(view, wanted)

    def update(self, view: View, tasks: Mapping[str, Iterable[str]]) -> set[str]:
        """Brings these services up to date, of whose tasks no others have changed; returns the ids
        of those that differ from before. A service that was not in the table is built whole.
        """
        out = set()
        for service_id, task_ids in tasks.items():
            head = _head(view, service_id)
            listed = self._listed.get(service_id)
            if head is None:
                if listed is not None:
                    del self._listed[service_id]
                    out.add(service_id)
                continue
            if listed is None:
                listed = self._listed[service_id] = _Listed(head, {}, 0)
                task_ids = [t.id for t in view.by(Task, "service", service_id)]
                self._change(view, listed, task_ids)
                self._anew(listed)
            elif listed.head != head:
                self._change(view, listed, task_ids)
                listed.head = head
                self._anew(listed)
            elif not self._change(view, listed, task_ids):
                continue
            out.add(service_id)
        if out:
            self._packed.clear()
        return out

    def _anew(self, listed: _Listed) -> None:
        """More than backends has changed: who knows an earlier state has to hear all."""
        self._number += 1
        listed.number = listed.since = self._number
        listed.changes.clear()
        listed.whole = None

    def _change(self, view: View, listed: _Listed, task_ids: Iterable[str]) -> bool:
        """Brings the backends of these tasks up to date; whether any was not."""
        service_id = listed.head.service_id
        changed = set()
        for task_id in task_ids:
            backend = _backend(view, service_id, task_id)
            if backend == listed.backends.get(task_id):
                continue
            changed.add(task_id)
            if backend is None:
                del listed.backends[task_id]
            else:
                listed.backends[task_id] = backend
        if not changed:
            return False
        self._number += 1
        listed.number = self._number
        if len(listed.changes) == CHANGES_MAX:
            listed.since = listed.changes[0][0]
        listed.changes.append((self._number, frozenset(changed)))
        listed.whole = None
        return True

    def packed(self, known: Mapping[str, int], service_ids: Iterable[str]) -> bytes:
        """What has become of these for an agent that knows them as of these numbers, as its message
        has it; empty: it knows all.
        """
        ids = sorted(i for i in service_ids if i in known or i in self._listed)
        key = tuple(
            (i, known.get(i, 0))
            for i in ids
            if (listed := self._listed.get(i)) is None or listed.number != known.get(i)
        )
        if not key:
            return b""
        found = self._packed.get(key)
        if found is None:
            found = self._packed[key] = zlib.compress(encode(self._update(key)), ZLIB_LEVEL)
        return found

    def _update(self, key: tuple[tuple[str, int], ...]) -> IngressUpdate:
        services: list[IngressService] = []
        changes: list[IngressChange] = []
        removed: list[str] = []
        for service_id, number in key:
            listed = self._listed.get(service_id)
            if listed is None:
                removed.append(service_id)
                continue
            task_ids = listed.changed_since(number) if number else None
            if task_ids is None or len(task_ids) > len(listed.backends):
                services.append(listed.service())
                continue
            now = listed.backends
            changes.append(
                IngressChange(
                    service_id=service_id,
                    backends=tuple(now[i] for i in sorted(task_ids) if i in now),
                    removed=tuple(i for i in sorted(task_ids) if i not in now),
                )
            )
        return IngressUpdate(
            services=tuple(services), changes=tuple(changes), removed=tuple(removed)
        )

    def on_node(self, node_id: str) -> set[str]:
        """The services with a backend on a node."""
        return {
            service_id
            for service_id, listed in self._listed.items()
            if any(b.node_id == node_id for b in listed.backends.values())
        }

    def size(self, service_ids: Iterable[str]) -> int:
        """How many backends these have."""
        return sum(1 + len(listed.backends) for i in service_ids if (listed := self._listed.get(i)))


def published(service: Service | None) -> tuple[PortConfig, ...]:
    """The ports that every node listens on."""
    if service is None or service.pending_delete or service.endpoint is None:
        return ()
    return tuple(
        p for p in service.endpoint.ports if p.publish_mode != "host" and p.published_port > 0
    )


def serves(task: Task | None) -> bool:
    """Whether connections may be sent to the task: it runs, is healthy, and is to stay."""
    return (
        task is not None
        and task.status is not None
        and task.status.state == TaskState.RUNNING
        and task.status.cause != UNHEALTHY
        and task.desired_state in (TaskState.RUNNING, TaskState.COMPLETE)
    )


def data_path(node: Node | None) -> tuple[str, int]:
    """Where a node's relay is."""
    if node is None or node.description is None:
        return "", 0
    return node.description.data_path_addr, node.description.data_path_port


def _head(view: View, service_id: str) -> IngressService | None:
    """What is told of a service besides its backends; None: it publishes nothing."""
    service = view.get(Service, service_id)
    ports = published(service)
    if service is None or not ports:
        return None
    return IngressService(
        service_id=service_id,
        service_name=service.spec.name if service.spec else "",
        ports=ports,
    )


def _backend(view: View, service_id: str, task_id: str) -> Backend | None:
    """The task as one that connections may be sent to; None: it is none."""
    task = view.get(Task, task_id)
    if task is None or task.service_id != service_id or not serves(task):
        return None
    addr, port = data_path(view.get(Node, task.node_id))
    if not addr or not port:
        return None
    return Backend(task_id=task.id, node_id=task.node_id, relay_addr=addr, relay_port=port)
