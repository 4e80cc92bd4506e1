"""extends: a service laid upon another, of the same file or of another one.

The other service is brought into its one form first, with the folder of its own file, so that its
relative paths keep their meaning; then the two are merged by the rules for several files. A service
may extend one that extends another; circles are refused with their names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cli.compose import keys
from cli.compose.at import At
from cli.compose.forms import canonical_service
from cli.compose.merge import merge
from cli.compose.mounts import absolute
from cli.compose.problems import nearest
from cli.compose.reading import Reading, refuse_remote
from cli.compose.shorts import Context
from cli.compose.tree import Node

EXTENDS_DEPTH_MAX = 64
Chain = tuple[tuple[str, str], ...]  # file and service, from the first that extends


def extended(reading: Reading, at: At, context: Context, file: str, *, chain: Chain) -> Node | None:
    """The service in its one form, laid upon what it extends; None if it is no mapping. One that
    several extend is done once.
    """
    key = (*chain[-1], str(context.base))
    if key not in reading.services:
        reading.services[key] = _extended(reading, at, context, file, chain)
    return reading.services[key]


def _extended(reading: Reading, at: At, context: Context, file: str, chain: Chain) -> Node | None:
    node = canonical_service(at, context)
    if node is None:
        return None
    assert isinstance(node.value, dict)
    node.value.pop("extends", None)
    extends = at.set_at("extends")
    if extends is None or extends.node.tag == "!reset":
        return node
    base = _base(reading, extends, context, file, chain)
    if base is None:  # which has been reported
        reading.report.half_known(node.mark)
        return node
    merged = merge(base, node, ("services", "*"))
    merged.tag = node.tag
    return merged


def _base(reading: Reading, extends: At, context: Context, file: str, chain: Chain) -> Node | None:
    """The service that another one extends."""
    if isinstance(extends.node.value, str):
        other_at, file_at = extends, None
    elif extends.check_keys(keys.EXTENDS, context="extends"):
        found, file_at = extends.set_at("service"), extends.set_at("file")
        if found is None:
            extends.lacks("service", "add service: and the name to start from")
            return None
        other_at = found
    else:
        return None
    place = _place(file_at, context, file)
    if place is None:
        return None
    other, (other_file, other_context) = other_at.text(empty=False), place
    if (other_file, other) in chain:
        names = " -> ".join(name for _, name in (*chain, (other_file, other)))
        extends.fail(f"services extend each other in a circle: {names}", "break the circle")
        return None
    if len(chain) > EXTENDS_DEPTH_MAX:
        extends.fail(
            f"services extend each other over more than {EXTENDS_DEPTH_MAX} levels",
            "extend the first of them",
        )
        return None
    base = _service(reading, other_at, other, other_file, other_context)
    if base is None:
        return None
    return extended(reading, base, other_context, other_file, chain=(*chain, (other_file, other)))


def _place(file_at: At | None, context: Context, file: str) -> tuple[str, Context] | None:
    """The file that the other service stands in, and what its forms depend on."""
    if file_at is None or not file_at.text(empty=False):
        return file, context
    if refuse_remote(file_at, file_at.text()):
        return None
    path = Path(absolute(file_at.text(), context.base, context.home))
    if str(path) == str(Path(file).absolute()):
        return file, context
    if not path.is_file():
        file_at.fail(f"no such file: {path}", "correct the path")
        return None
    return str(path), replace(context, base=path.parent)


def _service(reading: Reading, other_at: At, other: str, file: str, context: Context) -> At | None:
    root = reading.tree(file, context)
    services = root.value.get("services") if root and isinstance(root.value, dict) else None
    known = services.value if services and isinstance(services.value, dict) else {}
    base = known.get(other)
    if base is None:
        near = nearest(other, known)
        other_at.fail(
            f'there is no service "{other}" in {file}',
            f'did you mean "{near}"?' if near else "name a service of that file",
        )
        return None
    return At(base, f"services.{other}", reading.report)
