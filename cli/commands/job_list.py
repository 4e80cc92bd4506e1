"""`swarmctl job ls | ps | inspect`."""

from __future__ import annotations

from collections.abc import Callable

import click

from cli.connection import Connection, call
from cli.format import print_inspected, print_rows
from cli.jobs import fetch_jobs, get_jobs, job_columns, job_row, job_state, queue_of
from cli.lazy import Command
from cli.objects import raise_all
from cli.options import (
    Ref,
    TaskList,
    format_option,
    list_options,
    make_filters,
    no_trunc_option,
    task_list_options,
)
from cli.services import describing
from cli.settings import settings
from cli.tasks import list_tasks
from swarm.errors import SwarmError
from swarm.v1 import GetRequest, GetResponse, Kind

JOBS = click.argument("jobs", nargs=-1, required=True, type=Ref("job"), metavar="JOB...")
# Filters that are looked at here; the others are the manager's.
_OWN = ("queue", "state")


@click.command(cls=Command)
@list_options("id", "name", "label", "queue", "state")
@no_trunc_option
def ls(filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool, no_trunc: bool) -> None:
    """List jobs.

    TASKS counts those that completed, of all that must. A state is queued, running, complete,
    failed, cancelled, or on the way: cancelling, removing.
    """
    asked = make_filters(pair for pair in filters if pair[0] not in _OWN)
    queues = {value for key, value in filters if key == "queue"}
    states = {value for key, value in filters if key == "state"}

    async def work(connection: Connection) -> None:
        rows = [
            job_row(job, status, now_ns=settings().clock.now_ns(), no_trunc=no_trunc)
            for job, status in await fetch_jobs(connection, asked)
            if (not queues or queue_of(job) in queues) and (not states or job_state(job) in states)
        ]
        print_rows(
            rows,
            job_columns(rows),
            form=form,
            quiet=quiet,
            terminal=settings().terminal(),
            sentences="Details",
        )

    call(work)


@click.command(cls=Command)
@JOBS
@task_list_options("id", "name", "node", "desired-state", "label")
def ps(jobs: tuple[str, ...], *, wanted: TaskList) -> None:
    r"""List the tasks of jobs.

    The newest task of each slot comes first; the ones before it are marked with \_.
    """

    async def work(connection: Connection) -> list[SwarmError]:
        found, problems = await get_jobs(connection, jobs)
        if found:
            await list_tasks(connection, settings(), wanted, service=[job.id for job in found])
        return problems

    raise_all(call(work))


@click.command(cls=Command)
@JOBS
@format_option
@click.option("--pretty", is_flag=True, help="Print for people.")
def inspect(jobs: tuple[str, ...], form: str, *, pretty: bool) -> None:
    """Show jobs, as `service inspect` does."""

    async def work(
        connection: Connection,
    ) -> tuple[list[GetResponse], list[SwarmError], Callable[[GetResponse], str]]:
        found, problems = await get_jobs(connection, jobs)
        answers = [
            await connection.control.get(GetRequest(kind=Kind.SERVICE, ref=job.id)) for job in found
        ]
        return answers, problems, await describing(connection, answers if pretty else ())

    answers, problems, describe = call(work)
    if pretty:
        if answers:
            click.echo("\n\n".join(describe(answer) for answer in answers))
    elif answers or not form:
        from cli import docker_json

        documents = [docker_json.from_answer(Kind.SERVICE, answer) for answer in answers]
        print_inspected(documents, form=form, known=docker_json.KNOWN)
    raise_all(problems)
