"""YAML with positions, read as Docker reads it.

libyaml's parser gives events; the composer here makes Nodes from them. Scalars are typed in
scalars.py. Mapping keys are strings, duplicates are refused, merge keys (`<<`) are applied, and one
document is one file. An alias is a node of its own place that shares the contents of its anchor;
aliases that stand for more than ALIASED_MAX values together are refused, so that a small file
cannot take up the machine.
"""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import yaml
from yaml._yaml import CParser

from cli.compose.problems import Mark, Report, Source, nearest
from cli.compose.scalars import resolve
from cli.compose.syntax import explain, mark_of_offset

ALIASED_MAX = 200_000  # values that all aliases of a file stand for
DEPTH_MAX = 100  # nested collections
BYTES_MAX = 32 * 1024 * 1024
SPECIAL_TAGS = ("!reset", "!override")
# Not in any file: the value could not be filled in, which is reported already.
FAILED_TAG = "!failed"
# Nor this: the text holds variables that were left as they are.
LITERAL_TAG = "!literal"
# Nor this: a variable or label that an env_file or label_file brought in.
FILE_TAG = "!file"
SILENT_TAGS = (FAILED_TAG, LITERAL_TAG)  # such a value is not told to be wrong
_CORE = "tag:yaml.org,2002:"
_SAME_AS = {"map": "set"}  # a set is a mapping without values

Value = None | bool | int | float | str | list["Node"] | dict[str, "Node"]


class Node:
    """A value and where it stands. `text` is a scalar as written; `plain` means without quotes.
    `keys` tells where the keys of a mapping stand. `origin` of an alias is its anchor's name and
    node. `size` counts the values below, `height` the collections nested in it.
    """

    __slots__ = (
        "column",
        "height",
        "keys",
        "line",
        "origin",
        "plain",
        "size",
        "source",
        "tag",
        "text",
        "value",
    )

    def __init__(
        self,
        value: Value,
        source: Source,
        line: int,
        column: int,
        *,
        text: str = "",
        plain: bool = False,
        tag: str = "",
        keys: dict[str, tuple[Source, int, int]] | None = None,
        size: int = 1,
        height: int = 0,
        origin: tuple[str, Node] | None = None,
    ) -> None:
        self.value = value
        self.source = source
        self.line = line
        self.column = column
        self.text = text
        self.plain = plain
        self.tag = tag
        self.keys = keys
        self.size = size
        self.height = height
        self.origin = origin

    @property
    def mark(self) -> Mark:
        return Mark(self.source, self.line, self.column)

    def key_mark(self, key: str) -> Mark:
        """Where the key stands; for a value that was made from another form, where that stood."""
        if self.keys is not None and key in self.keys:
            return Mark(*self.keys[key])
        if isinstance(self.value, dict) and key in self.value:
            return self.value[key].mark
        return self.mark

    def made(self, value: Value) -> Node:
        """Another value at the same place."""
        text = ""
        if not isinstance(value, list | dict):
            text = value if isinstance(value, str) else str(value)
        return Node(value, self.source, self.line, self.column, text=text)

    def __repr__(self) -> str:
        return f"Node({self.value!r} at {self.line}:{self.column})"


def parse(source: Source, report: Report) -> Node | None:
    """The one document of a source; None if it is empty or cannot be read (then reported)."""
    if len(source.text) > BYTES_MAX:
        report.error(Mark(source, 1, 1), "the file is larger than 32 MiB")
        return None
    try:
        return _Composer(source, report).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        report.error(Mark(source, line, column), *explain(source, error, line))
    except yaml.reader.ReaderError as error:
        report.error(
            mark_of_offset(source, error.position),
            f"the character {chr(error.character)!r} is not allowed in YAML"
            if isinstance(error.character, int)
            else "the file is not valid UTF-8",
            "remove it, or write it as an escape in double quotes",
        )
    except _Refused:
        pass  # reported where it was found
    return None


class _Refused(Exception):
    """The document cannot be composed; the reason is in the report."""


