"""`swarmctl events`: changes of the cluster's objects, as they are committed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from cli.connection import Connection, call
from cli.following import watch
from cli.lazy import Command
from cli.objects import name_of
from cli.options import filter_option, make_filters
from cli.settings import Settings, settings
from cli.template import Template, to_json
from cli.times import parse_time, rfc3339
from swarm.errors import EXIT_INTERRUPTED, Invalid
from swarm.states import label
from swarm.v1 import Event, Kind, Service, Task, WatchRequest

KINDS = ("node", "stack", "service", "task", "secret", "config", "network", "volume", "cluster")


@click.command(cls=Command)
@filter_option("type", "id", "name", "label", "service", "node", "stack")
@click.option(
    "--format",
    "form",
    default="",
    metavar="FORMAT",
    help="json, or a Go template over Type, Action, Actor, Scope, Time and TimeNano.",
)
@click.option(
    "--from-revision",
    type=click.IntRange(min=0),
    default=0,
    metavar="REVISION",
    help="Begin with the changes of this revision of the store; 0: from now on.",
)
@click.option("--since", default="", metavar="TIME", help="From this time on, or 10m ago.")
@click.option("--until", default="", metavar="TIME", help="End before this time.")
@click.option("--tasks/--no-tasks", default=True, help="With or without those of tasks.")
def command(
    filters: tuple[tuple[str, str], ...],
    form: str,
    from_revision: int,
    since: str,
    until: str,
    *,
    tasks: bool,
) -> int:
    """Show what changes in the cluster, as it happens, until Ctrl-C.

    Begins with the past from --since on, as far as the manager keeps it: its newest 50,000 changes
    since it started. `who` is who asked for the change. See also `swarm audit`.
    """
    now_ns = settings().clock.now_ns()
    wanted = [value for key, value in filters if key == "type"]
    unknown = sorted(set(wanted) - set(KINDS))
    if unknown:
        raise Invalid(f"--filter type={unknown[0]}: the types are {', '.join(KINDS)}")
    kinds = tuple(Kind[name.upper()] for name in wanted or KINDS if tasks or name != "task")
    request = WatchRequest(
        kinds=kinds,
        filters=make_filters((key, value) for key, value in filters if key != "type"),
        from_revision=from_revision,
        since_ns=parse_time(since, now_ns) if since else 0,
        until_ns=parse_time(until, now_ns) if until else 0,
    )
    here = settings()
    if form.split(" ", 1)[0] in ("table", "yaml"):
        raise Invalid(f"--format {form}: events come one by one; write json or a Go template")
    template = None if form in ("", "json") else Template(form)

    async def work(connection: Connection) -> int:
        async for answer in watch(connection, request):
            if answer.kept_from_ns:
                click.echo(
                    f"Warning: changes before {rfc3339(answer.kept_from_ns)} are no longer kept; "
                    "`swarmctl swarm audit` shows who asked for what",
                    err=True,
                )
            for event in answer.events:
                show(event, here, form=form, template=template)
        return 0

    try:
        return call(work)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def show(event: Event, here: Settings, *, form: str, template: Template | None) -> None:
    """Writes one event to stdout at once."""
    import sys

    if form == "json":
        line = to_json(document(event))
    elif template is not None:
        line = template.render(document(event))
    else:
        line = text(event)
        if here.terminal().colour:
            colour = {"create": "green", "remove": "red"}.get(event.action, "cyan")
            line = line.replace(f" {event.action} ", f" {click.style(event.action, fg=colour)} ", 1)
    click.echo(line)
    sys.stdout.flush()


def _object(event: Event, *, old: bool = False) -> Any:
    holder = event.old if old else event.object
    return getattr(holder, event.kind.name.lower()) if holder is not None else None


def attributes(event: Event) -> dict[str, str]:
    """What is worth saying: the name, and for updates what changed, as Docker names it."""
    now, before = _object(event), _object(event, old=True)
    who = {"who": event.who} if event.who else {}
    if isinstance(now, Task):
        return _task_attributes(now, before) | who
    found = {"name": name_of(now)} | who
    for key, value, previous in _changes(now, before):
        if value != previous:
            found[f"{key}.new"], found[f"{key}.old"] = value, previous
    return found


def _task_attributes(task: Task, before: Task | None) -> dict[str, str]:
    state = label(task.status.state) if task.status else "new"
    found = {"service": task.service_id, "slot": str(task.slot), "state": state}
    if task.node_id:
        found["node"] = task.node_id
    found["desired"] = label(task.desired_state)
    if before is not None and before.status is not None and task.status is not None:
        if before.status.state != task.status.state:
            found["state.old"] = label(before.status.state)
        if before.desired_state != task.desired_state:
            found["desired.old"] = label(before.desired_state)
    if task.status is not None and task.status.err:
        found["err"] = task.status.err
    return found


def _changes(now: Any, before: Any) -> Iterator[tuple[str, str, str]]:
    """Docker's attribute names, with the new and the old value."""
    if before is None or not now.spec:
        return
    if isinstance(now, Service):
        yield "replicas", _replicas(now), _replicas(before)
        yield "image", _image(now), _image(before)
        yield "updatestate", _update_state(now), _update_state(before)
    for key in ("availability", "role"):
        if hasattr(now.spec, key):
            yield key, getattr(now.spec, key).name.lower(), getattr(before.spec, key).name.lower()
    status = getattr(now, "status", None)
    if status is not None and before.status is not None:
        yield "state", status.state.name.lower(), before.status.state.name.lower()
    manager, earlier = getattr(now, "manager_status", None), getattr(before, "manager_status", None)
    if manager is not None and earlier is not None:
        yield "leader", str(manager.leader).lower(), str(earlier.leader).lower()
        yield (
            "reachability",
            manager.reachability.name.lower(),
            earlier.reachability.name.lower(),
        )


def _replicas(service: Service) -> str:
    mode = service.spec.mode if service.spec else None
    if mode is None or mode.replicated is None or mode.replicated.replicas is None:
        return "1"
    return str(mode.replicated.replicas)


def _image(service: Service) -> str:
    task = service.spec.task if service.spec else None
    return task.container.image if task and task.container else ""


def _update_state(service: Service) -> str:
    return service.update_status.state.name.lower() if service.update_status else ""


def document(event: Event) -> dict[str, Any]:
    """Docker's JSON of an event."""
    found = _object(event)
    return {
        "Type": event.kind.name.lower(),
        "Action": event.action,
        "Actor": {"ID": found.id if found is not None else "", "Attributes": attributes(event)},
        "Scope": "swarm",
        "Time": event.time_ns // 1_000_000_000,
        "TimeNano": event.time_ns,
        "Revision": event.revision,
    }


def text(event: Event) -> str:
    """ "2026-…Z service update ID (name=web, replicas.new=5, replicas.old=2)"."""
    found = _object(event)
    listed = ", ".join(f"{key}={value}" for key, value in sorted(attributes(event).items()))
    when = rfc3339(event.time_ns, digits=9)
    return f"{when} {event.kind.name.lower()} {event.action} {found.id} ({listed})"
