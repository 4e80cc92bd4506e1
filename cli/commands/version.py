"""`swarmctl version`: of the client, the daemon and the manager."""

from __future__ import annotations

import platform
import sys
from typing import Any

import click

from cli.connection import Connection, call, resolve
from cli.format import print_inspected
from cli.lazy import Command
from cli.options import format_option
from cli.settings import settings
from swarm import __version__
from swarm.errors import EXIT_NOT_CONVERGED, SwarmError, mapping
from swarm.v1 import GetInfoRequest, GetNodeInfoRequest

_ = EXIT_NOT_CONVERGED


@click.command(cls=Command)
@format_option
def command(form: str) -> int:
    """Show the versions of client and server."""
    target = resolve(settings())
    document: dict[str, Any] = {
        "Client": {
            "Version": __version__,
            "Context": target.context or "default",
            "Python": platform.python_version(),
            "Os": sys.platform,
            "Arch": platform.machine(),
        },
        "Server": None,
    }
    problem: SwarmError | None = None
    try:
        document["Server"] = call(_server)
    except SwarmError as error:
        problem = error
    if form:
        print_inspected([document], form=form, known=frozenset({"Server", "Client", "Version"}))
    else:
        _print(document)
    if problem is None:
        return 0
    click.echo(f"Error: {problem.message}", err=True)
    return mapping(problem).exit_code


async def _server(connection: Connection) -> dict[str, Any]:
    """What the daemon says where it is local, else the manager."""
    if connection.target.socket:
        node = await connection.local.get_node_info(GetNodeInfoRequest())
        return {"Version": node.version, "Address": str(connection.target), "State": node.state}
    info = await connection.control.get_info(GetInfoRequest())
    return {"Version": info.version, "Address": str(connection.target), "State": "active"}


def _print(document: dict[str, Any]) -> None:
    for title in ("Client", "Server"):
        part = document[title]
        if part is None:
            continue
        click.echo(f"{title}:")
        for key, value in part.items():
            click.echo(f" {key + ':':<18}{value}")
