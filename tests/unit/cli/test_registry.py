"""Credentials as `docker login` leaves them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from cli.registry import HUB, auth_for, registry_of
from swarm.errors import Invalid

AUTH = base64.b64encode(b"me:pass:word").decode()


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        ("nginx", HUB),
        ("library/nginx:1", HUB),
        ("docker.io/library/nginx", HUB),
        ("reg.example/a/b:1", "reg.example"),
        ("reg.example:5000/a@sha256:00", "reg.example:5000"),
        ("localhost/a", "localhost"),
        ("localhost:5000/a", "localhost:5000"),
    ],
)
def test_the_registry_of_an_image(image: str, registry: str) -> None:
    assert registry_of(image) == registry


def decoded(image: str, config: object, folder: Path, **environment: str) -> object:
    (folder / "config.json").write_text(json.dumps(config))
    text = auth_for(image, {"DOCKER_CONFIG": str(folder), **environment})
    return json.loads(base64.urlsafe_b64decode(text)) if text else None


def test_a_password_of_the_file_goes_to_its_registry_only(tmp_path: Path) -> None:
    config = {"auths": {"https://reg.example": {"auth": AUTH}}}
    found = decoded("reg.example/a", config, tmp_path)
    assert found == {"serveraddress": "reg.example", "username": "me", "password": "pass:word"}
    assert decoded("other.example/a", config, tmp_path) is None
    assert decoded("nginx", config, tmp_path) is None


def test_identity_tokens_and_plain_entries(tmp_path: Path) -> None:
    config = {
        "auths": {HUB: {"identitytoken": "t"}, "r.example": {"username": "u", "password": "p"}}
    }
    assert decoded("nginx", config, tmp_path) == {"serveraddress": HUB, "identitytoken": "t"}
    assert decoded("r.example/a", config, tmp_path) == {
        "serveraddress": "r.example",
        "username": "u",
        "password": "p",
    }


def test_without_a_file_there_are_none(tmp_path: Path) -> None:
    assert auth_for("nginx", {"HOME": str(tmp_path)}) == ""


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": {"r.example": {"auth": "%%"}}}'])
def test_a_damaged_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Invalid, match=r"config\.json"):
        auth_for("r.example/a", {"DOCKER_CONFIG": str(tmp_path)})


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            'read r; echo \'{"Username": "\'$r\'", "Secret": "s"}\'',
            {"username": "r.example", "password": "s"},
        ),
        ('echo \'{"Username": "<token>", "Secret": "s"}\'', {"identitytoken": "s"}),
        ("echo credentials not found in native keychain; exit 1", None),
    ],
)
def test_credential_helpers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: dict[str, str] | None
) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text(f"#!/bin/sh\n{script}\n")
    helper.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    config = {"credHelpers": {"r.example": "test"}}
    found = decoded("r.example/a", config, tmp_path)
    assert found == (None if expected is None else {"serveraddress": "r.example", **expected})


def test_a_helper_that_fails_or_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Invalid, match="docker-credential-nope is not installed"):
        decoded("a", {"credsStore": "nope"}, tmp_path)
    for number, script in enumerate(("echo locked; exit 1", "echo no json")):
        helper = tmp_path / f"docker-credential-bad{number}"
        helper.write_text(f"#!/bin/sh\n{script}\n")
        helper.chmod(0o700)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        with pytest.raises(Invalid, match="docker-credential-bad"):
            decoded("a", {"credsStore": f"bad{number}"}, tmp_path)
