"""A swarmd on this machine's loopback, without root or an engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.cluster import wait_for
from tests.ports import free_port

BIN = Path(sys.executable).parent


class Node:
    """One swarmd with the process runtime, its state below a folder of the test's."""

    def __init__(self, folder: Path, name: str, address: str = "127.0.0.1") -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.name = name
        self.address = address
        self.port = free_port(address)
        self.peer_port = free_port(address)
        self.socket = self.folder / "s.sock"
        self.log = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.extra: tuple[str, ...] = ()
        self.wrapped: tuple[str, ...] = ()  # a command that swarmd's is handed to

    @property
    def words(self) -> list[str | Path]:
        return [
            *self.wrapped,
            *(BIN / "swarmd", "--state-dir", self.folder / "state", "--socket", self.socket),
            *("--runtimes", "process", "--docker-socket", "none", "--hostname", self.name),
            *("--relay-port", str(free_port(self.address)), "--peer-port", str(self.peer_port)),
            *self.extra,
        ]

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)  # a killed daemon leaves it
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self.words, stdout=output, stderr=output)
        wait_for(f"{self.name} answers", self.socket.exists)

    def stop(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=30)
        self.process = None

    def run(
        self, *words: str | Path, stdin: str | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        host = ("--host", f"unix://{self.socket}")
        return self.run_bare(*host, *words, stdin=stdin, env=env)

    def run_bare(
        self, *words: str | Path, stdin: str | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """swarmctl with whatever its environment says about whom to talk to."""
        return subprocess.run(
            [BIN / "swarmctl", *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={**os.environ, **(env or {})},
        )

    def ok(self, *words: str | Path) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def at(self) -> tuple[str, ...]:
        """Where it listens, for init and join."""
        where = f"{self.address}:{self.port}"
        return ("--listen-addr", where, "--advertise-addr", where)

    def init(self, *, store: str = "embedded") -> None:
        self.ok("swarm", "init", "--store", store, *self.at)

    def join(self, manager: Node, role: str = "worker") -> None:
        token = manager.ok("swarm", "join-token", "-q", role).strip()
        self.ok("swarm", "join", "--token", token, *self.at, f"{manager.address}:{manager.port}")

    def close(self) -> None:
        """Ends tasks and daemon, whatever state they are in."""
        if self.process is not None:
            self.run("swarm", "leave", "--force")
            self.stop()
