"""`swarmctl stack`: compose files on the cluster."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cli import docker_json
from cli.connection import Connection, call
from cli.converge import started, wait_and_report
from cli.format import Record, print_rows, to_yaml
from cli.lazy import Group
from cli.objects import list_objects, raise_all
from cli.options import (
    Ref,
    detach_options,
    filter_option,
    format_option,
    make_filters,
    no_trunc_option,
    quiet_names_option,
    quiet_option,
)
from cli.registry import auth_for
from cli.services import STACK_LABEL, fetch_services, print_services, warn
from cli.settings import settings
from cli.tasks import fetch_tasks, image_of, natural, print_tasks
from swarm.errors import EXIT_INTERRUPTED, NotFound, SwarmError
from swarm.v1 import (
    DeployStackRequest,
    DeployStackResponse,
    GetRequest,
    Kind,
    RemoveRequest,
    Service,
    Stack,
    StackSpec,
    WatchServicesRequest,
)

F = TypeVar("F", bound=Callable[..., Any])
COLUMNS = (("NAME", "Name"), ("SERVICES", "Services"))
_VERBS = {"created": "Creating", "updated": "Updating", "removed": "Removing"}
_FILES = click.option(
    "-c",
    "--compose-file",
    "files",
    multiple=True,
    required=True,
    type=click.Path(allow_dash=True),
    metavar="FILE",
    help="Compose file, or - for standard input; several are merged, the last one wins.",
)


_ENV_FILES = click.option(
    "--env-file",
    "env_files",
    multiple=True,
    type=click.Path(allow_dash=True),
    metavar="FILE",
    help="Variables for the compose file, in place of .env beside it.",
)
_PROFILES = click.option(
    "--profile", "profiles", multiple=True, metavar="NAME", help="Profile to take services of."
)


def compose_options(function: F) -> F:
    """The options that say which compose files are read, and how."""
    return _FILES(_ENV_FILES(_PROFILES(function)))


@click.group(cls=Group, aliases={"up": "deploy", "down": "rm"})
def group() -> None:
    """Deploy and manage stacks."""


@group.command()
@compose_options
@click.argument("stack", type=Ref("stack"))
@click.option("--prune", is_flag=True, help="Remove what the file no longer names.")
@click.option("--with-registry-auth", is_flag=True, help="Send your registry credentials along.")
@click.option(
    "--resolve-image",
    type=click.Choice(["always", "changed", "never"]),
    default="never",
    show_default=True,
    help="Accepted for Docker's sake: nodes resolve tags when they pull.",
)
@detach_options()
def deploy(
    stack: str,
    files: tuple[str, ...],
    env_files: tuple[str, ...],
    profiles: tuple[str, ...],
    *,
    prune: bool,
    with_registry_auth: bool,
    resolve_image: str,
    detach: bool,
    timeout_ns: int,
) -> int:
    """Make the cluster run what compose files say: all of it in one step, or nothing.

    Waits until every service has converged. Ends with 6 when that does not happen in time, and with
    7 when a service was rolled back.
    """
    if resolve_image != "never":
        warn([f"--resolve-image {resolve_image}: tags are resolved by the nodes that pull them"])
    spec, warnings = _load(files, stack, env_files, profiles)
    warn(warnings)
    auths = _auths(spec) if with_registry_auth else {}

    async def work(connection: Connection) -> int:
        services = await list_objects(
            connection, Kind.SERVICE, filters=make_filters((), label=[f"{STACK_LABEL}={stack}"])
        )
        before = {service.id: started(service) for service in services}
        request = DeployStackRequest(spec=spec, prune=prune, registry_auths=auths)
        answer = await connection.control.deploy_stack(request)
        _print_changes(answer)
        if detach or not spec.services:
            return 0
        try:
            return await wait_and_report(
                connection,
                settings(),
                WatchServicesRequest(stack=stack),
                revision=answer.revision,
                before=before,
                timeout_ns=timeout_ns,
                subject=f"stack {stack!r}",
            )
        except asyncio.CancelledError:
            click.echo(
                f"\nThe deploy goes on; `swarmctl stack ps {stack}` shows how far it is.", err=True
            )
            raise

    return interruptible(work)


def interruptible(work: Callable[[Connection], Awaitable[int]]) -> int:
    """Runs a command's work; Ctrl-C ends it with the exit code for that and no further word."""
    try:
        return call(work)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _load(
    files: tuple[str, ...], stack: str, env_files: tuple[str, ...], profiles: tuple[str, ...]
) -> tuple[StackSpec, tuple[str, ...]]:
    from cli.compose import load

    stdin = sys.stdin.read() if "-" in files else None
    loaded = load(
        files,
        stack=stack,
        environment=dict(os.environ),
        stdin=stdin,
        env_files=tuple(map(Path, env_files)),
        # None given: those of COMPOSE_PROFILES.
        profiles=profiles,
    )
    return loaded.spec, loaded.warnings


def _auths(spec: StackSpec) -> dict[str, str]:
    """Credentials by service name; services whose registry has none are left out."""
    found = {}
    for service in spec.services:
        image = image_of(service)
        auth = auth_for(image, os.environ) if image else ""
        if auth:
            found[service.name] = auth
    return found


