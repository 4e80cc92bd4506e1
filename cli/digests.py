"""What a tag stands for now: the digest that a registry has for an image, so that all nodes run the
same one, and a tag that moves later changes nothing until the next update.

Asked is the image's own registry, from here, with the credentials that `docker login` has kept for
it. Where it cannot be asked that is a warning, as in Docker: nodes resolve the tag when they pull.
Source: OCI Distribution Specification 1.1 (pulling manifests) and Docker's token authentication.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import ipaddress
import json
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from cli.registry import HUB, auth_for, registry_of
from swarm.errors import SwarmError

__all__ = ["Unresolved", "pinned"]

TIMEOUT_S = 5.0  # of one request; a registry that is slower is no help before a deploy
BODY_MAX = 4 << 20  # bytes of a manifest or a token
HUB_HOST = "registry-1.docker.io"
_ACCEPT = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


class Unresolved(Exception):
    """The digest is not known, and why."""


@dataclass(frozen=True, slots=True)
class _Name:
    """An image's name in parts."""

    host: str
    path: str
    tag: str
    # As it was written, with its tag.
    text: str


def pinned(image: str, environment: Mapping[str, str]) -> str:
    """The image with its tag and the digest of it; as it is where it has one. Raises Unresolved."""
    if "@" in image or not image:
        return image
    name = _parse(image)
    try:
        auth = auth_for(image, environment)
    except SwarmError as error:
        raise Unresolved(error.message) from None
    last = ""
    for scheme in ("https", "http") if _is_here(name.host) else ("https",):
        try:
            return f"{name.text}@{_digest(name, scheme, auth)}"
        except urllib.error.HTTPError as error:
            error.close()
            raise Unresolved(f"{name.host} answers {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            last = f"{name.host}: {reason}"
    raise Unresolved(last)


def _parse(image: str) -> _Name:
    head, slash, last = image.rpartition("/")
    stem, colon, tag = last.partition(":")
    path = f"{head}{slash}{stem}"
    text = image if colon else f"{image}:latest"
    registry = registry_of(image)
    if registry != HUB:
        return _Name(registry, path.removeprefix(f"{registry}/"), tag or "latest", text)
    for prefix in ("docker.io/", "index.docker.io/"):
        path = path.removeprefix(prefix)
    return _Name(HUB_HOST, path if "/" in path else f"library/{path}", tag or "latest", text)


def _is_here(host: str) -> bool:
    """Whether it is on this machine, where Docker takes a registry without TLS as well."""
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _digest(name: _Name, scheme: str, auth: str) -> str:
    url = f"{scheme}://{name.host}/v2/{name.path}/manifests/{urllib.parse.quote(name.tag)}"
    headers = {"Accept": ", ".join(_ACCEPT)}
    try:
        found = _ask(url, headers, method="HEAD")[0].get("Docker-Content-Digest", "")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.client.UNAUTHORIZED:
            raise
        challenge = error.headers.get("WWW-Authenticate", "")
        headers["Authorization"] = _authorization(challenge, auth, scheme)
        found = _ask(url, headers, method="HEAD")[0].get("Docker-Content-Digest", "")
    if not found:  # a registry may leave it out
        found = f"sha256:{hashlib.sha256(_ask(url, headers)[1]).hexdigest()}"
    if not _DIGEST.fullmatch(found):
        raise ValueError(f"it answers with {found!r} for a digest")
    return found


def _authorization(challenge: str, auth: str, scheme: str) -> str:
    """The header that a registry asks for; a token is fetched from where it says, which must be as
    safe a place as the registry.
    """
    basic = _basic(auth)
    kind, _, rest = challenge.partition(" ")
    if kind.lower() == "basic":
        if not basic:
            raise ValueError("it wants credentials; `docker login` keeps them")
        return basic
    given = dict(_CHALLENGE.findall(rest))
    realm = given.get("realm", "")
    if kind.lower() != "bearer" or urllib.parse.urlsplit(realm).scheme not in ("https", scheme):
        raise ValueError(f"it wants {challenge!r}, which is not known here")
    query = urllib.parse.urlencode({k: given[k] for k in ("service", "scope") if k in given})
    headers = {"Authorization": basic} if basic else {}
    answer = json.loads(_ask(f"{realm}?{query}", headers)[1])
    found = answer if isinstance(answer, dict) else {}
    token = str(found.get("token") or found.get("access_token") or "")
    if not token:
        raise ValueError("it gives no token")
    return f"Bearer {token}"


def _basic(auth: str) -> str:
    """Basic authorization of what `auth_for` found; empty: there is no password."""
    found = json.loads(base64.urlsafe_b64decode(auth)) if auth else {}
    if not found.get("username"):
        return ""
    pair = f"{found['username']}:{found.get('password', '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _ask(
    url: str, headers: Mapping[str, str], *, method: str = "GET"
) -> tuple[Mapping[str, str], bytes]:
    request = urllib.request.Request(url, method=method)
    for name, value in headers.items():
        # Credentials do not follow to wherever an answer leads.
        request.add_unredirected_header(name, value)
    context = ssl.create_default_context() if url.startswith("https:") else None
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
        return answer.headers, answer.read(BODY_MAX)
