"""The managers' end of all agent sessions: the contract's Dispatcher service over the store.

One follower of the store marks, for each change, the one session it concerns (a task's node; all of
them for published ports); the sessions themselves compute what to send (session.py). One writer
enters what agents report (intake.py). Nodes that fall silent are entered as down here, and nowhere
else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Iterable
from urllib.parse import unquote

import structlog
from msgspec import structs

from manager.ca import Sealer, manager_addrs, objects, serving_role
from manager.dispatcher.assignments import concerns_node
from manager.dispatcher.ingress import IngressTable, data_path, published, serves
from manager.dispatcher.intake import Intake, came_up, described, went_down
from manager.dispatcher.liveness import MISSED_MAX, Liveness, period_s
from manager.dispatcher.metrics import (
    HEARTBEAT_PERIOD,
    HEARTBEATS,
    HEARTBEATS_MISSED,
    SESSIONS,
    SESSIONS_ENDED,
)
from manager.dispatcher.relays import Relays
from manager.dispatcher.session import BATCHES_MAX, Session
from manager.store import Change, Store, WatchLost
from swarm import errors
from swarm.clock import SECOND_NS, Clock
from swarm.ids import Rng, new_id
from swarm.rpc import Context
from swarm.v1 import (
    AgentMessage,
    Cluster,
    ClusterInfo,
    Goodbye,
    Hello,
    Kind,
    ManagerMessage,
    Node,
    NodeRole,
    NodeState,
    RelayFrame,
    RelayRequest,
    Service,
    Task,
)

log = structlog.get_logger("dispatcher")

PROTOCOL = 1
HELLO_TIMEOUT_S = 10.0
# After the manager's start agents first have to find it again.
START_GRACE_S = 5.0
# Silent nodes are looked for this often; adds at most as much to the time a lost node is noticed.
LIVENESS_CHECK_S = 0.2
# A look this late means that the manager stood still; then the silence was its own.
LATE_S = 0.5
# Published services are sent to all nodes; changes that come in a row go out together. The pause
# grows so that building and sending them takes a tenth of the time at most.
INGRESS_GATHER_S = 0.05
INGRESS_COST_S = 2e-6  # for one backend in one session's message
INGRESS_SHARE = 10
INGRESS_GATHER_S_MAX = 2.0

_FOLLOWED = (
    Kind.TASK, Kind.NODE, Kind.SERVICE, Kind.NETWORK, Kind.CLUSTER, Kind.KEYRING,
)  # fmt: skip


class Dispatcher:
    """Implements swarm.v1.services.DispatcherServicer. `run` must run while it serves."""

    def __init__(self, store: Store, clock: Clock, rng: Rng, *, sealer: Sealer) -> None:
        self._store = store
        self._clock = clock
        self._rng = rng
        self._sealer = sealer
        self._sessions: dict[str, Session] = {}
        self._intake = Intake(store, clock)
        self._liveness = Liveness()
        self._grace_until_s = 0.0  # nobody is down before: see _stood_still
        self._ingress = IngressTable()
        self._ingress_dirty: set[str] = set()
        self._ingress_wake = asyncio.Event()
        self._facts: ClusterInfo | None = None
        self.relays = Relays(self._ask, rng)

    # -------------------------------------------------------------- life

    async def run(self) -> None:
        """Follows the store and the clock until cancelled; then tells all agents to look for
        another manager.
        """
        self._expect_ready_nodes()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._intake.run())
                group.create_task(self._follow())
                group.create_task(self._publish())
                group.create_task(self._watch_silence())
        finally:
            for session in self._sessions.values():
                session.end(Goodbye(reason="shutdown"))

    def _expect_ready_nodes(self) -> None:
        """Nodes that were ready when an earlier manager ended get their time to come back."""
        now_s = asyncio.get_running_loop().time()
        ready = [
            n.id for n in self._store.all(Node) if n.status and n.status.state == NodeState.READY
        ]
        grace_s = MISSED_MAX * self._period_for(len(ready)) + START_GRACE_S
        for node_id in ready:
            if node_id not in self._sessions:
                self._liveness.expect(node_id, now_s + grace_s)

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
        relay = self.relays.claim(first.hello, context.identity.node_id)
        frames = relay.carry(request)
        async with contextlib.aclosing(frames):
            async for frame in frames:
                yield frame

    # -------------------------------------------------------------- sessions

    async def _take_up(self, request: AsyncIterator[AgentMessage], context: Context) -> Session:
        """Reads Hello and registers the session. From here on there is no await, so whatever
        changes later is marked in the session.
        """
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
        # Who the agent is, is told by its certificate and never by what it says.
        node_id = context.identity.node_id
        node = self._store.get(Node, node_id) if node_id else None
        if node is None or node.revoked:
            raise errors.Denied(
                f"node {node_id or '(none)'} is not in the cluster; join it again with a token"
            )
        return self._register(node_id, hello, _address(context.peer))

    def _register(self, node_id: str, hello: Hello, addr: str) -> Session:
        older = self._sessions.get(node_id)
        if older is not None:
            older.end(Goodbye(reason="superseded"))
        session = Session(
            new_id(self._rng),
            node_id,
            self._store,
            sealer=self._sealer,
            ingress=self._ingress,
            info=self._info,
            period_s=self._period_s,
        )
        self._sessions[node_id] = session
        SESSIONS.set(len(self._sessions))
        self._expect(session)
        self._intake.node(node_id, came_up(hello.description, addr))
        if hello.tasks:
            self._intake.statuses(node_id, hello.tasks)
        log.info("session_begun", node_id=node_id, session_id=session.id, addr=addr)
        return session

    def _drop(self, session: Session) -> None:
        """The session has ended. Its node is down only once it was silent for too long."""
        if self._sessions.get(session.node_id) is not session:
            SESSIONS_ENDED.labels("superseded").inc()
            return
        del self._sessions[session.node_id]
        SESSIONS.set(len(self._sessions))
        SESSIONS_ENDED.labels("ended").inc()
        self.relays.node_lost(session.node_id)
        log.info("session_ended", node_id=session.node_id, session_id=session.id)

    async def _read(self, session: Session, request: AsyncIterator[AgentMessage]) -> None:
        """Takes in what the agent says, until it ends."""
        try:
            async for message in request:
                self._hear(session, message)
        except errors.SwarmError as error:
            session.end(error)
        finally:
            session.end(errors.Unavailable("the agent ended the session"))

    def _hear(self, session: Session, message: AgentMessage) -> None:
        if self._sessions.get(session.node_id) is not session:
            return  # superseded: what it says is older than what its successor says
        node_id = session.node_id
        if message.heartbeat is not None:
            HEARTBEATS.inc()
            session.acknowledge_heartbeat(message.heartbeat.sequence)
        elif message.statuses is not None:
            session.batches += 1
            if session.batches > BATCHES_MAX:
                raise errors.Exhausted(
                    f"the agent sent {session.batches} batches of statuses without waiting for "
                    "the first to be acknowledged"
                )
            sequence = message.statuses.sequence
            self._intake.statuses(
                node_id, message.statuses.reports, lambda: session.acknowledge_statuses(sequence)
            )
        elif message.description is not None:
            self._intake.node(node_id, described(message.description))
        elif message.leaving is not None:
            self._liveness.forget(node_id)
            self._intake.node(node_id, went_down("the node left the cluster"))
            log.info("node_left", node_id=node_id)
            return
        elif message.hello is not None:
            raise errors.Invalid("hello comes once, at a session's begin")
        self._expect(session)

    def _ask(self, node_id: str, request: RelayRequest) -> None:
        session = self._sessions.get(node_id)
        if session is None:
            raise errors.Unavailable(
                f"node {node_id} has no session with this manager; see `swarmctl node ls`"
            )
        session.ask_relay(request)

    # -------------------------------------------------------------- silence

    def _period_s(self) -> float:
        return self._period_for(len(self._sessions))

    def _period_for(self, sessions: int) -> float:
        cluster = next(iter(self._store.all(Cluster)), None)
        configured_ns = cluster.spec.heartbeat_period_ns if cluster and cluster.spec else 0
        period = period_s(sessions, configured_ns)
        HEARTBEAT_PERIOD.set(period)
        return period

    def _expect(self, session: Session) -> None:
        now_s = asyncio.get_running_loop().time()
        # The period may have grown since the agent was told.
        wait_s = MISSED_MAX * max(session.period_s, self._period_s())
        self._liveness.expect(session.node_id, max(now_s + wait_s, self._grace_until_s))

    async def _watch_silence(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begun_s, begun_ns = loop.time(), self._clock.now_ns()
            await asyncio.sleep(LIVENESS_CHECK_S)
            late_s = loop.time() - begun_s - LIVENESS_CHECK_S
            # A machine that is suspended stops the loop's time as well.
            away_s = (self._clock.now_ns() - begun_ns) / SECOND_NS - LIVENESS_CHECK_S
            if max(late_s, away_s) > LATE_S:
                self._stood_still(late_s, away_s)
            for node_id in self._liveness.expired(loop.time()):
                self._lose(node_id)

    def _stood_still(self, late_s: float, away_s: float) -> None:
        """Nobody was heard because nobody listened. Agents that were without an answer for longer
        may have left, and have to find the manager again as after its start.

        `away_s` is by the wall clock, which may just have been set: it grants that time once, and
        moves nothing.
        """
        log.warning("manager_stood_still", late_s=round(late_s, 1), away_s=round(away_s, 1))
        period_s = self._period_s()
        left = max(late_s, away_s) > period_s
        back_s = MISSED_MAX * period_s + START_GRACE_S if left else 0.0
        # What agents had sent before they left is heard only now, and must not shorten it.
        self._grace_until_s = asyncio.get_running_loop().time() + back_s
        self._liveness.postpone(max(0.0, late_s), at_least_s=self._grace_until_s)

    def _lose(self, node_id: str) -> None:
        HEARTBEATS_MISSED.inc()
        log.warning("node_down", node_id=node_id, missed=MISSED_MAX)
        self._intake.node(node_id, went_down(f"{MISSED_MAX} heartbeats were missed"))
        session = self._sessions.get(node_id)
        if session is not None:
            session.end(Goodbye(reason="silent"))

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
            if self._store.get(Node, session.node_id) is None:
                session.end(Goodbye(reason="removed"))
            session.mark_all()

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
        if concerns_node(old, new):
            for node_id in {t.node_id for t in (old, new) if t is not None and t.node_id}:
                if (session := self._sessions.get(node_id)) is not None:
                    session.mark(tasks=(task_id,))
        if serves(old) != serves(new):
            service_id = (new or old).service_id  # type: ignore[union-attr]  # one is set
            if published(self._store.get(Service, service_id)):
                self._dirty((service_id,))

    def _take_node(self, node_id: str, old: Node | None, new: Node | None) -> None:
        session = self._sessions.get(node_id)
        if new is None or new.revoked:
            self._liveness.forget(node_id)
            if session is not None:
                session.end(Goodbye(reason="removed"))
        elif session is not None and (old is None or old.spec != new.spec):
            session.mark_cluster()
        if data_path(old) != data_path(new):
            tasks = self._store.by(Task, "node", node_id)
            self._dirty({t.service_id for t in tasks} | self._ingress.on_node(node_id))
        if (old and old.manager_status) != (new and new.manager_status):
            self._facts = None
            for other in self._sessions.values():
                other.mark_cluster()

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
        pause_s = INGRESS_GATHER_S
        while True:
            await self._ingress_wake.wait()
            await asyncio.sleep(pause_s)
            self._ingress_wake.clear()
            dirty, self._ingress_dirty = self._ingress_dirty, set()
            changed = self._ingress.rebuild(self._store, sorted(dirty))
            if not changed:
                continue
            for session in self._sessions.values():
                session.mark(services=changed)
            backends = sum(
                1 + len(s.backends) for i in changed if (s := self._ingress.services.get(i))
            )
            cost_s = INGRESS_COST_S * backends * len(self._sessions)
            pause_s = min(INGRESS_GATHER_S_MAX, max(INGRESS_GATHER_S, INGRESS_SHARE * cost_s))


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
