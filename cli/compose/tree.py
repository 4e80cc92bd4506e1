"""YAML with positions, read as Docker reads it.

libyaml's parser gives events; the composer here makes Nodes from them. Scalars are typed by the
rules of gopkg.in/yaml.v3, which the docker CLI uses: `yes` and `12:30` are strings, `0777` is
octal, `1_000` is a number. Mapping keys are strings, duplicates are refused, merge keys (`<<`) are
applied, and one document is one file. Aliases share the node of their anchor; a document that
expands to more than NODES_MAX nodes is refused, so that a small file cannot fill the memory.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml._yaml import CParser

from cli.compose.problems import Mark, Report, Source

NODES_MAX = 1_000_000  # nodes after aliases are expanded
DEPTH_MAX = 100  # nested collections
BYTES_MAX = 32 * 1024 * 1024
SPECIAL_TAGS = ("!reset", "!override")
# Not in any file: the value could not be filled in, which is reported already.
FAILED_TAG = "!failed"
# Nor this: the text holds variables that were left as they are.
LITERAL_TAG = "!literal"
SILENT_TAGS = (FAILED_TAG, LITERAL_TAG)  # such a value is not told to be wrong
_CORE = "tag:yaml.org,2002:"
_FIXED: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INT = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|(0|[1-9][0-9]*))")
_MAYBE_NUMBER = frozenset("+-.0123456789")

Value = None | bool | int | float | str | list["Node"] | dict[str, "Node"]


class Node:
    """A value and where it stands. `text` is a scalar as written; `plain` means without quotes.
    `keys` tells where the keys of a mapping stand.
    """

    __slots__ = ("column", "keys", "line", "plain", "size", "source", "tag", "text", "value")

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


def resolve(text: str) -> bool | int | float | str | None:
    """The value of a plain scalar, as gopkg.in/yaml.v3 decodes it into an `any`."""
    if text in _FIXED:
        return _FIXED[text]
    if text[0] not in _MAYBE_NUMBER:
        return text
    digits = text.replace("_", "")
    match = _INT.fullmatch(digits)
    if match is not None:
        sign, hexadecimal, binary, octal, decimal = match.groups()
        for written, base in ((hexadecimal, 16), (binary, 2), (octal, 8), (decimal, 10)):
            if written is not None:
                if len(written) > 64:  # no 64-bit number is that long
                    break
                value = int(written, base)
                if value < 2**64 and not (sign == "-" and value > 2**63):
                    return -value if sign == "-" else value
    if _FLOAT.fullmatch(digits):
        return float(digits)
    return text


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
        report.error(Mark(source, line, column), *_explain(source, error, line))
    except yaml.reader.ReaderError as error:
        report.error(
            _mark_of_offset(source, error.position),
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

    def document(self) -> Node | None:
        get = self.parser.get_event
        get()  # stream start
        if isinstance(get(), yaml.StreamEndEvent):
            return None
        root = self.node(get())
        get()  # document end
        event = get()
        if not isinstance(event, yaml.StreamEndEvent):
            self.refuse(
                event,
                "a second document begins here, and only one is read",
                "put it into a file of its own and name both with -c",
            )
        return root

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
            if node.size > NODES_MAX:
                self.refuse(event, f"aliases expand this to more than {NODES_MAX} values")
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
        return found

    def scalar(self, event: Any) -> Node:
        text: str = event.value
        plain = event.style is None or event.style == ""
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
        resolved = resolve(text)
        match name.removeprefix(_CORE):
            case "str":
                return "", text
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

    def refuse_tag(self, event: Any, text: str = "") -> None:
        shown = event.tag.replace(_CORE, "!!")
        self.refuse(
            event,
            f"the tag {shown} does not fit {text!r}" if text else f"the tag {shown} is not known",
            "known are !!str, !!int, !!float, !!bool, !!null, !reset and !override",
        )

    def collection_tag(self, event: Any, own: str) -> str:
        if not event.tag or event.tag in ("!", _CORE + own):
            return ""
        if event.tag not in SPECIAL_TAGS:
            self.refuse_tag(event)
        return str(event.tag)

    def sequence(self, event: Any) -> Node:
        tag = self.collection_tag(event, "seq")
        items: list[Node] = []
        size = 1
        while not isinstance(inner := self.parser.get_event(), yaml.SequenceEndEvent):
            item = self.node(inner)
            items.append(item)
            size += item.size
        mark = event.start_mark
        return Node(items, self.source, mark.line + 1, mark.column + 1, tag=tag, size=size)

    def mapping(self, event: Any) -> Node:
        tag = self.collection_tag(event, "map")
        values: dict[str, Node] = {}
        keys: dict[str, tuple[Source, int, int]] = {}
        merges: list[Node] = []
        size = 1
        source, get = self.source, self.parser.get_event
        while not isinstance(inner := get(), yaml.MappingEndEvent):
            key_mark = inner.start_mark
            place = (source, key_mark.line + 1, key_mark.column + 1)
            key = self.node(inner)
            value = self.node(get())
            size += value.size + 1
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
        return Node(values, source, mark.line + 1, mark.column + 1, tag=tag, keys=keys, size=size)

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


def _mark_of_offset(source: Source, offset: int) -> Mark:
    before = source.text[: max(offset, 0)]
    line = before.count("\n") + 1
    return Mark(source, line, offset - (before.rfind("\n") + 1) + 1)


def _explain(source: Source, error: yaml.MarkedYAMLError, line: int) -> tuple[str, str]:
    """libyaml's words, and what most often is behind them."""
    problem = error.problem or "not valid YAML"
    text = source.line(line)
    before = source.line(line - 1)
    context = ""
    if error.context:
        context = f" {error.context}"
        if error.context_mark is not None and error.context_mark.line + 1 != line:
            context += f" that began in line {error.context_mark.line + 1}"
    hint = "check the indentation of this line and the one above, and put odd text in quotes"
    if "\t" in text[: len(text) - len(text.lstrip())]:
        hint = "the line begins with a tab; indent with spaces"
    elif "\t" in text and "token" in problem:
        hint = "there is a tab here; use spaces"
    elif "cannot start any token" in problem:
        hint = "put text that begins with @, `, %, or another special character in quotes"
    elif "mapping values are not allowed" in problem:
        hint = (
            'put text that contains ": " in quotes'
            if text.count(": ") > 1
            else "check the indentation: a key below a value cannot have a value of its own"
        )
    elif "did not find expected key" in problem or "block end" in problem:
        hint = "this line does not line up with its neighbours; check the indentation"
    elif "could not find expected ':'" in problem:
        hint = f"a key needs a colon and a space after it; the line above is: {before.strip()}"
    elif "quoted scalar" in context:
        hint = "a closing quote is missing"
    elif "flow" in context:
        hint = "a closing bracket or a comma is missing"
    return f"not valid YAML: {problem}{context}", hint
