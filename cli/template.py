"""Go templates, the part that `--format` uses.

Parses and evaluates text/template: fields, methods with arguments, variables, pipelines, `if`,
`range`, `with`, comments, trim markers, comparisons, and Docker's functions (json, join, split,
lower, upper, title, pad, truncate, println). Source: Go's text/template documentation and Docker's
"Format command and log output" page. Not offered: `define`, `template`, `block` (an error says so).

A field that does not exist is an error that names the nearest one, where the fields are known: in
rows of lists always (`Record`), in inspected objects for names that no object has (`known`).
Where Go would stop at a field of a nil pointer, an absent value prints as nothing.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cli.template_values import Missing, Record, call, fail, pairs, show, truth

__all__ = ["Template"]

# ------------------------------------------------------------------ the parsed form


@dataclass(frozen=True, slots=True)
class _Text:
    text: str


@dataclass(frozen=True, slots=True)
class _Literal:
    value: Any


@dataclass(frozen=True, slots=True)
class _Chain:
    """`base.A.B`; base None is the dot."""

    base: _Node | None
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Variable:
    name: str


@dataclass(frozen=True, slots=True)
class _Function:
    name: str


@dataclass(frozen=True, slots=True)
class _Command:
    """A value or function with its arguments."""

    head: _Node
    arguments: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Pipeline:
    declare: tuple[str, ...]
    assign: bool
    commands: tuple[_Command, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    """if, range or with; `otherwise` follows `else`."""

    kind: str
    pipeline: _Pipeline
    body: tuple[_Node, ...]
    otherwise: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Jump:
    kind: str


_Node = _Text | _Literal | _Chain | _Variable | _Function | _Command | _Pipeline | _Block | _Jump


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class Template:
    """A parsed template. Raises Invalid where the text is none."""

    def __init__(self, text: str, *, known: frozenset[str] = frozenset()) -> None:
        self._text = text
        self._known = known
        parser = _Parser(text)
        self._nodes = parser.parse()

    def render(self, dot: Any) -> str:
        """The text for one value. Raises Invalid with the field or function that does not fit."""
        out: list[str] = []
        _Run(self._known, out).nodes(self._nodes, dot, {"$": dot})
        return "".join(out)


# ------------------------------------------------------------------ lexer and parser

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)
    | (?P<char>'(?:\\.|[^'\\])')
    | (?P<number>[-+]?\d+(?:\.\d+)?)
    | (?P<variable>\$[A-Za-z0-9_]*)
    | (?P<field>\.[A-Za-z_][A-Za-z0-9_]*)
    | (?P<dot>\.)
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<sign>:=|=|\||\(|\)|,)
    )""",
    re.VERBOSE,
)
_TRIM_LEFT = re.compile(r"\{\{-(?=\s)")
_TRIM_RIGHT = re.compile(r"(?<=\s)-\}\}")
_CONSTANTS = {"true": True, "false": False, "nil": None}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    # Whether white space stands before it: `.A .B` are two values, `.A.B` is one.
    apart: bool


def _segments(text: str) -> Iterator[tuple[bool, str]]:
    """The template as (is an action, text); white space at trim markers already gone."""
    position, trim = 0, False
    while True:
        start = text.find("{{", position)
        piece = text[position:] if start < 0 else text[position:start]
        if trim:
            piece = piece.lstrip()
        if start < 0:
            yield False, piece
            return
        if _TRIM_LEFT.match(text, start):
            piece = piece.rstrip()
            start += 1
        yield False, piece
        end = _action_end(text, start + 2)
        inner = text[start + 2 : end]
        trim = _TRIM_RIGHT.match(text, end - 1) is not None and inner.endswith("-")
        yield True, inner[:-1] if trim else inner
        position = end + 2


def _action_end(text: str, position: int) -> int:
    """Where the closing braces stand, those in quotes and comments apart."""
    stripped = text[position:].lstrip()
    if stripped.startswith("/*"):
        close = text.find("*/", position)
        end = text.find("}}", close) if close >= 0 else -1
        if end < 0:
            raise fail('a comment is not closed with "*/}}"')
        return end
    quote = ""
    while position < len(text):
        letter = text[position]
        if quote:
            if letter == "\\" and quote != "`":
                position += 1
            elif letter == quote:
                quote = ""
        elif letter in "\"'`":
            quote = letter
        elif text.startswith("}}", position):
            return position
        position += 1
    raise fail('an action is not closed: "{{" without "}}"')


