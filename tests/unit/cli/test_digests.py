"""The digest that a tag stands for, as registries answer."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.digests import Unresolved, _parse, pinned
from tests.fakes.registry import DIGEST, MANIFEST, Registry


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as found:
        yield found


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"DOCKER_CONFIG": str(tmp_path)}


def test_a_tag_is_pinned_to_its_digest(registry: Registry, environment: dict[str, str]) -> None:
    image = f"{registry.host}/team/app:1.4"
    assert pinned(image, environment) == f"{image}@{DIGEST}"


def test_an_image_with_a_digest_stays_and_nobody_is_asked(environment: dict[str, str]) -> None:
    image = f"registry.example.com/app:1@{DIGEST}"
    assert pinned(image, environment) == image


def test_a_registry_that_tells_no_digest_is_asked_for_the_manifest(
    registry: Registry, environment: dict[str, str]
) -> None:
    registry.told_digest = False
    own = hashlib.sha256(MANIFEST).hexdigest()
    assert pinned(f"{registry.host}/team/app:1.4", environment).endswith(f"@sha256:{own}")


@pytest.mark.parametrize("wants", ["basic", "bearer"])
def test_credentials_of_docker_login_are_used(
    registry: Registry, environment: dict[str, str], tmp_path: Path, wants: str
) -> None:
    registry.wants = wants
    pair = base64.b64encode(b"ada:pw").decode()
    config = {"auths": {registry.host: {"auth": pair}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pinned(f"{registry.host}/team/app:1.4", environment).endswith(DIGEST)
    assert f"Basic {pair}" in [given for _, _, given in registry.seen]


@pytest.mark.parametrize(
    ("image", "why"),
    [("{}/team/app:2.0", "answers 404"), ("{}/team/app", "answers 404")],
    ids=["no such tag", "no latest"],
)
def test_what_a_registry_does_not_have_is_said(
    registry: Registry, environment: dict[str, str], image: str, why: str
) -> None:
    with pytest.raises(Unresolved, match=why):
        pinned(image.format(registry.host), environment)


def test_a_registry_that_wants_a_password_says_so(
    registry: Registry, environment: dict[str, str]
) -> None:
    registry.wants = "basic"
    with pytest.raises(Unresolved, match="docker login"):
        pinned(f"{registry.host}/team/app:1.4", environment)


def test_nobody_there_is_no_digest(environment: dict[str, str]) -> None:
    with Registry() as registry:
        host = registry.host
    with pytest.raises(Unresolved, match=host):
        pinned(f"{host}/team/app:1.4", environment)


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("busybox", ("registry-1.docker.io", "library/busybox", "latest", "busybox:latest")),
        ("ada/app:2", ("registry-1.docker.io", "ada/app", "2", "ada/app:2")),
        (
            "docker.io/app",
            ("registry-1.docker.io", "library/app", "latest", "docker.io/app:latest"),
        ),
        ("r.io:5000/a/b", ("r.io:5000", "a/b", "latest", "r.io:5000/a/b:latest")),
        ("localhost/a:1", ("localhost", "a", "1", "localhost/a:1")),
    ],
)
def test_names_as_docker_reads_them(image: str, parts: tuple[str, str, str, str]) -> None:
    name = _parse(image)
    assert (name.host, name.path, name.tag, name.text) == parts
