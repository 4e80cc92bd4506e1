"""The engine's event stream, kept open, and the listings that make up for what it lost.

Docker's engine remembers its last 256 events until it restarts, so after a reconnect `since` alone
would lose some: each time the stream is open, all containers are listed and compared with what is
known. Both sources go through the watchlist, which tells each change once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import structlog

from agent.runtime.base import Event, Failed, Phase
from agent.runtime.docker.engine import PING_S, Engine, Refusal, filters
from agent.runtime.docker.inspection import (
    KILLED,
    end_of,
    health_of_status,
    last_output,
    phase_of,
)
from agent.runtime.docker.logs import seconds
from agent.runtime.docker.spec import LABEL_NODE
from agent.runtime.docker.watch import GONE, Watched, Watchlist
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("docker")

# A lost stream is opened again for this long (an engine that restarts); then `events` raises.
RECONNECT_S = 5.0
RECONNECT_PAUSE_S = 0.2
# A hung engine keeps its socket open and says nothing; it is asked this often.
PING_PERIOD_S = 15.0
_REMOVED = "its container was removed by somebody else"


class EventStream:
    """Events of one node's containers."""

    def __init__(self, engine: Engine, watchlist: Watchlist, *, node_id: str, clock: Clock) -> None:
        self._engine = engine
        self._watchlist = watchlist
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
        """See Runtime.events. Raises Unavailable when the engine stays away."""
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
            reason = ""
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
            await self._engine.call("ping", "GET", "version", timeout_s=PING_S)

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
        elif action in ("die", "died"):  # the second is Podman's word
            code = int(attributes.get("exitCode") or attributes.get("containerExitCode") or 0)
            self._watchlist.exit(entry, code, await self._why(entry, code))
        elif action == "health_status":
            await self._hear_health(entry, detail.strip() or attributes.get("health_status", ""))
        elif action == "start" and entry.phase is Phase.EXITED:
            self._end_again(entry)
        elif action in ("destroy", "remove"):
            self._watchlist.exit(entry, GONE, _REMOVED)

    async def _hear_health(self, entry: Watched, status: str) -> None:
        if status == "healthy":
            self._watchlist.health(entry, "", healthy=True)
        elif status == "unhealthy":
            container = await inspect(self._engine, entry.container_id)
            message = last_output(container) if container else ""
            self._watchlist.health(entry, message, healthy=False)

    async def _why(self, entry: Watched, code: int) -> str:
        """The reason for an end; the engine is asked only where there may be one."""
        unasked = entry.phase is Phase.RUNNING and not entry.stopping
        if not unasked or (code != KILLED and not entry.oom):
            return ""
        container = await inspect(self._engine, entry.container_id)
        return end_of(container, oom=entry.oom)[1] if container else ""

    def _end_again(self, entry: Watched) -> None:
        """A task that has ended stays so: its replacement runs, and nobody would stop this one. The
        event of a start of ours that was short-lived may come this late too; then nothing runs.
        """

        async def stop() -> None:
            path = f"containers/{entry.container_id}/stop"
            try:
                # The engine waits for the container's own grace period.
                await self._engine.call("stop", "POST", path, timeout_s=None)
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
                self._watchlist.exit(entry, GONE, _REMOVED)
            elif phase_of(str(container["State"].get("Status"))) is Phase.EXITED:
                self._watchlist.exit(entry, *end_of(container, oom=entry.oom))
            elif changed:
                message = "" if listed_healthy else last_output(container)
                self._watchlist.health(entry, message, healthy=bool(listed_healthy))


async def list_all(engine: Engine, node_id: str) -> list[dict[str, Any]]:
    """All containers of this node, in any state. Raises Refusal."""
    params = {"all": "1", **filters(label=f"{LABEL_NODE}={node_id}")}
    return list(await engine.call("list", "GET", "containers/json", params=params) or ())


async def inspect(engine: Engine, container_id: str) -> dict[str, Any] | None:
    """All about a container; None: there is none. Raises Failed."""
    try:
        return dict(await engine.call("inspect", "GET", f"containers/{container_id}/json"))
    except Refusal as refusal:
        if refusal.status == 404:
            return None
        raise Failed(f"container {container_id[:12]}: {refusal.message}") from None
