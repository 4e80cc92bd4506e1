"""Placement constraints and spread preferences: parsing, and matching against one node.

Method and spelling are SwarmKit's (manager/constraint/constraint.go): `==` and `!=`; keys, and the
values compared, ignore case, the names of labels do not; a label that is absent compares as the
empty string; `node.ip` takes an address or a CIDR. Two departures, both so that a mistake shows
where it is made and not as a task that waits for ever: a key that no node can have is refused (in
SwarmKit it matches nothing), and `node.platform.arch` takes either spelling of an architecture.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

from swarm import errors
from swarm.v1 import Node, NodeRole

_OPERATORS = ("==", "!=")
_KEY = re.compile(r"[a-z_][a-z0-9\-_.]+", re.IGNORECASE)
_VALUE = re.compile(r"[a-z0-9:\-_\s.*()?+\[\]\\^$|/]+", re.IGNORECASE)
_NODE_LABELS = "node.labels."
_ENGINE_LABELS = "engine.labels."

# Go's names on the right, the kernel's on the left; both are in use in images and in constraints.
_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "armhf": "arm",
    "i386": "386",
    "i686": "386",
}


def normal_arch(name: str) -> str:
    """One spelling for each architecture: Go's."""
    lower = name.lower()
    return _ARCHITECTURES.get(lower, lower)


def _hostname(node: Node) -> str:
    return node.description.hostname if node.description else ""


def _role(node: Node) -> str:
    manager = node.spec is not None and node.spec.role == NodeRole.MANAGER
    return "manager" if manager else "worker"


def _os(node: Node) -> str:
    platform = node.description.platform if node.description else None
    return platform.os if platform else ""


def _arch(node: Node) -> str:
    platform = node.description.platform if node.description else None
    return normal_arch(platform.architecture) if platform else ""


_ATTRIBUTES: dict[str, Callable[[Node], str]] = {
    "node.id": lambda node: node.id,
    "node.hostname": _hostname,
    "node.ip": lambda node: node.status.addr if node.status else "",
    "node.role": _role,
    "node.platform.os": _os,
    "node.platform.arch": _arch,
}
_KEYS_FOR_PEOPLE = (*_ATTRIBUTES, _NODE_LABELS + "NAME", _ENGINE_LABELS + "NAME")


@dataclass(frozen=True, slots=True)
class Attribute:
    """Something that nodes have a value of. `label` is empty unless `key` is a prefix of labels."""

    key: str
    label: str = ""

    def of(self, node: Node) -> str:
        """The node's value; "" where it has none."""
        if self.key == _NODE_LABELS:
            return node.spec.labels.get(self.label, "") if node.spec else ""
        if self.key == _ENGINE_LABELS:
            engine = node.description.engine if node.description else None
            return engine.labels.get(self.label, "") if engine else ""
        return _ATTRIBUTES[self.key](node)


@dataclass(frozen=True, slots=True)
class Constraint:
    """One condition on a node. `text` is what the user wrote. Without an attribute (a stored text
    that cannot be read) it matches no node.
    """

    text: str
    attribute: Attribute | None
    negated: bool
    value: str

    def matches(self, node: Node) -> bool:
        if self.attribute is None:
            return False
        found = self.attribute.of(node)
        if self.attribute.key == "node.ip":
            equal = _same_address(found, self.value)
        elif self.attribute.key == "node.platform.arch":
            equal = found == normal_arch(self.value)
        else:
            equal = found.casefold() == self.value.casefold()
        return equal != self.negated


def parse_constraint(text: str) -> Constraint:
    """Raises Invalid, with the accepted forms."""
    operator = next((o for o in _OPERATORS if o in text), None)
    if operator is None:
        raise errors.Invalid(
            f"constraint {text!r}: expected one operator of ==, !=; "
            'write it such as "node.role == manager" or "node.labels.zone != a"'
        )
    key, _, value = (part.strip() for part in text.partition(operator))
    if not _VALUE.fullmatch(value):
        raise errors.Invalid(
            f"constraint {text!r}: value {value!r} is empty or has characters other than letters, "
            "digits, spaces and : - _ . * ( ) ? + [ ] \\ ^ $ | /"
        )
    attribute = _attribute(key, f"constraint {text!r}")
    if attribute.key == "node.ip" and _network(value) is None:
        raise errors.Invalid(
            f"constraint {text!r}: {value!r} is neither an address nor a network; "
            "write it such as 10.0.0.7 or 10.0.0.0/24"
        )
    if attribute.key == "node.role" and value.casefold() not in ("manager", "worker"):
        raise errors.Invalid(f"constraint {text!r}: a role is manager or worker, not {value!r}")
    return Constraint(text=text, attribute=attribute, negated=operator == "!=", value=value)


def parse_spread(text: str) -> Attribute:
    """What a spread preference spreads over. Raises Invalid, with the accepted forms."""
    return _attribute(text.strip(), f"placement preference spread={text!r}")


def lenient_constraint(text: str) -> Constraint:
    """As parse_constraint for text that is already stored: what cannot be read matches no node, so
    that one bad object stops one service and not the control loop.
    """
    try:
        return parse_constraint(text)
    except errors.Invalid:
        return Constraint(text=text, attribute=None, negated=False, value="")


def _attribute(key: str, subject: str) -> Attribute:
    if not _KEY.fullmatch(key):
        raise errors.Invalid(f"{subject}: key {key!r} is not one of {', '.join(_KEYS_FOR_PEOPLE)}")
    lower = key.lower()
    if lower in _ATTRIBUTES:
        return Attribute(lower)
    for prefix in (_NODE_LABELS, _ENGINE_LABELS):
        if lower.startswith(prefix) and len(key) > len(prefix):
            return Attribute(prefix, key[len(prefix) :])
    near = difflib.get_close_matches(lower, _KEYS_FOR_PEOPLE, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise errors.Invalid(
        f"{subject}: unknown key {key!r}, accepted are {', '.join(_KEYS_FOR_PEOPLE)}{hint}"
    )


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _same_address(found: str, wanted: str) -> bool:
    network = _network(wanted)
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    return network is not None and address.version == network.version and address in network
