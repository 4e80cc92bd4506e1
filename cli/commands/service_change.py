"""`swarmctl service create | update | scale | rollback | resume`: changes services, and waits for
the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import msgspec

from cli.changing import auth_of, change_service, recorded, resolve_names
from cli.connection import Connection
from cli.converge import NO_VERSIONS, wait_and_report
from cli.lazy import Command
from cli.options import Ref, ServiceVersionRef, detach_options
from cli.service_flags import edit, new_mode
from cli.service_options import create_options, pause_after_option, update_options
from cli.services import interruptible, subject_of, warn
from cli.settings import settings
from cli.spec_paths import put
from cli.verdict import Goal, next_step, started
from swarm.errors import Invalid
from swarm.ids import new_id, system_rng
from swarm.v1 import (
    ContainerSpec,
    CreateRequest,
    GetRequest,
    Kind,
    ResumeUpdateRequest,
    ServiceSpec,
    Spec,
    TaskSpec,
    UpdateState,
    WatchServicesRequest,
)


@click.command(cls=Command, context_settings={"allow_interspersed_args": False})
@create_options
@detach_options()
@click.argument("image")
@click.argument("arguments", nargs=-1, metavar="[COMMAND] [ARG...]")
def create(image: str, arguments: tuple[str, ...], **flags: Any) -> int:
    """Make a service from an image, and wait until it runs.

    With --runtime process there is no image: what stands in its place is the command.
    """
    if flags["runtime"] == "process":
        container = ContainerSpec(args=(image, *arguments))
    else:
        container = ContainerSpec(image=recorded(image, flags), args=arguments)
    spec = ServiceSpec(
        name=flags["name"] or f"service-{new_id(system_rng())[:8]}",
        task=TaskSpec(container=container),
        mode=new_mode(flags),
    )
    auth = auth_of(container.image, flags)

    async def work(connection: Connection) -> int:
        resolved = await resolve_names(connection, flags)
        wanted = edit(spec, flags, resolved, os.environ)
        answer = await connection.control.create(
            CreateRequest(spec=Spec(service=wanted), registry_auth=auth)
        )
        warn(answer.warnings)
        click.echo(answer.id)
        if flags["detach"]:
            return 0
        return await _wait(connection, {answer.id: 0}, answer.version, flags, (wanted.name,))

    return interruptible(work)


@click.command(cls=Command)
@update_options
@detach_options()
@click.argument("service", type=Ref("service"))
def update(service: str, **flags: Any) -> int:
    """Change a service: only what is given changes. Waits until the new tasks run."""
    changing = _given(flags)
    if flags["rollback_to"] and not flags["rollback"]:
        raise click.UsageError("--to names the version for --rollback, which is missing.")
    if not changing:
        hint = "; to let a paused update go on: `swarmctl service resume`"
        raise Invalid(
            "nothing to change: give at least one flag; --force makes new tasks"
            f"{hint if flags['pause_after'] else ''}"
        )
    if flags["rollback"] and changing != {"rollback"}:
        other = sorted(changing - {"rollback"})[0].replace("_", "-")
        raise click.UsageError(f"--rollback and --{other} exclude each other.")

    if flags["image"]:
        flags["image"] = recorded(flags["image"], flags)

    async def work(connection: Connection) -> int:
        resolved = await resolve_names(connection, flags)

        def change(spec: ServiceSpec) -> ServiceSpec:
            missed: list[str] = []
            wanted = edit(spec, flags, resolved, os.environ, missed.append)
            warn(missed)
            return set_numbers(
                wanted, replicas=flags["replicas"], concurrent=flags["max_concurrent"]
            )

        return await _apply(connection, service, change, flags, rollback=flags["rollback"])

    return interruptible(work)


def _given(flags: Mapping[str, Any]) -> set[str]:
    """Names of the flags that ask for a change."""
    aside = {"detach", "timeout_ns", "quiet", "with_registry_auth", "no_resolve_image"}
    aside |= {"rollback_to", "pause_after"}
    return {
        name
        for name, value in flags.items()
        if name not in aside and value is not None and value is not False and value not in ((), [])
    }


@click.command(cls=Command)
@click.argument("service", type=Ref("service"))
@click.option(
    "--to",
    "rollback_to",
    type=ServiceVersionRef(),
    metavar="VERSION",
    help="Go back to this version, of those that service history lists.",
)
@pause_after_option
@click.option("-q", "--quiet", is_flag=True, help="No progress display.")
@detach_options()
def rollback(service: str, **flags: Any) -> int:
    """Go back to the version before the last update, or to any, and wait until its tasks run."""

    async def work(connection: Connection) -> int:
        return await _apply(connection, service, lambda spec: spec, flags, rollback=True)

    return interruptible(work)


@click.command(cls=Command)
@click.argument("service", type=Ref("service"))
@click.option(
    "--pause-after",
    type=click.IntRange(min=1),
    metavar="N",
    help="Pause again once N tasks are new, those that are already included.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress display.")
@detach_options()
def resume(service: str, **flags: Any) -> int:
    """Let a paused update or rollback go on, and wait until its tasks run.

    What has failed so far does not count any more, and its deadline begins anew.
    """

    async def work(connection: Connection) -> int:
        answer = await connection.control.get(GetRequest(kind=Kind.SERVICE, ref=service))
        found = answer.object.service if answer.object else None
        assert found is not None and found.meta is not None
        request = ResumeUpdateRequest(
            service=found.id, version=found.meta.version, pause_after=flags["pause_after"] or 0
        )
        done = await connection.control.resume_update(request)
        click.echo(service)
        if flags["detach"]:
            return 0
        back = found.update_status and found.update_status.state is UpdateState.ROLLBACK_PAUSED
        return await _wait(
            connection,
            {found.id: 0},  # it is the same update as before
            done.version,
            flags,
            (service,),
            versions={found.id: found.spec_version},
            goal=Goal.ROLLED_BACK if back else Goal.UPDATED,
        )

    return interruptible(work)


@click.command(cls=Command)
@click.argument(
    "scales", nargs=-1, required=True, type=Ref("service"), metavar="SERVICE=REPLICAS..."
)
@detach_options()
def scale(scales: tuple[str, ...], **flags: Any) -> int:
    """Set the number of replicas of services, and wait until they run."""
    wanted: dict[str, int] = {}
    for text in scales:
        name, separator, number = text.rpartition("=")
        if not separator or not name or not number.isdecimal():
            raise click.BadParameter(f"{text!r}: write SERVICE=REPLICAS, such as web=5.")
        wanted[name] = int(number)
    flags["quiet"] = False

    async def work(connection: Connection) -> int:
        before: dict[str, int] = {}
        versions: dict[str, int] = {}
        version = 0
        for name, number in wanted.items():

            def change(spec: ServiceSpec, number: int = number) -> ServiceSpec:
                return set_numbers(spec, replicas=number, concurrent=None)

            found, reached = await change_service(connection, name, change)
            before[found.id] = started(found)
            versions[found.id] = found.spec_version + 1
            version = max(version, reached)
            click.echo(f"{name} scaled to {number}")
        if flags["detach"]:
            return 0
        return await _wait(connection, before, version, flags, tuple(wanted), versions=versions)

    return interruptible(work)


def set_numbers(spec: ServiceSpec, *, replicas: int | None, concurrent: int | None) -> ServiceSpec:
    """The spec with another number of tasks. Raises Invalid where the mode has none."""
    mode = spec.mode
    if replicas is None and concurrent is None:
        return spec
    if mode is not None and (mode.global_service is not None or mode.global_job is not None):
        raise Invalid(
            f"service {spec.name!r} is global: it has one task on each node and cannot be scaled"
        )
    if mode is not None and mode.replicated_job is not None:
        job = mode.replicated_job
        if replicas is not None:
            job = msgspec.structs.replace(job, total_completions=replicas)
        if concurrent is not None:
            job = msgspec.structs.replace(job, max_concurrent=concurrent)
        return put(spec, "mode.replicated_job", job)
    if concurrent is not None:
        raise Invalid(
            f"service {spec.name!r} is replicated; --max-concurrent is for replicated jobs"
        )
    from swarm.v1 import Replicated, ServiceMode

    return put(spec, "mode", ServiceMode(replicated=Replicated(replicas=replicas)))


# ------------------------------------------------------------------ shared


async def _apply(
    connection: Connection,
    ref: str,
    change: Callable[[ServiceSpec], ServiceSpec],
    flags: Mapping[str, Any],
    *,
    rollback: bool,
) -> int:
    found, version = await change_service(connection, ref, change, rollback=rollback, flags=flags)
    click.echo(ref)
    if flags["detach"]:
        return 0
    return await _wait(
        connection,
        {found.id: started(found)},
        version,
        flags,
        (ref,),
        versions={found.id: found.spec_version + 1},
        goal=Goal.ROLLED_BACK if rollback else Goal.UPDATED,
    )


async def _wait(
    connection: Connection,
    before: Mapping[str, int],
    version: int,
    flags: Mapping[str, Any],
    names: Sequence[str],
    *,
    versions: Mapping[str, int] = NO_VERSIONS,
    goal: Goal = Goal.UPDATED,
) -> int:
    many = " ".join(names)
    return await wait_and_report(
        connection,
        settings(),
        WatchServicesRequest(services=tuple(before)),
        revision=version,
        before=before,
        versions=versions,
        may_pause=bool(flags.get("pause_after")),
        timeout_ns=flags["timeout_ns"],
        subject=subject_of(names),
        interrupted=(
            f"The change goes on; `swarmctl service wait {many}` waits for it, "
            f"`swarmctl service ps {many}` shows how far it is."
        ),
        goal=goal,
        quiet=flags["quiet"],
        # One that was made has nothing to go back to.
        advise=lambda verdict: next_step(verdict, names[0], goal) if len(versions) == 1 else "",
    )
