"""etcd for tests: real processes on ports of the loopback that the system chose."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

READY_S = 20.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Etcd:
    """One member; `kill` and `start` again keep its data. `peers`: names and peer URLs of all."""

    def __init__(
        self, folder: Path, *args: str, name: str = "m1", peers: dict[str, str] | None = None
    ) -> None:
        binary = shutil.which("etcd")
        assert binary, "etcd is not installed; `bash deploy/test-tools.sh` installs it"
        self._binary = binary
        self._folder = folder
        self._args = args
        self._name = name
        (client,) = free_ports(1)
        self.endpoint = f"127.0.0.1:{client}"
        self._peers = peers or {name: f"http://127.0.0.1:{free_ports(1)[0]}"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        url = f"http://{self.endpoint}"
        peer = self._peers[self._name]
        with (self._folder / f"{self._name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._binary, "--name", self._name),
                    *("--data-dir", str(self._folder / self._name)),
                    *("--listen-client-urls", url, "--advertise-client-urls", url),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", ",".join(f"{n}={u}" for n, u in self._peers.items())),
                    *("--heartbeat-interval", "50", "--election-timeout", "500"),
                    *("--max-txn-ops", "20000", "--max-request-bytes", str(16 << 20)),
                    *("--logger", "zap", "--log-outputs", "stderr", *self._args),
                ],
                stdout=log,
                stderr=log,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until the member answers, which takes a quorum."""
        assert self._process is not None
        deadline = time.monotonic() + READY_S
        while not self._healthy():
            log = self._folder / f"{self._name}.log"
            assert self._process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, f"etcd {self._name} is not ready in time"
            time.sleep(0.05)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.endpoint}/health", timeout=1) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False

    @property
    def running(self) -> bool:
        """Whether the process is there, stopped ones too."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """As a crash would end it; what it holds is on its disk."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(10)
            self._process = None


def members(folder: Path, count: int) -> list[Etcd]:
    """A cluster of several members, started and ready."""
    names = [f"m{i + 1}" for i in range(count)]
    ports = free_ports(count)
    peers = {n: f"http://127.0.0.1:{p}" for n, p in zip(names, ports, strict=True)}
    made = [Etcd(folder, name=name, peers=peers) for name in names]
    for etcd in made:
        etcd.start(wait=False)
    for etcd in made:
        etcd.wait_ready()
    return made
