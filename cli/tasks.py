"""Tasks as `service ps`, `stack ps`, `node ps` and `task ls` list them.

The newest task of each slot stands first; those before it follow under ` \\_ `. Source: Docker
CLI's command/task/print.go. Errors are shown whole, of why no node fits the first reason; a narrow
terminal wraps them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cli.connection import Connection
from cli.format import Record, print_rows, short_id
from cli.objects import list_objects, name_of
from cli.options import TaskList, make_filters
from cli.reasons import brief
from cli.settings import Settings
from cli.times import age
from swarm.clock import SECOND_NS
from swarm.errors import NotFound
from swarm.quantities import format_duration
from swarm.states import ended, label, wanted
from swarm.v1 import Filter, GetRequest, Kind, Node, PortConfig, Service, Task, TaskState

__all__ = [
    "Lookup",
    "current_state",
    "fetch_tasks",
    "list_tasks",
    "next_try_ns",
    "task_rows",
    "wait_text",
    "why",
]

COLUMNS = (
    ("ID", "ID"),
    ("NAME", "Name"),
    ("IMAGE", "Image"),
    ("NODE", "Node"),
    ("DESIRED STATE", "DesiredState"),
    ("CURRENT STATE", "CurrentState"),
    ("ERROR", "Error"),
    ("PORTS", "Ports"),
)
LOOKUPS_MAX = 16  # Get calls in flight for specs that are no longer current
CRASHES = 2  # in a row, from which on a task that waits for its start backs off
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Lookup:
    """What names tasks: services and nodes by id, images by service and spec version."""

    services: dict[str, Service]
    nodes: dict[str, Node]
    images: dict[tuple[str, int], str]
    resolve: bool = True

    def service(self, task: Task) -> str:
        found = self.services.get(task.service_id)
        return name_of(found) if found and self.resolve else task.service_id

    def node(self, task: Task) -> str:
        found = self.nodes.get(task.node_id)
        return name_of(found) if found and self.resolve else task.node_id


async def fetch_tasks(
    connection: Connection, filters: Sequence[Filter], *, resolve: bool = True
) -> tuple[list[Task], Lookup]:
    """The tasks and what names them, with as few calls as there are kinds, plus one for each old
    spec that is still shown.
    """
    tasks, services, nodes = await asyncio.gather(
        list_objects(connection, Kind.TASK, filters=filters),
        list_objects(connection, Kind.SERVICE),
        list_objects(connection, Kind.NODE),
    )
    lookup = Lookup({s.id: s for s in services}, {n.id: n for n in nodes}, {}, resolve)
    samples: dict[tuple[str, int], Task] = {}
    for task in tasks:
        key = (task.service_id, task.spec_version)
        service = lookup.services.get(task.service_id)
        if service is not None and service.spec_version == task.spec_version:
            lookup.images[key] = image_of(service.spec)
        elif key not in lookup.images:
            samples.setdefault(key, task)
    limit = asyncio.Semaphore(LOOKUPS_MAX)

    async def look(key: tuple[str, int], task: Task) -> None:
        async with limit:
            try:
                answer = await connection.control.get(GetRequest(kind=Kind.TASK, ref=task.id))
            except NotFound:
                return  # reaped since the list: its image is not known any more
        if answer.revision is not None:
            lookup.images[key] = image_of(answer.revision.spec)

    async with asyncio.TaskGroup() as group:
        for key, task in samples.items():
            group.create_task(look(key, task))
    return tasks, lookup


def image_of(spec: Any) -> str:
    """The image of a service's spec; empty for a process."""
    container = spec.task.container if spec and spec.task else None
    return str(container.image) if container else ""


def shown_image(image: str, *, whole: bool) -> str:
    """The image without its digest where it has a tag, unless all is wanted."""
    name, separator, _ = image.partition("@")
    return name if separator and not whole else image


def task_name(task: Task, service: str) -> str:
    """ "web.3"; in global services the node stands for the slot."""
    return f"{service}.{task.slot}" if task.slot else f"{service}.{task.node_id}"


