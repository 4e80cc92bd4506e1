"""What an engine's refusal, or a registry's behind it, amounts to, told by their words. Pure.

An engine answers with one status for many reasons, and what goes wrong in a pull is a line of text
in an answer that was 200; so the words of Docker (moby, containerd, distribution) and of Podman
(containers/image) are what there is. A text that is not known counts as the engine's own trouble:
then another node is tried, which harms nobody.
"""

from __future__ import annotations

from agent.runtime.base import (
    DISK_FULL,
    ENGINE_FAILED,
    IMAGE_DENIED,
    IMAGE_MISSING,
    IMAGE_UNREACHABLE,
    PROGRAM_MISSING,
    UNSUPPORTED,
    Failed,
    Rejected,
)
from agent.runtime.docker.engine import Refusal

# All in lower case.
_NO_ROOM = ("no space left on device", "disk quota exceeded", "not enough space")
_UNREACHABLE = (
    "dial tcp",
    "no such host",
    "connection refused",
    "i/o timeout",
    "client.timeout",
    "deadline exceeded",
    "network is unreachable",
    "no route to host",
    "tls handshake",
    "tls: ",
    "x509: ",
    "server gave http response to https client",
    "first record does not look like a tls handshake",
    "server misbehaving",
    "request canceled",
    "connection reset",
    "broken pipe",
    "eof",
    "toomanyrequests",
    "too many requests",
    "received unexpected http status: 5",
    "unexpected status code 5",
    "502 bad gateway",
    "503 service unavailable",
    "504 gateway",
)
_DENIED = (
    "denied",
    "unauthorized",
    "authentication required",
    "no basic auth credentials",
    "403 forbidden",
)
_MISSING = (
    "manifest unknown",
    "name unknown",
    "not found",
    "no matching manifest",
    "no image found in",
    "repository does not exist",
    "does not match the specified platform",
)
# The name itself cannot be asked for.
_NAMELESS = ("invalid reference format", "repository name must be", "invalid tag format")


def no_room(text: str) -> bool:
    """Whether a file system is full."""
    return _has(text, _NO_ROOM)


def unreachable(text: str) -> bool:
    """Whether the registry could not be asked, or answered nothing that can be used."""
    return not no_room(text) and _has(text, _UNREACHABLE)


def of_pull(text: str) -> str:
    """The cause of a pull that did not work. Docker Hub hides what it does not have behind a denial
    to everybody who is not logged in.
    """
    if no_room(text):
        return DISK_FULL
    if unreachable(text):
        return IMAGE_UNREACHABLE
    if _has(text, _DENIED):
        return IMAGE_DENIED
    if _has(text, _MISSING):
        return IMAGE_MISSING
    return UNSUPPORTED if _has(text, _NAMELESS) else ENGINE_FAILED


def pull_trouble(image: str, registry: str, text: str) -> Rejected | Failed:
    """What becomes of a task whose image cannot be pulled, with what to do about it."""
    what = f"image {image!r} cannot be pulled: "
    cause = of_pull(text)
    match cause:
        case "disk_full":
            what += f"this node has no room for it: {text}; free some space on it"
        case "image_unreachable":
            what += (
                f"registry {registry} cannot be reached: {text}; see that this node reaches it "
                "and trusts its certificate"
            )
        case "image_denied":
            what += (
                f"{text}; see that the name is right, log in to {registry} and deploy with "
                "--with-registry-auth"
            )
        case "image_missing":
            what += f"{text}; see that the name is right and the image was pushed"
        case "unsupported":
            what += f"{text}; write NAME:TAG or NAME@DIGEST"
        case _:
            what += text
    if cause in (IMAGE_DENIED, IMAGE_MISSING, UNSUPPORTED):
        return Rejected(what, cause=cause)
    return Failed(what, cause=cause)


def create_trouble(image: str, refusal: Refusal) -> Rejected | Failed:
    """What becomes of a task whose container the engine does not make."""
    text = f"container of image {image!r} cannot be created: {refusal.message}"
    if no_room(refusal.message):
        return Failed(f"{text}; free some space on this node", cause=DISK_FULL)
    # 4xx: the engine does not take it as it is. 5xx: it had trouble of its own.
    if refusal.status >= 500:
        return Failed(text, cause=ENGINE_FAILED)
    return Rejected(text, cause=UNSUPPORTED if refusal.status == 400 else "")


def start_trouble(refusal: Refusal) -> Rejected | Failed:
    """What becomes of a task whose container the engine does not start."""
    said = refusal.message
    text = f"the container does not start: {said}"
    if no_room(said):
        return Failed(f"{text}; free some space on this node", cause=DISK_FULL)
    if "executable file not found" in said or ("exec: " in said and "no such file" in said):
        return Rejected(text, cause=PROGRAM_MISSING)
    if "select device driver" in said or "exec format error" in said:
        return Rejected(text, cause=UNSUPPORTED)
    if refusal.status == 400:
        return Rejected(text)
    # What the OCI runtime says is about this container; all else is trouble of the engine's own, a
    # port that another program has included.
    return Failed(text, cause="" if "runtime create failed" in said else ENGINE_FAILED)


def _has(text: str, signs: tuple[str, ...]) -> bool:
    lower = text.lower()
    return any(sign in lower for sign in signs)
