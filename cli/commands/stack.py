"""`swarmctl stack`: the group. What deploys, what plans, what lists and what removes stand in
modules of their own.
"""

from __future__ import annotations

import click

from cli.lazy import Entry, LazyGroup

_DEPLOY = "cli.commands.stack_deploy:"
_LIST = "cli.commands.stack_list:"


@click.group(
    cls=LazyGroup,
    entries=(
        Entry("config", "cli.commands.stack_config:config", "Check compose files and print them"),
        Entry("deploy", _DEPLOY + "deploy", "Make the cluster run compose files", aliases=("up",)),
        Entry("diff", _DEPLOY + "diff", "Show what a deploy would change"),
        Entry("history", _LIST + "history", "List the deploys of a stack"),
        Entry("logs", "cli.commands.logs:stack_logs", "Show the logs of a stack's tasks"),
        Entry("ls", _LIST + "ls", "List stacks", aliases=("list",)),
        Entry("ps", _LIST + "ps", "List the tasks of a stack"),
        Entry("rm", "cli.commands.stack_remove:rm", "Remove stacks", aliases=("remove", "down")),
        Entry("rollback", _DEPLOY + "rollback", "Go back to an earlier deploy of a stack"),
        Entry("services", _LIST + "services", "List the services of a stack"),
        Entry("wait", "cli.commands.wait:stack", "Wait until a stack has converged"),
    ),
)
def group() -> None:
    """Deploy and manage stacks."""
