"""Members of a real etcd over mutual TLS: founding, growing, shrinking, crashes, and who is let in."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from manager.store import Store
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_member import Member, Members
from swarm import errors, tls
from swarm.clock import SystemClock
from swarm.v1 import Task
from tests.etcd import Ca, free_ports

pytestmark = pytest.mark.slow

CLOCK = SystemClock()
WAIT_S = 20.0


class Lab:
    """Members by name, each with its process watched."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.ca = Ca()
        self._folder = folder
        self._stack = stack
        self.members: dict[str, Member] = {}

    def make(self, name: str, **more: Any) -> Member:
        (port,) = free_ports(1)
        folder = self._folder / name
        self.members[name] = Member(
            folder,
            node_id=name,
            listen_host="127.0.0.1",
            peer_host="127.0.0.1",
            peer_port=port,
            **more,
        )
        return self.members[name]

    async def start(self, name: str, peers: dict[str, str] | None = None) -> Member:
        member = self.members[name]
        key_pem, certificate_pem = self.ca.issue(name, tls.OU_MANAGER)
        await member.start(
            key_pem=key_pem,
            certificate_pem=certificate_pem,
            root_ca_pem=self.ca.root_pem,
            peers=peers or {},
        )
        running = asyncio.create_task(member.run())

        async def end() -> None:
            await member.stop()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        self._stack.push_async_callback(end)
        return member

    async def founded(self) -> Member:
        self.make("n1")
        return await self.start("n1")

    async def grown(self, name: str) -> Member:
        """One more voter, added through the first."""
        member = self.make(name)
        async with self.of("n1") as members:
            known = await members.add(member.peer_url)
            peers = {p.name or name: p.url for p in known}
            await self.start(name, peers)
            await members.promote(member.peer_url)
        return member

    def of(self, name: str) -> _Closing:
        return _Closing(self.members[name].endpoint)

    async def store(self, name: str) -> Store:
        engine = EtcdEngine(EtcdClient([self.members[name].endpoint]), clock=CLOCK, writer=name)
        store = Store(engine, CLOCK)
        await eventually(store.open)
        self._stack.push_async_callback(store.close)
        return store


class _Closing:
    def __init__(self, endpoint: str) -> None:
        self._members = Members(endpoint)

    async def __aenter__(self) -> Members:
        return self._members

    async def __aexit__(self, *_: object) -> None:
        await self._members.close()


async def eventually(work: Callable[[], object]) -> None:
    """Repeats what is refused while there is no quorum yet."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await work()  # type: ignore[misc]
                return
            except (errors.Unavailable, errors.TimedOut):
                await asyncio.sleep(0.05)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    # A socket's path is short.
    folder = Path("/tmp") / f"swarm-etcd-{os.getpid()}-{tmp_path.name[-12:]}"
    async with AsyncExitStack() as stack:
        yield Lab(folder, stack)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def task_ids(store: Store) -> set[str]:
    return {t.id for t in store.all(Task)}


async def test_a_cluster_grows_to_three_and_serves_from_each(lab: Lab) -> None:
    await lab.founded()
    first = await lab.store("n1")
    await first.update(lambda d: d.put(Task(id="before")))
    for name in ("n2", "n3"):
        await lab.grown(name)
    async with lab.of("n2") as members:
        assert [(p.name, p.learner) for p in await members.list()] == [
            ("n1", False),
            ("n2", False),
            ("n3", False),
        ]
    third = await lab.store("n3")
    assert task_ids(third) == {"before"}
    await third.update(lambda d: d.put(Task(id="after")))
    assert isinstance(first.engine, EtcdEngine)
    await first.engine.barrier()
    assert task_ids(first) == {"before", "after"}


async def test_a_killed_member_comes_back_and_two_of_three_go_on_without_it(lab: Lab) -> None:
    await lab.founded()
    for name in ("n2", "n3"):
        await lab.grown(name)
    second = await lab.store("n2")
    process = lab.members["n1"]._process
    assert process is not None
    pid = process.pid
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: second.update(lambda d: d.put(Task(id="t"))))
    first = await lab.store("n1")
    assert task_ids(first) == {"t"}
    assert lab.members["n1"]._process is not None
    assert lab.members["n1"]._process.pid != pid
    assert lab.members["n1"].problem == ""


async def test_a_member_that_is_removed_is_not_needed_for_the_quorum(lab: Lab) -> None:
    await lab.founded()
    await lab.grown("n2")
    async with lab.of("n1") as members:
        await eventually(lambda: members.remove(lab.members["n2"].peer_url))
        await lab.members["n2"].stop()
        assert [p.name for p in await members.list()] == ["n1"]
        await members.remove("https://127.0.0.1:1")  # nobody is there
    store = await lab.store("n1")
    await eventually(lambda: store.update(lambda d: d.put(Task(id="t"))))


async def test_a_member_started_again_has_its_state(lab: Lab) -> None:
    member = await lab.founded()
    store = await lab.store("n1")
    await store.update(lambda d: d.put(Task(id="t")))
    await store.close()
    await member.stop()
    assert member.initialized
    again = Member(
        member._folder,
        node_id="n1",
        listen_host="127.0.0.1",
        peer_host="127.0.0.1",
        peer_port=tls.split_address(member._peer)[1],
    )
    lab.members["n1"] = again
    await lab.start("n1")
    assert task_ids(await lab.store("n1")) == {"t"}


@pytest.mark.parametrize("who", ["worker", "stranger", "nobody"])
async def test_only_managers_are_let_in_at_the_peers_port(
    lab: Lab, who: str, tmp_path: Path
) -> None:
    member = await lab.founded()
    ca = lab.ca if who == "worker" else Ca()
    unit = tls.OU_WORKER if who == "worker" else tls.OU_MANAGER
    key_pem, certificate_pem = ca.issue("n9", unit)
    context = ssl.create_default_context(cadata=lab.ca.root_pem)
    if who != "nobody":
        (tmp_path / "k").write_text(key_pem)
        (tmp_path / "c").write_text(certificate_pem)
        context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    host, port = tls.split_address(member._peer)

    def ask() -> bytes:
        with (
            socket.create_connection((host, port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            secure.sendall(b"GET /members HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return secure.recv(1000)

    try:
        assert await asyncio.to_thread(ask) == b""
    except (ssl.SSLError, ConnectionError):
        return


async def test_without_etcd_the_error_says_how_to_install_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.store.engines.etcd_binary.binary", lambda: None)
    with pytest.raises(errors.Unsupported, match="apt-get install etcd-server"):
        await lab.founded()
    (lab._folder).mkdir()


async def test_a_member_that_cannot_listen_says_why(lab: Lab) -> None:
    member = lab.make("n1")
    host, port = tls.split_address(member._peer)
    with (
        socket.create_server((host, port)),
        pytest.raises(errors.Unavailable, match="address already in use"),
    ):
        await lab.start("n1")
