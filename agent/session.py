"""The agent's one conversation with a manager: who to talk to, when to give up on one, what to say.

Owns connecting, heartbeats and the order of messages; decides nothing about tasks. What is said is
pulled from the worker when the stream has room, so nothing piles up behind a slow connection. A
session ends when the stream does, when the manager was silent for three periods, or when a message
is missing from the assignments' count; the next one starts over with everything the node holds.
It is begun at once, with another manager, as long as there is one that has not just failed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import cast

import structlog

from agent import relay
from agent.choice import Choice
from agent.metrics import CONNECTED
from agent.usage import Meter
from agent.worker import Worker
from swarm import errors
from swarm.clock import SECOND_NS
from swarm.ids import Rng
from swarm.rpc import Channel
from swarm.v1 import (
    AgentMessage,
    Assignments,
    ClusterInfo,
    Goodbye,
    Heartbeat,
    Hello,
    Leaving,
    ManagerMessage,
    NodeDescription,
    RelayRequest,
    Welcome,
)
from swarm.v1.services import DispatcherClient

log = structlog.get_logger("session")

PROTOCOL = 1
# The first retry is fast, because the manager may just have been restarted; later ones spare it.
RETRY_S_FIRST, RETRY_S_MAX = 0.2, 5.0
ATTEMPTS_SLOW = 10  # after so many the pause is the longest
# A machine that is gone does not refuse connections. While there are others to try, they are.
CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S_SHORT = 3.0, 1.0
# A manager that takes up a thousand agents at once needs a while for the last of them. The short
# one is SILENT_PERIODS, which are longer the larger the cluster is, but not less than this.
WELCOME_TIMEOUT_S, WELCOME_TIMEOUT_S_SHORT = 10.0, 3.0
SILENT_PERIODS = 3
# A session of this length was a good one: its end says nothing about the sessions before it.
STOOD_S = 5.0
# Another session of this node again within this time is another agent, not a late echo of ours.
ECHO_S = 60.0
RELAYS_MAX = 300  # streams at once: one call may read so many; the next one is refused

Connect = Callable[[str], Awaitable[Channel]]


async def _no_explanation(address: str) -> str:
    return ""


class Session:
    """Keeps one session up with any of the managers. `run` until cancelled."""

    def __init__(
        self,
        worker: Worker,
        *,
        connect: Connect,
        managers: Sequence[str],
        rng: Rng,
        on_cluster: Callable[[ClusterInfo], Awaitable[None]],
        on_removed: Callable[[], None] = lambda: None,
        explain: Callable[[str], Awaitable[str]] = _no_explanation,
        meter: Meter | None = None,
    ) -> None:
        """`explain` tells why a manager at this address may not be reached; empty: it cannot tell.
        `on_cluster` gets each new ClusterInfo (managers, roots, role) before anything that comes
        after it; `on_removed` is called when a manager says that the node is not in the cluster.
        """
        self._worker = worker
        self._connect = connect
        self._choice = Choice(managers, rng)
        self._rng = rng
        self._on_cluster = on_cluster
        self._on_removed = on_removed
        self._explain = explain
        # None: the node is not measured.
        self._meter = meter
        self._period_s = 1.0  # of heartbeats, as the last manager had it
        self._echo_s: float | None = None  # when this node's session was last seen elsewhere
        self._leaving = asyncio.Event()
        self._left = asyncio.Event()
        self.connected = False
        # Why there is no session.
        self.problem = "not connected yet"
        self._said: set[str] = set()  # problems that are in the log since there was a session
        # Streams that managers have asked for and that go on.
        self.relays = 0
        # Set once a manager has taken the node up for the first time.
        self.first = asyncio.Event()

    async def run(self) -> None:
        """Connects, and connects again, until cancelled."""
        rounds = 0  # of all managers in turn since there was a session
        unreached: list[str] = []
        while True:
            manager = self._choice.next()
            hurry = self._choice.several and not rounds
            conversation = _Conversation(self, hurry=hurry)
            error: errors.SwarmError | None = None
            try:
                async with await self._connect(manager) as channel:
                    await channel.ready(
                        timeout_s=CONNECT_TIMEOUT_S_SHORT if hurry else CONNECT_TIMEOUT_S,
                        once=self._choice.several,
                    )
                    await conversation.hold(channel)
            except* errors.SwarmError as group:
                error = _first(group)
            finally:
                self.connected = False
                CONNECTED.set(0)
            if conversation.welcomed:
                rounds = 0
                unreached.clear()
                if conversation.stood:
                    self._choice.stood()
            elif isinstance(error, errors.Unavailable):
                unreached.append(manager)
            over = self._choice.failed(manager, hint=conversation.hint)
            if over:
                error = await self._explained(unreached) or error
                unreached.clear()
            if error is not None:
                self._failed(manager, error, final=over or not rounds)
            if self._rivalled(conversation):
                # The two would end each other's session without pause.
                await asyncio.sleep(self._pause_s(ATTEMPTS_SLOW))
            elif over:
                rounds += 1
                await asyncio.sleep(self._pause_s(rounds))

    def _rivalled(self, conversation: _Conversation) -> bool:
        """Whether another agent has this node's identity, as far as that can be told."""
        if conversation.superseded:
            return True
        if not conversation.moved:
            return False
        now_s = asyncio.get_running_loop().time()
        before_s, self._echo_s = self._echo_s, now_s
        return before_s is not None and now_s - before_s < ECHO_S

    async def _explained(self, unreached: Sequence[str]) -> errors.SwarmError | None:
        """A better reason why none of these could be reached, if one is found."""
        found = await asyncio.gather(*(self._explain(m) for m in dict.fromkeys(unreached)))
        return next((errors.Unavailable(why) for why in found if why), None)

    def _pause_s(self, attempt: int) -> float:
        """Doubles from the first pause to the longest, half to one and a half times of it."""
        pause_s = min(RETRY_S_MAX, RETRY_S_FIRST * 2.0 ** min(attempt - 1, ATTEMPTS_SLOW))
        return min(RETRY_S_MAX, pause_s * (0.5 + self._rng.random()))

    def _failed(self, manager: str, error: errors.SwarmError, *, final: bool) -> None:
        """`final`: it is what people should be told, not one of several failures in a row."""
        if error.message not in self._said:
            self._said.add(error.message)
            log.warning("session_ended", manager=manager, reason=error.message)
        if final:
            self.problem = error.message
        if isinstance(error, errors.Removed):
            # A manager's word that nothing is this node's any more.
            self._worker.assign(Assignments(full=True))
            self._on_removed()

    def _up(self, session_id: str) -> None:
        self.connected, self.problem = True, ""
        self._said.clear()
        CONNECTED.set(1)
        self.first.set()
        log.info("session_up", session_id=session_id)

    async def _learn(self, info: ClusterInfo) -> None:
        if info.managers:
            self._choice.learn(info.managers)
        self._worker.use_cluster(info)
        await self._on_cluster(info)

    async def leave(self, *, timeout_s: float = 3.0) -> bool:
        """Tells the manager that the node leaves; False when nobody could be told in time."""
        self._leaving.set()
        self._worker.on_change()
        try:
            async with asyncio.timeout(timeout_s):
                await self._left.wait()
        except TimeoutError:
            return False
        return True


