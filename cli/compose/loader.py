"""From compose files to a StackSpec: read, compose, interpolate, write out short forms, merge,
convert.

Files are read with positions and kept as trees until the very end, so that each problem, however
late it is found, points at its place. The steps run to their end before the report is checked, with
two exceptions: a file that is no YAML ends its own reading, and conversion needs a whole tree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cli.compose import convert, envfile, keys
from cli.compose.around import Surroundings
from cli.compose.at import At
from cli.compose.forms import Context, canonical_service
from cli.compose.forms import _strings as strings
from cli.compose.interpolate import interpolate
from cli.compose.merge import merge, plain, settled
from cli.compose.mounts import absolute
from cli.compose.objects import Objects, canonical_section
from cli.compose.problems import ComposeError, Mark, Problem, Report, Source, nearest
from cli.compose.tree import Node, parse
from swarm.errors import Invalid
from swarm.v1 import ServiceSpec, StackSpec, VolumeSpec

STDIN = "-"
STDIN_NAME = "stdin"
SECTIONS = ("services", "networks", "volumes", "secrets", "configs")
INCLUDE_DEPTH_MAX = 16
_STACK_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}")
_SERVICE_NAME = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]*[a-zA-Z0-9])?")
SERVICE_NAME_MAX = 63  # of the full name, which is a DNS label
_VERSION = re.compile(r"(2(\.\d+)?|3(\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the files say. Warnings are whole sentences with their place."""

    spec: StackSpec
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Load:
    """The state of one load."""

    report: Report
    environment: Mapping[str, str]
    stack: str
    stdin: str | None
    env_files: tuple[Path, ...] = ()
    sources: int = 0
    roots: dict[tuple[str, str], Node] = field(default_factory=dict)

    def source(self, name: str, text: str) -> Source:
        self.sources += 1
        return Source(name, text, order=self.sources)


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
    if not _STACK_NAME.fullmatch(stack):
        raise Invalid(
            f'"{stack}" cannot be the name of a stack; use 1 to 63 of a-z, A-Z, 0-9, - and _, '
            "the first a letter or digit"
        )
    if not sources:
        raise Invalid("no compose file is given; name one with -c FILE, or - for standard input")
    report = Report()
    state = _Load(report, environment, stack, stdin, tuple(env_files))
    base = project_directory or _folder(sources[0])
    variables = _variables(state, base, state.env_files)
    context = Context(base, variables, report)
    merged: Node | None = None
    for name in sources:
        root = _read(state, name, context, depth=0)
        if root is not None:
            merged = root if merged is None else merge(merged, root)
    if merged is None:
        report.check()
        raise AssertionError("a load without a tree has problems")
    active = frozenset(profiles) or frozenset(
        filter(None, re.split(r"[\s,]+", variables.get("COMPOSE_PROFILES", "")))
    )
    spec = _stack(state, At(settled(merged), "", report), variables, active)
    report.check()
    return Loaded(spec, report.warnings)


def _folder(source: str) -> Path:
    return Path.cwd() if source == STDIN else Path(source).absolute().parent


def _variables(state: _Load, base: Path, files: Iterable[Path]) -> dict[str, str]:
    """The environment, with .env (or the given files, later ones first) below it."""
    found: dict[str, str] = {"COMPOSE_PROJECT_NAME": state.stack}
    given = list(files)
    for path in given or [base / ".env"]:
        try:
            text = envfile.read_text(path)
        except (FileNotFoundError, IsADirectoryError):
            if given:
                _whole_file(state, str(path), f"no such file: {path}", "correct --env-file")
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            _whole_file(state, str(path), f"{path}: {reason}")
            continue
        source = state.source(str(path), text)
        found |= envfile.parse_dotenv(source, {**found, **state.environment}, state.report)
    return {**found, **state.environment}


def _whole_file(state: _Load, name: str, message: str, hint: str = "") -> None:
    state.report.error(Mark(state.source(name, ""), 1, 1), message, hint)


