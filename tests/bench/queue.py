"""A queue of jobs: how long jobs wait, and how long the cluster takes for all, against plain FIFO.

    python -m tests.bench.queue --nodes 16 --jobs 300

The same jobs (sizes, run times and arrivals drawn by seed; all gangs) go through the control loop,
with timeouts a tenth above their run times, and in the order of their arrival through a FIFO that
starts a job only when all before it have started. Time is played; nodes are perfect. The last line
gives ratios to FIFO, below 1 is better: until all have ended, and the mean wait for a start.
`large_late_s`: by how much jobs that need at least half of the cluster start later on average (below
0: sooner), `worst_late_s` the most for any job: what is filled in ends before the head's promised
start, which goes by timeouts, and FIFO's goes by what jobs do.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from dataclasses import dataclass

from msgspec import structs

from manager.control import Controller
from manager.store import Draft, Tables
from swarm import states
from swarm.ids import seeded_rng
from swarm.v1 import (
    Availability,
    ContainerSpec,
    JobSpec,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Platform,
    ReplicatedJob,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)

SECOND = 1_000_000_000
CPU = 1_000_000_000
NODE_CPUS = 8
NOW_NS = 1_700_000_000 * SECOND


@dataclass(frozen=True, slots=True)
class Job:
    """`tasks` of `cpus` each, all at once; they run for `run_s` and arrive at `at_s`."""

    name: str
    at_s: int
    tasks: int
    cpus: int
    run_s: int


def workload(jobs: int, nodes: int, seed: int) -> list[Job]:
    """Many small and short jobs, a few that need most of the cluster; more than it can take."""
    rng = random.Random(seed)
    out, at_s = [], 0
    for i in range(jobs):
        large = rng.random() < 0.1
        tasks = rng.randint(nodes // 2, nodes) if large else rng.randint(1, 4)
        cpus = NODE_CPUS if large else rng.choice((1, 2, 4))
        run_s = rng.randint(300, 1_200) if large else rng.randint(30, 600)
        out.append(Job(f"job{i:05}", at_s, tasks, cpus, run_s))
        at_s += int(rng.expovariate(1 / 12))
    return out


def fifo(jobs: list[Job], nodes: int) -> dict[str, tuple[int, int]]:
    """When each job starts and ends if none may pass another."""
    free = [NODE_CPUS] * nodes
    ends: list[tuple[int, list[tuple[int, int]]]] = []
    found, now = {}, 0
    for job in jobs:
        now = max(now, job.at_s)
        while True:
            while ends and ends[0][0] <= now:
                for node, cpus in heapq.heappop(ends)[1]:
                    free[node] += cpus
            taken = _take(free, job)
            if taken is not None:
                break
            now = ends[0][0]
        heapq.heappush(ends, (now + job.run_s, taken))
        found[job.name] = (now, now + job.run_s)
    return found


def _take(free: list[int], job: Job) -> list[tuple[int, int]] | None:
    trial, taken = list(free), []
    for _ in range(job.tasks):
        node = max(range(len(trial)), key=lambda n: trial[n])
        if trial[node] < job.cpus:
            return None
        trial[node] -= job.cpus
        taken.append((node, job.cpus))
    free[:] = trial
    return taken


class Cluster:
    """The control loop with nodes and time that are played, a second a step."""

    def __init__(self, nodes: int) -> None:
        self.tables = Tables()
        self.controller = Controller(seeded_rng(1))
        self.now_ns = NOW_NS
        self.loop_s = 0.0
        draft = self._draft()
        for i in range(nodes):
            draft.put(_node(i))
        self._commit(draft)
        self.controller.reset(self.tables)

    def _draft(self) -> Draft:
        return Draft(self.tables, now_ns=self.now_ns)

    def _commit(self, draft: Draft, *, own: bool = False) -> None:
        changes = draft.changes()
        if not changes:
            return
        revision = self.tables.revision + 1
        rows = []
        for change in changes:
            new = change.new
            if new is not None:
                new = structs.replace(new, meta=structs.replace(new.meta, version=revision))
            rows.append((change.kind, change.id, new))
        for done in self.tables.apply(revision, rows):
            self.controller.observe(done, self.tables, own=own)

    def submit(self, job: Job) -> None:
        spec = ServiceSpec(
            name=job.name,
            task=TaskSpec(
                container=ContainerSpec(image="image"),
                restart=RestartPolicy(condition="none"),
                resources=ResourceRequirements(reservations=Resources(cpu_nano=job.cpus * CPU)),
            ),
            mode=ServiceMode(
                replicated_job=ReplicatedJob(total_completions=job.tasks, max_concurrent=job.tasks)
            ),
            job=JobSpec(gang=True, timeout_ns=job.run_s * SECOND * 11 // 10),
        )
        service = Service(id=job.name, spec=spec, spec_version=1, task_version=1)
        draft = self._draft()
        draft.put(service)
        draft.put(
            ServiceRevision(id=f"{job.name}.1", service_id=job.name, spec_version=1, spec=spec)
        )
        self._commit(draft)

    def quiet(self) -> None:
        """Loop and nodes take turns until neither has anything to do."""
        while True:
            worked = self.controller.has_work(self.now_ns)
            if worked:
                draft = self._draft()
                started = time.perf_counter()
                self.controller.tick(draft)
                self.controller.done()
                self.loop_s += time.perf_counter() - started
                self._commit(draft, own=True)
            if not self._start() and not worked:
                return

    def _start(self) -> bool:
        draft = self._draft()
        for task in self.tables.all(Task):
            state = task.status.state if task.status else TaskState.NEW
            if state < TaskState.ASSIGNED or states.ended(state):
                continue
            if task.desired_state == TaskState.READY and state < TaskState.READY:
                self._report(draft, task, TaskState.READY)
            elif task.desired_state == TaskState.COMPLETE and state < TaskState.RUNNING:
                self._report(draft, task, TaskState.RUNNING)
            elif task.desired_state == TaskState.SHUTDOWN:
                self._report(draft, task, TaskState.SHUTDOWN)
        changed = bool(draft.changes())
        self._commit(draft)
        return changed

    def _report(self, draft: Draft, task: Task, state: TaskState) -> None:
        status = TaskStatus(state=state, timestamp_ns=self.now_ns)
        draft.put(structs.replace(task, status=status))

    def finish(self, jobs: dict[str, Job]) -> list[str]:
        """Completes what has run for its time; the jobs that ended."""
        draft, ended = self._draft(), []
        for name, job in jobs.items():
            tasks = [t for t in self.tables.by(Task, "service", name) if _runs(t)]
            for task in tasks:
                assert task.status is not None
                if self.now_ns - task.status.timestamp_ns >= job.run_s * SECOND:
                    self._report(draft, task, TaskState.COMPLETE)
                    ended.append(name)
        self._commit(draft)
        return sorted(set(ended))

    def running(self, name: str) -> bool:
        return any(_runs(t) for t in self.tables.by(Task, "service", name))


def _runs(task: Task) -> bool:
    return task.status is not None and task.status.state == TaskState.RUNNING


def _node(i: int) -> Node:
    return Node(
        id=f"node{i:04}",
        spec=NodeSpec(role=NodeRole.WORKER, availability=Availability.ACTIVE),
        description=NodeDescription(
            hostname=f"host{i:04}",
            platform=Platform(os="linux", architecture="x86_64"),
            resources=Resources(cpu_nano=NODE_CPUS * CPU, memory_bytes=1 << 36),
            runtimes=("docker",),
        ),
        status=NodeStatus(state=NodeState.READY),
    )


def loop(jobs: list[Job], nodes: int) -> tuple[dict[str, tuple[int, int]], float]:
    """When each job starts and ends with the control loop; and the loop's own seconds."""
    cluster = Cluster(nodes)
    left = list(reversed(jobs))
    waiting: dict[str, Job] = {}
    running: dict[str, Job] = {}
    started: dict[str, int] = {}
    found: dict[str, tuple[int, int]] = {}
    now = 0
    while len(found) < len(jobs):
        cluster.now_ns = NOW_NS + now * SECOND
        ended = cluster.finish(running)
        while left and left[-1].at_s <= now:
            job = left.pop()
            waiting[job.name] = job
            cluster.submit(job)
        cluster.quiet()
        for name in ended:
            found[name] = (started[name], now)
            del running[name]
        for name in [n for n in waiting if cluster.running(n)]:
            running[name] = waiting.pop(name)
            started[name] = now
        ends = [started[n] + j.run_s for n, j in running.items()]
        now = min([*ends, *([left[-1].at_s] if left else [])], default=now + 1)
    return found, cluster.loop_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    jobs = workload(given.jobs, given.nodes, given.seed)
    plain = fifo(jobs, given.nodes)
    mine, loop_s = loop(jobs, given.nodes)
    ends = [max(end for _, end in found.values()) for found in (plain, mine)]
    waits = [statistics.mean(found[j.name][0] - j.at_s for j in jobs) for found in (plain, mine)]
    late = max(mine[j.name][0] - plain[j.name][0] for j in jobs)
    large = [j for j in jobs if j.cpus == NODE_CPUS]
    large_late = statistics.mean(mine[j.name][0] - plain[j.name][0] for j in large)
    print(f"fifo: makespan {ends[0]} s, mean wait {waits[0]:.0f} s")
    print(f"loop: makespan {ends[1]} s, mean wait {waits[1]:.0f} s, {loop_s:.1f} s of its own time")
    print(
        f"makespan={ends[1] / ends[0]:.3f} wait={waits[1] / max(1, waits[0]):.3f} "
        f"large_late_s={large_late:.0f} worst_late_s={late}"
    )


if __name__ == "__main__":
    main()
