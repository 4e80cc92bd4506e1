"""The replay's derived orders are those of the published experiments."""

from __future__ import annotations

import pytest

from tests.bench.gpu_orders import Source, orders
from tests.bench.gpu_trace import ROOT, arrange, read

DATA = (
    next(
        (
            place
            for place in (ROOT / "shared", ROOT.parent / "shared")
            if (place / "data/alibaba-gpu-2023").is_dir()
        ),
        ROOT / "shared",
    )
    / "data/alibaba-gpu-2023"
)


def test_the_source_gives_what_go_gives():
    source = Source(1)
    # rand.New(rand.NewSource(1)).Int63() of Go 1, three times.
    assert [source.int63() for _ in range(3)] == [
        5577006791947779410,
        8674665223082153551,
        6129484611666145821,
    ]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the GPU cluster's trace")
@pytest.mark.parametrize("seed", [42, 43])
def test_derived_orders_equal_the_given_ones(seed):
    nodes, tasks = read(DATA, "default")
    given, given_nodes = arrange(DATA, "default", seed, nodes, tasks)
    gpus = sum(len(n.gpus) for n in nodes.values())
    derived, derived_nodes = orders(tasks, list(nodes), gpus, seed)
    assert [task.name for task in derived] == [task.name for task in given]
    assert derived_nodes == given_nodes
