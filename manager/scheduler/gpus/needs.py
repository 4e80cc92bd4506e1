"""What a task asks of a node with GPUs, and what a node has.

Units are the caller's for CPU and memory (the same for nodes and tasks), bytes for the memory of
GPUs, and shares for parts of a GPU: WHOLE is one GPU. All are integers, so that a claim and
its release cancel exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm import errors
from swarm.gpus import GPUS_MAX, WHOLE

Kind = tuple[tuple[str, ...], str, str]
"""What a task says of the GPU itself: models, compute capability, vendor."""


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """Asked by one task. `count` GPUs of one node, `share` of each; below WHOLE only one GPU may
    be asked. `models`: any of these as swarm.gpus.model_matches has it, empty any;
    `capability` and `vendor` as in GpuAsk. `gpu_memory_bytes`: of each GPU, taken from it.
    """

    cpu: int = 0
    memory: int = 0
    count: int = 0
    share: int = WHOLE
    models: frozenset[str] = frozenset()
    gpu_memory_bytes: int = 0
    capability: str = ""
    vendor: str = ""

    def __post_init__(self) -> None:
        if min(self.cpu, self.memory, self.count, self.gpu_memory_bytes) < 0:
            raise errors.Invalid(f"a task cannot ask for less than nothing: {self}")
        if self.count and not 0 < self.share <= WHOLE:
            raise errors.Invalid(
                f"the share of a GPU is {self.share}: it must be above 0 and at most {WHOLE} "
                f"(one whole GPU)"
            )
        if self.count > 1 and self.share < WHOLE:
            raise errors.Invalid(
                f"{self.count} GPUs of {self.share} shares each are asked for: only one GPU can be "
                f"shared; ask for whole GPUs or for a part of one"
            )

    @property
    def asked(self) -> int:
        """Shares asked for on all GPUs together."""
        return self.count * self.share

    @property
    def kind(self) -> Kind:
        """What is asked of the GPU itself; ANY_KIND: nothing."""
        return (tuple(sorted(self.models)), self.capability, self.vendor)

    @property
    def order(self) -> tuple[int, int, int, int, Kind, int]:
        """A total order of needs, for everything that must not depend on their arrival."""
        return (
            self.count,
            self.share,
            self.cpu,
            self.memory,
            self.kind,
            self.gpu_memory_bytes,
        )


ANY_KIND: Kind = ((), "", "")


def largest_first(need: GpuNeed) -> tuple[int, int, int, int, Kind, int]:
    """Sort key, to be sorted in reverse: of tasks that wait together, those that ask for more GPU
    are placed first. Look-ahead over the queue at no cost; see the README for what it brings.
    """
    count, share, cpu, memory, kind, gpu_memory = need.order
    return (count * share, cpu, memory, gpu_memory, kind, count)


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One GPU that tasks may have. `memory_bytes` 0: not known, so no task that asks gets it."""

    uuid: str
    model: str = ""
    memory_bytes: int = 0
    capability: str = ""
    vendor: str = ""


Links = tuple[tuple[int, ...], ...]
"""How each GPU of a node is joined to each: see links.py. Empty: not known."""


@dataclass(frozen=True, slots=True)
class GpuNode:
    """A node as the placement of GPUs sees it; `gpus` in the node's own order."""

    id: str
    cpu: int = 0
    memory: int = 0
    gpus: tuple[GpuDevice, ...] = ()
    links: Links = ()

    def __post_init__(self) -> None:
        if len(self.gpus) > GPUS_MAX:
            raise errors.Invalid(
                f"node {self.id} has {len(self.gpus)} GPUs: at most {GPUS_MAX} are placed on"
            )
        if len({gpu.uuid for gpu in self.gpus}) < len(self.gpus):
            raise errors.Invalid(f"node {self.id} lists a GPU twice")
