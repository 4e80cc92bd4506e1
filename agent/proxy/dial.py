"""Opens the connection behind a published port: the best backend that takes it.

A local task is connected directly, a remote one through its node's relay. Nothing of the client's
is sent before a backend has taken the connection, so trying the next one is always safe.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.ingress import LocalTarget
from agent.proxy import preamble
from agent.proxy.balance import Balancer, Slot
from agent.proxy.guests import Guest, Guests
from agent.proxy.metrics import Traffic
from agent.proxy.preamble import Status
from agent.proxy.splice import Side
from swarm import errors
from swarm.clock import Clock

CONNECT_TIMEOUT_S = 3.0
ATTEMPTS_MAX = 8


@dataclass(slots=True)
class Cluster:
    """What all parts of the proxy know: keys, local tasks, traffic. Changed by the proxy only."""

    clock: Clock
    keys: tuple[bytes, ...] = ()  # newest first
    targets: dict[str, LocalTarget] = field(default_factory=dict)
    # Tasks with host ports, as the runtime gave them.
    host_targets: dict[str, LocalTarget] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    guests: Guests = field(default_factory=Guests)

    def local(self, task_id: str, port: int) -> tuple[str, int] | None:
        """Where a task of this node listens."""
        target = self.targets.get(task_id) or self.host_targets.get(task_id)
        if target is None or not target.address:
            return None
        return target.address, actual_port(target.port_map, port)


def actual_port(port_map: Mapping[int, int], port: int) -> int:
    return port_map.get(port, port)


@dataclass(frozen=True, slots=True)
class Way:
    """A connection to one backend, held back until it is linked."""

    side: Side
    slot: Slot
    guest: Guest | None  # of a task of this node


async def dial(cluster: Cluster, balancer: Balancer, port: int) -> Way:
    """A connection to the target port of one backend. The caller calls `hang_up` once it is over.
    Raises Unavailable with the reasons.
    """
    reasons: list[str] = []
    for slot in balancer.order(cluster.clock.monotonic_s())[:ATTEMPTS_MAX]:
        balancer.chosen(slot)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                side, guest = await _connect(cluster, slot, port)
        except (OSError, TimeoutError, errors.SwarmError) as error:
            balancer.closed(slot)
            balancer.failed(slot, cluster.clock.monotonic_s())
            reasons.append(f"task {slot.backend.task_id}: {_reason(error)}")
        except BaseException:
            balancer.closed(slot)
            raise
        else:
            balancer.succeeded(slot)
            return Way(side, slot, guest)
    raise errors.Unavailable("; ".join(reasons) or "no replica is running")


def hang_up(cluster: Cluster, balancer: Balancer, way: Way) -> None:
    """The connection is over."""
    balancer.closed(way.slot)
    if way.guest is not None:
        cluster.guests.leave(way.guest)


async def visit(cluster: Cluster, task_id: str, target: tuple[str, int]) -> tuple[Side, Guest]:
    """A connection to a task of this node, which is its guest from now on."""
    guest = cluster.guests.enter(task_id)
    try:
        return await connect(cluster, *target), guest
    except BaseException:
        cluster.guests.leave(guest)
        raise


async def _connect(cluster: Cluster, slot: Slot, port: int) -> tuple[Side, Guest | None]:
    backend = slot.backend
    if (local := cluster.local(backend.task_id, port)) is not None:
        return await visit(cluster, backend.task_id, local)
    if not cluster.keys:
        raise errors.Unavailable("this node has no relay key yet")
    if not backend.relay_addr or not backend.relay_port:
        raise errors.Unavailable("its node has no relay")
    side = await connect(cluster, backend.relay_addr, backend.relay_port)
    try:
        side.transport.write(
            preamble.encode(
                cluster.keys[0],
                protocol=preamble.TCP,
                task_id=backend.task_id,
                port=port,
                now_ns=cluster.clock.now_ns(),
                nonce=secrets.token_bytes(16),
            )
        )
        answer = (await side.receive(1))[0]
        if answer != Status.OPEN:
            known = answer in tuple(Status)
            raise errors.Unavailable(
                f"its node's relay answered {Status(answer).name.lower() if known else answer}"
            )
        side.hold()
    except BaseException:
        side.transport.abort()
        raise
    return side, None


async def connect(cluster: Cluster, host: str, port: int) -> Side:
    """A connection that is held back until it is linked."""
    _, side = await asyncio.get_running_loop().create_connection(
        lambda: Side(cluster.traffic, client=False), host, port
    )
    return side


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_TIMEOUT_S:g} s"
    return getattr(error, "strerror", None) or str(error)
