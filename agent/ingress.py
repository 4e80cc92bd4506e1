"""What the agent asks of whatever makes published ports reach replicas. Userspace now; a kernel
path can take its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from swarm.v1 import IngressService


@dataclass(frozen=True, slots=True)
class LocalTarget:
    """Where a task of this node listens, as this host reaches it."""

    address: str
    port_map: Mapping[int, int]  # target port -> port at the address; missing: the same port


class Ingress(Protocol):
    """Published ports of this node, and the door through which other nodes reach tasks here."""

    async def start(self) -> None:
        """Opens the relay. Raises Unavailable when its address or port is taken."""
        ...

    def set_key(self, relay_key: bytes) -> None:
        """The cluster's key with which nodes prove to each other that they may reach tasks."""
        ...

    async def apply(self, services: Sequence[IngressService]) -> tuple[str, ...]:
        """The whole set of published services; returns problems (a port that is taken), one
        sentence each.
        """
        ...

    def set_target(self, task_id: str, target: LocalTarget | None) -> None:
        """Where a local task listens; None: it is gone."""
        ...

    async def finished(self, task_id: str, *, timeout_s: float) -> bool:
        """Waits until a task without a target has answered what came through published ports;
        False: it had not when the time was over.
        """
        ...

    async def close(self) -> None: ...
