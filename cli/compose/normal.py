"""The normal form of compose files: what `stack config` prints.

For files that the docker CLI takes it is the document that `docker stack config` prints: short
forms written out, paths absolute, durations, sizes and numbers as Go spells them, maps sorted. What
Docker does not know (profiles, include, extends, gpus ...) is applied, or printed in the
Compose Specification's words. How each key is printed is in shapes.py.

The exact form is for deploying: it loads to the same stack from any folder. It has all that a
deploy reads, `$` as `$$`, and no files of variables, whose contents it holds.

Files need only be well formed. What a deploy would refuse is printed all the same, and a warning
tells of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.compose.at import At
from cli.compose.loader import Files, read_files, stack_of
from cli.compose.printing import Style, Table, own_keys, plain, record, truth, written
from cli.compose.problems import Report
from cli.compose.shapes import CLUSTER_VOLUME, CONFIG, NETWORK, SECRET, SERVICE, VOLUME
from swarm.errors import Invalid

VERSION = "3.13"  # what Docker prints for a file without one
_OBJECTS: Mapping[str, Table] = {
    "networks": NETWORK,
    "volumes": VOLUME,
    "secrets": SECRET,
    "configs": CONFIG,
}
_CONTENTS = ("file", "environment", "content", "driver")


@dataclass(frozen=True, slots=True)
class Normal:
    """A normal form. Warnings are whole sentences with their place."""

    document: dict[str, object]
    warnings: tuple[str, ...]


def normal_form(
    sources: Sequence[str],
    *,
    stack: str,
    environment: Mapping[str, str],
    project_directory: Path | None,
    stdin: str | None,
    env_files: Sequence[Path],
    profiles: Collection[str],
    interpolate: bool,
    exact: bool,
) -> Normal:
    """See cli.compose.normal_form."""
    if exact and not interpolate:
        raise Invalid("the exact form has its variables filled in; leave out one of the two")
    report = Report(lenient=True)
    files = read_files(
        sources,
        report,
        stack=stack,
        environment=environment,
        project_directory=project_directory,
        stdin=stdin,
        env_files=env_files,
        profiles=profiles,
        interpolates=interpolate,
    )
    document = _document(files, report, Style(exact=exact))
    report.check()
    refused = _what_a_deploy_refuses(files) if interpolate else ()
    if exact:
        document = {key: _escaped(value) for key, value in document.items()}
    return Normal(document, tuple(dict.fromkeys((*report.warnings, *refused))))


def _document(files: Files, report: Report, style: Style) -> dict[str, object]:
    root, head = At(files.root, "", report), At(files.head, "", report)
    version = head.set_at("version")
    text = version.node.text if version is not None else ""
    document: dict[str, object] = {"version": VERSION if text in ("", "3") else text}
    if files.name is not None and files.name.value is not None:
        document["name"] = At(files.name, "name", report).text()
    document["services"] = {
        name: record(at, SERVICE, style) for name, at in sorted(files.services().items())
    }
    for section, table in _OBJECTS.items():
        found = root.set_at(section)
        entries = sorted(found.items()) if found is not None else ()
        if values := {name: _object(name, at, table, files, style) for name, at in entries}:
            document[section] = values
    if (models := head.set_at("models")) is not None:
        document["models"] = plain(models.node)
    return {**document, **own_keys(head)}


def _object(name: str, at: At, table: Table, files: Files, style: Style) -> dict[str, object]:
    """An entry of networks, volumes, secrets or configs."""
    found = record(at, {key: table[key] for key in table if key != "external"}, style, own=False)
    external, named = _external(at)
    if external:
        found["external"] = external
        found.setdefault("name", named or name)
    elif table in (SECRET, CONFIG) and not any(found.get(key) for key in _CONTENTS):
        found["file"] = str(files.base)  # as Docker has it; a deploy refuses it
    found = {key: found[key] for key in table if key in found}
    own = own_keys(at)
    if table is VOLUME:
        cluster = record(at, CLUSTER_VOLUME, style, own=False)
        own = {key: value for key, value in own.items() if key not in CLUSTER_VOLUME}
        found |= cluster
    if table in (NETWORK, VOLUME) and not external and not style.exact:
        own = {}  # Docker forgets them
    return {**found, **own}


def _external(at: At) -> tuple[object, str]:
    """Whether the object is external, and its name in the old form external: {name: ...}."""
    found = at.set_at("external")
    if found is None:
        return False, ""
    if isinstance(found.node.value, dict):
        named = found.set_at("name")
        return True, named.text() if named is not None else ""
    return written(found, truth, Style(exact=False)), ""


def _what_a_deploy_refuses(files: Files) -> tuple[str, ...]:
    report = Report()
    stack_of(files, report)
    problems = (
        f"{problem.file}:{problem.line}:{problem.column}: a deploy refuses this: {problem.message}"
        + (f"; {problem.hint}" if problem.hint else "")
        for problem in report.problems
    )
    return (*problems, *report.warnings)


def _escaped(value: object) -> object:
    """Dollar signs doubled, so that they are no variables when this is read."""
    if isinstance(value, str):
        return value.replace("$", "$$")
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    return value
