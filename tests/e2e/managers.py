"""A cluster of several managers and workers on the test bed, with real etcd members and the process
runtime: its nodes are asked over their sockets, and taken down as crashes and networks would.

Managers are drained, so that what happens to them touches no task. Hosts get their numbers from
`FIRST_HOST` on, apart from those that other tests put a Docker Engine on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from deploy.testbed import Bed, Host
from deploy.testbed.processes import poll
from manager.store.engines.etcd_client import EtcdClient
from swarm import errors
from swarm.rpc import STALE_KEY, Channel
from swarm.v1 import (
    GetInfoRequest,
    GetInfoResponse,
    Kind,
    ListRequest,
    Node,
    NodeRole,
    NodeState,
    Reachability,
    Service,
    ServiceStatus,
)
from swarm.v1.services import ControlClient
from tests.e2e.cluster import wait_for
from tests.e2e.history import Run, live, read_runs

T = TypeVar("T")
FIRST_HOST = 21
SWARMD = ("--runtimes", "process")
CONVERGED_S = 60.0
ASK_S = 10.0


def since_boot() -> float:
    """The time that tasks' beats are on."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Managers:
    """`managers` and `workers`: hosts of one cluster, the first manager made it."""

    def __init__(
        self, bed: Bed, managers: int = 3, workers: int = 3, *, first: int = FIRST_HOST
    ) -> None:
        hosts = tuple(bed.host(first + i) for i in range(managers + workers))
        self.managers = hosts[:managers]
        self.workers = hosts[managers:]
        # What tasks note, in a folder that no other cluster's tasks write to.
        self.beats = hosts[-1].folder / "beats"
        self.beats.mkdir(exist_ok=True)

    @property
    def hosts(self) -> tuple[Host, ...]:
        return self.managers + self.workers

    @property
    def sockets(self) -> dict[str, Path]:
        """Of the managers, by their names."""
        return {host.name: host.swarm_socket for host in self.managers}

    # -------------------------------------------------------------- life

    def up(self, *init: str) -> None:
        """`init` are more words for `swarm init`."""
        start(*self.hosts)
        first = self.managers[0]
        where = ("--advertise-addr", first.address)
        first.swarmctl("swarm", "init", *where, "--availability", "drain", *init)
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda host: self.join(host, "worker"), self.workers):
                pass  # raises what failed
        for host in self.managers[1:]:
            self.join(host, "manager")

    def join(self, host: Host, role: str, *, through: Host | None = None) -> None:
        through = through or self.managers[0]
        token = through.swarmctl("swarm", "join-token", "-q", role).strip()
        words = ["--availability", "drain"] if role == "manager" else []
        host.swarmctl(
            *("swarm", "join", "--token", token, "--advertise-addr", host.address, *words),
            f"{through.address}:2377",
        )

    def down(self) -> None:
        """Leaves nothing on the hosts, whatever state they are in: tasks end with their node's
        membership, and managers are not asked.
        """
        for host in self.hosts:
            host.heal()
            pause(host, signal.SIGCONT)
        start(*self.hosts)
        for host in self.workers:
            host.swarmctl("swarm", "leave", "--force", check=False)
        kill(*self.hosts)
        for host in self.hosts:
            shutil.rmtree(host.state_dir)
        shutil.rmtree(self.beats)

    # -------------------------------------------------------------- questions

    def host(self, node_id: str) -> Host:
        """The host of a node, by its node's id."""
        (host,) = (h for h in self.hosts if node_id == self.ids().get(h.name))
        return host

    def ids(self, through: Host | None = None) -> dict[str, str]:
        """Node ids by host name."""
        return {name: node.id for name, node in self.nodes(through).items()}

    def nodes(self, through: Host | None = None, *, stale: bool = True) -> dict[str, Node]:
        """Nodes by host name, as one manager, or the first that answers, knows them. Of several
        nodes that a host has been, the newest.
        """

        async def get(control: ControlClient) -> dict[str, Node]:
            answer = await control.list(ListRequest(kind=Kind.NODE), timeout_s=ASK_S)
            nodes = [o.node for o in answer.objects if o.node is not None]
            nodes.sort(key=lambda n: n.meta.created_at_ns if n.meta else 0)
            return {n.description.hostname: n for n in nodes if n.description}

        return self.ask(get, through, stale=stale)

    def standing(self, through: Host | None = None) -> dict[str, tuple[str, str]]:
        """STATUS and MANAGER STATUS of `node ls` by host name, without the cost of a command;
        empty: no answer.
        """
        try:
            return {name: _standing(node) for name, node in self.nodes(through).items()}
        except errors.SwarmError:
            return {}

    def info(self, through: Host | None = None, *, stale: bool = True) -> GetInfoResponse:
        return self.ask(
            lambda control: control.get_info(GetInfoRequest(), timeout_s=ASK_S),
            through,
            stale=stale,
        )

    def services(
        self, through: Host | None = None, *, stale: bool = False
    ) -> dict[str, tuple[Service, ServiceStatus]]:
        """Services and how far they have come, by name."""

        async def get(control: ControlClient) -> dict[str, tuple[Service, ServiceStatus]]:
            request = ListRequest(kind=Kind.SERVICE, with_status=True)
            answer = await control.list(request, timeout_s=ASK_S)
            pairs = zip(answer.objects, answer.service_statuses, strict=True)
            return {s.name: (o.service, s) for o, s in pairs if o.service is not None}

        return self.ask(get, through, stale=stale)

    def ask(
        self,
        question: Callable[[ControlClient], Awaitable[T]],
        through: Host | None = None,
        *,
        stale: bool = True,
    ) -> T:
        """The answer of one manager, or of the first that gives one."""
        error: errors.SwarmError | None = None
        for host in (through,) if through is not None else self.managers:
            try:
                return asyncio.run(_ask(host, question, stale=stale))
            except errors.SwarmError as failed:
                error = failed
        assert error is not None
        raise error

    def leader(self, *, timeout_s: float = 30.0) -> Host:
        """Who leads, as all managers that can be asked agree."""

        def agreed() -> Host | None:
            found = set()
            for host in self.managers:
                try:
                    found.add(self.info(host, stale=False).leader_node_id)
                except errors.SwarmError:
                    continue
            names = {i: name for name, i in self.ids().items()}
            leaders = {names.get(i) for i in found}
            return next((h for h in self.managers if leaders == {h.name}), None)

        return wait_for("managers agree on their leader", agreed, timeout_s=timeout_s)

    def etcd_leader(self) -> Host | None:
        """Whose member leads etcd; None: no answer."""
        for host in self.managers:
            try:
                if asyncio.run(_leads(host)):
                    return host
            except errors.SwarmError:
                continue
        return None

    # -------------------------------------------------------------- rest

    def trouble(self) -> str:
        """What keeps the cluster from being at rest, all of it and to every manager; empty:
        nothing.
        """
        try:
            for manager in self.managers:
                nodes = self.nodes(manager, stale=False)
                away = [h.name for h in self.hosts if not _ready(nodes.get(h.name))]
                if away:
                    return f"{manager.name} does not have ready: {', '.join(away)}"
                statuses = [nodes[h.name].manager_status for h in self.managers]
                unreachable = [
                    h.name
                    for h, s in zip(self.managers, statuses, strict=True)
                    if s is None or s.reachability != Reachability.REACHABLE
                ]
                if unreachable:
                    return f"{manager.name} does not reach: {', '.join(unreachable)}"
                if (leaders := sum(s is not None and s.leader for s in statuses)) != 1:
                    return f"{manager.name} knows {leaders} leaders"
                for name, (service, status) in self.services(manager).items():
                    if service.pending_delete:
                        return f"{name} is still being removed"
                    if status.running != status.desired or not status.converged:
                        return f"{name}: {status.running} of {status.desired} run"
        except errors.SwarmError as error:
            return f"{type(error).__name__}: {error.message}"
        return ""

    def converge(self, *, timeout_s: float = CONVERGED_S) -> float:
        """Waits until all nodes are ready, all managers reachable and all services whole; seconds
        that took.
        """
        begun = time.monotonic()
        last = ""

        def whole() -> bool:
            nonlocal last
            last = self.trouble()
            return not last

        try:
            wait_for("the cluster is whole", whole, timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {last}") from None
        return time.monotonic() - begun

    def runs(self) -> list[Run]:
        return read_runs(self.beats)

    def check_live(self) -> None:
        """In each slot of each service one task beats, and nothing else does."""
        wanted = {name: s.desired for name, (_, s) in self.services().items() if s.desired}

        def beating() -> dict[str, list[tuple[int, str]]]:
            found = self.runs()
            since = since_boot() - 1.0
            names = {run.service for run in found}
            return {n: [(r.slot, r.host) for r in live(found, n, since)] for n in names}

        def right() -> bool:
            found = beating()
            return all(
                len(found.get(name, ())) == len({slot for slot, _ in found.get(name, ())}) == count
                for name, count in wanted.items()
            ) and all(name in wanted or not slots for name, slots in found.items())

        try:
            wait_for(f"one task beats in each slot of {wanted}", right, timeout_s=15)
        except AssertionError:
            raise AssertionError(f"beating: {beating()}, wanted: {wanted}") from None


async def _ask(host: Host, question: Callable[[ControlClient], Awaitable[T]], *, stale: bool) -> T:
    metadata = ((STALE_KEY, "1"),) if stale else ()
    async with Channel.unix(str(host.swarm_socket), metadata=metadata) as channel:
        return await question(ControlClient(channel))


async def _leads(host: Host) -> bool:
    (socket,) = (host.state_dir / "manager").rglob("client.sock:0")
    client = EtcdClient([f"unix:{socket}"])
    try:
        status = await client.status()
        return bool(status.leader) and status.leader == status.header.member_id
    finally:
        await client.close()


def _ready(node: Node | None) -> bool:
    return node is not None and node.status is not None and node.status.state == NodeState.READY


def _standing(node: Node) -> tuple[str, str]:
    state = node.status.state.name.capitalize() if node.status is not None else ""
    manager = node.manager_status
    if manager is None or not is_manager(node):
        return state, "" if manager is None and not is_manager(node) else "changing"
    return state, "Leader" if manager.leader else manager.reachability.name.capitalize()


def is_manager(node: Node) -> bool:
    return node.spec is not None and node.spec.role == NodeRole.MANAGER


# ------------------------------------------------------------------ what happens to hosts


def start(*hosts: Host) -> None:
    """Starts swarmd, where it does not run, and with it a manager's etcd."""
    for host in hosts:
        host.start_swarmd(*SWARMD, wait=False)
    for host in hosts:
        host.wait_swarmd()


def etcds(host: Host) -> list[int]:
    """Pids of the host's etcd."""
    process = host.record.daemons.get("swarmd")
    if process is None:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[1] == str(process.pid) and (entry / "comm").read_text() == "etcd\n":
                found.append(int(entry.name))
        except (OSError, IndexError):
            continue
    return found


def kill(*hosts: Host) -> None:
    """kill -9 of swarmd, as a crash of the machine would end it; etcd goes with it."""
    members = [pid for host in hosts for pid in etcds(host)]
    for host in hosts:
        host.kill("swarmd")
    gone = poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in members), 5.0)
    assert gone, f"etcd outlives its manager: {members}"


def pause(host: Host, number: int = signal.SIGSTOP) -> None:
    """Stops swarmd and its etcd where they are; with SIGCONT they go on."""
    for pid in etcds(host):
        os.kill(pid, number)
    host.kill("swarmd", number)


def cut_apart(some: Sequence[Host], others: Sequence[Host]) -> None:
    """No packet goes between the two groups until `heal`."""
    for host in some:
        host.cut(peers=others)


def heal(hosts: Sequence[Host]) -> None:
    for host in hosts:
        host.heal()
