"""The engine's event stream, kept open, and the listings that make up for what it lost.

Docker's engine remembers its last 256 events until it restarts, so after a reconnect `since` alone
would lose some: each time the stream is open, all containers are listed and compared with what is
known. Both sources go through the watchlist, which tells each change once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import structlog

from agent.runtime.base import Event, Failed, Phase
from agent.runtime.docker.engine import INSPECT_S, PING_S, Engine, Refusal, filters
from agent.runtime.docker.inspection import (
    KILLED,
    End,
    end_of,
    health_of_status,
    last_output,
    phase_of,
)
from agent.runtime.docker.logs import seconds
from agent.runtime.docker.outage import Outage
from agent.runtime.docker.spec import LABEL_NODE
from agent.runtime.docker.watch import GONE, Watched, Watchlist
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("docker")

# A lost stream is opened again for this long (an engine that restarts); then `events` raises.
RECONNECT_S = 5.0
RECONNECT_PAUSE_S = 0.2
# A hung engine keeps its socket open and says nothing; it is asked this often, so that it is found
# out after at most this and PING_S.
PING_PERIOD_S = 5.0
HEALTH_WORDS_S = 1.0
# A start that was given up may be asked for again, which takes its turn.
LATE_START_S = 2.0
# Beyond its own grace period a container's stop takes no longer.
STOP_MARGIN_S = 30.0
_REMOVED = End(GONE, "its container was removed by somebody else", forced=True)
_STOPPED = "it was stopped by somebody else, or with its engine"
# Signals that are meant to end a container; as others send them, by number or name.
_ENDING = frozenset({"2", "3", "9", "15", "SIGINT", "SIGQUIT", "SIGKILL", "SIGTERM"})


class EventStream:
    """Events of one node's containers."""

    def __init__(
        self,
        engine: Engine,
        watchlist: Watchlist,
        outage: Outage,
        *,
        node_id: str,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._watchlist = watchlist
        self._outage = outage
        self._node_id = node_id
        self._clock = clock
        self._closed = asyncio.Event()
        # Ends of containers that somebody else has started again.
        self._endings: set[asyncio.Task[None]] = set()
        # Time of the newest event seen, on the engine's clock; 0: none.
        self._seen_ns = 0

    def close(self) -> None:
        """Ends `events`."""
        self._closed.set()

    async def events(self) -> AsyncIterator[Event]:
        """See Runtime.events. Raises Unavailable when the engine stays away, TimedOut when it
        hangs.
        """
        pump = asyncio.create_task(self._pump())
        closed = asyncio.create_task(self._closed.wait())
        try:
            while not closed.done():
                while (event := self._watchlist.take()) is not None:
                    yield event
                ready = asyncio.create_task(self._watchlist.ready.wait())
                try:
                    await asyncio.wait({ready, pump, closed}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    ready.cancel()
                if pump.done() and not closed.done():
                    pump.result()
        finally:
            for task in (pump, closed, *self._endings):
                task.cancel()
            await asyncio.gather(pump, closed, *self._endings, return_exceptions=True)

    async def _pump(self) -> None:
        """Feeds the watchlist from the engine until the engine stays away."""
        lost_s: float | None = None
        while True:
            reason, hangs = "", False
            opened = asyncio.Event()
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._follow(opened))
                    await opened.wait()
                    # Only now, so that nothing falls between the listing and the stream.
                    await self._reconcile()
                    lost_s = None
                    group.create_task(self._ping())
            except* (Refusal, errors.SwarmError) as lost:
                reason = str(lost.exceptions[0])
                hangs = any(isinstance(e, errors.TimedOut) for e in lost.exceptions)
            if hangs:
                raise errors.TimedOut(reason)
            self._outage.began()
            now_s = self._clock.monotonic_s()
            if lost_s is None:
                lost_s = now_s
                log.info("engine_events_lost", socket=self._engine.socket, reason=reason)
            if now_s - lost_s >= RECONNECT_S:
                raise errors.Unavailable(reason)
            await asyncio.sleep(RECONNECT_PAUSE_S)

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_PERIOD_S)
            await self._engine.ping()

    # -------------------------------------------------------------- the stream

    async def _follow(self, opened: asyncio.Event) -> None:
        """Reads the engine's stream; always ends with an error."""
        wanted = {"type": ["container"], "label": [f"{LABEL_NODE}={self._node_id}"]}
        params = {"filters": json.dumps(wanted)}
        if self._seen_ns:
            params["since"] = seconds(self._seen_ns + 1)
        async with self._engine.stream("GET", "events", params=params, timeout_s=PING_S) as answer:
            opened.set()
            buffer = b""
            while chunk := await self._engine.read(answer):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        await self._hear(json.loads(line))
        raise errors.Unavailable(f"the engine at {self._engine.socket} closed its event stream")

    async def _hear(self, said: Mapping[str, Any]) -> None:
        """One event of the engine's."""
        self._seen_ns = max(self._seen_ns, int(said.get("timeNano") or 0))
        actor = said.get("Actor") or {}
        attributes = dict(actor.get("Attributes") or {})
        entry = self._watchlist.of_container(attributes, str(actor.get("ID")))
        if entry is None:
            return
        action, _, detail = str(said.get("Action") or said.get("status") or "").partition(":")
        if action == "oom":
            entry.oom = True
        elif action == "kill":
            signal = str(attributes.get("signal") or "")
            entry.killed |= signal in _ENDING or signal == entry.stop_signal
        elif action in ("die", "died"):  # the second is Podman's word
            code = int(attributes.get("exitCode") or attributes.get("containerExitCode") or 0)
            self._watchlist.exit(entry, await self._end(entry, code))
        elif action == "health_status":
            await self._hear_health(entry, detail.strip() or attributes.get("health_status", ""))
        elif action == "start" and (
            entry.phase is Phase.EXITED or (entry.phase is Phase.CREATED and not entry.starting)
        ):
            self._end_again(entry)
        elif action in ("destroy", "remove"):
            self._watchlist.exit(entry, _REMOVED)

    async def _hear_health(self, entry: Watched, status: str) -> None:
        if status == "healthy":
            self._watchlist.health(entry, "", healthy=True)
        elif status == "unhealthy":
            message = ""
            # What it said is worth a moment; its connections are not to go on for longer than that.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_WORDS_S):
                    container = await inspect(self._engine, entry.container_id)
                    message = last_output(container) if container else ""
            self._watchlist.health(entry, message, healthy=False)

    async def _end(self, entry: Watched, code: int) -> End:
        """How and why it ended; the engine is asked only where there may be more to know."""
        if entry.phase is not Phase.RUNNING or entry.stopping:
            return End(code)
        end = End(code)
        if code == KILLED or entry.oom:
            container = await inspect(self._engine, entry.container_id)
            end = end_of(container, oom=entry.oom) if container else end
        if entry.killed and not end.message:
            end = end._replace(message=_STOPPED, forced=True)
        return end

    def _end_again(self, entry: Watched) -> None:
        """A task that has ended stays so: its replacement runs, and nobody would stop this one. The
        event of a start of ours that was short-lived may come this late too; then nothing runs.
        Neither may one begin whose start was given up: the engine hung, and does now what it was
        asked for then.
        """

        late = entry.phase is Phase.CREATED

        async def stop() -> None:
            if late:
                await asyncio.sleep(LATE_START_S)
                if entry.starting or entry.phase is Phase.RUNNING:
                    return  # it is wanted all the same
            path = f"containers/{entry.container_id}/stop"
            try:
                # The engine waits for the container's own grace period.
                timeout_s = entry.grace_s + STOP_MARGIN_S
                await self._engine.call("stop", "POST", path, timeout_s=timeout_s)
            except (Refusal, errors.SwarmError) as error:
                # Removed meanwhile, or the engine is away: the next listing tells.
                log.info("ended_task_not_stopped", task_id=entry.task_id, reason=str(error))

        log.info("ended_task_runs_again", task_id=entry.task_id)
        ending = asyncio.create_task(stop())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    # -------------------------------------------------------------- the listing

    async def _reconcile(self) -> None:
        """Finds by listing what happened while nobody listened."""
        listed = {str(found["Id"]): found for found in await list_all(self._engine, self._node_id)}
        for entry in self._watchlist:
            found = listed.get(entry.container_id, {})
            if entry.phase is Phase.EXITED and phase_of(str(found.get("State"))) is Phase.RUNNING:
                self._end_again(entry)
            if entry.phase is not Phase.RUNNING:
                continue
            listed_healthy = health_of_status(str(found.get("Status", "")))
            changed = listed_healthy is not None and listed_healthy is not entry.healthy
            runs = phase_of(str(found.get("State", ""))) is Phase.RUNNING
            if runs and not changed:
                continue
            container = await inspect(self._engine, entry.container_id)
            if container is None:
                self._watchlist.exit(entry, _REMOVED)
            elif phase_of(str(container["State"].get("Status"))) is Phase.EXITED:
                self._watchlist.exit(entry, self._outage.end_of(container, entry))
            elif changed:
                message = "" if listed_healthy else last_output(container)
                self._watchlist.health(entry, message, healthy=bool(listed_healthy))
        self._outage.ended()


async def list_all(engine: Engine, node_id: str) -> list[dict[str, Any]]:
    """All containers of this node, in any state. Raises Refusal."""
    params = {"all": "1", **filters(label=f"{LABEL_NODE}={node_id}")}
    listed = await engine.call("list", "GET", "containers/json", params=params, timeout_s=PING_S)
    return list(listed or ())


async def inspect(engine: Engine, container_id: str) -> dict[str, Any] | None:
    """All about a container; None: there is none. Raises Failed."""
    try:
        path = f"containers/{container_id}/json"
        return dict(await engine.call("inspect", "GET", path, timeout_s=INSPECT_S))
    except Refusal as refusal:
        if refusal.status == 404:
            return None
        raise Failed(f"container {container_id[:12]}: {refusal.message}") from None
