"""YAML as Docker reads it."""

from __future__ import annotations

import math

import pytest

from cli.compose.at import go_float
from cli.compose.merge import plain
from cli.compose.problems import ComposeError, Report, Source
from cli.compose.scalars import resolve
from cli.compose.tree import Node, parse


def tree(text: str) -> Node:
    report = Report()
    node = parse(Source("t.yml", text), report)
    report.check()
    assert node is not None
    return node


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("nUll", "nUll"),
        ("0", 0),
        ("42", 42),
        ("-7", -7),
        ("+7", 7),
        ("0777", 511),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b101", 5),
        ("1_000", 1000),
        ("08", 8.0),
        ("12:30", "12:30"),
        ("12:30:45", "12:30:45"),
        ("22:22", "22:22"),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        ("1e", "1e"),
        ("-", "-"),
        ("+", "+"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("2024-01-31", "2024-01-31"),
        ("18446744073709551615", 2**64 - 1),
        ("-9223372036854775808", -(2**63)),
        ("100000000000000000000000", 1e23),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("0x", "0x"),
        ("_1", "_1"),
    ],
)
def test_plain_scalars_are_typed_as_yaml_v3_types_them(text: str, value: object) -> None:
    found = resolve(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (1.5, "1.5"),
        (1e6, "1e+06"),
        (123456.0, "123456"),
        (1234567.0, "1.234567e+06"),
        (1e-7, "1e-07"),
        (0.0001, "0.0001"),
        (0.00001, "1e-05"),
        (1e22, "1e+22"),
        (-2.5, "-2.5"),
        (0.0, "0"),
        (-0.0, "-0"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
    ],
)
def test_floats_are_written_as_go_writes_them(value: float, text: str) -> None:
    assert go_float(value) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: '1'", {"a": "1"}),
        ('a: "true"', {"a": "true"}),
        ("a: !!str 5", {"a": "5"}),
        ('a: !!int "5"', {"a": 5}),
        ("a: !!float 5", {"a": 5.0}),
        ('a: !!bool "true"', {"a": True}),
        ("a: ! 5", {"a": 5}),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ("a: >-\n  x\n  y\n", {"a": "x y"}),
        ("{a: [1, {b: c}], d: }", {"a": [1, {"b": "c"}], "d": None}),
        ("? a\n: b", {"a": "b"}),
        ("yes: 1\non: 2", {"yes": 1, "on": 2}),
        ("a: &x {k: v}\nb: *x", {"a": {"k": "v"}, "b": {"k": "v"}}),
        ("a: &x 1\nb: &x 2\nc: *x", {"a": 1, "b": 2, "c": 2}),
        ("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}", {"a": {"k": 1, "l": 2}, "b": {"k": 3, "l": 2}}),
        (
            "a: &x {k: 1}\nb: &y {k: 2, m: 3}\nc:\n  <<: [*x, *y]",
            {"a": {"k": 1}, "b": {"k": 2, "m": 3}, "c": {"k": 1, "m": 3}},
        ),
        ("a: {'<<': 1}", {"a": {"<<": 1}}),
        ("--- \na: 1\n...\n", {"a": 1}),
        ("%YAML 1.1\n---\na: 1\n", {"a": 1}),
    ],
)
def test_documents(text: str, value: object) -> None:
    assert plain(tree(text)) == value


def test_positions_of_keys_and_values_survive() -> None:
    node = tree("a:\n  - b\n  -   c: d\n")
    assert isinstance(node.value, dict)
    items = node.value["a"].value
    assert isinstance(items, list)
    assert (items[0].line, items[0].column) == (2, 5)
    assert isinstance(items[1].value, dict)
    assert items[1].key_mark("c")[1:] == (3, 7)
    assert items[1].value["c"].mark[1:] == (3, 10)


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("a: 1\na: 2\n", 2, 1, "a second time; the first is in line 1"),
        ("a: {b: 1, b: 2}\n", 1, 11, "a second time"),
        ("<<: {a: 1}\n<<: {b: 1}\n", 2, 1, "a second time"),
        ("1: a\n", 1, 1, "the key 1 must be a string"),
        ("true: a\n", 1, 1, "the key true must be a string"),
        ("? [a]\n: b\n", 1, 3, "a key must be a string, not a collection"),
        ("a: *nope\n", 1, 4, "the alias *nope has no anchor"),
        ("a: &x [*x]\n", 1, 8, "contains itself"),
        ("a: 1\n---\nb: 2\n", 2, 1, "a second document"),
        ("a: !!foo 1\n", 1, 4, "the tag !!foo"),
        ("a: !secret 1\n", 1, 4, "the tag !secret"),
        ("a: !!int x\n", 1, 4, "the tag !!int does not fit 'x'"),
        ("<<: 1\n", 1, 5, "a merge key (<<) takes a mapping"),
        ("a:\n\tb: 1\n", 2, 1, "not valid YAML"),
        ("a: b: c\n", 1, 5, "mapping values are not allowed"),
        ('a: "x\n', 2, 1, "not valid YAML"),
        ("a: [1, 2\n", 2, 1, "not valid YAML"),
        ("a: 1\n b: 2\n", 2, 3, "not valid YAML"),
        ("a: @x\n", 1, 4, "cannot start any token"),
        ("a: \x01\n", 1, 4, "is not allowed in YAML"),
        ("[" * 200, 1, 101, "nested deeper than 100"),
    ],
)
def test_what_is_no_document_is_reported_in_its_place(
    text: str, line: int, column: int, message: str
) -> None:
    with pytest.raises(ComposeError) as caught:
        tree(text)
    problem = caught.value.problems[0]
    assert (problem.line, problem.column) == (line, column)
    assert message in problem.message
    assert problem.file == "t.yml"


def test_a_small_file_cannot_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(
        ComposeError, match="the aliases up to here stand for more than 200000 values"
    ):
        tree("\n".join(lines))
