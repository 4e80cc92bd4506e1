"""Services as `service ls` and `stack services` list them, and what changes to services have in
common: waiting, warnings, credentials.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

import click

from cli.connection import Connection, call
from cli.format import Column, Record, print_rows, short_id
from cli.objects import name_of, names_of
from cli.settings import Settings
from cli.tasks import natural, shown_image
from swarm.errors import EXIT_INTERRUPTED
from swarm.v1 import (
    Filter,
    GetResponse,
    Kind,
    ListRequest,
    PortConfig,
    Service,
    ServiceMode,
    ServiceSpec,
    ServiceStatus,
    UpdateState,
)

__all__ = [
    "STACK_LABEL",
    "fetch_services",
    "interruptible",
    "mode_name",
    "print_services",
    "published_ports",
    "replicas",
    "warn",
]

STACK_LABEL = "com.docker.stack.namespace"
COLUMNS = (
    ("ID", "ID"),
    ("NAME", "Name"),
    ("MODE", "Mode"),
    ("REPLICAS", "Replicas"),
    ("IMAGE", "Image"),
    ("PORTS", "Ports"),
)


async def fetch_services(
    connection: Connection, filters: Sequence[Filter]
) -> list[tuple[Service, ServiceStatus]]:
    """Services with their statuses, in order of name."""
    answer = await connection.control.list(
        ListRequest(kind=Kind.SERVICE, filters=tuple(filters), with_status=True)
    )
    services = [item.service for item in answer.objects if item.service]
    known = {status.service_id: status for status in answer.service_statuses}
    pairs = [(service, known.get(service.id) or ServiceStatus()) for service in services]
    return sorted(pairs, key=lambda pair: natural(name_of(pair[0])))


def print_services(
    pairs: Iterable[tuple[Service, ServiceStatus]],
    settings: Settings,
    *,
    form: str,
    quiet: bool,
    no_trunc: bool = False,
) -> None:
    """Prints the list to stdout."""
    rows = [_row(service, status, no_trunc=no_trunc) for service, status in pairs]
    columns: tuple[Column, ...] = COLUMNS
    if any(row["Priority"] for row in rows):
        # Docker has none; it is shown where it matters.
        columns = (*COLUMNS[:3], ("PRIORITY", "Priority"), *COLUMNS[3:])
    if any(row["Update"] for row in rows):
        columns = (*columns, ("UPDATE", "Update"))
    print_rows(rows, columns, form=form, quiet=quiet, terminal=settings.terminal())


def _row(service: Service, status: ServiceStatus, *, no_trunc: bool) -> Record:
    spec = service.spec or ServiceSpec()
    container = spec.task.container if spec.task else None
    ports = service.endpoint.ports if service.endpoint else ()
    labels = spec.labels
    return Record(
        ID=short_id(service.id, whole=no_trunc),
        Name=spec.name,
        Mode=mode_name(spec.mode),
        Priority=spec.priority,
        Replicas=replicas(spec, status),
        Image=shown_image(container.image if container else "", whole=no_trunc),
        Ports=published_ports(ports or (spec.endpoint.ports if spec.endpoint else ())),
        Update=_update(service),
        Labels=",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        Label=lambda key: labels.get(key, ""),
    )


def _update(service: Service) -> str:
    """ "paused": of an update that waits for somebody; empty: there is nothing to do."""
    status = service.update_status
    if status is None or status.state not in (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED):
        return ""
    if status.awaits_resume:
        return "awaits resume"
    return "paused" if status.state is UpdateState.PAUSED else "rollback paused"


async def describing(
    connection: Connection, answers: Sequence[GetResponse]
) -> Callable[[GetResponse], str]:
    """What shows these services to people, with names for ids."""
    from cli.pretty import describe_service

    found = [a.object.service for a in answers if a.object is not None and a.object.service]
    joined = any(s.spec and s.spec.task and s.spec.task.networks for s in found)
    networks = await names_of(connection, Kind.NETWORK) if joined else {}
    return partial(describe_service, networks=networks)


def mode_name(mode: ServiceMode | None) -> str:
    """As Docker words it in lists: "replicated", "global", "replicated job", "global job"."""
    if mode is None or mode.replicated is not None:
        return "replicated"
    if mode.global_service is not None:
        return "global"
    return "replicated job" if mode.replicated_job is not None else "global job"


def replicas(spec: ServiceSpec, status: ServiceStatus) -> str:
    """ "3/5", "3/5 (max 2 per node)", for jobs "1/2 (3/10 completed)"."""
    text = f"{status.running}/{status.desired}"
    mode = spec.mode
    if mode and mode.replicated_job is not None:
        job = mode.replicated_job
        concurrent = 1 if job.max_concurrent is None else job.max_concurrent
        total = concurrent if job.total_completions is None else job.total_completions
        return f"{text} ({status.completed}/{total} completed)"
    if mode and mode.global_job is not None:
        return f"{text} ({status.completed}/{status.desired} completed)"
    most = spec.task.placement.max_replicas if spec.task and spec.task.placement else 0
    return f"{text} (max {most} per node)" if most else text


def published_ports(ports: Iterable[PortConfig]) -> str:
    """ "*:80->8080/tcp, *:90-91->90-91/tcp": neighbouring ports of the mesh as one range."""
    mesh = sorted(
        (port.protocol or "tcp", port.target_port, port.published_port)
        for port in ports
        if port.published_port and port.publish_mode != "host"
    )
    ranges: list[list[Any]] = []
    for protocol, target, published in mesh:
        last = ranges[-1] if ranges else None
        if last and last[0] == protocol and last[2] + 1 == target and last[4] + 1 == published:
            last[2], last[4] = target, published
        else:
            ranges.append([protocol, target, target, published, published])

    def span(first: int, final: int) -> str:
        return str(first) if first == final else f"{first}-{final}"

    ranges.sort(key=lambda r: (r[3], r[0]))
    return ", ".join(
        f"*:{span(p1, p2)}->{span(t1, t2)}/{proto}" for proto, t1, t2, p1, p2 in ranges
    )


def subject_of(names: Sequence[str]) -> str:
    """Services as messages name them: "service 'web'", "services db, web"."""
    return f"service {names[0]!r}" if len(names) == 1 else f"services {', '.join(names)}"


def warn(warnings: Iterable[str]) -> None:
    """Warnings go to stderr, once each."""
    for warning in dict.fromkeys(warnings):
        click.echo(f"Warning: {warning}", err=True)


def interruptible(work: Callable[[Connection], Awaitable[int]]) -> int:
    """Runs a command's work; Ctrl-C ends it with the exit code for that and no further word."""
    try:
        return call(work)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
