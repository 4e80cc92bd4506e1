"""Managers in this process, over real etcd: where their state goes, and who is one of them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from manager import main, move
from manager import place as places
from manager.store import Corrupt
from swarm import errors, rpc, tls
from swarm.clock import SystemClock
from swarm.ids import system_rng
from swarm.rpc import Channel
from swarm.v1 import (
    Caller,
    Cluster,
    ClusterSpec,
    EtcdAccess,
    ExternalCa,
    InitRequest,
    IssueNodeCertificateRequest,
    ManagerStatus,
    Node,
    NodeRole,
    Reachability,
)
from swarm.vault import Vault
from tests.etcd import Etcd
from tests.fakes.waiting import until
from tests.ports import free_ports

CLOCK = SystemClock()


class Killed(BaseException):
    """Nothing handles it."""


class Host:
    """One machine's manager: its folder, its addresses, and who it is once it is one."""

    def __init__(self, folder: Path) -> None:
        api, self.peer_port = free_ports(2)
        self.folder = folder
        self.addr = f"127.0.0.1:{api}"
        self.known: tuple[str, ...] = (self.addr,)
        self.vault = Vault(folder / "node.key")
        folder.mkdir(parents=True)
        self.vault.make()
        self.node_id = self.key_pem = self.certificate_pem = self.root_ca_pem = ""
        self.manager: main.Manager
        self.running: asyncio.Task[None]

    async def init(self, request: InitRequest) -> None:
        new = await main.bootstrap(
            self.folder / "manager",
            request,
            vault=self.vault,
            hostname="h",
            advertise_addr=self.addr,
            clock=CLOCK,
            rng=system_rng(),
        )
        self.node_id, self.key_pem = new.node.id, new.key_pem
        self.certificate_pem, self.root_ca_pem = new.certificate_pem, new.cluster.root_ca_pem

    async def join(self, other: Host) -> None:
        """Gets a manager's certificate from the other one."""
        self.key_pem = tls.new_key_pem()
        request = IssueNodeCertificateRequest(
            csr_pem=tls.csr_pem(self.key_pem),
            hostname="h2",
            addr=self.addr,
            etcd_version="3.4.23",
        )
        caller = rpc.Context(rpc.Identity(Caller.JOIN_MANAGER), "")
        answer = await other.manager.authority.issue_node_certificate(request, caller)
        assert answer.role == NodeRole.MANAGER
        self.node_id, self.certificate_pem = answer.node_id, answer.certificate_pem
        self.root_ca_pem, self.known = answer.root_ca_pem, (*answer.managers, self.addr)

    async def _connect(self, address: str) -> Channel:
        credentials = tls.client_credentials(self.root_ca_pem, self.key_pem, self.certificate_pem)
        return Channel.tls(address, credentials, server_name=tls.SERVER_NAME)

    @property
    def settings(self) -> main.Settings:
        return main.Settings(
            state_dir=self.folder / "manager",
            node_id=self.node_id,
            listen_addr=self.addr,
            advertise_addr=self.addr,
            key_pem=self.key_pem,
            certificate_pem=self.certificate_pem,
            version="1",
            root_ca_pem=self.root_ca_pem,
            peer_port=self.peer_port,
            managers=lambda: self.known,
            connect=self._connect,
        )

    @property
    def place(self) -> places.Place:
        found = places.load(self.folder / "manager")
        assert found is not None
        return found

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[main.Manager]:
        """Starts the manager and runs it, again each time it asks for that."""
        await self._start()
        serving = asyncio.Event()
        self.running = asyncio.create_task(self._run(serving))
        await asyncio.wait(
            {self.running, waiting := asyncio.create_task(serving.wait())},
            return_when=asyncio.FIRST_COMPLETED,
        )
        waiting.cancel()
        try:
            yield self.manager
        finally:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
            await self.manager.stop()

    async def _start(self) -> None:
        self.manager = self.make()
        await self.manager.start()

    def make(self) -> main.Manager:
        return main.Manager(
            self.settings, CLOCK, system_rng(), vault=self.vault, registry=CollectorRegistry()
        )

    async def _run(self, serving: asyncio.Event) -> None:
        while True:
            await self.manager.run(serving.set)
            await self.manager.stop()
            await self._start()

    def node(self, node_id: str = "") -> Node:
        found = self.manager.store.get(Node, node_id or self.node_id)
        assert found is not None
        return found

    def status(self, node_id: str = "") -> ManagerStatus:
        found = self.node(node_id).manager_status
        assert found is not None
        return found

    def reachable(self) -> int:
        """Managers that the leader has entered as reachable."""
        statuses = [n.manager_status for n in self.manager.store.all(Node) if n.manager_status]
        led = any(s.leader for s in statuses)
        return led * sum(s.reachability == Reachability.REACHABLE for s in statuses)


