"""Seeds that found a bug once, by what was wrong. The plan of a seed changes with the simulator, so
each test says what it needs of a run, and has it in a plan of its own.
"""

from __future__ import annotations

from tests.sim.plan import Item, Plan
from tests.sim.run import run

# So many lots as items have.
HALF = (0.5,) * 12


def item(at_s: float, kind: str, lasts_s: float = 20.0, **lots: float) -> Item:
    """An item whose lots are a half except those named, as l0=0.3."""
    numbers = list(HALF)
    for name, lot in lots.items():
        numbers[int(name[1:])] = lot
    return Item(at_s, kind, lasts_s, tuple(numbers))


def test_a_task_that_has_left_a_drained_node_is_not_moved_once_more() -> None:
    """Its slot counted as leaving until the next tick, and a third task ran in it."""
    drains = tuple(item(40.0 + 10 * i, "availability", l0=i / 6, l1=0.1, l11=0.1) for i in range(3))
    plan = Plan(
        seed=1,
        nodes=6,
        managers=1,
        seconds=300.0,
        items=(
            item(3.0, "create", l0=0.3, l1=0.9, l2=0.9, l3=0.53, l4=0.1, l5=0.1, l6=0.9),
            *drains,
        ),
    )
    result = run(plan)
    assert result.violation is None
    assert sum("drain" in text for _, text in result.trace.lines) == 3
    assert result.containers >= 4
