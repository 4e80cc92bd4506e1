"""The Docker runtime: tasks as containers of a Docker Engine or Podman.

Owns the containers with this node's label (spec.LABEL_NODE) and the bridges of the cluster's
networks; touches nothing else on the engine. Keeps no state on a disk: after a restart `adopt`
finds everything by labels. A start is three calls (create, start, inspect) when image and network
are there; more would cost time that the engines alone do not need.

Parts: engine (calls), facts (what the engine can do), spec, attach and mounts (task to container),
inspection (container to status), images (pulls), networks (bridges), files (secrets in memory),
watch and events (what happens to containers), logs, exec.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from agent.gpus import HandOver, as_claimed
from agent.runtime.base import (
    ENGINE_FAILED,
    UNSUPPORTED,
    Description,
    Event,
    EventKind,
    Failed,
    Found,
    Phase,
    Rejected,
    Started,
    Work,
)
from agent.runtime.docker import archive as files_in
from agent.runtime.docker import causes
from agent.runtime.docker import exec as docker_exec
from agent.runtime.docker.engine import CALL_S, INSPECT_S, PING_S, Engine, Refusal
from agent.runtime.docker.events import EventStream, inspect, list_all
from agent.runtime.docker.facts import Facts, describe, read_facts
from agent.runtime.docker.files import Files
from agent.runtime.docker.images import Images
from agent.runtime.docker.inspection import (
    End,
    end_of,
    last_output,
    phase_of,
    started_of,
    verdict_of,
)
from agent.runtime.docker.logs import LogParser, query
from agent.runtime.docker.networks import Networks
from agent.runtime.docker.outage import Outage
from agent.runtime.docker.spec import (
    LABEL_NODE,
    LABEL_TASK,
    SECOND_NS,
    STOP_GRACE_NS,
    Plan,
    body_for,
    plan_container,
)
from agent.runtime.docker.stats import parse_stats
from agent.runtime.docker.watch import Watched, Watchlist
from agent.runtime.memory import memory_folder
from swarm import errors
from swarm.clock import Clock
from swarm.v1 import (
    ExecInput,
    ExecOutput,
    ExecStart,
    FileStat,
    LogLine,
    LogOptions,
    TaskStats,
)

log = structlog.get_logger("docker")

R = TypeVar("R")

# Calls of one kind under way at once. Measured with three engines on 2 cores, 30 containers: 3 and
# fewer are slower, from 4 to 10 there is no difference beyond noise, and more calls only queue
# inside the engine, where they delay stops and inspections.
AT_ONCE = 4
INSPECTS_MAX = 8
KILL_WAIT_S = 30.0
REMOVE_TRIES = 5
LOG_END_TRIES, LOG_END_PAUSE_S = 5, 0.1
REMOVE_PAUSE_S = 0.2


_NETWORK_GONE = re.compile(r"network \S+ not found", re.IGNORECASE)


class _NetworkGone(Failed):
    """The container's network was removed since the container was made."""