@pytest.fixture
def one(tmp_path: Path) -> Host:
    return Host(tmp_path / "1")


@pytest.fixture
def two(tmp_path: Path) -> Host:
    return Host(tmp_path / "2")


async def test_a_new_cluster_is_on_etcd_where_there_is_one(one: Host) -> None:
    await one.init(InitRequest())
    async with one.up() as manager:
        assert manager.store.engine.name == "etcd"
        (cluster,) = manager.store.all(Cluster)
        assert cluster.store_engine == "etcd"
        assert one.place == places.Place(format=1, engine="etcd", prefix="/swarm", voter=True)
        assert not (one.folder / "manager/store.db").exists()
        await until(lambda: one.reachable() == 1)
        await until(lambda: one.status().engine_version.startswith("etcd 3."))
        revision = manager.store.revision
    async with one.up() as manager:  # and so after a restart
        assert manager.store.engine.name == "etcd"
        assert manager.store.revision >= revision


async def test_a_second_manager_moves_an_embedded_cluster(one: Host, two: Host) -> None:
    await one.init(InitRequest(store="embedded"))
    async with one.up() as manager:
        assert manager.store.engine.name == "embedded"
        versions = {n.id: n.meta.version for n in manager.store.all(Node) if n.meta}
        await two.join(one)
        async with two.up() as second:
            assert one.manager.store.engine.name == second.store.engine.name == "etcd"
            await until(lambda: one.reachable() == two.reachable() == 2)
            for host in (one, two):
                node = host.node(one.node_id)
                assert node.meta is not None and node.meta.version > versions[one.node_id]
            assert not (one.folder / "manager/store.db").exists()


async def test_a_manager_steps_down_and_the_other_goes_on(one: Host, two: Host) -> None:
    await one.init(InitRequest())
    async with one.up() as manager:
        await two.join(one)
        async with two.up():
            await until(lambda: one.reachable() == two.reachable() == 2)
            # The leader goes: the other one has to lead, and lets it go.
            await manager.step_down()
            with pytest.raises(main.Demoted):
                await asyncio.wait_for(one.running, 10)
            await until(lambda: two.reachable() == 1)
            assert two.node(one.node_id).manager_status is None
            assert two.status().leader
            with pytest.raises(errors.Invalid, match="last manager"):
                await two.manager.step_down()


async def test_what_is_left_of_two_goes_on_alone(one: Host, two: Host) -> None:
    await one.init(InitRequest())
    async with one.up():
        await two.join(one)
        async with two.up():
            await until(lambda: one.reachable() == two.reachable() == 2)
            revision = two.manager.store.revision
    waits: list[str] = []
    alone = two.make()
    starting = asyncio.create_task(alone.start(waits.append))
    await until(lambda: waits, timeout_s=20)
    assert "--force-new-cluster" in waits[0]
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert await main.force_new_cluster(two.settings, CLOCK, two.vault) == ["h"]
    async with two.up() as manager:
        await until(lambda: two.reachable() == 1)
        assert manager.store.revision > revision + 10**9
        node = two.node(one.node_id)
        assert node.spec is not None and node.spec.role == NodeRole.WORKER
        assert node.manager_status is None


@pytest.mark.parametrize("store", ["embedded", "auto"])
async def test_force_new_cluster_has_to_make_sense(one: Host, store: str) -> None:
    await one.init(InitRequest(store=store))
    async with one.up():
        pass
    if store == "embedded":
        with pytest.raises(errors.Conflict, match="embedded store has one manager"):
            await main.force_new_cluster(one.settings, CLOCK, one.vault)
    else:
        shutil.rmtree(one.folder / "manager/etcd")
        with pytest.raises(errors.Conflict, match="another one"):
            await main.force_new_cluster(one.settings, CLOCK, one.vault)


