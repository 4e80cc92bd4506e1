"""The one module that talks to a container engine: Docker's API over its unix socket, or Podman's
compatible one.

Owns the connection (aiodocker's session and its pool), the time limit of each call and the meaning
of errors; knows nothing of tasks. A call ends in one of three ways: an answer, `Refusal` (the
engine said no: status and its words), or Unavailable/TimedOut, which name the socket.

aiodocker's one generic call is used, not its classes per object: these hide status codes, the
stream of a log line and half-closed stdin, and add inspections that cost a start its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiodocker
import aiohttp
import msgspec
from prometheus_client import Histogram

from swarm import errors

CALLS = Histogram(
    "swarm_engine_call_seconds",
    "Time of a call to the container engine",
    ("operation",),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)

# Each call has the time after which it is certain that something is wrong, for nothing in the agent
# may wait for an engine that hangs: its socket goes on accepting.
CONNECT_S = 5.0  # a unix socket connects at once, or its backlog is full
PING_S = 10.0  # what only reads tables of the engine's
INSPECT_S = 20.0  # waits for the container's lock, which a start holds
CALL_S = 60.0  # what makes, removes or starts something
# The newest API whose answers this code knows; an older engine is spoken to in its own version.
API_NEWEST = (1, 51)
API_OLDEST = (1, 40)  # Docker 19.03
# Limits are kept with asyncio.timeout: aiohttp's would also end streams.
_NO_LIMIT = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
_VERSION = re.compile(r"(\d+)\.(\d+)")


class Refusal(Exception):
    """The engine answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class Version:
    """What GET /version says."""

    engine: str  # docker or podman
    release: str
    api: tuple[int, int]


