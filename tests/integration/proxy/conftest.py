"""Nodes with a proxy each on loopback addresses, and small servers that stand for tasks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from agent.ingress import LocalTarget
from agent.proxy import Proxy
from swarm.v1 import Backend, IngressService, PortConfig

KEY = b"k" * 32
DEADLINE_S = 15.0
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class Node:
    """A node's proxy and its address."""

    host: str
    proxy: Proxy

    def backend(self, task_id: str) -> Backend:
        address, port = self.proxy.relay_address
        return Backend(task_id=task_id, node_id=self.host, relay_addr=address, relay_port=port)


@dataclass
class Bench:
    """All that a test has made."""

    nodes: list[Node] = field(default_factory=list)
    _servers: list[asyncio.Server] = field(default_factory=list)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)
    _transports: list[asyncio.DatagramTransport] = field(default_factory=list)

    async def node(self, key: bytes = KEY) -> Node:
        host = f"127.0.0.{len(self.nodes) + 1}"
        proxy = Proxy(relay_address=(host, 0), listen_addresses=(host,))
        await proxy.start()
        proxy.set_key(key)
        self.nodes.append(Node(host, proxy))
        return self.nodes[-1]

    async def task(self, node: Node, task_id: str, handler: Handler | None = None) -> Backend:
        """A replica on a node that answers with its id, or as the handler does. Target port 80."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._writers.append(writer)
            if handler is not None:
                await handler(reader, writer)
                return
            writer.write(task_id.encode())
            writer.write_eof()
            await reader.read()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.9", 0)
        self._servers.append(server)
        port = server.sockets[0].getsockname()[1]
        node.proxy.set_target(task_id, LocalTarget("127.0.0.9", {80: port}))
        return node.backend(task_id)

    async def udp_task(self, node: Node, task_id: str) -> Backend:
        """Echoes each datagram with its id before it. Target port 53."""
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: _Echo(task_id), local_addr=("127.0.0.9", 0)
        )
        self._transports.append(transport)
        port = transport.get_extra_info("sockname")[1]
        node.proxy.set_target(task_id, LocalTarget("127.0.0.9", {53: port}))
        return node.backend(task_id)

    async def ask(self, host: str, port: int) -> str:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            async with asyncio.timeout(DEADLINE_S):
                return (await reader.read()).decode()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.wait_closed()
        for node in self.nodes:
            await node.proxy.close()
        for transport in self._transports:
            transport.close()
        await asyncio.sleep(0)  # transports close in the next turn


class _Echo(asyncio.DatagramProtocol):
    def __init__(self, name: str) -> None:
        self._name = name.encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(self._name + b":" + data, addr)  # type: ignore[attr-defined]  # datagram transport


def service(
    port: int, *backends: Backend, target: int = 80, protocol: str = "tcp", name: str = "web"
) -> IngressService:
    return IngressService(
        service_id=f"id-{name}",
        service_name=name,
        ports=(PortConfig(protocol=protocol, target_port=target, published_port=port),),
        backends=backends,
    )


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    held = Bench()
    yield held
    await held.close()