async def test_an_etcd_that_was_asked_for_by_name_or_nothing(one: Host) -> None:
    await one.init(InitRequest(store="etcd"))
    with (
        socket.create_server(("127.0.0.1", one.peer_port)),
        pytest.raises(errors.Unavailable, match="address already in use"),
    ):
        await one._start()


async def test_a_move_that_fails_leaves_the_cluster_as_it_was(one: Host, two: Host) -> None:
    await one.init(InitRequest(store="embedded"))
    async with one.up() as manager:
        await two.join(one)
        before = one.manager
        with socket.create_server(("127.0.0.1", one.peer_port)):
            joining = asyncio.create_task(two._start())
            await until(lambda: one.manager is not before, timeout_s=20)
            await until(lambda: one.manager.problems, timeout_s=20)
            assert "address already in use" in one.manager.problems["move"]
            assert one.manager.store.engine.name == "embedded"
            await until(lambda: one.manager.store.revision >= manager.store.revision)
            joining.cancel()
            await asyncio.gather(joining, return_exceptions=True)
        with pytest.raises(errors.Unavailable, match="try again in a minute"):
            one.manager._check_admits()


async def test_a_move_that_was_killed_is_made_again(
    one: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    await one.init(InitRequest(store="etcd"))
    fill, done = move.to_etcd, []

    async def killed(*args: object, **rest: object) -> None:
        await fill(*args, **rest)  # type: ignore[arg-type]
        done.append(True)
        raise Killed

    monkeypatch.setattr(move, "to_etcd", killed)
    with pytest.raises(Killed):
        await one._start()
    assert done and one.place.engine == "embedded"
    monkeypatch.setattr(move, "to_etcd", fill)
    async with one.up() as manager:
        assert manager.store.engine.name == "etcd"
        assert manager.store.count(Node) == 1


async def test_an_own_member_that_lost_its_data_is_no_new_cluster(one: Host) -> None:
    await one.init(InitRequest())
    async with one.up():
        pass
    shutil.rmtree(one.folder / "manager/etcd")
    with pytest.raises(Corrupt, match=r"does not hold etcd's data.*swarm restore"):
        await one._start()


async def test_without_etcd_there_is_one_manager(
    one: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.store.engines.etcd_binary.binary", lambda: None)
    with pytest.raises(errors.Unsupported, match="apt-get install etcd-server"):
        await one.init(InitRequest(store="etcd"))
    await one.init(InitRequest())
    async with one.up() as manager:
        assert manager.store.engine.name == "embedded"
        with pytest.raises(errors.Unsupported, match="apt-get install etcd-server"):
            manager._check_admits()


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (InitRequest(store="oracle"), "'oracle' is none"),
        (InitRequest(etcd=EtcdAccess()), "endpoints"),
        (InitRequest(store="embedded", etcd=EtcdAccess(endpoints=("a:1",))), "of no use"),
        (InitRequest(force_new_cluster=True), "in no cluster"),
        (InitRequest(spec=ClusterSpec(external_cas=(ExternalCa(url="x"),))), "external CAs"),
    ],
)
async def test_a_wrong_choice_is_refused(one: Host, request_: InitRequest, problem: str) -> None:
    with pytest.raises(errors.SwarmError, match=problem):
        await one.init(request_)
    assert not (one.folder / "manager").exists()


async def test_managers_share_an_etcd_of_somebody_elses(
    one: Host, two: Host, tmp_path: Path
) -> None:
    etcd = Etcd(tmp_path)
    etcd.start()
    try:
        await one.init(InitRequest(etcd=EtcdAccess(endpoints=(etcd.endpoint,))))
        async with one.up() as manager:
            assert one.place.prefix == f"/swarm/{next(iter(manager.store.all(Cluster))).id}"
            await two.join(one)
            async with two.up():
                await until(lambda: one.reachable() == two.reachable() == 2)
                await two.manager.step_down()
                with pytest.raises(main.Demoted):
                    await asyncio.wait_for(two.running, 10)
        with pytest.raises(errors.Unsupported, match="does not run"):
            await main.force_new_cluster(one.settings, CLOCK, one.vault)
        # A second cluster cannot take the first one's place.
        other = Host(tmp_path / "3")
        access = EtcdAccess(endpoints=(etcd.endpoint,), prefix=one.place.prefix)
        await other.init(InitRequest(etcd=access))
        with pytest.raises(errors.Conflict):
            await other._start()
    finally:
        etcd.kill()