# ------------------------------------------------------------------ reading one file


def _read(state: _Load, name: str, context: Context, *, depth: int) -> Node | None:
    """A file in its one form, with what it includes; None if it cannot be used."""
    root = _tree(state, name, context)
    if root is None:
        return None
    at = At(root, "", state.report)
    _check_root(at)
    assert isinstance(root.value, dict)
    entries: dict[str, Node] = {}
    for key, value in root.value.items():
        if key not in SECTIONS or value.value is None:
            continue
        section = At(value, key, state.report)
        if not section.is_map("NAME: and its settings, indented below"):
            continue
        if key == "services":
            entries[key] = _services(state, section, context, name, depth=depth)
        else:
            canonical_section(section, context)
            entries[key] = value
    result = root.made(dict(entries))
    result.keys = root.keys
    included = at.set_at("include")
    if included is not None:
        result = _with_included(state, result, included, context, depth=depth)
    return result


def _tree(state: _Load, name: str, context: Context) -> Node | None:
    """The file's tree with its variables filled in. A file that is used twice (extends, include) is
    read once.
    """
    key = (name, str(context.base))
    if key in state.roots:
        return state.roots[key]
    text = _text(state, name)
    if text is None:
        return None
    shown = STDIN_NAME if name == STDIN else name
    source = state.source(shown, text)
    failed = state.report.failed
    root = parse(source, state.report)
    if root is None or root.value is None:
        if failed == state.report.failed:
            state.report.error(
                Mark(source, 1, 1), "the file is empty", "add services: and one service below it"
            )
        return None
    if not isinstance(root.value, dict):
        state.report.error(
            root.mark,
            "the file is not a mapping",
            "it begins with services: and one service below it",
        )
        return None
    for section in (*SECTIONS, "include", "name"):
        if section in root.value:
            interpolate(root.value[section], context.variables, state.report)
    state.roots[key] = root
    return root


def _text(state: _Load, name: str) -> str | None:
    if name == STDIN:
        if state.stdin is None:
            raise Invalid("standard input was not read; give its text")
        return state.stdin
    try:
        data = Path(name).read_bytes()
    except FileNotFoundError:
        _whole_file(state, name, f"no such file: {name}", "name an existing file with -c")
    except IsADirectoryError:
        _whole_file(state, name, f"{name} is a folder", "name the file in it")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        _whole_file(state, name, f"{name} cannot be read: {reason}")
    else:
        return _decoded(state, name, data)
    return None


def _decoded(state: _Load, name: str, data: bytes) -> str | None:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, errors="replace")
        source = state.source(name, data.decode(encoding, errors="replace"))
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        state.report.error(
            Mark(source, line, column),
            f"the byte 0x{data[error.start]:02x} is not valid UTF-8",
            "save the file as UTF-8",
        )
        return None


def _check_root(at: At) -> None:
    assert isinstance(at.node.value, dict)
    values = at.node.value
    if values and "services" not in values and not set(values) & set(keys.ROOT):
        first = next(iter(values.values())).value
        if isinstance(first, dict) and set(first) & {"image", "build", "command", "ports"}:
            at.fail_key(
                next(iter(values)),
                "this looks like a version 1 file, whose services stand at the top level",
                "add a line services: at the top and indent the rest below it",
            )
            return
    for name in values:
        key = keys.ROOT.get(name)
        if key is None and not name.startswith("x-"):
            near = nearest(name, keys.ROOT)
            hint = f'did you mean "{near}"?' if near else ""
            if not near and name in keys.SERVICE:
                hint = f'"{name}" belongs under a service'
            at.fail_key(
                name,
                f'unknown key "{name}" at the top level',
                hint or f"known here: {', '.join(keys.ROOT)}, and names that begin with x-",
            )
        elif key is not None and key.support is keys.Support.REFUSED:
            at.fail_key(name, f'"{name}" is not supported: {key.reason}', key.instead)
    version = at.set_at("version")
    if version is not None:
        text = version.node.text or version.shown()
        if not _VERSION.fullmatch(text):
            version.fail(
                f'"{text}" is not a version of compose files',
                "remove the line: versions 2 to 3.13 mean the same here",
            )
    name_at = at.set_at("name")
    if name_at is not None:
        name_at.text()


