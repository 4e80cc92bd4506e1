"""Published ports in user space; implements agent.ingress.Ingress.

Owns the listeners of this node's published ports, the relay through which other nodes reach tasks
here, and the way to relays elsewhere. `apply` compares the wanted set with what is open: what stays
is not touched, so connections go on; what is gone is closed to new ones. A port that is taken
becomes a sentence and is tried again every few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog
from msgspec.structs import replace

from agent.ingress import LocalTarget
from agent.proxy import listen, metrics, tcp, udp
from agent.proxy.balance import Balancer
from agent.proxy.dial import Cluster
from swarm import errors
from swarm.clock import Clock, SystemClock
from swarm.v1 import Backend, IngressService, PortConfig

log = structlog.get_logger("proxy")

RETRY_S = 5.0
SESSION_BYTES = 16


@dataclass(frozen=True, slots=True, order=True)
class _Key:
    """One published port on one address, and where it leads."""

    protocol: str
    host: str
    published: int
    owner: str  # a service's id, or a task's for its host ports
    target: int


@dataclass(slots=True)
class _Published:
    """A service, or one task's host ports."""

    name: str
    # Each port has its own counts, because each has its own connections.
    balancers: dict[tuple[str, int], Balancer] = field(default_factory=dict)
    backends: tuple[Backend, ...] = ()

    def balancer(self, protocol: str, target: int) -> Balancer:
        found = self.balancers.get((protocol, target))
        if found is None:
            found = self.balancers[protocol, target] = Balancer()
            found.update(self.backends)
        return found


