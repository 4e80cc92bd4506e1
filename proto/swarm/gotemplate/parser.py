"""From tokens to nodes, by recursive descent. Source: Go's text/template/parse.

What can be known without values is an error here already: unknown functions, undefined variables,
`break` outside of a range.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from swarm.gotemplate import lexer
from swarm.gotemplate.lexer import Token
from swarm.gotemplate.values import Fault

# Parentheses and blocks in each other; each costs some frames of Python's stack.
NESTING_MAX = 64


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Literal:
    value: Any
    at: int
    spelt: str


@dataclass(frozen=True, slots=True)
class Chain:
    """`base.A.B`; base None is the dot."""

    base: Node | None
    names: tuple[str, ...]
    at: int


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    at: int


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    at: int


@dataclass(frozen=True, slots=True)
class Command:
    """A value or function with its arguments."""

    head: Node
    arguments: tuple[Node, ...]
    at: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    declare: tuple[str, ...]
    assign: bool
    commands: tuple[Command, ...]
    at: int


@dataclass(frozen=True, slots=True)
class Branch:
    """if or with: the first arm whose pipeline is true, or `otherwise`."""

    kind: str
    arms: tuple[tuple[Pipeline, tuple[Node, ...]], ...]
    otherwise: tuple[Node, ...]
    at: int


@dataclass(frozen=True, slots=True)
class Range:
    pipeline: Pipeline
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]
    at: int


@dataclass(frozen=True, slots=True)
class Jump:
    kind: str
    at: int


@dataclass(frozen=True, slots=True)
class Use:
    """`template` and `block`: another template in this place."""

    name: str
    pipeline: Pipeline | None
    at: int


Node = (
    Text | Literal | Chain | Variable | Function | Command | Pipeline | Branch | Range | Jump | Use
)
Body = tuple[Node, ...]

_CONSTANTS = {"true": True, "false": False, "nil": None}
_ENDS = ("end", "else")


@dataclass(frozen=True, slots=True)
class Parsed:
    """A template and those that it defines."""

    body: Body
    defined: dict[str, Body]


def parse(text: str, functions: Collection[str], *, tokens_max: int) -> Parsed:
    """Raises Fault with an offset."""
    return _Parser(text, functions, tokens_max).parse()


class _Parser:
    def __init__(self, text: str, functions: Collection[str], tokens_max: int) -> None:
        self._functions = functions
        self._tokens: list[Token] = []
        for token in lexer.tokens(text):
            if len(self._tokens) >= tokens_max:
                raise Fault(f"a template has at most {tokens_max} words", token.at)
            self._tokens.append(token)
        self._tokens.append(Token("close", "", len(text)))  # never reached inside of an action
        self._index = 0
        self._variables = ["$"]
        self._ranges = 0
        self._nesting = 0
        self._defined: dict[str, Body] = {}

    def parse(self) -> Parsed:
        body, end = self._body(top=True)
        if end is not None:
            raise Fault(f"{{{{{end.text}}}}} without a block that it could belong to", end.at)
        return Parsed(body, self._defined)

    # -------------------------------------------------------------- blocks

    def _body(self, *, top: bool = False) -> tuple[Body, Token | None]:
        """Nodes up to `end` or `else`, which is taken and given back."""
        nodes: list[Node] = []
        while self._index < len(self._tokens) - 1:
            token = self._take()
            if token.kind == "text":
                nodes.append(Text(token.text))
                continue
            word = self._peek()
            if word.kind == "word" and word.text in _ENDS:
                return tuple(nodes), self._take()
            if word.kind == "word" and word.text == "define":
                if not top:
                    raise Fault("{{define}} stands inside of a block; move it out of it", word.at)
                self._define()
            else:
                nodes.append(self._action(word, token.at))
        return tuple(nodes), None

    def _action(self, word: Token, at: int) -> Node:
        if word.kind == "word":
            match word.text:
                case "if" | "with":
                    self._index += 1
                    return self._branch(word)
                case "range":
                    self._index += 1
                    return self._range(word)
                case "template" | "block":
                    self._index += 1
                    return self._use(word)
                case "break" | "continue" if self._tokens[self._index + 1].kind == "close":
                    if not self._ranges:
                        raise Fault(f"{{{{{word.text}}}}} stands outside of a range", word.at)
                    self._index += 2
                    return Jump(word.text, word.at)
        pipeline = self._pipeline("command")
        self._close()
        return pipeline

    def _branch(self, word: Token) -> Branch:
        mark = len(self._variables)
        self._deeper(word.at)
        arm, end = self._arm(word)
        arms = [arm]
        otherwise: Body = ()
        while end is not None and end.text == "else":
            follower = self._peek()
            if follower.kind == "word" and follower.text == word.text:
                self._index += 1
                arm, end = self._arm(word)
                arms.append(arm)
                continue
            self._close_else(follower)
            otherwise, end = self._body()
            break
        self._finish(word, end)
        del self._variables[mark:]
        return Branch(word.text, tuple(arms), otherwise, word.at)

    def _arm(self, word: Token) -> tuple[tuple[Pipeline, Body], Token | None]:
        """A condition with its body, and the word that ended it."""
        pipeline = self._pipeline(word.text)
        self._close()
        mark = len(self._variables)
        body, end = self._body()
        del self._variables[mark:]
        return (pipeline, body), end

    def _range(self, word: Token) -> Range:
        mark = len(self._variables)
        self._deeper(word.at)
        pipeline = self._pipeline("range")
        self._close()
        self._ranges += 1
        inner = len(self._variables)
        body, end = self._body()
        del self._variables[inner:]
        self._ranges -= 1
        otherwise: Body = ()
        if end is not None and end.text == "else":
            self._close_else(self._peek())
            otherwise, end = self._body()
        self._finish(word, end)
        del self._variables[mark:]
        return Range(pipeline, body, otherwise, word.at)

    def _close_else(self, token: Token) -> None:
        if token.kind != "close":
            raise Fault(f"{token.text!r} is out of place after else", token.at)
        self._index += 1

    def _finish(self, word: Token, end: Token | None) -> None:
        """After a block's body: it ended with `end`."""
        if end is None:
            raise Fault(f"a {{{{{word.text}}}}} is not closed with {{{{end}}}}", word.at)
        if end.text != "end":
            raise Fault(f"a second {{{{else}}}} for one {{{{{word.text}}}}}", end.at)
        self._close()
        self._nesting -= 1

    def _deeper(self, at: int) -> None:
        self._nesting += 1
        if self._nesting > NESTING_MAX:
            raise Fault(f"blocks and parentheses are nested more than {NESTING_MAX} deep", at)

    # -------------------------------------------------------------- templates in templates

    def _define(self) -> None:
        word = self._take()
        name = self._name(word)
        self._close()
        self._define_as(name, word)

    def _define_as(self, name: str, word: Token) -> None:
        outer, self._variables = self._variables, ["$"]
        ranges, self._ranges = self._ranges, 0
        self._deeper(word.at)
        body, end = self._body()
        self._finish(word, end)
        self._variables, self._ranges = outer, ranges
        # As in Go: an empty definition does not take the place of another one.
        if name not in self._defined or any(_says_something(node) for node in body):
            self._defined[name] = body

    def _use(self, word: Token) -> Use:
        name = self._name(word)
        pipeline = None
        if word.text == "block" or self._peek().kind != "close":
            pipeline = self._pipeline(word.text)
        self._close()
        if word.text == "block":
            self._define_as(name, word)
        return Use(name, pipeline, word.at)

    def _name(self, word: Token) -> str:
        token = self._take()
        if token.kind != "string":
            raise Fault(f'{{{{{word.text}}}}} needs a name in quotes, as in "name"', token.at)
        return lexer.unquote(token)

    # -------------------------------------------------------------- pipelines

    def _pipeline(self, context: str) -> Pipeline:
        at = self._peek().at
        declare, assign = self._declarations(context)
        commands = [self._command()]
        while self._at_sign("|"):
            bar = self._take()
            if self._peek().kind == "close":
                raise Fault('a value is missing after "|"', bar.at)
            commands.append(self._command())
        for later in commands[1:]:
            if isinstance(later.head, Literal) or (
                isinstance(later.head, Chain) and later.head.base is None and not later.head.names
            ):
                raise Fault(f"{spell(later.head)} takes no arguments, not from a pipe", later.at)
        # A variable is known after its own pipeline.
        if not assign:
            self._variables.extend(declare)
        return Pipeline(declare, assign, tuple(commands), at)

    def _declarations(self, context: str) -> tuple[tuple[str, ...], bool]:
        """`$x :=`, `$x =`, and in a range `$i, $x :=`."""
        mark, names = self._index, list[Token]()
        while self._peek().kind == "variable":
            names.append(self._take())
            if self._at_sign(",") and context == "range" and len(names) < 2:
                self._index += 1
                continue
            if self._at_sign(":=") or self._at_sign("="):
                assign = self._take().text == "="
                if assign:
                    for name in names:
                        self._check_variable(name)
                return tuple(name.text for name in names), assign
            break
        self._index = mark
        return (), False

    def _command(self) -> Command:
        at = self._peek().at
        operands: list[Node] = []
        while True:
            token = self._peek()
            if token.kind == "close" or (token.kind == "sign" and token.text in ("|", ")")):
                break
            if operands and not token.apart:
                raise Fault(f"{token.text!r} is out of place; is a space missing?", token.at)
            operands.append(self._operand())
        if not operands:
            raise Fault("a value is missing", at)
        head = operands[0]
        if isinstance(head, Literal) and head.value is None:
            raise Fault("nil is not a command", at)
        return Command(head, tuple(operands[1:]), at)

    def _operand(self) -> Node:
        token = self._take()
        node: Node
        match token.kind:
            case "string":
                node = Literal(lexer.unquote(token), token.at, token.text)
            case "char":
                node = Literal(lexer.rune(token), token.at, token.text)
            case "number":
                node = Literal(lexer.number(token), token.at, token.text)
            case "dot":
                node = Chain(None, (), token.at)
            case "field":
                return Chain(None, self._names((token.text[1:],)), token.at)
            case "variable":
                self._check_variable(token)
                node = Variable(token.text, token.at)
            case "word" if token.text in _CONSTANTS:
                node = Literal(_CONSTANTS[token.text], token.at, token.text)
            case "word":
                self._check_function(token)
                node = Function(token.text, token.at)
            case "sign" if token.text == "(":
                node = self._parenthesis(token)
            case _:
                raise Fault(f"{token.text!r} is out of place", token.at)
        names = self._names(())
        if not names:
            return node
        if isinstance(node, Literal) or (isinstance(node, Chain) and node.base is None):
            raise Fault(f".{names[0]} after {spell(node)} is out of place", token.at)
        return Chain(node, names, token.at)

    def _parenthesis(self, opening: Token) -> Pipeline:
        self._deeper(opening.at)
        pipeline = self._pipeline("parenthesis")
        if not self._at_sign(")"):
            raise Fault('"(" is not closed', opening.at)
        self._index += 1
        self._nesting -= 1
        return pipeline

    def _names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        while (token := self._peek()).kind == "field" and not token.apart:
            names = (*names, token.text[1:])
            self._index += 1
        return names

    def _check_variable(self, token: Token) -> None:
        if token.text not in self._variables:
            raise Fault(f"the variable {token.text} is not defined", token.at)

    def _check_function(self, token: Token) -> None:
        if token.text in self._functions:
            return
        near = difflib.get_close_matches(token.text, self._functions, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(sorted(self._functions))
        raise Fault(f"there is no function {token.text!r}{hint} (functions: {listed})", token.at)

    # -------------------------------------------------------------- tokens

    def _peek(self) -> Token:
        return self._tokens[self._index]

    def _take(self) -> Token:
        token = self._tokens[self._index]
        self._index += 1
        return token

    def _at_sign(self, text: str) -> bool:
        token = self._peek()
        return token.kind == "sign" and token.text == text

    def _close(self) -> None:
        token = self._take()
        if token.kind != "close":
            raise Fault(f"{token.text!r} is out of place", token.at)


def _says_something(node: Node) -> bool:
    return not isinstance(node, Text) or bool(node.text.strip())


def spell(node: Node) -> str:
    """A node as it was written, for error messages."""
    match node:
        case Chain(None, names):
            return "." + ".".join(names)
        case Chain(Variable(name), names):
            return ".".join((name, *names))
        case Chain(_, names):
            return "." + ".".join(names)
        case Literal():
            return node.spelt
        case Variable() | Function():
            return node.name
    return "this"
