"""The simulator on the command line; see README.md."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.plan import draw
from tests.sim.run import Result, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", type=int, default=0, help="so many, from --first on")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="things that happen; 0: by the time")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--trace", action="store_true", help="each line as it comes")
    parser.add_argument("--tail", type=int, default=60, help="lines of a failure's trace")
    parser.add_argument("--no-shrink", action="store_true")
    options = parser.parse_args()
    begun_s = time.monotonic()
    seed = options.seed if options.seed is not None else options.first
    result = run(
        draw(seed, nodes=options.nodes, minutes=options.minutes, steps=options.steps),
        print_all=options.trace,
    )
    print(summary(result, time.monotonic() - begun_s))
    if result.violation is not None:
        print(result.trace.tail(options.tail))
        print(result.violation)
    return int(result.violation is not None)


def summary(result: Result, seconds: float) -> str:
    return (
        f"seed={result.plan.seed} digest={result.digest:08x} commits={result.commits} "
        f"messages={result.messages} containers={result.containers} done={result.done} "
        f"refused={result.refused} callbacks={result.callbacks} cpu_s={seconds:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