class _Parser:
    """Recursive descent over the segments."""

    def __init__(self, text: str) -> None:
        self._segments = list(_segments(text))
        self._position = 0
        self._tokens: list[_Token] = []
        self._index = 0

    def parse(self) -> tuple[_Node, ...]:
        nodes, end = self._nodes(inside="")
        if end:
            raise fail(f"{{{{{end}}}}} without a block that it could belong to")
        return nodes

    def _nodes(self, *, inside: str) -> tuple[tuple[_Node, ...], str]:
        """Nodes up to `end` or `else`; with the word that ended them."""
        nodes: list[_Node] = []
        while self._position < len(self._segments):
            action, text = self._segments[self._position]
            self._position += 1
            if not action:
                if text:
                    nodes.append(_Text(text))
                continue
            if text.strip().startswith("/*"):
                continue
            self._tokens, self._index = _tokens(text), 0
            word = self._tokens[0].text if self._tokens else ""
            if word in ("end", "else"):
                return tuple(nodes), " ".join(token.text for token in self._tokens[:2])
            nodes.append(self._action(word, inside))
        return tuple(nodes), ""

    def _action(self, word: str, inside: str) -> _Node:
        if word in ("if", "range", "with"):
            self._index = 1
            return self._block(word, inside)
        if word in ("define", "template", "block"):
            raise fail(f"{{{{{word}}}}} is not offered; write the template as one piece")
        if word in ("break", "continue"):
            if "range" not in inside:
                raise fail(f"{{{{{word}}}}} stands outside of a range")
            return _Jump(word)
        pipeline = self._pipeline()
        self._expect_end()
        return pipeline

    def _block(self, kind: str, inside: str) -> _Block:
        pipeline = self._pipeline()
        self._expect_end()
        within = f"{inside} {kind}"
        body, end = self._nodes(inside=within)
        otherwise: tuple[_Node, ...] = ()
        if end == "else":
            otherwise, end = self._nodes(inside=within)
        elif end.startswith("else ") and end.split()[1] in ("if", "with"):
            self._index = 2
            return _Block(kind, pipeline, body, (self._block(end.split()[1], inside),))
        if end != "end":
            raise fail(f"a {{{{{kind}}}}} is not closed with {{{{end}}}}")
        return _Block(kind, pipeline, body, otherwise)

    def _pipeline(self) -> _Pipeline:
        declare: list[str] = []
        assign = False
        mark = self._index
        while (token := self._peek()) and token.kind == "variable":
            declare.append(token.text)
            self._index += 1
            follower = self._peek()
            if follower and follower.text == ",":
                self._index += 1
                continue
            if follower and follower.text in (":=", "="):
                assign = follower.text == "="
                self._index += 1
                break
            declare.clear()
            break
        if not declare:
            self._index = mark
        commands = [self._command()]
        while (token := self._peek()) and token.text == "|" and token.kind == "sign":
            self._index += 1
            commands.append(self._command())
        return _Pipeline(tuple(declare), assign, tuple(commands))

    def _command(self) -> _Command:
        operands: list[_Node] = []
        while (token := self._peek()) and not (token.kind == "sign" and token.text in "|),"):
            operands.append(self._operand())
        if not operands:
            raise fail("a value is missing")
        return _Command(operands[0], tuple(operands[1:]))

    def _operand(self) -> _Node:
        token = self._tokens[self._index]
        self._index += 1
        node: _Node
        match token.kind:
            case "string":
                return _Literal(_unquote(token.text))
            case "char":
                return _Literal(ord(_unquote(f'"{token.text[1:-1]}"')))
            case "number":
                return _Literal(float(token.text) if "." in token.text else int(token.text))
            case "dot":
                return _Chain(None, ())
            case "field":
                return _Chain(None, self._names((token.text[1:],)))
            case "variable":
                names = self._names(())
                node = _Variable(token.text)
                return _Chain(node, names) if names else node
            case "word":
                if token.text in _CONSTANTS:
                    return _Literal(_CONSTANTS[token.text])
                return _Function(token.text)
        if token.text == "(":
            node = self._pipeline()
            closing = self._peek()
            if closing is None or closing.text != ")":
                raise fail('"(" is not closed')
            self._index += 1
            names = self._names(())
            return _Chain(node, names) if names else node
        raise fail(f"{token.text!r} is out of place")

    def _names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        while (token := self._peek()) and token.kind == "field" and not token.apart:
            names = (*names, token.text[1:])
            self._index += 1
        return names

    def _peek(self) -> _Token | None:
        return self._tokens[self._index] if self._index < len(self._tokens) else None

    def _expect_end(self) -> None:
        token = self._peek()
        if token is not None:
            raise fail(f"{token.text!r} is out of place")


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise fail(f"{text[position:].strip()!r} cannot be read in {{{{{text}}}}}")
        kind = match.lastgroup
        tokens.append(_Token(kind, match[kind], match.start(kind) > position or position == 0))
        position = match.end()
    return tokens


def _unquote(text: str) -> str:
    if text.startswith("`"):
        return text[1:-1]
    try:
        return str(json.loads(text))
    except ValueError:
        raise fail(f"{text} is not a string") from None


# ------------------------------------------------------------------ evaluation


