"""The etcd member that a manager runs: its process, its files, and its place among the members.

Clients reach it over a unix socket in the manager's own folder, so that no port listens for them
and the folder's mode is the access control. Peers reach it over mutual TLS with the node's
certificate; only certificates that carry the managers' name are let in (`--peer-cert-allowed-
hostname`), for workers' certificates come from the same root.

The process ends with swarmd (PR_SET_PDEATHSIG) and is started again, with a pause that grows, when
it ends by itself. What it holds is on its disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from etcd3aio import _protobuf as pb

from swarm import errors, tls
from swarm.files import write_private

log = structlog.get_logger("store.etcd")

INSTALL: Final = "install it with `apt-get install etcd-server`, or put `etcd` into PATH"
HEARTBEAT_MS: Final = 100
ELECTION_MS: Final = 600  # six heartbeats; leases last at least one and a half of it
TXN_OPS_MAX: Final = 20_000
REQUEST_BYTES_MAX: Final = 16 << 20
QUOTA_BYTES: Final = 8 << 30
SNAPSHOT_ENTRIES: Final = 10_000
READY_S: Final = 30.0
STOP_S: Final = 5.0
RESTART_S_MIN, RESTART_S_MAX = 0.2, 10.0
CALL_S: Final = 5.0
ADD_S: Final = 20.0  # how long an addition is tried
ADD_RETRY_S: Final = 0.5
PROMOTE_S: Final = 60.0  # how long a learner may take to catch up
PROMOTE_RETRY_S: Final = 0.2
LOG_BYTES_MAX: Final = 16 << 20
# A socket's path may have 107 bytes; etcd makes it in its working folder under a name of this form.
SOCKET: Final = "client.sock:0"
# The package types its own names alone.
_rpc: Any = vars(pb)["rpc_pb2"]
_grpc: Any = vars(pb)["rpc_pb2_grpc"]


@dataclass(frozen=True, slots=True)
class Peer:
    """One member as the cluster knows it. `id` is etcd's."""

    id: int
    name: str  # the node's id; empty until it has started for the first time
    url: str
    learner: bool


def binary() -> str | None:
    """Where etcd is; None: nowhere."""
    return shutil.which("etcd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/bin")


