"""`swarmctl job cancel | rm`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import click

from cli.changing import change_service
from cli.connection import Connection, call
from cli.jobs import get_jobs, has_ended, is_cancelled, job_state
from cli.lazy import Command
from cli.objects import name_of, raise_all
from cli.options import Ref
from cli.spec_paths import put
from swarm.errors import Conflict, NotManager, SwarmError, Unavailable
from swarm.v1 import Kind, RemoveRequest, Service, ServiceSpec

JOBS = click.argument("jobs", nargs=-1, required=True, type=Ref("job"), metavar="JOB...")


@click.command(cls=Command)
@JOBS
def cancel(jobs: tuple[str, ...]) -> None:
    """Stop jobs and keep them as history; does not wait until their tasks have stopped.

    `swarmctl job wait` does. A cancelled job runs again with `swarmctl service update --force JOB`.
    """

    async def one(connection: Connection, job: Service) -> None:
        if is_cancelled(job):
            return
        if has_ended(job):
            raise Conflict(
                f"job {name_of(job)!r} has ended already: it is {job_state(job)}; nothing of it "
                "is running"
            )
        await change_service(connection, job.id, _cancelled)

    _each(jobs, one)


def _cancelled(spec: ServiceSpec) -> ServiceSpec:
    return put(spec, "job.cancelled", True)  # a value like any other


@click.command(cls=Command)
@JOBS
@click.option("-f", "--force", is_flag=True, help="Although it has not ended; its tasks stop.")
def rm(jobs: tuple[str, ...], *, force: bool) -> None:
    """Remove jobs that have ended, with their tasks and logs."""

    async def one(connection: Connection, job: Service) -> None:
        if not (force or has_ended(job) or job.pending_delete):
            raise Conflict(
                f"job {name_of(job)!r} is {job_state(job)}; cancel it first, or give --force"
            )
        await connection.control.remove(RemoveRequest(kind=Kind.SERVICE, ref=job.id))

    _each(jobs, one)


def _each(refs: tuple[str, ...], one: Callable[[Connection, Service], Awaitable[None]]) -> None:
    """Does it to each job and prints its name; then raises the problems."""

    async def work(connection: Connection) -> list[SwarmError]:
        found, problems = await get_jobs(connection, refs)
        for job in found:
            try:
                await one(connection, job)
            except (NotManager, Unavailable):
                raise  # the same for every job: once is enough
            except SwarmError as error:
                problems.append(error)
            else:
                click.echo(name_of(job))
        return problems

    raise_all(call(work))
