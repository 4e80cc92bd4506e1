"""The examples of the repository, and how fast loading is."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.compose import load
from tests.unit.compose.helpers import container, task

EXAMPLES = Path(__file__).parents[3] / "deploy" / "examples"
LOAD_S_MAX = 1.0  # of 300 services; about 0.15 s on a 2-core machine
IMPORT_S_MAX = 0.06


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yml")), ids=lambda p: p.name)
def test_every_example_loads_without_a_warning(path: Path) -> None:
    found = load([str(path)], stack="app", environment={"DB_PASSWORD": "x"})
    assert found.warnings == ()
    assert found.spec.services


@pytest.mark.parametrize(
    ("name", "cpu_nano"), [("web.yml", 100_000_000), ("web-process.yml", 500_000_000)]
)
def test_the_web_example_has_five_limited_replicas(name: str, cpu_nano: int) -> None:
    (web,) = load([str(EXAMPLES / name)], stack="app", environment={}).spec.services
    assert web.name == "app_web"
    assert web.mode is not None
    assert web.mode.replicated is not None
    assert web.mode.replicated.replicas == 5
    resources, restart = task(web).resources, task(web).restart
    assert resources is not None
    assert resources.limits is not None
    assert resources.limits.cpu_nano == cpu_nano
    assert resources.limits.memory_bytes == 50 * 1024 * 1024
    assert restart is not None
    assert restart.condition == "on-failure"
    assert web.endpoint is not None
    assert [(p.published_port, p.target_port) for p in web.endpoint.ports] == [(4000, 80)]


def test_the_process_example_is_a_program_that_compiles() -> None:
    (web,) = load([str(EXAMPLES / "web-process.yml")], stack="a", environment={}).spec.services
    assert container(web).args[:2] == ("python3", "-c")
    compile(container(web).args[2], "web-process.yml", "exec")


def test_three_hundred_services_load_within_a_second() -> None:
    one = """
  s{0}:
    image: nginx:1.{0}
    command: ["run", "--id", "{0}"]
    environment:
      A: "${{X:-1}}"
      B: x
    ports: ["{1}:80"]
    volumes:
      - data:/data
      - ./x:/y:ro
    networks: [front]
    healthcheck:
      test: curl x
    deploy:
      replicas: 2
      resources:
        limits: {{cpus: "0.5", memory: 50M}}
"""
    text = "services:" + "".join(one.format(i, 2000 + i) for i in range(300))
    text += "networks: {front: }\nvolumes: {data: }\n"
    assert text.count("\n") > 5000
    load(
        ["-"],
        stack="app",
        environment={},
        stdin=one.format(0, 80)
        .replace("\n  s", "services:\n  s", 1)
        .replace("    networks: [front]\n", "")
        .replace("      - data:/data\n", ""),
    )  # imports
    began = time.perf_counter()
    found = load(["-"], stack="app", environment={}, stdin=text)
    assert time.perf_counter() - began < LOAD_S_MAX
    assert len(found.spec.services) == 300


def test_importing_the_package_is_cheap() -> None:
    """What swarmctl pays at each start; the loader itself is imported on first use."""
    code = (
        "import dataclasses, time; t = time.perf_counter(); import cli.compose; "
        "print(time.perf_counter() - t); import sys; assert 'yaml' not in sys.modules"
    )
    best = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    )
    assert best < IMPORT_S_MAX
