"""swarmd: the daemon of one node.

Owns the process: the lock on the state folder, the unix socket, signals. The node's membership is
agent/tenure.py. When swarmd ends, tasks go on; the next one adopts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import IO, Any

import structlog
import uvloop

from agent import local, metrics
from agent.changes import Changes
from agent.managing import Part
from agent.options import Options, parse
from agent.tenure import Tenure
from swarm import __version__, errors, logs, rpc
from swarm.audit import Trail
from swarm.clock import Clock, SystemClock
from swarm.ids import Rng, system_rng
from swarm.v1.services import CERTIFICATES_METHODS, CONTROL_METHODS, LOCAL_METHODS

log = structlog.get_logger("swarmd")

STOP_GRACE_S = 5.0
LOCK_WAIT_S, LOCK_RETRY_S = 3.0, 0.05
HOLD_S = 10.0  # how long a call waits for the manager to begin
FILES_MAX = 65_536  # open at a time; connections above all


class Swarmd:
    """The daemon."""

    def __init__(self, options: Options, clock: Clock, rng: Rng, *, group: int | None) -> None:
        self._options = options
        self._clock = clock
        self._rng = rng
        self._socket_group = group
        self._stop = asyncio.Event()
        self._audit = Trail(options.state_dir / "audit", clock, rng, copies=options.audit_copies)

    async def run(self) -> None:
        """Serves until asked to stop."""
        options = self._options
        options.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with _locked(options.state_dir):
            tenure = Tenure(options.settings, self._clock, self._rng, audit=self._audit)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            served = await metrics.serve(options.metrics_addr) if options.metrics_addr else None
            metrics.BUILD.info({"version": __version__})
            lag = asyncio.create_task(metrics.watch_lag())
            auditing = asyncio.create_task(self._audit.run())
            begun = asyncio.Event()
            server = await self._serve(tenure, begun)
            stopped = asyncio.create_task(self._stop.wait())
            # A manager may need long to begin, for want of others; a signal is heard all the same.
            beginning = asyncio.create_task(tenure.begin())
            beginning.add_done_callback(lambda _: begun.set())
            try:
                await asyncio.wait({beginning, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if beginning.done():
                    beginning.result()
                await stopped
                log.info("swarmd_stopping")
            finally:
                for task in (beginning, stopped, lag):
                    task.cancel()
                await server.stop(STOP_GRACE_S)
                await tenure.exit()
                auditing.cancel()
                await asyncio.gather(auditing, return_exceptions=True)
                options.socket.unlink(missing_ok=True)
                if served is not None:
                    await served.cleanup()

    async def _serve(self, tenure: Tenure, begun: asyncio.Event) -> Any:
        async def manager() -> Part:
            """Who asks while swarmd starts is answered once it has, rather than sent away."""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLD_S):
                    await begun.wait()
            return tenure.manager()

        async def control() -> Any:
            return (await manager()).control

        async def certificates() -> Any:
            return (await manager()).authority

        path = self._options.socket
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # ours: the state folder is locked
        server = rpc.server()
        changes = Changes(tenure, self._options.settings, self._clock, self._rng)
        parts = (
            (LOCAL_METHODS, local.LocalService(changes)),
            (CONTROL_METHODS, local.gate(CONTROL_METHODS, control)),
            (CERTIFICATES_METHODS, local.gate(CERTIFICATES_METHODS, certificates)),
        )
        server.add_generic_rpc_handlers(
            tuple(
                rpc.handler(methods, part, local.authorize, self._audit) for methods, part in parts
            )
        )
        before = os.umask(0o117)  # the socket is born 0660
        try:
            try:
                server.add_insecure_port(f"unix:{path}")
            except RuntimeError as error:
                raise errors.Unavailable(f"cannot listen on {path}: {error}") from None
            await server.start()
        finally:
            os.umask(before)
        if self._socket_group is not None:
            os.chown(path, -1, self._socket_group)
        return server


@contextlib.asynccontextmanager
async def _locked(state_dir: Path) -> AsyncIterator[None]:
    """Holds the state folder for this process. Raises Conflict when another swarmd has it.

    A killed swarmd holds it until the last of its threads is gone, so it is worth a short wait.
    """
    deadline_s = asyncio.get_running_loop().time() + LOCK_WAIT_S
    file: IO[str] = (state_dir / "lock").open("a+")
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if asyncio.get_running_loop().time() < deadline_s:
                    await asyncio.sleep(LOCK_RETRY_S)
                    continue
                file.seek(0)
                raise errors.Conflict(
                    f"another swarmd (pid {file.read().strip() or 'unknown'}) uses {state_dir}; "
                    "stop it, or give this one a folder of its own with --state-dir"
                ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def main(argv: Sequence[str] | None = None) -> None:
    """The command `swarmd`."""
    options, given = parse(sys.argv[1:] if argv is None else argv)
    logs.configure(level=given.log_level, form=given.log_format)
    _allow_many_files()
    try:
        group = grp.getgrnam(given.socket_group).gr_gid if given.socket_group else None
        uvloop.run(Swarmd(options, SystemClock(), system_rng(), group=group).run())
    except errors.SwarmError as error:
        sys.stderr.write(f"swarmd: {error.message}\n")
        sys.exit(errors.mapping(error).exit_code)
    except (OSError, KeyError) as error:
        sys.stderr.write(f"swarmd: {error}\n")
        sys.exit(1)


def _allow_many_files() -> None:
    """Connections are files, and the soft limit is often 1,024, for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


if __name__ == "__main__":
    main()
