"""An etcd of one member for tests: a real process on ports of the loopback that the system chose."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
import urllib.error
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
    """One member; `kill` and `start` again keep its data."""

    def __init__(self, folder: Path, *args: str) -> None:
        binary = shutil.which("etcd")
        assert binary, "etcd is not installed; `bash deploy/test-tools.sh` installs it"
        self._binary = binary
        self._folder = folder
        self._args = args
        client, peer = free_ports(2)
        self.endpoint = f"127.0.0.1:{client}"
        self._peer = f"http://127.0.0.1:{peer}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        url = f"http://{self.endpoint}"
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._binary, "--name", "m1", "--data-dir", str(self._folder / "data")),
                    *("--listen-client-urls", url, "--advertise-client-urls", url),
                    *("--listen-peer-urls", self._peer),
                    *("--initial-advertise-peer-urls", self._peer),
                    *("--initial-cluster", f"m1={self._peer}"),
                    *("--heartbeat-interval", "50", "--election-timeout", "500"),
                    *("--max-txn-ops", "20000", "--max-request-bytes", str(16 << 20)),
                    *("--logger", "zap", "--log-outputs", "stderr", *self._args),
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + READY_S
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
                    if b'"true"' in answer.read():
                        return
            except (urllib.error.URLError, OSError):
                pass
            assert self._process.poll() is None, (self._folder / "etcd.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "etcd is not ready in time"
            time.sleep(0.05)

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
