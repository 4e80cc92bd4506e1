"""The seeds of the ordinary test run, in two halves: files run beside each other there."""

from __future__ import annotations

import time

from tests.sim.plan import draw
from tests.sim.run import run

SEEDS = 300
MINUTES, NODES = 10.0, 20


def check(seed: int) -> float:
    """Runs one seed; the CPU seconds that it took."""
    begun_s = time.process_time()
    result = run(draw(seed, nodes=NODES, minutes=MINUTES))
    again = f"python -m tests.sim --seed {seed}"
    assert result.violation is None, (
        f"{result.violation}\n{result.trace.tail(30)}\n{again} replays and shortens it"
    )
    return time.process_time() - begun_s
