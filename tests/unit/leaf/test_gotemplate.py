"""The template engine, against Go's text/template documentation. A test beside (integration/leaf) compares it with Go's
own engine.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import Invalid
from swarm.gotemplate import (
    BUILTINS,
    Fault,
    Limits,
    Record,
    Struct,
    Template,
    TemplateError,
)

SMALL = Limits(output_chars=10_000, steps=20_000)


@pytest.mark.parametrize(
    ("template", "value", "expected"),
    [
        # text/template
        ('{{"output"}}', {}, "output"),
        ('{{printf "%q" "output"}}', {}, '"output"'),
        ('{{"output" | printf "%q"}}', {}, '"output"'),
        ('{{printf "%q" (print "out" "put")}}', {}, '"output"'),
        ('{{"put" | printf "%s%s" "out" | printf "%q"}}', {}, '"output"'),
        ('{{with "output"}}{{printf "%q" .}}{{end}}', {}, '"output"'),
        ('{{with $x := "output" | printf "%q"}}{{$x}}{{end}}', {}, '"output"'),
        ('{{with $x := "output"}}{{$x | printf "%q"}}{{end}}', {}, '"output"'),
        ("{{23 -}} < {{- 45}}", {}, "23<45"),
        ("a {{- /* a comment */ -}} b", {}, "ab"),
        ("a{{/* a comment with }} in it */}}b", {}, "ab"),
        ("{{if .A}}T1{{else if .B}}T2{{else}}T0{{end}}", {"A": "", "B": 1}, "T2"),
        ("{{if .A}}T1{{else if .B}}T2{{else}}T0{{end}}", {"A": [], "B": 0}, "T0"),
        ("{{with .A}}{{.}}{{else}}none{{end}}", {"A": None}, "none"),
        ("{{range .L}}{{.}}{{else}}empty{{end}}", {"L": []}, "empty"),
        ("{{range $i, $e := .L}}{{if $i}},{{end}}{{$e}}{{end}}", {"L": ["a", "b"]}, "a,b"),
        ("{{range .L}}{{if eq . 2}}{{break}}{{end}}{{.}}{{end}}", {"L": [1, 2, 3]}, "1"),
        ("{{range .L}}{{if eq . 2}}{{continue}}{{end}}{{.}}{{end}}", {"L": [1, 2, 3]}, "13"),
        ("{{$n := 1}}{{range .L}}{{$n = .}}{{end}}{{$n}}", {"L": [5, 6]}, "6"),
        ("{{range .L}}{{$.A}}{{.}}{{end}}", {"A": "x", "L": [1, 2]}, "x1x2"),
        ("{{.}}", {"b": [1, True], "a": None}, "map[a:<nil> b:[1 true]]"),
        ("{{if and .A (or .B (not .C))}}yes{{end}}", {"A": 1, "B": 0, "C": 0}, "yes"),
        ("{{eq .A 1 2 3}} {{ne .A 1}} {{lt .A 4}} {{ge .A 3}}", {"A": 3}, "true true true true"),
        ("{{len .L}} {{index .L 1}} {{slice .S 1 3}}", {"L": [1, 2], "S": "abcd"}, "2 2 bc"),
        (
            '{{printf "%-5s|%5d|%05.2f|%t|%v|%x|%%" "a" 7 1.5 true .L 255}}',
            {"L": [1]},
            "a    |    7|01.50|true|[1]|ff|%",
        ),
        ("{{(index .L 0).A}}", {"L": [{"A": "x"}]}, "x"),
        ("{{`a\\n`}}", {}, "a\\n"),
        ("{{'a'}}", {}, "97"),
        ('{{define "a"}}<{{.}}>{{end}}{{template "a" .x}}', {"x": 1}, "<1>"),
        ('{{block "a" .x}}<{{.}}>{{end}}', {"x": 1}, "<1>"),
        ("{{with .a}}1{{else with .x}}{{.}}{{end}}", {"x": 2}, "2"),
        ("{{range $i := 3}}{{$i}}{{end}}", {}, "012"),
        ("{{and false (index .none 7)}}", {"none": []}, "false"),
        ("{{.s}}", {"s": Struct(A=1, B={"k": "v"})}, "{1 map[k:v]}"),
        ('{{printf "%d-%s" 1 "a"}}{{printf "%y" 1}}', {}, "1-a%!y(int=1)"),
        (
            "{{html .x}} {{js .x}} {{urlquery .x}}",
            {"x": "<a>"},
            "&lt;a&gt; \\u003Ca\\u003E %3Ca%3E",
        ),
        ('{{"\\xff"}}', {}, "\udcff"),
        ("no action", {}, "no action"),
        ("", {}, ""),
    ],
)
def test_templates_give_what_go_gives(template: str, value: Any, expected: str) -> None:
    assert Template(template).render(value) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{.Nmae}}", "did you mean 'Name'"),
        ("{{.name}}", "did you mean 'Name'"),
        ("{{.Name.Deeper}}", "is not an object"),
        ("{{foo .Name}}", "there is no function 'foo'"),
        ("{{if .Name}}", "not closed with {{end}}"),
        ("{{.Name", "not closed"),
        ("{{end}}", "without a block"),
        ("{{else}}", "without a block"),
        ("{{}}", "a value is missing"),
        ("{{.Name | }}", "a value is missing"),
        ("{{(.Name}}", r'"\(" is not closed'),
        ("{{.Name)}}", "out of place"),
        ("{{$x}}", r"variable \$x is not defined"),
        ('{{"abc}}', "not closed"),
        ("{{#}}", "cannot be read"),
        ("{{break}}", "outside of a range"),
        ("{{index .List 7}}", "out of range"),
        ("{{lt .Name 1}}", "lt: "),
        ("{{.Name 1}}", "takes no arguments"),
        ("{{range .Name}}{{end}}", "range needs a list"),
        ("{{/* open", "comment is not closed"),
    ],
)
def test_a_wrong_template_says_what_is_wrong(template: str, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        Template(template).render(Record(Name="web", List=[1]))


@pytest.mark.parametrize(
    ("template", "line", "column"),
    [
        ("{{.Nope}}", 1, 3),
        ("a\n  {{ .Name.Deeper }}", 2, 6),
        ("a\nb\n{{if true}}\n{{nope}}{{end}}", 4, 3),
        ('{{printf "%s"\n  .Nope}}', 2, 3),
        ("x {{if true}}", 1, 5),
        ("x\ny {{", 2, 3),
        ('{{define "t"}}\n{{len 1}}{{end}}{{template "t"}}', 2, 3),
        ("{{print (len 1)}}", 1, 10),
    ],
)
def test_an_error_names_line_and_column(template: str, line: int, column: int) -> None:
    with pytest.raises(TemplateError) as caught:
        Template(template, name="config x").render(Record(Name="web"))
    assert (caught.value.line, caught.value.column) == (line, column)
    assert caught.value.message.startswith(f"config x: line {line}, column {column}: ")


def test_only_the_functions_that_were_handed_in_can_be_called() -> None:
    with pytest.raises(TemplateError, match="there is no function 'print'"):
        Template("{{print 1}}", functions={"len": BUILTINS["len"]})
    asked: list[str] = []
    Template('{{note "x"}}', functions={**BUILTINS, "note": asked.append}).render({})
    assert asked == ["x"]


def test_the_caller_says_what_a_missing_key_is() -> None:
    def missing(mapping: Mapping[str, Any], name: str) -> Any:
        raise Fault(f"no {name}")

    assert Template("{{.a}}").render({}) == "<no value>"
    with pytest.raises(TemplateError, match="column 3: no a"):
        Template("{{.a}}", missing=missing).render({})


@pytest.mark.parametrize(
    "template",
    [
        "{{.s.x}}",
        "{{index .s 99}}",
        "{{index .m .s}}{{len (index .s 0)}}",
        "{{lt .s 1}}",
        "{{eq .s 1}}",
        "{{range .s}}{{end}}",
        "{{slice .s 99}}",
        "{{call .s}}",
        "{{.s 1}}",
        "{{len .n}}",
        "{{printf .n}}",
        "{{own .s}}",
    ],
)
def test_an_error_never_holds_a_value_of_the_data(template: str) -> None:
    functions = {**BUILTINS, "own": lambda text: int(text)}
    with pytest.raises(TemplateError) as caught:
        Template(template, functions=functions).render({"s": "hush-7391", "n": 7391, "m": {}})
    assert "7391" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{range 1000000000000}}{{end}}", "steps"),
        ("{{range 1000}}{{range 1000}}{{end}}{{end}}", "steps"),
        ("{{range 20000}}xx{{end}}", "longer"),
        ('{{$x := "ab"}}{{range 100}}{{$x = print $x $x}}{{end}}', "longer than 10000"),
        ('{{define "a"}}{{template "a"}}{{end}}{{template "a"}}', "levels deep"),
        ('{{printf "%99999d" 1}}', "longer"),
        ('{{printf "%999999999d" 1}}', "width"),
        (
            '{{range 99}}{{$y := printf "%9999d" 1}}{{print $y $y $y $y $y $y $y $y}}{{end}}',
            "longer",
        ),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "nested"),
        ("{{if 1}}" * 500 + "{{end}}" * 500, "nested"),
        ("{{1}}" * 10_000, "at most 20000 words"),
        ("{{" + "9" * 5000 + "}}", "is (not a number|too large)"),
    ],
)
def test_templates_are_bounded_in_time_size_and_depth(template: str, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError, match=reason):
        Template(template, limits=SMALL).render({})
    assert time.monotonic() - started < 2


def test_nesting_within_the_limit_does_not_use_up_the_stack() -> None:
    nested = "{{if true}}" * 30 + "{{" + "(" * 30 + "1" + ")" * 30 + "}}" + "{{end}}" * 30
    endless = '{{define "a"}}{{with 1}}{{template "a"}}{{end}}{{end}}{{template "a"}}'

    def below(levels: int) -> None:
        if levels:
            below(levels - 1)
            return
        assert Template(nested).render({}) == "1"
        with pytest.raises(TemplateError, match="more than 100 levels deep"):
            Template(endless).render({})

    below(300)


@given(st.text(alphabet="{}-/*. \n\"`'$|():=,aifendrg1x", max_size=60))
def test_any_text_is_rendered_or_refused_with_a_position(text: str) -> None:
    found = None
    try:
        Template(text, limits=SMALL).render({"a": "b", "x": [1]})
    except TemplateError as error:
        found = error
    if found is not None:
        assert 1 <= found.line <= text.count("\n") + 1
        assert 1 <= found.column <= len(text) + 1


_WORDS = st.sampled_from(
    [
        "{{",
        "}}",
        "{{- ",
        " -}}",
        "if ",
        "range ",
        "end",
        "else",
        "with ",
        ".a",
        "$x",
        ":= ",
        "1 ",
        '"s" ',
        "| ",
        "print ",
        "(",
        ")",
        "{{end}}",
        "{{else}}",
        "{{range .x}}",
        "define ",
        "template ",
        "block ",
        "break",
        "len ",
    ]
)


@given(st.lists(_WORDS, max_size=25).map("".join))
def test_any_row_of_words_is_rendered_or_refused(text: str) -> None:
    with contextlib.suppress(TemplateError):
        Template(text, limits=SMALL).render({"a": "b", "x": [1]})


@given(st.text())
def test_text_without_braces_stays_as_it_is(text: str) -> None:
    if "{{" not in text:
        assert Template(text).render({}) == text
