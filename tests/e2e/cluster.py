"""A cluster on the test bed, as its users see it: swarmctl, the published ports, the engines."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from deploy.testbed import Host, TestbedError

T = TypeVar("T")
EXAMPLE = Path(__file__).resolve().parents[2] / "deploy/examples/web.yml"


def wait_for(
    what: str, check: Callable[[], T | None], *, timeout_s: float = 30.0, every_s: float = 0.1
) -> T:
    """Polls until `check` returns something true; the failure says what was awaited and last seen."""
    deadline = time.monotonic() + timeout_s
    while True:
        last = check()
        if last:
            return last
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}; last seen: {last!r}")
        time.sleep(every_s)


class Cluster:
    """Hosts with a swarmd each; the first is the manager."""

    def __init__(self, hosts: tuple[Host, ...], *swarmd_args: str) -> None:
        self.hosts = hosts
        self._args = swarmd_args or ("--runtimes", "docker,process")

    def up(self) -> None:
        for host in self.hosts:
            host.start_swarmd(*self._args)
        first = self.hosts[0]
        first.swarmctl("swarm", "init", "--advertise-addr", first.address)
        token = first.swarmctl("swarm", "join-token", "-q", "worker").strip()
        for host in self.hosts[1:]:
            host.swarmctl("swarm", "join", "--token", token, f"{first.address}:2377")

    def down(self) -> None:
        """Leaves the cluster with every host, and checks that nothing stays on it."""
        for host in reversed(self.hosts):
            host.heal()
            if not host.alive("swarmd"):
                host.start_swarmd()
            host.swarmctl("swarm", "leave", "--force", check=False)
            host.stop("swarmd")

    # -------------------------------------------------------------- questions

    def ctl(self, *words: str, check: bool = True, timeout_s: float = 120.0) -> str:
        return self.hosts[0].swarmctl(*words, check=check, timeout_s=timeout_s)

    def fails(self, *words: str) -> tuple[int, str]:
        """Runs swarmctl, which must fail; its exit code and what it said on stderr."""
        host = self.hosts[0]
        command = host.command(
            Path(".venv/bin/swarmctl").absolute(), "--host", f"unix://{host.swarm_socket}", *words
        )
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0, done.stdout
        return done.returncode, done.stderr

    def json(self, *words: str) -> list[dict[str, Any]]:
        """The lines of a listing with --format json."""
        out = self.ctl(*words, "--format", "{{json .}}")
        return [json.loads(line) for line in out.splitlines() if line.strip()]

    def replicas(self, service: str) -> str:
        rows = [r for r in self.json("service", "ls") if r["Name"] == service]
        return str(rows[0]["Replicas"]) if rows else "none"

    def tasks(self, service: str) -> list[dict[str, Any]]:
        return self.json("service", "ps", "--no-trunc", service)

    def running(self, service: str) -> list[dict[str, Any]]:
        return [
            t
            for t in self.tasks(service)
            if str(t["CurrentState"]).startswith("Running") and t["DesiredState"] == "Running"
        ]

    def containers(self, host: Host, *, every: bool = True) -> list[str]:
        """Ids of the cluster's containers on a host's engine."""
        words = ["ps", "-q", "--no-trunc", "--filter", "label=com.docker.swarm.task.id"]
        return host.docker(*words, *(["-a"] if every else [])).split()

    def ask(self, host: Host, port: int = 4000, *, timeout_s: float = 5.0) -> str:
        """What the published port answers on a host, as seen from outside."""
        url = f"http://{host.address}:{port}/"
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return str(answer.read().decode().strip())

    def answers(self, host: Host, times: int, port: int = 4000) -> Counter[str]:
        return Counter(self.ask(host, port) for _ in range(times))

    def host_of(self, container_id: str) -> Host:
        for host in self.hosts:
            if container_id in self.containers(host):
                return host
        raise TestbedError(f"no host has container {container_id}")
