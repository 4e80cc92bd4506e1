"""Members of a real etcd over mutual TLS, as managers run them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from manager.store import Store
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_member import Member, Removed
from manager.store.engines.etcd_members import Members
from swarm import errors, tls
from swarm.clock import SystemClock
from swarm.v1 import Task
from tests.etcd import Ca
from tests.ports import free_ports

CLOCK = SystemClock()
WAIT_S = 20.0


class Lab:
    """Members by name, each with its process watched."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.ca = Ca()
        self.folder = folder
        self._stack = stack
        self.members: dict[str, Member] = {}
        self.running: dict[str, asyncio.Task[None]] = {}
        self.issued: dict[str, tuple[str, str, str]] = {}

    def issue(self, name: str, host: str = "127.0.0.1") -> None:
        """What the member is started with: key, certificate, roots."""
        self.issued[name] = (*self.ca.issue(name, tls.OU_MANAGER, host), self.ca.root_pem)

    def make(self, name: str, *, folder: Path | None = None, **more: Any) -> Member:
        (port,) = free_ports(1)
        self.members[name] = Member(
            folder or self.folder / name,
            node_id=name,
            peer_port=port,
            **{"listen_host": "127.0.0.1", "peer_host": "127.0.0.1", **more},
        )
        return self.members[name]

    async def start(
        self, name: str, peers: dict[str, str] | None = None, *, force_new_cluster: bool = False
    ) -> Member:
        member = self.members[name]
        if name not in self.issued:
            self.issue(name)
        key_pem, certificate_pem, root_ca_pem = self.issued[name]
        await member.start(
            key_pem=key_pem,
            certificate_pem=certificate_pem,
            root_ca_pem=root_ca_pem,
            peers=peers or {},
            force_new_cluster=force_new_cluster,
        )
        self.running[name] = asyncio.create_task(member.run())
        self._stack.push_async_callback(self.stop, name)
        return member

    async def stop(self, name: str) -> None:
        """In order; its data stays. May be repeated."""
        await self.members[name].stop()
        await asyncio.gather(self.running[name], return_exceptions=True)

    async def vanish(self, name: str) -> None:
        """As a machine that is gone for good."""
        self.running[name].cancel()
        await asyncio.gather(self.running[name], return_exceptions=True)
        self.signal(name, signal.SIGKILL)
        await self.stop(name)

    def signal(self, name: str, number: int) -> None:
        pid = self.members[name].pid
        assert pid is not None
        os.kill(pid, number)

    async def wait_healthy(self, name: str, *, healthy: bool = True) -> None:
        """Until the member says of all others that they are healthy, or are not."""
        async with self.of(name) as members, asyncio.timeout(WAIT_S):
            while await members.all_healthy() is not healthy:
                await asyncio.sleep(0.05)

    async def removed(self, name: str) -> str:
        """What the member says when the others have removed it."""
        async with asyncio.timeout(WAIT_S):
            try:
                await asyncio.shield(self.running[name])
            except Removed as error:
                return error.message
        raise AssertionError(f"{name} ended and was not removed")

    async def founded(self) -> Member:
        self.make("n1")
        return await self.start("n1")

    async def grown(self, name: str, *, by: str = "n1", **more: Any) -> Member:
        """One more voter, added through another."""
        await self.learner(name, by=by, **more)
        async with self.of(by) as members:
            await members.promote(self.members[name].peer_url)
        return self.members[name]

    async def learner(self, name: str, *, by: str = "n1", **more: Any) -> Member:
        member = self.make(name, **more)
        async with self.of(by) as members:
            known = await members.add(member.peer_url)
        return await self.start(name, {p.name or name: p.url for p in known})

    async def remove(self, name: str, *, by: str = "n1") -> None:
        """etcd removes a member only while the others have been connected for 5 s."""
        async with self.of(by) as members:
            await eventually(lambda: members.remove(self.members[name].peer_url))

    @asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[Members]:
        members = Members(self.members[name].endpoint)
        try:
            yield members
        finally:
            await members.close()

    async def store(self, name: str) -> Store:
        engine = EtcdEngine(EtcdClient([self.members[name].endpoint]), clock=CLOCK, writer=name)
        store = Store(engine, CLOCK)
        await eventually(store.open)
        self._stack.push_async_callback(store.close)
        return store


async def eventually(work: Callable[[], Awaitable[object]], *, within_s: float = WAIT_S) -> None:
    """Repeats what is refused while there is no quorum yet."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await work()
                return
            except (errors.Unavailable, errors.TimedOut):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def open_lab(name: str) -> AsyncIterator[Lab]:
    # A socket's path is short.
    folder = Path("/tmp") / f"swarm-etcd-{os.getpid()}-{name[-12:]}"
    try:
        async with AsyncExitStack() as stack:
            yield Lab(folder, stack)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def task_ids(store: Store) -> set[str]:
    return {t.id for t in store.all(Task)}


async def until(met: Callable[[], object], *, within_s: float = WAIT_S) -> None:
    async with asyncio.timeout(within_s):
        while not met():
            await asyncio.sleep(0.02)
