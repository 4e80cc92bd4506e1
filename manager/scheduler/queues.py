"""The queues of jobs: what their tasks hold, what they may hold, and how far each has come.

The `Ledger` is kept up to date task by task (`sync`), or made afresh; both lead to the same. A task
is in it under its job's queue from the moment it is placed until it has ended, as its claim in the
node table is. Tasks of services are in no queue.

Fair share: dominant resource fairness (Ghodsi et al., NSDI 2011) with weights: the largest part
that the queue holds of any of the cluster's dimensions (CPU, memory, GPUs), divided by its weight;
the queue with the lowest is next. What counts as the cluster is every node that the table knows,
down and drained ones included, so that a node that is away for a minute turns no order around.

A quota is a bound on what a queue's jobs hold, not a promise of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from swarm import errors, gpus
from swarm.quantities import format_bytes, format_cpus
from swarm.v1 import Node, QueueSpec, SchedulingConfig, ServiceSpec

DEFAULT_QUEUE = "default"
# One whole dimension of the cluster; fine enough that one task of a million shows.
SHARE_WHOLE = 10**12
_ONE_NANO = 1_000_000_000  # of one CPU, of one GPU
_GPU_NANO = _ONE_NANO // gpus.WHOLE
# How the dimensions of a quota are written, in order.
_WORDS: tuple[tuple[Callable[[int], str], str], ...] = (
    (format_cpus, "CPUs"),
    (format_bytes, "of memory"),
    (format_cpus, "GPUs"),
    (str, "tasks"),
)


@dataclass(frozen=True, slots=True)
class Amounts:
    """In the units of QueueSpec."""

    cpu_nano: int = 0
    memory_bytes: int = 0
    gpu_nano: int = 0
    tasks: int = 0

    def plus(self, other: Amounts, times: int = 1) -> Amounts:
        """So much and so many times the other."""
        return Amounts(
            self.cpu_nano + times * other.cpu_nano,
            self.memory_bytes + times * other.memory_bytes,
            self.gpu_nano + times * other.gpu_nano,
            self.tasks + times * other.tasks,
        )

    def given(self, gpus: int) -> Amounts:
        """The same of a task that was given so many GPUs: who asked for all of a node's did not say
        how many that are.
        """
        nano = gpus * _ONE_NANO
        if nano > self.gpu_nano > 0 and self.gpu_nano % _ONE_NANO == 0:
            return replace(self, gpu_nano=nano)
        return self


NOTHING_HELD = Amounts()


def amounts_of(spec: ServiceSpec | None) -> Amounts:
    """What one task of the spec holds; one that asks for all GPUs of a node: at least one."""
    task = spec.task if spec else None
    reserved = task.resources.reservations if task and task.resources else None
    if reserved is None:
        return Amounts(tasks=1)
    try:
        ask = gpus.ask_of(reserved)
    except errors.Invalid:
        ask = None  # no node serves it either
    return Amounts(
        cpu_nano=max(0, reserved.cpu_nano),
        memory_bytes=max(0, reserved.memory_bytes),
        gpu_nano=ask.wanted * ask.share * _GPU_NANO if ask is not None else 0,
        tasks=1,
    )


def specs_by_name(config: SchedulingConfig | None) -> dict[str, QueueSpec]:
    """The queues of a cluster, `default` first."""
    named = {q.name: q for q in (config.queues if config else ())}
    first = named.pop(DEFAULT_QUEUE, QueueSpec(name=DEFAULT_QUEUE))
    return {DEFAULT_QUEUE: first, **{name: named[name] for name in sorted(named)}}


def totals_of(nodes: Iterable[Node]) -> Amounts:
    """What the nodes have; MIG instances count as GPUs, in place of the one they are parts of."""
    cpu = memory = pieces = 0
    for node in nodes:
        description = node.description
        if description is None:
            continue
        split = {g.parent_uuid for g in description.gpus if g.parent_uuid}
        pieces += sum(1 for g in description.gpus if g.uuid not in split)
        resources = description.resources
        if resources is None:
            continue
        cpu += resources.cpu_nano
        memory += resources.memory_bytes
        for generic in resources.generic:
            if generic.kind.lower() in gpus.GENERIC_KINDS:
                pieces += 1 if generic.name else generic.count or 0
    return Amounts(cpu, memory, pieces * gpus.WHOLE * _GPU_NANO)


class Ledger:
    """What the tasks of jobs hold, by queue."""

    def __init__(self) -> None:
        self._of_task: dict[str, tuple[str, Amounts]] = {}
        self._held: dict[str, Amounts] = {}
        self._specs: Mapping[str, QueueSpec] = specs_by_name(None)
        self.totals = NOTHING_HELD

    def configure(self, specs: Mapping[str, QueueSpec]) -> None:
        """Takes the cluster's queues."""
        self._specs = specs

    def sync(self, task_id: str, queue: str, amounts: Amounts | None) -> str:
        """Makes the ledger hold exactly this of the task; None: nothing. Returns the queue that now
        holds less than before; empty: none does.
        """
        old = self._of_task.get(task_id)
        new = (queue, amounts) if amounts is not None else None
        if old == new:
            return ""
        if old is not None:
            del self._of_task[task_id]
            left = self._held[old[0]].plus(old[1], -1)
            if left == NOTHING_HELD:
                del self._held[old[0]]
            else:
                self._held[old[0]] = left
        if new is not None:
            self._of_task[task_id] = new
            self._held[queue] = self.held(queue).plus(new[1])
        return old[0] if old is not None else ""

    def held(self, queue: str) -> Amounts:
        """What the queue's jobs hold."""
        return self._held.get(queue, NOTHING_HELD)

    def spec(self, queue: str) -> QueueSpec:
        """The queue; one that does not exist (any more) has no quota and the weight 1."""
        return self._specs.get(queue) or QueueSpec(name=queue)

    def part(self, amounts: Amounts, queue: str) -> int:
        """The largest part that the amounts are of any dimension, by the queue's weight; of
        SHARE_WHOLE. Of a cluster that has none of what is held, all.
        """
        largest = 0
        for have, of in (
            (amounts.cpu_nano, self.totals.cpu_nano),
            (amounts.memory_bytes, self.totals.memory_bytes),
            (amounts.gpu_nano, self.totals.gpu_nano),
        ):
            if have:
                largest = max(largest, have * SHARE_WHOLE // of if of else SHARE_WHOLE)
        return largest // max(1, self.spec(queue).weight)

    def share(self, queue: str) -> int:
        """The queue's fair share now."""
        return self.part(self.held(queue), queue)

    def room(self, queue: str, each: Amounts) -> int | None:
        """How many tasks more the quota allows; None: it sets no bound."""
        spec, held = self.spec(queue), self.held(queue)
        rooms = [
            max(0, (limit - have) // one)
            for limit, have, one in _rows(spec, held, each)
            if limit and one
        ]
        return min(rooms, default=None)

    def short(self, queue: str, each: Amounts, count: int = 1) -> str:
        """Why the quota does not allow so many tasks more, for people; empty: it does."""
        spec, held = self.spec(queue), self.held(queue)
        for (limit, have, one), (form, word) in zip(_rows(spec, held, each), _WORDS, strict=True):
            if limit and have + count * one > limit:
                more = "needs" if count == 1 else f"{count} tasks need"
                return (
                    f"the quota of queue {queue} is {form(limit)} {word}: its jobs hold "
                    f"{form(have)}, this one {more} {form(count * one)}"
                )
        return ""


def _rows(spec: QueueSpec, held: Amounts, each: Amounts) -> tuple[tuple[int, int, int], ...]:
    """Limit, held and needed by one task, in each dimension."""
    return (
        (spec.cpu_nano, held.cpu_nano, each.cpu_nano),
        (spec.memory_bytes, held.memory_bytes, each.memory_bytes),
        (spec.gpu_nano, held.gpu_nano, each.gpu_nano),
        (spec.tasks, held.tasks, each.tasks),
    )
