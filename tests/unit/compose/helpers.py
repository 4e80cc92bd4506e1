"""Short ways to load a text, and to find what is wrong with one."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from cli.compose import ComposeError, Loaded, load
from swarm.v1 import ContainerSpec, ServiceSpec, StackSpec, TaskSpec

MARK = "§"  # stands in a text where a problem is expected


def loaded(
    text: str, environment: Mapping[str, str] | None = None, *, folder: Path | None = None
) -> Loaded:
    return load(
        ["-"],
        stack="st",
        environment=environment or {},
        stdin=textwrap.dedent(text),
        project_directory=folder or Path("/nonexistent"),
    )


def spec(text: str, environment: Mapping[str, str] | None = None) -> StackSpec:
    return loaded(text, environment).spec


def service(keys: str, top: str = "", environment: Mapping[str, str] | None = None) -> ServiceSpec:
    """The one service of a stack, from the lines of its keys; it has an image already."""
    return spec(document(keys, top), environment).services[0]


def document(keys: str, top: str = "", *, image: bool = True) -> str:
    lines = textwrap.indent(textwrap.dedent(keys), "    ")
    first = "    image: busybox\n" if image else ""
    return f"services:\n  web:\n{first}{lines}\n{textwrap.dedent(top)}"


def task(spec: ServiceSpec) -> TaskSpec:
    assert spec.task is not None
    return spec.task


def container(spec: ServiceSpec) -> ContainerSpec:
    found = task(spec).container
    assert found is not None
    return found


def problems(text: str, environment: Mapping[str, str] | None = None) -> ComposeError:
    """The error that loading raises."""
    try:
        loaded(text, environment)
    except ComposeError as error:
        return error
    raise AssertionError(f"this loaded:\n{text}")


def marked(text: str) -> tuple[str, int, int]:
    """The text without its mark, and the line and column where that stood."""
    before, mark, after = textwrap.dedent(text).partition(MARK)
    assert mark, "the text has no mark"
    return before + after, before.count("\n") + 1, len(before) - before.rfind("\n")
