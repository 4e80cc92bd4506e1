"""A stack on several Docker hosts, against the engines alone.

Each round first starts the same containers with the engines driven directly in parallel (see
tests.bench.engines), then deploys, scales, drains and removes a stack, so that both see the same
machine. `python -m tests.bench.deploy --hosts 3 --replicas 30` ends with a line of medians:
ours_s (`swarmctl stack deploy` until it returns, all replicas running), engines_s, their ratio,
scale_s (to twice as many), drain_s (one host empty and all replicas running elsewhere) and rm_s
(`stack rm` until it returns, nothing left).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from deploy.testbed import WEB, Bed
from swarm.v1 import Resources
from tests.bench.engines import engines_seconds
from tests.e2e.cluster import Cluster, wait_for

CPUS, MEMORY_MIB = 0.1, 50
STACK = """\
services:
  web:
    image: {image}
    stop_grace_period: 1s
    deploy:
      replicas: {replicas}
      resources:
        limits: {{cpus: "{cpus}", memory: {memory}M}}
      restart_policy: {{condition: on-failure}}
      # What is measured is how soon all replicas run, not how long they are watched afterwards.
      update_config: {{monitor: 0s}}
"""


def timed(action: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    action()
    return time.perf_counter() - begin_s


def one_round(cluster: Cluster, stack: Path, replicas: int) -> dict[str, float]:
    """One round's seconds by name."""
    hosts = cluster.hosts
    limits = Resources(cpu_nano=int(CPUS * 1e9), memory_bytes=MEMORY_MIB << 20)
    engines_s = asyncio.run(engines_seconds(hosts, replicas, limits=limits, network=True))
    ours_s = timed(lambda: cluster.ctl("stack", "deploy", "-c", str(stack), "bench"))
    check(cluster, replicas)
    scale_s = timed(lambda: cluster.ctl("service", "scale", f"bench_web={2 * replicas}"))
    check(cluster, 2 * replicas)
    cluster.ctl("service", "scale", f"bench_web={replicas}")
    last = hosts[-1]

    def drain() -> None:
        cluster.ctl("node", "update", "--availability", "drain", last.name)
        wait_for(
            "the host is empty and the service whole",
            lambda: (
                not cluster.containers(last, every=False)
                and cluster.replicas("bench_web") == f"{replicas}/{replicas}"
            ),
        )

    drain_s = timed(drain)
    cluster.ctl("node", "update", "--availability", "active", last.name)
    rm_s = timed(lambda: cluster.ctl("stack", "rm", "bench"))
    check(cluster, 0)
    return {
        "ours_s": ours_s,
        "engines_s": engines_s,
        "ratio": ours_s / engines_s,
        "scale_s": scale_s,
        "rm_s": rm_s,
        "drain_s": drain_s,
    }


def check(cluster: Cluster, expected: int) -> None:
    """What swarmctl said must be so on the engines."""
    found = sum(len(cluster.containers(h, every=expected == 0)) for h in cluster.hosts)
    assert found == expected, f"{found} containers, not {expected}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.deploy", description=__doc__)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    bed = Bed.open(f"bench-{os.getpid()}")
    try:
        cluster = Cluster(bed.docker_hosts(given.hosts))
        cluster.up()
        with tempfile.TemporaryDirectory() as folder:
            stack = Path(folder) / "bench.yml"
            text = STACK.format(image=WEB, replicas=given.replicas, cpus=CPUS, memory=MEMORY_MIB)
            stack.write_text(text)
            rounds = []
            for number in range(given.rounds):
                rounds.append(one_round(cluster, stack, given.replicas))
                print(number + 1, {k: round(v, 2) for k, v in rounds[-1].items()}, flush=True)
        cluster.down()
    finally:
        bed.down()
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    print(
        f"cores={os.cpu_count()} hosts={given.hosts} replicas={given.replicas} rounds={given.rounds}"
    )
    print(" ".join(f"{key}={value:.2f}" for key, value in medians.items()))


if __name__ == "__main__":
    main()
