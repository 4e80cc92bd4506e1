"""`swarmctl job`: the group. A job is a service that runs to completion; what is said of services
(secrets, networks, constraints) holds for jobs.
"""

from __future__ import annotations

import click

from cli.lazy import Entry, LazyGroup

_LIST = "cli.commands.job_list:"
_CHANGE = "cli.commands.job_change:"


@click.group(
    cls=LazyGroup,
    entries=(
        Entry("run", "cli.commands.job_run:run", "Run a job"),
        Entry("ls", _LIST + "ls", "List jobs", aliases=("list",)),
        Entry("ps", _LIST + "ps", "List the tasks of jobs"),
        Entry("logs", "cli.commands.logs:job_logs", "Show the logs of a job or task"),
        Entry("wait", "cli.commands.job_run:wait", "Wait until jobs have ended"),
        Entry("cancel", _CHANGE + "cancel", "Stop jobs and keep them as history"),
        Entry("inspect", _LIST + "inspect", "Show jobs"),
        Entry("rm", _CHANGE + "rm", "Remove jobs", aliases=("remove",)),
    ),
)
def group() -> None:
    """Manage jobs: tasks that run to completion."""
