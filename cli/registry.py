"""Credentials for pulling images, from the files that `docker login` writes.

Reads `$DOCKER_CONFIG/config.json` (or ~/.docker/config.json): `auths`, `credHelpers` and
`credsStore`. A helper is the program docker-credential-NAME, spoken to as Docker does: the registry
on stdin, JSON on stdout. Source: Docker CLI, config file reference and docker-credential-helpers'
protocol.
"""

from __future__ import annotations

import base64
import binascii
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarm.errors import Invalid

__all__ = ["auth_for", "registry_of"]

HUB = "https://index.docker.io/v1/"
HELPER_S = 30  # seconds a credential helper may take


def registry_of(image: str) -> str:
    """The registry an image is pulled from: "host[:port]", or Docker Hub's key."""
    first, separator, _ = image.partition("/")
    if not separator or not ("." in first or ":" in first or first == "localhost"):
        return HUB
    return HUB if first in ("docker.io", "index.docker.io") else first


def auth_for(image: str, environment: Mapping[str, str]) -> str:
    """Docker's auth JSON for the image's registry in base64url, as X-Registry-Auth has it; empty
    when there is none. Raises Invalid.
    """
    registry = registry_of(image)
    path = _config_path(environment)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise Invalid(f"{path}: cannot be read for credentials: {error}") from None
    if not isinstance(config, dict):
        raise Invalid(f"{path}: is not an object")
    helper = (config.get("credHelpers") or {}).get(registry) or config.get("credsStore")
    auth = _from_helper(str(helper), registry) if helper else None
    auth = auth or _from_file(config, registry, path)
    if auth is None:
        return ""
    return base64.urlsafe_b64encode(json.dumps(auth).encode()).decode()


def _config_path(environment: Mapping[str, str]) -> Path:
    folder = environment.get("DOCKER_CONFIG")
    home = Path(environment.get("HOME", "~")).expanduser()
    return (Path(folder) if folder else home / ".docker") / "config.json"


def _from_file(config: dict[str, Any], registry: str, path: Path) -> dict[str, str] | None:
    auths = config.get("auths") or {}
    names = (registry, f"https://{registry}", f"http://{registry}", f"https://{registry}/v1/")
    entry = next((auths[name] for name in names if name in auths), None)
    if not entry:
        return None
    found = {"serveraddress": registry}
    if entry.get("identitytoken"):
        return found | {"identitytoken": entry["identitytoken"]}
    if entry.get("auth"):
        try:
            user, separator, password = base64.b64decode(entry["auth"]).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            separator = ""
        if not separator:
            raise Invalid(
                f"{path}: the credentials of {registry} are damaged; run `docker login` again"
            )
        return found | {"username": user, "password": password.rstrip("\0")}
    if entry.get("username"):
        return found | {"username": entry["username"], "password": entry.get("password", "")}
    return None


def _from_helper(helper: str, registry: str) -> dict[str, str] | None:
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"],
            input=registry,
            capture_output=True,
            text=True,
            timeout=HELPER_S,
            check=False,
        )
    except FileNotFoundError:
        raise Invalid(f"the credential helper {program} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Invalid(f"the credential helper {program} takes longer than {HELPER_S} s") from None
    if done.returncode != 0:
        if "credentials not found" in done.stdout + done.stderr:
            return None
        raise Invalid(f"{program}: {(done.stdout or done.stderr).strip()}")
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError):
        raise Invalid(f"{program} did not answer with Username and Secret") from None
    if user == "<token>":
        return {"serveraddress": registry, "identitytoken": secret}
    return {"serveraddress": registry, "username": user, "password": secret}
