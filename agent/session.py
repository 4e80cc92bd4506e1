"""The agent's one conversation with a manager: who to talk to, when to give up on one, what to say.

Owns connecting, heartbeats and the order of messages; decides nothing about tasks. What is said is
pulled from the worker when the stream has room, so nothing piles up behind a slow connection. A
session ends when the stream does, when the manager was silent for three periods, or when a message
is missing from the assignments' count; the next one starts over with everything the node holds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import cast

import structlog

from agent import relay
from agent.metrics import CONNECTED
from agent.worker import Worker
from swarm import errors
from swarm.clock import SECOND_NS
from swarm.ids import Rng
from swarm.rpc import Channel
from swarm.v1 import (
    AgentMessage,
    Assignments,
    ClusterInfo,
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
CONNECT_TIMEOUT_S = 3.0
# A manager that takes up a thousand agents at once needs a while for the last of them.
WELCOME_TIMEOUT_S = 10.0
SILENT_PERIODS = 3
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
    ) -> None:
        """`explain` tells why a manager at this address may not be reached; empty: it cannot tell.
        `on_cluster` gets each new ClusterInfo (managers, roots, role) before anything that comes
        after it; `on_removed` is called when a manager says that the node is not in the cluster.
        """
        self._worker = worker
        self._connect = connect
        self._managers = tuple(managers)
        self._rng = rng
        self._on_cluster = on_cluster
        self._on_removed = on_removed
        self._explain = explain
        self._next = 0
        self._leaving = asyncio.Event()
        self._left = asyncio.Event()
        self.connected = False
        # Why there is no session.
        self.problem = "not connected yet"
        # Streams that managers have asked for and that go on.
        self.relays = 0
        # Set once a manager has taken the node up for the first time.
        self.first = asyncio.Event()

    async def run(self) -> None:
        """Connects, and connects again, until cancelled."""
        attempt = 0
        while True:
            manager = self._pick()
            conversation = _Conversation(self)
            try:
                async with await self._connect(manager) as channel:
                    await channel.ready(timeout_s=CONNECT_TIMEOUT_S)
                    await conversation.hold(channel)
            except* errors.SwarmError as group:
                error = _first(group)
                if isinstance(error, errors.Unavailable) and not conversation.welcomed:
                    error = errors.Unavailable(await self._explain(manager) or error.message)
                self._failed(manager, error)
                if isinstance(error, errors.Removed):
                    # A manager's word that nothing is this node's any more.
                    self._worker.assign(Assignments(full=True))
                    self._on_removed()
            finally:
                self.connected = False
                CONNECTED.set(0)
            attempt = 1 if conversation.welcomed else attempt + 1
            if conversation.superseded:  # the two would end each other's session without pause
                attempt = ATTEMPTS_SLOW
            await asyncio.sleep(self._pause_s(attempt))

    def _pick(self) -> str:
        """The managers in turn, from a random one."""
        if not self._managers:
            raise errors.Invalid("no manager's address is known; join the cluster again")
        if self._next == 0:
            self._next = 1 + int(self._rng.random() * len(self._managers))
        self._next += 1
        return self._managers[self._next % len(self._managers)]

    def _pause_s(self, attempt: int) -> float:
        """Doubles from the first pause to the longest, half to one and a half times of it."""
        pause_s = min(RETRY_S_MAX, RETRY_S_FIRST * 2.0 ** min(attempt - 1, ATTEMPTS_SLOW))
        return min(RETRY_S_MAX, pause_s * (0.5 + self._rng.random()))

    def _failed(self, manager: str, error: errors.SwarmError) -> None:
        if error.message != self.problem:
            log.warning("session_ended", manager=manager, reason=error.message)
        self.problem = error.message

    def _up(self, session_id: str) -> None:
        self.connected, self.problem = True, ""
        CONNECTED.set(1)
        self.first.set()
        log.info("session_up", session_id=session_id)

    async def _learn(self, info: ClusterInfo) -> None:
        if info.managers:
            self._managers = info.managers
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

    def __init__(self, session: Session) -> None:
        self._session = session
        self._worker = session._worker
        self._wake = asyncio.Event()
        self._period_s = 1.0
        self._heard_s = 0.0
        self._heartbeats = 0
        self._sequence = 0  # of the last assignments
        self._told: NodeDescription | None = None
        self.welcomed = False
        self.superseded = False

    async def hold(self, channel: Channel) -> None:
        """Talks until the session ends; that it has ended is always an error that says why."""
        client = DispatcherClient(channel)
        loop = asyncio.get_running_loop()
        self._heard_s = loop.time() + WELCOME_TIMEOUT_S
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
            hello=Hello(protocol=PROTOCOL, description=self._told, tasks=worker.reports())
        )
        due_s = loop.time()
        while True:
            await self._wait(due_s if self.welcomed else None)
            self._wake.clear()
            if not self.welcomed:
                continue
            if self._session._leaving.is_set() and not self._session._left.is_set():
                yield AgentMessage(leaving=Leaving())
                self._session._left.set()
            if loop.time() >= due_s:
                self._heartbeats += 1
                yield AgentMessage(heartbeat=Heartbeat(sequence=self._heartbeats))
                # From now, not from when it was due: a paused machine owes nobody the lost ones.
                due_s = loop.time() + self._period_s
            if (description := worker.description()) != self._told:
                self._told = description
                yield AgentMessage(description=description)
            if (batch := worker.outbox.take()) is not None:
                yield AgentMessage(statuses=batch)

    async def _wait(self, until_s: float | None) -> None:
        """Until there may be something to say."""
        try:
            async with asyncio.timeout_at(until_s):
                await self._wake.wait()
        except TimeoutError:
            return

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
            self._goodbye(message.goodbye.reason)

    async def _welcome(self, welcome: Welcome) -> None:
        self._keep(welcome.heartbeat_period_ns)
        if welcome.cluster is not None:
            await self._session._learn(welcome.cluster)
        self.welcomed = True
        self._heard()
        self._wake.set()
        self._session._up(welcome.session_id)

    def _keep(self, period_ns: int) -> None:
        if period_ns > 0:
            self._period_s = period_ns / SECOND_NS

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
            refused = f"the node already serves {RELAYS_MAX} streams of logs and exec; try later"

        async def serve() -> None:
            self._session.relays += 1
            try:
                await relay.serve(client, request, self._worker.runtime_of, refused=refused)
            finally:
                self._session.relays -= 1

        group.create_task(serve())

    def _goodbye(self, reason: str) -> None:
        match reason:
            case "removed":
                raise errors.Removed("this node was removed from the cluster")
            case "superseded":
                self.superseded = True
                raise errors.Conflict(
                    "another agent with this node's identity has connected; see that its state "
                    "folder was not copied to another machine"
                )
            case _:
                raise errors.Unavailable(f"the manager ended the session: {reason}")

    # -------------------------------------------------------------- silence

    def _heard(self) -> None:
        now_s = asyncio.get_running_loop().time()
        wait_s = SILENT_PERIODS * self._period_s if self.welcomed else WELCOME_TIMEOUT_S
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
            else f"{target} did not answer within {WELCOME_TIMEOUT_S:g} s"
        )


def _first(group: BaseExceptionGroup[errors.SwarmError]) -> errors.SwarmError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, errors.SwarmError)
    return error