def _print_changes(answer: DeployStackResponse) -> None:
    warn(answer.warnings)
    for change in answer.changes:
        what = f"{change.kind.name.lower()} {change.name}"
        if change.action == "updated" and change.kind is Kind.SERVICE:
            what += f" (id: {change.id})"
        if change.action == "unchanged":
            if change.kind is Kind.SERVICE:
                click.echo(f"Unchanged {what} (id: {change.id})")
        else:
            click.echo(f"{_VERBS[change.action]} {what}")


@group.command()
@compose_options
@click.option(
    "--stack",
    default="stack",
    show_default=True,
    metavar="NAME",
    help="Stack's name to show it for.",
)
def config(
    files: tuple[str, ...], env_files: tuple[str, ...], profiles: tuple[str, ...], stack: str
) -> None:
    """Check compose files and print what they come to, as YAML."""
    spec, warnings = _load(files, stack, env_files, profiles)
    warn(warnings)
    click.echo(to_yaml(docker_json.stack(Stack(spec=spec))["Spec"]), nl=False)


@group.command("ls")
@format_option
@quiet_names_option
def ls(form: str, *, quiet: bool) -> None:
    """List stacks."""

    async def work(connection: Connection) -> list[Stack]:
        return await list_objects(connection, Kind.STACK)

    rows = [
        Record(
            ID=stack.id,
            Name=stack.spec.name,
            Services=len(stack.spec.services),
            Revision=stack.revision,
        )
        for stack in call(work)
        if stack.spec is not None
    ]
    rows.sort(key=lambda row: natural(row["Name"]))
    print_rows(
        rows, COLUMNS, form=form, quiet=quiet, terminal=settings().terminal(), identifier="Name"
    )


@group.command()
@click.argument("stack", type=Ref("stack"))
@filter_option("id", "name", "node", "desired-state", "label")
@format_option
@quiet_option
@no_trunc_option
@click.option("--no-resolve", is_flag=True, help="Show ids instead of names.")
def ps(
    stack: str,
    filters: tuple[tuple[str, str], ...],
    form: str,
    *,
    quiet: bool,
    no_trunc: bool,
    no_resolve: bool,
) -> None:
    """List the tasks of a stack."""

    async def work(connection: Connection) -> None:
        found = await connection.control.get(GetRequest(kind=Kind.STACK, ref=stack))
        services = await _services_of(connection, found.object.stack if found.object else None)
        if not services:
            click.echo(f"Nothing found in stack: {stack}", err=True)
            return
        asked = make_filters(filters, service=[service.id for service in services])
        tasks, lookup = await fetch_tasks(connection, asked, resolve=not no_resolve)
        print_tasks(tasks, lookup, settings(), form=form, quiet=quiet, no_trunc=no_trunc)

    call(work)


async def _services_of(connection: Connection, stack: Stack | None) -> list[Service]:
    assert stack is not None and stack.spec is not None
    label = f"{STACK_LABEL}={stack.spec.name}"
    return await list_objects(connection, Kind.SERVICE, filters=make_filters((), label=[label]))


@group.command()
@click.argument("stack", type=Ref("stack"))
@filter_option("id", "name", "label", "mode")
@format_option
@quiet_option
def services(stack: str, filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool) -> None:
    """List the services of a stack."""

    async def work(connection: Connection) -> None:
        found = await connection.control.get(GetRequest(kind=Kind.STACK, ref=stack))
        held = found.object.stack if found.object else None
        assert held is not None and held.spec is not None
        asked = make_filters((*filters, ("label", f"{STACK_LABEL}={held.spec.name}")))
        pairs = await fetch_services(connection, asked)
        if not pairs:
            click.echo(f"Nothing found in stack: {stack}", err=True)
            return
        print_services(pairs, settings(), form=form, quiet=quiet)

    call(work)


@group.command()
@click.argument("stacks", nargs=-1, required=True, type=Ref("stack"), metavar="STACK...")
@detach_options(until="their tasks are gone")
def rm(stacks: tuple[str, ...], *, detach: bool, timeout_ns: int) -> int:
    """Remove stacks with all that belongs to them. Waits until their tasks are gone."""

    async def work(connection: Connection) -> int:
        problems: list[SwarmError] = []
        code = 0
        for name in stacks:
            try:
                code = await _remove(connection, name, detach=detach, timeout_ns=timeout_ns) or code
            except NotFound as error:
                problems.append(error)
        raise_all(problems)
        return code

    return interruptible(work)


async def _remove(connection: Connection, name: str, *, detach: bool, timeout_ns: int) -> int:
    found = await connection.control.get(GetRequest(kind=Kind.STACK, ref=name))
    stack = found.object.stack if found.object else None
    assert stack is not None and stack.spec is not None
    services = await _services_of(connection, stack)
    await connection.control.remove(RemoveRequest(kind=Kind.STACK, ref=stack.id))
    spec = stack.spec
    for kind, names in (
        ("service", [service.spec.name for service in services if service.spec]),
        ("secret", [item.name for item in spec.secrets]),
        ("config", [item.name for item in spec.configs]),
        ("network", [item.name for item in spec.networks]),
    ):
        for item in names:
            click.echo(f"Removing {kind} {item}")
    if detach or not services:
        return 0
    try:
        return await wait_and_report(
            connection,
            settings(),
            WatchServicesRequest(services=tuple(service.id for service in services)),
            revision=0,
            before={},
            timeout_ns=timeout_ns,
            subject=f"stack {name!r}",
            removing=True,
        )
    except asyncio.CancelledError:
        click.echo(f"\nThe removal of stack {name} goes on.", err=True)
        raise
