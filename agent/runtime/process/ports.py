"""Ports for tasks that share the host's network: each target port gets a port of the node's own
address.

They come from a range below the kernel's ephemeral ports, in turn, so that a port is reused late
and no outgoing connection takes one. That a port is free is tried by binding it; between that and
the task's own bind somebody else may take it, then the task fails and its replacement gets another.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from agent.ingress import LocalTarget
from agent.runtime.base import ENGINE_FAILED, Failed, Rejected
from agent.runtime.process.fields import Powers
from swarm.v1 import Assignment, PortConfig

FIRST, LAST = 20_000, 29_999


class HostPorts(Protocol):
    """Publishes ports of this node for one task with an address of its own; agent/proxy does."""

    async def publish(
        self, task_id: str, ports: Sequence[PortConfig], target: LocalTarget
    ) -> tuple[PortConfig, ...]:
        """Listens; the ports with their numbers filled in. Raises Conflict when one is taken."""
        ...

    async def withdraw(self, task_id: str) -> None: ...


class HostNetworkPorts:
    """Which port of the bind address is whose."""

    def __init__(self, bind_address: str, start: int) -> None:
        self.bind_address = bind_address
        self._next = FIRST + start % (LAST - FIRST + 1)
        self._used: dict[int, str] = {}

    def adopt(self, task_id: str, ports: Iterable[int]) -> None:
        """A task that was found on the host uses these."""
        for port in ports:
            self._used[port] = task_id

    def take(
        self, task_id: str, ports: Sequence[PortConfig]
    ) -> tuple[dict[int, int], tuple[PortConfig, ...]]:
        """The port to listen on for each target port, and the host ports with their numbers. Raises
        Failed when a wanted port is taken.
        """
        actual: dict[int, int] = {}
        host_ports = []
        for port in ports:
            target, host = port.target_port, port.publish_mode == "host"
            kinds = {p.protocol or "tcp" for p in ports if p.target_port == target}
            if host and port.published_port:
                if actual.get(target, port.published_port) != port.published_port:
                    raise Rejected(
                        f"target port {target} is published at {actual[target]} and at "
                        f"{port.published_port}: a process that shares the host's network has one"
                    )
                self._claim(task_id, port.published_port, kinds)
                actual[target] = port.published_port
            elif target not in actual:
                actual[target] = self._any(task_id, kinds)
            if host:
                host_ports.append(_numbered(port, actual[target]))
        return actual, tuple(host_ports)

    def release(self, task_id: str) -> None:
        for port in [p for p, owner in self._used.items() if owner == task_id]:
            del self._used[port]

    def _claim(self, task_id: str, port: int, kinds: set[str]) -> None:
        owner = self._used.get(port)
        if owner not in (None, task_id) or (owner is None and not self._free(port, kinds)):
            by = f"task {owner}" if owner else "another program"
            raise Failed(
                f"host port {port} at {self.bind_address} is in use by {by}", cause=ENGINE_FAILED
            )
        self._used[port] = task_id

    def _any(self, task_id: str, kinds: set[str]) -> int:
        for _ in range(LAST - FIRST + 1):
            port = self._next
            self._next = FIRST if port == LAST else port + 1
            if port not in self._used and self._free(port, kinds):
                self._used[port] = task_id
                return port
        raise Failed(
            f"no port from {FIRST} to {LAST} is free at {self.bind_address}", cause=ENGINE_FAILED
        )

    def _free(self, port: int, kinds: set[str]) -> bool:
        family = socket.AF_INET6 if ":" in self.bind_address else socket.AF_INET
        for kind in kinds:
            what = socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM
            with contextlib.closing(socket.socket(family, what)) as sock:
                if what == socket.SOCK_STREAM:
                    # As servers do: a port whose last connections have not timed out yet is free.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    sock.bind((self.bind_address, port))
                    if what == socket.SOCK_STREAM:
                        sock.listen(1)
                except OSError as error:
                    if error.errno in (errno.EADDRINUSE, errno.EACCES):
                        return False
                    raise Failed(
                        f"cannot bind to {self.bind_address}: {error.strerror}; is it an address "
                        "of this node?"
                    ) from None
        return True


def identity_map(ports: Sequence[PortConfig]) -> Mapping[int, int]:
    """For a task with an address of its own: each port is itself."""
    return {port.target_port: port.target_port for port in ports}


def host_ports(assignment: Assignment) -> tuple[PortConfig, ...]:
    """The service's ports of publish mode host."""
    return tuple(port for port in assignment.ports if port.publish_mode == "host")


def problems(assignment: Assignment, bind: str, powers: Powers) -> list[str]:
    """Why ports cannot be published as asked."""
    found = []
    for port in assignment.ports:
        if port.protocol not in ("", "tcp", "udp"):
            found.append(f"port {port.target_port}: protocol {port.protocol} is not offered")
        if (
            port.publish_mode == "host"
            and not powers.isolated
            and port.host_ip not in ("", "0.0.0.0", bind)
        ):
            found.append(
                f"port {port.published_port}: host_ip {port.host_ip} is not this node's {bind}"
            )
    return found


def _numbered(port: PortConfig, number: int) -> PortConfig:
    return PortConfig(
        name=port.name,
        protocol=port.protocol or "tcp",
        target_port=port.target_port,
        published_port=number,
        publish_mode="host",
        host_ip=port.host_ip,
    )
