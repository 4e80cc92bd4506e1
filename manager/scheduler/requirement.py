"""What one version of a service asks of a node, worked out once from its spec.

All tasks of one version are alike to the scheduler; they share one Requirement.
"""

from __future__ import annotations

from dataclasses import dataclass

from manager.scheduler.constraints import (
    Attribute,
    Constraint,
    lenient_constraint,
    normal_arch,
    parse_spread,
)
from swarm import errors
from swarm.v1 import DeviceRequest, EndpointSpec, GenericResource, Resources, ServiceSpec, TaskSpec

PROCESS_RUNTIME = "process"
ANY_ENGINE = ""
_GPU_CAPABILITIES = frozenset({"gpu", "nvidia", "compute", "utility", "graphics", "video"})
_GPU_DRIVERS = frozenset({"nvidia", "amd", "cdi"})

HostPort = tuple[int, str, str]
"""Port, protocol, address to listen on ("" all)."""


@dataclass(frozen=True, slots=True)
class GpuClaim:
    """GPUs wanted by one task: these by name, and so many more; `all`: every GPU of the node."""

    count: int = 0
    ids: tuple[str, ...] = ()
    all: bool = False

    @property
    def wanted(self) -> int:
        """Pieces, for people; `all` asks for one at least."""
        return max(1, self.count + len(self.ids)) if self.all else self.count + len(self.ids)


@dataclass(frozen=True, slots=True)
class Requirement:
    """Amounts as in Resources; `generic` by kind, `generic_named` one instance each."""

    cpu: int = 0
    memory: int = 0
    generic: tuple[tuple[str, int], ...] = ()
    generic_named: tuple[tuple[str, str], ...] = ()
    gpus: GpuClaim | None = None
    # Capabilities of device requests that are no GPUs: no node offers them.
    unknown_devices: tuple[str, ...] = ()
    host_ports: tuple[HostPort, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    spreads: tuple[Attribute, ...] = ()
    # (os, architecture) in Go's spelling, "" any; empty: any platform.
    platforms: tuple[tuple[str, str], ...] = ()
    runtime: str = ""
    # False: a task without an image, which any runtime may take where `runtime` is empty.
    needs_image: bool = False
    max_replicas: int = 0

    @property
    def counts_only(self) -> bool:
        """Whether a claim is CPU and memory alone."""
        return not (self.generic or self.generic_named or self.gpus or self.host_ports)

    def named_of(self, kind: str) -> int:
        """How many named instances of the kind are asked for."""
        return sum(1 for k, _ in self.generic_named if k == kind)


NOTHING = Requirement()
"""What a task claims whose spec is gone."""


def requirement_of(spec: ServiceSpec | None) -> Requirement:
    """The requirement of a service's spec; never raises for a stored one."""
    task = spec.task if spec else None
    if spec is None or task is None:
        return Requirement(host_ports=_host_ports(spec.endpoint if spec else None))
    reserved = (task.resources.reservations if task.resources else None) or Resources()
    placement = task.placement
    gpus, unknown = _devices(reserved.devices)
    return Requirement(
        cpu=max(0, reserved.cpu_nano),
        memory=max(0, reserved.memory_bytes),
        generic=_counts(reserved.generic),
        generic_named=tuple(sorted((g.kind, g.name) for g in reserved.generic if g.name)),
        gpus=gpus,
        unknown_devices=unknown,
        host_ports=_host_ports(spec.endpoint),
        constraints=tuple(lenient_constraint(c) for c in placement.constraints)
        if placement
        else (),
        spreads=_spreads(task),
        platforms=tuple((p.os.lower(), normal_arch(p.architecture)) for p in placement.platforms)
        if placement
        else (),
        runtime=task.runtime,
        needs_image=bool(task.container and task.container.image),
        max_replicas=placement.max_replicas if placement else 0,
    )


def _counts(generic: tuple[GenericResource, ...]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for g in generic:
        if not g.name:
            counts[g.kind] = counts.get(g.kind, 0) + (1 if g.count is None else g.count)
    return tuple(sorted((kind, count) for kind, count in counts.items() if count > 0))


def _devices(requests: tuple[DeviceRequest, ...]) -> tuple[GpuClaim | None, tuple[str, ...]]:
    """The GPU claim of all requests together, and what is asked for that is no GPU."""
    if not requests:
        return None, ()
    count, ids, every, unknown = 0, list[str](), False, list[str]()
    for request in requests:
        capabilities = {c.lower() for c in request.capabilities}
        if not capabilities & _GPU_CAPABILITIES and request.driver.lower() not in _GPU_DRIVERS:
            unknown.append(",".join(sorted(capabilities)) or request.driver or "unnamed")
        elif request.device_ids:
            ids.extend(request.device_ids)
        elif request.count is None:
            count += 1
        elif request.count < 0:
            every = True
        else:
            count += request.count
    claim = GpuClaim(count=count, ids=tuple(sorted(set(ids))), all=every)
    return (claim if claim.wanted else None), tuple(sorted(unknown))


def _host_ports(endpoint: EndpointSpec | None) -> tuple[HostPort, ...]:
    """Ports that only one task of a node can have. 0 is left out: there the node chooses."""
    ports = endpoint.ports if endpoint else ()
    return tuple(
        sorted(
            (p.published_port, p.protocol or "tcp", p.host_ip)
            for p in ports
            if p.publish_mode == "host" and p.published_port
        )
    )


def _spreads(task: TaskSpec) -> tuple[Attribute, ...]:
    """Preferences that cannot be read are passed over: they rank nodes, they exclude none."""
    out = []
    for preference in task.placement.preferences if task.placement else ():
        try:
            out.append(parse_spread(preference.spread))
        except errors.Invalid:
            continue
    return tuple(out)
