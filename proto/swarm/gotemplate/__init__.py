"""Go templates: text/template of Go, for `--format` and for what tasks' specs and configs say.

Parses and evaluates the whole language: fields, methods with arguments, variables, pipelines, `if`,
`with`, `range`, `break`, `continue`, `define`, `template`, `block`, comments, trim markers, and
Go's own functions. Source: Go's text/template and fmt documentation; tests compare with the
docker CLI, which uses Go's engine. What a template can reach is what the caller hands in: values,
and functions by name.

Invariants: an error names line and column and holds no value of the data, for the data may be
secret; what a template may do is bounded (`Limits`), for templates come from users and are
evaluated on managers and nodes.

Departures from Go: numbers with and without a fraction may be compared; a field of an absent value
is empty where Go stops at a nil pointer; a record's unknown field names the nearest one. Complex
numbers are not offered.

Parts: lexer (text to tokens), parser (tokens to nodes), execution (nodes to text), values (how they
print, what is true), formatting (printf), functions.
"""

from swarm.gotemplate.execution import DEFAULT_LIMITS, Limits, Template, TemplateError
from swarm.gotemplate.functions import BUILTINS
from swarm.gotemplate.values import (
    Fault,
    Missing,
    Record,
    Struct,
    UnknownField,
    no_value,
    show,
    truth,
    unknown_field,
)

__all__ = [
    "BUILTINS",
    "DEFAULT_LIMITS",
    "Fault",
    "Limits",
    "Missing",
    "Record",
    "Struct",
    "Template",
    "TemplateError",
    "UnknownField",
    "no_value",
    "show",
    "truth",
    "unknown_field",
]