class _Run:
    """One rendering."""

    def __init__(self, known: frozenset[str], out: list[str]) -> None:
        self._known = known
        self._out = out

    def nodes(self, nodes: Sequence[_Node], dot: Any, variables: dict[str, Any]) -> None:
        for node in nodes:
            match node:
                case _Text(text):
                    self._out.append(text)
                case _Block():
                    self._block(node, dot, variables)
                case _Jump("break"):
                    raise _Break
                case _Jump():
                    raise _Continue
                case _Pipeline():
                    value = self._pipeline(node, dot, variables)
                    if not node.declare:
                        self._out.append(show(value))
                case _:
                    self._out.append(show(self._value(node, dot, variables)))

    def _block(self, block: _Block, dot: Any, variables: dict[str, Any]) -> None:
        scope = _Scope(variables)
        if block.kind == "range":
            self._range(block, dot, scope)
            return
        value = self._pipeline(block.pipeline, dot, scope)
        if truth(value):
            self.nodes(block.body, value if block.kind == "with" else dot, scope)
        else:
            self.nodes(block.otherwise, dot, scope)

    def _range(self, block: _Block, dot: Any, scope: dict[str, Any]) -> None:
        pipeline = block.pipeline
        value = self._pipeline(_Pipeline((), False, pipeline.commands), dot, scope)
        items = list(pairs(value))
        for key, item in items:
            inner = _Scope(scope)
            if len(pipeline.declare) == 1:
                inner.declare(pipeline.declare[0], item)
            elif pipeline.declare:
                inner.declare(pipeline.declare[0], key)
                inner.declare(pipeline.declare[1], item)
            try:
                self.nodes(block.body, item, inner)
            except _Break:
                break
            except _Continue:
                continue
        if not items:
            self.nodes(block.otherwise, dot, scope)

    def _pipeline(self, pipeline: _Pipeline, dot: Any, variables: dict[str, Any]) -> Any:
        piped: tuple[Any, ...] = ()
        for command in pipeline.commands:
            piped = (self._command(command, dot, variables, piped),)
        for name in pipeline.declare:
            if isinstance(variables, _Scope) and not pipeline.assign:
                variables.declare(name, piped[0])
            else:
                variables[name] = piped[0]
        return piped[0]

    def _command(
        self, command: _Command, dot: Any, variables: dict[str, Any], piped: tuple[Any, ...]
    ) -> Any:
        head = command.head
        if isinstance(head, _Function):
            values = [self._value(node, dot, variables) for node in command.arguments]
            return call(head.name, [*values, *piped])
        value = self._value(head, dot, variables, called=True)
        if callable(value):
            arguments = [self._value(node, dot, variables) for node in command.arguments]
            try:
                return value(*arguments, *piped)
            except TypeError as error:
                raise fail(f"{_spell(head)}: {error}") from None
        if command.arguments or piped:
            raise fail(f"{_spell(head)} takes no arguments")
        return value

    def _value(
        self, node: _Node, dot: Any, variables: dict[str, Any], *, called: bool = False
    ) -> Any:
        match node:
            case _Literal(value):
                return value
            case _Variable(name):
                if name not in variables:
                    raise fail(f"the variable {name} is not defined")
                return variables[name]
            case _Function(name):
                return call(name, [])
            case _Pipeline():
                return self._pipeline(node, dot, _Scope(variables))
            case _Chain(base, names):
                value = dot if base is None else self._value(base, dot, variables)
                for name in names:
                    value = self._field(value, name)
                return value() if callable(value) and not called else value
        raise fail(f"{_spell(node)} is not a value")

    def _field(self, value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            if name in value:
                return value[name]
            if isinstance(value, Record):
                raise fail(_unknown(name, value))
            if name in self._known:
                return Missing("")
            # Keys that users choose (labels) may be absent; a name written like one of ours is a
            # slip.
            if self._known and name[:1].isupper():
                raise fail(_unknown(name, self._known, among=value))
            return Missing("<no value>")
        if isinstance(value, Missing) or value is None:
            return Missing("")
        raise fail(f"{show(value)!r} is not an object, it has no field {name!r}")


class _Scope(dict[str, Any]):
    """Variables of a block: an assignment reaches outward, a declaration does not."""

    def __init__(self, outer: dict[str, Any]) -> None:
        super().__init__(outer)
        self._outer = outer
        self._own: set[str] = set()

    def declare(self, name: str, value: Any) -> None:
        self._own.add(name)
        super().__setitem__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if name not in self._own and name in self._outer:
            self._outer[name] = value


def _unknown(name: str, names: Mapping[str, Any] | frozenset[str], *, among: Any = None) -> str:
    near = difflib.get_close_matches(name, names, 1) or [
        other for other in names if other.lower() == name.lower()
    ]
    text = f"there is no field {name!r}"
    if near:
        text += f"; did you mean {near[0]!r}?"
    fields = among if among is not None else names
    listed = ", ".join(sorted(fields))
    return f"{text} (fields here: {listed})" if listed else text


def _spell(node: _Node) -> str:
    match node:
        case _Chain(_, names):
            return "." + ".".join(names)
        case _Literal(value):
            return repr(value)
        case _Variable(name) | _Function(name):
            return name
    return "this"
