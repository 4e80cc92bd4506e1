"""What the stack commands that read compose files have in common: their options, and what is read.

The manager's request is made here once, so that a plan and the deploy after it ask for the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.registry import auth_for
from cli.services import warn
from cli.tasks import image_of
from swarm.v1 import DeployStackRequest, StackSpec

__all__ = ["FILES_HELP", "compose_options", "load_spec", "request_for", "standard_input"]

F = TypeVar("F", bound=Callable[..., Any])
FILES_HELP = "Compose file, or - for standard input; several are merged, the last one wins."


def compose_options(function: F) -> F:
    """The options that say which compose files are read, and how."""
    for decorate in (
        click.option(
            "--profile",
            "profiles",
            multiple=True,
            metavar="NAME",
            help="Profile to take services of.",
        ),
        click.option(
            "--env-file",
            "env_files",
            multiple=True,
            type=click.Path(allow_dash=True),
            metavar="FILE",
            help="Variables for the compose file, in place of .env beside it.",
        ),
        click.option(
            "-c",
            "--compose-file",
            "files",
            multiple=True,
            required=True,
            type=click.Path(allow_dash=True),
            metavar="FILE",
            help=FILES_HELP,
        ),
    ):
        function = decorate(function)
    return function


def load_spec(
    files: tuple[str, ...], stack: str, env_files: tuple[str, ...], profiles: tuple[str, ...]
) -> StackSpec:
    """The stack that the files describe; warnings go to stderr. Raises ComposeError, Invalid."""
    from cli.compose import load

    loaded = load(
        files,
        stack=stack,
        environment=dict(os.environ),
        stdin=standard_input(files),
        env_files=tuple(map(Path, env_files)),
        # None given: those of COMPOSE_PROFILES.
        profiles=profiles,
    )
    warn(loaded.warnings)
    return loaded.spec


def standard_input(files: tuple[str, ...]) -> str | None:
    """Its text, if one of the files is -."""
    return sys.stdin.read() if "-" in files else None


def request_for(
    spec: StackSpec, *, prune: bool, with_registry_auth: bool, expected_version: str = ""
) -> DeployStackRequest:
    """The request that deploys, or plans, the spec."""
    return DeployStackRequest(
        spec=spec,
        prune=prune,
        registry_auths=_auths(spec) if with_registry_auth else {},
        expected_version=expected_version,
    )


def _auths(spec: StackSpec) -> dict[str, str]:
    """Credentials by service name; services whose registry has none are left out."""
    found = {}
    for service in spec.services:
        image = image_of(service)
        auth = auth_for(image, os.environ) if image else ""
        if auth:
            found[service.name] = auth
    return found
