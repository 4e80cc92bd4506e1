"""`swarmctl job run | wait`: makes a job, and waits until jobs have ended."""

from __future__ import annotations

import os
from typing import Any

import click

from cli.changing import auth_of, recorded, resolve_names
from cli.connection import Connection
from cli.job_flags import JobCommand, job_options, job_spec
from cli.job_wait import wait_and_report
from cli.jobs import get_jobs
from cli.lazy import Command
from cli.objects import raise_all
from cli.options import DURATION, Ref
from cli.services import interruptible, warn
from cli.settings import settings
from swarm.errors import invariant
from swarm.ids import new_id, system_rng
from swarm.v1 import ContainerSpec, CreateRequest, ServiceSpec, Spec, TaskSpec


@click.command(cls=JobCommand, context_settings={"allow_interspersed_args": False})
@job_options
@click.argument("image")
@click.argument("arguments", nargs=-1, metavar="[COMMAND] [ARG...]")
def run(image: str, arguments: tuple[str, ...], **flags: Any) -> int:
    """Run a job: tasks that run once, to completion. Prints the job's id and does not wait.

    With --wait it ends as the job does; see `swarmctl job wait --help`. Each task of an array finds
    its number, from 1 on, in SWARM_TASK_SLOT, and how many there are in SWARM_ARRAY_SIZE. In --env,
    --mount and --hostname, {{.Task.Slot}} stands for its number.

    With --runtime process there is no image: what stands in its place is the command.
    """
    process = flags["runtime"] == "process"
    container = (
        ContainerSpec(args=(image, *arguments))
        if process
        else ContainerSpec(image=recorded(image, flags), args=arguments)
    )
    spec = ServiceSpec(
        name=flags["name"] or f"job-{new_id(system_rng())[:8]}", task=TaskSpec(container=container)
    )
    auth = auth_of(container.image, flags)

    async def work(connection: Connection) -> int:
        resolved = await resolve_names(connection, flags)
        wanted = job_spec(spec, flags, resolved, os.environ)
        answer = await connection.control.create(
            CreateRequest(spec=Spec(service=wanted), registry_auth=auth)
        )
        warn(answer.warnings)
        click.echo(answer.id)
        if not flags["wait"]:
            return 0
        found, problems = await get_jobs(connection, [answer.id])
        raise_all(problems)
        return await wait_and_report(
            connection, settings(), found, timeout_ns=0, quiet=flags["quiet"]
        )

    return interruptible(work)


@click.command(cls=Command)
@click.argument("jobs", nargs=-1, required=True, type=Ref("job"), metavar="JOB...")
@click.option("-q", "--quiet", is_flag=True, help="No progress display.")
@click.option(
    "--timeout",
    "timeout_ns",
    type=DURATION,
    default="0",
    help="How long to wait (without end).",
)
def wait(jobs: tuple[str, ...], *, quiet: bool, timeout_ns: int) -> int:
    """Wait until jobs have ended.

    Ends with the exit code of the job: 0 when it is complete, that of the first task that failed
    for good when it failed, 124 when it timed out, 125 when it failed without an exit code, 130
    when it was cancelled. Of several jobs, the first named that is not complete counts. Ends with 6
    when they have not ended within --timeout, and says on standard error what happened.
    """

    async def work(connection: Connection) -> int:
        found, problems = await get_jobs(connection, jobs)
        raise_all(problems)
        invariant(bool(found), "no job without a problem")
        return await wait_and_report(
            connection, settings(), found, timeout_ns=timeout_ns, quiet=quiet
        )

    return interruptible(work)
