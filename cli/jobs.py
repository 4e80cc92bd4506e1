"""Jobs as their commands see them: which services are jobs, where one stands, and how it ended.

A job is a service of mode replicated-job or global-job; the control loop says where its present
iteration stands (`Service.job_status`). A status of an earlier iteration says nothing about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cli.connection import Connection
from cli.format import Column, Record, short_id
from cli.objects import get_each, name_of
from cli.tasks import natural, shown_image
from cli.times import age
from swarm.errors import EXIT_INTERRUPTED, Invalid, SwarmError
from swarm.v1 import (
    Filter,
    JobState,
    JobStatus,
    Kind,
    ListRequest,
    Service,
    ServiceSpec,
    ServiceStatus,
)

__all__ = [
    "EXIT_NEVER_RAN",
    "EXIT_TIMED_OUT",
    "JOB_MODES",
    "Ending",
    "ending",
    "fetch_jobs",
    "get_jobs",
    "has_ended",
    "is_cancelled",
    "is_job",
    "job_columns",
    "job_row",
    "job_state",
    "queue_of",
    "status_of",
]

JOB_MODES = ("replicated-job", "global-job")
DEFAULT_QUEUE = "default"
EXIT_TIMED_OUT = 124  # as of timeout(1)
# It failed without a program that ended with a code: it could not be started, as of `docker run`.
EXIT_NEVER_RAN = 125
# What tasks that have not ended do, in the order of `job ls`.
_SHOWN = ("running", "starting", "ready", "preparing", "accepted", "assigned", "pending", "new")
ENDED = frozenset({JobState.COMPLETE, JobState.FAILED, JobState.CANCELLED})
JOB_COLUMNS = (
    ("ID", "ID"),
    ("NAME", "Name"),
    ("QUEUE", "Queue"),
    ("TASKS", "Tasks"),
    ("STATE", "CurrentState"),
    ("DETAILS", "Details"),
)


def is_job(spec: ServiceSpec | None) -> bool:
    """Whether the service runs to completion."""
    mode = spec.mode if spec is not None else None
    return mode is not None and (mode.replicated_job is not None or mode.global_job is not None)


def is_cancelled(service: Service) -> bool:
    """Whether it was asked not to run."""
    job = service.spec.job if service.spec is not None else None
    return job is not None and job.cancelled


def queue_of(service: Service) -> str:
    """The name of its queue."""
    job = service.spec.job if service.spec is not None else None
    return (job.queue if job is not None else "") or DEFAULT_QUEUE


def status_of(service: Service) -> JobStatus:
    """Where the present iteration stands; before the control loop has seen it, queued."""
    status = service.job_status
    if status is None or status.iteration != service.job_iteration:
        return JobStatus(state=JobState.QUEUED, iteration=service.job_iteration)
    return status


def has_ended(service: Service) -> bool:
    """Whether nothing of it will run any more unless it is run again."""
    return status_of(service).state in ENDED


def job_state(service: Service) -> str:
    """One word: queued, running, complete, failed, cancelled, or cancelling and removing."""
    if service.pending_delete:
        return "removing"
    if is_cancelled(service) and not has_ended(service):
        return "cancelling"
    state = status_of(service).state
    return "queued" if state is JobState.UNSPECIFIED else state.name.lower()


# ------------------------------------------------------------------ how it ended


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended: the exit code of who waits for it, and what is said besides (empty: it is
    complete).
    """

    exit_code: int
    message: str = ""


def ending(service: Service) -> Ending:
    """Of a job that has ended."""
    status = status_of(service)
    name = name_of(service)
    match status.state:
        case JobState.COMPLETE:
            return Ending(0)
        case JobState.CANCELLED:
            return Ending(EXIT_INTERRUPTED, f"job {name!r} was cancelled")
    why = f": {status.message}" if status.message else ""
    if status.timed_out:
        return Ending(EXIT_TIMED_OUT, f"job {name!r} timed out{why}")
    if status.exit_code:
        return Ending(status.exit_code, f"job {name!r} failed{why}")
    return Ending(EXIT_NEVER_RAN, f"job {name!r} failed without an exit code{why}")


