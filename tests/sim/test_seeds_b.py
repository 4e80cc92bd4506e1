"""Ten minutes of a cluster of twenty nodes under faults: seeds 151 to 300."""

from __future__ import annotations

import pytest

from tests.sim.seeds import SEEDS, check

HALF = SEEDS // 2


@pytest.mark.parametrize("first", range(151, 151 + HALF, 10))
def test_no_rule_is_broken_under_faults(first: int) -> None:
    for seed in range(first, first + 10):
        check(seed)
