"""How fast a compose file is read: `python -m tests.bench.compose --services 300 --lines 5000`.

The file is made, the same for the same numbers: services of a usual size (image, environment with
variables, ports, volumes, networks, healthcheck, deploy, and what anchors and merge keys bring in),
filled up with environment until the lines are reached. Timed is the whole load, from the file to
the stack's spec, in this process after one load that warms up. The last line is
`load_s=… spread_s=… cpu_s=… parse_s=… lines=… services=…`: the median of the rounds, the largest
minus the least, the processor's time (less than load_s on a busy machine), and the part of the YAML
reader in load_s.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cli.compose import Loaded, load
from cli.compose.problems import Report, Source
from cli.compose.tree import parse

HEAD = """\
version: "3.9"
x-logging: &logging
  logging: {driver: json-file, options: {max-size: 10m, max-file: "3"}}
x-deploy: &deploy
  replicas: ${REPLICAS:-2}
  update_config: {parallelism: 1, delay: 10s, order: start-first}
  restart_policy: {condition: on-failure, delay: 5s, max_attempts: 3}
services:
"""
FOOT = """\
networks:
  front: {driver: overlay}
  back: {driver: overlay, internal: true}
volumes:
  data: {}
configs:
  settings: {content: "a=1"}
secrets:
  key: {content: "s"}
"""


def service(index: int) -> list[str]:
    return [
        f"  service-{index}:",
        "    <<: *logging",
        f"    image: registry.example.com/team/service-{index}:${{TAG:-1.0}}",
        f'    command: ["serve", "--port", "{8000 + index}"]',
        "    networks: [front, back]",
        f'    ports: ["{20000 + index}:80"]',
        "    volumes: [data:/data, ./etc:/etc/service:ro]",
        "    configs: [settings]",
        "    secrets: [{source: key, mode: 0400}]",
        *([f"    depends_on: [service-{index - 1}]"] if index % 10 else []),
        "    healthcheck: {test: curl -f http://localhost/, interval: 30s}",
        "    deploy:",
        "      <<: *deploy",
        "      resources: {limits: {cpus: '0.5', memory: 128M}}",
        "    environment:",
        f"      NAME: service-{index}",
    ]


def compose_file(services: int, lines: int) -> str:
    """A file with that many services and, if they leave room, exactly that many lines."""
    blocks = [service(index) for index in range(services)]
    missing = lines - len(HEAD.splitlines()) - len(FOOT.splitlines())
    missing -= sum(len(block) for block in blocks)
    for number in range(max(missing, 0)):
        blocks[number % services].append(f"      OPTION_{number // services}: ${{OPTION:-on}}")
    return HEAD + "".join(f"{line}\n" for block in blocks for line in block) + FOOT


def timed(
    rounds: int, work: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    work()
    took = []
    for _ in range(rounds):
        start = clock()
        work()
        took.append(clock() - start)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--services", type=int, default=300)
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    text = compose_file(options.services, options.lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compose.yml"
        path.write_text(text)

        def whole() -> Loaded:
            return load([str(path)], stack="bench", environment={})

        found = whole()
        took = timed(options.rounds, whole)
        cpu = timed(options.rounds, whole, time.process_time)
        parsing = timed(options.rounds, lambda: parse(Source("f", text), Report()))
    print(
        f"# {platform.machine()}, Python {platform.python_version()}, {len(text)} bytes, "
        f"{len(found.warnings)} warnings",
        file=sys.stderr,
    )
    print(
        f"load_s={statistics.median(took):.3f} spread_s={max(took) - min(took):.3f} "
        f"cpu_s={statistics.median(cpu):.3f} parse_s={statistics.median(parsing):.3f} lines={text.count(chr(10))} "
        f"services={len(found.spec.services)}"
    )


if __name__ == "__main__":
    main()
