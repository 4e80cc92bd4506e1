"""A whole manager and many agents over real gRPC with mutual TLS: what it costs, and how soon.

    python -m tests.bench.agents --agents 1000 --tasks 20000 [--idle 600] [--ports] [--update]
                                 [--lose 0.1] [--restart] [--profile] [--curve]

The manager is manager.main.Manager in a process of its own, with the embedded store on a disk. The
agents (tests/bench/crowd.py) have real sessions and workers, and a runtime in memory that takes 0.1
s to prepare a task and 0.3 s to start it; they are in two more processes, one for those that
`--lose` kills. This process is a person with a client certificate: it makes the services through
the API and follows them as swarmctl does. Nodes and their certificates are entered before the
manager starts, for joins are limited to 20 a second.

    connect_s           from the manager's start until all agents have a session
    create_10k_s        from CreateService of 10,000 replicas until WatchServices says all run
    manager_cpu         processor time of the manager a second while nothing but heartbeats happen,
                        with all tasks running (agents_cpu: of all agents together)
    heartbeat_misses    heartbeats in that time that were not answered before the next was due
    rss_mib             the most memory that the manager has had; rss_idle_mib: what it has at the end
    lag_*_ms            the longest that the manager's event loop was late in that part
    update_s            with --update: from UpdateService until all of the 10,000 are of the new
                        version, 1,000 at a time and each watched for a second
    replaced_s          with --lose: from the kill until all of the lost tasks run elsewhere;
                        down_s of that: until all of the lost nodes are known to be down
    back_s              with --restart: from the end of the manager by SIGKILL until all agents
                        have a session again; started_again must be 0
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from msgspec import structs

from manager import main
from manager.ca import Sealer, load_or_make_key
from manager.restore import SEAL_FILE, STORE_FILE
from manager.store import Draft, Store
from manager.store.engines.embedded import EmbeddedEngine
from swarm import logs, rpc, tls
from swarm.clock import SECOND_NS, SystemClock
from swarm.ids import seeded_rng
from swarm.v1 import (
    Availability,
    ContainerSpec,
    CreateRequest,
    EndpointSpec,
    GetRequest,
    InitRequest,
    Kind,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    PortConfig,
    Replicated,
    ServiceMode,
    ServiceSpec,
    Spec,
    Task,
    TaskSpec,
    TaskState,
    UpdateConfig,
    UpdateRequest,
    WatchServicesRequest,
)
from swarm.v1.services import ControlClient
from swarm.vault import Vault
from tests.bench.crowd import Connect, Lag, allow_files, answer, be_agents
from tests.ports import free_ports

BIG = 10_000  # replicas of the service that is measured
SMALL = 500  # of each of the others
CURVE = (100, 300, 1_000, 3_000)
PER_AGENT = 20  # tasks, in the curve
SETTLE_S = 3.0
SETTLED_CPU = 0.25  # of a core, in the busiest process
POLL_S = 0.5  # a look costs the manager some 3 ms
PATIENCE_S = 600.0
DAYS = 24 * 3600 * SECOND_NS
MIB = 1 << 20


class Plan(msgspec.Struct, frozen=True):
    """What all processes have to know; one file."""

    address: str
    node_id: str
    key_pem: str
    certificate_pem: str
    root_pem: str
    admin_pem: str
    # Of each agent: its node's id and its certificate; all use the manager's key.
    agents: tuple[tuple[str, str], ...]


def node_ids(count: int) -> list[str]:
    return [f"node{i:05d}" for i in range(count)]


# ------------------------------------------------------------------ a cluster's first state


async def found(folder: Path, agents: int) -> Plan:
    """A cluster whose nodes have joined and were not heard yet."""
    clock = SystemClock()
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    vault = Vault(folder / "node.key")
    vault.make()
    new = await main.bootstrap(
        folder / "manager",
        InitRequest(store="embedded", availability=Availability.DRAIN),
        vault=vault,
        hostname="manager",
        advertise_addr=address,
        clock=clock,
        rng=seeded_rng(1),
    )
    request = tls.load_csr(tls.csr_pem(new.key_pem))
    sign = partial(
        tls.sign,
        request,
        root_pem=new.cluster.root_ca_pem,
        root_key_pem=new.keyring.root_ca_key_pem,
        organization=new.cluster.id,
        now_ns=clock.now_ns(),
        lifetime_ns=DAYS,
    )
    ids = node_ids(agents)
    certificates = [(i, sign(common_name=i, unit=tls.OU_WORKER)) for i in ids]
    store = Store(
        EmbeddedEngine(folder / "manager" / STORE_FILE, clock),
        clock,
        seal=Sealer(load_or_make_key(folder / "manager" / SEAL_FILE, vault)),
    )
    await store.open()

    def fill(draft: Draft) -> None:
        for node_id in ids:
            draft.put(
                Node(
                    id=node_id,
                    spec=NodeSpec(role=NodeRole.WORKER, availability=Availability.ACTIVE),
                    description=NodeDescription(hostname=node_id),
                    status=NodeStatus(state=NodeState.UNKNOWN),
                )
            )

    await store.update(fill)
    await store.close()
    return Plan(
        address=address,
        node_id=new.node.id,
        key_pem=new.key_pem,
        certificate_pem=new.certificate_pem,
        root_pem=new.cluster.root_ca_pem,
        admin_pem=sign(common_name="bench", unit=tls.OU_ADMIN),
        agents=tuple(certificates),
    )


def channel(plan: Plan, certificate_pem: str, address: str) -> rpc.Channel:
    credentials = tls.client_credentials(plan.root_pem, plan.key_pem, certificate_pem)
    return rpc.Channel.tls(address, credentials, server_name=tls.SERVER_NAME)


# ------------------------------------------------------------------ the manager's process


async def be_manager(folder: Path, plan: Plan) -> None:
    """Until standard input ends, or SIGKILL."""
    lag = Lag()
    manager = main.Manager(
        main.Settings(
            state_dir=folder / "manager",
            node_id=plan.node_id,
            listen_addr=plan.address,
            advertise_addr=plan.address,
            key_pem=plan.key_pem,
            certificate_pem=plan.certificate_pem,
            version="bench",
        ),
        SystemClock(),
        seeded_rng(2),
        vault=Vault(folder / "node.key"),
    )
    await manager.start()

    def stats(_: str) -> dict[str, Any]:
        store = manager.store
        # The manager's own node has no agent here.
        nodes = Counter(
            n.status.state if n.status else 0 for n in store.all(Node) if n.id != plan.node_id
        )
        running = sum(
            1
            for t in store.all(Task)
            if t.status is not None
            and t.status.state == TaskState.RUNNING
            and t.desired_state == TaskState.RUNNING
        )
        return {
            "ready": nodes[NodeState.READY],
            "down": nodes[NodeState.DOWN],
            "running": running,
            "tasks": store.count(Task),
            "revision": store.revision,
            "lag_s": lag.take(),
            "problems": manager.problems,
        }

    async with asyncio.TaskGroup() as group:
        parts = [
            group.create_task(manager.run(lambda: None)),
            group.create_task(lag.watch()),
        ]
        await answer(stats)
        for part in parts:
            part.cancel()
    await manager.stop()


def connector(plan: Plan) -> Callable[[str], Connect]:
    certificates = dict(plan.agents)

    def of(node_id: str) -> Connect:
        async def connect(address: str) -> rpc.Channel:
            return channel(plan, certificates[node_id], address)

        return connect

    return of


# ------------------------------------------------------------------ the measuring process


class Process:
    """One of the other processes."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._asking = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.agents"),
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def ask(self, line: str = "stats") -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        async with self._asking:
            process.stdin.write(f"{line}\n".encode())
            answered = await process.stdout.readline()
        assert answered, f"{self._arguments} has ended"
        found: dict[str, Any] = json.loads(answered)
        return found

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self, field: str) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(\d+) kB", status, re.M)
        assert found is not None
        return int(found[1]) / 1024

    async def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                await process.wait()
        if process.returncode is None:
            await self.kill()


