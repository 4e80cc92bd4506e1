"""Go templates in `--format`: the shared engine (swarm.gotemplate) with Docker's functions (json,
join, split, lower, upper, title, pad, truncate; println, here for its place in Docker's list, is
Go's own). Source: Docker's "Format command and log output" page.

A field that does not exist is an error that names the nearest one, where the fields are known: in
rows of lists always (`Record`), in inspected objects for names that no object has (`known`).
Where Go would stop at a field of a nil pointer, an absent value prints as nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from swarm import gotemplate
from swarm.gotemplate import Missing, show

__all__ = ["Template", "to_json"]


class Template:
    """A parsed template. Raises Invalid where the text is none."""

    def __init__(self, text: str, *, known: frozenset[str] = frozenset()) -> None:
        self._known = known
        self._template = gotemplate.Template(
            text, name="--format", functions=FUNCTIONS, missing=self._missing
        )

    def render(self, dot: Any) -> str:
        """The text for one value. Raises Invalid with the field or function that does not fit."""
        return self._template.render(dot)

    def _missing(self, mapping: Mapping[str, Any], name: str) -> Missing:
        if name in self._known:
            return Missing("")
        # Keys that users choose (labels) may be absent; a name written like one of ours is a slip.
        if self._known and name[:1].isupper():
            raise gotemplate.unknown_field(name, self._known, among=mapping)
        return gotemplate.no_value(mapping, name)


# ------------------------------------------------------------------ Docker's functions


def _plain(value: Any) -> Any:
    """The value for JSON: what is absent is null, methods are left out."""
    if isinstance(value, Missing):
        return None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def to_json(value: Any) -> str:
    """Compact JSON as Go's encoder writes it."""
    return json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False)


def _title(text: str) -> str:
    return re.sub(r"(?<!\S)\S", lambda match: match[0].upper(), show(text))


def _pad(text: str, before: int, after: int) -> str:
    return " " * before + show(text) + " " * after if text else show(text)


def _truncate(text: str, length: int) -> str:
    return show(text)[: max(length, 0)]


def _join(items: Any, separator: str = "") -> str:
    if isinstance(items, Missing):
        return ""
    return separator.join(show(item) for item in items)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **gotemplate.BUILTINS,
    "json": to_json,
    "join": _join,
    "split": lambda text, separator: show(text).split(separator),
    "lower": lambda text: show(text).lower(),
    "upper": lambda text: show(text).upper(),
    "title": _title,
    "pad": _pad,
    "truncate": _truncate,
}
