"""What the store costs: single-object transactions, and tasks written in batches.

Every number includes durability: a transaction counts when the store has answered that it is on the
disk. Run as `python -m tests.bench.store`; `--profile` shows where the time on the event loop goes.
The last line is `tx_per_s=… tasks_per_s=…`, medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import platform
import pstats
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec.structs import replace

from manager.store import Draft, Engine, Store
from manager.store.engines.embedded import EmbeddedEngine
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from swarm import ids
from swarm.clock import SECOND_NS, SystemClock
from swarm.v1 import Node, NodeStatus, Task, TaskState, TaskStatus
from tests.etcd import Etcd, members

CLOCK = SystemClock()
RNG = ids.seeded_rng(1)
ENGINES = ("embedded", "etcd")


def make_engine(folder: Path, etcd: Etcd | None) -> Engine:
    if etcd is None:
        return EmbeddedEngine(folder / "store.db", CLOCK)
    return EtcdEngine(EtcdClient([etcd.endpoint]), clock=CLOCK, writer="bench")


async def transactions(store: Store, *, writers: int, total: int) -> tuple[float, list[float]]:
    """Each writer changes an object of its own, one transaction after another; tx/s, latencies."""

    def create(draft: Draft) -> list[str]:
        return [draft.put(Node(id=ids.new_id(RNG))).id for _ in range(writers)]

    node_ids = await store.update(create)
    latencies: list[float] = []

    async def write(node_id: str) -> None:
        def touch(draft: Draft) -> None:
            node = draft.get(Node, node_id)
            assert node is not None
            draft.put(replace(node, status=NodeStatus(since_ns=draft.now_ns)))

        for _ in range(total // writers):
            started_s = CLOCK.monotonic_s()
            await store.update(touch)
            latencies.append(CLOCK.monotonic_s() - started_s)

    started_s = CLOCK.monotonic_s()
    await asyncio.gather(*(write(node_id) for node_id in node_ids))
    return len(latencies) / (CLOCK.monotonic_s() - started_s), latencies


def new_tasks(count: int, *, nodes: int, now_ns: int) -> list[Task]:
    """As the control loop makes them: placed, one service."""
    service_id = ids.new_id(RNG)
    node_ids = [ids.new_id(RNG) for _ in range(nodes)]
    return [
        Task(
            id=ids.new_id(RNG),
            service_id=service_id,
            spec_version=1,
            slot=slot,
            node_id=node_ids[slot % nodes],
            desired_state=TaskState.RUNNING,
            status=TaskStatus(
                state=TaskState.ASSIGNED, timestamp_ns=now_ns, message="assigned to a node"
            ),
        )
        for slot in range(1, count + 1)
    ]


async def in_batches(
    store: Store, tasks: list[Task], *, batch: int, change: Callable[[Draft, Task], object]
) -> float:
    """One commit after another, as the control loop writes; tasks/s."""
    started_s = CLOCK.monotonic_s()
    for start in range(0, len(tasks), batch):
        draft = store.draft()
        for task in tasks[start : start + batch]:
            change(draft, task)
        await store.commit(draft)
    return len(tasks) / (CLOCK.monotonic_s() - started_s)


def run_task(draft: Draft, task: Task) -> None:
    """A status report: the task runs."""
    current = draft.get(Task, task.id)
    assert current is not None
    status = TaskStatus(state=TaskState.RUNNING, timestamp_ns=draft.now_ns, message="started")
    draft.put(replace(current, status=status))


async def bench(
    args: argparse.Namespace, folder: Path, etcd: Etcd | None
) -> tuple[list[float], list[float]]:
    store = Store(make_engine(folder, etcd), CLOCK)
    await store.open()
    tx_rates, create_rates = [], []
    for round_ in range(args.rounds):
        rate, latencies = await transactions(store, writers=args.writers, total=args.tx)
        tx_rates.append(rate)
        latencies.sort()
        tasks = new_tasks(args.tasks, nodes=100, now_ns=CLOCK.now_ns())
        create = await in_batches(store, tasks, batch=args.batch, change=Draft.put)
        create_rates.append(create)
        update = await in_batches(store, tasks, batch=args.batch, change=run_task)
        remove = await in_batches(
            store, tasks, batch=args.batch, change=lambda draft, task: draft.delete(Task, task.id)
        )
        print(
            f"round {round_ + 1}: {rate:,.0f} tx/s with {args.writers} writers "
            f"(p50 {latencies[len(latencies) // 2] * 1e3:.1f} ms, "
            f"p99 {latencies[len(latencies) * 99 // 100] * 1e3:.1f} ms); tasks in batches of "
            f"{args.batch}: {create:,.0f}/s created, {update:,.0f}/s updated, {remove:,.0f}/s removed"
        )
    await store.update(lambda draft: [draft.put(task) for task in tasks])
    await store.close()
    started_s = CLOCK.monotonic_s()
    store = Store(make_engine(folder, etcd), CLOCK)
    await store.open()
    print(f"reopened with {store.count(Task):,} tasks in {CLOCK.monotonic_s() - started_s:.2f} s")
    store.check_invariants()
    await store.close()
    return tx_rates, create_rates


async def profiled(work: Awaitable[object], lines: int) -> None:
    profile = cProfile.Profile()
    profile.enable()
    try:
        await work
    finally:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engine", choices=ENGINES, default="embedded")
    parser.add_argument(
        "--managers", type=int, default=1, help="members of the etcd, all on this machine"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--writers", type=int, default=128, help="concurrent transactions")
    parser.add_argument("--tx", type=int, default=10_000, help="transactions in a round")
    parser.add_argument("--tasks", type=int, default=10_000, help="tasks in a round")
    parser.add_argument("--batch", type=int, default=2_000, help="tasks in one commit")
    parser.add_argument("--dir", help="where the state is kept; default: the temporary folder")
    parser.add_argument("--profile", action="store_true", help="show the costliest functions")
    args = parser.parse_args()
    started_ns = CLOCK.now_ns()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        cluster = members(folder, args.managers) if args.engine == "etcd" else []
        try:
            work = bench(args, folder, cluster[0] if cluster else None)
            if args.profile:
                asyncio.run(profiled(work, 30))
                return
            tx_rates, task_rates = asyncio.run(work)
        finally:
            for etcd in cluster:
                etcd.kill()
    print(
        f"{args.engine}{f' of {args.managers}' if cluster else ''} on {platform.machine()}, CPython {platform.python_version()}, "
        f"{(CLOCK.now_ns() - started_ns) / SECOND_NS:.0f} s; spread over {args.rounds} rounds: "
        f"tx/s {min(tx_rates):,.0f} to {max(tx_rates):,.0f}, "
        f"tasks/s {min(task_rates):,.0f} to {max(task_rates):,.0f}"
    )
    print(
        f"tx_per_s={statistics.median(tx_rates):.0f} tasks_per_s={statistics.median(task_rates):.0f}"
    )


if __name__ == "__main__":
    main()
