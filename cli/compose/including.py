"""A file in its one form, with what it includes.

Each entry of `include` is a stack of its own: it is read with its own folder and its own .env, and
what it declares is then copied beside the file's own. Two declarations of one name must be equal,
for include does not merge.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from cli.compose import keys
from cli.compose.at import At
from cli.compose.extending import extended
from cli.compose.merge import merge, plain, settled
from cli.compose.mounts import absolute
from cli.compose.objects import canonical_section
from cli.compose.reading import SECTIONS, Reading, check_root, refuse_remote
from cli.compose.shorts import Context, strings
from cli.compose.tree import Node

INCLUDE_DEPTH_MAX = 16
_SERVICE_NAME = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]*[a-zA-Z0-9])?")


def read_file(
    reading: Reading, name: str, context: Context, *, chain: tuple[str, ...] = ()
) -> Node | None:
    """A file in its one form, with what it includes; None if it cannot be used. `chain` are the
    files that include it.
    """
    root = reading.tree(name, context)
    if root is None:
        return None
    at = At(root, "", reading.report)
    check_root(at)
    assert isinstance(root.value, dict)
    entries: dict[str, Node] = {}
    for key, value in root.value.items():
        if key not in SECTIONS or value.value is None:
            continue
        section = At(value, key, reading.report)
        if not section.is_map("NAME: and its settings, indented below"):
            continue
        if key == "services":
            entries[key] = _services(reading, section, context, name)
        else:
            canonical_section(section, context)
            entries[key] = value
    result = root.made(dict(entries))
    result.keys = root.keys
    included = at.set_at("include")
    if included is not None:
        _include(reading, result, included, context, (*chain, name))
    return result


def _services(reading: Reading, section: At, context: Context, file: str) -> Node:
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
        node = extended(reading, at, context, file, chain=((file, name),))
        if node is not None:
            found[name] = node
    result = section.node.made(dict(found))
    result.keys = section.node.keys
    result.tag = section.node.tag
    return result


def _include(
    reading: Reading, root: Node, included: At, context: Context, chain: tuple[str, ...]
) -> None:
    """Copies what the included files declare into `root`."""
    if len(chain) > INCLUDE_DEPTH_MAX:
        included.fail(
            f"files include each other deeper than {INCLUDE_DEPTH_MAX} levels",
            "include them from fewer levels",
        )
        return
    if not included.is_list("- FILE"):
        return
    for each in included.elements():
        read = _entry(reading, each, context, chain)
        if read is not None:
            _join(reading, root, settled(read))


def _join(reading: Reading, root: Node, read: Node) -> None:
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
                reading.report.error(
                    values[name].mark,
                    f"{section}.{name} is declared here and in {entry.mark}, differently",
                    "include does not merge; rename one, or give both files with -c",
                )
        joined = own.made(dict(values))
        joined.keys = {**(node.keys or {}), **(own.keys or {})}
        root.value[section] = joined


def _entry(reading: Reading, at: At, context: Context, chain: tuple[str, ...]) -> Node | None:
    """One entry of include: a file, or several that are merged."""
    folder: Path | None = None
    env_files: list[Path] = []
    paths: list[At] = [at]
    if isinstance(at.node.value, dict):
        if not at.check_keys(keys.INCLUDE, context="include"):
            return None
        path, directory, env = (at.set_at(k) for k in ("path", "project_directory", "env_file"))
        if path is None:
            at.lacks("path", "add path: FILE")
            return None
        paths = _each(path, context)
        if directory is not None:
            folder = Path(absolute(directory.text(), context.base, context.home))
        if env is not None:
            names = [each.text() for each in _each(env, context)]
            env_files = [Path(absolute(name, context.base, context.home)) for name in names]
    merged: Node | None = None
    inner: Context | None = None
    for each in paths:
        file = _file(each, context, chain)
        if file is None:
            continue
        if inner is None:  # all files of an entry start from the folder of its first
            folder = folder or file.parent
            own = reading.variables(folder, env_files)
            variables = {**own, **context.variables}
            inner = replace(context, base=folder, variables=variables)
        read = read_file(reading, str(file), inner, chain=chain)
        if read is not None:
            merged = read if merged is None else merge(merged, read)
    return merged


def _each(at: At, context: Context) -> list[At]:
    listed = strings(at, context)
    return list(At(listed, at.path, at.report).elements()) if listed is not None else []


def _file(at: At, context: Context, chain: tuple[str, ...]) -> Path | None:
    name = at.text(empty=False)
    if not name or refuse_remote(at, name):
        return None
    file = Path(absolute(name, context.base, context.home))
    if not file.is_file():
        at.fail(f"no such file: {file}", "correct the path")
        return None
    above = [Path(each).absolute() for each in chain]
    if file in above:
        circle = " -> ".join(each.name for each in (*above[above.index(file) :], file))
        at.fail(f"files include each other in a circle: {circle}", "break the circle")
        return None
    return file
