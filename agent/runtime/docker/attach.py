"""How a task is attached to networks, and which ports the engine publishes for it. Pure.

A cluster network becomes an endpoint with the names that other tasks know it by: the attachment's
aliases, the service's name, the task's name. Ports of the routing mesh are not the engine's: the
agent's proxy listens on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent.runtime.base import Work
from agent.runtime.docker.facts import Facts
from agent.runtime.docker.mounts import Problem
from swarm.v1 import (
    Assignment,
    ContainerSpec,
    Network,
    NetworkAttachmentSpec,
    PortConfig,
    Task,
    TaskSpec,
)

# Networks that every engine has.
BUILT_IN = ("bridge", "host", "none")
_PORTS = re.compile(r"(\d+)(?:-(\d+))?(?:/(tcp|udp|sctp))?")


@dataclass(frozen=True, slots=True)
class Attachment:
    """A network the container is on: one of the cluster's, or a built-in one by name."""

    network: Network | None
    built_in: str
    endpoint: dict[str, Any]


def plan_attachments(
    work: Work, spec: TaskSpec, container: ContainerSpec, facts: Facts, problem: Problem
) -> tuple[Attachment, ...]:
    mode = container.network_mode
    wanted = sorted(spec.networks, key=lambda n: -n.priority)
    if mode not in ("", "default", *BUILT_IN):
        problem(f"network_mode {mode!r} is none of host, none, bridge")
        return ()
    if mode in BUILT_IN:
        if wanted:
            problem(f"network_mode {mode} cannot be combined with networks")
        return (Attachment(None, mode, {}),)
    out = [_attachment(work, attachment, container, facts, problem) for attachment in wanted]
    if len(out) > 1 and any(a.built_in in ("host", "none") for a in out):
        problem("the networks host and none cannot be combined with others")
    return tuple(out)


def _attachment(
    work: Work,
    spec: NetworkAttachmentSpec,
    container: ContainerSpec,
    facts: Facts,
    problem: Problem,
) -> Attachment:
    network = work.networks.get(spec.target) or next(
        (n for n in work.networks.values() if n.spec is not None and n.spec.name == spec.target),
        None,
    )
    if network is None:
        if spec.target not in BUILT_IN:
            problem(f"network {spec.target!r} is not known on this node")
        return Attachment(None, spec.target, {})
    driver = network.spec.driver.name if network.spec and network.spec.driver else ""
    if driver in ("host", "null"):
        return Attachment(None, "none" if driver == "null" else "host", {})
    assignment = work.assignment
    names = [*spec.aliases, assignment.service_name, assignment.name]
    endpoint: dict[str, Any] = {"Aliases": [n for n in dict.fromkeys(names) if n]}
    addresses = {
        "IPv4Address": spec.ipv4_address or _assigned(assignment, network.id, version=4),
        "IPv6Address": spec.ipv6_address or _assigned(assignment, network.id, version=6),
    }
    if any(addresses.values()):
        endpoint["IPAMConfig"] = {key: value for key, value in addresses.items() if value}
    if spec.driver_opts:
        endpoint["DriverOpts"] = dict(spec.driver_opts)
    if container.mac_address and facts.api >= (1, 44):
        endpoint["MacAddress"] = container.mac_address
    return Attachment(network, "", endpoint)


def _assigned(assignment: Assignment, network_id: str, *, version: int) -> str:
    """The address that the cluster gave the task on a network; empty: none."""
    for attachment in (assignment.task or Task()).networks:
        if attachment.network_id == network_id:
            for address in attachment.addresses:
                if (":" in address) == (version == 6):
                    return address.partition("/")[0]
    return ""


def exposed_ports(
    container: ContainerSpec, ports: Sequence[PortConfig], problem: Problem
) -> dict[str, dict[str, str]]:
    out: dict[str, dict[str, str]] = {f"{p.target_port}/{p.protocol or 'tcp'}": {} for p in ports}
    for text in container.expose:
        found = _PORTS.fullmatch(text)
        if not found:
            problem(f"expose {text!r} is not a port, a range, or either with /tcp or /udp")
            continue
        first = int(found[1])
        for port in range(first, int(found[2] or first) + 1):
            out[f"{port}/{found[3] or 'tcp'}"] = {}
    return out


def port_bindings(
    ports: Sequence[PortConfig], attachments: Sequence[Attachment], problem: Problem
) -> dict[str, Any]:
    """Ports of publish mode host; those of the routing mesh are the agent's proxy's."""
    built_in = attachments[0].built_in if attachments else ""
    bindings: dict[str, list[dict[str, str]]] = {}
    for port in ports:
        if built_in == "host" and port.published_port not in (0, port.target_port):
            problem(
                f"on the host's network port {port.target_port} cannot be published as "
                f"{port.published_port}"
            )
        if built_in == "none":
            problem(f"port {port.target_port} cannot be published without a network")
        key = f"{port.target_port}/{port.protocol or 'tcp'}"
        bindings.setdefault(key, []).append(
            {
                "HostIp": port.host_ip,
                "HostPort": str(port.published_port) if port.published_port else "",
            }
        )
    return {"PortBindings": bindings} if bindings and built_in != "host" else {}
