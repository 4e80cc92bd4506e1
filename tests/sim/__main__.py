"""The simulator on the command line; see README.md.

python -m tests.sim --seed 17                  one seed; --trace shows each line as it comes
python -m tests.sim --seeds 300 --jobs 2       many, in processes; the last line is key=value
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from tests.sim.plan import draw
from tests.sim.rules import RULES
from tests.sim.run import Result, run
from tests.sim.shrink import listed, shrink


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process tells of one seed."""

    seed: int
    violation: str
    digest: int
    commits: int
    messages: int
    containers: int
    cpu_s: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", type=int, default=0, help="so many, from --first on")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="things that happen; 0: by the time")
    parser.add_argument("--minutes", type=float, default=10.0, help="of simulated time")
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--trace", action="store_true", help="each line as it comes")
    parser.add_argument("--tail", type=int, default=60, help="lines of a failure's trace")
    parser.add_argument("--no-shrink", action="store_true")
    options = parser.parse_args()
    if options.seed is not None or not options.seeds:
        return _one(options, options.first if options.seed is None else options.seed)
    return _many(options)


def _one(options: argparse.Namespace, seed: int) -> int:
    begun_s = time.process_time()
    plan = draw(seed, nodes=options.nodes, minutes=options.minutes, steps=options.steps)
    result = run(plan, print_all=options.trace)
    if result.violation is not None:
        if not options.trace:
            print(result.trace.tail(options.tail))
        print(f"\nVIOLATION {result.violation}\nthe rule: {RULES[result.violation.rule]}")
        if not options.no_shrink:
            _shrunk(result, options.tail)
    print(_summary(result, time.process_time() - begun_s))
    return int(result.violation is not None)


def _shrunk(result: Result, tail: int) -> None:
    print(f"\nlooking for a shorter run ({len(result.plan.items)} items) …", flush=True)
    short = shrink(result, lambda text: print(f"  {text[:150]}", flush=True))
    print(f"\nthe shortest found, {len(short.plan.items)} items on {short.plan.nodes} nodes:")
    print(listed(short.plan.items))
    print(f"\nits end:\n{short.trace.tail(tail)}\nVIOLATION {short.violation}\n")


def _summary(result: Result, cpu_s: float) -> str:
    verdict = result.violation.rule if result.violation is not None else "none"
    return (
        f"seed={result.plan.seed} violation={verdict} digest={result.digest:08x} "
        f"commits={result.commits} messages={result.messages} containers={result.containers} "
        f"calls={result.done} refused={result.refused} cpu_s={cpu_s:.2f}"
    )


# ---------------------------------------------------------------- many


def outcome(seed: int, nodes: int, minutes: float, steps: int) -> Outcome:
    """One seed, for a process of its own."""
    begun_s = time.process_time()
    result = run(draw(seed, nodes=nodes, minutes=minutes, steps=steps))
    return Outcome(
        seed,
        str(result.violation or ""),
        result.digest,
        result.commits,
        result.messages,
        result.containers,
        time.process_time() - begun_s,
    )


def outcomes(options: argparse.Namespace) -> Iterator[Outcome]:
    seeds = range(options.first, options.first + options.seeds)
    same = (options.nodes, options.minutes, options.steps)
    if options.jobs <= 1:
        for seed in seeds:
            yield outcome(seed, *same)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=None) as pool:
        running = [pool.submit(outcome, seed, *same) for seed in seeds]
        for future in running:
            yield future.result()


def _many(options: argparse.Namespace) -> int:
    begun_s = time.monotonic()
    found: list[Outcome] = []
    for one in outcomes(options):
        found.append(one)
        if one.violation:
            print(f"seed {one.seed}: {one.violation}", flush=True)
    failed = [o for o in found if o.violation]
    if failed:
        print(f"\npython -m tests.sim --seed {failed[0].seed} shows the first one and shrinks it")
    wall_s = time.monotonic() - begun_s
    print(
        f"seeds={len(found)} violations={len(failed)} minutes={options.minutes:g} "
        f"nodes={options.nodes} commits={sum(o.commits for o in found)} "
        f"messages={sum(o.messages for o in found)} "
        f"containers={sum(o.containers for o in found)} "
        f"cpu_s_each={sum(o.cpu_s for o in found) / len(found):.2f} "
        f"cpu_s_most={max(o.cpu_s for o in found):.2f} wall_s={wall_s:.1f}"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
