"""Images: pulled as the policy says, once however many tasks ask, and never waiting long for a
registry that is away.

The create call itself finds out whether an image is there, so a policy of `missing` costs nothing
when it is. Without a policy, a tag `latest` (or none) means: ask the registry for a newer one, and
if it cannot be asked, use the local image and say so in the log. `always` written out means it: no
pull, no task.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from dataclasses import dataclass

import structlog

from agent.runtime.base import ENGINE_FAILED, Failed, Rejected
from agent.runtime.docker import causes
from agent.runtime.docker.engine import INSPECT_S, Engine, Refusal
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("docker")

DEFAULT_REGISTRY = "docker.io"
# An image pulled so recently is not asked for again: tasks of one service come together.
FRESH_S = 10.0
# A registry that could not be reached is not tried again so soon where a local image will do.
UNREACHABLE_S = 60.0
# The first word of a registry; the engine itself waits for up to 15 s per try.
FIRST_ANSWER_S = 3.0
# Between two lines of progress. The unpacking of a big layer is silent.
IDLE_S = 600.0
PROGRESS_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed image name."""

    name: str  # as given, without tag and digest
    registry: str
    tag: str  # empty with a digest
    digest: str

    @property
    def floating(self) -> bool:
        """Whether the name is meant to follow what is newest."""
        return not self.digest and self.tag == "latest"


def parse_reference(image: str) -> Reference:
    """Takes an image name apart as the engine does."""
    rest, _, digest = image.partition("@")
    head, slash, last = rest.rpartition("/")
    last, _, tag = last.partition(":")
    name = f"{head}{slash}{last}"
    first = name.partition("/")[0] if "/" in name else ""
    is_host = "." in first or ":" in first or first == "localhost"
    return Reference(
        name=name,
        registry=first if is_host else DEFAULT_REGISTRY,
        tag="" if digest else (tag or "latest"),
        digest=digest,
    )


def auth_header(registry_auth: str) -> dict[str, str]:
    """The header with the credentials, which come as base64 of either alphabet. Raises Rejected."""
    if not registry_auth:
        return {}
    try:
        padded = registry_auth + "=" * (-len(registry_auth) % 4)
        data = base64.b64decode(padded.replace("-", "+").replace("_", "/"), validate=True)
        json.loads(data)
    except (binascii.Error, ValueError):
        raise Rejected(
            "the service's registry credentials cannot be read; deploy again with "
            "--with-registry-auth"
        ) from None
    return {"X-Registry-Auth": base64.urlsafe_b64encode(data).decode()}


class PullError(Exception):
    """A pull did not work; whether the registry could be asked at all."""

    def __init__(self, message: str, *, unreachable: bool) -> None:
        super().__init__(message)
        self.message = message
        self.unreachable = unreachable