class Engine:
    """A connection to one engine. `connect` before anything else; it may be called again."""

    def __init__(self, socket: str) -> None:
        self.socket = socket.removeprefix("unix://")
        self.version = Version("docker", "", API_OLDEST)
        self._docker: aiodocker.Docker | None = None

    async def connect(self) -> None:
        """Learns the engine's version. Raises Unavailable, Unsupported."""
        if "://" in self.socket:
            raise errors.Unsupported(
                f"docker socket {self.socket!r}: only a path to a unix socket can be used"
            )
        if self._docker is None:
            # Calls that follow or wait hold a connection each, so the pool must not have a limit;
            # the callers bound what they ask for at once.
            connector = aiohttp.UnixConnector(self.socket, limit=0)
            self._docker = aiodocker.Docker(
                url="unix://localhost",  # the host of the HTTP request; the connector has the path
                session=aiohttp.ClientSession(connector=connector, timeout=_NO_LIMIT),
                connector=connector,
                api_version=_dotted(API_OLDEST),
            )
        answer = await self.call("version", "GET", "version", timeout_s=PING_S, versioned=False)
        newest, oldest = _numbers(answer["ApiVersion"]), _numbers(answer.get("MinAPIVersion", ""))
        api = min(newest, API_NEWEST)
        if api < API_OLDEST or api < oldest:
            raise errors.Unsupported(
                f"engine at {self.socket} speaks API {_dotted(oldest)} to {_dotted(newest)}, "
                f"this agent {_dotted(API_OLDEST)} to {_dotted(API_NEWEST)}; upgrade the older one"
            )
        names = {str(part.get("Name")) for part in answer.get("Components") or ()}
        engine = "podman" if "Podman Engine" in names else "docker"
        self.version = Version(engine, str(answer.get("Version", "")), api)
        self._docker.api_version = _dotted(api)

    async def ping(self) -> None:
        """Raises Unavailable, TimedOut when the engine does not answer."""
        try:
            await self.call("ping", "GET", "version", timeout_s=PING_S)
        except Refusal as refusal:
            raise errors.Unavailable(
                f"the engine at {self.socket} refuses to say its version: {refusal.message}"
            ) from None

    async def close(self) -> None:
        docker, self._docker = self._docker, None
        if docker is not None:
            await docker.session.close()
            await docker.close()

    # -------------------------------------------------------------- calls

    async def call(
        self,
        operation: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: object = None,
        timeout_s: float | None = CALL_S,
        versioned: bool = True,
    ) -> Any:
        """One request and its whole answer: parsed JSON, or None when there is no body.

        `operation` is a constant name for the metrics. Without a time limit it waits as long as
        the engine lets it. Raises Refusal, Unavailable, TimedOut.
        """
        with CALLS.labels(operation).time():
            async with self.stream(
                method, path, params=params, body=body, timeout_s=timeout_s, versioned=versioned
            ) as response:
                try:
                    async with asyncio.timeout(timeout_s):
                        data = await response.read()
                except TimeoutError:
                    raise self._timed_out(method, path, timeout_s) from None
                except aiohttp.ClientError as error:
                    raise self._lost(error) from None
        try:
            return msgspec.json.decode(data) if data.strip() else None
        except msgspec.DecodeError as error:
            raise errors.Unavailable(
                f"what answers at {self.socket} is no container engine: {method} /{path} gave "
                f"something that is not JSON ({error})"
            ) from None

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: object = None,
        data: AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = CALL_S,
        versioned: bool = True,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request whose answer the caller reads as it comes; the limit is for its beginning.
        `data` is sent as it comes, instead of a body. Raises Refusal, Unavailable, TimedOut.
        """
        docker = self._docker
        if docker is None:
            raise errors.Unavailable(f"the connection to the engine at {self.socket} is closed")
        try:
            async with asyncio.timeout(timeout_s):
                response = await docker._do_query(
                    path,
                    method,
                    params=params,
                    data=data if body is None else msgspec.json.encode(body),
                    headers=headers,
                    timeout=_NO_LIMIT,
                    versioned_api=versioned,
                )
        except TimeoutError:
            raise self._timed_out(method, path, timeout_s) from None
        except aiodocker.DockerError as error:
            if error.status == 900:  # aiodocker's own, for no connection
                raise self._lost(error) from None
            raise Refusal(error.status, _words(error.message)) from None
        except aiohttp.ClientError as error:
            raise self._lost(error) from None
        try:
            yield response
        finally:
            # A stream that was not read to its end is cut, else its connection would be kept busy.
            response.close() if not response.content.at_eof() else response.release()

    async def head(self, path: str, *, params: Mapping[str, str]) -> Mapping[str, str]:
        """The headers of an answer that has no body. Raises Refusal (without the engine's words),
        Unavailable, TimedOut.
        """
        docker = self._docker
        if docker is None:
            raise errors.Unavailable(f"the connection to the engine at {self.socket} is closed")
        # Not aiodocker's query, which looks for an error's words in the body and fails over none.
        url = docker._canonicalize_url(path, versioned_api=True)
        try:
            async with (
                asyncio.timeout(CALL_S),
                docker.session.head(url, params=params, timeout=_NO_LIMIT) as response,
            ):
                if response.status >= 400:
                    raise Refusal(response.status, f"the engine answers {response.status}")
                return response.headers
        except TimeoutError:
            raise self._timed_out("HEAD", path, CALL_S) from None
        except aiohttp.ClientError as error:
            raise self._lost(error) from None

    async def read(self, response: aiohttp.ClientResponse) -> bytes:
        """What has come of a streamed answer; empty at its end. Raises Unavailable."""
        try:
            return await response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from None

    async def hijack(
        self, path: str, body: object
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A request that turns its connection into a plain two-way stream; the caller closes the
        writer. Raises Refusal, Unavailable, TimedOut.
        """
        data = msgspec.json.encode(body)
        head = (
            f"POST /{_dotted(self.version.api)}/{path} HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/json\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        try:
            async with asyncio.timeout(CALL_S):
                reader, writer = await asyncio.open_unix_connection(self.socket)
                try:
                    writer.write(head.encode() + data)
                    await writer.drain()
                    answer = await reader.readuntil(b"\r\n\r\n")
                    status = int(answer.split(b" ", 2)[1])
                    # Podman and old engines answer 200 and switch all the same.
                    if status in (101, 200):
                        return reader, writer
                    raise Refusal(
                        status, _words((await reader.read(65536)).decode("utf-8", "replace"))
                    )
                except BaseException:
                    writer.close()
                    raise
        except TimeoutError:
            raise self._timed_out("POST", path, CALL_S) from None
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise self._lost(error) from None

    # -------------------------------------------------------------- errors

    def _lost(self, error: BaseException) -> errors.Unavailable:
        reason = getattr(error, "message", "") or str(error) or type(error).__name__
        return errors.Unavailable(
            f"no container engine answers at {self.socket} ({_short(reason)}); start Docker or "
            "Podman there, or name another socket with swarmd --docker-socket"
        )

    def _timed_out(self, method: str, path: str, timeout_s: float | None) -> errors.TimedOut:
        return errors.TimedOut(
            f"the container engine at {self.socket} did not answer {method} /{path.split('?')[0]} "
            f"within {timeout_s:g} s; see its log"
        )


def filters(**wanted: str) -> dict[str, str]:
    """The query parameter of list calls and of events."""
    return {"filters": json.dumps({key: [value] for key, value in wanted.items()})}


def _dotted(version: tuple[int, int]) -> str:
    return f"v{version[0]}.{version[1]}"


def _numbers(text: str) -> tuple[int, int]:
    found = _VERSION.match(text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _words(message: str) -> str:
    """An error's text; some answers come as JSON with another content type."""
    try:
        parsed = json.loads(message)
        message = str(parsed["message"])
    except (ValueError, KeyError, TypeError):
        pass  # plain text
    return " ".join(message.split())


def _short(reason: str) -> str:
    """What the system said, without aiodocker's frame around it."""
    inner = reason.rpartition("[")
    return (inner[2] or reason).rstrip("]").strip() if inner[1] else reason
