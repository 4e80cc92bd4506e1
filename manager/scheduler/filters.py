"""Which nodes can take a task: the filters, in the order in which they are asked.

    ready > availability > revoked > constraint > platform > runtime      what the node is
    > resources > host_port > max_replicas                                what is left of it

A node is counted where it falls out first, so that an account's counts add up to the number of
nodes. `fits` is the fast way to the number of tasks a node can take; `rejection` says why it is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from manager.scheduler.constraints import normal_arch
from manager.scheduler.requirement import PROCESS_RUNTIME, GpuClaim, HostPort, Requirement
from manager.scheduler.table import NodeInfo
from swarm.v1 import Availability, GenericResource, Node, NodeDescription, NodeState

FILTERS = (
    "ready",
    "availability",
    "revoked",
    "constraint",
    "platform",
    "runtime",
    "resources",
    "host_port",
    "max_replicas",
)
UNLIMITED = 1 << 40


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why one node cannot take the task. `needed` and `best` are set for amounts: what one task
    needs and what this node has left, in the dimension's unit.
    """

    filter: str
    detail: str = ""
    needed: int = 0
    best: int = 0


def unavailable(node: Node) -> Rejection | None:
    """The filters on the node's condition: it may change by itself or at an operator's word."""
    state = node.status.state if node.status else NodeState.UNKNOWN
    if state != NodeState.READY:
        return Rejection("ready", state.name.lower())
    availability = node.spec.availability if node.spec else Availability.UNSPECIFIED
    if availability not in (Availability.ACTIVE, Availability.UNSPECIFIED):
        return Rejection("availability", availability.name.lower())
    if node.revoked:
        return Rejection("revoked")
    return None


def unsuitable(node: Node, need: Requirement) -> Rejection | None:
    """The filters on what the node is."""
    for constraint in need.constraints:
        if not constraint.matches(node):
            return Rejection("constraint", constraint.text)
    if need.platforms and not _platform_fits(node, need):
        return Rejection("platform", platforms_text(need))
    runtimes = node.description.runtimes if node.description else ()
    if need.runtime:
        fits = need.runtime in runtimes
    elif need.needs_image:
        fits = any(r != PROCESS_RUNTIME for r in runtimes)
    else:
        fits = bool(runtimes)
    return None if fits else Rejection("runtime", need.runtime)


def unseen(node: Node) -> bool:
    """Whether the node has yet to say what it is: it has joined and was never heard. Then what it
    could take is not known, whatever the filters make of it.
    """
    said = node.description
    return said is None or said == NodeDescription(hostname=said.hostname)


def platforms_text(need: Requirement) -> str:
    """The platforms asked for, as people write them."""
    return " or ".join(f"{os or 'any'}/{arch or 'any'}" for os, arch in need.platforms)


def _platform_fits(node: Node, need: Requirement) -> bool:
    platform = node.description.platform if node.description else None
    if platform is None:
        return False
    mine = (platform.os.lower(), normal_arch(platform.architecture))
    return any((not os or os == mine[0]) and (not a or a == mine[1]) for os, a in need.platforms)


