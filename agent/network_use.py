"""Which tasks of the node are on which network of the cluster, for each runtime: what was made for
a network goes with the last of its tasks, and no task begins while it is just being taken down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable

from agent.hosts import Host

Spawn = Callable[[Coroutine[None, None, None]], asyncio.Task[None] | None]


class NetworkUse:
    """`spawn` starts a coroutine of the worker's; None while the worker ends."""

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn
        self._users: dict[tuple[str, str], set[str]] = {}
        self._releases: dict[tuple[str, str], asyncio.Task[None]] = {}

    def join(self, host: Host, task_id: str, networks: Iterable[str]) -> None:
        """The task is on these networks; they stay until the last of their tasks is gone."""
        for network_id in networks:
            self._users.setdefault((host.name, network_id), set()).add(task_id)

    def leave(self, host: Host, task_id: str, networks: Iterable[str]) -> None:
        """The task is gone."""
        for network_id in sorted(networks):
            key = (host.name, network_id)
            users = self._users.get(key, set())
            users.discard(task_id)
            if not users:
                self._users.pop(key, None)
                release = self._spawn(self._release(host, key))
                if release is not None:
                    self._releases[key] = release

    async def _release(self, host: Host, key: tuple[str, str]) -> None:
        try:
            if key not in self._users:
                await host.release_network(key[1])
        finally:
            if self._releases.get(key) is asyncio.current_task():
                del self._releases[key]

    async def free(self, host: Host, networks: Iterable[str]) -> None:
        """Waits until none of the networks is just being taken down."""
        for network_id in sorted(networks):
            release = self._releases.get((host.name, network_id))
            if release is not None:
                await asyncio.wait({release})
