"""What a job says beyond its mode (`deploy.job`), and a service's priority (`deploy.priority`)."""

from __future__ import annotations

import re

from cli.compose import keys
from cli.compose.around import deep
from cli.compose.at import At
from swarm.v1 import JobSpec, ServiceMode

PRIORITY_MAX = 1000
QUEUE_CHARS_MAX = 63
_QUEUE = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?")


def priority(at: At) -> int:
    """Who is placed first, and may take the place of others."""
    found = deep(at, "deploy", "priority")
    if found is None:
        return 0
    return found.integer(least=-PRIORITY_MAX, most=PRIORITY_MAX, what="0 is that of all others")


def job_spec(at: At, mode: ServiceMode) -> JobSpec | None:
    """How a job waits, runs and ends; None where the file does not say."""
    found = deep(at, "deploy", "job")
    if found is None:
        return None
    if mode.replicated_job is None and mode.global_job is None:
        found.fail(
            "only services that run to completion can have it",
            "write mode: replicated-job, or remove it",
        )
        return None
    if not found.check_keys(keys.JOB, context="deploy.job"):
        return None
    queue, gang = found.set_at("queue"), found.set_at("gang")
    timeout, keep = found.set_at("timeout"), found.set_at("keep")
    is_gang = gang.truth() if gang is not None else False
    if gang is not None and is_gang and mode.global_job is not None:
        gang.fail(
            "a global job has no number of tasks to start together",
            "write mode: replicated-job, or remove it",
        )
    return JobSpec(
        queue=_queue(queue) if queue is not None else "",
        gang=is_gang,
        timeout_ns=timeout.duration() if timeout is not None else 0,
        keep_ns=keep.duration() if keep is not None else None,
    )


def _queue(at: At) -> str:
    """Whether there is such a queue is the manager's to say."""
    name = at.text(empty=False)
    if name and (len(name) > QUEUE_CHARS_MAX or not _QUEUE.fullmatch(name)):
        at.fail(
            f"{at.shown()} is not a name of a queue",
            f"at most {QUEUE_CHARS_MAX} characters of a-z, A-Z, 0-9, '-', '_' and '.', with a "
            "letter or digit first and last",
        )
    return name