class Images:
    """Pulls for one engine."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._pulls: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        self._pulled_s: dict[tuple[str, str, str], float] = {}
        self._unreachable_until_s: dict[str, float] = {}

    async def before_create(self, image: str, *, policy: str, platform: str, auth: str) -> None:
        """What the policy asks for before the engine is asked to make the container."""
        reference = parse_reference(image)
        if policy == "always":
            await self.pull(image, platform=platform, auth=auth)
        elif not policy and reference.floating:
            await self._refresh(image, reference, platform=platform, auth=auth)

    async def pull(self, image: str, *, platform: str, auth: str) -> None:
        """Gets the image. Raises Rejected, Failed."""
        try:
            await self._shared(image, platform=platform, auth=auth, patient=True)
        except PullError as error:
            raise self._trouble(image, error) from None

    async def close(self) -> None:
        """Gives up pulls under way."""
        pulls = list(self._pulls.values())
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)

    async def _refresh(self, image: str, reference: Reference, *, platform: str, auth: str) -> None:
        """Tries for a newer image; any local one is good enough."""
        away_until_s = self._unreachable_until_s.get(reference.registry, 0.0)
        if away_until_s > self._clock.monotonic_s():
            return  # the create call tells whether there is a local one
        try:
            local = await self._exists(image)
            await self._shared(image, platform=platform, auth=auth, patient=not local)
        except PullError as error:
            if not local:
                raise self._trouble(image, error) from None
            log.warning(
                "local_image_used",
                image=image,
                registry=reference.registry,
                reason=error.message,
            )

    def _trouble(self, image: str, error: PullError) -> Rejected | Failed:
        return causes.pull_trouble(image, parse_reference(image).registry, error.message)

    async def _exists(self, image: str) -> bool:
        try:
            await self._engine.call(
                "image_inspect", "GET", f"images/{image}/json", timeout_s=INSPECT_S
            )
        except Refusal as refusal:
            if refusal.status != 404:
                raise Failed(f"image {image!r}: {refusal.message}", cause=ENGINE_FAILED) from None
            return False
        return True

    async def _shared(self, image: str, *, platform: str, auth: str, patient: bool) -> None:
        """One pull for all who ask at once, and for those who ask right after."""
        key = (image, platform, auth)
        pulled_s = self._pulled_s.get(key)
        if pulled_s is not None and self._clock.monotonic_s() - pulled_s < FRESH_S:
            return
        running = self._pulls.get(key)
        if running is None:
            running = asyncio.create_task(self._pull(key, patient=patient))
            self._pulls[key] = running
            running.add_done_callback(lambda done: self._finished(key, done))
        # Shielded: a task that is not wanted any more must not spoil the pull for the others.
        await asyncio.shield(running)

    def _finished(self, key: tuple[str, str, str], pull: asyncio.Task[None]) -> None:
        self._pulls.pop(key, None)
        now_s = self._clock.monotonic_s()
        self._pulled_s = {k: s for k, s in self._pulled_s.items() if now_s - s < FRESH_S}
        if pull.cancelled():
            return
        error = pull.exception()
        registry = parse_reference(key[0]).registry
        if error is None:
            self._pulled_s[key] = now_s
            self._unreachable_until_s.pop(registry, None)
        elif isinstance(error, PullError) and error.unreachable:
            self._unreachable_until_s[registry] = now_s + UNREACHABLE_S

    async def _pull(self, key: tuple[str, str, str], *, patient: bool) -> None:
        """One pull. Impatient: the registry must answer soon, for there is a local image."""
        image, platform, auth = key
        reference = parse_reference(image)
        params = {"fromImage": reference.name, "tag": reference.digest or reference.tag}
        if platform:
            params["platform"] = platform
        limit_s = IDLE_S if patient else FIRST_ANSWER_S
        try:
            async with self._engine.stream(
                "POST",
                "images/create",
                params=params,
                headers=auth_header(auth),
                timeout_s=limit_s,
            ) as response:
                buffer = b""
                while True:
                    async with asyncio.timeout(limit_s):
                        chunk = await self._engine.read(response)
                    if not chunk:
                        break
                    limit_s = IDLE_S
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        _check(line)
                    if len(buffer) > PROGRESS_BYTES_MAX:
                        raise PullError("the engine's progress makes no sense", unreachable=False)
                _check(buffer)
        except (TimeoutError, errors.TimedOut):
            await self._engine.ping()  # a registry that is silent and an engine that hangs differ
            raise PullError(
                f"i/o timeout: no sign of progress within {limit_s:g} s", unreachable=True
            ) from None
        except Refusal as refusal:
            raise PullError(
                refusal.message, unreachable=causes.unreachable(refusal.message)
            ) from None


def _check(line: bytes) -> None:
    """Raises PullError when a line of progress tells of an error."""
    if not line.strip():
        return
    said = json.loads(line)
    if "error" in said or "errorDetail" in said:
        detail = said.get("errorDetail") or {}
        message = " ".join(str(detail.get("message") or said.get("error")).split())
        raise PullError(message, unreachable=causes.unreachable(message))
