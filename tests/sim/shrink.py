"""Making a failing run short: items are left out as long as the same rule fails.

Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE
TSE 2002, ddmin without complements of a half): halves first, then quarters, down to single items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.sim.plan import Item, Plan
from tests.sim.run import Result, run

RUNS_MAX = 120


def shrink(
    failed: Result, say: Callable[[str], None] = lambda _: None, *, runs_max: int = RUNS_MAX
) -> Result:
    """The shortest run found that fails by the same rule, in so many tries."""
    assert failed.violation is not None
    rule = failed.violation.rule
    best, runs = failed, 0

    def fails(plan: Plan) -> bool:
        nonlocal best, runs
        runs += 1
        result = run(plan)
        if result.violation is None or result.violation.rule != rule:
            return False
        best = result
        say(f"{len(plan.items)} items: {result.violation}")
        return True

    # What comes after the violation has no part in it.
    items = tuple(i for i in failed.plan.items if i.at_s <= failed.violation.at_s)
    if len(items) < len(failed.plan.items):
        fails(failed.plan.only(items))
    size = max(1, len(best.plan.items) // 2)
    while runs < runs_max:
        shorter = False
        at = 0
        while at < len(best.plan.items) and runs < runs_max:
            items = best.plan.items
            if fails(best.plan.only(items[:at] + items[at + size :])):
                shorter = True
            else:
                at += size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2)
    return _fewer_nodes(best, rule, fails)


def _fewer_nodes(best: Result, rule: str, fails: Callable[[Plan], bool]) -> Result:
    """With fewer machines the items mean other machines, so this rarely works; when it does, the
    trace is much shorter.
    """
    found = best
    for nodes in (3, 6, 10):
        if nodes < found.plan.nodes and fails(replace(found.plan, nodes=nodes)):
            again = run(replace(found.plan, nodes=nodes))
            if again.violation is not None and again.violation.rule == rule:
                return again
    return found


def listed(items: tuple[Item, ...]) -> str:
    """The items, one a line."""
    return "\n".join(str(item) for item in items)