class Bench:
    """The processes, and what was measured of them."""

    def __init__(self, given: argparse.Namespace, folder: Path, plan: Plan) -> None:
        at = ("--folder", str(folder), "--agents", str(given.agents))
        lost = round(given.agents * (given.lose or 0.1))
        self._given = given
        self._plan = plan
        self.manager = Process("--be", "manager", *at)
        self.stay = Process("--be", "agents", *at, "--until", str(given.agents - lost))
        self.lost = Process("--be", "agents", *at, "--from", str(given.agents - lost))
        self.lost_nodes = lost
        self.found: dict[str, float] = {}

    @property
    def _all(self) -> tuple[Process, ...]:
        return self.manager, self.stay, self.lost

    def note(self, **figures: float) -> None:
        """What was measured, told at once."""
        self.found.update(figures)
        told = " ".join(f"{k}={v:.4g}" for k, v in figures.items())
        print(f"[{time.strftime('%H:%M:%S')}] {told}", file=sys.stderr, flush=True)

    async def run(self) -> None:
        try:
            await self._measure()
        finally:
            await asyncio.gather(*(p.stop() for p in self._all))

    async def _measure(self) -> None:
        given = self._given
        begun_s = time.monotonic()
        for process in self._all:
            await process.start()
        await self._until(self.manager, "ready", given.agents)
        self.note(connect_s=time.monotonic() - begun_s, connect_cpu_s=self.manager.cpu_s())
        async with channel(self._plan, self._plan.admin_pem, self._plan.address) as admin:
            control = ControlClient(admin)
            await self._fill(control)
            await self._settle()
            await self._big(control)
        await self._settle()
        await self._idle(given.idle)
        if given.update:
            await self._update()
        if given.lose:
            await self._lose()
        if given.restart:
            await self._restart()
        self.note(
            rss_mib=self.manager.memory_mib("VmHWM"),
            rss_idle_mib=self.manager.memory_mib("VmRSS"),
        )

    async def _settle(self) -> None:
        """Until what was begun is over in all processes."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            before_s = [p.cpu_s() for p in self._all]
            await asyncio.sleep(SETTLE_S)
            spent_s = [p.cpu_s() - b for p, b in zip(self._all, before_s, strict=True)]
            if max(spent_s) < SETTLE_S * SETTLED_CPU:
                return

    async def _until(self, process: Process, key: str, count: int) -> float:
        """Until the process says so of itself; the longest that its loop was late."""
        deadline_s, lag_s = time.monotonic() + PATIENCE_S, 0.0
        while True:
            found = await process.ask()
            lag_s = max(lag_s, float(found["lag_s"]))
            if found[key] >= count:
                return lag_s
            assert time.monotonic() < deadline_s, f"{key}: {found} of {count}"
            await asyncio.sleep(POLL_S)

    async def _fill(self, control: ControlClient) -> None:
        """The tasks that are there before the service that is measured."""
        left = self._given.tasks - BIG
        before, begun_s, cpu_s = max(left, 0), time.monotonic(), self.manager.cpu_s()
        number = 0
        while left > 0:
            await control.create(service(f"small{number}", min(left, SMALL)))
            left, number = left - SMALL, number + 1
        if before:
            await self._until(self.manager, "running", before)
            self.note(fill_s=time.monotonic() - begun_s, fill_cpu_s=self.manager.cpu_s() - cpu_s)

    async def _big(self, control: ControlClient) -> None:
        await self.manager.ask()
        begun_s, cpu_s = time.monotonic(), self.manager.cpu_s()
        agents_s = self.stay.cpu_s() + self.lost.cpu_s()
        profile = self._profiled("create")
        made = await control.create(service("big", BIG, ports=self._given.ports))
        statuses = 0
        async with asyncio.timeout(PATIENCE_S):
            async for told in control.watch_services(WatchServicesRequest(services=(made.id,))):
                statuses += 1
                if told.statuses and told.statuses[0].running >= BIG:
                    break
        self.note(
            create_10k_s=time.monotonic() - begun_s,
            create_cpu_s=self.manager.cpu_s() - cpu_s,
            create_agents_cpu_s=self.stay.cpu_s() + self.lost.cpu_s() - agents_s,
            statuses=statuses,
        )
        self.note(lag_create_ms=1000 * (await self.manager.ask())["lag_s"])
        await profile

    async def _idle(self, for_s: float) -> None:
        agents = (self.stay, self.lost)
        for process in agents:
            await process.ask("reset")
        await self.manager.ask()
        begun_s, cpu_s = time.monotonic(), self.manager.cpu_s()
        agents_s = sum(p.cpu_s() for p in agents)
        profile = self._profiled("idle")
        await asyncio.sleep(for_s)
        took_s = time.monotonic() - begun_s
        manager_cpu = (self.manager.cpu_s() - cpu_s) / took_s
        agents_cpu = (sum(p.cpu_s() for p in agents) - agents_s) / took_s
        of_manager = await self.manager.ask()
        told = [await p.ask() for p in agents]
        self.note(
            manager_cpu=manager_cpu,
            agents_cpu=agents_cpu,
            heartbeats_per_s=_sum(told, "heartbeats") / took_s,
            heartbeat_misses=_sum(told, "misses"),
            answer_ms_max=1000 * max(t["answer_s_max"] for t in told),
            sessions_ended=_sum(told, "sessions"),
            nodes_down=of_manager["down"],
            lag_idle_ms=1000 * of_manager["lag_s"],
        )
        await profile

    async def _update(self) -> None:
        """All of the big service's tasks are replaced by others, a tenth of them at a time."""
        await self.manager.ask()
        begun_s, cpu_s = time.monotonic(), self.manager.cpu_s()
        profile = self._profiled("update")
        statuses = 0
        async with channel(self._plan, self._plan.admin_pem, self._plan.address) as admin:
            control = ControlClient(admin)
            found = await control.get(GetRequest(kind=Kind.SERVICE, ref="big"))
            assert found.object is not None and found.object.service is not None
            big = found.object.service
            assert big.meta is not None and big.spec is not None
            update = UpdateConfig(parallelism=BIG // 10, monitor_ns=SECOND_NS)
            wanted = structs.replace(big.spec, task=_task("web:2"), update=update)
            await control.update(
                UpdateRequest(
                    kind=Kind.SERVICE,
                    id=big.id,
                    version=big.meta.version,
                    spec=Spec(service=wanted),
                )
            )
            revision = big.meta.version
            async with asyncio.timeout(PATIENCE_S):
                async for told in control.watch_services(WatchServicesRequest(services=(big.id,))):
                    statuses += 1
                    if told.revision > revision and told.statuses[0].up_to_date >= BIG:
                        break
        self.note(
            update_s=time.monotonic() - begun_s,
            update_cpu_s=self.manager.cpu_s() - cpu_s,
            update_statuses=statuses,
            lag_update_ms=1000 * (await self.manager.ask())["lag_s"],
        )
        await profile

    async def _lose(self) -> None:
        """The agents of one process end without a word."""
        before = (await self.manager.ask())["running"]
        cpu_s, begun_s = self.manager.cpu_s(), time.monotonic()
        profile = self._profiled("lose")
        await self.lost.kill()
        lag_s = await self._until(self.manager, "down", self.lost_nodes)
        self.note(down_s=time.monotonic() - begun_s)
        # Those on the lost nodes are seen as running no more once they were declared lost.
        await self._until(self.stay, "running", before)
        lag_s = max(lag_s, await self._until(self.manager, "running", before))
        self.note(
            replaced_s=time.monotonic() - begun_s,
            lose_cpu_s=self.manager.cpu_s() - cpu_s,
            lag_lose_ms=1000 * lag_s,
        )
        await profile

    async def _restart(self) -> None:
        """The manager ends without a word, and begins again at once."""
        agents = [self.stay] if self._given.lose else [self.stay, self.lost]
        count = self._given.agents - (self.lost_nodes if self._given.lose else 0)
        before = [await p.ask() for p in agents]
        running = (await self.manager.ask())["running"]
        begun_s = time.monotonic()
        await self.manager.kill()
        await self.manager.start()
        most_s = await self._until(self.manager, "tasks", 1)
        self.note(serving_s=time.monotonic() - begun_s)
        profile = self._profiled("restart")
        while sum([(await p.ask())["connected"] for p in agents]) < count:
            most_s = max(most_s, (await self.manager.ask())["lag_s"])
            assert time.monotonic() < begun_s + PATIENCE_S
            await asyncio.sleep(POLL_S)
        self.note(back_s=time.monotonic() - begun_s, back_cpu_s=self.manager.cpu_s())
        await asyncio.sleep(3 * SETTLE_S)
        after = [await p.ask() for p in agents]
        found = await self.manager.ask()
        self.note(
            restart_started_again=_sum(after, "started") - _sum(before, "started"),
            restart_lost=running - found["running"],
            restart_down=found["down"] - (self.lost_nodes if self._given.lose else 0),
            lag_back_ms=1000 * max(most_s, found["lag_s"]),
        )
        await profile

    async def _profile(self, part: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *("py-spy", "record", "-p", str(self.manager.pid), "-d", "15", "-r", "200", "-t"),
            *("-f", "raw", "-o", f"{self._given.profile}.{part}"),
            stderr=asyncio.subprocess.DEVNULL,
        )
        await process.wait()

    def _profiled(self, part: str) -> asyncio.Task[None]:
        """py-spy's look at the manager for some seconds, where asked for."""

        async def nothing() -> None: ...

        return asyncio.create_task(self._profile(part) if self._given.profile else nothing())


def _sum(told: list[dict[str, Any]], key: str) -> float:
    return float(sum(t[key] for t in told))


def _task(image: str) -> TaskSpec:
    return TaskSpec(container=ContainerSpec(image=image))


def service(name: str, replicas: int, *, ports: bool = False) -> CreateRequest:
    published = (PortConfig(target_port=80, published_port=8080),) if ports else ()
    return CreateRequest(
        spec=Spec(
            service=ServiceSpec(
                name=name,
                task=_task("web:1"),
                mode=ServiceMode(replicated=Replicated(replicas=replicas)),
                endpoint=EndpointSpec(ports=published),
            )
        )
    )


# ------------------------------------------------------------------ the command


async def measure(given: argparse.Namespace) -> dict[str, float]:
    # The store lies on the disk; what the agents keep, which in truth has as many disks as there
    # are agents, in memory.
    folder = Path(tempfile.mkdtemp(prefix="agents-"))
    memory = Path(tempfile.mkdtemp(prefix="agents-", dir="/dev/shm"))
    (folder / "states").symlink_to(memory)
    try:
        plan = await found(folder, given.agents)
        (folder / "plan").write_bytes(msgspec.msgpack.encode(plan))
        bench = Bench(given, folder, plan)
        await bench.run()
        return bench.found
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(memory)


LAST = ("heartbeat_misses", "manager_cpu", "rss_mib", "create_10k_s")


def line(given: argparse.Namespace, figures: dict[str, float]) -> str:
    rest = [k for k in figures if k not in LAST]
    told = " ".join(f"{k}={figures[k]:.4g}" for k in (*rest, *LAST) if k in figures)
    return f"agents={given.agents} tasks={given.tasks} {told}"


async def curve(given: argparse.Namespace) -> None:
    for agents in CURVE:
        of = argparse.Namespace(
            **vars(given) | {"agents": agents, "tasks": max(BIG, PER_AGENT * agents)}
        )
        print(line(of, await measure(of)), flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--idle", type=float, default=20.0, metavar="S")
    parser.add_argument("--ports", action="store_true", help="the service publishes a port")
    parser.add_argument("--lose", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--update", action="store_true", help="of the 10,000 replicas")
    parser.add_argument("--restart", action="store_true", help="the manager is killed and started")
    parser.add_argument("--curve", action="store_true", help="100, 300, 1,000 and 3,000 agents")
    parser.add_argument("--profile", metavar="FILE", help="with py-spy, into FILE.<part>")
    parser.add_argument("--be", choices=("manager", "agents"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--until", dest="end", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def command() -> None:
    given = parsed()
    logs.configure(level="error")
    allow_files(given.agents * 10 + 1000)
    if given.be is None:
        if given.curve:
            uvloop.run(curve(given))
        else:
            print(line(given, uvloop.run(measure(given))))
        return
    plan = msgspec.msgpack.decode((given.folder / "plan").read_bytes(), type=Plan)
    if given.be == "manager":
        uvloop.run(be_manager(given.folder, plan))
    else:
        ids = [i for i, _ in plan.agents][given.first : given.end]
        states = given.folder / "states"
        uvloop.run(be_agents(ids, connector(plan), [plan.address], states))


if __name__ == "__main__":
    command()
