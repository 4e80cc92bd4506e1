"""The manager's side of one agent's session: what is still to be said to it.

Nothing queues behind a slow agent. Others mark what has changed (a task's id, a service's id, an
acknowledgement), and when the stream has room the difference between what the agent knows and what
the store holds then is computed and sent. So a slow agent gets fewer and larger messages, never old
ones, and memory is bounded by what there is to know. The one real queue, of relay requests, is
bounded; more are refused.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from msgspec import structs

from manager.ca import Sealer
from manager.dispatcher.assignments import Ledger
from manager.dispatcher.ingress import IngressTable
from manager.dispatcher.metrics import ASSIGNMENTS
from manager.store import View
from swarm import errors
from swarm.clock import SECOND_NS
from swarm.v1 import (
    Assignments,
    ClusterInfo,
    Goodbye,
    HeartbeatAck,
    ManagerMessage,
    Node,
    NodeDescription,
    RelayRequest,
    StatusAck,
    Task,
    Welcome,
)

RELAY_REQUESTS_MAX = 300  # that wait to be sent to one agent; one client's call asks for so many
# Of one agent, not committed yet: from then on it is not read until there are fewer. Ours sends one
# batch at a time, and has everything in its hello.
REPORTS_MAX = 10_000
BATCHES_MAX = 8


class Session:
    """One agent's session, from Hello to its end."""

    def __init__(
        self,
        session_id: str,
        node_id: str,
        view: View,
        *,
        description: NodeDescription | None,
        addr: str,
        sealer: Sealer,
        ingress: IngressTable,
        info: Callable[[str], ClusterInfo],
        period_s: Callable[[], float],
        packs: bool = False,
    ) -> None:
        """`packs`: the agent takes published services packed."""
        self.id = session_id
        self.node_id = node_id
        # What the agent was told last.
        self.period_s = period_s()
        # What the agent says of its node, and the address that it calls from.
        self.description = description
        self.addr = addr
        # The store has come to say that the node's session is with this manager: from here on, its
        # saying otherwise means that the node has moved.
        self.entered = False
        # The agent has said that the node leaves the cluster.
        self.leaving = False
        self._batches = 0
        self._reports = 0
        self._room = asyncio.Event()
        self._room.set()
        self._view = view
        self._ingress = ingress
        self._info = info
        self._now_period_s = period_s
        self._ledger = Ledger(node_id, sealer)
        self._wake = asyncio.Event()
        self._tasks: set[str] = set()
        self._networks: set[str] = set()
        self._services: set[str] = set()
        # Services whose ports the agent listens on, as of which number of the table.
        self._published: dict[str, int] = {}
        self._packs = packs
        self._cluster_changed = False
        self._told: ClusterInfo | None = None
        self._heartbeat: int | None = None
        self._acknowledged: deque[int] = deque()
        self._relays: deque[RelayRequest] = deque()
        self._end: Goodbye | errors.SwarmError | None = None

    # -------------------------------------------------------------- marks

    def mark(
        self,
        *,
        tasks: Iterable[str] = (),
        networks: Iterable[str] = (),
        services: Iterable[str] = (),
    ) -> None:
        """These may have changed. Services: their published ports or backends."""
        self._tasks.update(tasks)
        self._networks.update(networks)
        self._services.update(services)
        self._wake.set()

    def mark_ended(self, task_id: str) -> None:
        """The task has ended, as its node has told: it may not need its secrets any more."""
        if self._ledger.uses(task_id):
            self.mark(tasks=(task_id,))

    def mark_all(self) -> None:
        """Anything may have changed."""
        ours = (t.id for t in self._view.by(Task, "node", self.node_id))
        self.mark(
            tasks=self._ledger.known().union(ours),
            services=self._published.keys() | self._ingress.services.keys(),
        )
        self.mark_cluster()

    def mark_cluster(self) -> None:
        """The cluster's facts or the node's role may have changed."""
        self._cluster_changed = True
        self._wake.set()

    def acknowledge_heartbeat(self, sequence: int) -> None:
        self._heartbeat = sequence
        self._wake.set()

    def take(self, reports: int) -> None:
        """So many reports came in one message, and are on their way to the store."""
        self._batches += 1
        self._reports += reports
        if self._batches >= BATCHES_MAX or self._reports >= REPORTS_MAX:
            self._room.clear()

    async def room(self) -> None:
        """Until the agent may be read on: see REPORTS_MAX."""
        await self._room.wait()

    def taken(self, reports: int, sequence: int | None) -> None:
        """They are committed. `sequence`: as the agent counts the message, if it does."""
        self._batches -= 1
        self._reports -= reports
        if self._batches < BATCHES_MAX and self._reports < REPORTS_MAX:
            self._room.set()
        if sequence is not None:
            self._acknowledged.append(sequence)
            self._wake.set()

    def ask_relay(self, request: RelayRequest) -> None:
        """Raises Exhausted."""
        if len(self._relays) >= RELAY_REQUESTS_MAX:
            raise errors.Exhausted(
                f"node {self.node_id} already has {RELAY_REQUESTS_MAX} streams to open; try later"
            )
        self._relays.append(request)
        self._wake.set()

    def end(self, why: Goodbye | errors.SwarmError) -> None:
        """The session ends: with a goodbye, or as a failed call. The first reason counts."""
        self._end = self._end or why
        self._wake.set()

    @property
    def ended(self) -> bool:
        """Nothing is told or heard any more, though the stream may still be open."""
        return self._end is not None

    @property
    def ending(self) -> str:
        """Why it has ended, as the goodbye says it; "ended" without one."""
        return self._end.reason if isinstance(self._end, Goodbye) else "ended"

    # -------------------------------------------------------------- what is said

    async def messages(self) -> AsyncIterator[ManagerMessage]:
        """All that the agent is told, until the session ends."""
        self._told = self._info(self.node_id)
        node = self._view.get(Node, self.node_id)
        yield ManagerMessage(
            welcome=Welcome(
                session_id=self.id,
                heartbeat_period_ns=round(self.period_s * SECOND_NS),
                cluster=self._told,
                node_spec=node.spec if node else None,
            )
        )
        yield ManagerMessage(assignments=self._first())
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (message := self._next()) is not None:
                yield message
            if isinstance(self._end, Goodbye):
                yield ManagerMessage(goodbye=self._end)
                return
            if self._end is not None:
                raise self._end

    def _next(self) -> ManagerMessage | None:
        """The most urgent thing to say; None: there is nothing, or the session ends."""
        if self._end is not None:
            return None
        if self._heartbeat is not None:
            sequence, self._heartbeat = self._heartbeat, None
            self.period_s = self._now_period_s()
            return ManagerMessage(
                heartbeat=HeartbeatAck(
                    sequence=sequence, heartbeat_period_ns=round(self.period_s * SECOND_NS)
                )
            )
        if self._acknowledged:
            return ManagerMessage(statuses=StatusAck(sequence=self._acknowledged.popleft()))
        if self._cluster_changed:
            self._cluster_changed = False
            info = self._info(self.node_id)
            if info != self._told:
                self._told = info
                return ManagerMessage(cluster=info)
        if (assignments := self._difference()) is not None:
            return ManagerMessage(assignments=assignments)
        if self._relays:
            return ManagerMessage(relay=self._relays.popleft())
        return None

    def _first(self) -> Assignments:
        services = self._ingress.services
        message = self._ledger.full(self._view)
        ASSIGNMENTS.inc(len(message.tasks))
        if self._packs:
            packed = self._ingress.packed({}, services)
            message = structs.replace(message, packed_ingress=packed)
        else:
            every = tuple(services[i] for i in sorted(services))
            message = structs.replace(message, ingress=every)
        self._published = self._ingress.numbers()
        return message

    def _difference(self) -> Assignments | None:
        """What the agent does not know yet; None: nothing."""
        if not self._tasks and not self._networks and not self._services:
            return None
        tasks, self._tasks = self._tasks, set()
        networks, self._networks = self._networks, set()
        services, self._services = self._services, set()
        message = self._ledger.changed(
            self._view, tasks, networks, ingress=self._published_since(services)
        )
        if message is not None:
            ASSIGNMENTS.inc(len(message.tasks))
        return message

    def _published_since(self, services: Iterable[str]) -> Assignments:
        """What the agent does not know of these published services."""
        table, known = self._ingress.services, self._published
        gone = tuple(i for i in sorted(services) if i not in table and i in known)
        if self._packs:
            said = Assignments(packed_ingress=self._ingress.packed(known, services))
        else:
            new = tuple(table[i] for i in sorted(services) if i in table)
            said = Assignments(ingress=new, removed_ingress=gone)
        known.update((i, self._ingress.number(i)) for i in services if i in table)
        for service_id in gone:
            del known[service_id]
        return said
