"""Reading and changing a frozen ServiceSpec by path: "task.container.hostname".

Messages on the way that are absent are made with the defaults of Docker's CLI. A path is checked
against the structs when it is used, so that a wrong one fails at once.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from swarm.v1 import (
    ContainerSpec,
    DnsConfig,
    Driver,
    EndpointSpec,
    HealthConfig,
    JobSpec,
    Message,
    Placement,
    Privileges,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
)

__all__ = ["at", "put"]

M = TypeVar("M", bound=Message)

_MADE: dict[str, Message] = {
    "task": TaskSpec(),
    "task.container": ContainerSpec(),
    "task.container.healthcheck": HealthConfig(),
    "task.container.dns": DnsConfig(),
    "task.container.privileges": Privileges(),
    "task.resources": ResourceRequirements(),
    "task.resources.limits": Resources(),
    "task.resources.reservations": Resources(),
    "task.restart": RestartPolicy(),
    "task.placement": Placement(),
    "task.log_driver": Driver(),
    "mode": ServiceMode(),
    # 0 would mean all slots at once; Docker's CLI starts from 1.
    "update": UpdateConfig(parallelism=1),
    "rollback": UpdateConfig(parallelism=1),
    "endpoint": EndpointSpec(),
    "job": JobSpec(),
}


def at(spec: ServiceSpec, path: str) -> Any:
    """The value at a path; the default where a message on the way is absent."""
    value: Any = spec
    walked: list[str] = []
    for name in path.split("."):
        if value is None:
            value = _MADE[".".join(walked)]
        value = getattr(value, name)
        walked.append(name)
    return value


def put(spec: ServiceSpec, path: str, value: Any) -> ServiceSpec:
    """The spec with another value at a path."""
    return _put(spec, path.split("."), 0, value)


def _put(message: M, names: list[str], depth: int, value: Any) -> M:
    name = names[depth]
    if depth + 1 < len(names):
        inner = getattr(message, name)
        if inner is None:
            inner = _MADE[".".join(names[: depth + 1])]
        value = _put(inner, names, depth + 1, value)
    return msgspec.structs.replace(message, **{name: value})
