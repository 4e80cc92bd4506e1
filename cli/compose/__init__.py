"""The compose loader: compose files in, the contract's StackSpec out.

It reads files and nothing else: no cluster, no engine. What only a cluster can know (whether an
external network exists, whether a port is free) is left to the manager. `load` imports the work on
first use, because swarmctl starts more often than it reads a compose file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.compose.problems import ComposeError, Problem

if TYPE_CHECKING:
    from cli.compose.loader import Loaded

__all__ = ["ComposeError", "Loaded", "Problem", "load"]


def load(
    sources: Sequence[str],
    *,
    stack: str,
    environment: Mapping[str, str],
    project_directory: Path | None = None,
    stdin: str | None = None,
    env_files: Sequence[Path] = (),
    profiles: Collection[str] = (),
) -> Loaded:
    """The stack that the files describe, merged from left to right.

    `sources` are paths, or "-" for the text in `stdin`. Relative paths in the files start from
    `project_directory`, by default the folder of the first file. `environment` is the caller's;
    below it stands .env of the project directory, or `env_files` instead. `profiles` are the active
    ones, by default those of COMPOSE_PROFILES.

    Raises ComposeError with all problems, and errors.Invalid for a bad stack name.
    """
    from cli.compose.loader import load as load_now

    return load_now(
        sources,
        stack=stack,
        environment=environment,
        project_directory=project_directory,
        stdin=stdin,
        env_files=env_files,
        profiles=profiles,
    )


def __getattr__(name: str) -> object:
    if name == "Loaded":
        from cli.compose.loader import Loaded

        return Loaded
    raise AttributeError(name)
