"""A manager and a worker, real daemons with every port that they can open, and what an operator
would see of them: their memory, files, logs, audit trails, and whether they answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from agent import identity as ids
from swarm import errors, tls
from swarm.rpc import Channel, NoAnswer
from swarm.v1 import (
    Availability,
    GetInfoRequest,
    IssueClientCertificateRequest,
    Kind,
    ListRequest,
    NodeState,
)
from swarm.v1.services import CertificatesClient, ControlClient
from tests.e2e.local import Node
from tests.ports import free_port

# Of either daemon, whatever was sent to it. Idle they take some 120 MB; 210 were seen.
RSS_BYTES_MAX = 512 << 20
FILES_MORE_MAX = 40  # than before, once the peers are gone: pools of threads and sessions
CALM_S = 30.0

Certificate = tuple[str, str]  # certificate and key, PEM


class Scene:
    """The daemons. `start` takes some seconds, so tests share one."""

    def __init__(self, folder: Path) -> None:
        self.manager = Node(folder, "m", "127.0.0.71")
        self.worker = Node(folder, "w", "127.0.0.72")
        self.relays: dict[str, int] = {}
        self.metrics: dict[str, int] = {}
        for node in (self.manager, self.worker):
            self.relays[node.name] = relay = free_port(node.address)
            self.metrics[node.name] = metrics = free_port(node.address)
            node.extra = ("--relay-port", str(relay))
            node.extra += ("--metrics-addr", f"{node.address}:{metrics}")
        self.secret = secrets.token_hex(16)
        self.tokens: dict[str, str] = {}
        self.ann: Certificate = ("", "")  # an ordinary client
        self.root_pem = ""
        # A node that joined as a worker and whose key somebody has taken.
        self.mole: ids.Identity
        self._files: dict[str, int] = {}
        self._logs: dict[str, int] = {}  # how much of them was looked at

    def start(self) -> None:
        for node in (self.manager, self.worker):
            node.start()
        self.manager.init(store="auto")
        self.worker.join(self.manager)
        for role in ("worker", "manager"):
            self.tokens[role] = self.manager.ok("swarm", "join-token", "-q", role).strip()
        done = self.manager.run("secret", "create", "treasure", "-", stdin=self.secret)
        assert done.returncode == 0, done.stderr
        self.manager.ok(
            *("service", "create", "-q", "--name", "web", "--runtime", "process"),
            *("--secret", "treasure", "--constraint", "node.hostname==w", "sleep", "100000"),
        )
        asyncio.run(self._introduce())
        self._files = {n.name: self._open_files(n) for n in (self.manager, self.worker)}

    async def _introduce(self) -> None:
        key = tls.new_key_pem()
        async with Channel.unix(str(self.manager.socket)) as channel:
            answer = await CertificatesClient(channel).issue_client_certificate(
                IssueClientCertificateRequest(csr_pem=tls.csr_pem(key), name="ann"), timeout_s=10
            )
        self.ann = (answer.certificate_pem, key)
        self.root_pem = answer.root_ca_pem
        self.mole = await ids.join(
            token=self.tokens["worker"],
            addresses=[self.api],
            hostname="mole",
            availability=Availability.ACTIVE,
            listen_addr="127.0.0.73:1",
            advertise_addr="127.0.0.73:1",
            data_path_addr="127.0.0.73",
        )

    def close(self) -> None:
        self.worker.close()
        self.manager.close()

    # -------------------------------------------------------------- where to send it

    @property
    def api(self) -> str:
        return f"{self.manager.address}:{self.manager.port}"

    @property
    def peer(self) -> str | None:
        """Where the manager's own etcd waits for others; None: it runs none."""
        address = (self.manager.address, self.manager.peer_port)
        with socket.socket() as probe:
            return None if probe.connect_ex(address) else f"{address[0]}:{address[1]}"

    def ports(self) -> dict[str, str]:
        """Every place that takes connections: host:port, or the path of a socket."""
        out = {"api": self.api}
        for node in (self.manager, self.worker):
            out[f"relay of {node.name}"] = f"{node.address}:{self.relays[node.name]}"
            out[f"metrics of {node.name}"] = f"{node.address}:{self.metrics[node.name]}"
            out[f"socket of {node.name}"] = str(node.socket)
        if (peer := self.peer) is not None:
            out["etcd"] = peer
        return out

    def channel(self, certificate: Certificate) -> Channel:
        pem, key = certificate
        credentials = tls.client_credentials(self.root_pem, key, pem)
        return Channel.tls(self.api, credentials, server_name=tls.SERVER_NAME)

    @property
    def mole_certificate(self) -> Certificate:
        return (self.mole.certificate_pem, self.mole.key_pem)

    # -------------------------------------------------------------- how they are

    @contextlib.asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """An ordinary client works all the while, on the connection it has and on new ones."""
        stop, done = asyncio.Event(), []

        async def ask(channel: Channel) -> None:
            try:
                await ControlClient(channel).get_info(GetInfoRequest(), timeout_s=15)
            except NoAnswer:
                # grpc.aio cancels calls at times while a thousand others are in flight; one that
                # comes again, as swarmctl's do, has to be answered.
                await ControlClient(channel).get_info(GetInfoRequest(), timeout_s=15)

        async def work() -> None:
            async with self.channel(self.ann) as kept:
                while not stop.is_set():
                    await ask(kept)
                    async with self.channel(self.ann) as fresh:
                        await ask(fresh)
                    done.append(True)
                    await asyncio.sleep(0.05)

        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            yield
            stop.set()
        assert done, "the ordinary client did nothing"

    async def check_calm(self) -> None:
        """Nothing is left of what was sent: the daemons run, with little memory and no files of it;
        both nodes are ready; no log holds what it must not.
        """
        for node in (self.manager, self.worker):
            assert node.process is not None and node.process.poll() is None, self._tail(node)
        await self._until("all nodes are ready", self._all_ready)
        for node in (self.manager, self.worker):
            most = self._files[node.name] + FILES_MORE_MAX
            await self._until(
                f"{node.name} has at most {most} files open",
                lambda node=node, most=most: self._at_most(node, most),  # type: ignore[misc]
            )
            rss = self._rss_bytes(node)
            assert rss < RSS_BYTES_MAX, f"{node.name} has {rss >> 20} MiB in memory"
            log = node.log.read_text(errors="replace")[self._logs.get(node.name, 0) :]
            self._logs[node.name] = self._logs.get(node.name, 0) + len(log)
            for what, word in self._unspeakable().items():
                assert word not in log, f"{node.name}'s log holds {what}"
            for word in ("Traceback", "rpc_failed", "invariant"):
                assert word not in log, f"{node.name}: {self._about(log, word)}"

    def _unspeakable(self) -> dict[str, str]:
        out = {f"the {role} token": t.rpartition("-")[2] for role, t in self.tokens.items()}
        return {**out, "a secret": self.secret, "a key": "PRIVATE KEY"}

    async def _all_ready(self) -> bool:
        async with self.channel(self.ann) as channel:
            try:
                answer = await ControlClient(channel).list(
                    ListRequest(kind=Kind.NODE), timeout_s=10
                )
            except errors.SwarmError:
                return False
        nodes = [o.node for o in answer.objects if o.node is not None]
        ready = {
            n.description.hostname
            for n in nodes
            if n.description and n.status and n.status.state == NodeState.READY
        }
        return ready >= {"m", "w"}

    async def _at_most(self, node: Node, most: int) -> bool:
        return self._open_files(node) <= most

    async def _until(self, what: str, check: Callable[[], Awaitable[bool]]) -> None:
        deadline_s = asyncio.get_running_loop().time() + CALM_S
        while not await check():
            assert asyncio.get_running_loop().time() < deadline_s, (
                f"not within {CALM_S:g} s: {what}"
            )
            await asyncio.sleep(0.1)

    def denied(self) -> list[tuple[str, str]]:
        """(who, method) of each refusal in the manager's audit trail."""
        text = self.manager.ok("swarm", "audit", "-n", "all", "--format", "json")
        found = [json.loads(line) for line in text.splitlines()]
        return [(r["Who"], r["Method"]) for r in found if r["Outcome"].startswith("denied")]

    @staticmethod
    def _pid(node: Node) -> int:
        assert node.process is not None
        return node.process.pid

    def _open_files(self, node: Node) -> int:
        return len(os.listdir(f"/proc/{self._pid(node)}/fd"))

    def _rss_bytes(self, node: Node) -> int:
        pages = Path(f"/proc/{self._pid(node)}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    @staticmethod
    def _tail(node: Node) -> str:
        return f"{node.name} has ended: {node.log.read_text(errors='replace')[-2000:]}"

    @staticmethod
    def _about(log: str, word: str) -> str:
        at = log.index(word)
        return log[max(0, at - 500) : at + 1500]


# ---------------------------------------------------------------- connections


async def connect(where: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """host:port, or the path of a socket."""
    if where.startswith("/"):
        return await asyncio.open_unix_connection(where)
    return await asyncio.open_connection(*tls.split_address(where))


async def connect_tls(
    where: str, certificate: Certificate | None, folder: Path, *, trusted_pem: str = ""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """With HTTP/2 agreed on. Without roots, whoever answers is believed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if trusted_pem:
        context.load_verify_locations(cadata=trusted_pem)
    if certificate is not None:
        path = folder / f"{secrets.token_hex(8)}.pem"
        path.write_text("".join(certificate))
        context.load_cert_chain(path)
    host, port = tls.split_address(where)
    return await asyncio.open_connection(host, port, ssl=context)


async def answer_to(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    data: bytes,
    *,
    timeout_s: float = 10.0,
    end: bool = True,
) -> bytes | None:
    """Sends it and reads until the other end closes; None: it still had not after that time."""
    reader, writer = connection
    out = b""
    try:
        async with asyncio.timeout(timeout_s):
            sending = asyncio.ensure_future(_send(writer, data, end=end))
            try:
                while chunk := await reader.read(65_536):
                    out += chunk
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        return out
    except TimeoutError:
        return None
    except OSError:  # reset
        return out
    finally:
        writer.transport.abort()


async def _send(writer: asyncio.StreamWriter, data: bytes, *, end: bool) -> None:
    with contextlib.suppress(OSError):
        writer.write(data)
        await writer.drain()
        if end and writer.can_write_eof():
            writer.write_eof()
