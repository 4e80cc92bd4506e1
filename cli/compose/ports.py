"""Published ports: the short forms, written out as long ones.

[[IP:]PUBLISHED:]TARGET[/PROTOCOL], where PUBLISHED and TARGET are ports or ranges of equal length,
or PUBLISHED is a range that leads to the one TARGET, as in Docker.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import NamedTuple

from cli.compose.at import At, made
from cli.compose.keys import PORT
from cli.compose.tree import LITERAL_TAG, Node

PORT_MAX = 65535
PORTS_MAX = 20_000  # of one service; every node listens on each
PROTOCOLS = ("tcp", "udp", "sctp")
_FORMS = 'write "8080:80", "80", "8000-8003:80-83", "53:53/udp" or the long form with target:'


class ShortPort(NamedTuple):
    """One port of a short form; published 0: the cluster chooses."""

    host_ip: str
    published: int
    target: int
    protocol: str


def parse_short(text: str) -> list[ShortPort]:
    """The ports of a short form, one each. Raises ValueError with what is wrong."""
    rest, _, protocol = text.strip().partition("/")
    protocol = protocol.lower() or "tcp"
    if protocol not in PROTOCOLS:
        raise ValueError(f"the protocol {protocol!r} is not tcp, udp or sctp")
    host_ip = ""
    if rest.startswith("["):
        host_ip, bracket, rest = rest[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise ValueError("an address in brackets ends with ]: before the ports")
        rest = rest[1:]
        parts = rest.split(":")
    else:
        parts = rest.split(":")
        if len(parts) > 2:
            host_ip, parts = ":".join(parts[:-2]), parts[-2:]
    if len(parts) > 2:
        raise ValueError("it has too many colons")
    if host_ip:
        try:
            host_ip = str(ipaddress.ip_address(host_ip))
        except ValueError:
            raise ValueError(f"{host_ip!r} is not an IP address") from None
    target_first, target_last = _range(parts[-1], "the target port")
    count = target_last - target_first + 1
    published = parts[0] if len(parts) == 2 else ""
    if not published.strip("0"):  # none, or 0
        return [ShortPort(host_ip, 0, target_first + i, protocol) for i in range(count)]
    first, last = _range(published, "the published port")
    if count == 1:
        return [ShortPort(host_ip, port, target_first, protocol) for port in range(first, last + 1)]
    if last - first + 1 != count:
        raise ValueError(
            f"{last - first + 1} published ports cannot stand for {count} "
            f"target port{'s' if count > 1 else ''}"
        )
    return [ShortPort(host_ip, first + i, target_first + i, protocol) for i in range(count)]


def _range(text: str, what: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    low = _port(first, what)
    high = _port(last, what) if dash else low
    if high < low:
        raise ValueError(f"{what} {text}: the range runs backwards")
    return low, high


def _port(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise ValueError(f"{what} {text!r} is not a number" if text else f"{what} is missing")
    number = int(text)
    if not 1 <= number <= PORT_MAX:
        raise ValueError(f"{what} {text} is not from 1 to {PORT_MAX}")
    return number


def long_ports(at: At) -> list[Node]:
    """All entries of `ports` in the long form."""
    if not at.is_list('- "8080:80"'):
        return []
    ports: list[Node] = []
    for entry in at.elements():
        for port in _entry(entry):
            ports.append(port)
            if len(ports) > PORTS_MAX:
                entry.fail(f"these are more than {PORTS_MAX} ports", "publish fewer")
                return []
    return ports


def _entry(at: At) -> Iterator[Node]:
    if isinstance(at.node.value, dict):
        if at.check_keys(PORT, context="ports"):
            if at.set_at("target") is None:
                at.lacks("target", "add the port inside the container, target: 80")
            else:
                yield at.node
        return
    if isinstance(at.node.value, bool | float | list | None):
        at.fail(f"must be a port, not {at.shown()}", _FORMS)
        return
    if at.node.tag == LITERAL_TAG:
        yield at.node
        return
    text = str(at.node.value)  # of a number its value, as Docker: 0x50 is 80
    try:
        ports = parse_short(text)
    except ValueError as error:
        at.fail(f'"{text}" is not a port: {error}', _FORMS)
        return
    for port in sorted(ports, key=lambda port: str(port.target)):  # Docker's order
        yield made(
            at.node,
            {
                "mode": "ingress",
                "target": port.target,
                "protocol": port.protocol,
                **({"published": port.published} if port.published else {}),
                **({"host_ip": port.host_ip} if port.host_ip else {}),
            },
        )
