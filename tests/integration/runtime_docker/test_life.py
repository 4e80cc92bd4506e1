"""A task's life on a real engine: start, events, stop, adoption, removal."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.runtime.base import EventKind, Failed, Phase, Rejected, TaskFile
from agent.runtime.docker import DockerRuntime
from swarm import errors
from swarm.clock import SystemClock
from swarm.v1 import ContainerSpec, HealthConfig, Mount, ResourceRequirements, Resources, TaskSpec
from tests.fakes.waiting import until
from tests.integration.runtime_docker.conftest import Harness

pytestmark = [pytest.mark.docker, pytest.mark.root]
SECOND_NS = 1_000_000_000
MIB = 1 << 20
IGNORES_TERM = ("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
NOTES_SIGNAL = ("sh", "-c", "trap 'exit 42' INT; trap 'exit 43' TERM; while :; do sleep 0.05; done")


async def test_a_started_task_has_address_and_pid_and_its_end_is_told(docker: Harness) -> None:
    work, started = await docker.run("sh", "-c", "sleep 0.5; exit 3")
    assert started.container.pid > 0
    assert started.address.startswith("172.")
    assert started.healthy
    event = await docker.event(work, EventKind.EXITED)
    assert (event.exit_code, event.message) == (3, "")


async def test_a_task_that_ends_at_once_is_started_and_then_ended(docker: Harness) -> None:
    works = [docker.work("true") for _ in range(4)]
    await asyncio.gather(*(docker.start(work) for work in works))
    for work in works:
        assert (await docker.event(work, EventKind.EXITED)).exit_code == 0
    assert [docker.events_of(work) for work in works] == [[EventKind.EXITED]] * 4


async def test_a_second_start_returns_the_same(docker: Harness) -> None:
    work, started = await docker.run("sleep", "100")
    assert await docker.runtime.start(work) == started


async def test_prepare_may_be_called_again(docker: Harness) -> None:
    work = docker.work("sleep", "100")
    await docker.runtime.prepare(work)
    await docker.runtime.prepare(work)
    assert (await docker.runtime.start(work)).container.pid > 0


async def test_a_name_that_another_container_has_is_refused(docker: Harness) -> None:
    work = docker.work("sleep", "100")
    docker.host.docker("create", "--name", work.assignment.name, "busybox")
    try:
        with pytest.raises(Rejected, match="another container"):
            await docker.runtime.prepare(work)
    finally:
        docker.host.docker("rm", work.assignment.name)


async def test_a_command_that_does_not_exist_is_rejected(docker: Harness) -> None:
    work = docker.work("/no/such/thing")
    await docker.runtime.prepare(work)
    with pytest.raises((Rejected, Failed), match="/no/such/thing"):
        await docker.runtime.start(work)
    assert docker.events_of(work) == []
    await docker.runtime.remove(work.task_id)


@pytest.mark.parametrize(
    ("container", "reason"),
    [
        (ContainerSpec(stop_signal="SIGNOPE"), "SIGNOPE"),
        (ContainerSpec(capability_add=("CAP_NOPE",)), "CAP_NOPE"),
        (ContainerSpec(shm_size_bytes=-5), "-5|SHM|shm"),
        (ContainerSpec(sysctls={"kernel.nope": "1"}), "kernel.nope"),
    ],
    ids=["signal", "capability", "shm", "sysctl"],
)
async def test_what_the_engine_refuses_is_told_in_its_words(
    docker: Harness, container: ContainerSpec, reason: str
) -> None:
    work = docker.work("sleep", "100", container=container)
    with pytest.raises((Rejected, Failed), match=reason):
        await docker.start(work)


# ------------------------------------------------------------------ stop


async def test_stop_sends_the_signal_and_gives_the_exit_code(docker: Harness) -> None:
    work, _ = await docker.run(*NOTES_SIGNAL)
    assert await docker.runtime.stop(work.task_id, signal="SIGINT", grace_s=20) == 42
    assert await docker.runtime.stop(work.task_id, signal="SIGINT", grace_s=20) == 42
    assert docker.events_of(work) == []


async def test_stop_without_a_signal_sends_the_containers_own(docker: Harness) -> None:
    work, _ = await docker.run(*NOTES_SIGNAL, container=ContainerSpec(stop_signal="SIGINT"))
    assert await docker.runtime.stop(work.task_id, signal="", grace_s=20) == 42
    other, _ = await docker.run(*NOTES_SIGNAL)
    assert await docker.runtime.stop(other.task_id, signal="", grace_s=20) == 43


async def test_after_the_grace_period_the_task_is_killed(docker: Harness) -> None:
    work, _ = await docker.run(*IGNORES_TERM)
    began = time.monotonic()
    assert await docker.runtime.stop(work.task_id, signal="SIGTERM", grace_s=0.5) == 137
    assert 0.5 <= time.monotonic() - began < 10


async def test_stopping_what_never_ran_or_is_gone_gives_no_code(docker: Harness) -> None:
    work = docker.work("sleep", "100")
    assert await docker.runtime.stop(work.task_id, signal="", grace_s=1) is None
    await docker.runtime.prepare(work)
    assert await docker.runtime.stop(work.task_id, signal="", grace_s=1) is None
    await docker.runtime.remove(work.task_id)
    await docker.runtime.remove(work.task_id)
    assert await docker.runtime.stop(work.task_id, signal="", grace_s=1) is None


async def test_the_end_of_a_task_before_its_stop_keeps_its_code(docker: Harness) -> None:
    work, _ = await docker.run("sh", "-c", "exit 5")
    await docker.event(work, EventKind.EXITED)
    assert await docker.runtime.stop(work.task_id, signal="", grace_s=1) == 5


async def test_remove_takes_a_running_task_and_its_anonymous_volumes(docker: Harness) -> None:
    container = ContainerSpec(mounts=(Mount(type="volume", target="/data"),))
    work, _ = await docker.run("sleep", "100", container=container)
    volume = docker.inspect(work)["Mounts"][0]["Name"]
    assert volume in docker.host.docker("volume", "ls", "-q")
    await docker.runtime.remove(work.task_id)
    assert volume not in docker.host.docker("volume", "ls", "-q")
    assert docker.events_of(work) == []


# ------------------------------------------------------------------ why it ended


async def test_out_of_memory_is_told_with_the_limit(docker: Harness) -> None:
    spec = TaskSpec(resources=ResourceRequirements(limits=Resources(memory_bytes=16 * MIB)))
    container = ContainerSpec(memory_swap_bytes=16 * MIB)
    # tail keeps the last line, and /dev/zero has only one.
    work, _ = await docker.run("tail", "/dev/zero", spec=spec, container=container)
    event = await docker.event(work, EventKind.EXITED)
    assert event.exit_code == 137
    assert event.message == "out of memory: more than its limit of 16 MiB"


async def test_a_container_killed_or_removed_by_hand_is_told(docker: Harness) -> None:
    killed, _ = await docker.run("sleep", "100")
    removed, _ = await docker.run("sleep", "100")
    docker.host.docker("kill", killed.assignment.name)
    docker.host.docker("rm", "-f", removed.assignment.name)
    assert (await docker.event(killed, EventKind.EXITED)).exit_code == 137
    assert (await docker.event(removed, EventKind.EXITED)).exit_code in (137, 255)


# ------------------------------------------------------------------ health


def health(test: str) -> ContainerSpec:
    return ContainerSpec(
        healthcheck=HealthConfig(
            test=("CMD-SHELL", test),
            interval_ns=SECOND_NS // 5,
            timeout_ns=5 * SECOND_NS,
            retries=2,
        )
    )


async def test_health_becomes_good_and_bad_again(docker: Harness) -> None:
    check = "test ! -e /tmp/bad || { echo broken; exit 1; }"
    work, started = await docker.run("sleep", "100", container=health(check))
    assert not started.healthy
    await docker.event(work, EventKind.HEALTHY)
    await docker.inside(work, "touch", "/tmp/bad")
    event = await docker.event(work, EventKind.UNHEALTHY)
    assert re.fullmatch(r"[2-9] checks failed: broken", event.message)
    assert docker.events_of(work) == [EventKind.HEALTHY, EventKind.UNHEALTHY]


async def test_a_check_of_none_is_no_check(docker: Harness) -> None:
    container = ContainerSpec(healthcheck=HealthConfig(test=("NONE",)))
    _, started = await docker.run("sleep", "100", container=container)
    assert started.healthy


@pytest.fixture
def checked_image(docker: Harness) -> Iterator[str]:
    """An image with a check of its own, which fails once an hour."""
    container = docker.host.docker("create", "busybox:latest", "true").strip()
    change = "HEALTHCHECK --interval=1h --retries=1 CMD echo own check; false"
    docker.host.docker("commit", "--change", change, container, "checked:1")
    docker.host.docker("rm", container)
    yield "checked:1"
    docker.host.docker("rmi", "-f", "checked:1")


async def test_the_images_own_check_runs_at_the_times_asked_for(
    docker: Harness, checked_image: str
) -> None:
    health = HealthConfig(interval_ns=SECOND_NS // 5, retries=1)
    container = ContainerSpec(image=checked_image, healthcheck=health)
    work, started = await docker.run("sleep", "100", container=container)
    assert not started.healthy
    event = await docker.event(work, EventKind.UNHEALTHY)
    assert re.fullmatch(r"\d+ checks? failed: own check", event.message)


async def test_none_turns_the_images_own_check_off(docker: Harness, checked_image: str) -> None:
    health = HealthConfig(test=("NONE",))
    container = ContainerSpec(image=checked_image, healthcheck=health)
    _, started = await docker.run("sleep", "100", container=container)
    assert started.healthy


async def test_the_first_checks_come_each_start_interval_if_the_engine_can(
    docker: Harness,
) -> None:
    """One that cannot checks every interval from the beginning, and the task says so."""
    old = docker.runtime._facts.api < (1, 44)
    health = HealthConfig(
        test=("CMD-SHELL", "echo x >>/tries; test $(wc -l </tries) -gt 3"),
        interval_ns=SECOND_NS // 2 if old else 3600 * SECOND_NS,
        start_period_ns=600 * SECOND_NS,
        start_interval_ns=SECOND_NS // 5,
        timeout_ns=5 * SECOND_NS,
        retries=1,
    )
    work, started = await docker.run("sleep", "100", container=ContainerSpec(healthcheck=health))
    assert not started.healthy
    assert ("start_interval has no effect" in started.note) is old
    await docker.event(work, EventKind.HEALTHY)
    assert docker.events_of(work) == [EventKind.HEALTHY]


async def test_a_check_that_hangs_is_told_with_its_limit(docker: Harness) -> None:
    health = HealthConfig(
        test=("CMD", "sleep", "100"), interval_ns=SECOND_NS // 5, timeout_ns=SECOND_NS, retries=1
    )
    work, _ = await docker.run("sleep", "100", container=ContainerSpec(healthcheck=health))
    event = await docker.event(work, EventKind.UNHEALTHY)
    assert re.search(r"1 check failed: .*exceeded timeout \(1s\)", event.message)


# ------------------------------------------------------------------ adoption


async def test_a_new_agent_finds_every_task_as_it_is(docker: Harness) -> None:
    created = docker.work("sleep", "100")
    await docker.runtime.prepare(created)
    running, started = await docker.run("sleep", "100")
    ended, _ = await docker.run("sh", "-c", "exit 9")
    await docker.event(ended, EventKind.EXITED)
    runtime = await docker.restart()
    found = {f.task_id: f for f in await runtime.adopt()}
    assert set(found) == {created.task_id, running.task_id, ended.task_id}
    assert found[created.task_id].phase is Phase.CREATED
    assert found[running.task_id].phase is Phase.RUNNING
    assert found[running.task_id].started == started
    assert found[ended.task_id].phase is Phase.EXITED
    assert found[ended.task_id].exit_code == 9
    docker.listen()
    # Adopted tasks go on as if nothing had been.
    assert (await runtime.start(created)).container.pid > 0
    docker.host.docker("kill", running.assignment.name)
    assert (await docker.event(running, EventKind.EXITED)).exit_code == 137
    assert await runtime.stop(created.task_id, signal="SIGKILL", grace_s=1) == 137


async def test_only_the_nodes_own_tasks_are_found(docker: Harness) -> None:
    await docker.run("sleep", "100")
    other = Harness(docker.host, "o" * 25)
    await other.runtime.connect()
    assert await other.runtime.adopt() == ()
    await other.close()


async def test_what_ends_between_adoption_and_events_is_told(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100")
    runtime = await docker.restart()
    (found,) = await runtime.adopt()
    assert found.phase is Phase.RUNNING
    docker.host.docker("kill", work.assignment.name)
    docker.listen()
    assert (await docker.event(work, EventKind.EXITED)).exit_code == 137


async def test_health_that_changed_unheard_is_told_after_adoption(docker: Harness) -> None:
    work, _ = await docker.run("sleep", "100", container=health("test -e /tmp/good"))
    runtime = await docker.restart()
    (found,) = await runtime.adopt()
    assert found.started is not None
    assert not found.started.healthy
    docker.host.docker("exec", work.assignment.name, "touch", "/tmp/good")
    await until(
        lambda: "(healthy)" in docker.host.docker("ps", "--filter", f"name={work.assignment.name}"),
        timeout_s=20,
    )
    docker.listen()
    await docker.event(work, EventKind.HEALTHY)


# ------------------------------------------------------------------ an engine that goes away


async def test_no_engine_is_said_with_its_socket_and_what_to_do(docker: Harness) -> None:
    runtime = DockerRuntime(
        socket="/nonexistent/docker.sock", node_id="n", cluster_id="c", clock=SystemClock()
    )
    with pytest.raises(errors.Unavailable, match=r"/nonexistent/docker\.sock.*start Docker"):
        await runtime.connect()
    await runtime.close()


# ------------------------------------------------------------------ what others do to containers


async def test_a_healthcheck_that_never_passes_is_told(docker: Harness) -> None:
    work, started = await docker.run("sleep", "100", container=health("echo broken; exit 1"))
    assert not started.healthy
    event = await docker.event(work, EventKind.UNHEALTHY)
    assert re.fullmatch(r"\d+ checks failed: broken", event.message)
    assert docker.events_of(work) == [EventKind.UNHEALTHY]


async def test_a_task_that_became_unhealthy_while_the_agent_was_away_is_told(
    docker: Harness,
) -> None:
    work, _ = await docker.run("sleep", "100", container=health("echo broken; exit 1"))
    await docker.event(work, EventKind.UNHEALTHY)
    docker.heard.clear()
    await docker.restart()
    (found,) = await docker.runtime.adopt()
    assert found.phase is Phase.RUNNING and found.started is not None
    docker.listen()
    event = await docker.event(work, EventKind.UNHEALTHY)
    assert re.fullmatch(r"\d+ checks failed: broken", event.message)


async def test_an_ended_task_that_somebody_starts_again_is_ended_again(docker: Harness) -> None:
    work, _ = await docker.run("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done")
    docker.host.docker("restart", "--time", "0", work.assignment.name)
    await docker.event(work, EventKind.EXITED)

    def over() -> bool:
        state = docker.inspect(work)["State"]
        return not state["Running"] and state["StartedAt"] < state["FinishedAt"]

    await until(over, timeout_s=20, what=lambda: f"{docker.inspect(work)['State']}")
    assert docker.events_of(work) == [EventKind.EXITED]


async def test_secrets_of_an_ended_task_go_with_its_end(docker: Harness) -> None:
    secret = TaskFile("/run/secrets/key", b"x", secret=True)
    works = [(await docker.run("sleep", "100", files=(secret,)))[0] for _ in range(2)]
    folders = [Path(docker.inspect(w)["Mounts"][0]["Source"]).parent for w in works]
    assert all(folder.exists() for folder in folders)
    docker.host.docker("kill", works[0].assignment.name)
    await docker.event(works[0], EventKind.EXITED)
    assert [folder.exists() for folder in folders] == [False, True]
    await docker.close()
    docker.host.docker("kill", works[1].assignment.name)
    await docker.restart()
    await docker.runtime.adopt()
    assert not folders[1].exists()


async def test_a_prepared_task_that_somebody_starts_is_ended_again(docker: Harness) -> None:
    """So is one whose start was given up while the engine hung, and comes true later."""
    work = docker.work("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done")
    await docker.runtime.prepare(work)
    docker.host.docker("start", work.assignment.name)
    await until(lambda: not docker.inspect(work)["State"]["Running"], timeout_s=30.0)