def fits(info: NodeInfo, need: Requirement, service_id: str) -> int:
    """How many tasks with this need the node can take now, by what is left of it."""
    room = UNLIMITED
    if need.cpu:
        room = min(room, (info.cpu_total - info.cpu_used) // need.cpu)
    if need.memory:
        room = min(room, (info.memory_total - info.memory_used) // need.memory)
    if need.max_replicas:
        room = min(room, need.max_replicas - info.by_service.get(service_id, 0))
    if room <= 0 or need.unknown_devices:
        return 0
    if need.counts_only:
        return room
    for kind, count in need.generic:
        room = min(room, (info.generic_free(kind) - need.named_of(kind)) // count)
    if need.generic_named:
        free = all(
            n in info.named_total.get(k, ()) and (k, n) not in info.named_used
            for k, n in need.generic_named
        )
        room = min(room, 1 if free else 0)
    if need.gpus is not None:
        room = min(room, _gpu_room(info, need.gpus))
    if need.host_ports:
        room = min(room, 0 if port_conflict(info, need) else 1)
    return max(0, room)


def _gpu_room(info: NodeInfo, claim: GpuClaim) -> int:
    free = info.free_gpus()
    if claim.all:
        return 1 if info.gpus and len(free) == len(info.gpus) else 0
    if claim.ids:
        named = _named_gpus(info, claim)
        if not all(uuid in free for uuid in named):
            return 0
        return 1 if len(free) - len(named) >= claim.count else 0
    return len(free) // claim.count


def _named_gpus(info: NodeInfo, claim: GpuClaim) -> list[str]:
    """uuids of the GPUs asked for by uuid or by index; an index counts as the driver does."""
    gpus = info.node.description.gpus if info.node.description else ()
    by_index = {str(g.index): g.uuid for g in gpus if not g.parent_uuid}
    return [by_index.get(i, i) for i in claim.ids]


def port_conflict(info: NodeInfo, need: Requirement) -> HostPort | None:
    """The first host port that a task on the node holds already. All addresses clash with each."""
    for port, protocol, address in need.host_ports:
        for taken, their_protocol, theirs in info.ports:
            same = (taken, their_protocol) == (port, protocol)
            if same and (not address or not theirs or address == theirs):
                return (port, protocol, address)
    return None


def shortage(info: NodeInfo, need: Requirement, *, empty: bool = False) -> Rejection | None:
    """The first dimension in which the node has too little; `empty`: even if nothing ran on it."""
    cpu = info.cpu_total - (0 if empty else info.cpu_used)
    if need.cpu > cpu:
        return Rejection("resources", "cpu", need.cpu, cpu)
    memory = info.memory_total - (0 if empty else info.memory_used)
    if need.memory > memory:
        return Rejection("resources", "memory", need.memory, memory)
    for kind, count in need.generic:
        total = info.generic_total.get(kind, 0) + len(info.named_total.get(kind, ()))
        have = (total if empty else info.generic_free(kind)) - need.named_of(kind)
        if count > have:
            return Rejection("resources", kind, count, have)
    for kind, name in need.generic_named:
        there = name in info.named_total.get(kind, ())
        if not there or (not empty and (kind, name) in info.named_used):
            return Rejection("resources", f"{kind}={name}", 1, 0)
    if need.unknown_devices:
        return Rejection("resources", f"device {need.unknown_devices[0]}", 1, 0)
    if need.gpus is not None:
        return _gpu_shortage(info, need.gpus, empty=empty)
    return None


def _gpu_shortage(info: NodeInfo, claim: GpuClaim, *, empty: bool) -> Rejection | None:
    free = list(info.gpus) if empty else info.free_gpus()
    if claim.all:
        short = not info.gpus or len(free) < len(info.gpus)
        return Rejection("resources", "gpu", max(1, len(info.gpus)), len(free)) if short else None
    for wanted, uuid in zip(claim.ids, _named_gpus(info, claim), strict=True):
        if uuid not in free:
            return Rejection("resources", f"gpu {wanted}", 1, 0)
    if claim.wanted > len(free):
        return Rejection("resources", "gpu", claim.wanted, len(free))
    return None


def rejection(info: NodeInfo, need: Requirement, service_id: str) -> Rejection | None:
    """Why the node cannot take one more task now; None: it can."""
    static = unavailable(info.node) or unsuitable(info.node, need) or shortage(info, need)
    if static is not None:
        return static
    if (port := port_conflict(info, need)) is not None:
        return Rejection("host_port", f"{port[0]}/{port[1]}")
    if need.max_replicas and info.by_service.get(service_id, 0) >= need.max_replicas:
        return Rejection("max_replicas", "", need.max_replicas, 0)
    return None


def choose_generic(info: NodeInfo, need: Requirement) -> tuple[GenericResource, ...]:
    """The instances for one task on a node that fits: names where the kind has them."""
    out = [GenericResource(kind=kind, name=name) for kind, name in need.generic_named]
    reserved = set(need.generic_named)
    for kind, count in need.generic:
        names = [n for n in info.named_free(kind) if (kind, n) not in reserved][:count]
        out.extend(GenericResource(kind=kind, name=name) for name in names)
        if len(names) < count:
            out.append(GenericResource(kind=kind, count=count - len(names)))
    return tuple(out)


def choose_gpus(info: NodeInfo, need: Requirement) -> tuple[str, ...]:
    """The GPUs for one task on a node that fits."""
    claim = need.gpus
    if claim is None:
        return ()
    free = info.free_gpus()
    if claim.all:
        return tuple(free)
    named = _named_gpus(info, claim)
    others = [uuid for uuid in free if uuid not in named]
    return (*named, *others[: claim.count])
