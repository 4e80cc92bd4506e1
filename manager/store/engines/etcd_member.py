"""The etcd member that a manager runs: its process and its files.

Clients reach it over a unix socket in the manager's own folder, so that no port listens for them
and the folder's mode is the access control. Peers reach it over mutual TLS with the node's
certificate; only certificates that carry the managers' name are let in (`--peer-cert-allowed-
hostname`), for workers' certificates come from the same root. That the address they come from is
in their certificate too is not asked: a host with several addresses chooses among them as it likes.

The node's key is never on the disk in clear: etcd is handed files that lie in memory (memfd_create)
and reads them by `/proc/self/fd/N`: key and certificate at each handshake, the roots once.

The process ends with swarmd (PR_SET_PDEATHSIG) and is started again, with a pause that grows, when
it ends by itself; not when the other members have removed it. What it holds is on its disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog
from etcd3aio import _protobuf as pb

from manager.store.engine import Corrupt
from manager.store.engines import etcd_damage, etcd_wal
from manager.store.engines.etcd_binary import INSTALL, binary, usable, version
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_members import Members, Peer
from manager.store.engines.etcd_output import Output
from swarm import errors, tls
from swarm.files import SOCKET_PATH_MAX, write_private

__all__ = ["INSTALL", "QUOTA_BYTES", "Member", "Members", "Peer", "Removed", "binary", "version"]

log = structlog.get_logger("store.etcd")

HEARTBEAT_MS: Final = 100
ELECTION_MS: Final = 600  # six heartbeats; leases last at least one and a half of it
TXN_OPS_MAX: Final = 20_000
REQUEST_BYTES_MAX: Final = 16 << 20
QUOTA_BYTES: Final = 8 << 30
SNAPSHOT_ENTRIES: Final = 10_000
READY_S: Final = 30.0
STOP_S: Final = 5.0
RESTART_S_MIN, RESTART_S_MAX = 0.2, 10.0
# etcd makes it in its working folder, under a name of this form.
SOCKET: Final = "client.sock:0"
# Says that there is data, or was; without it an empty folder would look like a new member's.
BEGUN: Final = "begun"
# Where earlier versions kept what is in memory now.
_FORMER_FILES: Final = ("node.key", "node.crt", "root.crt")


class Removed(errors.SwarmError):
    """The other members have removed this one; what it holds is of no use any more."""


class Member:
    """One member's process. `start`, then `run` beside the engine, then `stop`.

    `listen_host`: the address that it listens on for peers, 0.0.0.0 and :: for all. `peer_host`:
    where other members reach it, an address or a name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        node_id: str,
        listen_host: str,
        peer_host: str,
        peer_port: int,
        quota_bytes: int = QUOTA_BYTES,
    ) -> None:
        self._folder = folder
        self._node_id = node_id
        self._listen_host = listen_host
        self._listen = tls.join_address(listen_host, peer_port)
        self._peer = tls.join_address(peer_host, peer_port)
        self._quota_bytes = quota_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._output = Output(folder / "etcd.log")
        self._following: asyncio.Task[None] | None = None
        self._command: list[str] = []
        self._identity = self._roots = b""
        # What the process that runs has read.
        self._roots_read: bytes | None = None
        self._memory: tuple[int, int] | None = None  # descriptors: identity, roots
        self._spawning = asyncio.Lock()
        self._stopping = False
        self._restarting = False
        # Why it does not run; empty: it does.
        self.problem = ""
        # The folder, open, where its path is too long for a socket's.
        self._way = -1

    @property
    def endpoint(self) -> str:
        """Where this process's clients reach it. Raises Unavailable."""
        path = self._folder / SOCKET
        if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
            return f"unix:{path}"
        if self._way < 0:
            try:
                self._way = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
            except OSError as error:
                raise errors.Unavailable(f"cannot open {self._folder}: {error.strerror}") from None
            weakref.finalize(self, os.close, self._way)
        return f"unix:/proc/self/fd/{self._way}/{SOCKET}"

    @property
    def peer_url(self) -> str:
        """Where other members reach it."""
        return f"https://{self._peer}"

    @property
    def initialized(self) -> bool:
        """Whether it has been a member before: its place is on its disk then, or ought to be."""
        return (self._folder / BEGUN).exists() or (self._data / "member" / "wal").exists()

    @property
    def pid(self) -> int | None:
        """Of the process that runs."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    # -------------------------------------------------------------- life

    async def start(
        self,
        *,
        key_pem: str,
        certificate_pem: str,
        root_ca_pem: str,
        peers: Mapping[str, str],
        force_new_cluster: bool = False,
    ) -> None:
        """Starts the process and waits until it has loaded its data and serves its peers, READY_S
        at most; there may be no quorum then. `peers`: peer URLs by name of all members, this one
        too, where it joins an existing cluster; empty: it is the first, or has been a member
        before. `force_new_cluster`: it goes on as the only member, with what it holds; the others,
        which must be gone for good, are removed. It is alone and takes writes when this returns.

        Raises Unsupported where there is no etcd of use, Corrupt when its data is damaged, Removed,
        Unavailable when it does not come up otherwise. Nothing runs then.
        """
        self._check_listen_host()
        path = await usable()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _FORMER_FILES:
            (self._folder / name).unlink(missing_ok=True)
        begun = (self._folder / BEGUN).exists()
        await asyncio.to_thread(etcd_damage.examine, self._data, begun=begun or force_new_cluster)
        if force_new_cluster:
            kept = await asyncio.to_thread(etcd_wal.agree_on_all, etcd_wal.segments(self._data)[-1])
            log.warning("etcd_goes_on_alone", entries_kept=kept)
        self.use_certificate(
            key_pem=key_pem, certificate_pem=certificate_pem, root_ca_pem=root_ca_pem
        )
        self._command = self._arguments(path, peers)
        self._stopping = False
        self.problem = ""
        try:
            await self._launch(*(("--force-new-cluster",) if force_new_cluster else ()))
            if force_new_cluster:
                await self._wait_alone()
            if not begun:
                write_private(self._folder / BEGUN, b"")
        except BaseException:
            await self.stop()
            raise

    def _arguments(self, path: str, peers: Mapping[str, str]) -> list[str]:
        known = peers or {self._node_id: self.peer_url}
        client = f"unix://{SOCKET}"
        identity, roots = (f"/proc/self/fd/{fd}" for fd in self._in_memory())
        return [
            *(path, "--name", self._node_id, "--data-dir", "data"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", f"https://{self._listen}"),
            *("--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", ",".join(f"{name}={url}" for name, url in known.items())),
            *("--initial-cluster-state", "existing" if peers else "new"),
            *("--peer-cert-file", identity, "--peer-key-file", identity),
            *("--peer-trusted-ca-file", roots, "--peer-client-cert-auth"),
            *("--peer-cert-allowed-hostname", tls.SERVER_NAME),
            "--experimental-peer-skip-client-san-verification",
            *("--heartbeat-interval", str(HEARTBEAT_MS), "--election-timeout", str(ELECTION_MS)),
            *("--max-txn-ops", str(TXN_OPS_MAX), "--max-request-bytes", str(REQUEST_BYTES_MAX)),
            *("--snapshot-count", str(SNAPSHOT_ENTRIES)),
            # Clients ping every 5 s, which by default etcd takes for a flood.
            *("--grpc-keepalive-min-time", "2s"),
            # Output reads it: "info" holds the line that says that it serves.
            *("--logger", "zap", "--log-level", "info", "--log-outputs", "stderr"),
        ]

    def _check_listen_host(self) -> None:
        try:
            ipaddress.ip_address(self._listen_host)
        except ValueError:
            raise errors.Invalid(
                f"etcd listens on an address, not on a name: {self._listen_host!r}; give "
                "--listen-addr with an IP address, or 0.0.0.0"
            ) from None

    async def run(self) -> None:
        """Sees to it that the process runs, until cancelled or stopped. Raises Removed."""
        loop = asyncio.get_running_loop()
        delay_s = RESTART_S_MIN
        while True:
            begun_s = loop.time()
            code = await self._ended()
            if self._stopping:
                return
            self._refuse_removed()
            if loop.time() - begun_s > RESTART_S_MAX:
                delay_s = RESTART_S_MIN
            if self._restarting:
                self._restarting = False
                self.problem = "etcd is being restarted"
                self.problem = await self._revive()
            else:
                self.problem = self._obituary(code)
            while self.problem:
                log.error("etcd_ended", reason=self.problem, restart_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(RESTART_S_MAX, delay_s * 2)
                if self._stopping:
                    return
                self.problem = await self._revive()

    async def _revive(self) -> str:
        """Why it does not run again; empty: it does. Raises Removed."""
        try:
            await self._launch()
        except Removed:
            raise
        except (OSError, errors.SwarmError) as error:
            return f"etcd cannot be started: {error}"
        return ""

    async def restart(self) -> None:
        """Ends the process; `run` starts it again with what has changed."""
        if self.pid is not None:
            self._restarting = True
            await self._end()

    async def stop(self) -> None:
        """Ends the process in order; what it holds stays on its disk. May be repeated."""
        self._stopping = True
        async with self._spawning:
            await self._end()
        if self._memory is not None:
            for fd in self._memory:
                os.close(fd)
            self._memory = None

    # -------------------------------------------------------------- certificates

    def use_certificate(self, *, key_pem: str, certificate_pem: str, root_ca_pem: str) -> bool:
        """What etcd proves itself with from the next handshake on. True: the roots, which it reads
        at its start only, are not those that it has read; it needs a restart.
        """
        # One file for both: a handshake in between would find a key that fits no certificate.
        self._identity = f"{certificate_pem.rstrip()}\n{key_pem.rstrip()}\n".encode()
        self._roots = root_ca_pem.encode()
        if self._memory is not None:
            self._write_memory(self._memory)
        return self._roots_read is not None and self._roots != self._roots_read

    def _in_memory(self) -> tuple[int, int]:
        """The descriptors of what etcd reads, filled."""
        if self._memory is None:
            self._memory = (os.memfd_create("identity"), os.memfd_create("roots"))
        self._write_memory(self._memory)
        return self._memory

    def _write_memory(self, memory: tuple[int, int]) -> None:
        for fd, data in zip(memory, (self._identity, self._roots), strict=True):
            os.pwrite(fd, data, 0)
            os.ftruncate(fd, len(data))

    # -------------------------------------------------------------- the process

    async def _launch(self, *more: str) -> None:
        """Starts the process, and waits until it serves. Raises Corrupt, Removed, Unavailable;
        nothing runs then.
        """
        begun = self.initialized
        await self._spawn(*more)
        try:
            await self._wait_serving(begun=begun)
        except BaseException:
            await self._end()
            raise

    async def _spawn(self, *more: str) -> None:
        async with self._spawning:
            if self._stopping:
                raise errors.Unavailable("etcd is being stopped")
            (self._folder / SOCKET).unlink(missing_ok=True)
            self._output = Output(self._folder / "etcd.log")
            self._roots_read = self._roots
            process = await asyncio.create_subprocess_exec(
                # It ends with swarmd, however that ends: no member without its manager.
                *("setpriv", "--pdeathsig", "KILL", *self._command, *more),
                *("--quota-backend-bytes", str(self._quota())),
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=self._in_memory(),
                start_new_session=True,  # a terminal's Ctrl-C is swarmd's to handle
            )
            assert process.stderr is not None
            self._process = process
            self._following = asyncio.create_task(self._output.follow(process.stderr))

    def _quota(self) -> int:
        """A state that has grown to the quota could not even be made smaller: each start leaves it
        some room.
        """
        database = self._data / "member" / "snap" / "db"
        size = database.stat().st_size if database.exists() else 0
        return max(self._quota_bytes, size + size // 10)

    async def _ended(self) -> int:
        """The process's status, when it has ended and said all it had to say."""
        assert self._process is not None and self._following is not None
        code = await self._process.wait()
        await asyncio.shield(self._following)
        return code

    async def _end(self) -> None:
        """Asks the process to end, and kills it when it does not."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        await self._ended()

    async def _wait_serving(self, *, begun: bool) -> None:
        ended = asyncio.ensure_future(self._ended())
        serving = asyncio.ensure_future(self._output.serving.wait())
        try:
            await asyncio.wait(
                {ended, serving}, timeout=READY_S, return_when=asyncio.FIRST_COMPLETED
            )
            if ended.done():
                self._refuse_removed()
                self._refuse_damage(ended.result(), begun=begun)
                raise errors.Unavailable(self._obituary(ended.result()))
            if not serving.done():
                raise errors.Unavailable(
                    f"etcd does not serve {READY_S:g} s after its start; its log is "
                    f"{self._folder / 'etcd.log'}"
                )
        finally:
            ended.cancel()
            serving.cancel()
            await asyncio.gather(ended, serving, return_exceptions=True)

    async def _wait_alone(self) -> None:
        """Until it leads itself: what makes it the only member is agreed on by then."""
        client = EtcdClient([self.endpoint])
        try:
            async with asyncio.timeout(READY_S):
                while self.pid is not None:
                    with contextlib.suppress(errors.Unavailable):
                        await client.range(pb.RangeRequest(key=b"\0", keys_only=True))
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise errors.Unavailable(
                f"etcd does not lead itself {READY_S:g} s after it was forced to; its log is "
                f"{self._folder / 'etcd.log'}"
            ) from None
        finally:
            await client.close()
        raise errors.Unavailable(self._obituary(await self._ended()))

    def _refuse_removed(self) -> None:
        if self._output.removed:
            raise Removed("the other managers have removed this one's etcd member")

    def _refuse_damage(self, code: int, *, begun: bool) -> None:
        words = self._output.last_words
        file = etcd_damage.damaged_file(self._data, code, words) if begun else None
        if file is not None:
            raise Corrupt(f"{file} is damaged; etcd says: {words}; {etcd_damage.WHAT_TO_DO}")

    def _obituary(self, code: int) -> str:
        """Why the process ended, for people."""
        if code < 0:
            return f"etcd was killed by signal {-code} ({signal.strsignal(-code)})"
        words = self._output.last_words
        if "no space left on device" in words:
            words += f"; make room on the file system of {self._folder}"
        return f"etcd ended with status {code}: {words}"
