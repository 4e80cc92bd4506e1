"""What a service may refer to, and how a name that is not declared is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cli.compose.at import At
from cli.compose.between import Aliases
from cli.compose.problems import Report, nearest
from swarm.v1 import Driver

NAMESPACE_LABEL = "com.docker.stack.namespace"
IMAGE_LABEL = "com.docker.stack.image"
PROCESS = "process"


@dataclass(frozen=True, slots=True)
class Declared:
    """One entry of the file's networks, volumes, secrets or configs."""

    full_name: str
    external: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    driver: Driver | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a service may refer to. `left_out` are services whose profiles are not active."""

    stack: str
    report: Report
    networks: Mapping[str, Declared]
    volumes: Mapping[str, Declared]
    secrets: Mapping[str, Declared]
    configs: Mapping[str, Declared]
    services: Mapping[str, At]
    left_out: frozenset[str]
    aliases: Aliases

    def full(self, name: str) -> str:
        return f"{self.stack}_{name}"


def lookup(kind: str, name: str, at: At, declared: Mapping[str, Declared]) -> Declared | None:
    found = declared.get(name)
    if found is None:
        near = nearest(name, declared)
        hint = f'did you mean "{near}"? Otherwise ' if near else ""
        at.fail(
            f'the {kind} "{name}" is not declared',
            f"{hint}declare it below {kind}s: at the top level",
        )
    return found


def deep(at: At, *path: str) -> At | None:
    """The value at a path of keys; None where one of them is absent or null."""
    found: At | None = at
    for key in path:
        found = found.set_at(key) if found is not None else None
    return found


def strings_of(at: At, key: str, under: str = "") -> dict[str, str]:
    found = deep(at, under, key) if under else at.set_at(key)
    return dict(sorted(found.mapping().items())) if found is not None else {}
