"""`swarmctl swarm audit`: who asked the manager for what."""

from __future__ import annotations

from typing import Any

import click

from cli.connection import Connection, call
from cli.format import print_rows
from cli.lazy import Command
from cli.options import filter_option, format_option, make_filters
from cli.settings import settings
from cli.times import parse_time, rfc3339
from swarm.gotemplate import Record
from swarm.v1 import AuditRecord, ListAuditRequest

_COLUMNS = (
    ("TIME", "Time"),
    ("WHO", "Who"),
    ("FROM", "From"),
    ("WHAT", "What"),
    ("KIND", "Kind"),
    ("NAME", "Name"),
    ("OUTCOME", "Outcome"),
)


@click.command(cls=Command)
@filter_option("who", "what", "kind", "name", "object", "method", "outcome")
@format_option
@click.option(
    "-n",
    "--tail",
    default="1000",
    metavar="N",
    help="The newest N records that match, or all (1000).",
)
@click.option("--no-trunc", is_flag=True, help="Whole times, and reasons of refusals.")
@click.option("--since", default="", metavar="TIME", help="From this time on, or 10m ago.")
@click.option("--until", default="", metavar="TIME", help="Before this time, or 10m ago.")
def command(
    filters: tuple[tuple[str, str], ...],
    form: str,
    tail: str,
    since: str,
    until: str,
    *,
    no_trunc: bool,
) -> None:
    """Show who asked this manager for what, and what came of it, oldest first.

    Changes, denied calls, exec, and what gives keys away (backup, join-token). Each manager keeps
    its own trail of the calls it answered, the newest 64 MiB; `swarmd --audit-log` gathers them.
    """
    now_ns = settings().clock.now_ns()
    request = ListAuditRequest(
        since_ns=parse_time(since, now_ns) if since else 0,
        until_ns=parse_time(until, now_ns) if until else 0,
        limit=_limit(tail),
        filters=make_filters(filters),
    )

    async def work(connection: Connection) -> tuple[list[AuditRecord], list[str]]:
        records: list[AuditRecord] = []
        damaged: list[str] = []
        async for answer in connection.control.list_audit(request):
            records += answer.records
            damaged += answer.damaged
        return records, damaged

    records, damaged = call(work)
    print_rows(
        [_row(record, whole=no_trunc) for record in records],
        _COLUMNS,
        form=form,
        terminal=settings().terminal(),
        sentences="Outcome",
        identifier="RequestID",
    )
    for line in damaged:
        click.echo(f"Warning: this record cannot be read: {line}", err=True)


def _limit(text: str) -> int:
    if text == "all":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither a number above 0 nor all", param_hint="-n")
    return int(text)


def _row(record: AuditRecord, *, whole: bool) -> Record:
    outcome = record.outcome
    if record.error and outcome != "done":
        reason = record.error if whole else record.error.partition(":")[0]
        outcome = f"{outcome}: {reason}"
    found: dict[str, Any] = {
        "Time": rfc3339(record.time_ns, digits=9 if whole else 0).replace(".Z", "Z"),
        "TimeNano": record.time_ns,
        "RequestID": record.request_id,
        "Node": record.node_id,
        "Who": record.who,
        "From": record.peer,
        "Method": record.method,
        "What": record.what or record.method,
        "Kind": record.kind,
        "Name": record.name or record.object_id,
        "ObjectID": record.object_id,
        "Revision": record.revision,
        "Outcome": outcome,
        "Error": record.error,
        "More": dict(record.more),
    }
    return Record(found)
