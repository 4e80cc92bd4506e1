"""`swarmctl stack config`: compose files as they are understood."""

from __future__ import annotations

import click

from cli import docker_json
from cli.format import to_yaml
from cli.lazy import Command
from cli.stack_files import compose_options, load_spec
from swarm.v1 import Stack


@click.command(cls=Command)
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
    spec = load_spec(files, stack, env_files, profiles)
    click.echo(to_yaml(docker_json.stack(Stack(spec=spec))["Spec"]), nl=False)
