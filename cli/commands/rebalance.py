"""`swarmctl service rebalance` and `node rebalance`: moving tasks to load nodes evenly."""

from __future__ import annotations

import asyncio

import click

from cli.connection import Connection
from cli.format import Record, print_rows, short_id
from cli.lazy import Command
from cli.objects import name_of, names_of
from cli.options import Ref, detach_options, format_option
from cli.service_watch import until_over
from cli.services import interruptible, subject_of
from cli.settings import settings
from swarm.clock import SECOND_NS
from swarm.errors import EXIT_NOT_CONVERGED, NotFound, mapping
from swarm.quantities import format_duration
from swarm.v1 import Kind, RebalanceRequest, RebalanceResponse, Service

COLUMNS = (("TASK", "Task"), ("ID", "ID"), ("FROM", "From"), ("TO", "To"))
_WAITED = "its tasks have moved"

dry_run_option = click.option("--dry-run", is_flag=True, help="Only show which tasks would move.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress display.")


@click.command("rebalance", cls=Command)
@click.argument("service", type=Ref("service"))
@dry_run_option
@format_option
@quiet_option
@detach_options(until=_WAITED)
def of_service(
    service: str, *, dry_run: bool, form: str, quiet: bool, detach: bool, timeout_ns: int
) -> int:
    """Move tasks of a service so that nodes are loaded evenly, and wait until that is done.

    Start first, and no more at a time than --update-parallelism says. Shows which tasks are to
    move; the manager decides anew at each step.
    """
    request = RebalanceRequest(service=service, dry_run=dry_run)
    return _rebalance(request, form=form, quiet=quiet, detach=detach, timeout_ns=timeout_ns)


@click.command("rebalance", cls=Command)
@click.argument("node", type=Ref("node"))
@dry_run_option
@format_option
@quiet_option
@detach_options(until="the tasks have moved")
def of_node(
    node: str, *, dry_run: bool, form: str, quiet: bool, detach: bool, timeout_ns: int
) -> int:
    """Move tasks away from a node to others with less to do, and wait until that is done.

    As service rebalance, for each service with tasks on the node; those of jobs and global
    services stay.
    """
    request = RebalanceRequest(node=node, dry_run=dry_run)
    return _rebalance(request, form=form, quiet=quiet, detach=detach, timeout_ns=timeout_ns)


def _rebalance(
    request: RebalanceRequest, *, form: str, quiet: bool, detach: bool, timeout_ns: int
) -> int:
    async def work(connection: Connection) -> int:
        answer = await connection.control.rebalance(request)
        await _print(connection, answer, form=form)
        if request.dry_run or detach or not answer.moves:
            return 0
        return await _wait(connection, answer.service_ids, timeout_ns=timeout_ns, quiet=quiet)

    return interruptible(work)


async def _print(connection: Connection, answer: RebalanceResponse, *, form: str) -> None:
    if not answer.moves and not form:
        click.echo("No task is to move: no move makes it better.")
        return
    nodes = await names_of(connection, Kind.NODE)
    rows = [
        Record(
            Task=move.name,
            ID=short_id(move.task_id),
            TaskID=move.task_id,
            From=nodes.get(move.from_node_id, move.from_node_id),
            To=nodes.get(move.to_node_id, move.to_node_id),
        )
        for move in answer.moves
    ]
    print_rows(rows, COLUMNS, form=form, terminal=settings().terminal())


async def _wait(
    connection: Connection, ids: tuple[str, ...], *, timeout_ns: int, quiet: bool
) -> int:
    """Waits until no rebalance of the services goes on, and says how each ended. The exit code."""
    told: dict[str, str] = {}
    names: dict[str, str] = {}

    def show(service: Service) -> None:
        names[service.id] = name_of(service)
        status = service.rebalance_status
        if quiet or status is None or not status.running or not status.message:
            return
        line = f"{name_of(service)}: {status.message} ({status.moved} moved)"
        if told.get(service.id) != line:
            told[service.id] = line
            click.echo(line, err=True)

    over: dict[str, Service | None] = {}
    goes_on = "The rebalance goes on; `swarmctl service inspect --pretty` shows how far it is."
    try:
        async with asyncio.timeout(timeout_ns / SECOND_NS if timeout_ns else None):
            await until_over(connection, ids, over, _is_over, show=show)
    except TimeoutError:
        left = [names.get(id_, id_) for id_ in ids if id_ not in over]
        within = format_duration(timeout_ns)
        click.echo(f"Error: {subject_of(left)} not rebalanced within {within}", err=True)
        click.echo(goes_on, err=True)
        return EXIT_NOT_CONVERGED
    except asyncio.CancelledError:
        click.echo(f"\n{goes_on}", err=True)
        raise
    return _tell([(names.get(id_, id_), over[id_]) for id_ in ids])


def _is_over(service: Service) -> bool:
    return service.rebalance_status is None or not service.rebalance_status.running


def _tell(ended: list[tuple[str, Service | None]]) -> int:
    code = 0
    for name, service in ended:
        if service is None:
            error = NotFound(f"service {name!r} was removed meanwhile")
            click.echo(f"Error: {error.message}", err=True)
            code = mapping(error).exit_code
        elif (status := service.rebalance_status) is not None:
            tasks = "1 task" if status.moved == 1 else f"{status.moved} tasks"
            why = f"; {status.message}" if status.message else ""
            click.echo(f"{name}: {tasks} moved{why}", err=True)
    return code
