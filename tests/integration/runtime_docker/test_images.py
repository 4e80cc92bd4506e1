"""Pulls from a real registry: by tag, by digest, with credentials, and when it is away."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from agent.runtime.base import Failed, Rejected, Work
from deploy.testbed import BASE, WEB, Bed, Registry
from deploy.testbed.registry import PASSWORD, USER
from swarm.v1 import ContainerSpec
from tests.integration.runtime_docker.conftest import Harness

pytestmark = [pytest.mark.docker, pytest.mark.root]
# A registry behind an address that swallows packets: the engine itself waits 15 s for it.
BLACK_HOLE = "10.255.255.1:5000"


@pytest.fixture(scope="module")
def registry(bed: Bed) -> Iterator[Registry]:
    made = Registry(bed.docker_hosts(1)[0])
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def locked(bed: Bed) -> Iterator[Registry]:
    made = Registry(bed.docker_hosts(1)[0], port=5001, password=True)
    made.start()
    yield made
    made.stop()


def auth(user: str, password: str, registry: Registry) -> str:
    said = {"username": user, "password": password, "serveraddress": registry.address}
    return base64.b64encode(json.dumps(said).encode()).decode()


async def run(docker: Harness, image: str, *, policy: str = "", auth: str = "") -> str:
    """Starts a task of the image; the id of the image that it runs."""
    work = docker.work("sleep", "100", container=ContainerSpec(image=image), auth=auth)
    container = ContainerSpec(image=image, args=("sleep", "100"), pull_policy=policy)
    spec = work.assignment.spec
    assert spec is not None
    work = Work(replace(work.assignment, spec=replace(spec, container=container)))
    await docker.start(work)
    return str(docker.inspect(work)["Image"])


def image_id(docker: Harness, name: str) -> str:
    return docker.host.docker("image", "inspect", "-f", "{{.Id}}", name).strip()


async def test_an_image_is_pulled_by_tag_and_by_digest(docker: Harness, registry: Registry) -> None:
    digest = registry.push(docker.host, BASE, ["base:1"])
    wanted = image_id(docker, BASE)
    assert await run(docker, f"{registry.address}/base:1") == wanted
    assert await run(docker, f"{registry.address}/base@{digest}") == wanted
    assert await run(docker, f"{registry.address}/base:1@{digest}") == wanted


async def test_latest_follows_the_registry_and_a_plain_tag_does_not(
    docker: Harness, registry: Registry
) -> None:
    names = ["moving:latest", "moving:fixed"]
    registry.push(docker.host, BASE, names)
    for name in names:
        assert await run(docker, f"{registry.address}/{name}") == image_id(docker, BASE)
    for name in names:  # the registry has another image now, the engine still the old one
        docker.host.docker("tag", f"{registry.address}/{name}", f"kept:{name.partition(':')[2]}")
    registry.push(docker.host, WEB, names)
    for name in names:
        kept = f"kept:{name.partition(':')[2]}"
        docker.host.docker("tag", kept, f"{registry.address}/{name}")
    fresh = await docker.restart()  # a new agent has no recent pull to go by
    await fresh.adopt()
    assert await run(docker, f"{registry.address}/moving:latest") == image_id(docker, WEB)
    assert await run(docker, f"{registry.address}/moving:fixed") == image_id(docker, BASE)
    assert await run(docker, f"{registry.address}/moving:fixed", policy="always") == image_id(
        docker, WEB
    )


async def test_credentials_open_a_locked_registry(docker: Harness, locked: Registry) -> None:
    locked.login(docker.host)
    try:
        locked.push(docker.host, BASE, ["private:1"])
    finally:
        locked.logout(docker.host)
    image = f"{locked.address}/private:1"
    with pytest.raises(Rejected, match="no basic auth credentials") as caught:
        await run(docker, image)
    assert caught.value.cause == "image_denied"
    with pytest.raises(Rejected, match="cannot be pulled") as caught:
        await run(docker, image, auth=auth(USER, "wrong", locked))
    assert caught.value.cause == "image_denied"
    missing = f"{locked.address}/private:2"
    with pytest.raises(Rejected, match="cannot be pulled") as caught:
        await run(docker, missing, auth=auth(USER, PASSWORD, locked))
    assert caught.value.cause == "image_missing"
    assert await run(docker, image, auth=auth(USER, PASSWORD, locked)) == image_id(docker, BASE)


async def test_tasks_that_come_together_share_one_pull(docker: Harness, registry: Registry) -> None:
    registry.push(docker.host, BASE, ["shared:latest"])
    image = f"{registry.address}/shared:latest"
    began = time.time()  # the engine's clock is the machine's
    await asyncio.gather(*(run(docker, image) for _ in range(4)))
    pulls = docker.host.docker(
        *("events", "--since", f"{began - 1:.3f}", "--until", f"{time.time() + 1:.3f}"),
        *("--filter", "event=pull", "--format", "{{.Actor.ID}}"),
    ).split()
    assert pulls.count(image) == 1


async def test_what_no_registry_has_is_rejected_with_its_name(
    docker: Harness, registry: Registry
) -> None:
    image = f"{registry.address}/nothing:1"
    with pytest.raises(Rejected, match=f"{image}.*(not found|unknown)") as caught:
        await run(docker, image)
    assert caught.value.cause == "image_missing"
    registry.push(docker.host, BASE, ["something:1"])
    with pytest.raises(Rejected, match="cannot be pulled") as caught:
        await run(docker, f"{registry.address}/something:2")
    assert caught.value.cause == "image_missing"
    with pytest.raises(Rejected, match="pull_policy is never") as caught:
        await run(docker, image, policy="never")
    assert caught.value.cause == "unsupported"


async def test_a_command_that_the_image_lacks_is_a_cause_of_its_own(docker: Harness) -> None:
    for command in ("no-such-program", "/no/such/program"):
        work = docker.work(command, container=ContainerSpec(image=BASE))
        with pytest.raises(Rejected) as caught:
            await docker.start(work)
        assert caught.value.cause == "program_missing", caught.value.message


async def test_a_local_image_is_enough_when_the_registry_is_away(docker: Harness) -> None:
    image = f"{BLACK_HOLE}/app:latest"
    docker.host.docker("tag", BASE, image)
    began = time.monotonic()
    assert await run(docker, image) == image_id(docker, BASE)
    first = time.monotonic() - began
    assert first < 8, "one wait for the registry's first word"
    began = time.monotonic()
    await asyncio.gather(*(run(docker, image) for _ in range(3)))
    assert time.monotonic() - began < 3, "a registry that was just away is not asked again"


async def test_without_a_policy_a_local_tag_is_never_asked_for(docker: Harness) -> None:
    image = f"{BLACK_HOLE}/app:1"
    docker.host.docker("tag", BASE, image)
    began = time.monotonic()
    await run(docker, image)
    await run(docker, image, policy="never")
    assert time.monotonic() - began < 3


async def test_always_means_it(docker: Harness) -> None:
    """Names resolve to nothing on a test host, so the public registry fails at once."""
    with pytest.raises(Failed, match=r"docker\.io cannot be reached"):
        await run(docker, BASE, policy="always")
    with pytest.raises(Failed, match=r"docker\.io cannot be reached"):
        await run(docker, "no-such-image-here:1")


@pytest.fixture
def plain(docker: Harness) -> Iterator[str]:
    """Something that answers without TLS where the engine wants it."""
    docker.host.run("ip", "addr", "add", "10.99.0.1/32", "dev", "lo")
    docker.host.spawn("plain", sys.executable, "-m", "http.server", "5002", "-b", "10.99.0.1")
    yield "10.99.0.1:5002"
    docker.host.stop("plain")
    docker.host.run("ip", "addr", "del", "10.99.0.1/32", "dev", "lo")


@pytest.mark.parametrize("why", ["refused", "no name", "silent", "no tls"])
async def test_a_registry_that_cannot_be_reached_is_a_cause_of_its_own(
    docker: Harness, plain: str, why: str
) -> None:
    registry = {
        "refused": f"{docker.host.address}:5999",
        "no name": "no-such-registry.example:5000",
        "silent": BLACK_HOLE,
        "no tls": plain,
    }[why]
    with pytest.raises(Failed, match=f"registry {registry} cannot be reached") as caught:
        await run(docker, f"{registry}/app:1")
    assert caught.value.cause == "image_unreachable"
