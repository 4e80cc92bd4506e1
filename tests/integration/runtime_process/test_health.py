"""Healthchecks of host processes as they are run: what hangs, what is left behind, what is told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from agent.runtime.base import EventKind, Phase
from swarm.v1 import ContainerSpec, HealthConfig
from tests.integration.runtime_process.conftest import Harness, until, work

SECOND = 1_000_000_000


@pytest.fixture(params=["plain", "isolated"])
def held(request: pytest.FixtureRequest) -> Harness:
    """With and without namespaces."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Harness)
    return found


def checked(*test: str, **fields: int) -> ContainerSpec:
    times = {"interval_ns": SECOND // 20, "timeout_ns": 20 * SECOND, "retries": 1}
    return ContainerSpec(healthcheck=HealthConfig(test=test, **{**times, **fields}))


def processes(mark: str) -> list[int]:
    """The processes whose command line holds the mark."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if mark.encode() in line.split(b"\0"):
                found.append(int(name))
    return found


async def test_a_check_that_hangs_is_ended_with_all_it_has_started(held: Harness) -> None:
    """Also what left its group, and what left its parent."""
    # Three numbers of seconds that nobody else sleeps, so that the processes are told by them.
    own, group, orphan = (f"{9000 + n}.{os.getpid()}" for n in range(3))
    script = f"setsid sleep {group} & (setsid sleep {orphan} &); echo waiting; sleep {own}"
    spec = checked("CMD-SHELL", script, timeout_ns=2 * SECOND, interval_ns=SECOND // 10)
    job = work("sleep", "1000", container=spec)
    await held.run(job)
    await until(lambda: all(processes(m) for m in (own, group, orphan)))
    event = await held.event()
    assert event.kind is EventKind.UNHEALTHY
    assert event.message == "1 check failed: healthcheck took longer than 2 s: waiting"
    await held.runtime.stop(job.task_id, signal="KILL", grace_s=1)
    assert [processes(m) for m in (own, group, orphan)] == [[], [], []]


async def test_a_check_counts_when_it_ends_and_not_when_what_it_left_lets_go(
    held: Harness,
) -> None:
    spec = checked("CMD-SHELL", "echo fine; sleep 30 &")
    await held.run(work("sleep", "1000", container=spec))
    assert (await held.event()).kind is EventKind.HEALTHY


async def test_no_check_is_made_for_none_and_the_task_is_healthy_at_once(held: Harness) -> None:
    started = await held.run(work("sleep", "1000", container=checked("NONE")))
    assert started.healthy


async def test_a_program_that_is_missing_fails_the_check_with_its_name(held: Harness) -> None:
    await held.run(work("sleep", "1000", container=checked("CMD", "no-such-check", retries=3)))
    event = await held.event()
    assert event.kind is EventKind.UNHEALTHY
    assert event.message.startswith("3 checks failed: No such file or directory: ")
    assert event.message.endswith("no-such-check")


async def test_failures_in_the_start_period_do_not_end_a_slow_starter(held: Harness) -> None:
    spec = checked(
        "CMD-SHELL",
        "echo x >>tries; test $(wc -l <tries) -gt 4",
        start_period_ns=60 * SECOND,
        start_interval_ns=SECOND // 20,
        interval_ns=60 * SECOND,
    )
    await held.run(work("sleep", "1000", container=spec))
    assert (await held.event()).kind is EventKind.HEALTHY


async def test_that_a_task_is_unhealthy_is_told_again_to_the_next_agent(held: Harness) -> None:
    """The first one may have ended before it could stop the task."""
    job = work("sleep", "1000", container=checked("CMD-SHELL", "echo no; false"))
    await held.run(job)
    first = await held.event()
    await held.restart()
    (found,) = await held.runtime.adopt()
    assert found.phase is Phase.RUNNING
    async with asyncio.timeout(5):
        again = await anext(held.runtime.events())
    assert (again.kind, again.message) == (first.kind, first.message)
    assert again.message == "1 check failed: no"
