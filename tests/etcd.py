"""etcd for tests: real processes on ports of the loopback that the system chose."""

from __future__ import annotations

import shutil
import signal
import ssl
import subprocess
import time
import urllib.request
from pathlib import Path

from swarm import tls
from swarm.clock import SECOND_NS, SystemClock
from swarm.v1 import EtcdAccess
from tests.ports import free_ports

READY_S = 20.0


class Ca:
    """A root, and certificates from it."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self.root_pem, self._key_pem = tls.new_root(now_ns=self._clock.now_ns(), cluster_id="c1")

    def issue(
        self, name: str, unit: str = tls.OU_MANAGER, host: str = "127.0.0.1"
    ) -> tuple[str, str]:
        """Key and certificate."""
        key_pem = tls.new_key_pem()
        return key_pem, tls.sign(
            tls.load_csr(tls.csr_pem(key_pem)),
            root_pem=self.root_pem,
            root_key_pem=self._key_pem,
            common_name=name,
            unit=unit,
            organization="c1",
            now_ns=self._clock.now_ns(),
            lifetime_ns=3600 * SECOND_NS,
            host=host,
        )

    def access(self, *endpoints: str) -> EtcdAccess:
        """How a client of it reaches an etcd."""
        key_pem, certificate_pem = self.issue("client")
        return EtcdAccess(
            endpoints=endpoints,
            ca_pem=self.root_pem,
            certificate_pem=certificate_pem,
            key_pem=key_pem,
        )


class Etcd:
    """One member; `kill` and `start` again keep its data. `peers`: names and peer URLs of all.
    `ca`: whose certificates it and its clients show each other; none: no TLS.
    """

    def __init__(
        self,
        folder: Path,
        *args: str,
        name: str = "m1",
        peers: dict[str, str] | None = None,
        ca: Ca | None = None,
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
        self._tls: ssl.SSLContext | None = None
        if ca is not None:
            files = [folder / f"{name}.{what}" for what in ("root", "key", "crt")]
            for file, pem in zip(files, (ca.root_pem, *ca.issue(name)), strict=True):
                file.write_text(pem)
            root, key, crt = map(str, files)
            self._args += ("--trusted-ca-file", root, "--cert-file", crt, "--key-file", key)
            self._args += ("--client-cert-auth",)
            self._tls = ssl.create_default_context(cafile=root)
            self._tls.load_cert_chain(crt, key)

    def start(self, *, wait: bool = True) -> None:
        url = self._url
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

    @property
    def _url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://{self.endpoint}"

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"{self._url}/health", timeout=1, context=self._tls
            ) as answer:
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


def members(folder: Path, count: int, *, ca: Ca | None = None) -> list[Etcd]:
    """A cluster of several members, started and ready."""
    names = [f"m{i + 1}" for i in range(count)]
    ports = free_ports(count)
    peers = {n: f"http://127.0.0.1:{p}" for n, p in zip(names, ports, strict=True)}
    made = [Etcd(folder, name=name, peers=peers, ca=ca) for name in names]
    for etcd in made:
        etcd.start(wait=False)
    for etcd in made:
        etcd.wait_ready()
    return made