def _services(state: _Load, section: At, context: Context, file: str, *, depth: int) -> Node:
    found: dict[str, Node] = {}
    for name, at in section.items():
        if at.node.tag == "!reset":
            found[name] = at.node
            continue
        if not _SERVICE_NAME.fullmatch(name):
            section.fail_key(
                name,
                f'"{name}" cannot be the name of a service',
                "use a-z, A-Z, 0-9, -, _ and ., the first and last a letter or digit",
            )
            continue
        node = _extended(state, at, context, file, chain=((file, name),))
        if node is not None:
            found[name] = node
    result = section.node.made(dict(found))
    result.keys = section.node.keys
    result.tag = section.node.tag
    return result


def _extended(
    state: _Load,
    at: At,
    context: Context,
    file: str,
    *,
    chain: tuple[tuple[str, str], ...],
) -> Node | None:
    """The service in its one form, laid upon what it extends."""
    node = canonical_service(at, context)
    if node is None:
        return None
    assert isinstance(node.value, dict)
    node.value.pop("extends", None)
    extends = at.set_at("extends")
    if extends is None:
        return node
    if isinstance(extends.node.value, str):
        other_at, file_at = extends, None
    elif extends.check_keys(keys.EXTENDS, context="extends"):
        found = extends.set_at("service")
        if found is None:
            extends.lacks("service", "add service: and the name to start from")
            return node
        other_at, file_at = found, extends.set_at("file")
    else:
        return node
    other, other_file, other_context = other_at.text(empty=False), file, context
    if file_at is not None and file_at.text(empty=False):
        path = Path(absolute(file_at.text(), context.base, context.home))
        if str(path) != str(Path(file).absolute()):
            other_file = str(path)
            other_context = Context(path.parent, context.variables, context.report)
            if not path.is_file():
                file_at.fail(f"no such file: {path}", "correct the path")
                return node
    if (other_file, other) in chain:
        names = " -> ".join(name for _, name in (*chain, (other_file, other)))
        extends.fail(f"services extend each other in a circle: {names}", "break the circle")
        return node
    root = _tree(state, other_file, other_context)
    services = root.value.get("services") if root and isinstance(root.value, dict) else None
    base = services.value.get(other) if services and isinstance(services.value, dict) else None
    if base is None:
        known = services.value if services and isinstance(services.value, dict) else {}
        near = nearest(other, known)
        other_at.fail(
            f'there is no service "{other}" in {other_file}',
            f'did you mean "{near}"?' if near else "name a service of that file",
        )
        return node
    base_at = At(base, f"services.{other}", state.report)
    base_node = _extended(
        state, base_at, other_context, other_file, chain=(*chain, (other_file, other))
    )
    if base_node is None:
        return node
    merged = merge(base_node, node, ("services", "*"))
    merged.tag = node.tag
    return merged


def _with_included(state: _Load, root: Node, included: At, context: Context, *, depth: int) -> Node:
    if depth >= INCLUDE_DEPTH_MAX:
        included.fail(
            f"files include each other deeper than {INCLUDE_DEPTH_MAX} levels", "break the circle"
        )
        return root
    if not included.is_list("- FILE"):
        return root
    for each in included.elements():
        read = _included(state, each, context, depth=depth)
        if read is None:
            continue
        assert isinstance(root.value, dict)
        assert isinstance(read.value, dict)
        for section, node in read.value.items():
            own = root.value.get(section)
            if own is None:
                root.value[section] = node
                continue
            assert isinstance(own.value, dict)
            assert isinstance(node.value, dict)
            values = dict(own.value)
            for name, entry in node.value.items():
                if name not in values:
                    values[name] = entry
                elif plain(values[name]) != plain(entry):
                    place = values[name].mark
                    state.report.error(
                        place,
                        f"{section}.{name} is declared here and in {entry.mark}, differently",
                        "include does not merge; rename one, or give both files with -c",
                    )
            joined = own.made(dict(values))
            joined.keys = {**(node.keys or {}), **(own.keys or {})}
            root.value[section] = joined
    return root


