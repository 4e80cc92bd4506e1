"""Subnets of the cluster's networks: the lowest free ones of the address pool. Pure.

No two networks of the cluster overlap. Networks are bridges on the hosts, so a subnet given out
here becomes a route on every node: the /16 around each node's own address is left alone, else a
node would lose the way to its neighbours. (Docker's overlay networks live in namespaces of their
own and need no such care.)

Subnets overlap in many ways, so one guard stands for all of them: of two managers that give out
subnets at once, one goes again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network

from msgspec import structs

from manager.store.tables import Draft, View
from swarm import errors
from swarm.v1 import Driver, IpamConfig, Network, NetworkSpec, Node

DEFAULT_POOL = ("10.0.0.0/8",)  # Docker's
DEFAULT_SUBNET_SIZE = 24
_NODE_PREFIX = 16
_GUARD = "subnets"

AnyNetwork = IPv4Network | IPv6Network


def subnets_in_use(view: View, *, but: str = "") -> dict[AnyNetwork, Network]:
    """Every subnet of every network, except those of the network with the given id."""
    return {
        ipaddress.ip_network(config.subnet): network
        for network in view.all(Network)
        if network.id != but
        for config in network.ipam
        if config.subnet
    }


def hosts_in_use(view: View) -> set[IPv4Network]:
    """What surrounds the nodes' own addresses and must not become a network of the cluster."""
    out = set()
    for node in view.all(Node):
        said = (
            node.status.addr if node.status else "",
            node.description.data_path_addr if node.description else "",
            node.manager_status.addr.rpartition(":")[0] if node.manager_status else "",
        )
        for text in said:
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                continue  # a host name, or nothing: no address to keep clear of
            if address.version == 4:
                out.add(IPv4Network((address, _NODE_PREFIX), strict=False))
    return out


def give_subnets(
    draft: Draft, spec: NetworkSpec, *, pool: Sequence[str], subnet_size: int
) -> tuple[IpamConfig, ...]:
    """As allocate_ipam, beside the networks and nodes of the draft; guarded."""
    given = allocate_ipam(
        spec,
        pool=pool,
        subnet_size=subnet_size,
        taken=subnets_in_use(draft),
        avoid=hosts_in_use(draft),
    )
    if given:
        draft.guard(_GUARD)
    return given


def allocate_ipam(
    spec: NetworkSpec,
    *,
    pool: Sequence[str],
    subnet_size: int,
    taken: Iterable[AnyNetwork],
    avoid: Iterable[AnyNetwork] = (),
) -> tuple[IpamConfig, ...]:
    """The network's subnets with their gateways: those the spec names (valid and free already), and
    one from the pool where it names no IPv4 subnet. Raises Exhausted when the pool is used up.
    """
    configs = spec.ipam.configs if spec.ipam else ()
    out = [_with_gateway(c) for c in configs if c.subnet]
    named = [ipaddress.ip_network(c.subnet) for c in out]
    if spec.ipv4 is not False and not any(n.version == 4 for n in named):
        rest = next((c for c in configs if not c.subnet), IpamConfig())
        chosen = free_subnet(
            pool=pool or DEFAULT_POOL,
            subnet_size=subnet_size or DEFAULT_SUBNET_SIZE,
            taken=(*taken, *avoid, *named),
        )
        out.append(_with_gateway(structs.replace(rest, subnet=str(chosen))))
    return tuple(out)


def overlap(one: AnyNetwork, other: AnyNetwork) -> bool:
    """Whether two subnets share an address."""
    if isinstance(one, IPv4Network) and isinstance(other, IPv4Network):
        return one.overlaps(other)
    if isinstance(one, IPv6Network) and isinstance(other, IPv6Network):
        return one.overlaps(other)
    return False


def free_subnet(
    *, pool: Sequence[str], subnet_size: int, taken: Iterable[AnyNetwork]
) -> IPv4Network:
    """The lowest subnet of the pool that overlaps with nothing taken. Raises Exhausted."""
    blocks = sorted(
        (int(n.network_address), int(n.broadcast_address)) for n in taken if n.version == 4
    )
    step = 1 << (32 - subnet_size)
    for text in pool:
        outer = IPv4Network(text)
        if outer.prefixlen > subnet_size:
            continue
        at, last = int(outer.network_address), int(outer.broadcast_address)
        for low, high in blocks:
            if high < at:
                continue
            if low >= at + step:
                break
            at = (high // step + 1) * step
        if at + step - 1 <= last:
            return IPv4Network((at, subnet_size))
    raise errors.Exhausted(
        f"no free /{subnet_size} subnet is left in the address pool {', '.join(pool)}; remove "
        "unused networks, or give the network a subnet of its own (ipam.config.subnet)"
    )


def _with_gateway(config: IpamConfig) -> IpamConfig:
    if config.gateway:
        return config
    subnet = ipaddress.ip_network(config.subnet)
    first = subnet.network_address + (1 if subnet.num_addresses > 1 else 0)
    return structs.replace(config, gateway=str(first))


def driver_state(spec: NetworkSpec) -> Driver:
    """The driver that the network really gets."""
    return Driver(
        name=(spec.driver.name if spec.driver else "") or "overlay",
        options=dict(spec.driver.options) if spec.driver else {},
    )
