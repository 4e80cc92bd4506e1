"""The managers' end of all agent sessions: the contract's Dispatcher service over the store.

One follower of the store marks, for each change, the one session it concerns (a task's node; all of
them for published ports); the sessions themselves compute what to send (session.py). One writer
enters what agents report (intake.py). Which nodes are this manager's, and which of them are down,
is custody.py; streams to nodes of other managers are forward.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Iterable, Sequence
from urllib.parse import unquote

import structlog
from msgspec import structs

from manager.ca import Sealer, manager_addrs, objects, serving_role
from manager.dispatcher.assignments import concerns_node, only_ended
from manager.dispatcher.custody import Custody
from manager.dispatcher.forward import Connect, Forwarding, serve, unreachable
from manager.dispatcher.ingress import IngressTable, data_path, published, serves
from manager.dispatcher.intake import Intake
from manager.dispatcher.metrics import HEARTBEATS, SESSIONS, SESSIONS_ENDED
from manager.dispatcher.relays import Relays
from manager.dispatcher.session import Session
from manager.store import Change, Store, WatchLost
from swarm import errors
from swarm.clock import Clock
from swarm.ids import Rng, new_id
from swarm.rpc import Context
from swarm.v1 import (
    AgentMessage,
    ClusterInfo,
    ForwardFrame,
    Goodbye,
    Hello,
    Kind,
    ManagerMessage,
    Node,
    NodeRole,
    RelayFrame,
    RelayRequest,
    Service,
    Task,
    TaskReport,
)

log = structlog.get_logger("dispatcher")

PROTOCOL = 1
HELLO_TIMEOUT_S = 10.0
# Published services are sent to all nodes; changes that come in a row go out together. The pause
# grows so that building and sending them takes a tenth of the time at most.
INGRESS_GATHER_S = 0.05
INGRESS_COST_S = 1e-4  # for one session's message
INGRESS_BACKEND_S = 1e-7  # for one backend in it: packed once, encrypted for each
INGRESS_SHARE = 10
INGRESS_GATHER_S_MAX = 2.0

_FOLLOWED = (
    Kind.TASK, Kind.NODE, Kind.SERVICE, Kind.NETWORK, Kind.CLUSTER, Kind.KEYRING,
)  # fmt: skip


class Dispatcher:
    """Implements swarm.v1.services.DispatcherServicer, and ManagersServicer's `forward`. `run` must
    run while it serves.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        rng: Rng,
        *,
        sealer: Sealer,
        node_id: str,
        connect: Connect = unreachable,
    ) -> None:
        """`node_id`: of this manager's node. `connect` reaches another manager as this node."""
        self._store = store
        self._rng = rng
        self._sealer = sealer
        self._sessions: dict[str, Session] = {}
        self._closing = False
        self._intake = Intake(store, clock)
        self._local = Relays(self._ask, rng)
        # To any node's task, wherever its session is.
        self.relays = Forwarding(
            self._local, store, node_id=node_id, sessions=self._sessions, connect=connect
        )
        self._custody = Custody(
            store,
            self._intake,
            clock,
            node_id=node_id,
            sessions=self._sessions,
            busy=self._local.nodes,
        )
        self._ingress = IngressTable()
        self._ingress_dirty: set[str] = set()  # services to build anew
        self._ingress_tasks: dict[str, set[str]] = {}  # service -> tasks that may serve or not
        self._ingress_wake = asyncio.Event()
        self._facts: ClusterInfo | None = None

    # -------------------------------------------------------------- life

    async def run(self) -> None:
        """Follows the store and the clock until cancelled; then tells all agents to look for
        another manager.
        """
        self._closing = False
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._intake.run())
                group.create_task(self._follow())
                group.create_task(self._publish())
                group.create_task(self._custody.run())
                group.create_task(self.relays.run())
        finally:
            self._closing = True
            for session in self._sessions.values():
                session.end(Goodbye(reason="shutdown"))

    def lead(self, leading: bool) -> None:
        """Whether this manager leads: then it stands in for those that are not there."""
        self._custody.lead(leading)

    # -------------------------------------------------------------- the service

    async def session(
        self, request: AsyncIterator[AgentMessage], context: Context
    ) -> AsyncIterator[ManagerMessage]:
        """One agent's session. Raises Denied, Invalid (protocol), TimedOut (no Hello)."""
        session = await self._take_up(request, context)
        reading = asyncio.create_task(self._read(session, request))
        try:
            async for message in session.messages():
                yield message
        finally:
            self._drop(session)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    async def relay(
        self, request: AsyncIterator[RelayFrame], context: Context
    ) -> AsyncIterator[RelayFrame]:
        """One stream that a node was asked for. Raises NotFound when nobody waits for it."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(request, None)
        except TimeoutError:
            first = None
        if first is None or first.hello is None:
            raise errors.Invalid("a relay's first frame must be its hello")
        relay = self._local.claim(first.hello, context.identity.node_id)
        frames = relay.carry(request)
        async with contextlib.aclosing(frames):
            async for frame in frames:
                yield frame

    async def forward(
        self, request: AsyncIterator[ForwardFrame], context: Context
    ) -> AsyncIterator[RelayFrame]:
        """A stream that another manager wants to a node whose session is here. Raises NotFound when
        it is not.
        """
        frames = serve(self._local, request)
        async with contextlib.aclosing(frames):
            async for frame in frames:
                yield frame

    # -------------------------------------------------------------- sessions

    async def _take_up(self, request: AsyncIterator[AgentMessage], context: Context) -> Session:
        """Reads Hello and registers the session. From here on there is no await, so whatever
        changes later is marked in the session.
        """
        self._check_taking()
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                message = await anext(request, None)
        except TimeoutError:
            raise errors.TimedOut(f"no hello within {HELLO_TIMEOUT_S:g} s") from None
        hello = message.hello if message is not None else None
        if hello is None:
            raise errors.Invalid("a session's first message must be its hello")
        if hello.protocol != PROTOCOL:
            raise errors.Invalid(
                f"the agent speaks version {hello.protocol} of the session protocol, this manager "
                f"version {PROTOCOL}; update the older of the two"
            )
        self._check_taking()  # a hello may take its time
        # Who the agent is, is told by its certificate and never by what it says.
        node_id = context.identity.node_id
        node = self._store.get(Node, node_id) if node_id else None
        if node is None or node.revoked:
            raise errors.Denied(
                f"node {node_id or '(none)'} is not in the cluster; join it again with a token"
            )
        return self._register(node_id, hello, _address(context.peer))

    def _check_taking(self) -> None:
        """Raises Unavailable while this manager takes no sessions."""
        if self._closing:
            raise errors.Unavailable("this manager is stopping; use another one")
        self._custody.check_in_touch()

    def _register(self, node_id: str, hello: Hello, addr: str) -> Session:
        older = self._sessions.get(node_id)
        if older is not None:
            older.end(Goodbye(reason="superseded"))
        session = Session(
            new_id(self._rng),
            node_id,
            self._store,
            description=hello.description,
            addr=addr,
            sealer=self._sealer,
            ingress=self._ingress,
            info=self._info,
            period_s=self._custody.period_s,
            packs=hello.packed_ingress,
        )
        self._sessions[node_id] = session
        SESSIONS.set(len(self._sessions))
        self._custody.heard(session)
        self._custody.enter(session)
        self._intake.forget(node_id)
        if hello.tasks:
            self._take_in(session, hello.tasks, None)
        log.info("session_begun", node_id=node_id, session_id=session.id, addr=addr)
        return session

    def _drop(self, session: Session) -> None:
        """The session has ended. Its node is down only once it was silent for too long."""
        SESSIONS_ENDED.labels(session.ending).inc()
        if self._sessions.get(session.node_id) is not session:
            return
        del self._sessions[session.node_id]
        SESSIONS.set(len(self._sessions))
        self._local.node_lost(session.node_id)
        self._custody.settle(session.node_id)
        log.info("session_ended", node_id=session.node_id, session_id=session.id)

    async def _read(self, session: Session, request: AsyncIterator[AgentMessage]) -> None:
        """Takes in what the agent says, until it ends."""
        try:
            async for message in request:
                self._hear(session, message)
                await session.room()
        except errors.SwarmError as error:
            session.end(error)
        finally:
            session.end(errors.Unavailable("the agent ended the session"))

    def _hear(self, session: Session, message: AgentMessage) -> None:
        if self._sessions.get(session.node_id) is not session or session.ended:
            return  # what it says is older than what its successor says
        if message.heartbeat is not None:
            HEARTBEATS.inc()
            session.acknowledge_heartbeat(message.heartbeat.sequence)
        elif message.statuses is not None:
            self._take_in(session, message.statuses.reports, message.statuses.sequence)
        elif message.description is not None:
            session.description = message.description
            self._custody.enter(session)
        elif message.leaving is not None:
            session.leaving = True
            self._custody.left(session.node_id)
            return
        elif message.hello is not None:
            raise errors.Invalid("hello comes once, at a session's begin")
        self._custody.heard(session)

    def _take_in(
        self, session: Session, reports: Sequence[TaskReport], sequence: int | None
    ) -> None:
        session.take(len(reports))
        self._intake.statuses(
            session.node_id, reports, lambda: session.taken(len(reports), sequence)
        )

    def _ask(self, node_id: str, request: RelayRequest) -> None:
        session = self._sessions.get(node_id)
        if session is None or session.ended:
            raise errors.NotFound(f"node {node_id} has no session with this manager")
        session.ask_relay(request)

    # -------------------------------------------------------------- following the store

    async def _follow(self) -> None:
        while True:
            with self._store.watch(*(("kind", kind) for kind in _FOLLOWED)) as watch:
                self._resync()
                try:
                    async for batch in watch:
                        for change in batch.changes:
                            self._take(change)
                    return  # the store was closed
                except WatchLost as error:
                    log.warning("dispatcher_fell_behind", reason=error.message)

    def _resync(self) -> None:
        """Compares everything with what each agent knows."""
        self._facts = None
        self._ingress.load(self._store)
        for session in self._sessions.values():
            session.mark_all()
        for node_id in self._sessions.keys() | {n.id for n in self._store.all(Node)}:
            self._settle(node_id)

    def _take(self, change: Change) -> None:
        match change.kind:
            case Kind.TASK:
                self._take_task(change.id, change.old, change.new)
            case Kind.NODE:
                self._take_node(change.id, change.old, change.new)
            case Kind.SERVICE:
                self._take_service(change.id, change.old, change.new)
            case Kind.NETWORK:
                for session in self._sessions.values():
                    session.mark(networks=(change.id,))
            case _:
                self._facts = None
                for session in self._sessions.values():
                    session.mark_cluster()

    def _take_task(self, task_id: str, old: Task | None, new: Task | None) -> None:
        if old is not None and new is not None and only_ended(old, new):
            if (session := self._sessions.get(new.node_id)) is not None:
                session.mark_ended(task_id)
        elif concerns_node(old, new):
            for node_id in {t.node_id for t in (old, new) if t is not None and t.node_id}:
                if (session := self._sessions.get(node_id)) is not None:
                    session.mark(tasks=(task_id,))
        if serves(old) != serves(new):
            service_id = (new or old).service_id  # type: ignore[union-attr]  # one is set
            if published(self._store.get(Service, service_id)):
                self._ingress_tasks.setdefault(service_id, set()).add(task_id)
                self._ingress_wake.set()

    def _take_node(self, node_id: str, old: Node | None, new: Node | None) -> None:
        self._settle(node_id)
        session = self._sessions.get(node_id)
        if session is not None and (old and old.spec) != (new and new.spec):
            session.mark_cluster()
        if data_path(old) != data_path(new):
            tasks = self._store.by(Task, "node", node_id)
            self._dirty({t.service_id for t in tasks} | self._ingress.on_node(node_id))
        if (old and old.manager_status) != (new and new.manager_status):
            self._facts = None
            for other in self._sessions.values():
                other.mark_cluster()

    def _settle(self, node_id: str) -> None:
        self._custody.settle(node_id)
        self.relays.settle(node_id)

    def _take_service(self, service_id: str, old: Service | None, new: Service | None) -> None:
        if published(old) or published(new):
            self._dirty((service_id,))

    def _info(self, node_id: str) -> ClusterInfo:
        """What a node has to know of the cluster."""
        if self._facts is None:
            cluster, keyring = objects(self._store)
            self._facts = ClusterInfo(
                cluster_id=cluster.id,
                managers=manager_addrs(self._store),
                root_ca_pem=cluster.root_ca_pem,
                relay_key=keyring.relay_key,
            )
        node = self._store.get(Node, node_id)
        role = serving_role(node) if node is not None else NodeRole.UNSPECIFIED
        return structs.replace(self._facts, role=role)

    # -------------------------------------------------------------- published ports

    def _dirty(self, service_ids: Iterable[str]) -> None:
        self._ingress_dirty.update(service_ids)
        if self._ingress_dirty:
            self._ingress_wake.set()

    async def _publish(self) -> None:
        """Sends changed services to all sessions, in larger lots the more there is to send."""
        loop = asyncio.get_running_loop()
        next_s = 0.0
        while True:
            await self._ingress_wake.wait()
            await asyncio.sleep(max(INGRESS_GATHER_S, next_s - loop.time()))
            self._ingress_wake.clear()
            dirty, self._ingress_dirty = self._ingress_dirty, set()
            tasks, self._ingress_tasks = self._ingress_tasks, {}
            named = sum(map(len, tasks.values())) + self._ingress.size(dirty)
            changed = self._ingress.update(self._store, dict(sorted(tasks.items())))
            changed |= self._ingress.rebuild(self._store, sorted(dirty))
            if not changed:
                continue
            for session in self._sessions.values():
                session.mark(services=changed)
            cost_s = (INGRESS_COST_S + INGRESS_BACKEND_S * named) * len(self._sessions)
            next_s = loop.time() + min(INGRESS_GATHER_S_MAX, INGRESS_SHARE * cost_s)


def _address(peer: str) -> str:
    """The IP address in gRPC's name of a peer ("ipv4:10.0.0.1:4711"); empty for a unix socket."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    host = rest.rpartition(":")[0].strip("[]")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return ""