class DockerRuntime:
    """Implements agent.runtime.base.Runtime."""

    name = "docker"

    def __init__(
        self,
        *,
        socket: str,
        node_id: str,
        cluster_id: str,
        clock: Clock,
        files_root: Path | None = None,
        gpus: HandOver = as_claimed,
    ) -> None:
        """`gpus` says what a task that claims GPUs is given."""
        self._node_id = node_id
        self._cluster_id = cluster_id
        self._clock = clock
        self._gpus = gpus
        self._engine = Engine(socket)
        self._facts = Facts()
        self._images = Images(self._engine, clock)
        memory = files_root or memory_folder()
        self._files = Files(node_id, memory)
        shared = Path(tempfile.gettempdir()) / f"swarm-{os.geteuid()}"
        self._networks = Networks(self._engine, lock_folder=memory or shared)
        # Ended containers are kept for their logs; what was secret goes at once.
        self._watchlist = Watchlist(on_end=self._files.remove)
        # Their files are written, and no container tells of them yet.
        self._preparing: set[str] = set()
        self._creating = asyncio.Semaphore(AT_ONCE)
        self._starting = asyncio.Semaphore(AT_ONCE)
        self._outage = Outage()
        self._stream = EventStream(
            self._engine, self._watchlist, self._outage, node_id=node_id, clock=clock
        )

    # -------------------------------------------------------------- the engine

    async def connect(self) -> None:
        """See Runtime."""
        try:
            await self._engine.connect()
        except errors.Unavailable:
            self._outage.began()
            raise
        try:
            info = await self._engine.call("info", "GET", "info", timeout_s=PING_S)
        except Refusal as refusal:
            raise self._refused("GET /info", refusal) from None
        self._facts = read_facts(
            self._engine.version, info, systemd=Path("/run/systemd/system").exists()
        )
        self._outage.live_restore = self._facts.live_restore

    async def ping(self) -> None:
        """See Runtime."""
        await self._engine.ping()

    async def describe(self) -> Description:
        return describe(self._facts)

    async def close(self) -> None:
        """See Runtime; ends `events`."""
        self._stream.close()
        await self._images.close()
        await self._engine.close()

    def _refused(self, what: str, refusal: Refusal) -> errors.Unavailable:
        return errors.Unavailable(
            f"the engine at {self._engine.socket} refuses {what}: {refusal.message}"
        )

    # -------------------------------------------------------------- adopt

    async def adopt(self) -> tuple[Found, ...]:
        """See Runtime."""
        # What is made while the engine lists may be missing in its list, and is not gone.
        known = tuple(self._watchlist)
        try:
            await self._networks.load()
            listed = await list_all(self._engine, self._node_id)
        except Refusal as refusal:
            raise self._refused("to list", refusal) from None
        gate = asyncio.Semaphore(INSPECTS_MAX)

        async def look(container_id: str) -> dict[str, Any] | None:
            async with gate:
                return await inspect(self._engine, container_id)

        inspected = await asyncio.gather(*(look(str(entry["Id"])) for entry in listed))
        found = [self._adopt_one(container) for container in inspected if container is not None]
        present = {f.task_id for f in found}
        for entry in known:
            if entry.task_id not in present and self._watchlist.get(entry.task_id) is entry:
                self._watchlist.drop(entry.task_id)
        alive = {e.task_id for e in self._watchlist if e.phase is not Phase.EXITED}
        self._files.keep(alive | self._preparing)
        self._outage.ended()
        return tuple(found)

    def _adopt_one(self, container: dict[str, Any]) -> Found:
        """Makes a container known, or learns what became of a known one. Of an end the caller is
        told here, of a change of health by an event.
        """
        task_id = str(container["Config"]["Labels"][LABEL_TASK])
        entry = self._watchlist.get(task_id)
        known = entry is not None and entry.container_id == container["Id"]
        if entry is None or not known:
            entry = self._watchlist.add(Watched(task_id, str(container["Id"])))
        _learn(entry, container)
        phase = phase_of(str(container["State"].get("Status")))
        if phase is Phase.CREATED:
            return Found(task_id, phase)
        if phase is Phase.EXITED:
            self._watchlist.forget_events(task_id)
            if entry.phase is not Phase.EXITED:
                entry.end = (
                    self._outage.end_of(container, entry)
                    if known
                    else end_of(container, oom=entry.oom)
                )
            entry.phase, end = phase, entry.end
            return Found(task_id, phase, None, end.code, end.message, end.cause, end.forced)
        self._watchlist.runs(entry)
        self._take_verdict(entry, container)
        self._watchlist.tell(entry)
        return Found(task_id, phase, started=started_of(container, self._networks.cluster_id))

    def _take_verdict(self, entry: Watched, container: Mapping[str, Any]) -> None:
        """Takes the healthcheck's verdict from an inspection that is told to the worker, too: that
        a task is healthy it learns from `Started`, that it is not by an event.
        """
        verdict = verdict_of(container)
        if verdict and not entry.told:
            entry.healthy = True
        elif verdict is not None:
            self._watchlist.health(entry, last_output(container), healthy=verdict)

    # -------------------------------------------------------------- events

    def events(self) -> AsyncIterator[Event]:
        """See Runtime. Raises Unavailable when the engine stays away for longer than a restart
        takes: `connect`, `adopt` and a new call go on without a loss.
        """
        return self._stream.events()

    # -------------------------------------------------------------- prepare and start

    async def prepare(self, work: Work) -> None:
        """See Runtime. May be called again for a task whose preparation was cut short."""
        task = work.assignment.task
        plan = plan_container(
            work,
            self._facts,
            node_id=self._node_id,
            cluster_id=self._cluster_id,
            gpus=self._gpus(task.assigned_gpus if task else ()),
        )
        auth = work.assignment.registry_auth
        _, network_ids = await _both(
            self._images.before_create(
                plan.image, policy=plan.pull_policy, platform=plan.platform, auth=auth
            ),
            self._network_ids(plan),
        )
        files: tuple[tuple[str, str], ...] = ()
        self._preparing.add(plan.task_id)
        try:
            if work.files:
                files = await asyncio.to_thread(self._files.write, plan.task_id, work.files)
            container_id = await self._create(plan, network_ids, files, auth)
            self._watchlist.add(Watched(plan.task_id, container_id, note=plan.note))
        except BaseException:
            self._files.remove(plan.task_id)  # a task that failed may be kept for long
            raise
        finally:
            self._preparing.discard(plan.task_id)

    async def _network_ids(self, plan: Plan) -> list[str]:
        return [
            a.built_in if a.network is None else await self._networks.ensure(a.network, self._facts)
            for a in plan.attachments
        ]

    async def _create(
        self, plan: Plan, network_ids: list[str], files: tuple[tuple[str, str], ...], auth: str
    ) -> str:
        """Makes the container; gets what the engine turns out to lack, once each."""
        params = {"name": plan.name}
        if plan.platform:
            params["platform"] = plan.platform
        missing = {"image", "network", "name"}
        while True:
            body, later = body_for(plan, network_ids, files, self._facts)
            try:
                async with self._creating:
                    answer = await self._engine.call(
                        "create", "POST", "containers/create", params=params, body=body
                    )
                for warning in answer.get("Warnings") or ():
                    log.info("engine_warning", task_id=plan.task_id, warning=warning)
                container_id = str(answer["Id"])
                for network_id, endpoint in later:
                    await self._engine.call(
                        "network_connect",
                        "POST",
                        f"networks/{network_id}/connect",
                        body={"Container": container_id, "EndpointConfig": endpoint},
                    )
                return container_id
            except Refusal as refusal:
                what = _lacks(refusal)
                if what not in missing:
                    raise causes.create_trouble(plan.image, refusal) from None
                missing.remove(what)
                if what == "image":
                    if plan.pull_policy == "never":
                        raise Rejected(
                            f"image {plan.image!r} is not on this node, and pull_policy is never",
                            cause=UNSUPPORTED,
                        ) from None
                    await self._images.pull(plan.image, platform=plan.platform, auth=auth)
                elif what == "network":
                    self._networks.forget_all()
                    network_ids = await self._network_ids(plan)
                else:
                    await self._make_way(plan)

    async def _make_way(self, plan: Plan) -> None:
        """Removes what an earlier preparation of the same task left under its name."""
        container = await inspect(self._engine, plan.name)
        if container is None:
            return
        labels = container["Config"].get("Labels") or {}
        if labels.get(LABEL_NODE) != self._node_id or labels.get(LABEL_TASK) != plan.task_id:
            raise Rejected(
                f"the engine has another container with the name {plan.name!r}; remove or rename it"
            )
        await self._delete(str(container["Id"]))

    async def start(self, work: Work) -> Started:
        """See Runtime."""
        entry = self._watchlist.get(work.task_id)
        if entry is None:
            raise Failed("the task's container is gone; it was removed by somebody else")
        async with self._starting:
            try:
                return await self._start(entry)
            except _NetworkGone:
                # Another agent on this engine, or somebody, removed it between prepare and start,
                # when nothing ran on it. The container is bound to its id.
                log.info("network_made_again", task_id=work.task_id)
        self._networks.forget_all()
        await self.prepare(work)
        entry = self._watchlist.get(work.task_id)
        assert entry is not None
        async with self._starting:
            return await self._start(entry)

    async def _start(self, entry: Watched) -> Started:
        """Raises _NetworkGone beside what `start` raises."""
        already = entry.phase is Phase.RUNNING
        self._watchlist.runs(entry)
        entry.starting = True
        try:
            await self._engine.call(
                "start",
                "POST",
                f"containers/{entry.container_id}/start",
                timeout_s=CALL_S,
            )
        except (errors.Unavailable, errors.TimedOut):
            # Only a look at the engine will tell; an end before it has nothing to do with us.
            if not already:
                entry.phase = Phase.CREATED
            raise
        except Refusal as refusal:
            if not already:
                entry.phase = Phase.CREATED
                entry.held.clear()
            trouble = causes.start_trouble(refusal)
            if _NETWORK_GONE.search(refusal.message):
                raise _NetworkGone(trouble.message, cause=ENGINE_FAILED) from None
            raise trouble from None
        finally:
            entry.starting = False
        container = await inspect(self._engine, entry.container_id)
        if container is None:
            raise Failed("the container was removed by somebody else while it started")
        _learn(entry, container)
        started = replace(started_of(container, self._networks.cluster_id), note=entry.note)
        if phase_of(str(container["State"].get("Status"))) is Phase.EXITED:
            # So short-lived that it ended before this look; its event may still be on the way.
            self._watchlist.exit(entry, end_of(container, oom=entry.oom))
        elif not entry.told:
            # Health that was heard of since is in the inspection already; an end is not.
            entry.held = [e for e in entry.held if e.kind is EventKind.EXITED]
            entry.healthy = None
            self._take_verdict(entry, container)
        self._watchlist.tell(entry)
        return started

    # -------------------------------------------------------------- stop and remove

    async def stop(self, task_id: str, *, signal: str, grace_s: float) -> int | None:
        """See Runtime."""
        entry = await self._known(task_id)
        if entry is None or entry.phase is Phase.CREATED:
            return None
        if entry.phase is Phase.EXITED:
            return entry.end.code
        entry.stopping = True
        try:
            code = await self._end(entry, signal or entry.stop_signal or "SIGTERM", grace_s)
        except BaseException:
            entry.stopping = False  # should it end now, the caller wants to hear of it
            raise
        if code is not None:
            self._watchlist.exit(entry, End(code))
        return code

    async def _end(self, entry: Watched, signal: str, grace_s: float) -> int | None:
        """Signals and waits; the exit code, None if the container is gone."""
        path = f"containers/{entry.container_id}"
        try:
            await self._kill(path, signal)
            with contextlib.suppress(errors.TimedOut):
                return await self._wait(path, grace_s)
            await self._kill(path, "SIGKILL")
            try:
                return await self._wait(path, KILL_WAIT_S)
            except errors.TimedOut:
                await self._engine.ping()
                raise Failed(
                    f"the container does not end within {KILL_WAIT_S:g} s after SIGKILL: one of "
                    "its processes hangs in the kernel; see the node's dmesg"
                ) from None
        except Refusal as refusal:
            if refusal.status == 404:
                return None
            raise Failed(f"the container cannot be stopped: {refusal.message}") from None

    async def _kill(self, path: str, signal: str) -> None:
        try:
            await self._engine.call(
                "kill", "POST", f"{path}/kill", params={"signal": signal}, timeout_s=INSPECT_S
            )
        except Refusal as refusal:
            # It ended by itself, between our look and the signal.
            if refusal.status == 409 or "not running" in refusal.message:
                return
            raise

    async def _wait(self, path: str, timeout_s: float) -> int:
        answer = await self._engine.call(
            "wait",
            "POST",
            f"{path}/wait",
            params={"condition": "not-running"},
            timeout_s=max(timeout_s, 0.001),
        )
        return int(answer["StatusCode"])

    async def remove(self, task_id: str) -> None:
        """See Runtime."""
        entry = self._watchlist.get(task_id)
        if entry is not None:
            entry.stopping = True
            await self._delete(entry.container_id)
        else:
            for container_id in await self._ids_of(task_id):
                await self._delete(container_id)
        self._watchlist.drop(task_id)
        self._files.remove(task_id)

    async def _delete(self, container_id: str) -> None:
        """Removes a container and its anonymous volumes; it is gone when this returns."""
        params = {"force": "1", "v": "1"}
        for attempt in range(REMOVE_TRIES):
            try:
                await self._engine.call(
                    "remove", "DELETE", f"containers/{container_id}", params=params
                )
                return
            except Refusal as refusal:
                if refusal.status == 404:
                    return
                # Being removed already, or busy for a moment.
                if refusal.status not in (409, 500) or attempt == REMOVE_TRIES - 1:
                    raise Failed(
                        f"container {container_id[:12]} cannot be removed: {refusal.message}"
                    ) from None
            await asyncio.sleep(REMOVE_PAUSE_S)

    async def release_network(self, network_id: str) -> None:
        """See Runtime."""
        try:
            await self._networks.release(network_id)
        except Refusal as refusal:
            raise Failed(f"network {network_id}: {refusal.message}") from None

    async def _ids_of(self, task_id: str) -> list[str]:
        label = [f"{LABEL_NODE}={self._node_id}", f"{LABEL_TASK}={task_id}"]
        params = {"all": "1", "filters": json.dumps({"label": label})}
        try:
            listed = await self._engine.call(
                "list", "GET", "containers/json", params=params, timeout_s=PING_S
            )
        except Refusal as refusal:
            raise Failed(f"the engine refuses to list containers: {refusal.message}") from None
        return [str(entry["Id"]) for entry in listed or ()]

    async def _known(self, task_id: str) -> Watched | None:
        """A task's container, looked up on the engine where it is not known."""
        entry = self._watchlist.get(task_id)
        if entry is not None:
            return entry
        for container_id in await self._ids_of(task_id):
            container = await inspect(self._engine, container_id)
            if container is not None:
                self._adopt_one(container)
        return self._watchlist.get(task_id)

    async def _container_id(self, task_id: str) -> str:
        entry = await self._known(task_id)
        if entry is None:
            raise errors.NotFound(f"task {task_id} has no container on this node")
        return entry.container_id

    # -------------------------------------------------------------- logs, exec, stats

    async def logs(self, task_id: str, options: LogOptions) -> AsyncIterator[LogLine]:
        """See Runtime."""
        container_id = await self._container_id(task_id)
        entry = self._watchlist.get(task_id)
        parser = LogParser(tty=entry is not None and entry.tty)
        params = query(
            follow=options.follow,
            tail=options.tail,
            since_ns=options.since_ns,
            until_ns=options.until_ns,
            stdout=options.stdout,
            stderr=options.stderr,
        )
        try:
            async with self._engine.stream(
                "GET", f"containers/{container_id}/logs", params=params
            ) as answer:
                ended = False
                while not ended:
                    chunk = await self._engine.read(answer)
                    ended = not chunk
                    for line in parser.flush() if ended else parser.feed(chunk):
                        yield LogLine(
                            task_id=task_id,
                            stream=line.stream,
                            timestamp_ns=line.timestamp_ns,
                            data=line.data,
                        )
        except Refusal as refusal:
            raise Failed(f"the logs cannot be read: {refusal.message}") from None
        if options.follow and not options.until_ns and await self._runs_on(container_id):
            raise errors.Unavailable("the engine has ended the log stream of a task that runs on")

    async def _runs_on(self, container_id: str) -> bool:
        """Whether a container runs that seems to have ended; an engine may tell of it a bit later.
        Raises Unavailable, TimedOut.
        """
        for _ in range(LOG_END_TRIES):
            container = await inspect(self._engine, container_id)
            status = str(container["State"].get("Status")) if container is not None else ""
            if phase_of(status) is not Phase.RUNNING:
                return False
            await asyncio.sleep(LOG_END_PAUSE_S)
        return True

    async def exec(
        self,
        task_id: str,
        start: ExecStart,
        stdin: AsyncIterator[ExecInput],
        left: asyncio.Event | None = None,
    ) -> AsyncGenerator[ExecOutput]:
        """See Runtime. The engine lets a command go on in any case."""
        container_id = await self._container_id(task_id)
        async with contextlib.aclosing(
            docker_exec.run(self._engine, container_id, start, stdin)
        ) as outputs:
            async for output in outputs:
                yield output

    async def stats(self, task_id: str) -> TaskStats:
        """See Runtime."""
        container_id = await self._container_id(task_id)
        params = {"stream": "0"}
        if self._facts.api >= (1, 41):
            params["one-shot"] = "1"  # without the second measurement a second later
        try:
            said = await self._engine.call(
                "stats", "GET", f"containers/{container_id}/stats", params=params
            )
        except Refusal as refusal:
            raise Failed(f"the statistics cannot be read: {refusal.message}") from None
        return parse_stats(task_id, said, now_ns=self._clock.now_ns())

    # -------------------------------------------------------------- files

    async def file_stat(self, task_id: str, path: str) -> FileStat | None:
        """See Runtime."""
        return await files_in.file_stat(self._engine, await self._container_id(task_id), path)

    async def archive(self, task_id: str, path: str) -> AsyncIterator[bytes]:
        """See Runtime."""
        container_id = await self._container_id(task_id)
        pieces = files_in.archive(self._engine, container_id, path)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def extract(
        self,
        task_id: str,
        path: str,
        data: AsyncIterator[bytes],
        *,
        keep_kind: bool,
        keep_owner: bool,
    ) -> None:
        """See Runtime."""
        await files_in.extract(
            self._engine,
            await self._container_id(task_id),
            path,
            data,
            keep_kind=keep_kind,
            keep_owner=keep_owner,
        )


async def _both(first: Coroutine[Any, Any, Any], second: Coroutine[Any, Any, R]) -> tuple[Any, R]:
    """Runs two coroutines at once; the first error ends both and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            one, two = group.create_task(first), group.create_task(second)
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return one.result(), two.result()


def _learn(entry: Watched, container: Mapping[str, Any]) -> None:
    config = container["Config"]
    entry.tty = bool(config.get("Tty"))
    entry.stop_signal = str(config.get("StopSignal") or "")
    entry.grace_s = float(config.get("StopTimeout") or STOP_GRACE_NS / SECOND_NS)


def _lacks(refusal: Refusal) -> str:
    """What a create call found missing or in the way."""
    text = refusal.message.lower()
    if refusal.status == 409 and ("name" in text):
        return "name"
    if refusal.status == 404 or "no such image" in text:
        return "network" if "network" in text and "image" not in text else "image"
    return ""