def _included(state: _Load, at: At, context: Context, *, depth: int) -> Node | None:
    """One entry of include: a file, or several that are merged."""
    variables = context.variables
    folder: Path | None = None
    paths: list[At] = [at]
    if isinstance(at.node.value, dict):
        if not at.check_keys(keys.INCLUDE, context="include"):
            return None
        path, directory, env = (at.set_at(k) for k in ("path", "project_directory", "env_file"))
        if path is None:
            at.lacks("path", "add path: FILE")
            return None
        listed = strings(path, context)
        paths = list(At(listed, path.path, at.report).elements()) if listed is not None else []
        if directory is not None:
            folder = Path(absolute(directory.text(), context.base, context.home))
        if env is not None:
            files = strings(env, context)
            names = [e.text() for e in At(files, env.path, at.report).elements()] if files else []
            given = [Path(absolute(name, context.base, context.home)) for name in names]
            variables = {**_variables(state, context.base, given), **context.variables}
    merged: Node | None = None
    for each in paths:
        name = each.text(empty=False)
        if not name:
            continue
        file = Path(absolute(name, context.base, context.home))
        if not file.is_file():
            each.fail(f"no such file: {file}", "correct the path")
            continue
        folder = folder or file.parent
        if isinstance(at.node.value, str) or at.set_at("env_file") is None:
            own = _variables(state, folder, ()) if (folder / ".env").is_file() else {}
            variables = {**own, **context.variables}
        inner = Context(folder, variables, context.report)
        read = _read(state, str(file), inner, depth=depth + 1)
        if read is not None:
            merged = read if merged is None else merge(merged, read)
    return merged


# ------------------------------------------------------------------ the whole


def _stack(
    state: _Load, root: At, variables: Mapping[str, str], active: frozenset[str]
) -> StackSpec:
    report, stack = state.report, state.stack
    objects = Objects(stack, root, variables)
    services_at = root.set_at("services")
    places = dict(services_at.items()) if services_at is not None else {}
    chosen = {name: at for name, at in places.items() if _is_active(at, active)}
    around = Surroundings(
        stack=stack,
        report=report,
        networks=objects.networks,
        volumes=objects.volumes,
        secrets=objects.secrets,
        configs=objects.configs,
        services=frozenset(chosen),
        left_out=frozenset(places) - frozenset(chosen),
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
    _refuse_cycles(chosen)
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
    """The named volumes that services use."""
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
        if not d.external and d.full_name in used
    )


def _refuse_cycles(services: Mapping[str, At]) -> None:
    """Reports each circle of depends_on once, at the entry that closes it."""
    edges = {name: convert.dependency_places(at.node) for name, at in services.items()}
    done: set[str] = set()
    for start in edges:
        trail: list[str] = []
        stack: list[tuple[str, bool]] = [(start, False)]
        while stack:
            name, leaving = stack.pop()
            if leaving:
                trail.pop()
                done.add(name)
                continue
            if name in done or name in trail:
                continue
            trail.append(name)
            stack.append((name, True))
            for other, node in edges[name].items():
                if other in trail and other != name:
                    circle = [*trail[trail.index(other) :], other]
                    at = services[name]
                    at.report.error(
                        node.mark,
                        f"services.{name}.depends_on: the services wait for each other in a "
                        f"circle: {' -> '.join(circle)}",
                        "remove one of these dependencies",
                    )
                elif other in edges and other not in done:
                    stack.append((other, False))


__all__ = ["ComposeError", "Loaded", "Problem", "load"]
