"""A dry run of a large stack: loading its file, and the plan against a large cluster.

    python -m tests.bench.dry_run --nodes 1000 --services 300 --lines 5000

The file is made: services with the keys that real ones have, filled up with variables to the number
of lines. The cluster has `--tasks` running tasks of 300 other services. Two plans are timed: of the
first deploy, and, once that runs, of an edit that replaces every task of the stack one by one. The
last line gives medians of the repeats: load_s (cli.compose.load), plan_s (manager.api.plan on a
frozen view, freezing included; the slower of the two), total_s.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

from msgspec import structs

from cli.compose import load
from manager.api.plan import plan
from manager.api.stack_request import resolve_request
from manager.api.stacks import deploy
from manager.ca import Sealer
from manager.control import Controller
from manager.store import Draft, Tables
from swarm.ids import new_id, seeded_rng
from swarm.v1 import (
    DeployStackRequest,
    Kind,
    PlanStackResponse,
    StackSpec,
    Task,
    TaskState,
    TaskStatus,
)
from tests.bench.placement import NOW_NS, Rows, make_nodes, make_services

SEALER = Sealer(b"k" * 32)
STACK = "shop"
SERVICE = """\
  s{i}:
    image: registry.example/team/s{i}:{version}
    command: ["serve", "--port", "80"]
    networks: [front]
    deploy:
      replicas: {replicas}
      resources:
        reservations: {{cpus: "0.05", memory: 32M}}
      restart_policy: {{condition: on-failure}}
    environment:
      VERSION: "{version}"
"""
FOOT = """\
networks:
  front:
"""


def text(services: int, lines: int, replicas: int, version: int) -> str:
    """A file of exactly so many lines."""
    blocks = [SERVICE.format(i=i, replicas=replicas, version=version) for i in range(services)]
    missing = lines - 1 - sum(b.count("\n") for b in blocks) - FOOT.count("\n")
    if missing < 0:
        raise SystemExit(f"{services} services need {lines - missing} lines at least")
    for n in range(missing):
        blocks[n % services] += f"      SETTING_{n}: value {n}\n"
    return "services:\n" + "".join(blocks) + FOOT


def loaded(path: Path) -> tuple[StackSpec, float]:
    """The stack, and the seconds it took."""
    gc.collect()
    begin_s = time.perf_counter()
    spec = load([str(path)], stack=STACK, environment={}).spec
    return spec, time.perf_counter() - begin_s


def planned(tables: Tables, spec: StackSpec) -> tuple[PlanStackResponse, float]:
    """The plan, and the seconds it took."""
    gc.collect()
    begin_s = time.perf_counter()
    rng = seeded_rng(3)
    response = plan(
        tables.freeze(),
        DeployStackRequest(spec=spec),
        now_ns=NOW_NS,
        new_id=lambda: new_id(rng),
        sealer=SEALER,
        rng=rng,
    )
    return response, time.perf_counter() - begin_s


def commit(tables: Tables, draft: Draft) -> None:
    revision = tables.revision + 1
    tables.apply(
        revision,
        [
            (c.kind, c.id, c.new and structs.replace(c.new, meta=_at(c.new, revision)))
            for c in draft.changes()
        ],
    )


def _at(o: Task, revision: int) -> object:
    return structs.replace(o.meta, version=revision) if o.meta is not None else None


def run_all(tables: Tables) -> None:
    """The control loop gives every service its tasks, and all of them run."""
    draft = Draft(tables, now_ns=NOW_NS)
    controller = Controller(seeded_rng(1), created_max=1_000_000)
    controller.reset(tables)
    controller.tick(draft)
    commit(tables, draft)
    running = TaskStatus(state=TaskState.RUNNING, timestamp_ns=NOW_NS)
    tables.apply(
        tables.revision + 1,
        [(Kind.TASK, t.id, structs.replace(t, status=running)) for t in list(tables.all(Task))],
    )


def deployed(tables: Tables, spec: StackSpec) -> None:
    draft = Draft(tables, now_ns=NOW_NS)
    wanted = resolve_request(draft, DeployStackRequest(spec=spec), sealer=SEALER)
    rng = seeded_rng(4)
    deploy(draft, wanted, who="bench", new_id=lambda: new_id(rng), sealer=SEALER)
    commit(tables, draft)
    run_all(tables)


def check(response: PlanStackResponse, *, created: int, stopped: int) -> None:
    placements = [c.placement for c in response.changes if c.placement is not None]
    found = (sum(p.created for p in placements), sum(p.stopped for p in placements))
    if found != (created, stopped) or not response.settled:
        raise SystemExit(f"{found} tasks created and stopped, expected {(created, stopped)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--services", type=int, default=300)
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=30_000)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    tables = Tables()
    rows: Rows = [(Kind.NODE, n.id, n) for n in make_nodes(given.nodes, given.tasks, 0)]
    tables.apply(1, rows + make_services(0, 300, given.tasks // 300, 0))
    run_all(tables)
    tasks = given.services * given.replicas
    times: dict[str, list[float]] = {"load": [], "first": [], "edit": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compose.yml"
        specs = []
        for version in range(2):
            path.write_text(text(given.services, given.lines, given.replicas, version))
            for _ in range(given.repeat):
                spec, seconds = loaded(path)
                times["load"].append(seconds)
            specs.append(spec)
    for _ in range(given.repeat):
        response, seconds = planned(tables, specs[0])
        check(response, created=tasks, stopped=0)
        times["first"].append(seconds)
    deployed(tables, specs[0])
    for _ in range(given.repeat):
        response, seconds = planned(tables, specs[1])
        check(response, created=tasks, stopped=tasks)
        times["edit"].append(seconds)
    for what, seconds_of in times.items():
        print(f"{what}: {min(seconds_of):.2f}..{max(seconds_of):.2f} s")
    load_s = statistics.median(times["load"])
    plan_s = max(statistics.median(times["first"]), statistics.median(times["edit"]))
    print(f"load_s={load_s:.2f} plan_s={plan_s:.2f} total_s={load_s + plan_s:.2f}")


if __name__ == "__main__":
    main()