class _Composer:
    """One pass over the parser's events."""

    def __init__(self, source: Source, report: Report) -> None:
        self.source = source
        self.report = report
        self.parser: Any = CParser(source.text)
        self.anchors: dict[str, Node | None] = {}  # None: still open
        self.depth = 0
        self.aliased = 0

    def document(self) -> Node | None:
        """The one document that is not empty."""
        get = self.parser.get_event
        get()  # stream start
        found: Node | None = None
        while not isinstance(start := get(), yaml.StreamEndEvent):
            self.anchors.clear()
            event = get()
            empty = isinstance(event, yaml.ScalarEvent) and event.value == "" and not event.style
            if found is not None and not empty:
                self.refuse(
                    start,
                    "a second document begins here, and only one is read",
                    "put it into a file of its own and name both with -c",
                )
            node = self.node(event)
            found = found if empty else node
            get()  # document end
        return found

    def refuse(self, event: Any, message: str, hint: str = "") -> None:
        mark = event.start_mark
        self.report.error(Mark(self.source, mark.line + 1, mark.column + 1), message, hint)
        raise _Refused

    def node(self, event: Any) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event)
        elif isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        else:
            if event.anchor:
                self.anchors[event.anchor] = None
            self.depth += 1
            if self.depth > DEPTH_MAX:
                self.refuse(event, f"nested deeper than {DEPTH_MAX} levels")
            mapping = isinstance(event, yaml.MappingStartEvent)
            node = self.mapping(event) if mapping else self.sequence(event)
            self.depth -= 1
            if node.height > DEPTH_MAX:  # by aliases within aliases
                self.refuse(event, f"nested deeper than {DEPTH_MAX} levels")
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def alias(self, event: Any) -> Node:
        name = event.anchor
        if name not in self.anchors:
            self.refuse(
                event,
                f"the alias *{name} has no anchor",
                f"write &{name} before the value it stands for, above this line",
            )
        found = self.anchors[name]
        if found is None:
            self.refuse(event, f"the anchor &{name} contains itself")
        assert found is not None
        self.aliased += found.size
        if self.aliased > ALIASED_MAX:
            self.refuse(
                event,
                f"the aliases up to here stand for more than {ALIASED_MAX} values",
                "aliases of aliases multiply; write out what is meant",
            )
        mark = event.start_mark
        return Node(
            found.value,
            self.source,
            mark.line + 1,
            mark.column + 1,
            text=found.text,
            plain=found.plain,
            tag=found.tag,
            keys=found.keys,
            size=found.size,
            height=found.height,
            origin=found.origin or (name, found),
        )

    def scalar(self, event: Any) -> Node:
        text: str = event.value
        plain = not event.style or event.tag == f"{_CORE}timestamp"
        value: Value = resolve(text) if plain else text
        tag = ""
        if event.tag and event.tag != "!":
            tag, value = self.tagged(event, text, value)
        mark = event.start_mark
        return Node(
            value, self.source, mark.line + 1, mark.column + 1, text=text, plain=plain, tag=tag
        )

    def tagged(self, event: Any, text: str, value: Value) -> tuple[str, Value]:
        name: str = event.tag
        if name in SPECIAL_TAGS:
            return name, value
        if not name.startswith(_CORE):
            return self.own_tag(event), value
        resolved = resolve(text)
        match name.removeprefix(_CORE):
            case "str" | "timestamp":
                return "", text
            case "merge" if text == "<<":  # as go-yaml writes it, and the tools built on that
                return "", text
            case "binary":
                return "", self.decoded(event, text)
            case "null" if resolved is None:
                return "", None
            case "bool" if isinstance(resolved, bool):
                return "", resolved
            case "int" if isinstance(resolved, int) and not isinstance(resolved, bool):
                return "", resolved
            case "float" if isinstance(resolved, int | float) and not isinstance(resolved, bool):
                return "", float(resolved)
        self.refuse_tag(event, text)
        raise AssertionError

    def decoded(self, event: Any, text: str) -> str:
        try:
            return b64decode("".join(text.split()), validate=True).decode()
        except ValueError:  # no base64, a letter beyond ASCII, or no UTF-8
            self.refuse(event, "the tag !!binary is not followed by text in base64")
            raise AssertionError from None

    def own_tag(self, event: Any) -> str:
        """A tag of the user's own is not used, as in Docker; one like !rest is a slip."""
        near = nearest(event.tag, SPECIAL_TAGS)
        if near:
            self.refuse(event, f"the tag {event.tag} is not known", f"did you mean {near}?")
        mark = event.start_mark
        self.report.warn(
            Mark(self.source, mark.line + 1, mark.column + 1), f"the tag {event.tag} is not used"
        )
        return ""

    def refuse_tag(self, event: Any, text: str = "") -> None:
        shown = event.tag.replace(_CORE, "!!")
        self.refuse(
            event,
            f"the tag {shown} does not fit {text!r}" if text else f"the tag {shown} is not known",
            "known are !!str, !!int, !!float, !!bool, !!null, !!binary, !!timestamp, !reset and "
            "!override",
        )

    def collection_tag(self, event: Any, own: str) -> str:
        if not event.tag or event.tag in ("!", _CORE + own, _CORE + _SAME_AS.get(own, own)):
            return ""
        if event.tag in SPECIAL_TAGS:
            return str(event.tag)
        if event.tag.startswith(_CORE):
            self.refuse_tag(event)
        return self.own_tag(event)

    def sequence(self, event: Any) -> Node:
        tag = self.collection_tag(event, "seq")
        items: list[Node] = []
        size, height = 1, 0
        while not isinstance(inner := self.parser.get_event(), yaml.SequenceEndEvent):
            item = self.node(inner)
            items.append(item)
            size += item.size
            height = max(height, item.height)
        mark = event.start_mark
        return Node(
            items,
            self.source,
            mark.line + 1,
            mark.column + 1,
            tag=tag,
            size=size,
            height=height + 1,
        )

    def mapping(self, event: Any) -> Node:
        tag = self.collection_tag(event, "map")
        values: dict[str, Node] = {}
        keys: dict[str, tuple[Source, int, int]] = {}
        merges: list[Node] = []
        size, height = 1, 0
        source, get = self.source, self.parser.get_event
        while not isinstance(inner := get(), yaml.MappingEndEvent):
            key_mark = inner.start_mark
            place = (source, key_mark.line + 1, key_mark.column + 1)
            key = self.node(inner)
            value = self.node(get())
            size += value.size + 1
            height = max(height, value.height)
            if key.text == "<<" and key.plain and "<<" not in keys:
                keys["<<"] = place
                merges = self.merged(value)
                continue
            name = self.key_name(key, place)
            if name is None:
                continue
            if name in keys:
                self.report.error(
                    Mark(*place),
                    f'the key "{name}" stands here a second time; the first is in line '
                    f"{keys[name][1]}",
                    "remove one of them, or join their contents",
                )
                continue
            keys[name] = place
            values[name] = value
        for base in merges:
            assert isinstance(base.value, dict)
            for name, value in base.value.items():
                if name not in values:
                    values[name] = value
                    if base.keys is not None and name in base.keys:
                        keys[name] = base.keys[name]
        keys.pop("<<", None)
        mark = event.start_mark
        return Node(
            values,
            source,
            mark.line + 1,
            mark.column + 1,
            tag=tag,
            keys=keys,
            size=size,
            height=height + 1,
        )

    def key_name(self, key: Node, place: tuple[Source, int, int]) -> str | None:
        if isinstance(key.value, str):
            return key.value
        if isinstance(key.value, list | dict):
            self.report.error(
                Mark(*place),
                "a key must be a string, not a collection",
                "if this is a ${variable}, or text with braces, put it in quotes",
            )
        else:
            self.report.error(
                Mark(*place),
                f"the key {key.text or 'null'} must be a string",
                f'write "{key.text}" in quotes' if key.text else "write a name before the colon",
            )
        return None

    def merged(self, value: Node) -> list[Node]:
        """The mappings that a merge key brings in, first wins."""
        given = value.value if isinstance(value.value, list) else [value]
        for each in given:
            if not isinstance(each.value, dict):
                self.report.error(
                    each.mark,
                    "a merge key (<<) takes a mapping or a list of mappings",
                    "write an alias to a mapping, such as <<: *defaults",
                )
        return [each for each in given if isinstance(each.value, dict)]
