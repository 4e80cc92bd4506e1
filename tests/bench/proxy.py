"""How fast the proxy is: `python -m tests.bench.proxy`.

A server and a client in processes of their own, both on loopback; between them nothing, one proxy
(replica on this node), or two (replica on another node). Bytes flow from server to client. The last
line is `direct_mib_s=… proxied_mib_s=… remote_mib_s=… conns_per_s=…`: medians of the rounds, with one
connection for the rates; connections a second are short ones, 32 at once, through one proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import platform
import socket
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import uvloop

from agent.ingress import LocalTarget
from agent.proxy import Proxy
from swarm.v1 import Backend, IngressService, PortConfig

KEY = b"k" * 32
CHUNK = bytes(1 << 18)
PARALLEL = 32
TASK = "task"


def serve(ready: Connection, size_bytes: int) -> None:
    """Answers `b` with many bytes and anything else with one."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    ready.send(listener.getsockname()[1])

    def answer(connection: socket.socket) -> None:
        with connection:
            if connection.recv(1) != b"b":
                connection.sendall(b"x")
                return
            left = size_bytes
            while left > 0:
                connection.sendall(CHUNK[: min(left, len(CHUNK))])
                left -= len(CHUNK)

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def run_proxy(pipe: Connection, relay: tuple[str, int] | None, target: int | None) -> None:
    """A node: with `target` the task is here, else behind `relay`. Sends (relay, published port)."""

    async def main() -> None:
        proxy = Proxy(relay_address=("127.0.0.1", 0), listen_addresses=("127.0.0.1",))
        await proxy.start()
        proxy.set_key(KEY)
        if target is not None:
            proxy.set_target(TASK, LocalTarget("127.0.0.1", {80: target}))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        host, number = relay or ("", 0)
        backend = Backend(task_id=TASK, relay_addr=host, relay_port=number)
        ports = (PortConfig(target_port=80, published_port=port),)
        problems = await proxy.apply(
            [IngressService(service_id="s", service_name="s", ports=ports, backends=(backend,))]
        )
        if problems:
            raise SystemExit(problems[0])
        pipe.send((proxy.relay_address, port))
        await asyncio.Event().wait()

    uvloop.run(main())


def download(port: int) -> int:
    """Bytes that came."""
    total = 0
    buffer = bytearray(1 << 20)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"b")
        while count := connection.recv_into(buffer):
            total += count
    return total


def rate_mib_s(port: int, size_bytes: int, rounds: int) -> list[float]:
    rates = []
    for _ in range(rounds):
        begin = time.perf_counter()
        got = download(port)
        if got != size_bytes:
            raise SystemExit(f"{got} of {size_bytes} bytes came")
        rates.append(size_bytes / (1 << 20) / (time.perf_counter() - begin))
    return rates


async def connections_per_s(port: int, count: int) -> float:
    async def worker(share: int) -> None:
        for _ in range(share):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"s")
            if await reader.read() != b"x":
                raise SystemExit("a connection was not answered")
            writer.close()

    begin = time.perf_counter()
    await asyncio.gather(*(worker(count // PARALLEL) for _ in range(PARALLEL)))
    return count // PARALLEL * PARALLEL / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="size of one transfer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=3200)
    given = parser.parse_args()
    size_bytes = given.mib << 20
    context = multiprocessing.get_context("spawn")
    processes = []

    def start(target: Callable[..., None], *arguments: object) -> Connection:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        processes.append(process)
        return ours

    try:
        direct = start(serve, size_bytes).recv()
        relay, proxied = start(run_proxy, None, direct).recv()
        _, remote = start(run_proxy, relay, None).recv()
        print(f"{platform.machine()}, Python {platform.python_version()}, {given.mib} MiB a round")
        medians = []
        for name, port in (("direct", direct), ("proxied", proxied), ("remote", remote)):
            rates = rate_mib_s(port, size_bytes, given.rounds)
            medians.append(statistics.median(rates))
            print(f"{name}: {min(rates):.0f} to {max(rates):.0f} MiB/s")
        rate = uvloop.run(connections_per_s(proxied, given.connections))
        print(
            f"direct_mib_s={medians[0]:.0f} proxied_mib_s={medians[1]:.0f} "
            f"remote_mib_s={medians[2]:.0f} conns_per_s={rate:.0f}"
        )
    finally:
        for process in processes:
            process.terminate()
            process.join()


if __name__ == "__main__":
    main()
