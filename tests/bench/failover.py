"""How soon a cluster changes again when its leader is lost, with Docker Swarm beside it.

Managers and workers are hosts of the test bed. Each round ends the leading manager with SIGKILL
(swarmd and with it its etcd; etcd's leadership is moved there first, which is the worst case) and
measures from that moment:

- leader_lost_s: a service is scaled up through another manager at once, again and again until that
  is acknowledged; until its new task is seen to be ASSIGNED to a node, through another manager;
- write_gap_s: through each other manager small writes (a label of a service) go on one after the
  other, PAUSE_S apart. From the end of one that was acknowledged, or from the kill, to the end of
  the next one that was; the longest such time of all other managers;
- reads_gap_s: the same for linearizable reads of one service;
- agents_moved_s: every ready agent that had its session with the lost manager has one with another.

With Docker: the same on as many engines in swarm mode, all managers, ended by SIGKILL of the
leader's dockerd (no agents_moved_s: Swarm does not tell where an agent's session is).

`python -m tests.bench.failover --managers 3 [--rounds N] [--no-docker]` ends with a line of medians,
`leader_lost_s=… write_gap_s=…` first, and the largest of each as `…_max`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import grpc.aio
import msgspec
from etcd3aio import _protobuf as pb

from deploy.testbed import BASE, Bed, Host
from swarm import errors, states
from swarm.rpc import STALE_KEY, Channel
from swarm.v1 import (
    ContainerSpec,
    CreateRequest,
    Filter,
    GetRequest,
    Kind,
    ListRequest,
    NodeState,
    Replicated,
    Service,
    ServiceMode,
    ServiceSpec,
    Spec,
    TaskSpec,
    TaskState,
    UpdateRequest,
)
from swarm.v1.services import ControlClient
from tests.e2e.cluster import wait_for
from tests.e2e.managers import Managers, kill, start

PAUSE_S = 0.02  # between two writes or reads of one client
POLL_S = 0.01
CALL_S = 2.0  # a call without an answer by then has failed and is made again
STEADY_S = 2.0  # of work before the kill
ROUND_S = 60.0
GONE = ("complete", "shutdown", "failed", "rejected", "remove", "orphaned")


class Peer(ABC):
    """A cluster that is measured; managers are told by their hosts. Calls raise when refused."""

    hosts: Sequence[Host]

    @abstractmethod
    def leader(self) -> Host: ...
    @abstractmethod
    def lose(self, host: Host) -> None: ...
    @abstractmethod
    def bring_back(self, host: Host) -> None: ...
    @abstractmethod
    async def write(self, through: Host, number: int) -> None: ...
    @abstractmethod
    async def read(self, through: Host) -> None: ...
    @abstractmethod
    async def scale_up(self, through: Host) -> None: ...
    @abstractmethod
    async def assigned(self, through: Host) -> set[str]:
        """Ids of the scaled service's tasks that have been given to a node."""

    async def moved(self, lost: Host, through: Host) -> bool:
        return True

    async def __aenter__(self) -> Peer:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None


# ------------------------------------------------------------------ one round


async def one_round(peer: Peer, lost: Host) -> dict[str, float]:
    """Seconds by name."""
    others = [h for h in peer.hosts if h is not lost]
    over = asyncio.Event()
    writes: dict[str, list[float]] = {h.name: [] for h in others}
    reads: dict[str, list[float]] = {h.name: [] for h in others}
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        for number, host in enumerate(others):
            group.create_task(_go_on(_writer(peer, host, number), writes[host.name], over))
            group.create_task(_go_on(_reader(peer, host), reads[host.name], over))
        await asyncio.sleep(STEADY_S)
        before = await peer.assigned(others[0])
        killed = loop.time()
        killing = asyncio.create_task(asyncio.to_thread(peer.lose, lost))
        try:
            async with asyncio.timeout(ROUND_S):
                asked = asyncio.create_task(_scale_up(peer, others))
                moved = asyncio.create_task(_until_moved(peer, lost, others))
                await _new_task(peer, others, before)
                lost_s = loop.time() - killed
                await asked
                await moved
                moved_s = moved.result() - killed
                # Until everybody has written and read since: a gap must have an end.
                while any(
                    not s or s[-1] < killed + lost_s for s in (*writes.values(), *reads.values())
                ):
                    await asyncio.sleep(POLL_S)
        finally:
            over.set()
            await killing
    return {
        "leader_lost_s": lost_s,
        "write_gap_s": max(gap(times, killed) for times in writes.values()),
        "reads_gap_s": max(gap(times, killed) for times in reads.values()),
        "agents_moved_s": moved_s,
    }