# ------------------------------------------------------------------ getting them


async def get_jobs(
    connection: Connection, refs: Sequence[str]
) -> tuple[list[Service], list[SwarmError]]:
    """What each reference names, and a problem for each that names no job."""
    answers, problems = await get_each(connection, Kind.SERVICE, refs)
    found: list[Service] = []
    for answer in answers:
        service = answer.object.service if answer.object else None
        assert service is not None
        if is_job(service.spec):
            found.append(service)
        else:
            problems.append(
                Invalid(
                    f"service {name_of(service)!r} is no job: it does not run to completion; use "
                    "`swarmctl service` for it"
                )
            )
    return found, problems


async def fetch_jobs(
    connection: Connection, filters: Sequence[Filter]
) -> list[tuple[Service, ServiceStatus]]:
    """Jobs that pass the filters, with how far their tasks are, in order of name."""
    only = Filter(key="mode", values=JOB_MODES)
    request = ListRequest(kind=Kind.SERVICE, filters=(*filters, only), with_status=True)
    answer = await connection.control.list(request)
    services = [item.service for item in answer.objects if item.service]
    known = {status.service_id: status for status in answer.service_statuses}
    pairs = [(service, known.get(service.id) or ServiceStatus()) for service in services]
    return sorted(pairs, key=lambda pair: natural(name_of(pair[0])))


# ------------------------------------------------------------------ as rows


def job_columns(rows: Iterable[Record]) -> tuple[Column, ...]:
    """Those of `job ls`; with priorities where a job has one."""
    if any(row["Priority"] for row in rows):
        return (*JOB_COLUMNS[:3], ("PRIO", "Priority"), *JOB_COLUMNS[3:])
    return JOB_COLUMNS


def job_row(service: Service, status: ServiceStatus, *, now_ns: int, no_trunc: bool) -> Record:
    """A line of `job ls`."""
    spec = service.spec or ServiceSpec()
    container = spec.task.container if spec.task else None
    state, at = job_state(service), status_of(service)
    since_ns = at.ended_at_ns or at.started_at_ns or at.queued_at_ns
    return Record(
        ID=short_id(service.id, whole=no_trunc),
        Name=spec.name,
        Queue=queue_of(service),
        Priority=spec.priority,
        Tasks=_tasks(spec, status, at),
        Running=status.running,
        State=state,
        CurrentState=f"{_worded(state, at)} {age(since_ns, now_ns)}".rstrip(),
        Details=_details(state, status, at),
        ExitCode="" if at.exit_code is None else at.exit_code,
        Image=shown_image(container.image if container else "", whole=no_trunc),
        Labels=",".join(f"{key}={value}" for key, value in sorted(spec.labels.items())),
        Label=lambda key: spec.labels.get(key, ""),
    )


def _worded(state: str, status: JobStatus) -> str:
    if state == "failed" and status.exit_code:
        return f"Failed ({status.exit_code})"
    return state.capitalize()


def _tasks(spec: ServiceSpec, status: ServiceStatus, at: JobStatus) -> str:
    """ "3/10": those that completed, of all that must."""
    mode = spec.mode
    if mode is not None and mode.replicated_job is not None:
        job = mode.replicated_job
        total = job.total_completions
        total = (job.max_concurrent or 1) if total is None else total
    else:
        total = status.desired
    return f"{max(status.completed, at.completed)}/{total}"


def _details(state: str, status: ServiceStatus, at: JobStatus) -> str:
    """Why it failed or waits; of one that runs, what its tasks do."""
    if state == "queued":
        return at.message or next(iter(status.reasons), "")
    if state in ("running", "cancelling"):
        shown = (name for name in _SHOWN if status.states.get(name))
        return ", ".join(f"{status.states[name]} {name}" for name in shown)
    return at.message if at.message != state else ""
