"""Which of a node's GPUs belong together: the choice of several whole ones.

A task with several GPUs moves data between them, over NVLink some ten times as fast as across the
link between CPUs. So of the free GPUs those are taken that are joined best: the sum over all pairs,
NVLink before one NUMA node before a short way over PCIe. Of equal sums the one is taken that leaves
the others joined best (so a task with one GPU does not break up a pair), and then the first in the
node's order.

The choice is exhaustive up to CHOICES_MAX sets; beyond, from each GPU the best-joined is added
until there are enough, and the best of these is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from math import comb

from manager.scheduler.gpus.needs import Links
from swarm.v1 import Gpu, GpuProximity

APART_VALUE = 1  # of a pair of which it is known that it is joined in no such way
NVLINK = 1_000
NUMA = 100
_NEAR = {
    GpuProximity.BOARD: 50,
    GpuProximity.ONE_SWITCH: 40,
    GpuProximity.SEVERAL_SWITCHES: 30,
    GpuProximity.HOST_BRIDGE: 20,
    GpuProximity.NUMA_NODE: 10,
}
_NVLINKS_MAX = 32  # that tell one joined pair from another
CHOICES_MAX = 2_000

# How well a set is joined, by its worst pair; lower is better. Of a node that says nothing: APART.
JOINED, ONE_NUMA, APART = 0, 1, 2


def links_of(gpus: Sequence[Gpu]) -> Links:
    """How well each pair is joined; empty where nothing is known of any."""
    rows = tuple(tuple(_joined(a, b) for b in gpus) for a in gpus)
    return rows if any(map(any, rows)) else ()


def _joined(a: Gpu, b: Gpu) -> int:
    if a.uuid == b.uuid:
        return 0
    value = 0
    # Instances of one GPU are on its board and its NUMA node; NVLink does not reach them.
    link = next((link for link in a.links if link.uuid == b.uuid), None)
    peers = b.uuid in a.nvlink_peers or a.uuid in b.nvlink_peers or (link and link.nvlinks)
    if peers and not a.parent_uuid and not b.parent_uuid:
        value += NVLINK + min(link.nvlinks if link else 0, _NVLINKS_MAX)
    near = _NEAR.get(link.proximity, 0) if link else 0
    # -1: not known. On a machine with one CPU all GPUs are on node 0.
    if a.numa_node >= 0 and a.numa_node == b.numa_node:
        value += NUMA
    known = (a.numa_node >= 0 and b.numa_node >= 0) or link is not None
    return value + near or (APART_VALUE if known else 0)


@lru_cache(maxsize=8_192)
def choose(links: Links, free: tuple[int, ...], count: int) -> tuple[tuple[int, ...], int]:
    """Of the free GPUs (indices, in order) the ones to take, and how well they are joined: JOINED,
    ONE_NUMA or APART.
    """
    if count >= len(free):
        best = free
    elif comb(len(free), count) <= CHOICES_MAX:
        best = min(combinations(free, count), key=lambda some: _worth(links, free, some))
    else:
        grown = {_grow(links, free, first, count) for first in free}
        best = min(grown, key=lambda some: (*_worth(links, free, some), some))
    worst = min((links[a][b] for a, b in combinations(best, 2)), default=NVLINK)
    return best, JOINED if worst >= NVLINK else ONE_NUMA if worst >= NUMA else APART


def _worth(links: Links, free: tuple[int, ...], some: tuple[int, ...]) -> tuple[int, int]:
    """Lower is better; of equal ones the first in order is taken."""
    rest = [i for i in free if i not in some]
    inner = sum(links[a][b] for a, b in combinations(some, 2))
    return (-inner, -sum(links[a][b] for a, b in combinations(rest, 2)))


def _grow(links: Links, free: tuple[int, ...], first: int, count: int) -> tuple[int, ...]:
    some = [first]
    while len(some) < count:
        rest = [i for i in free if i not in some]
        some.append(max(rest, key=lambda i: (sum(links[i][j] for j in some), -i)))
    return tuple(sorted(some))