def task_rows(
    tasks: Iterable[Task], lookup: Lookup, *, now_ns: int, no_trunc: bool
) -> list[Record]:
    """Rows in order of name, newest first; earlier tasks of a slot are marked."""

    def created(task: Task) -> int:
        return task.meta.created_at_ns if task.meta else 0

    named = sorted(
        ((task_name(task, lookup.service(task)), task) for task in tasks),
        key=lambda pair: (natural(pair[0]), -created(pair[1])),
    )
    rows: list[Record] = []
    before = ""
    for name, task in named:
        status = task.status
        ports = task.host_ports or (status.ports if status else ())
        error = why(task) if no_trunc else brief(why(task))
        image = lookup.images.get((task.service_id, task.spec_version), "")
        rows.append(
            Record(
                ID=short_id(task.id, whole=no_trunc),
                Name=f" \\_ {name}" if name == before else name,
                Image=shown_image(image, whole=no_trunc),
                Node=lookup.node(task),
                DesiredState=label(task.desired_state).capitalize(),
                CurrentState=current_state(task, now_ns),
                Error=f'"{error}"' if error else "",
                Ports=host_ports(ports),
                NextTry=wait_text(next_try_ns(task, now_ns)),
                Crashes=task.crashes,
            )
        )
        before = name
    return rows


def current_state(task: Task, now_ns: int) -> str:
    """ "Running 2 minutes ago", "Backing off, next try in 38s"."""
    if wait_ns := next_try_ns(task, now_ns):
        return f"Backing off, next try in {wait_text(wait_ns)}"
    status = task.status
    if status is None:
        return "New"
    shown = f"{label(status.state).capitalize()} {age(_since_ns(task), now_ns)}".strip()
    if ended(status.state) and task.start_after_ns > now_ns and wanted(task.desired_state):
        # Of a job: the slot's next attempt is made when it is due.
        shown += f", next try in {wait_text(task.start_after_ns - now_ns)}"
    return shown


def _since_ns(task: Task) -> int:
    """When the task came to its state, by managers' clocks where these say so: nodes' may err."""
    status = task.status
    assert status is not None
    if status.state is TaskState.RUNNING and task.running_since_ns:
        return task.running_since_ns
    if status.state >= TaskState.ASSIGNED and task.meta is not None and task.meta.updated_at_ns:
        return task.meta.updated_at_ns
    return status.timestamp_ns


def next_try_ns(task: Task, now_ns: int) -> int:
    """How long a task still waits because those before it have crashed again and again; 0: it does
    not. The delay after a single crash is the service's restart delay and no news.
    """
    waits = task.desired_state is TaskState.READY and task.crashes >= CRASHES
    if not waits or (task.status is not None and ended(task.status.state)):
        return 0
    return max(0, task.start_after_ns - now_ns)


def wait_text(wait_ns: int) -> str:
    """In whole seconds, none too few: "38s", "4m38s"; empty: there is nothing to wait for."""
    return format_duration(-(-wait_ns // SECOND_NS) * SECOND_NS) if wait_ns else ""


def why(task: Task) -> str:
    """What went wrong with a task, or why the cluster told it to stop; each once."""
    error = task.status.err if task.status else ""
    if task.stop_message and task.stop_message not in error:
        return f"{task.stop_message}; {error}" if error else task.stop_message
    return error


def natural(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts web.2 before web.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in _DIGITS.split(text)]


def host_ports(ports: Iterable[PortConfig]) -> str:
    """ "*:8080->80/tcp,…"."""
    return ",".join(
        f"{port.host_ip or '*'}:{port.published_port}->{port.target_port}/{port.protocol or 'tcp'}"
        for port in ports
        if port.published_port
    )


async def list_tasks(
    connection: Connection, settings: Settings, wanted: TaskList, **only: Sequence[str]
) -> None:
    """Prints tasks to stdout, as `wanted`; `only` those of these services or nodes."""
    tasks, lookup = await fetch_tasks(
        connection, make_filters(wanted.filters, **only), resolve=wanted.resolve
    )
    # Docker's -q prints whole ids.
    whole = wanted.no_trunc or (wanted.quiet and not wanted.form)
    print_rows(
        task_rows(tasks, lookup, now_ns=settings.clock.now_ns(), no_trunc=whole),
        COLUMNS,
        form=wanted.form,
        quiet=wanted.quiet,
        terminal=settings.terminal(),
        sentences="Error",
    )
