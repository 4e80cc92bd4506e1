"""What one version of a service asks of a node, worked out once from its spec.

All tasks of one version are alike to the scheduler; they share one Requirement.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

from manager.scheduler.constraints import (
    Attribute,
    Constraint,
    lenient_constraint,
    normal_arch,
    parse_constraint,
    parse_spread,
)
from manager.scheduler.gpus import GpuNeed
from manager.scheduler.masks import PROCESS_RUNTIME, Static
from manager.store import View
from swarm import errors
from swarm.gpus import GpuAsk, ask_of, is_gpu_kind, is_gpu_request
from swarm.v1 import (
    EndpointSpec,
    GenericResource,
    Resources,
    Service,
    ServiceRevision,
    ServiceSpec,
    TaskSpec,
)

__all__ = [
    "NOTHING",
    "PROCESS_RUNTIME",
    "STRATEGIES",
    "GpuAsk",
    "HostPort",
    "Requirement",
    "requirement_of",
]

SPREAD, BINPACK = "spread", "binpack"
STRATEGIES = (SPREAD, BINPACK)

# More is no limit, and would not fit into the columns.
_REPLICAS_MAX = 1 << 40

HostPort = tuple[int, str, str]
"""Port, protocol, address to listen on ("" all)."""


@dataclass(frozen=True)
class Requirement:
    """Amounts as in Resources; `generic` by kind, `generic_named` one instance each. Kinds that
    mean GPUs are in `gpus` (see `on`).
    """

    cpu: int = 0
    memory: int = 0
    pids: int = 0
    generic: tuple[tuple[str, int], ...] = ()
    generic_named: tuple[tuple[str, str], ...] = ()
    gpus: GpuAsk | None = None
    # Capabilities of device requests that are no GPUs, and asks that cannot be read: no node
    # offers them.
    unknown_devices: tuple[str, ...] = ()
    host_ports: tuple[HostPort, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    spreads: tuple[Attribute, ...] = ()
    # Conditions with weights; where more of them hold comes first.
    affinities: tuple[tuple[Constraint, int], ...] = ()
    # spread or binpack; empty: the cluster's.
    strategy: str = ""
    # (os, architecture) in Go's spelling, "" any; empty: any platform.
    platforms: tuple[tuple[str, str], ...] = ()
    runtime: str = ""
    # False: a task without an image, which any runtime may take where `runtime` is empty.
    needs_image: bool = False
    max_replicas: int = 0
    priority: int = 0

    @cached_property
    def static(self) -> Static:
        """What it asks of the node itself; constraints on the services there are left out."""
        return Static(
            constraints=tuple(c for c in self.constraints if not c.of_tasks),
            platforms=self.platforms,
            runtime=self.runtime,
            image=self.needs_image,
        )

    @cached_property
    def among(self) -> tuple[Constraint, ...]:
        """The constraints on the services with tasks on a node."""
        return tuple(c for c in self.constraints if c.of_tasks)

    @cached_property
    def counts_only(self) -> bool:
        """Whether a claim is CPU, memory and processes alone."""
        return not (
            self.generic
            or self.generic_named
            or self.gpus
            or self.host_ports
            or self.unknown_devices
        )

    @cached_property
    def of_service(self) -> bool:
        """Whether a place also depends on where tasks of certain services are."""
        return bool(self.max_replicas or self.among)

    @cached_property
    def gpu_kinds(self) -> frozenset[str]:
        """Generic kinds that are served by a node's GPUs, where it does not declare them."""
        ask = self.gpus
        if ask is None:
            return frozenset()
        return frozenset(kind for kind, _ in (*ask.generic, *ask.generic_named))

    @cached_property
    def gpu_need(self) -> GpuNeed:
        """The same for the placement of GPUs. Named ones and `all` are not in it."""
        ask = self.gpus
        if ask is None:
            return GpuNeed(cpu=self.cpu, memory=self.memory)
        return GpuNeed(
            cpu=self.cpu,
            memory=self.memory,
            count=ask.count or (1 if ask.ids or ask.all else 0),
            share=ask.share,
            models=frozenset(ask.models),
            gpu_memory_bytes=ask.memory_bytes,
            capability=ask.capability,
            vendor=ask.vendor,
        )

    @cached_property
    def _variants(self) -> dict[frozenset[str], Requirement]:
        return {}

    def on(self, declared: Collection[str]) -> Requirement:
        """The requirement on a node that declares these kinds of generic resources: of a kind that
        means GPUs it is served by the node's generic account.
        """
        if not self.gpu_kinds:
            return self
        kinds = frozenset(kind for kind in self.gpu_kinds if kind in declared)
        if not kinds or self.gpus is None:
            return self
        found = self._variants.get(kinds)
        if found is None:
            generic = [*self.generic, *(g for g in self.gpus.generic if g[0] in kinds)]
            named = [*self.generic_named, *(g for g in self.gpus.generic_named if g[0] in kinds)]
            found = self._variants[kinds] = replace(
                self,
                gpus=self.gpus.served_by(kinds),
                generic=tuple(sorted(generic)),
                generic_named=tuple(sorted(named)),
            )
        return found

    def named_of(self, kind: str) -> int:
        """How many named instances of the kind are asked for."""
        return sum(1 for k, _ in self.generic_named if k == kind)