class Member:
    """One member's process. `start`, then `run` beside the engine, then `stop`."""

    def __init__(self, folder: Path, *, node_id: str, peer_host: str, peer_port: int) -> None:
        self._folder = folder
        self._node_id = node_id
        self._peer = tls.join_address(peer_host, peer_port)
        self._process: asyncio.subprocess.Process | None = None
        self._command: list[str] = []
        self._stopping = False
        # Why it does not run; empty: it does.
        self.problem = ""

    @property
    def endpoint(self) -> str:
        """Where this machine's clients reach it."""
        return f"unix:{self._folder / SOCKET}"

    @property
    def peer_url(self) -> str:
        """Where other members reach it."""
        return f"https://{self._peer}"

    @property
    def initialized(self) -> bool:
        """Whether it has been a member before: its place is then on its disk."""
        return (self._folder / "data" / "member" / "wal").exists()

    # -------------------------------------------------------------- life

    async def start(
        self, *, key_pem: str, certificate_pem: str, root_ca_pem: str, peers: Mapping[str, str]
    ) -> None:
        """Starts the process and waits until it listens. `peers`: peer URLs by name of all members,
        this one too, where it joins an existing cluster; empty: it is the first.

        Raises Unsupported where there is no etcd, Unavailable when it does not come up.
        """
        path = binary()
        if path is None:
            raise errors.Unsupported(f"several managers need etcd, and it is not here; {INSTALL}")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.use_certificate(
            key_pem=key_pem, certificate_pem=certificate_pem, root_ca_pem=root_ca_pem
        )
        known = peers or {self._node_id: self.peer_url}
        client = f"unix://{SOCKET}"
        self._command = [
            *(path, "--name", self._node_id, "--data-dir", "data"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", self.peer_url),
            *("--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", ",".join(f"{name}={url}" for name, url in known.items())),
            *("--initial-cluster-state", "existing" if peers else "new"),
            *("--peer-cert-file", "node.crt", "--peer-key-file", "node.key"),
            *("--peer-trusted-ca-file", "root.crt", "--peer-client-cert-auth"),
            *("--peer-cert-allowed-hostname", tls.SERVER_NAME),
            *("--heartbeat-interval", str(HEARTBEAT_MS), "--election-timeout", str(ELECTION_MS)),
            *("--max-txn-ops", str(TXN_OPS_MAX), "--max-request-bytes", str(REQUEST_BYTES_MAX)),
            *("--quota-backend-bytes", str(QUOTA_BYTES)),
            *("--snapshot-count", str(SNAPSHOT_ENTRIES)),
            *("--logger", "zap", "--log-level", "warn", "--log-outputs", "stderr"),
        ]
        await self._spawn()
        await self._wait_listening()

    def use_certificate(self, *, key_pem: str, certificate_pem: str, root_ca_pem: str) -> bool:
        """Writes the files that etcd reads at each handshake; True: the roots, which it reads at
        its start only, have changed.
        """
        roots = self._folder / "root.crt"
        changed = roots.exists() and roots.read_text() != root_ca_pem
        for name, text in (
            ("node.crt", certificate_pem),
            ("node.key", key_pem),
            ("root.crt", root_ca_pem),
        ):
            write_private(self._folder / name, text.encode())
        return changed

    async def _spawn(self) -> None:
        (self._folder / SOCKET).unlink(missing_ok=True)
        output = self._folder / "etcd.log"
        if output.exists() and output.stat().st_size > LOG_BYTES_MAX:
            output.replace(output.with_suffix(".log.1"))
        with output.open("ab") as log_file:
            self._process = await asyncio.create_subprocess_exec(
                # It ends with swarmd, however that ends: no member without its manager.
                *("setpriv", "--pdeathsig", "KILL", *self._command),
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,  # a terminal's Ctrl-C is swarmd's to handle
            )

    async def _wait_listening(self) -> None:
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        try:
            async with asyncio.timeout(READY_S):
                while not ended.done():
                    if (self._folder / SOCKET).exists():
                        return
                    await asyncio.wait({ended}, timeout=0.02)
        except TimeoutError:
            raise errors.Unavailable(
                f"etcd does not listen {READY_S:g} s after its start; its log is "
                f"{self._folder / 'etcd.log'}"
            ) from None
        finally:
            ended.cancel()
        raise errors.Unavailable(self._last_words(self._process.returncode))

    def _last_words(self, code: int | None) -> str:
        """Why the process ended, from the end of its log."""
        lines = (self._folder / "etcd.log").read_text(errors="replace").splitlines()
        return f"etcd ended with status {code}: {lines[-1] if lines else 'it said nothing'}"

    async def run(self) -> None:
        """Sees to it that the process runs, until cancelled."""
        loop = asyncio.get_running_loop()
        delay_s = RESTART_S_MIN
        while True:
            assert self._process is not None
            begun_s = loop.time()
            code = await self._process.wait()
            if self._stopping:
                return
            self.problem = self._last_words(code)
            log.error("etcd_ended", status=code, reason=self.problem, restart_s=delay_s)
            if loop.time() - begun_s > RESTART_S_MAX:
                delay_s = RESTART_S_MIN
            await asyncio.sleep(delay_s)
            delay_s = min(RESTART_S_MAX, delay_s * 2)
            try:
                await self._spawn()
                await self._wait_listening()
                self.problem = ""
            except (OSError, errors.Unavailable) as error:
                self.problem = f"etcd cannot be started: {error}"

    async def restart(self) -> None:
        """Ends the process; `run` starts it again with what has changed."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)

    async def stop(self) -> None:
        """Ends the process in order; what it holds stays on its disk. May be repeated."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


# ------------------------------------------------------------------ the members of the cluster


class Members:
    """Who is a member, through any member's client socket."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint)
        self._cluster: Any = _grpc.ClusterStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def list(self) -> tuple[Peer, ...]:
        """All members, by name. Raises Unavailable without a quorum."""
        answer = await self._call(
            self._cluster.MemberList(_rpc.MemberListRequest(), timeout=CALL_S)
        )
        return _peers(answer)

    async def add(self, url: str) -> tuple[Peer, ...]:
        """Adds a member that does not vote yet; all members, the new one without a name. One that
        is there already is not added again. Raises Unavailable, Exhausted (a learner at a time).
        """
        request = _rpc.MemberAddRequest(peerURLs=[url], isLearner=True)
        until_s = asyncio.get_running_loop().time() + ADD_S
        while True:
            known = await self.list()
            if any(p.url == url for p in known):
                return known
            try:
                return _peers(await self._call(self._cluster.MemberAdd(request, timeout=CALL_S)))
            except errors.Unavailable:
                # etcd takes a member only while all others have been connected for 5 s.
                if asyncio.get_running_loop().time() > until_s:
                    raise
                await asyncio.sleep(ADD_RETRY_S)

    async def promote(self, url: str) -> None:
        """Makes a learner a voter once it has caught up. Raises TimedOut when it does not."""
        try:
            async with asyncio.timeout(PROMOTE_S):
                while True:
                    peer = next((p for p in await self.list() if p.url == url), None)
                    if peer is None:
                        raise errors.NotFound(f"no etcd member is at {url}")
                    if not peer.learner:
                        return
                    try:
                        request = _rpc.MemberPromoteRequest(ID=peer.id)
                        await self._call(self._cluster.MemberPromote(request, timeout=CALL_S))
                        return
                    except errors.Unavailable:
                        await asyncio.sleep(PROMOTE_RETRY_S)
        except TimeoutError:
            raise errors.TimedOut(
                f"the etcd member at {url} has not caught up within {PROMOTE_S:g} s; it does not "
                "vote yet"
            ) from None

    async def remove(self, url: str) -> None:
        """Takes a member away; one that is not there is no error. Raises Unavailable when too few
        of the others are up to agree.
        """
        peer = next((p for p in await self.list() if p.url == url), None)
        if peer is None:
            return
        request = _rpc.MemberRemoveRequest(ID=peer.id)
        await self._call(self._cluster.MemberRemove(request, timeout=CALL_S))

    async def _call(self, call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            details = error.details() or error.code().name
            if "too many learner" in details:
                raise errors.Exhausted(
                    f"another manager is being added just now ({details}); try again in a moment"
                ) from error
            raise errors.Unavailable(f"etcd's members cannot be changed: {details}") from error


def _peers(answer: Any) -> tuple[Peer, ...]:
    return tuple(
        sorted(
            (Peer(m.ID, m.name, next(iter(m.peerURLs), ""), m.isLearner) for m in answer.members),
            key=lambda p: (p.name, p.id),
        )
    )
