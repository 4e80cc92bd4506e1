"""From nodes to text. Source: Go's text/template, its exec.

Evaluation is bounded: work is counted in steps (a node, a round of a range, a word of a call, some
text that a function reads or makes), and depth and size have their limits. Reaching
one is an error with the place in the template where it happened.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swarm.errors import Invalid
from swarm.gotemplate import parser
from swarm.gotemplate.functions import BUILTINS
from swarm.gotemplate.parser import (
    Body,
    Branch,
    Chain,
    Command,
    Function,
    Jump,
    Literal,
    Node,
    Pipeline,
    Range,
    Text,
    Use,
    Variable,
    spell,
)
from swarm.gotemplate.values import (
    Fault,
    Missing,
    Record,
    UnknownField,
    kind_of,
    no_value,
    pairs,
    show,
    truth,
    unknown_field,
)

# Text that counts as one more step, for the slowest functions take some µs for it.
_STEP_CHARS = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What one template may do. `output_chars` bounds the text and each value made on the way."""

    output_chars: int
    steps: int
    depth: int = 100  # blocks, parentheses and templates in each other while it is evaluated


# For templates that a person gives to their own command.
DEFAULT_LIMITS = Limits(output_chars=64 << 20, steps=20_000_000)


class TemplateError(Invalid):
    """A template that is none, or does not fit the values. `line` and `column` count from 1."""

    def __init__(self, problem: str, *, name: str, line: int, column: int) -> None:
        super().__init__(f"{name}: line {line}, column {column}: {problem}")
        self.problem = problem
        self.line = line
        self.column = column
        self.unknown_field = False


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class Template:
    """A parsed template; may be rendered any number of times, from any thread.

    `name` begins each error. `functions` are all that it may call. `missing` says what a key is
    that a plain object does not have; it may raise Fault. Raises TemplateError.
    """

    def __init__(
        self,
        text: str,
        *,
        name: str = "template",
        functions: Mapping[str, Callable[..., Any]] = BUILTINS,
        missing: Callable[[Mapping[str, Any], str], Any] = no_value,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._text = text
        self._name = name
        self._functions = functions
        self._missing = missing
        self._limits = limits
        # Of the functions that were called so far; finding it out takes longer than most calls.
        self._arities: dict[str, tuple[int, float]] = {}
        try:
            self._parsed = parser.parse(text, functions, tokens_max=limits.steps)
        except Fault as fault:
            raise self._error(fault, len(text)) from None

    def render(self, dot: Any) -> str:
        """The text for one value. Raises TemplateError with the field or function that does not
        fit, or with the limit that was reached.
        """
        run = _Run(
            self._parsed.defined,
            self._functions,
            self._arities,
            self._missing,
            self._limits,
            dot,
        )
        try:
            run.nodes(self._parsed.body, dot)
        except Fault as fault:
            raise self._error(fault, run.at) from None
        except RecursionError:  # the caller's own stack is deep
            raise self._error(Fault("it is nested too deep"), run.at) from None
        return "".join(run.out)

    def _error(self, fault: Fault, at: int) -> TemplateError:
        at = fault.at if fault.at is not None else at
        before = self._text[:at]
        error = TemplateError(
            fault.message,
            name=self._name,
            line=before.count("\n") + 1,
            column=at - (before.rfind("\n") + 1) + 1,
        )
        error.unknown_field = isinstance(fault, UnknownField)
        return error


class _Run:
    """One rendering. `at` is the offset of what is being evaluated."""

    def __init__(
        self,
        defined: Mapping[str, Body],
        functions: Mapping[str, Callable[..., Any]],
        arities: dict[str, tuple[int, float]],
        missing: Callable[[Mapping[str, Any], str], Any],
        limits: Limits,
        dot: Any,
    ) -> None:
        self._defined = defined
        self._functions = functions
        self._arities = arities
        self._missing = missing
        self._limits = limits
        self._steps = 0
        self._depth = 0
        self._chars = 0
        self._variables: list[tuple[str, list[Any]]] = [("$", [dot])]
        self.out: list[str] = []
        self.at = 0

    # -------------------------------------------------------------- limits

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > self._limits.steps:
            raise Fault(
                f"it takes more than {self._limits.steps} steps; make its loops shorter", self.at
            )

    def _emit(self, text: str) -> None:
        self._chars += len(text)
        if self._chars > self._limits.output_chars:
            raise Fault(f"its text is longer than {self._limits.output_chars} characters", self.at)
        self.out.append(text)

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > self._limits.depth:
            raise Fault(f"it goes more than {self._limits.depth} levels deep", self.at)

    def _weigh(self, value: Any) -> None:
        size = len(value) if isinstance(value, (str, list, tuple, Mapping)) else 0
        if size > self._limits.output_chars:
            raise Fault(f"a value is longer than {self._limits.output_chars} characters", self.at)
        self._spend(1 + size // _STEP_CHARS)

    # -------------------------------------------------------------- nodes

    def nodes(self, nodes: Body, dot: Any) -> None:
        for node in nodes:
            self._spend(1)
            match node:
                case Text(text):
                    self._emit(text)
                case Pipeline():
                    value = self._pipeline(node, dot)
                    if not node.declare:
                        self._emit(show(value))
                case Branch():
                    self._branch(node, dot)
                case Range():
                    self._range(node, dot)
                case Use():
                    self._use(node, dot)
                case Jump("break"):
                    raise _Break
                case Jump():
                    raise _Continue

    def _branch(self, branch: Branch, dot: Any) -> None:
        mark = len(self._variables)
        self._deeper()
        for pipeline, body in branch.arms:
            value = self._pipeline(pipeline, dot)
            if truth(value):
                self.nodes(body, value if branch.kind == "with" else dot)
                break
        else:
            self.nodes(branch.otherwise, dot)
        self._depth -= 1
        del self._variables[mark:]

    def _range(self, loop: Range, dot: Any) -> None:
        mark, depth = len(self._variables), self._depth
        self._deeper()
        pipeline = loop.pipeline
        value = self._pipeline(pipeline, dot, store=False)
        if not pipeline.assign:
            self._variables.extend((name, [None]) for name in pipeline.declare)
        inner, any_item = len(self._variables), False
        for key, item in pairs(value):
            any_item = True
            self._spend(1)
            if pipeline.declare:
                if len(pipeline.declare) > 1:
                    self._set(pipeline.declare[0], key)
                self._set(pipeline.declare[-1], item)
            try:
                self.nodes(loop.body, item)
            except _Break:
                break
            except _Continue:
                pass
            finally:
                del self._variables[inner:]
                self._depth = depth + 1
        if not any_item:
            self.nodes(loop.otherwise, dot)
        self._depth = depth
        del self._variables[mark:]

    def _use(self, use: Use, dot: Any) -> None:
        body = self._defined.get(use.name)
        if body is None:
            known = ", ".join(sorted(self._defined)) or "none"
            raise Fault(f"there is no template {use.name!r} (defined: {known})", use.at)
        self.at = use.at
        inner = None if use.pipeline is None else self._pipeline(use.pipeline, dot)
        outer, self._variables = self._variables, [("$", [inner])]
        self._deeper()
        self.nodes(body, inner)
        self._depth -= 1
        self._variables = outer

    # -------------------------------------------------------------- values

    def _pipeline(self, pipeline: Pipeline, dot: Any, *, store: bool = True) -> Any:
        """The pipeline's value; its variables are set unless a range does that."""
        piped: tuple[Any, ...] = ()
        for command in pipeline.commands:
            piped = (self._command(command, dot, piped),)
        if store:
            for name in pipeline.declare:
                if pipeline.assign:
                    self._set(name, piped[0])
                else:
                    self._variables.append((name, [piped[0]]))
        return piped[0]

    def _set(self, name: str, value: Any) -> None:
        self._cell(name)[0] = value

    def _cell(self, name: str) -> list[Any]:
        cell: list[Any]
        for known, cell in reversed(self._variables):
            if known == name:
                return cell
        # The parser has seen its declaration, in a place that was not evaluated.
        raise Fault(f"the variable {name} is not defined", self.at)

    def _command(self, command: Command, dot: Any, piped: tuple[Any, ...]) -> Any:
        head = command.head
        self.at = command.at
        self._spend(1 + len(command.arguments))
        if isinstance(head, Function):
            if head.name in ("and", "or"):
                return self._first(command, dot, piped)
            values = self._values(command.arguments, dot)
            return self._call(head.name, self._functions[head.name], (*values, *piped), command.at)
        value = self._value(head, dot, called=True)
        if callable(value):
            values = self._values(command.arguments, dot)
            return self._call(spell(head), value, (*values, *piped), command.at)
        if command.arguments or piped:
            raise Fault(f"{spell(head)} takes no arguments", command.at)
        return value

    def _first(self, command: Command, dot: Any, piped: tuple[Any, ...]) -> Any:
        """`and` and `or`, which evaluate no more than they need."""
        assert isinstance(command.head, Function)
        wanted = command.head.name == "or"
        value: Any = None
        if not command.arguments and not piped:
            raise Fault(f"{command.head.name}: needs a value", command.at)
        for argument in command.arguments:
            value = self._value(argument, dot)
            if truth(value) is wanted:
                return value
        return piped[0] if piped else value

    def _values(self, nodes: tuple[Node, ...], dot: Any) -> list[Any]:
        values = []
        for node in nodes:
            values.append(self._value(node, dot))
        return values

    def _call(
        self, name: str, function: Callable[..., Any], values: tuple[Any, ...], at: int
    ) -> Any:
        self.at = at
        for value in values:
            self._weigh(value)
        if self._functions.get(name) is function:
            arity = self._arities.get(name) or _arity(function)
            self._arities[name] = arity
        else:
            arity = _arity(function)
        _check_count(name, arity, len(values))
        try:
            result = function(*values)
        except Fault as fault:
            begins = fault.message.startswith(f"{name}: ")
            message = fault.message if begins else f"{name}: {fault.message}"
            raise Fault(message, fault.at if fault.at is not None else at) from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            given = ", ".join(map(kind_of, values)) or "nothing"
            raise Fault(f"{name}: does not take {given}", at) from None
        self._weigh(result)
        return result

    def _value(self, node: Node, dot: Any, *, called: bool = False) -> Any:
        match node:
            case Literal(value):
                return value
            case Variable(name):
                return self._cell(name)[0]
            case Function(name):
                return self._call(name, self._functions[name], (), node.at)
            case Pipeline():
                self._deeper()
                value = self._pipeline(node, dot)
                self._depth -= 1
                return value
            case Chain(base, names):
                value = dot if base is None else self._value(base, dot)
                for name in names:
                    self.at = node.at
                    value = self._field(value, name)
                if callable(value) and not called:
                    return self._call(spell(node), value, (), node.at)
                return value
        raise Fault(f"{spell(node)} is not a value", self.at)

    def _field(self, value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            if name in value:
                return value[name]
            if isinstance(value, Record):
                raise unknown_field(name, value)
            return self._missing(value, name)
        if isinstance(value, Missing) or value is None:
            return Missing("")
        raise Fault(f"{kind_of(value)} is not an object, it has no field {name!r}")


def _arity(function: Callable[..., Any]) -> tuple[int, float]:
    """How few and how many values a function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, and says nothing of itself
        return 0, math.inf
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in named)
    return least, math.inf if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(named)


def _check_count(name: str, arity: tuple[int, float], count: int) -> None:
    """Go tells of a wrong number of arguments before the call."""
    least, most = arity
    if least <= count <= most:
        return
    wanted = str(least) if least == most else f"{least} to {most}"
    wanted = f"at least {least}" if most == math.inf else wanted
    raise Fault(f"{name}: needs {wanted} values, {count} given")
