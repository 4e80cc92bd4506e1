"""`swarmctl stack deploy | diff | rollback`: what changes a stack, and what only says how."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping
from typing import Any

import click

from cli.connection import Connection
from cli.converge import wait_and_report
from cli.lazy import Command
from cli.objects import list_objects
from cli.options import Ref, StackRevisionRef, detach_options, make_filters
from cli.services import STACK_LABEL, interruptible, warn
from cli.settings import settings
from cli.stack_files import compose_options, load_spec, request_for
from cli.stack_plan import plan_and_show, plan_options
from cli.verdict import CONFLICT, Progress, Verdict, started
from swarm.errors import EXIT_NOT_CONVERGED, EXIT_ROLLED_BACK, Conflict
from swarm.v1 import (
    DeployStackRequest,
    DeployStackResponse,
    GetRequest,
    Kind,
    StackRollback,
    WatchServicesRequest,
)

_VERBS = {"created": "Creating", "updated": "Updating", "removed": "Removing"}
_PRUNE = click.option("--prune", is_flag=True, help="Remove what the file no longer names.")
_AUTH = click.option(
    "--with-registry-auth", is_flag=True, help="Send your registry credentials along."
)
_DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Only show what would change and where tasks would land."
)
_CHECK_VERSION = click.option(
    "--check-version",
    default="",
    metavar="PLAN",
    help="The version that a plan ends with: deploy only if that plan still holds.",
)


@click.command(cls=Command)
@compose_options
@click.argument("stack", type=Ref("stack"))
@_PRUNE
@_AUTH
@click.option(
    "--resolve-image",
    type=click.Choice(["always", "changed", "never"]),
    default="never",
    show_default=True,
    help="Accepted for Docker's sake: nodes resolve tags when they pull.",
)
@_DRY_RUN
@_CHECK_VERSION
@plan_options
@detach_options()
def deploy(stack: str, **flags: Any) -> int:
    """Make the cluster run what compose files say: all of it in one step, or nothing.

    Waits until every service has converged: its tasks run and have done so for as long as their
    update is watched, or have completed where it is a job. Ends with 6 when that cannot be or does
    not happen in time, with the reasons and the last lines of what failed; with 7 when a service
    was rolled back. Ctrl-C ends the waiting, not the deploy.

    With --dry-run nothing is changed; --format, --quiet and --exit-code are for its plan.
    """
    _check_plan_flags(flags)
    if flags["resolve_image"] != "never":
        how = flags["resolve_image"]
        warn([f"--resolve-image {how}: tags are resolved by the nodes that pull them"])
    spec = load_spec(flags["files"], stack, flags["env_files"], flags["profiles"])
    request = request_for(
        spec,
        prune=flags["prune"],
        with_registry_auth=flags["with_registry_auth"],
        expected_version=flags["check_version"],
    )

    async def work(connection: Connection) -> int:
        if flags["dry_run"]:
            return await _plan(connection, request, stack, flags)
        files = [word for file in flags["files"] for word in ("-c", file)]
        prune = ["--prune"] if flags["prune"] else []
        again = shlex.join(["swarmctl", "stack", "diff", *prune, *files, stack])
        return await _deploy(connection, request, stack, flags, again=again)

    return interruptible(work)


@click.command(cls=Command)
@compose_options
@click.argument("stack", type=Ref("stack"))
@_PRUNE
@_AUTH
@plan_options
def diff(stack: str, **flags: Any) -> int:
    """Show what a deploy would change, field by field, and where tasks would land.

    The same as stack deploy --dry-run. The last line ends with the plan's version: with stack
    deploy --check-version it is deployed as shown, or refused where it no longer holds.
    """
    spec = load_spec(flags["files"], stack, flags["env_files"], flags["profiles"])
    request = request_for(
        spec, prune=flags["prune"], with_registry_auth=flags["with_registry_auth"]
    )

    async def work(connection: Connection) -> int:
        return await _plan(connection, request, stack, flags)

    return interruptible(work)


@click.command(cls=Command)
@click.argument("stack", type=Ref("stack"))
@click.argument(
    "revision", required=False, default=0, type=StackRevisionRef(), metavar="[REVISION]"
)
@_DRY_RUN
@_CHECK_VERSION
@plan_options
@detach_options()
def rollback(stack: str, revision: int, **flags: Any) -> int:
    """Go back to an earlier deploy of a stack: by default to the one before the present.

    Services, networks, and the content of secrets and configs become what they were; what that
    deploy did not name is removed. Waits, and ends, as stack deploy does. stack history lists the
    revisions.
    """
    _check_plan_flags(flags)
    request = DeployStackRequest(
        rollback=StackRollback(stack=stack, revision=revision),
        expected_version=flags["check_version"],
    )

    async def work(connection: Connection) -> int:
        found = await connection.control.get(GetRequest(kind=Kind.STACK, ref=stack))
        held = found.object.stack if found.object else None
        assert held is not None and held.spec is not None
        name = held.spec.name
        if flags["dry_run"]:
            return await _plan(connection, request, name, flags)
        number = [str(revision)] if revision else []
        again = shlex.join(["swarmctl", "stack", "rollback", "--dry-run", name, *number])
        return await _deploy(connection, request, name, flags, again=again)

    return interruptible(work)


def _check_plan_flags(flags: Mapping[str, Any]) -> None:
    """What only a plan can use is refused where none is made."""
    for name, option in (("form", "--format"), ("exit_code", "--exit-code")):
        if flags[name] and not flags["dry_run"]:
            raise click.UsageError(f"{option} is for a plan; add --dry-run.")


async def _plan(
    connection: Connection, request: DeployStackRequest, stack: str, flags: Mapping[str, Any]
) -> int:
    return await plan_and_show(
        connection,
        request,
        name=stack,
        form=flags["form"],
        quiet=flags["quiet"],
        exit_code=flags["exit_code"],
    )


async def _deploy(
    connection: Connection,
    request: DeployStackRequest,
    stack: str,
    flags: Mapping[str, Any],
    *,
    again: str,
) -> int:
    """Deploys, prints what changed, and waits. `again` is the command that makes a new plan."""
    before = await _updates_of(connection, stack)
    try:
        answer = await connection.control.deploy_stack(request)
    except Conflict as error:
        if not request.expected_version:
            raise
        raise Conflict(f"{error.message}\nTo plan again: {again}") from None
    except asyncio.CancelledError:
        click.echo(
            "\nInterrupted before the manager answered: `swarmctl stack history "
            f"{stack}` tells whether the deploy was taken.",
            err=True,
        )
        raise
    _print_changes(answer, stack)
    if flags["detach"]:
        return 0
    return await wait_and_report(
        connection,
        settings(),
        WatchServicesRequest(stack=stack),
        revision=answer.store_revision,
        before=before,
        timeout_ns=flags["timeout_ns"],
        subject=f"stack {stack!r}",
        interrupted=(
            f"The deploy goes on; `swarmctl stack wait {stack}` waits for it, `swarmctl stack ps "
            f"{stack}` shows how far it is."
        ),
        quiet=flags["quiet"],
        advise=lambda verdict: _advice(verdict, request, answer, stack),
        versions={c.id: c.spec_version for c in answer.changes if c.spec_version},
    )


def _advice(
    verdict: Verdict, request: DeployStackRequest, answer: DeployStackResponse, stack: str
) -> str:
    """What to do about a deploy that does not become what it should."""
    awaiting = [verdict.statuses[id_].name for id_ in verdict.of(Progress.AWAITS)]
    if awaiting and not verdict.of(Progress.PAUSED, Progress.STUCK, Progress.ROLLED_BACK):
        return f"Let it go on with `swarmctl service resume {awaiting[0]}`, or roll it back."
    if verdict.exit_code == CONFLICT:
        history, wait = f"`swarmctl stack history {stack}`", f"`swarmctl stack wait {stack}`"
        return f"{history} tells by whom; {wait} waits for that change."
    if request.spec is None or verdict.exit_code not in (EXIT_NOT_CONVERGED, EXIT_ROLLED_BACK):
        return ""
    undo = "undo this deploy with" if answer.revision > 1 else "remove the stack with"
    command = "rollback" if answer.revision > 1 else "rm"
    return f"Correct the file and deploy again, or {undo} `swarmctl stack {command} {stack}`."


async def _updates_of(connection: Connection, stack: str) -> dict[str, int]:
    """When the last update of each service of the stack began."""
    services = await list_objects(
        connection, Kind.SERVICE, filters=make_filters((), label=[f"{STACK_LABEL}={stack}"])
    )
    return {service.id: started(service) for service in services}


def _print_changes(answer: DeployStackResponse, stack: str) -> None:
    """What the deploy did, in Docker's words; what it left alone is a number."""
    warn(answer.warnings)
    unchanged = 0
    for change in answer.changes:
        if change.action == "unchanged":
            unchanged += 1
            continue
        what = f"{change.kind.name.lower()} {change.name}"
        if change.action == "updated" and change.kind is Kind.SERVICE:
            what += f" (id: {change.id})"
        click.echo(f"{_VERBS[change.action]} {what}")
    if unchanged and unchanged == len(answer.changes):
        click.echo(f"Nothing to change in stack {stack}: {unchanged} unchanged")
    elif unchanged:
        click.echo(f"{unchanged} unchanged")