def gap(times: Sequence[float], since: float) -> float:
    """The longest time without an answer since then."""
    ends = [since, *(t for t in times if t > since)]
    return max(later - earlier for earlier, later in itertools.pairwise(ends))


def _writer(peer: Peer, host: Host, number: int) -> Callable[[], Awaitable[None]]:
    return lambda: peer.write(host, number)


def _reader(peer: Peer, host: Host) -> Callable[[], Awaitable[None]]:
    return lambda: peer.read(host)


async def _go_on(
    call: Callable[[], Awaitable[None]], answered: list[float], over: asyncio.Event
) -> None:
    """Calls again and again; the times of what was acknowledged."""
    loop = asyncio.get_running_loop()
    while not over.is_set():
        try:
            await call()
            answered.append(loop.time())
        except (errors.SwarmError, aiohttp.ClientError, TimeoutError):
            pass
        await asyncio.sleep(PAUSE_S)


async def _scale_up(peer: Peer, others: Sequence[Host]) -> None:
    for turn in range(10**6):
        try:
            await peer.scale_up(others[turn % len(others)])
            return
        except (errors.SwarmError, aiohttp.ClientError, TimeoutError):
            await asyncio.sleep(PAUSE_S)


async def _new_task(peer: Peer, others: Sequence[Host], before: set[str]) -> None:
    while True:
        for host in others:
            try:
                async with asyncio.timeout(1):
                    if await peer.assigned(host) - before:
                        return
            except (errors.SwarmError, aiohttp.ClientError, TimeoutError):
                continue
        await asyncio.sleep(POLL_S)


async def _until_moved(peer: Peer, lost: Host, others: Sequence[Host]) -> float:
    while True:
        try:
            if await peer.moved(lost, others[0]):
                return asyncio.get_running_loop().time()
        except errors.SwarmError:
            pass
        await asyncio.sleep(POLL_S)


# ------------------------------------------------------------------ ours


class Ours(Peer):
    """Managers with etcd, workers with the process runtime."""

    def __init__(self, bed: Bed, managers: int, workers: int) -> None:
        self.cluster = Managers(bed, managers, workers)
        self.hosts = self.cluster.managers
        self._stack = AsyncExitStack()
        self._control: dict[str, ControlClient] = {}
        self._stale: dict[str, ControlClient] = {}
        self._values = iter(range(10**9))

    def leader(self) -> Host:
        self.cluster.converge()
        leader = self.cluster.leader()
        asyncio.run(_lead_etcd(self.hosts, leader))
        return leader

    def lose(self, host: Host) -> None:
        kill(host)

    def bring_back(self, host: Host) -> None:
        start(host)

    async def __aenter__(self) -> Peer:
        for host in self.hosts:
            for clients, metadata in ((self._control, ()), (self._stale, ((STALE_KEY, "1"),))):
                channel = Channel.unix(str(host.swarm_socket), metadata=metadata)
                self._stack.push_async_callback(channel.close)
                clients[host.name] = ControlClient(channel)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    def make_services(self) -> None:
        """What is written to and scaled."""

        async def make(control: ControlClient) -> None:
            for name in ("probe", *(f"write{i}" for i in range(len(self.hosts)))):
                spec = ServiceSpec(
                    name=name,
                    mode=ServiceMode(replicated=Replicated(replicas=int(name == "probe"))),
                    task=TaskSpec(
                        runtime="process",
                        container=ContainerSpec(command=("sleep", "1000000")),
                    ),
                )
                await control.create(CreateRequest(spec=Spec(service=spec)), timeout_s=CALL_S)

        self.cluster.ask(make, stale=False)

    async def _change(
        self, through: Host, name: str, change: Callable[[ServiceSpec], ServiceSpec]
    ) -> None:
        control = self._control[through.name]
        while True:
            found = await control.get(GetRequest(kind=Kind.SERVICE, ref=name), timeout_s=CALL_S)
            assert found.object is not None
            service = found.object.service
            assert isinstance(service, Service)
            assert service.spec is not None and service.meta is not None
            request = UpdateRequest(
                kind=Kind.SERVICE,
                id=service.id,
                version=service.meta.version,
                spec=Spec(service=change(service.spec)),
            )
            try:
                await control.update(request, timeout_s=CALL_S)
            except errors.Conflict:
                continue  # the leader has written to it meanwhile
            return

    async def write(self, through: Host, number: int) -> None:
        labels = {"value": str(next(self._values))}
        await self._change(
            through, f"write{number}", lambda spec: msgspec.structs.replace(spec, labels=labels)
        )

    async def read(self, through: Host) -> None:
        request = GetRequest(kind=Kind.SERVICE, ref="probe")
        await self._control[through.name].get(request, timeout_s=CALL_S)

    async def scale_up(self, through: Host) -> None:
        await self._change(through, "probe", _one_more)

    async def assigned(self, through: Host) -> set[str]:
        request = ListRequest(kind=Kind.TASK, filters=(Filter(key="service", values=("probe",)),))
        found = await self._stale[through.name].list(request, timeout_s=CALL_S)
        return {
            o.task.id
            for o in found.objects
            if o.task is not None
            and o.task.status is not None
            and o.task.status.state >= TaskState.ASSIGNED
            and not states.ended(o.task.status.state)
        }

    async def moved(self, lost: Host, through: Host) -> bool:
        request = ListRequest(kind=Kind.NODE)
        found = await self._stale[through.name].list(request, timeout_s=CALL_S)
        nodes = {
            n.description.hostname: n for o in found.objects if (n := o.node) and n.description
        }
        lost_id = nodes[lost.name].id
        return all(
            node.status is not None
            and node.status.manager_id != lost_id
            and node.status.state == NodeState.READY
            for name, node in nodes.items()
            if name != lost.name
        )


