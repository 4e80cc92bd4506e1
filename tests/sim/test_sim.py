"""The simulator itself: a run can be repeated, and is made short when it fails."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.sim import planted
from tests.sim.plan import FAULTS, OPERATIONS, draw
from tests.sim.rules import RULES
from tests.sim.run import run
from tests.sim.shrink import shrink

CODE = """
from tests.sim.plan import draw
from tests.sim.run import run
print([run(draw(seed, nodes=8, minutes=5)).digest for seed in (3, 6)])
"""


def test_a_seed_gives_the_same_run_whatever_the_hashes_and_the_memory() -> None:
    said = set()
    for hashes in ("0", "1", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            env=dict(os.environ, PYTHONHASHSEED=hashes),
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
        said.add(done.stdout)
    assert len(said) == 1


def test_a_plan_is_the_same_each_time_and_longer_with_more_steps() -> None:
    assert draw(5, nodes=20, minutes=10) == draw(5, nodes=20, minutes=10)
    plan = draw(5, nodes=20, minutes=10, steps=400)
    assert len(plan.items) == 400
    assert plan.seconds > 600


def test_all_kinds_of_faults_and_operations_come_up() -> None:
    kinds = {i.kind for seed in range(40) for i in draw(seed, nodes=20, minutes=10).items}
    assert kinds == OPERATIONS.keys() | FAULTS.keys()


def test_a_run_does_something() -> None:
    result = run(draw(4, nodes=8, minutes=6))
    assert result.violation is None
    assert result.commits > 100
    assert result.containers > 10
    assert result.done > 5


def test_a_failing_run_is_made_short_and_keeps_its_rule() -> None:
    with planted.planted("predecessor_not_awaited"):
        failed = next(
            r for seed in range(1, 9) if (r := run(draw(seed, nodes=8, minutes=10))).violation
        )
        short = shrink(failed, runs_max=40)
    assert failed.violation is not None
    assert short.violation is not None
    assert short.violation.rule == failed.violation.rule in RULES
    assert len(short.plan.items) <= 8 < len(failed.plan.items)