NOTHING = Requirement()
"""What a task claims whose spec is gone."""


def spec_of_version(view: View, service_id: str, version: int) -> ServiceSpec | None:
    """The spec that tasks of the version were made from; None when it is not kept any more."""
    revision = view.get(ServiceRevision, f"{service_id}.{version}")
    if revision is not None:
        return revision.spec
    service = view.get(Service, service_id)
    return service.spec if service is not None and service.spec_version == version else None


def requirement_of(spec: ServiceSpec | None) -> Requirement:
    """The requirement of a service's spec; never raises for a stored one."""
    task = spec.task if spec else None
    if spec is None or task is None:
        return Requirement(host_ports=_host_ports(spec.endpoint if spec else None))
    reserved = (task.resources.reservations if task.resources else None) or Resources()
    placement = task.placement
    gpus, unknown = _devices(reserved)
    own = tuple(g for g in reserved.generic if not is_gpu_kind(g.kind))
    return Requirement(
        cpu=max(0, reserved.cpu_nano),
        memory=max(0, reserved.memory_bytes),
        pids=max(0, reserved.pids),
        generic=_counts(own),
        generic_named=tuple(sorted((g.kind, g.name) for g in own if g.name)),
        gpus=gpus,
        unknown_devices=unknown,
        host_ports=_host_ports(spec.endpoint),
        constraints=tuple(lenient_constraint(c) for c in placement.constraints)
        if placement
        else (),
        spreads=_spreads(task),
        affinities=_affinities(task),
        strategy=placement.strategy if placement and placement.strategy in STRATEGIES else "",
        platforms=tuple((p.os.lower(), normal_arch(p.architecture)) for p in placement.platforms)
        if placement
        else (),
        runtime=task.runtime,
        needs_image=bool(task.container and task.container.image),
        max_replicas=min(placement.max_replicas, _REPLICAS_MAX) if placement else 0,
        priority=spec.priority,
    )


def _counts(generic: tuple[GenericResource, ...]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for g in generic:
        if not g.name:
            counts[g.kind] = counts.get(g.kind, 0) + (1 if g.count is None else g.count)
    return tuple(sorted((kind, count) for kind, count in counts.items() if count > 0))


def _devices(reserved: Resources) -> tuple[GpuAsk | None, tuple[str, ...]]:
    """The ask for GPUs, and what is asked for that no node offers."""
    unknown = [
        ",".join(sorted(c.lower() for c in request.capabilities)) or request.driver or "unnamed"
        for request in reserved.devices
        if not is_gpu_request(request)
    ]
    try:
        ask = ask_of(reserved)
    except errors.Invalid as error:
        # Stored before the rule was made: it waits, and says what is wrong.
        return None, (error.message, *sorted(unknown))
    return (ask if ask is not None and ask.wanted else None), tuple(sorted(unknown))


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
        if not preference.spread:
            continue
        try:
            out.append(parse_spread(preference.spread))
        except errors.Invalid:
            continue
    return tuple(out)


def _affinities(task: TaskSpec) -> tuple[tuple[Constraint, int], ...]:
    out = []
    for preference in task.placement.preferences if task.placement else ():
        if not preference.affinity:
            continue
        try:
            out.append((parse_constraint(preference.affinity), preference.weight or 1))
        except errors.Invalid:
            continue
    return tuple(out)
