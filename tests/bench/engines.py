"""What the engines alone need: containers started over several Docker Engines directly, in parallel.

The yardstick for tests.bench.deploy: the same image, command, limits and network as a service's
replicas would have, made with plain aiodocker by a client that does as little as can be done (one
create and one start per container, as many at once per engine as is fastest) and with no cluster
around it. `python -m tests.bench.engines` ends with a line of key=value.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiodocker
import aiohttp

from deploy.testbed import WEB, Bed, Host
from swarm.v1 import Resources

# Starts under way at once per engine. Measured on 2 cores with three engines (Docker 20.10): see
# `--tune`; beyond this an engine only queues inside.
AT_ONCE = 4
LABEL = "bench.engines"


@dataclass(frozen=True, slots=True)
class _Client:
    """A connection to one engine, made before the clock starts, as a cluster's would be."""

    docker: aiodocker.Docker
    gate: asyncio.Semaphore


async def engines_seconds(
    hosts: Sequence[Host],
    replicas: int,
    *,
    limits: Resources | None = None,
    image: str = WEB,
    network: bool = False,
    at_once: int = AT_ONCE,
) -> float:
    """Seconds from the first call until all containers run; they are gone when this returns.
    With `network` each engine first makes a bridge for them.
    """
    clients = [_client(host, at_once) for host in hosts]
    try:
        for client in clients:
            await client.docker.version()
        begin_s = time.perf_counter()
        networks = (
            await asyncio.gather(*(_make_network(c) for c in clients))
            if network
            else [""] * len(clients)
        )
        await asyncio.gather(
            *(
                _run(clients[n % len(clients)], n, image, limits, networks[n % len(clients)])
                for n in range(replicas)
            )
        )
        seconds = time.perf_counter() - begin_s
        running = [await _running(client) for client in clients]
        assert sum(running) == replicas, f"{running} of {replicas} containers run"
        return seconds
    finally:
        for client in clients:
            await _clean(client)
            await client.docker.session.close()
            await client.docker.close()


def _client(host: Host, at_once: int) -> _Client:
    connector = aiohttp.UnixConnector(str(host.docker_socket), limit=0)
    docker = aiodocker.Docker(
        url="unix://localhost",
        session=aiohttp.ClientSession(connector=connector),
        connector=connector,
    )
    return _Client(docker, asyncio.Semaphore(at_once))


async def _make_network(client: _Client) -> str:
    made = await client.docker.networks.create(
        {"Name": "bench", "Driver": "bridge", "Labels": {LABEL: "1"}}
    )
    return str(made.id)


async def _run(
    client: _Client, number: int, image: str, limits: Resources | None, network: str
) -> None:
    host_config: dict[str, Any] = {}
    if limits is not None:
        host_config |= {"NanoCpus": limits.cpu_nano, "Memory": limits.memory_bytes}
    if network:
        host_config["NetworkMode"] = network
    config: dict[str, Any] = {"Image": image, "Labels": {LABEL: "1"}, "HostConfig": host_config}
    async with client.gate:
        container = await client.docker.containers.create(config, name=f"bench-{number}")
        await container.start()


async def _running(client: _Client) -> int:
    return len(await client.docker.containers.list(filters=f'{{"label": ["{LABEL}"]}}'))


async def _clean(client: _Client) -> None:
    found = await client.docker.containers.list(all=True, filters=f'{{"label": ["{LABEL}"]}}')
    await asyncio.gather(*(container.delete(force=True, v=True) for container in found))
    for network in await client.docker.networks.list(filters={"label": LABEL}):
        await (await client.docker.networks.get(network["Id"])).delete()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.engines", description=__doc__)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--network", action="store_true", help="on a bridge of their own")
    parser.add_argument("--tune", action="store_true", help="compare numbers of starts at once")
    given = parser.parse_args()
    limits = Resources(cpu_nano=100_000_000, memory_bytes=50 * 1024 * 1024)
    bed = Bed.open(f"bench-{os.getpid()}")
    try:
        hosts = bed.docker_hosts(given.hosts)

        def measure(at_once: int) -> list[float]:
            return [
                asyncio.run(
                    engines_seconds(
                        hosts,
                        given.replicas,
                        limits=limits,
                        network=given.network,
                        at_once=at_once,
                    )
                )
                for _ in range(given.rounds)
            ]

        measure(AT_ONCE)  # the first round loads code and caches
        for at_once in (1, 2, 3, 4, 6, 10) if given.tune else (AT_ONCE,):
            seconds = measure(at_once)
            print(
                f"hosts={given.hosts} replicas={given.replicas} at_once={at_once} "
                f"engines_s={statistics.median(seconds):.2f} min_s={min(seconds):.2f} "
                f"max_s={max(seconds):.2f} rounds={given.rounds}"
            )
    finally:
        bed.down()


if __name__ == "__main__":
    main()