def _one_more(spec: ServiceSpec) -> ServiceSpec:
    assert spec.mode is not None and spec.mode.replicated is not None
    replicas = (spec.mode.replicated.replicas or 0) + 1
    mode = ServiceMode(replicated=Replicated(replicas=replicas))
    return msgspec.structs.replace(spec, mode=mode)


async def _lead_etcd(hosts: Sequence[Host], wanted: Host) -> None:
    """Moves etcd's leadership to a manager's member."""
    parts: Any = vars(pb)
    rpc, stubs = parts["rpc_pb2"], parts["rpc_pb2_grpc"]
    target = 0
    for host in (wanted, *(h for h in hosts if h is not wanted)):
        (socket,) = (host.state_dir / "manager").rglob("client.sock:0")
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            maintenance = stubs.MaintenanceStub(channel)
            status = await maintenance.Status(rpc.StatusRequest(), timeout=5)
            own = status.header.member_id
            target = target or own
            if status.leader == target:
                return
            if status.leader == own:
                await maintenance.MoveLeader(rpc.MoveLeaderRequest(targetID=target), timeout=5)
                return


# ------------------------------------------------------------------ Docker Swarm


class Swarm(Peer):
    """As many engines in swarm mode, all of them managers."""

    def __init__(self, bed: Bed, managers: int) -> None:
        self.hosts = bed.docker_hosts(managers)
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._values = iter(range(10**9))

    def up(self) -> None:
        first = self.hosts[0]
        first.docker("swarm", "init", "--advertise-addr", first.address)
        token = first.docker("swarm", "join-token", "-q", "manager").strip()
        for host in self.hosts[1:]:
            where = ("--advertise-addr", host.address, f"{first.address}:2377")
            host.docker("swarm", "join", "--token", token, *where)
        for name in ("probe", *(f"write{i}" for i in range(len(self.hosts)))):
            replicas = str(int(name == "probe"))
            words = ("--detach", "--no-resolve-image", "--name", name, "--replicas", replicas)
            first.docker("service", "create", *words, BASE, "sleep", "1000000")

    def down(self) -> None:
        for host in reversed(self.hosts):
            host.start_docker()
            host.docker("swarm", "leave", "--force", check=False)
            host.stop("dockerd")

    def leader(self) -> Host:
        def found() -> Host | None:
            out = self.hosts[0].docker("node", "ls", "--format", "{{json .}}", check=False)
            nodes = [json.loads(line) for line in out.splitlines()]
            states = sorted(n["ManagerStatus"] for n in nodes if n["Status"] == "Ready")
            if states != ["Leader", *["Reachable"] * (len(self.hosts) - 1)]:
                return None
            (name,) = (n["Hostname"] for n in nodes if n["ManagerStatus"] == "Leader")
            return next(h for h in self.hosts if h.name == name)

        return wait_for("all engines are reachable managers", found, timeout_s=90)

    def lose(self, host: Host) -> None:
        host.kill("dockerd")

    def bring_back(self, host: Host) -> None:
        host.start_docker()

    async def __aenter__(self) -> Peer:
        for host in self.hosts:
            connector = aiohttp.UnixConnector(str(host.docker_socket))
            timeout = aiohttp.ClientTimeout(total=CALL_S)
            self._sessions[host.name] = aiohttp.ClientSession(
                "http://docker", connector=connector, timeout=timeout, raise_for_status=True
            )
        return self

    async def __aexit__(self, *error: object) -> None:
        for session in self._sessions.values():
            await session.close()

    async def _change(
        self, through: Host, name: str, change: Callable[[dict[str, Any]], None]
    ) -> None:
        session = self._sessions[through.name]
        async with session.get(f"/services/{name}") as answer:
            service = await answer.json()
        change(service["Spec"])
        version = {"version": str(service["Version"]["Index"])}
        path = f"/services/{service['ID']}/update"
        async with session.post(path, params=version, json=service["Spec"]) as answer:
            await answer.read()

    async def write(self, through: Host, number: int) -> None:
        labels = {"value": str(next(self._values))}
        await self._change(through, f"write{number}", lambda spec: spec.update(Labels=labels))

    async def read(self, through: Host) -> None:
        async with self._sessions[through.name].get("/services/probe") as answer:
            await answer.read()

    async def scale_up(self, through: Host) -> None:
        def change(spec: dict[str, Any]) -> None:
            spec["Mode"]["Replicated"]["Replicas"] += 1

        await self._change(through, "probe", change)

    async def assigned(self, through: Host) -> set[str]:
        filters = {"filters": json.dumps({"service": ["probe"]})}
        async with self._sessions[through.name].get("/tasks", params=filters) as answer:
            tasks = await answer.json()
        waiting = ("new", "allocated", "pending", *GONE)
        return {t["ID"] for t in tasks if t["Status"]["State"] not in waiting}


