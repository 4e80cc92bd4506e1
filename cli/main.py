"""swarmctl's entry point: the root command, and the one place where errors become messages and exit
codes.

An operating error is one line on stderr, `Error: …`, with the exit code of swarm.errors. There is
never a traceback, unless SWARM_DEBUG is set.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from cli.lazy import Entry, LazyGroup
from cli.settings import Settings

if TYPE_CHECKING:
    from swarm.errors import SwarmError

EXIT_USAGE = 2
EXIT_DEFECT = 1

_MANAGE = "Management commands"
_LOCAL = "This client"
ENTRIES = (
    Entry("swarm", "cli.commands.swarm:group", "Make, join, configure, back up a cluster", _MANAGE),
    Entry("node", "cli.commands.node:group", "Manage nodes", _MANAGE),
    Entry("stack", "cli.commands.stack:group", "Deploy and manage stacks", _MANAGE),
    Entry("service", "cli.commands.service:group", "Manage services", _MANAGE),
    Entry("job", "cli.commands.job:group", "Run and manage jobs", _MANAGE),
    Entry("queue", "cli.commands.queue:group", "Manage the queues of jobs", _MANAGE),
    Entry("task", "cli.commands.task:group", "Look into tasks", _MANAGE),
    Entry("gpu", "cli.commands.gpu:group", "Look into GPUs and who has them", _MANAGE),
    Entry("secret", "cli.commands.blob:secret", "Manage secrets", _MANAGE),
    Entry("config", "cli.commands.blob:config", "Manage configs", _MANAGE),
    Entry("network", "cli.commands.network:group", "Manage networks", _MANAGE),
    Entry("volume", "cli.commands.volume:group", "Manage volumes", _MANAGE),
    Entry("exec", "cli.commands.exec:command", "Run a command in a running task"),
    Entry("cp", "cli.commands.cp:command", "Copy files into a task, or out of it"),
    Entry("logs", "cli.commands.logs:service_logs", "Show the logs of a service or task"),
    Entry("top", "cli.commands.top:command", "Show what nodes, services and tasks use, live"),
    Entry(
        "events", "cli.commands.events:command", "Show what changes in the cluster, as it happens"
    ),
    Entry("info", "cli.commands.info:command", "Show the node and its cluster"),
    Entry("version", "cli.commands.version:command", "Show the versions of client and server"),
    Entry("context", "cli.commands.context:group", "Manage connections to other clusters", _LOCAL),
    Entry(
        "completion", "cli.commands.completion:command", "Print a shell completion script", _LOCAL
    ),
)
EPILOG = """\b
Exit codes:
  0    done; where the command waits: converged
  1    a defect of swarmctl or of the manager
  2    wrong usage or an invalid request
  3    a plan that would change something
  4    not found
  5    conflict: a name is taken, an object in use, a version out of date
  6    not converged: stuck, the deadline passed, or an update is paused
  7    rolled back
  8    denied
  9    unavailable: no daemon, no manager, no connection
  10   timed out: whether it happened is unknown
  11   a limit was reached
  12   not supported
  130  interrupted

\b
exec ends with the exit code of the command that it ran. job wait and job run
--wait end with the job's: 124 timed out, 125 failed without one, 130 cancelled.

\b
Environment:
  SWARM_HOST     where to connect: unix:///path or tcp://host:port[,host:port]
  SWARM_CONTEXT  name of the context to use
  SWARM_CONFIG   folder of contexts and settings (~/.config/swarmctl)
  SWARM_STALE    1: as --stale
  SWARM_DEBUG    1: show tracebacks
  NO_COLOR       set: no colour
"""


class _Unread(Exception):
    """Nobody reads the output any more."""


class _Root(LazyGroup):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _Unread from error  # click would make it an exit code of 1


@click.command(
    name="swarmctl",
    cls=_Root,
    entries=ENTRIES,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("-H", "--host", metavar="HOST", help="Daemon or manager to talk to.")
@click.option("-c", "--context", "context_name", metavar="NAME", help="Context to use.")
@click.option(
    "--stale",
    is_flag=True,
    help="Read what the manager knows, even if it has lost touch with the others.",
)
@click.option("-D", "--debug", is_flag=True, help="Show tracebacks of errors.")
@click.version_option(None, "-v", "--version", package_name="swarm-py", message="%(version)s")
@click.pass_context
def root(
    ctx: click.Context, host: str | None, context_name: str | None, *, stale: bool, debug: bool
) -> None:
    """Run stacks of services on a cluster of hosts."""
    ctx.obj = Settings.from_environment(
        os.environ, host=host, context_name=context_name, debug=debug, stale=stale
    )


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line; the exit code."""
    debug = bool(os.environ.get("SWARM_DEBUG")) or bool({"-D", "--debug"} & set(arguments[:4]))
    try:
        result = root.main(arguments, prog_name="swarmctl", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (_Unread, BrokenPipeError):
        return _unread()
    except Exception as error:  # the edge: every error becomes a message
        return _report(error, debug=debug)


def _unread() -> int:
    """The reader (head, less) is gone, which is no error; what is left in the buffers has nowhere
    to go.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.isatty():
            os.dup2(nowhere, stream.fileno())
    return 0


def _report(error: Exception, *, debug: bool) -> int:
    from swarm import errors

    if debug:
        import traceback

        traceback.print_exception(error)
    groups = _operating(error)
    for known in groups:
        click.echo(f"Error: {known.message}", err=True)
    if groups:
        return errors.mapping(groups[0]).exit_code
    click.echo(
        f"Error: a defect of swarmctl: {type(error).__name__}: {error}\n"
        "Run it again with SWARM_DEBUG=1 and report what it shows.",
        err=True,
    )
    return EXIT_DEFECT


def _operating(error: BaseException) -> list[SwarmError]:
    from swarm.errors import SwarmError

    if isinstance(error, SwarmError):
        return [error]
    if isinstance(error, BaseExceptionGroup):
        return [known for inner in error.exceptions for known in _operating(inner)]
    return []


if __name__ == "__main__":
    main()
