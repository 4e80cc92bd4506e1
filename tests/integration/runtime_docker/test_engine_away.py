"""The engine restarts, dies or hangs while tasks run; no end is lost, nothing waits for ever."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from agent.runtime.base import EventKind, Phase
from deploy.testbed import Bed, Host
from deploy.testbed.images import provide
from swarm import errors
from swarm.ids import new_id, system_rng
from tests.integration.runtime_docker.conftest import Harness

pytestmark = [pytest.mark.docker, pytest.mark.root]
ENDS_ON_TERM = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done")
# A host of its own: other tests must not see their engine go away.
HOST = 4


@pytest.fixture(scope="module")
def away_host(bed: Bed) -> Host:
    host = bed.host(HOST)
    host.start_docker()
    provide(host)
    return host


@pytest.fixture
async def node(away_host: Host) -> AsyncIterator[Harness]:
    if not away_host.alive("dockerd"):
        away_host.start_docker()
    harness = Harness(away_host, new_id(system_rng()))
    await harness.open()
    yield harness
    if not away_host.alive("dockerd"):
        away_host.start_docker()
    await harness.clean()


async def test_a_short_restart_is_bridged_and_ends_are_told(node: Harness) -> None:
    work, _ = await node.run(*ENDS_ON_TERM)
    await asyncio.to_thread(node.host.stop, "dockerd")
    await asyncio.to_thread(node.host.start_docker)
    await node.event(work, EventKind.EXITED)
    # The same stream goes on with what comes after.
    later, _ = await node.run("sh", "-c", "exit 4")
    assert (await node.event(later, EventKind.EXITED)).exit_code == 4
    assert node.events_of(work) == [EventKind.EXITED]


async def test_an_engine_that_stays_away_ends_the_events_and_adoption_goes_on(
    node: Harness,
) -> None:
    work, _ = await node.run(*ENDS_ON_TERM)
    node.host.kill("dockerd")
    reason = await node.listened()
    assert isinstance(reason, errors.Unavailable)
    assert str(node.host.docker_socket) in reason.message
    with pytest.raises(errors.Unavailable):
        await node.runtime.connect()
    await asyncio.to_thread(node.host.start_docker)
    await node.runtime.connect()
    (found,) = await node.runtime.adopt()
    assert found.task_id == work.task_id
    assert found.phase is Phase.EXITED
    node.listen()
    later, _ = await node.run("sh", "-c", "exit 4")
    assert (await node.event(later, EventKind.EXITED)).exit_code == 4
    assert node.events_of(work) == []


async def test_a_hung_engine_is_named_and_not_waited_for(node: Harness) -> None:
    node.host.kill("dockerd", signal.SIGSTOP)
    try:
        with pytest.raises(errors.TimedOut, match=r"docker\.sock did not answer GET /info"):
            await node.runtime._engine.call("info", "GET", "info", timeout_s=0.3)
    finally:
        node.host.kill("dockerd", signal.SIGCONT)
    await node.runtime.connect()
