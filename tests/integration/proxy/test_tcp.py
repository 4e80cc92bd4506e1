"""TCP through proxies on real sockets: local and remote replicas, failures, half-close, no byte lost."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections import Counter

import pytest
from prometheus_client import REGISTRY

from agent.ingress import LocalTarget
from agent.proxy import Proxy, preamble
from agent.proxy import proxy as proxy_module
from agent.proxy.preamble import Status
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import Backend, PortConfig
from tests.integration.proxy.conftest import KEY, Bench, service, until
from tests.ports import free_port


async def test_every_node_reaches_replicas_on_all_nodes_in_turn(bench: Bench) -> None:
    first, second = await bench.node(), await bench.node()
    backends = [
        await bench.task(first, "a"),
        await bench.task(second, "b"),
        await bench.task(second, "c"),
    ]
    port = free_port()
    for node in bench.nodes:
        assert await node.proxy.apply([service(port, *backends)]) == ()
    for node in bench.nodes:
        answers = Counter([await bench.ask(node.host, port) for _ in range(9)])
        assert answers == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
async def test_no_byte_is_lost_in_either_direction_while_the_receiver_is_slow(
    bench: Bench, remote: bool
) -> None:
    first, second = await bench.node(), await bench.node()
    up, down = os.urandom(5 << 20), os.urandom(5 << 20)
    received = hashlib.sha256()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(30_000):
            received.update(data)
            if len(data) % 7 == 0:
                await asyncio.sleep(0.001)
        # Only now, after the client's end: half-close must have been passed on.
        writer.write(down)
        await writer.drain()
        writer.close()

    backend = await bench.task(second if remote else first, "a", handler)
    port = free_port()
    await first.proxy.apply([service(port, backend)])
    reader, writer = await asyncio.open_connection(first.host, port)
    async with asyncio.timeout(60):
        writer.write(up)
        await writer.drain()
        writer.write_eof()
        got = await reader.read()
    assert received.digest() == hashlib.sha256(up).digest()
    assert got == down
    writer.close()
    await writer.wait_closed()


async def test_the_servers_end_does_not_end_the_clients_direction(bench: Bench) -> None:
    node = await bench.node()
    done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        done.set_result(await reader.read())

    port = free_port()
    await node.proxy.apply([service(port, await bench.task(node, "a", handler))])
    reader, writer = await asyncio.open_connection(node.host, port)
    assert await reader.read() == b"bye"
    writer.write(b"still here")
    writer.write_eof()
    assert await done == b"still here"
    writer.close()
    await writer.wait_closed()


async def test_a_backend_that_refuses_is_skipped_and_put_off(bench: Bench) -> None:
    first, second = await bench.node(), await bench.node()
    good = await bench.task(second, "good")
    first.proxy.set_target("dead", LocalTarget("127.0.0.9", {80: free_port()}))
    second.proxy.set_target("far-dead", LocalTarget("127.0.0.9", {80: free_port()}))
    backends = [first.backend("dead"), second.backend("far-dead"), good]
    backends.append(Backend(task_id="no-relay", relay_addr="127.0.0.1", relay_port=free_port()))
    port = free_port()
    await first.proxy.apply([service(port, *backends)])
    assert [await bench.ask(first.host, port) for _ in range(5)] == ["good"] * 5


async def test_without_a_replica_the_client_is_reset(bench: Bench) -> None:
    node = await bench.node()
    port = free_port()
    await node.proxy.apply([service(port)])
    with pytest.raises(ConnectionResetError):
        await bench.ask(node.host, port)


async def test_a_removed_backend_keeps_its_connections_and_gets_no_new_ones(bench: Bench) -> None:
    node = await bench.node()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(b"old:" + line)
        writer.close()

    old, new = await bench.task(node, "old", echo), await bench.task(node, "new")
    port = free_port()
    await node.proxy.apply([service(port, old)])
    reader, writer = await asyncio.open_connection(node.host, port)
    writer.write(b"1\n")
    assert await reader.readline() == b"old:1\n"
    await node.proxy.apply([service(port, new)])
    assert await bench.ask(node.host, port) == "new"
    writer.write(b"2\n")
    assert await reader.readline() == b"old:2\n"
    writer.close()
    await writer.wait_closed()


async def test_changed_and_removed_ports_are_closed(bench: Bench) -> None:
    node = await bench.node()
    backend = await bench.task(node, "a")
    before, after = free_port(), free_port()
    await node.proxy.apply([service(before, backend)])
    await node.proxy.apply([service(after, backend)])
    assert await bench.ask(node.host, after) == "a"
    with pytest.raises(ConnectionRefusedError):
        await bench.ask(node.host, before)
    await node.proxy.apply([])
    with pytest.raises(ConnectionRefusedError):
        await bench.ask(node.host, after)


async def test_a_taken_port_is_a_problem_until_it_is_free(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "RETRY_S", 0.02)
    node = await bench.node()
    backend = await bench.task(node, "a")
    with socket.create_server((node.host, 0)) as other:
        port = other.getsockname()[1]
        (problem,) = await node.proxy.apply([service(port, backend)])
        assert problem == (
            f'service "web": tcp {node.host}:{port} is taken by another program on this node; '
            "stop it or publish another port"
        )
    await until(lambda: not node.proxy.problems)
    assert await bench.ask(node.host, port) == "a"


async def test_two_services_on_one_port_are_a_problem_naming_both(bench: Bench) -> None:
    node = await bench.node()
    port = free_port()
    (problem,) = await node.proxy.apply([service(port), service(port, name="api")])
    assert '"api"' in problem and '"web"' in problem


async def test_a_relay_port_that_is_taken_is_told(bench: Bench) -> None:
    node = await bench.node()
    with pytest.raises(errors.Unavailable, match="--relay-port"):
        await Proxy(relay_address=node.proxy.relay_address).start()


async def _say(node_address: tuple[str, int], data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*node_address)
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await reader.read(1)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_the_relay_takes_only_fresh_preambles_with_the_clusters_key(bench: Bench) -> None:
    node = await bench.node()
    await bench.task(node, "a")
    now_ns = SystemClock().now_ns()

    def made(key: bytes = KEY, task: str = "a", age_s: int = 0, nonce: bytes = b"") -> bytes:
        return preamble.encode(
            key,
            protocol=preamble.TCP,
            task_id=task,
            port=80,
            now_ns=now_ns - age_s * 10**9,
            nonce=nonce or os.urandom(16),
        )

    relay = node.proxy.relay_address
    good = made()
    assert await _say(relay, good) == bytes((Status.OPEN,))
    assert await _say(relay, good) == bytes((Status.DENIED,))  # again
    assert await _say(relay, made(key=b"x" * 32)) == bytes((Status.DENIED,))
    assert await _say(relay, made(age_s=3600)) == bytes((Status.DENIED,))
    assert await _say(relay, made(task="other")) == bytes((Status.UNKNOWN,))
    assert await _say(relay, b"GET / HTTP/1.1\r\n\r\n") == bytes((Status.DENIED,))
    tampered = bytearray(made())
    tampered[5] ^= 1
    assert await _say(relay, bytes(tampered)) == bytes((Status.DENIED,))


async def test_a_former_key_is_taken_until_the_next_change(bench: Bench) -> None:
    first, second = await bench.node(), await bench.node()
    port = free_port()
    await first.proxy.apply([service(port, await bench.task(second, "a"))])
    second.proxy.set_key(b"n" * 32)
    assert await bench.ask(first.host, port) == "a"
    second.proxy.set_key(b"m" * 32)
    with pytest.raises(ConnectionResetError):
        await bench.ask(first.host, port)


async def test_a_host_port_leads_to_its_one_task(bench: Bench) -> None:
    node = await bench.node()
    await bench.task(node, "a")
    target = node.proxy._cluster.targets["a"]
    node.proxy.set_target("a", None)
    port = PortConfig(target_port=80, publish_mode="host")
    (given,) = await node.proxy.publish("a", [port], target)
    assert given.published_port > 0
    await node.proxy.apply([])  # services of the cluster are another matter
    assert await bench.ask(node.host, given.published_port) == "a"
    with pytest.raises(errors.Conflict, match="taken"):
        await node.proxy.publish("b", [given], target)
    await node.proxy.withdraw("a")
    await node.proxy.withdraw("a")
    with pytest.raises(ConnectionRefusedError):
        await bench.ask(node.host, given.published_port)


async def test_connections_are_counted_and_none_stays_open(bench: Bench) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    node = await bench.node()
    port = free_port()
    await node.proxy.apply([service(port, await bench.task(node, "a"))])
    before = value("swarm_proxy_connections_total", via="tcp", result="ok")
    await asyncio.gather(*(bench.ask(node.host, port) for _ in range(50)))
    assert value("swarm_proxy_connections_total", via="tcp", result="ok") == before + 50
    await until(lambda: node.proxy._connections.open == 0)
    for published in node.proxy._published.values():
        for balancer in published.balancers.values():
            balancer.check_invariants()
            assert all(slot.open == 0 for slot in balancer.order(0.0))


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
async def test_a_task_that_is_to_stop_finishes_its_answers(bench: Bench, remote: bool) -> None:
    first, second = await bench.node(), await bench.node()
    go_on = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line == b"slow\n":
                await go_on.wait()
            writer.write(line)
            await writer.drain()
        writer.close()

    node = second if remote else first
    backend = await bench.task(node, "a", handler)
    port = free_port()
    await first.proxy.apply([service(port, backend)])
    assert await node.proxy.finished("a", timeout_s=5), "nobody is connected"
    reader, writer = await asyncio.open_connection(first.host, port)
    async with asyncio.timeout(20):
        writer.write(b"quick\n")
        assert await reader.readline() == b"quick\n"
        assert await node.proxy.finished("a", timeout_s=10), "it was answered, and stays open"
        writer.write(b"slow\n")
        node.proxy.set_target("a", None)
        assert not await node.proxy.finished("a", timeout_s=0.5), "no answer has come"
        waiting = asyncio.create_task(node.proxy.finished("a", timeout_s=10))
        go_on.set()
        assert await reader.readline() == b"slow\n"
        assert await waiting
        writer.close()
        await writer.wait_closed()