# ------------------------------------------------------------------ the command


def measure(peer: Peer, rounds: int, label: str, keys: Sequence[str]) -> list[dict[str, float]]:
    done = []
    for number in range(rounds):
        lost = peer.leader()
        done.append(asyncio.run(_one(peer, lost)))
        peer.bring_back(lost)
        shown = {key: round(done[-1][key], 2) for key in keys}
        print(f"{label} {number + 1}: {lost.name} {shown}", flush=True)
    return done


async def _one(peer: Peer, lost: Host) -> dict[str, float]:
    async with peer:
        return await one_round(peer, lost)


def summary(rounds: Sequence[dict[str, float]], prefix: str, keys: Sequence[str]) -> list[str]:
    """Medians first, then the largest."""
    medians = [f"{prefix}{key}={statistics.median(r[key] for r in rounds):.2f}" for key in keys]
    return medians + [f"{prefix}{key}_max={max(r[key] for r in rounds):.2f}" for key in keys]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.failover", description=__doc__)
    parser.add_argument("--managers", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--docker",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure Docker Swarm beside it (default)",
    )
    given = parser.parse_args()
    if given.managers < 3:
        parser.error("fewer than three managers do not survive the loss of one")
    bed = Bed.open(f"bench-{os.getpid()}")
    try:
        ours = Ours(bed, given.managers, given.workers)
        ours.cluster.up("--store", "etcd")
        ours.make_services()
        keys = ("leader_lost_s", "write_gap_s", "reads_gap_s", "agents_moved_s")
        words = summary(measure(ours, given.rounds, "ours", keys), "", keys)
        ours.cluster.down()
        if given.docker:
            swarm = Swarm(bed, given.managers)
            swarm.up()
            words += summary(measure(swarm, given.rounds, "swarm", keys[:3]), "swarm_", keys[:3])
            swarm.down()
    finally:
        bed.down()
    print(f"cores={os.cpu_count()} managers={given.managers} rounds={given.rounds}")
    print(" ".join(words))


if __name__ == "__main__":
    main()
