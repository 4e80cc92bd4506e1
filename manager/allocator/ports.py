"""Published ports: which service has which, and which are free.

An ingress port is listened on by every node, so in the whole cluster it belongs to one service per
protocol. A host port is listened on only where a task runs; two services may ask for the same one
(the scheduler keeps their tasks apart), but it can never be had beside an ingress port. Pure: what
is taken comes in, the filled-in ports or the clashes go out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import structs

from manager.store.tables import View
from swarm import errors
from swarm.v1 import PortConfig, Service

# Docker's range for ports that the user leaves to the cluster.
DYNAMIC_FIRST = 30_000
DYNAMIC_LAST = 32_767

INGRESS = "ingress"
HOST = "host"
Key = tuple[str, int]  # protocol, port


@dataclass(frozen=True, slots=True)
class Taken:
    """Who has which ports, as (protocol, port) -> service."""

    ingress: dict[Key, Service] = field(default_factory=dict)
    host: dict[Key, Service] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clash:
    """One wanted port that another service has. `index` counts in the wanted ports."""

    index: int
    port: PortConfig
    holder: Service


def protocol_of(port: PortConfig) -> str:
    return port.protocol or "tcp"


def mode_of(port: PortConfig) -> str:
    return port.publish_mode or INGRESS


def ports_taken(view: View, *, but: str = "") -> Taken:
    """The published ports of all services except the one with the given id.

    A service that is being removed has given its ports up: the nodes listen for services, not for
    tasks, so another one can take over at once. (Its host ports are the scheduler's matter.)
    """
    taken = Taken()
    for service in view.all(Service):
        if service.id == but or service.pending_delete or service.endpoint is None:
            continue
        for port in service.endpoint.ports:
            if port.published_port:
                table = taken.ingress if mode_of(port) == INGRESS else taken.host
                table[protocol_of(port), port.published_port] = service
    return taken


def allocate_ports(
    wanted: Sequence[PortConfig], *, before: Sequence[PortConfig] = (), taken: Taken
) -> tuple[tuple[PortConfig, ...], tuple[Clash, ...]]:
    """Fills in the ingress ports that are left to the cluster; lists what another service has.

    A port that was given out `before` for the same target stays the same. Otherwise it is the
    lowest free one, so that the choice is the same on every manager. A host port of 0 stays 0: its
    node chooses. Raises Exhausted when the range is used up.
    """
    clashes = []
    used = set(taken.ingress) | set(taken.host)
    for i, port in enumerate(wanted):
        if not port.published_port:
            continue
        key = (protocol_of(port), port.published_port)
        holder = taken.ingress.get(key)
        if holder is None and mode_of(port) == INGRESS:
            holder = taken.host.get(key)
        if holder is not None:
            clashes.append(Clash(i, port, holder))
        used.add(key)
    kept = _given_before(wanted, before, used)
    used |= set(kept.values())
    out = []
    for i, port in enumerate(wanted):
        if port.published_port or mode_of(port) != INGRESS:
            out.append(port)
            continue
        key = kept.get(i) or _lowest_free(protocol_of(port), used)
        used.add(key)
        out.append(structs.replace(port, published_port=key[1]))
    return tuple(out), tuple(clashes)


def _given_before(
    wanted: Sequence[PortConfig], before: Sequence[PortConfig], used: set[Key]
) -> dict[int, Key]:
    """Index of a wanted port -> what it had, where it can keep it."""
    free: dict[tuple[str, int], list[Key]] = {}
    for port in before:
        key = (protocol_of(port), port.published_port)
        if port.published_port and mode_of(port) == INGRESS and key not in used:
            free.setdefault((protocol_of(port), port.target_port), []).append(key)
    kept = {}
    for i, port in enumerate(wanted):
        had = free.get((protocol_of(port), port.target_port))
        if had and not port.published_port and mode_of(port) == INGRESS:
            kept[i] = had.pop(0)
    return kept


def _lowest_free(protocol: str, used: set[Key]) -> Key:
    for number in range(DYNAMIC_FIRST, DYNAMIC_LAST + 1):
        if (protocol, number) not in used:
            return protocol, number
    raise errors.Exhausted(
        f"all {DYNAMIC_LAST - DYNAMIC_FIRST + 1} {protocol} ports from {DYNAMIC_FIRST} to "
        f"{DYNAMIC_LAST} are published; name a published port outside of this range, or remove "
        "services that publish ports"
    )
