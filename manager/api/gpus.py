"""All GPUs of the cluster, and what tasks hold of them. A pure function of a view.

A task holds the GPUs it was given until it has ended, as in the scheduler's table: also while it
stops, and while its node is out of reach.
"""

from __future__ import annotations

from manager.api.lookup import name_of
from manager.scheduler import spec_of_version, unavailable
from manager.store import View
from swarm import errors, states
from swarm.gpus import WHOLE, GpuAsk, ask_of
from swarm.v1 import (
    Gpu,
    GpuHolder,
    GpuUsage,
    ListGpusResponse,
    Node,
    Task,
    TaskState,
)

__all__ = ["list_gpus"]


def list_gpus(view: View) -> ListGpusResponse:
    """See the contract. Cost: nodes, and the tasks on those that have GPUs."""
    nodes = [n for n in view.all(Node) if n.description is not None and n.description.gpus]
    asks: dict[tuple[str, int], GpuAsk | None] = {}
    found: list[GpuUsage] = []
    for node in sorted(nodes, key=lambda n: (_hostname(n), n.id)):
        found += _of_node(view, node, asks)
    return ListGpusResponse(gpus=tuple(found))


def _of_node(view: View, node: Node, asks: dict[tuple[str, int], GpuAsk | None]) -> list[GpuUsage]:
    gpus = node.description.gpus if node.description is not None else ()
    split = {gpu.parent_uuid for gpu in gpus if gpu.parent_uuid}
    held: dict[str, list[tuple[Task, GpuAsk | None]]] = {}
    for task in sorted(view.by(Task, "node", node.id), key=lambda t: t.id):
        state = task.status.state if task.status is not None else TaskState.NEW
        if task.assigned_gpus and not states.ended(state):
            key = (task.service_id, task.spec_version)
            if key not in asks:
                asks[key] = _ask(view, *key)
            for uuid in task.assigned_gpus:
                held.setdefault(uuid, []).append((task, asks[key]))
    takes = unavailable(node) is None
    return [
        _usage(view, node, gpu, held.get(gpu.uuid, []), takes=takes and gpu.uuid not in split)
        for gpu in _in_order(gpus)
    ]


def _usage(
    view: View, node: Node, gpu: Gpu, held: list[tuple[Task, GpuAsk | None]], *, takes: bool
) -> GpuUsage:
    share = memory = 0
    holders = []
    for task, ask in held:
        part = ask.share if ask is not None else WHOLE
        share += part
        memory += gpu.memory_bytes if part >= WHOLE or ask is None else ask.memory_bytes
        holders.append(GpuHolder(task_id=task.id, name=name_of(task, view), share=part))
    return GpuUsage(
        node_id=node.id,
        hostname=_hostname(node),
        gpu=gpu,
        claimed_share=share,
        claimed_memory_bytes=memory,
        holders=tuple(sorted(holders, key=lambda h: (h.name, h.task_id))),
        usable=takes and gpu.healthy,
    )


def _in_order(gpus: tuple[Gpu, ...]) -> list[Gpu]:
    """Whole ones in the node's order, each followed by its instances."""
    whole = [gpu for gpu in gpus if not gpu.parent_uuid]
    known = {gpu.uuid for gpu in whole}
    order = []
    for gpu in whole:
        order.append(gpu)
        order += [part for part in gpus if part.parent_uuid == gpu.uuid]
    return order + [part for part in gpus if part.parent_uuid and part.parent_uuid not in known]


def _hostname(node: Node) -> str:
    return (node.description.hostname if node.description is not None else "") or node.id


def _ask(view: View, service_id: str, spec_version: int) -> GpuAsk | None:
    """What that version asks for; None: it cannot be known any more, so whole GPUs are assumed."""
    spec = spec_of_version(view, service_id, spec_version)
    if spec is None or spec.task is None or spec.task.resources is None:
        return None
    try:
        return ask_of(spec.task.resources.reservations)
    except errors.Invalid:
        return None  # stored before it was checked
