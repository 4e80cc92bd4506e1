"""Carries out the healthchecks of tasks that are host processes; health.py decides.

A check is a command beside the task, in its namespaces. One that hangs is ended with everything it
has started, also what has left its process group or its parent: each check's environment carries a
mark, by which what is left of it is found again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agent.runtime.base import failed_checks
from agent.runtime.process import spawn as process_spawn
from agent.runtime.process.health import Health, Result, Schedule, pause_s, step
from swarm.clock import Clock
from swarm.ids import new_id, system_rng

OUTPUT_BYTES = 4096  # Docker's
# Output that a finished check's own children still hold open is not waited for longer than this.
DRAIN_S = 1.0
MARK = "SWARM_HEALTHCHECK"
# Looks for what is left of a check that is being ended: what forks faster than it is killed.
KILL_ROUNDS, KILL_PAUSE_S = 100, 0.02


async def watch(
    plan: Schedule,
    probe: Callable[[Schedule], Awaitable[Result]],
    report: Callable[[bool, str], None],
    clock: Clock,
    *,
    started_s: float,
    healthy: bool | None = None,
) -> None:
    """Probes until cancelled; reports each change of health with what the last check said.
    `healthy` is what was reported before the agent's restart.
    """
    health = Health(healthy=healthy, succeeded=bool(healthy))
    while True:
        await asyncio.sleep(pause_s(health, plan, age_s=clock.monotonic_s() - started_s))
        result = await probe(plan)
        after = step(health, result, plan, age_s=clock.monotonic_s() - started_s)
        if after.healthy is not None and after.healthy != health.healthy:
            report(after.healthy, failed_checks(after.failures, result.output))
        health = after


async def probe(beside: dict[str, Any], plan: Schedule) -> Result:
    """One check; `beside` is the plan of a command beside the task."""
    mark = new_id(system_rng())
    beside = {**beside, "env": {**beside["env"], MARK: mark}}
    try:
        code, output = await process_spawn.output_of(
            beside,
            plan.command,
            timeout_s=plan.timeout_s,
            bytes_max=OUTPUT_BYTES,
            drain_s=DRAIN_S,
        )
    except OSError as error:  # no process can be made just now
        return Result(False, f"healthcheck cannot be run: {error.strerror}")
    text = output.decode(errors="replace").strip()
    if code is None:
        await kill_marked(mark)
        text = f"healthcheck took longer than {plan.timeout_s:g} s: {text}".rstrip(": ")
    elif code and not text:
        text = f"the healthcheck ended with {code}"
    return Result(code == 0, text)


async def kill_marked(mark: str) -> None:
    """Kills every process whose environment carries the mark; returns when none is left."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(KILL_ROUNDS):
        if not await asyncio.to_thread(_kill_all, wanted):
            return
        await asyncio.sleep(KILL_PAUSE_S)


def _kill_all(wanted: bytes) -> int:
    """How many there were."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = [pid for pid in pids if _carries(pid, wanted)]
    for pid in found:
        _kill(pid, wanted)
    return len(found)


def _carries(pid: int, wanted: bytes) -> bool:
    """One that has ended and was not waited for has no environment."""
    try:
        return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _kill(pid: int, wanted: bytes) -> None:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            if _carries(pid, wanted):  # the pid may be another process's by now
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
