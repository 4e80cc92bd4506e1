"""From compose files to a StackSpec: read, compose, interpolate, write out short forms, merge,
convert.

Files are read with positions and kept as trees until the very end, so that each problem, however
late it is found, points at its place. The steps run to their end before the report is checked, with
two exceptions: a file that is no YAML ends its own reading, and conversion needs a whole tree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.compose import between, convert
from cli.compose.around import Surroundings
from cli.compose.at import At
from cli.compose.including import read_file
from cli.compose.merge import merge, settled
from cli.compose.objects import Objects
from cli.compose.problems import ComposeError, Problem, Report
from cli.compose.reading import SECTIONS, STDIN, Reading
from cli.compose.shorts import Context
from cli.compose.tree import Node
from swarm.errors import Invalid
from swarm.v1 import ServiceSpec, StackSpec, VolumeSpec

_STACK_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}")
SERVICE_NAME_MAX = 63  # of the full name, which is a DNS label


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the files say. Warnings are whole sentences with their place."""

    spec: StackSpec
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Files:
    """Files that were read and merged: every key in its one form, nothing converted yet. `head` is
    the first file's own tree: its version and its x- keys are those of the whole.
    """

    state: Reading
    root: Node
    head: Node
    name: Node | None
    base: Path
    variables: Mapping[str, str]
    active: frozenset[str]

    def services(self) -> dict[str, At]:
        """The services whose profiles are active, in the order of the files."""
        section = At(self.root, "", self.state.report).set_at("services")
        places = section.items() if section is not None else ()
        return {name: at for name, at in places if _is_active(at, self.active)}


def load(
    sources: Sequence[str],
    *,
    stack: str,
    environment: Mapping[str, str],
    project_directory: Path | None,
    stdin: str | None,
    env_files: Sequence[Path],
    profiles: Collection[str],
) -> Loaded:
    """See cli.compose.load."""
    report = Report()
    files = read_files(
        sources,
        report,
        stack=stack,
        environment=environment,
        project_directory=project_directory,
        stdin=stdin,
        env_files=env_files,
        profiles=profiles,
    )
    if files.name is not None and files.name.value not in (None, "", stack):
        report.warn(
            files.name.mark,
            f'name: not used, the stack is called "{stack}" as the command says',
        )
    spec = stack_of(files, report)
    report.check()
    return Loaded(spec, report.warnings)


def read_files(
    sources: Sequence[str],
    report: Report,
    *,
    stack: str,
    environment: Mapping[str, str],
    project_directory: Path | None,
    stdin: str | None,
    env_files: Sequence[Path],
    profiles: Collection[str],
    interpolates: bool = True,
) -> Files:
    """Reads and merges the files. Problems are left in the report, unless no file can be read."""
    if not _STACK_NAME.fullmatch(stack):
        raise Invalid(
            f'"{stack}" cannot be the name of a stack; use 1 to 63 of a-z, A-Z, 0-9, - and _, '
            "the first a letter or digit"
        )
    if not sources:
        raise Invalid("no compose file is given; name one with -c FILE, or - for standard input")
    state = Reading(report, environment, stack, stdin, interpolates=interpolates)
    base = project_directory or _folder(sources[0])
    variables = state.variables(base, env_files)
    context = Context(base, variables, report, project=base)
    merged: Node | None = None
    head: Node | None = None
    named: Node | None = None
    for name in sources:
        root = read_file(state, name, context)
        if root is None:
            continue
        tree = state.roots[name, str(base)]
        head = head or tree
        assert isinstance(tree.value, dict)
        named = tree.value.get("name", named)
        merged = root if merged is None else merge(merged, root)
    if merged is None or head is None:
        report.check()
        raise AssertionError("a load without a tree has problems")
    active = frozenset(profiles) or frozenset(
        filter(None, re.split(r"[\s,]+", variables.get("COMPOSE_PROFILES", "")))
    )
    return Files(state, settled(merged), head, named, base, variables, active)


def _folder(source: str) -> Path:
    return Path.cwd() if source == STDIN else Path(source).absolute().parent


def stack_of(files: Files, report: Report) -> StackSpec:
    """What the files come to; what is wrong is in the report."""
    stack, root = files.state.stack, At(files.root, "", report)
    objects = Objects(stack, root, files.variables)
    services_at = root.set_at("services")
    places = dict(services_at.items()) if services_at is not None else {}
    chosen = {name: at for name, at in places.items() if _is_active(at, files.active)}
    left_out = frozenset(places) - frozenset(chosen)
    around = Surroundings(
        stack=stack,
        report=report,
        networks=objects.networks,
        volumes=objects.volumes,
        secrets=objects.secrets,
        configs=objects.configs,
        services=chosen,
        left_out=left_out,
        aliases=between.other_names(chosen, left_out),
    )
    if not chosen and not report.failed:
        if places:
            root.warn(
                "no service is active: all have profiles; name one with --profile, or in "
                "COMPOSE_PROFILES"
            )
        elif any(root.at(section) is not None for section in SECTIONS):
            root.warn("there are no services")
        else:
            root.fail("there are no services", "add services: and one service below it")
    specs: list[ServiceSpec] = []
    for name, at in chosen.items():
        if len(full := around.full(name)) > SERVICE_NAME_MAX:
            assert services_at is not None
            services_at.fail_key(
                name,
                f'the full name "{full}" has {len(full)} characters, the most are '
                f"{SERVICE_NAME_MAX}",
                "shorten the name of the service or of the stack",
            )
        specs.append(convert.convert_service(name, at, around))
    between.refuse_cycles(chosen)
    between.refuse_clashes(chosen, dict(zip(chosen, specs, strict=True)))
    used = frozenset(a.target for s in specs if s.task is not None for a in s.task.networks)
    return StackSpec(
        name=stack,
        services=tuple(specs),
        networks=objects.network_specs(used),
        secrets=objects.secret_specs(),
        configs=objects.config_specs(),
        volumes=_volumes(objects, specs),
        external_networks=tuple(
            d.full_name for d in objects.networks.values() if d.external and d.full_name in used
        ),
        external_secrets=tuple(d.full_name for d in objects.secrets.values() if d.external),
        external_configs=tuple(d.full_name for d in objects.configs.values() if d.external),
    )


def _is_active(at: At, active: frozenset[str]) -> bool:
    found = at.set_at("profiles")
    names = found.texts() if found is not None else ()
    return not names or "*" in active or bool(active.intersection(names))


def _volumes(objects: Objects, specs: Iterable[ServiceSpec]) -> tuple[VolumeSpec, ...]:
    """The named volumes that services use. One whose name holds a placeholder ({{.Task.Slot}}) is
    another volume for each task: its mounts have all that is needed to make it where it is used.
    """
    used = {
        mount.source
        for spec in specs
        if spec.task is not None and spec.task.container is not None
        for mount in spec.task.container.mounts
        if mount.type == "volume"
    }
    return tuple(
        VolumeSpec(name=d.full_name, labels=dict(d.labels), driver=d.driver)
        for d in objects.volumes.values()
        if not d.external and d.full_name in used and "{{" not in d.full_name
    )


__all__ = ["ComposeError", "Loaded", "Problem", "load"]
