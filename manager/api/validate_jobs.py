"""What the specs of jobs and of their queues may say, and which queues there are.

Rules of a spec alone (`check_job`, `check_priority`) are noted with the other rules of services
(validate.py); whether a queue exists is looked up when a service is prepared (`check_queue`), and
the cluster's list of queues is checked against the jobs that use them (`check_queues`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from manager.api.lookup import quoted, spec_of
from manager.api.problems import Finder, nearest
from manager.control import rely_on_uses
from manager.store import Draft, View
from swarm.v1 import (
    Cluster,
    ClusterSpec,
    JobState,
    QueueSpec,
    ReplicatedJob,
    Service,
    ServiceSpec,
)

PRIORITY_MAX = 1000  # and -1000 at least
DEFAULT_QUEUE = "default"
QUEUES_MAX = 1000  # each is looked at in every tick that places jobs
QUEUE_CHARS_MAX = 63
WEIGHT_MAX = 1_000_000  # fair shares are counted in millionths
_QUEUE = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?")
_ENDED = frozenset({JobState.COMPLETE, JobState.FAILED, JobState.CANCELLED})
_SHOWN_MAX = 5


# ---------------------------------------------------------------- a service


def check_priority(find: Finder, spec: ServiceSpec) -> None:
    if not -PRIORITY_MAX <= spec.priority <= PRIORITY_MAX:
        find.add("priority", f"{spec.priority} is not from -{PRIORITY_MAX} to {PRIORITY_MAX}")


def check_job(find: Finder, spec: ServiceSpec) -> None:
    """What a job says beyond its mode."""
    job, mode = spec.job, spec.mode
    if job is None:
        return
    if mode is None or (mode.replicated_job is None and mode.global_job is None):
        find.add("job", "only services of mode replicated-job or global-job can have it")
        return
    find = find.at("job")
    _check_queue_name(find, "queue", job.queue)
    find.not_negative("timeout", job.timeout_ns, "a duration")
    find.not_negative("keep", job.keep_ns, "a duration")
    if job.gang and mode.global_job is not None:
        find.add("gang", "a global job has no number of tasks to start together")
    if job.gang and mode.replicated_job is not None:
        total, at_once = _numbers(mode.replicated_job)
        if at_once != total:
            find.add(
                "gang",
                f"a gang runs all of its tasks at once, and this job runs {at_once} of {total}; "
                "leave max_concurrent out",
            )


def _numbers(job: ReplicatedJob) -> tuple[int, int]:
    """How many tasks complete and how many run at once, as manager/control reads them."""
    total = job.total_completions
    if total is None:
        total = job.max_concurrent or 1
    return total, job.max_concurrent or total


# ---------------------------------------------------------------- queues


def queue_of(spec: ServiceSpec) -> str:
    """The name of a job's queue."""
    return (spec.job.queue if spec.job is not None else "") or DEFAULT_QUEUE


def queues_of(spec: ClusterSpec | None) -> tuple[QueueSpec, ...]:
    """Those that were set; `default` need not be among them."""
    scheduling = spec.scheduling if spec is not None else None
    return scheduling.queues if scheduling is not None else ()


def check_queue(find: Finder, view: View, spec: ServiceSpec) -> None:
    """Notes a queue that does not exist."""
    name = queue_of(spec)
    cluster = next(iter(view.all(Cluster)), None)
    names = _names(queues_of(cluster.spec if cluster is not None else None))
    if name in names:
        return
    find.add(
        "job.queue",
        f"there is no queue {name!r}{nearest(name, names)} (queues: {', '.join(names)}); make it "
        f"with `swarmctl queue set {name}`",
    )


def rely_on_queue(draft: Draft, spec: ServiceSpec, before: ServiceSpec | None) -> None:
    """The commit fails if the queue that `spec` names, and `before` did not, was seen to be unused
    meanwhile and is gone.
    """
    name = queue_of(spec)
    if name != DEFAULT_QUEUE and (before is None or queue_of(before) != name):
        rely_on_uses(draft, _use(name))


def check_queues(find: Finder, draft: Draft, after: ClusterSpec, before: ClusterSpec) -> None:
    """Notes what is wrong with the queues, and queues that are taken away from jobs."""
    queues = queues_of(after)
    if queues == queues_of(before):
        return
    at = find.at("scheduling")
    if len(queues) > QUEUES_MAX:
        at.add("queues", f"{len(queues)} queues are more than the limit of {QUEUES_MAX}")
        return
    names = [q.name for q in queues]
    for i, queue in enumerate(queues):
        _check_queue_spec(at.at(f"queues[{queue.name or i}]"), queue)
        if queue.name in names[:i]:
            at.add("queues", f"queue {queue.name!r} is named twice")
    kept = _names(queues)
    for name in _names(queues_of(before)):
        if name in kept:
            continue
        rely_on_uses(draft, _use(name))
        jobs = _jobs_in(draft, name)
        if jobs:
            at.add(
                f"queues[{name}]",
                f"it cannot be removed while jobs are in it: {_list(jobs)}; cancel them, or "
                "wait until they have ended",
            )


def _names(queues: Iterable[QueueSpec]) -> list[str]:
    """All names, `default` first."""
    return [DEFAULT_QUEUE, *sorted({q.name for q in queues} - {DEFAULT_QUEUE})]


def _check_queue_spec(find: Finder, queue: QueueSpec) -> None:
    if not queue.name:
        find.add("name", "a queue needs a name")
    _check_queue_name(find, "name", queue.name)
    if queue.weight > WEIGHT_MAX:
        find.add("weight", f"{queue.weight} is more than the limit of {WEIGHT_MAX}")
    find.not_negative("cpus", queue.cpu_nano, "a quota")
    find.not_negative("memory", queue.memory_bytes, "a quota")
    find.not_negative("gpus", queue.gpu_nano, "a quota")
    find.not_negative("tasks", queue.tasks, "a quota")


def _check_queue_name(find: Finder, field: str, name: str) -> None:
    if name and (len(name) > QUEUE_CHARS_MAX or not _QUEUE.fullmatch(name)):
        find.add(
            field,
            f"{name!r} is not a name of a queue: at most {QUEUE_CHARS_MAX} characters of a-z, A-Z, "
            "0-9, '-', '_' and '.', with a letter or digit first and last",
        )


def _jobs_in(view: View, queue: str) -> list[Service]:
    """The jobs of a queue that have not ended, by name."""
    found = [
        s
        for s in view.all(Service)
        if s.spec is not None
        and s.spec.job is not None
        and queue_of(s.spec) == queue
        and not s.pending_delete
        and not (s.job_status is not None and s.job_status.state in _ENDED)
    ]
    return sorted(found, key=lambda s: spec_of(s).name)


def _list(jobs: list[Service]) -> str:
    names = [quoted(job) for job in jobs[:_SHOWN_MAX]]
    if len(jobs) > _SHOWN_MAX:
        names.append(f"and {len(jobs) - _SHOWN_MAX} more")
    return ", ".join(names)


def _use(queue: str) -> str:
    """What `rely_on_uses` knows the queue by."""
    return f"queue {queue}"
