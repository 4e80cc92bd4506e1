"""Which nodes can take a task: the filters, in the order in which they are asked.

    ready > availability > revoked > constraint > platform > runtime      what the node is
    > resources > host_port > max_replicas > affinity                     what is left of it

At `runtime` a node falls out that has not got it, and for as long as the runtime takes no new tasks
(its engine does not answer, its disk is full). `affinity` are the constraints on the services
there: they change as tasks come and go.

A node is counted where it falls out first, so that an account's counts add up to the number of
nodes. Here is one node at a time: `fits` says how many tasks it can take, `rejection` why it is 0.
columns.py and explain.py ask the same of all nodes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manager.scheduler.columns import UNLIMITED
from manager.scheduler.nodeinfo import NodeInfo
from manager.scheduler.requirement import GpuAsk, HostPort, Requirement
from swarm.gpus import is_named, misfit
from swarm.v1 import Availability, GenericResource, Gpu, Node, NodeDescription, NodeState

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
    "affinity",
)


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
    lacks = need.static.lacks(node)
    return None if lacks is None else Rejection(*lacks)


def hindered(node: Node, need: Requirement) -> Rejection | None:
    """Whether the runtimes that would do take no new tasks just now."""
    why = need.static.hindrance.of(node)
    return None if why is None else Rejection("runtime", why)


def barred(node: Node, need: Requirement) -> Rejection | None:
    """Why the node may not have tasks with this need now, whatever is free of it."""
    return unavailable(node) or unsuitable(node, need) or hindered(node, need)


def unseen(node: Node) -> bool:
    """Whether the node has yet to say what it is: it has joined and was never heard. Then what it
    could take is not known, whatever the filters make of it.
    """
    said = node.description
    return said is None or said == NodeDescription(hostname=said.hostname)


def fits(info: NodeInfo, need: Requirement, service_id: str) -> int:
    """How many tasks with this need the node can take now, by what is left of it."""
    need = need.on(info.declared)
    room = UNLIMITED
    if need.cpu:
        room = min(room, (info.cpu_total - info.cpu_used) // need.cpu)
    if need.memory:
        room = min(room, (info.memory_total - info.memory_used) // need.memory)
    if need.pids and (free := info.pids_free()) is not None:
        room = min(room, free // need.pids)
    if need.max_replicas:
        room = min(room, need.max_replicas - info.by_service.get(service_id, 0))
    if room <= 0 or need.unknown_devices:
        return 0
    if need.counts_only:
        return room
    for kind, count in need.generic:
        room = min(room, (info.generic_free(kind) - need.named_of(kind)) // count)
    if need.generic_named:
        room = min(room, 1 if named_there(info, need) else 0)
    if need.gpus is not None and room > 0:
        room = min(room, gpu_room(info, need.gpus))
    if need.host_ports:
        room = min(room, 0 if port_conflict(info, need) else 1)
    return max(0, room)


def named_there(info: NodeInfo, need: Requirement) -> bool:
    """Whether the named generic instances are all there and free."""
    return all(
        name in info.named_total.get(kind, ()) and (kind, name) not in info.named_used
        for kind, name in need.generic_named
    )


def gpu_room(info: NodeInfo, ask: GpuAsk) -> int:
    """How many tasks with this ask the node's GPUs suffice for."""
    if not info.usable_gpus:
        return 0
    free, memory = info.gpu_free()
    suits = gpus_that_suit(info.usable_gpus, ask, free, memory)
    if ask.all:
        return 1 if len(suits) == len(info.usable_gpus) else 0
    if ask.ids:
        named = named_gpus(info, ask)
        if None in named or not set(named) <= set(suits):
            return 0
        if len(suits) - len(named) < ask.count:
            return 0
        return 1
    if not ask.shared:
        return len(suits) // ask.count if ask.count else 0
    by_share = [free[i] // ask.share for i in suits]
    if ask.memory_bytes:
        by_share = [
            min(room, memory[i] // ask.memory_bytes)
            for i, room in zip(suits, by_share, strict=True)
        ]
    return sum(by_share)


def gpus_that_suit(
    gpus: Sequence[Gpu], ask: GpuAsk, free: Sequence[int], memory: Sequence[int]
) -> list[int]:
    """Indices of the GPUs that a task may have now."""
    plain = not (ask.models or ask.capability or ask.vendor)
    return [
        i
        for i, gpu in enumerate(gpus)
        if free[i] >= ask.share
        and memory[i] >= ask.memory_bytes
        and (plain or not misfit(ask, gpu))
    ]


def named_gpus(info: NodeInfo, ask: GpuAsk) -> list[int | None]:
    """Indices of the GPUs asked for by uuid, CDI name or index; None: it is not there."""
    out: list[int | None] = []
    for name in ask.ids:
        found = (i for i, gpu in enumerate(info.usable_gpus) if is_named(name, gpu))
        out.append(next(found, None))
    return out


def port_conflict(info: NodeInfo, need: Requirement) -> HostPort | None:
    """The first host port that a task on the node holds already. All addresses clash with each."""
    for port, protocol, address in need.host_ports:
        for taken, their_protocol, theirs in info.ports:
            same = (taken, their_protocol) == (port, protocol)
            if same and (not address or not theirs or address == theirs):
                return (port, protocol, address)
    return None


def shortages(info: NodeInfo, need: Requirement, *, empty: bool = False) -> list[Rejection]:
    """All dimensions in which the node has too little, in their order; `empty`: even if nothing
    ran on it.
    """
    need = need.on(info.declared)
    out = []
    cpu = info.cpu_total - (0 if empty else info.cpu_used)
    if need.cpu > cpu:
        out.append(Rejection("resources", "cpu", need.cpu, cpu))
    memory = info.memory_total - (0 if empty else info.memory_used)
    if need.memory > memory:
        out.append(Rejection("resources", "memory", need.memory, memory))
    pids = info.pids_total if empty and info.pids_total else info.pids_free()
    if pids is not None and need.pids > pids:
        out.append(Rejection("resources", "pids", need.pids, pids))
    for kind, count in need.generic:
        total = info.generic_total.get(kind, 0) + len(info.named_total.get(kind, ()))
        have = (total if empty else info.generic_free(kind)) - need.named_of(kind)
        if count > have:
            out.append(Rejection("resources", kind, count, have))
    for kind, name in need.generic_named:
        there = name in info.named_total.get(kind, ())
        if not there or (not empty and (kind, name) in info.named_used):
            out.append(Rejection("resources", f"{kind}={name}", 1, 0))
    if need.unknown_devices:
        out.append(Rejection("resources", f"device {need.unknown_devices[0]}", 1, 0))
    if need.gpus is not None:
        short = gpu_shortage(info, need.gpus, empty=empty)
        if short is not None:
            out.append(short)
    return out


def shortage(info: NodeInfo, need: Requirement, *, empty: bool = False) -> Rejection | None:
    """The first dimension in which the node has too little."""
    found = shortages(info, need, empty=empty)
    return found[0] if found else None


def gpu_shortage(info: NodeInfo, ask: GpuAsk, *, empty: bool) -> Rejection | None:
    """What of the GPUs falls short: how they are first, then how much of them is free."""
    gpus = info.usable_gpus
    fitting = [i for i, gpu in enumerate(gpus) if not misfit(ask, gpu)]
    wanted = max(ask.wanted, len(gpus)) if ask.all else ask.wanted
    if len(fitting) < wanted and gpus:
        why = next((w for gpu in gpus if (w := misfit(ask, gpu))), "")
        if why == "gpu_memory":
            best = max(g.memory_bytes for g in gpus)
            if best < ask.memory_bytes:
                return Rejection("resources", "gpu_memory", ask.memory_bytes, best)
        if why:
            return Rejection("resources", f"gpu {_how(ask, why)}", wanted, len(fitting))
    free, memory = info.gpu_free(empty=empty)
    suits = gpus_that_suit(gpus, ask, free, memory)
    for name, index in zip(ask.ids, named_gpus(info, ask), strict=True):
        if index is None or index not in suits:
            return Rejection("resources", f"gpu {name}", 1, 0)
    if ask.shared and not suits:
        best = max((free[i] for i in fitting), default=0)
        if best < ask.share:
            return Rejection("resources", "gpu_share", ask.share, best)
        best = max((memory[i] for i in fitting), default=0)
        return Rejection("resources", "gpu_memory", ask.memory_bytes, best)
    if len(suits) < wanted or not gpus:
        return Rejection("resources", "gpu", wanted, len(suits))
    return None


def _how(ask: GpuAsk, why: str) -> str:
    """The part of the ask that a GPU does not meet, for people."""
    match why:
        case "model":
            return f"of model {' or '.join(ask.models)}"
        case "capability":
            return f"with compute capability {ask.capability}"
        case "vendor":
            return f"of {ask.vendor}"
        case _:
            return "with so much memory"


def rejection(info: NodeInfo, need: Requirement, service_id: str) -> Rejection | None:
    """Why the node cannot take one more task now; None: it can. Constraints on the services there
    are the table's to judge.
    """
    static = barred(info.node, need) or shortage(info, need)
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


def choose_gpus(info: NodeInfo, ask: GpuAsk) -> tuple[str, ...]:
    """The GPUs for one task on a node that fits, where the policy has none to choose: those named
    and more in the node's order, or all.
    """
    free, memory = info.gpu_free()
    suits = gpus_that_suit(info.usable_gpus, ask, free, memory)
    if ask.all:
        return tuple(info.gpus[i] for i in suits)
    named = [i for i in named_gpus(info, ask) if i is not None]
    others = [i for i in suits if i not in named]
    return tuple(info.gpus[i] for i in (*named, *others[: ask.count]))
