"""Published ports: which service has which, and which are free.

An ingress port is listened on by every node, so in the whole cluster it belongs to one service per
protocol. A host port is listened on only where a task runs; two services may ask for the same one
(the scheduler keeps their tasks apart), but it can never be had beside an ingress port. Pure: what
is taken comes in, the filled-in ports or the clashes go out; and a draft is told to guard each port
that a service newly gets, so that no two managers give the same one out at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import structs

from manager.store.tables import Draft, View
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


def ports_taken(view: View) -> Taken:
    """The published ports of all services.

    A service that is being removed has given its ports up: the nodes listen for services, not for
    tasks, so another one can take over at once. (Its host ports are the scheduler's matter.)
    """
    taken = Taken()
    for service in view.all(Service):
        if service.endpoint is not None and not service.pending_delete:
            _enter(taken, service)
    return taken


class PortLedger:
    """The ports of one transaction: worked out once, at the first question, and kept up to date
    with what the transaction gives out, so that many services cost no more than one look at all.
    """

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._taken: Taken | None = None

    def give_up(self, service: Service, wanted: Sequence[PortConfig]) -> None:
        """The service is about to want other ports: those that it will not keep are free for others
        of the same transaction, so that two services can swap theirs.
        """
        taken = self._look()
        named = {(protocol_of(p), p.published_port) for p in wanted if p.published_port}
        left_open = {
            (protocol_of(p), p.target_port)
            for p in wanted
            if not p.published_port and mode_of(p) == INGRESS
        }
        for port in service.endpoint.ports if service.endpoint is not None else ():
            keeps = (protocol_of(port), port.target_port) in left_open
            if not keeps and (protocol_of(port), port.published_port) not in named:
                _leave(taken, service, port)

    def allocate(
        self, wanted: Sequence[PortConfig], *, owner: Service
    ) -> tuple[tuple[PortConfig, ...], tuple[Clash, ...]]:
        """As allocate_ports, for a service with the ports that it has so far. What it did not have
        is guarded.
        """
        if not wanted:
            return (), ()
        before = owner.endpoint.ports if owner.endpoint is not None else ()
        given = allocate_ports(wanted, before=before, taken=self._look(), owner=owner.id)
        had = {_guard_of(port): mode_of(port) for port in before}
        for port in given[0]:
            if port.published_port and had.get(_guard_of(port)) != mode_of(port):
                self._draft.guard(_guard_of(port))
        return given

    def enter(self, before: Service | None, after: Service) -> None:
        """The service has been put with its new ports."""
        if self._taken is None:
            return
        for port in before.endpoint.ports if before and before.endpoint else ():
            _leave(self._taken, after, port)
        if after.endpoint is not None:
            _enter(self._taken, after)

    def _look(self) -> Taken:
        if self._taken is None:
            self._taken = ports_taken(self._draft)
        return self._taken


def _guard_of(port: PortConfig) -> str:
    """One for both modes, for they exclude each other."""
    return f"port/{protocol_of(port)}/{port.published_port}"


def _enter(taken: Taken, service: Service) -> None:
    assert service.endpoint is not None
    for port in service.endpoint.ports:
        if port.published_port:
            table = taken.ingress if mode_of(port) == INGRESS else taken.host
            table[protocol_of(port), port.published_port] = service


def _leave(taken: Taken, service: Service, port: PortConfig) -> None:
    key = (protocol_of(port), port.published_port)
    for table in (taken.ingress, taken.host):
        holder = table.get(key)
        if holder is not None and holder.id == service.id:
            del table[key]


def allocate_ports(
    wanted: Sequence[PortConfig],
    *,
    before: Sequence[PortConfig] = (),
    taken: Taken,
    owner: str = "",
) -> tuple[tuple[PortConfig, ...], tuple[Clash, ...]]:
    """Fills in the ingress ports that are left to the cluster; lists what another service than the
    owner (an id) has.

    A port that was given out `before` for the same target stays the same. Otherwise it is the
    lowest free one, so that the choice is the same on every manager. A host port of 0 stays 0: its
    node chooses. Raises Exhausted when the range is used up.
    """
    clashes = []
    used: set[Key] = set()
    for i, port in enumerate(wanted):
        if not port.published_port:
            continue
        key = (protocol_of(port), port.published_port)
        holder = _other(taken.ingress.get(key), owner)
        if holder is None and mode_of(port) == INGRESS:
            holder = _other(taken.host.get(key), owner)
        if holder is not None:
            clashes.append(Clash(i, port, holder))
        used.add(key)
    if all(p.published_port or mode_of(p) != INGRESS for p in wanted):
        return tuple(wanted), tuple(clashes)
    for table in (taken.ingress, taken.host):
        used.update(key for key, holder in table.items() if holder.id != owner)
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


def _other(holder: Service | None, owner: str) -> Service | None:
    return holder if holder is not None and holder.id != owner else None


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