class _Conversation:
    """One session from Hello to its end."""

    def __init__(self, session: Session, *, hurry: bool) -> None:
        """`hurry`: there are other managers to ask, should this one not answer."""
        self._session = session
        self._worker = session._worker
        self._wake = asyncio.Event()
        self._period_s = session._period_s
        self._welcome_s = WELCOME_TIMEOUT_S
        if hurry:
            self._welcome_s = min(
                WELCOME_TIMEOUT_S,
                max(WELCOME_TIMEOUT_S_SHORT, SILENT_PERIODS * self._period_s),
            )
        self._welcomed_s = 0.0
        self._heard_s = 0.0
        self._heartbeats = 0
        self._sequence = 0  # of the last assignments
        self._told: NodeDescription | None = None
        self.welcomed = False
        self.superseded = False
        # Another manager has a session of this node.
        self.moved = False
        # The manager to ask next, as this one says.
        self.hint = ""

    @property
    def stood(self) -> bool:
        """Whether the session has lasted for a while."""
        return self.welcomed and asyncio.get_running_loop().time() - self._welcomed_s > STOOD_S

    async def hold(self, channel: Channel) -> None:
        """Talks until the session ends; that it has ended is always an error that says why."""
        client = DispatcherClient(channel)
        loop = asyncio.get_running_loop()
        self._heard_s = loop.time() + self._welcome_s
        self._worker.outbox.restart()
        self._worker.on_change = self._wake.set
        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self._watch_silence(channel.target))
                # Channel's streams are generators, whose closing cancels the call.
                stream = cast("AsyncGenerator[ManagerMessage]", client.session(self._say()))
                async with contextlib.aclosing(stream) as answers:
                    async for message in answers:
                        await self._hear(message, client, group)
                watching.cancel()
                raise errors.Unavailable(f"{channel.target} ended the session")
        finally:
            self._worker.on_change = lambda: None

    # -------------------------------------------------------------- what we say

    async def _say(self) -> AsyncIterator[AgentMessage]:
        loop = asyncio.get_running_loop()
        worker = self._worker
        self._told = worker.description()
        yield AgentMessage(
            hello=Hello(
                protocol=PROTOCOL,
                description=self._told,
                tasks=worker.reports(),
                packed_ingress=True,
            )
        )
        due_s = loop.time()
        while True:
            due = await self._wait(due_s if self.welcomed else None)
            self._wake.clear()
            if not self.welcomed:
                continue
            if self._session._leaving.is_set() and not self._session._left.is_set():
                yield AgentMessage(leaving=Leaving())
                self._session._left.set()
            if due or loop.time() >= due_s:
                self._heartbeats += 1
                yield AgentMessage(heartbeat=Heartbeat(sequence=self._heartbeats))
                # From now, not from when it was due: a paused machine owes nobody the lost ones.
                due_s = loop.time() + self._period_s
            if (description := worker.description()) != self._told:
                self._told = description
                yield AgentMessage(description=description)
            if (batch := worker.outbox.take()) is not None:
                yield AgentMessage(statuses=batch)

    async def _wait(self, until_s: float | None) -> bool:
        """Until there may be something to say; whether that is because the time is up."""
        try:
            async with asyncio.timeout_at(until_s):
                await self._wake.wait()
        except TimeoutError:
            return True
        return False

    # -------------------------------------------------------------- what we hear

    async def _hear(
        self, message: ManagerMessage, client: DispatcherClient, group: asyncio.TaskGroup
    ) -> None:
        self._heard()
        if message.heartbeat is not None:
            self._keep(message.heartbeat.heartbeat_period_ns)
        elif message.statuses is not None:
            self._worker.outbox.acknowledged(message.statuses.sequence)
        elif message.assignments is not None:
            self._assign(message.assignments)
        elif message.welcome is not None:
            await self._welcome(message.welcome)
        elif message.cluster is not None:
            await self._session._learn(message.cluster)
        elif message.relay is not None:
            self._relay(message.relay, client, group)
        elif message.goodbye is not None:
            self._goodbye(message.goodbye)

    async def _welcome(self, welcome: Welcome) -> None:
        self._keep(welcome.heartbeat_period_ns)
        if welcome.cluster is not None:
            await self._session._learn(welcome.cluster)
        self.welcomed = True
        self._welcomed_s = asyncio.get_running_loop().time()
        self._heard()
        self._wake.set()
        self._session._up(welcome.session_id)

    def _keep(self, period_ns: int) -> None:
        if period_ns > 0:
            self._period_s = self._session._period_s = period_ns / SECOND_NS

    def _assign(self, assignments: Assignments) -> None:
        """Raises Unavailable when one is missing: a new session gets all of them."""
        expected = self._sequence + 1
        if assignments.sequence != expected or assignments.full != (expected == 1):
            raise errors.Unavailable(
                f"the manager's assignments came out of order: number {assignments.sequence}"
                f"{' (full)' if assignments.full else ''} where {expected} was expected; "
                "starting a new session"
            )
        self._sequence = expected
        self._worker.assign(assignments)

    def _relay(
        self, request: RelayRequest, client: DispatcherClient, group: asyncio.TaskGroup
    ) -> None:
        refused = ""
        if self._session.relays >= RELAYS_MAX:
            refused = f"the node already serves {RELAYS_MAX} streams (logs, exec …); try later"

        async def serve() -> None:
            self._session.relays += 1
            try:
                await relay.serve(
                    client,
                    request,
                    self._worker.runtime_of,
                    meter=self._session._meter,
                    refused=refused,
                )
            finally:
                self._session.relays -= 1

        group.create_task(serve())

    def _goodbye(self, goodbye: Goodbye) -> None:
        self.hint = goodbye.manager
        match goodbye.reason:
            case "removed":
                raise errors.Removed("this node was removed from the cluster")
            case "superseded":
                self.superseded = True
                raise errors.Conflict(
                    "another agent with this node's identity has connected; see that its state "
                    "folder was not copied to another machine"
                )
            case "moved":
                self.moved = True
                raise errors.Unavailable(
                    "another manager has taken up this node; if that goes on, see that the node's "
                    "state folder was not copied to another machine"
                )
            case reason:
                raise errors.Unavailable(f"the manager ended the session: {reason}")

    # -------------------------------------------------------------- silence

    def _heard(self) -> None:
        now_s = asyncio.get_running_loop().time()
        wait_s = SILENT_PERIODS * self._period_s if self.welcomed else self._welcome_s
        self._heard_s = now_s + wait_s

    async def _watch_silence(self, target: str) -> None:
        """Raises Unavailable once the manager was silent for too long."""
        loop = asyncio.get_running_loop()
        while (now_s := loop.time()) < self._heard_s:
            # Not to the end in one go: the welcome, or a shorter period, brings the end nearer.
            await asyncio.sleep(min(self._heard_s - now_s, self._period_s))
        raise errors.Unavailable(
            f"{target} was silent for {SILENT_PERIODS} heartbeats"
            if self.welcomed
            else f"{target} did not answer within {self._welcome_s:g} s"
        )


def _first(group: BaseExceptionGroup[errors.SwarmError]) -> errors.SwarmError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, errors.SwarmError)
    return error
