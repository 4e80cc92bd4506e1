"""UDP through proxies on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter

import pytest

from agent.ingress import LocalTarget
from agent.proxy import Proxy, udp
from agent.proxy.preamble import Datagram, Kind, encode_datagram
from swarm.clock import SystemClock
from tests.integration.proxy.conftest import KEY, Bench, Node, service, until
from tests.ports import free_port


class Client:
    """A UDP client with one address."""

    def __init__(self, host: str, port: int) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._sock.connect((host, port))

    async def ask(self, data: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, data)
        async with asyncio.timeout(10):
            return await loop.sock_recv(self._sock, 65_535)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
async def test_a_client_keeps_its_replica_and_clients_are_spread(
    bench: Bench, remote: bool
) -> None:
    first, second = await bench.node(), await bench.node()
    home = second if remote else first
    backends = [await bench.udp_task(home, name) for name in ("a", "b")]
    port = free_port()
    await first.proxy.apply([service(port, *backends, target=53, protocol="udp")])
    chosen: Counter[bytes] = Counter()
    for _ in range(6):
        with Client(first.host, port) as client:
            answers = [await client.ask(b"%d" % i) for i in range(5)]
            names = {answer.split(b":")[0] for answer in answers}
            assert len(names) == 1
            assert [answer.split(b":")[1] for answer in answers] == [b"%d" % i for i in range(5)]
            chosen.update(names)
    assert chosen == {b"a": 3, b"b": 3}


async def test_large_datagrams_pass_between_nodes(bench: Bench) -> None:
    first, second = await bench.node(), await bench.node()
    port = free_port()
    backend = await bench.udp_task(second, "a")
    await first.proxy.apply([service(port, backend, target=53, protocol="udp")])
    with Client(first.host, port) as client:
        assert await client.ask(b"x" * 30_000) == b"a:" + b"x" * 30_000


async def test_a_replica_that_is_gone_is_left_for_another(bench: Bench) -> None:
    first, second = await bench.node(), await bench.node()
    backends = [second.backend("0-gone"), await bench.udp_task(second, "a")]
    first.proxy.set_target("00-dead", LocalTarget("127.0.0.9", {53: free_port()}))
    backends.insert(0, first.backend("00-dead"))
    port = free_port()
    await first.proxy.apply([service(port, *backends, target=53, protocol="udp")])
    answer = b""
    with Client(first.host, port) as client:
        async with asyncio.timeout(10):
            while not answer:  # a datagram may be lost; the next finds another way
                try:
                    async with asyncio.timeout(0.2):
                        answer = await client.ask(b"x")
                except TimeoutError:
                    continue
    assert answer == b"a:x"


async def test_answers_come_from_the_address_that_was_asked(bench: Bench) -> None:
    proxy = Proxy(relay_address=("127.0.0.1", 0), listen_addresses=("0.0.0.0", "::"))
    await proxy.start()
    bench.nodes.append(Node("127.0.0.1", proxy))
    port = free_port()
    backend = await bench.udp_task(bench.nodes[0], "a")
    assert await proxy.apply([service(port, backend, target=53, protocol="udp")]) == ()
    for host in ("127.0.0.1", "127.0.0.77"):
        with Client(host, port) as client:  # connected: takes answers of this address only
            assert await client.ask(b"x") == b"a:x"


async def test_idle_sessions_end_and_the_table_is_bounded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp, "SESSIONS_MAX", 3)
    node = await bench.node()
    port = free_port()
    backend = await bench.udp_task(node, "a")
    await node.proxy.apply([service(port, backend, target=53, protocol="udp")])
    for _ in range(5):
        with Client(node.host, port) as client:
            assert await client.ask(b"x") == b"a:x"
    sessions = node.proxy._sessions
    assert len(sessions) == 3
    monkeypatch.setattr(udp, "IDLE_S", -1.0)
    sessions.sweep()
    assert len(sessions) == 0


async def test_the_relay_takes_no_datagram_twice_and_none_of_strangers(bench: Bench) -> None:
    node = await bench.node()
    await bench.udp_task(node, "a")
    datagram = Datagram(Kind.TO_TASK, "a", 53, b"s" * 16, 1, b"x")
    now_ns = SystemClock().now_ns()
    data = encode_datagram(KEY, datagram, now_ns)
    loop = asyncio.get_running_loop()
    with Client(*node.proxy.relay_address) as client:
        sock = client._sock
        await loop.sock_sendall(sock, encode_datagram(b"z" * 32, datagram, now_ns))
        assert b"a:x" in await client.ask(data)
        await loop.sock_sendall(sock, data)
        await loop.sock_sendall(sock, data[:-1])
        second = encode_datagram(KEY, Datagram(Kind.TO_TASK, "a", 53, b"s" * 16, 2, b"y"), now_ns)
        # The next answer is that to the second datagram: nothing else was answered.
        assert b"a:y" in await client.ask(second)
    await until(lambda: len(node.proxy._sessions) == 1)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
async def test_a_client_that_is_never_silent_leaves_a_replica_that_is_taken_away(
    bench: Bench, remote: bool
) -> None:
    first, second = await bench.node(), await bench.node()
    home = second if remote else first
    old, new = [await bench.udp_task(home, name) for name in ("old", "new")]
    port = free_port()
    await first.proxy.apply([service(port, old, target=53, protocol="udp")])
    with Client(first.host, port) as client:
        assert await client.ask(b"x") == b"old:x"
        await first.proxy.apply([service(port, old, new, target=53, protocol="udp")])
        assert await client.ask(b"y") == b"old:y"
        # The old replica still answers; that it is not the service's any more is enough.
        await first.proxy.apply([service(port, new, target=53, protocol="udp")])
        assert await client.ask(b"z") == b"new:z"


async def test_a_relay_sends_nothing_to_a_task_that_has_left_its_node(bench: Bench) -> None:
    first, second = await bench.node(), await bench.node()
    old = await bench.udp_task(second, "old")
    new = await bench.udp_task(first, "zz-new")
    port = free_port()
    await first.proxy.apply([service(port, old, new, target=53, protocol="udp")])
    with Client(first.host, port) as client:
        assert await client.ask(b"x") == b"old:x"
        second.proxy.set_target("old", None)
        answer = b""
        async with asyncio.timeout(10):
            while not answer:  # the datagram that finds the task gone is lost
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        answer = await client.ask(b"y")
        assert answer == b"zz-new:y"
