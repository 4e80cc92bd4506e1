"""Volumes of a service: the short forms, written out as long ones, and paths made absolute.

[SOURCE:]TARGET[:OPTIONS]. A source that looks like a path is a bind mount, any other a volume's
name, none an anonymous volume. Options are separated by commas; one that is not known is refused,
where Docker ignores it.
"""

from __future__ import annotations

import posixpath
from pathlib import Path

from cli.compose.at import At, made, with_value
from cli.compose.keys import (
    BIND,
    IMAGE_OPTIONS,
    TMPFS,
    VOLUME_MOUNT,
    VOLUME_OPTIONS,
)
from cli.compose.problems import nearest
from cli.compose.shorts import pairs
from cli.compose.tree import Node, Value

PROPAGATION = ("rprivate", "private", "rshared", "shared", "rslave", "slave")
_OPTIONS = ("ro", "rw", "z", "Z", "nocopy", "cached", "delegated", "consistent", *PROPAGATION)
_PATH_STARTS = (".", "/", "~", "\\")


def is_path(source: str) -> bool:
    """Whether a short form's source is a path of the host and not a volume's name."""
    return source.startswith(_PATH_STARTS) or _has_drive(source)


def _has_drive(path: str) -> bool:
    return len(path) > 2 and path[0].isalpha() and path[1] == ":" and path[2] in "\\/"


def absolute(path: str, base: Path, home: str) -> str:
    """A host path against the project's folder; ~ is the caller's home. A path that is absolute
    already stays as it is written, as in Docker.
    """
    if home and (path == "~" or path.startswith("~/")):
        path = home + path[1:]
    if path.startswith(("/", "~", "\\\\")) or _has_drive(path):
        return path
    return posixpath.normpath(posixpath.join(base.as_posix(), path))


def long_mounts(at: At, base: Path, home: str) -> list[Node]:
    """All entries of `volumes` in the long form."""
    if not at.is_list("- data:/var/lib/data"):
        return []
    found = []
    for entry in at.elements():
        if isinstance(entry.node.value, dict):
            node = _long(entry, base, home)
        else:
            node = _short(entry, base, home)
        if node is not None:
            found.append(node)
    return found


def _long(at: At, base: Path, home: str) -> Node | None:
    if not at.check_keys(VOLUME_MOUNT, context="volumes"):
        return None
    for key, known in (
        ("bind", BIND),
        ("volume", VOLUME_OPTIONS),
        ("tmpfs", TMPFS),
        ("image", IMAGE_OPTIONS),
    ):
        if (options := at.set_at(key)) is not None:
            options.check_keys(known, context=f"volumes.{key}")
    kind, source, options = at.set_at("type"), at.set_at("source"), at.set_at("volume")
    if kind is None:
        at.lacks("type", "add type: volume, bind or tmpfs")
        return None
    if kind.node.value == "bind" and source is not None:
        path = _source(source, source.text(), base, home) if source.text() else ""
        return with_value(at, "source", source.node.made(path))
    if options is not None and (labels := options.set_at("labels")) is not None:
        given = pairs(labels) or labels.node.made({})
        return with_value(at, "volume", with_value(options, "labels", given))
    return at.node


def _source(at: At, path: str, base: Path, home: str) -> str:
    found = absolute(path, base, home)
    if found.startswith("~"):
        own = path == "~" or path.startswith("~/")
        at.refuse(
            f'"{path}": the variable HOME is not set'
            if own
            else f'"{path}": only ~ itself, your own home, is known',
            "write the whole path",
        )
    return found


def _split(text: str) -> list[str]:
    """At colons, but not at those of a Windows drive or of a variable that was left as it is. With
    a forward slash a drive is one only before a second path: d:/data is a volume's name and a path.
    """
    parts: list[str] = []
    written = text.split(":")
    drives = "\\/" if len(written) > 2 and written[2].startswith("/") else "\\"
    for part in written:
        if parts and parts[-1].count("${") > parts[-1].count("}"):
            parts[-1] += ":" + part
            continue
        drive = bool(parts) and len(parts[-1]) == 1 and parts[-1].isalpha()
        if drive and part and part[0] in drives:
            parts[-1] += ":" + part
            continue
        parts.append(part)
    return parts


def _short(at: At, base: Path, home: str) -> Node | None:
    text = at.text()
    forms = "write SOURCE:TARGET, SOURCE:TARGET:ro or TARGET, such as data:/var/lib/data"
    if not text:
        at.fail("must not be empty", forms)
        return None
    parts = _split(text)
    if len(parts) > 3 or any(not part for part in parts):
        at.fail(f'"{text}" is not a volume', forms)
        return None
    target = parts[1] if len(parts) > 1 else parts[0]
    entries: dict[str, Value | Node] = {"target": target}
    if len(parts) == 1:
        entries["type"] = "volume"
    elif is_path(parts[0]):
        entries |= {"type": "bind", "source": _source(at, parts[0], base, home)}
    else:
        entries |= {"type": "volume", "source": parts[0]}
    inner: dict[str, Value] = {}
    for option in parts[2].split(",") if len(parts) == 3 else ():
        if option in ("ro", "rw"):
            entries["read_only"] = option == "ro"
        elif option in ("z", "Z"):
            inner["selinux"] = option
        elif option == "nocopy":
            inner["nocopy"] = True
        elif option in PROPAGATION:
            inner["propagation"] = option
        elif option in ("cached", "delegated", "consistent"):
            at.warn(f'"{option}" has no effect: it is about sharing files with a Mac')
        else:
            near = nearest(option, _OPTIONS)
            if option[:2] in ("ro", "rw") and option[2:] in ("z", "Z"):
                near = f"{option[:2]},{option[2:]}"
            at.refuse(
                f'"{text}": the option "{option}" is not known',
                f"did you mean {near}?" if near else f"known are {', '.join(_OPTIONS)}",
            )
    kind = str(entries["type"])
    if kind == "volume":
        # Relabelling and propagation are about host paths; Docker ignores them on volumes too.
        for name in ("selinux", "propagation"):
            if name in inner:
                at.warn(f'"{inner.pop(name)}" has no meaning for a volume, only for a host path')
    elif "nocopy" in inner:
        at.warn('"nocopy" has no meaning for a host path')
        inner.pop("nocopy")
    if inner:
        entries[kind] = made(at.node, dict(inner))
    return made(at.node, entries)
