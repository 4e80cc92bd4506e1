"""Short forms that many keys have: a mapping as a list of K=V, a list as one string, a command as a
line. Those of one key alone are in forms, ports and mounts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cli.compose.at import At, go_float
from cli.compose.problems import Report
from cli.compose.tree import Node
from cli.compose.words import split_words


@dataclass(frozen=True, slots=True)
class Context:
    """What the forms depend on. `base` is the folder that relative paths start from; `variables`
    is the environment with .env below it.
    """

    base: Path
    variables: Mapping[str, str]
    report: Report
    project: Path | None = None  # what the written form's paths start from; by default `base`

    @property
    def home(self) -> str:
        return self.variables.get("HOME", "")


def pairs(at: At, context: Context | None = None) -> Node | None:
    """A mapping, or a list of K=V; K alone has no value."""
    del context
    if isinstance(at.node.value, dict):
        return at.node
    if not isinstance(at.node.value, list):
        at.fail(f"must be a mapping or a list of NAME=value, not {at.shown()}")
        return None
    values: dict[str, Node] = {}
    for entry in at.elements():
        if isinstance(entry.node.value, dict) and len(entry.node.value) == 1:
            (name,) = entry.node.value
            entry.fail("must be a string, not a mapping", f"write - {name}=value, without a space")
            continue
        name, equals, value = entry.text().partition("=")
        if not name.strip():
            entry.fail("a name is missing", "write NAME=value")
            continue
        values[name] = entry.node.made(value if equals else None)
    return at.node.made(dict(values))


def strings(at: At, context: Context) -> Node | None:
    """One string, or a list of them."""
    del context
    if isinstance(at.node.value, list):
        return at.node
    if isinstance(at.node.value, dict | bool | None):
        at.fail(f"must be a string or a list of strings, not {at.shown()}")
        return None
    return at.node.made([at.node])


def words(at: At, context: Context) -> Node | None:
    """A command: a list, or a line that is split into words."""
    del context
    if isinstance(at.node.value, list):
        return at.node
    if isinstance(at.node.value, dict | bool):
        at.fail(f"must be a string or a list of strings, not {at.shown()}")
        return None
    if at.node.value is None:
        return at.node
    try:
        split = split_words(at.text())
    except ValueError as error:
        at.fail(
            f"the line cannot be split into words: {error}",
            "close the quote, or write the command as a list",
        )
        return None
    return at.node.made([at.node.made(word) for word in split])


def numbers(at: At, context: Context) -> Node | None:
    """Ports; of a number its value, as Docker has it: 0x50 is 80."""
    listed = strings(at, context)
    if listed is None:
        return None
    ports = At(listed, at.path, at.report).elements()
    return at.node.made([_number_as_text(each.node) for each in ports])


def _number_as_text(node: Node) -> Node:
    match node.value:
        case int() if not isinstance(node.value, bool):
            return node.made(str(node.value))
        case float():
            return node.made(go_float(node.value))
    return node
