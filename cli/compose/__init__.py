"""The compose loader: compose files in, the contract's StackSpec or a normal form out.

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
    from cli.compose.normal import Normal

__all__ = ["ComposeError", "Loaded", "Normal", "Problem", "dump", "load", "normal_form"]


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


def normal_form(
    sources: Sequence[str],
    *,
    environment: Mapping[str, str],
    stack: str = "stack",
    project_directory: Path | None = None,
    stdin: str | None = None,
    env_files: Sequence[Path] = (),
    profiles: Collection[str] = (),
    interpolate: bool = True,
    exact: bool = False,
) -> Normal:
    """The files as one document with all short forms written out; for files that the docker CLI
    takes, the one that `docker stack config` prints.

    Arguments are those of `load`. Without `interpolate`, variables stay as they are. The `exact`
    form loads to the same stack, from any folder: it also has what Docker's form has no place for,
    and every $ doubled. What a deploy would refuse is no error here, but a warning.

    Raises ComposeError with all problems, and errors.Invalid for a bad stack name, or for an exact
    form without interpolation.
    """
    from cli.compose.normal import normal_form as normal_form_now

    return normal_form_now(
        sources,
        stack=stack,
        environment=environment,
        project_directory=project_directory,
        stdin=stdin,
        env_files=env_files,
        profiles=profiles,
        interpolate=interpolate,
        exact=exact,
    )


def dump(document: Mapping[str, object]) -> str:
    """A normal form as YAML, in its order, with quotes where any reader needs them."""
    from cli.compose.writing import dump as dump_now

    return dump_now(document)


def __getattr__(name: str) -> object:
    if name == "Loaded":
        from cli.compose.loader import Loaded

        return Loaded
    if name == "Normal":
        from cli.compose.normal import Normal

        return Normal
    raise AttributeError(name)