class Proxy:
    """See the module. `listen_addresses` are this node's own, `0.0.0.0` and `::` for all."""

    def __init__(
        self,
        *,
        relay_address: tuple[str, int],
        listen_addresses: Sequence[str] = ("0.0.0.0", "::"),
        clock: Clock | None = None,
    ) -> None:
        self._relay_address = relay_address
        self._hosts = tuple(listen_addresses)
        self._cluster = Cluster(clock or SystemClock())
        self._connections = tcp.Connections(self._cluster)
        self._sessions = udp.Sessions(self._cluster)
        self._published: dict[str, _Published] = {}
        self._wanted: dict[_Key, Balancer] = {}
        self._open: dict[_Key, asyncio.Server | udp.Listener] = {}
        self._failed: dict[_Key, str] = {}
        self._relay_server: asyncio.Server | None = None
        self._relay: udp.Relay | None = None
        self._changing = asyncio.Lock()
        self._upkeep: asyncio.Task[None] | None = None

    # -------------------------------------------------------------- life

    async def start(self) -> None:
        host, port = self._relay_address
        tcp_sock = udp_sock = None
        try:
            tcp_sock = listen.open_socket("tcp", host, port)
            if tcp_sock is not None:
                port = tcp_sock.getsockname()[1]
                udp_sock = listen.open_socket("udp", host, port)
        except errors.SwarmError as error:
            if tcp_sock is not None:
                tcp_sock.close()
            raise errors.Unavailable(
                f"the relay for published ports cannot start: {error.message}; "
                "choose another port with --relay-port"
            ) from None
        if tcp_sock is None or udp_sock is None:
            raise errors.Unavailable(f"the relay cannot listen on {host}: this host has no IPv6")
        self._relay_address = (host, port)
        self._relay_server = await tcp.listen_relay(tcp_sock, self._connections)
        self._relay = udp.Relay(
            udp_sock, self._sessions, lambda: secrets.token_bytes(SESSION_BYTES)
        )
        self._upkeep = asyncio.create_task(self._keep_up())

    @property
    def relay_address(self) -> tuple[str, int]:
        """Where the relay listens; the port is known once it has started."""
        return self._relay_address

    async def close(self) -> None:
        """Closes all listeners and ends all connections."""
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.gather(self._upkeep, return_exceptions=True)
            self._upkeep = None
        async with self._changing:
            for key in tuple(self._open):
                self._close_listener(key)
            self._published.clear()
            self._wanted.clear()
            self._failed.clear()
        if self._relay_server is not None:
            self._relay_server.close()
            self._relay_server = None
        await self._connections.close()
        self._sessions.close()
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        self._hand_over()

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            self._sessions.sweep()
            self._hand_over()
            if self._failed:
                async with self._changing:
                    await self._open_missing()

    def _hand_over(self) -> None:
        self._cluster.traffic.hand_over()
        metrics.LISTENERS.set(len(self._open))
        metrics.PROBLEMS.set(len(self._failed))

    # -------------------------------------------------------------- what it is told

    def set_key(self, relay_key: bytes) -> None:
        """The former key is still taken, for nodes that have not heard of the new one."""
        former = tuple(key for key in self._cluster.keys if key != relay_key)
        self._cluster.keys = (relay_key, *former[:1])

    def set_target(self, task_id: str, target: LocalTarget | None) -> None:
        if target is None:
            self._cluster.targets.pop(task_id, None)
        else:
            self._cluster.targets[task_id] = target

    async def finished(self, task_id: str, *, timeout_s: float) -> bool:
        return await self._cluster.guests.finished(task_id, timeout_s=timeout_s)

    async def apply(self, services: Sequence[IngressService]) -> tuple[str, ...]:
        async with self._changing:
            if self._relay is None:
                raise errors.Unavailable("the proxy has not been started")
            mine = {s.service_id for s in services}
            kept = mine | self._cluster.host_targets.keys()
            self._published = {o: p for o, p in self._published.items() if o in kept}
            for service in services:
                await self._take(service)
            self._want(services)
            await self._open_missing()
            return self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """Published ports that are not open now, one sentence each."""
        return tuple(dict.fromkeys(self._failed[key] for key in sorted(self._failed)))

    async def _take(self, service: IngressService) -> None:
        """Keeps a service's backends; its listeners follow."""
        published = self._published.setdefault(service.service_id, _Published(service.service_name))
        published.backends = service.backends
        for balancer in published.balancers.values():
            balancer.update(service.backends)
        if self._relay is not None and any(p.protocol == "udp" for p in service.ports):
            for backend in service.backends:
                if backend.relay_addr and backend.task_id not in self._cluster.targets:
                    await self._relay.resolve(backend.relay_addr, backend.relay_port)

    def _want(self, services: Sequence[IngressService]) -> None:
        """Works out which listeners there should be, and closes the others."""
        wanted = {k: b for k, b in self._wanted.items() if k.owner in self._cluster.host_targets}
        taken = {(k.protocol, k.host, k.published): k.owner for k in wanted}
        self._failed = {k: why for k, why in self._failed.items() if k in wanted}
        for service in services:
            for port in service.ports:
                if port.publish_mode == "host" or not port.published_port:
                    continue
                for host in self._hosts:
                    protocol = port.protocol or "tcp"
                    key = _Key(
                        protocol, host, port.published_port, service.service_id, port.target_port
                    )
                    other = taken.setdefault((protocol, host, key.published), key.owner)
                    if other != key.owner:
                        rival = self._published.get(other)
                        self._failed[key] = (
                            f'service "{service.service_name}": '
                            f"{listen.name(protocol, host, key.published)} is published by "
                            f'"{rival.name if rival else other}" too'
                        )
                        continue
                    published = self._published[service.service_id]
                    wanted[key] = published.balancer(protocol, port.target_port)
        self._wanted = wanted
        for key in tuple(self._open):
            if key not in wanted:
                self._close_listener(key)

    async def _open_missing(self) -> None:
        for key in sorted(self._wanted):
            if key in self._open:
                continue
            name = self._published[key.owner].name
            try:
                sock = listen.open_socket(key.protocol, key.host, key.published)
                if sock is not None:
                    await self._serve(key, sock)
            except errors.SwarmError as error:
                if key not in self._failed:
                    log.warning("port_not_published", service=name, reason=error.message)
                self._failed[key] = f'service "{name}": {error.message}'
            else:
                self._failed.pop(key, None)
        self._hand_over()

    async def _serve(self, key: _Key, sock: socket.socket) -> None:
        assert self._relay is not None
        balancer = self._wanted[key]
        if key.protocol == "udp":
            self._open[key] = udp.Listener(sock, self._sessions, balancer, key.target, self._relay)
        elif key.protocol == "tcp":
            self._open[key] = await tcp.listen(sock, self._connections, balancer, key.target)
        else:
            sock.close()
            raise errors.Unsupported(f"port {key.published}: {key.protocol} cannot be published")

    def _close_listener(self, key: _Key) -> None:
        self._open.pop(key).close()

    # -------------------------------------------------------------- host ports of one task

    async def publish(
        self, task_id: str, ports: Sequence[PortConfig], target: LocalTarget
    ) -> tuple[PortConfig, ...]:
        """Publish mode host for a task with an address of its own: this node's port leads to this
        task alone. Returns the ports with their numbers. Raises Conflict, Unavailable; then none is
        open.
        """
        async with self._changing:
            if self._relay is None:
                raise errors.Unavailable("the proxy has not been started")
            self._withdraw(task_id)
            self._cluster.host_targets[task_id] = target
            published = self._published[task_id] = _Published(f"task {task_id}")
            published.backends = (Backend(task_id=task_id),)
            done = []
            try:
                for port in ports:
                    done.append(await self._publish_one(task_id, published, port))
            except errors.SwarmError:
                self._withdraw(task_id)
                raise
            self._hand_over()
            return tuple(done)

    async def _publish_one(
        self, task_id: str, published: _Published, port: PortConfig
    ) -> PortConfig:
        protocol = port.protocol or "tcp"
        hosts = (port.host_ip,) if port.host_ip else self._hosts
        socks, number = listen.open_everywhere(protocol, hosts, port.published_port)
        for sock in socks:
            key = _Key(protocol, sock.getsockname()[0], number, task_id, port.target_port)
            self._wanted[key] = published.balancer(protocol, port.target_port)
            try:
                await self._serve(key, sock)
            except errors.SwarmError:
                for rest in socks:
                    rest.close()
                raise
        return replace(port, protocol=protocol, published_port=number, publish_mode="host")

    async def withdraw(self, task_id: str) -> None:
        """Closes a task's host ports; nothing happens if it has none."""
        async with self._changing:
            self._withdraw(task_id)

    def _withdraw(self, task_id: str) -> None:
        if self._cluster.host_targets.pop(task_id, None) is None:
            return
        for key in [k for k in self._wanted if k.owner == task_id]:
            del self._wanted[key]
            with contextlib.suppress(KeyError):
                self._close_listener(key)
        self._published.pop(task_id, None)
