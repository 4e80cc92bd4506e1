"""A manager that is none: what the node's side of it is tested with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from msgspec import structs

from agent import identity as ids
from agent.managing import Managing
from agent.options import Settings
from swarm import errors, tls
from swarm.clock import ManualClock
from swarm.ids import seeded_rng
from swarm.rpc import Channel
from swarm.v1 import (
    IssueNodeCertificateRequest,
    IssueNodeCertificateResponse,
    ManagerStatus,
    Node,
    NodeRole,
    Reachability,
)
from swarm.vault import Vault

ADDRESS = "127.0.0.1:2377"


class FakePart:
    """Starts, serves and ends as the test says. `script` holds, for each start in turn, an error
    that it raises, or None: it serves until `end` is called.
    """

    def __init__(self, script: list[Exception | None]) -> None:
        self._script = script
        self.problems: dict[str, str] = {}
        self.control = self.authority = object()
        self.reachable: list[bool] = [True]
        self.store: Any = SimpleNamespace(
            all=self._nodes, engine=SimpleNamespace(in_touch=True, name="etcd")
        )
        self.made = self.started = self.stopped = 0
        self.waits = ""  # what it says before it goes on waiting
        self.certificates: list[tuple[str, str, str]] = []
        self.refuses: errors.SwarmError | None = None
        self._end: asyncio.Future[Exception | None] | None = None

    def make(self, *args: object, **kwargs: object) -> FakePart:
        self.made += 1
        return self

    def end(self, error: Exception | None = None) -> None:
        """The manager ends by itself."""
        assert self._end is not None
        self._end.set_result(error)

    async def start(self, waiting: Callable[[str], None]) -> None:
        if self.waits:
            waiting(self.waits)
            await asyncio.get_running_loop().create_future()
        error = self._script.pop(0) if self._script else None
        if error is not None:
            raise error
        self.started += 1

    async def run(self, ready: Callable[[], None]) -> None:
        self._end = asyncio.get_running_loop().create_future()
        ready()
        error = await self._end
        if error is not None:
            raise error

    async def stop(self) -> None:
        self.stopped += 1

    def use_certificate(self, key_pem: str, certificate_pem: str, root_ca_pem: str) -> None:
        self.certificates.append((key_pem, certificate_pem, root_ca_pem))

    async def issue_own(self, request: IssueNodeCertificateRequest) -> IssueNodeCertificateResponse:
        raise errors.Unavailable("no quorum")

    async def step_down(self) -> None:
        if self.refuses is not None:
            raise self.refuses
        await asyncio.get_running_loop().create_future()

    def _nodes(self, kind: type) -> list[Node]:
        assert kind is Node
        return [
            Node(
                id=str(i),
                manager_status=ManagerStatus(
                    reachability=Reachability.REACHABLE if r else Reachability.UNREACHABLE
                ),
            )
            for i, r in enumerate(self.reachable)
        ]


class Others:
    """The other managers: what they say this node's role is, asked by asked; the last for ever."""

    def __init__(self, *answers: NodeRole | errors.SwarmError) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def issue(self, request: IssueNodeCertificateRequest) -> IssueNodeCertificateResponse:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, errors.SwarmError):
            raise answer
        return IssueNodeCertificateResponse(
            node_id="n", certificate_pem=f"certificate {self.asked}", role=answer
        )


class Here:
    """The node: identity, state folder, vault, and its Managing over a fake part."""

    def __init__(self, folder: Path, *script: Exception | None) -> None:
        self.folder = folder
        self.part = FakePart(list(script))
        self.vault = Vault(folder / "node.key")
        self.denied = 0
        self.identity = ids.Identity(
            format=ids.FORMAT,
            node_id="n",
            cluster_id="c",
            role=NodeRole.MANAGER,
            key_pem=tls.new_key_pem(),
            certificate_pem="certificate",
            root_ca_pem="root",
            listen_addr=ADDRESS,
            advertise_addr=ADDRESS,
            data_path_addr="127.0.0.1",
            managers=(ADDRESS, "127.0.0.2:2377"),
        )
        self.managing = Managing(
            Settings(folder, "n1", "", (), 7946, {}),
            ManualClock(),
            seeded_rng(1),
            identity=lambda: self.identity,
            connect=self._connect,
            vault=self.vault,
            on_denied=self._deny,
            make=self.part.make,
        )

    def become(self, role: NodeRole) -> None:
        self.identity = structs.replace(self.identity, role=role)

    def _deny(self) -> None:
        self.denied += 1

    async def _connect(self, address: str) -> Channel:
        raise errors.Unavailable(address)
