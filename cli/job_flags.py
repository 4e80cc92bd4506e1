"""The flags of `job run`: those of the job itself, and those of its tasks as `service create` has
them, less what a job does not have (replicas, updates, ingress).

`JOB_FLAGS` stand in a section of the help of their own. All of it is pure, as service_flags is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from cli.lazy import Command
from cli.options import BYTES, CPUS, DURATION, Ref
from cli.service_flags import SCALARS, Resolved, edit
from cli.service_options import F, create_decorators, decorated, long_name
from cli.spec_paths import at, put
from swarm.v1 import (
    JobSpec,
    ReplicatedJob,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
)

__all__ = ["JobCommand", "job_options", "job_spec"]

_RESERVED = "task.resources.reservations."
_LIMITS = "task.resources.limits."
# Of service create, what a job has no use for, or says otherwise.
_LEFT_OUT = ("update-", "rollback-", "restart-", "reserve-", "health-")
_LEFT_OUT_WHOLE = frozenset(
    {"mode", "replicas", "max-concurrent", "endpoint-mode", "name", "no-healthcheck"}
)
# They stand first in the help.
JOB_FLAGS = (
    "name",
    "array",
    "max-concurrent",
    "gang",
    "gpus",
    "gpu-model",
    "gpu-memory",
    "gpu-fraction",
    "gpu-capability",
    "cpus",
    "memory",
    "queue",
    "priority",
    "timeout",
    "retries",
    "retry-delay",
    "keep",
    "wait",
    "quiet",
)
_COUNT = click.IntRange(min=1)
# What each task finds in its environment; Docker's placeholders, which the manager knows.
SLOT_VARIABLE = "SWARM_TASK_SLOT"
SIZE_VARIABLE = "SWARM_ARRAY_SIZE"


class JobCommand(Command):
    """A command whose help has the job's own options apart from those of its tasks."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: dict[str, tuple[str, str]] = {}
        rest: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None or not isinstance(param, click.Option):
                continue
            name = _long_name(param)
            if name in JOB_FLAGS:
                own[name] = record
            else:
                rest.append(record)
        with formatter.section("Options"):
            formatter.write_dl([own[name] for name in JOB_FLAGS if name in own])
        with formatter.section("Options of its tasks, as of service create"):
            formatter.write_dl(rest)


def _long_name(param: click.Parameter) -> str:
    return next((name[2:] for name in param.opts if name.startswith("--")), "")


def job_options(function: F) -> F:
    """All flags of `job run`."""
    kept = [decorate for decorate in create_decorators() if _is_kept(long_name(decorate)[2:])]
    own = [
        click.option("--name", default="", help="Name of the job; else one is made up."),
        click.option(
            "--array",
            type=_COUNT,
            default=1,
            metavar="N",
            show_default=True,
            help=f"Tasks to complete; each finds its number in {SLOT_VARIABLE}.",
        ),
        click.option(
            "--max-concurrent", type=_COUNT, metavar="M", help="Most of them at once (all)."
        ),
        click.option(
            "--gang", is_flag=True, help="All of them run at the same time, or none does."
        ),
        click.option("--cpus", type=CPUS, help="CPUs set aside for each task."),
        click.option(
            "--memory", type=BYTES, help="Memory set aside for each task, and the most it gets."
        ),
        click.option("--queue", type=Ref("queue"), default="", help="Queue to wait in (default)."),
        click.option(
            "--timeout", type=DURATION, help="How long a task may run; then it has failed."
        ),
        click.option(
            "--retries",
            type=click.IntRange(min=0),
            default=0,
            metavar="N",
            show_default=True,
            help="How often a task that fails is tried again.",
        ),
        click.option(
            "--retry-delay",
            type=DURATION,
            help="Time before the first retry, doubled with each, at most 5m (5s).",
        ),
        click.option(
            "--keep",
            type=DURATION,
            help="How long the job is kept once it has ended (until it is removed).",
        ),
        click.option("--wait", is_flag=True, help="Wait for its end, and end with its exit code."),
    ]
    return decorated(function, [*kept, *own])


def _is_kept(flag: str) -> bool:
    return flag not in _LEFT_OUT_WHOLE and not flag.startswith(_LEFT_OUT)


def job_spec(
    spec: ServiceSpec,
    flags: Mapping[str, Any],
    resolved: Resolved,
    environment: Mapping[str, str],
) -> ServiceSpec:
    """The spec with the flags applied. Raises UsageError for flags that contradict each other."""
    number, at_once = flags["array"], flags["max_concurrent"]
    if flags["gang"] and at_once is not None and at_once != number:
        raise click.UsageError("--gang runs all tasks at once; leave --max-concurrent out.")
    if at_once is not None and at_once > number:
        raise click.UsageError(f"--max-concurrent {at_once} is more than --array {number}.")
    if flags["retry_delay"] is not None and not flags["retries"]:
        raise click.UsageError("--retry-delay says nothing without --retries.")
    spec = edit(spec, {**_NONE, **flags}, resolved, environment)
    spec = put(
        spec,
        "mode",
        ServiceMode(
            replicated_job=ReplicatedJob(max_concurrent=at_once or number, total_completions=number)
        ),
    )
    spec = put(spec, "task.container.env", _environment(at(spec, "task.container.env"), number))
    spec = put(spec, "task.restart", _restart(flags))
    if flags["cpus"] is not None:
        spec = put(spec, _RESERVED + "cpu_nano", flags["cpus"])
    if flags["memory"] is not None:
        spec = put(spec, _RESERVED + "memory_bytes", flags["memory"])
        if flags["limit_memory"] is None:
            # One that takes more than it asked for takes it from its neighbours.
            spec = put(spec, _LIMITS + "memory_bytes", flags["memory"])
    job = JobSpec(
        queue=flags["queue"],
        gang=flags["gang"],
        timeout_ns=flags["timeout"] or 0,
        keep_ns=flags["keep"],
    )
    return put(spec, "job", job)


def _restart(flags: Mapping[str, Any]) -> RestartPolicy:
    if not flags["retries"]:
        return RestartPolicy(condition="none")
    return RestartPolicy(
        condition="on-failure", max_attempts=flags["retries"], delay_ns=flags["retry_delay"]
    )


def _environment(given: tuple[str, ...], number: int) -> tuple[str, ...]:
    """The variables, with those that tell a task which one of how many it is; the user's own count
    before them.
    """
    named = {line.partition("=")[0] for line in given}
    ours = {SLOT_VARIABLE: "{{.Task.Slot}}", SIZE_VARIABLE: str(number)}
    return (*given, *(f"{key}={value}" for key, value in ours.items() if key not in named))


# What of `service create` is not asked for here, as if it were not given.
_NONE: dict[str, Any] = {
    **{scalar.name: None for scalar in SCALARS},
    "health_cmd": None,
    "no_healthcheck": False,
}
