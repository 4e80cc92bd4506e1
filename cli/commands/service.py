"""`swarmctl service`: the group; create and update, with their many flags, stand in a module of
their own.
"""

from __future__ import annotations

import click

from cli.lazy import Entry, LazyGroup

_LIST = "cli.commands.service_list:"
_CHANGE = "cli.commands.service_change:"


@click.group(
    cls=LazyGroup,
    entries=(
        Entry("create", _CHANGE + "create", "Make a service"),
        Entry("history", "cli.commands.service_history:history", "List the versions of a service"),
        Entry("inspect", _LIST + "inspect", "Show services"),
        Entry("logs", "cli.commands.logs:service_logs", "Show the logs of a service or task"),
        Entry("ls", _LIST + "ls", "List services", aliases=("list",)),
        Entry("ps", _LIST + "ps", "List the tasks of services"),
        Entry("rebalance", "cli.commands.rebalance:of_service", "Move tasks to even out nodes"),
        Entry("resume", _CHANGE + "resume", "Let a paused update or rollback go on"),
        Entry("rm", _LIST + "rm", "Remove services", aliases=("remove",)),
        Entry("rollback", _CHANGE + "rollback", "Go back to an earlier version of a service"),
        Entry("scale", _CHANGE + "scale", "Set the number of replicas of services"),
        Entry("wait", "cli.commands.wait:service", "Wait until services have converged"),
        Entry("update", _CHANGE + "update", "Change a service"),
    ),
)
def group() -> None:
    """Manage services."""
