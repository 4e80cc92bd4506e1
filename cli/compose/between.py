"""What services of a stack say about each other: whom they wait for, what others call them, and
which ports they publish.

A container's own name does not exist in a cluster, for a service has many containers. What people
use it for is to be reached by it, so `container_name` and the alias of `links` become aliases on
networks, where that is right: a name that another service has, or that means two services, is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cli.compose.at import At
from cli.compose.problems import nearest
from cli.compose.tree import Node
from swarm.v1 import ServiceSpec

HOST_MODES = ("host", "none")
_CONTAINER_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")


@dataclass(slots=True)
class Aliases:
    """The other names of services, by service and network key."""

    found: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def of(self, service: str, network: str) -> tuple[str, ...]:
        return tuple(self.found.get((service, network), ()))


def networks_joined(at: At) -> tuple[str, ...]:
    """The keys of the networks that a service joins, in the order of the file."""
    mode, joined = at.set_at("network_mode"), at.set_at("networks")
    if mode is not None and mode.node.value in HOST_MODES:
        return ()
    value = joined.node.value if joined is not None else None
    return tuple(value) if isinstance(value, dict) and value else ("default",)


def links_of(at: At) -> Iterator[tuple[At, str, str]]:
    """Each link with the other service's name and what it shall be called, or "" for its name."""
    found = at.set_at("links")
    if found is None or not found.is_list("- SERVICE:ALIAS"):
        return
    for each in found.elements():
        other, colon, alias = each.text(empty=False).partition(":")
        if colon and not alias:
            each.fail("no alias follows the colon", f"write {other}, or {other}:ALIAS")
        elif other:
            yield each, other, alias if alias != other else ""


def waits_for(at: At) -> dict[str, Node]:
    """The services that a service waits for, and where that stands; links wait as well."""
    found = at.set_at("depends_on")
    waits = dict(found.node.value) if found and isinstance(found.node.value, dict) else {}
    links = at.set_at("links")
    for each in links.elements() if links is not None else ():
        if isinstance(each.node.value, str):
            waits.setdefault(each.node.value.partition(":")[0], each.node)
    return waits


def missing(other: str, at: At, services: Mapping[str, At], left_out: frozenset[str]) -> None:
    """Reports a service that is named and not there."""
    if other in left_out:
        at.fail(
            f'the service "{other}" is left out, because none of its profiles is active',
            "activate one of them"
            + (", or write required: false" if "depends_on" in at.path else ""),
        )
        return
    near = nearest(other, services)
    at.fail(
        f'there is no service "{other}"',
        f'did you mean "{near}"?' if near else "name a service of this stack",
    )


# ------------------------------------------------------------------ names


def other_names(services: Mapping[str, At], left_out: frozenset[str]) -> Aliases:
    """The aliases that container_name and links stand for."""
    aliases = Aliases()
    owners: dict[tuple[str, str], str] = {}  # network key and name: the service it means
    for name, at in services.items():
        owners |= {(network, name): name for network in networks_joined(at)}
    for name, at in services.items():
        _container_name(name, at, aliases, owners)
    for name, at in services.items():
        for each, other, alias in links_of(at):
            if other == name:
                each.fail("a service cannot be linked to itself", "remove it")
            elif other not in services:
                missing(other, each, services, left_out)
            else:
                _link(each, at, other, services[other], alias, aliases, owners)
    return aliases


def _container_name(
    name: str, at: At, aliases: Aliases, owners: dict[tuple[str, str], str]
) -> None:
    found = at.set_at("container_name")
    if found is None:
        return
    wanted = found.text()
    if not wanted:  # a variable that is not set; Docker uses none of them
        return
    if not _CONTAINER_NAME.fullmatch(wanted):
        found.fail(f'"{wanted}" cannot be a name', "use a-z, A-Z, 0-9, _, . and -")
        return
    networks = networks_joined(at)
    for network in networks:
        owner = owners.setdefault((network, wanted), name)
        if owner != name:
            found.fail(
                f'the name "{wanted}" means the service "{owner}" on the network "{network}"',
                "choose another name, or remove container_name",
            )
            return
        if wanted != name:
            aliases.found.setdefault((name, network), []).append(wanted)
    reached = f'others reach the service as "{wanted}"' if networks else "remove it"
    found.warn(f"containers are named after their task, such as STACK_{name}.1.ID; {reached}")


def _link(
    each: At,
    at: At,
    other: str,
    other_at: At,
    alias: str,
    aliases: Aliases,
    owners: dict[tuple[str, str], str],
) -> None:
    theirs = networks_joined(other_at)
    shared = [network for network in networks_joined(at) if network in theirs]
    if not shared:
        each.fail(
            f'the service and "{other}" are on no network together, so it would not be reached',
            "give both one network",
        )
    for network in shared if alias else ():
        owner = owners.setdefault((network, alias), other)
        if owner != other:
            each.fail(
                f'the name "{alias}" means the service "{owner}" on the network "{network}", '
                "and an alias is for all of a network",
                f'use another alias, or reach the service as "{other}"',
            )
            return
        known = aliases.found.setdefault((other, network), [])
        if alias not in known:
            known.append(alias)


# ------------------------------------------------------------------ circles


def refuse_cycles(services: Mapping[str, At]) -> None:
    """Reports each circle of waiting services once, at the entry that closes it."""
    edges = {name: waits_for(at) for name, at in services.items()}
    done: set[str] = set()
    for start in edges:
        trail: dict[str, None] = {}
        stack: list[tuple[str, bool]] = [(start, False)]
        while stack:
            name, leaving = stack.pop()
            if leaving:
                del trail[name]
                done.add(name)
                continue
            if name in done or name in trail:
                continue
            trail[name] = None
            stack.append((name, True))
            for other, node in edges[name].items():
                if other in trail and other != name:
                    names = list(trail)
                    circle = [*names[names.index(other) :], other]
                    at = services[name]
                    at.report.error(
                        node.mark,
                        f"the services wait for each other in a circle: {' -> '.join(circle)}",
                        "remove one of these dependencies",
                        path=at.path,
                    )
                elif other in edges and other not in done:
                    stack.append((other, False))


# ------------------------------------------------------------------ ports


def refuse_clashes(services: Mapping[str, At], specs: Mapping[str, ServiceSpec]) -> None:
    """Reports a port that two services publish. A port of mode ingress is taken on every node; two
    of mode host may be on different nodes, which the scheduler sees to.
    """
    ingress: dict[tuple[int, str], str] = {}
    host: dict[tuple[int, str], str] = {}
    places: dict[str, dict[tuple[int, int], At]] = {}
    for name, spec in specs.items():
        for port in spec.endpoint.ports if spec.endpoint is not None else ():
            if not port.published_port:
                continue
            key = (port.published_port, port.protocol)
            is_host = port.publish_mode == "host"
            holder = ingress.get(key) or ("" if is_host else host.get(key, ""))
            if holder and holder != name:
                if name not in places:
                    places[name] = _places(services[name])
                places[name].get((key[0], port.target_port), services[name]).fail(
                    f'the port {key[0]}/{key[1]} is published by the service "{holder}" too',
                    "publish one of them elsewhere",
                )
            (host if is_host else ingress).setdefault(key, name)


def _places(at: At) -> dict[tuple[int, int], At]:
    """Where each published port of a service stands, by published and target port."""
    ports = at.set_at("ports")
    found: dict[tuple[int, int], At] = {}
    for each in ports.elements() if ports is not None else ():
        published, target = each.set_at("published"), each.set_at("target")
        if published is not None and target is not None:
            found.setdefault((published.integer(), target.integer()), each)
    return found
