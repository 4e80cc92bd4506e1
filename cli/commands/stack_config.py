"""`swarmctl stack config`: the normal form of compose files, as `docker stack config` prints it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from cli.lazy import Command
from cli.services import warn
from cli.stack_files import compose_options, standard_input


@click.command(cls=Command)
@compose_options
@click.option("--skip-interpolation", is_flag=True, help="Leave variables as they are.")
@click.option(
    "--exact",
    is_flag=True,
    help="Print all that a deploy reads, and $ as $$: the output deploys to the same stack.",
)
@click.option("--services", is_flag=True, help="Print only the names of the services.")
@click.option("--images", is_flag=True, help="Print only the images of the services.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["yaml", "json"]),
    default="yaml",
    show_default=True,
    help="How to print the document.",
)
@click.option(
    "--stack",
    default="stack",
    show_default=True,
    metavar="NAME",
    help="Stack's name to check and fill in the files for.",
)
def config(
    files: tuple[str, ...],
    env_files: tuple[str, ...],
    profiles: tuple[str, ...],
    stack: str,
    form: str,
    *,
    skip_interpolation: bool,
    exact: bool,
    services: bool,
    images: bool,
) -> None:
    """Check compose files and print them as one, with all short forms written out.

    What `docker stack config` takes is printed as it prints it. What a deploy would refuse is
    printed too; a warning tells of it.
    """
    if services and images:
        raise click.UsageError("--services and --images exclude each other")
    if skip_interpolation and exact:
        raise click.UsageError("--exact fills variables in, --skip-interpolation leaves them")
    from cli.compose import normal_form

    normal = normal_form(
        files,
        stack=stack,
        environment=dict(os.environ),
        stdin=standard_input(files),
        env_files=tuple(map(Path, env_files)),
        profiles=profiles,
        interpolate=not skip_interpolation,
        exact=exact,
    )
    warn(normal.warnings)
    found: Any = normal.document["services"]
    if services:
        lines = list(found)
    elif images:
        lines = sorted({each["image"] for each in found.values() if "image" in each})
    else:
        click.echo(_text(normal.document, form), nl=False)
        return
    for line in lines:
        click.echo(line)


def _text(document: dict[str, object], form: str) -> str:
    from cli.compose.writing import dump, json_text

    if form == "json":
        return json.dumps(document, indent=4, ensure_ascii=False, default=json_text) + "\n"
    return dump(document)
