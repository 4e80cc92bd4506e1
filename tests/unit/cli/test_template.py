"""The template engine, against Go's text/template documentation and what Docker's documentation
shows.
"""

from __future__ import annotations

from typing import Any

import pytest

from cli.template import Template
from cli.template_values import Record
from swarm.errors import Invalid

NODE = {
    "Description": {"Hostname": "n1", "Engine": {"EngineVersion": "26.1"}},
    "Spec": {"Role": "manager", "Labels": {"zone": "a", "com.example.disk": "ssd"}},
    "Status": {"State": "ready", "Addr": "10.0.0.1"},
    "ManagerStatus": {"Leader": True, "Addr": "10.0.0.1:2377"},
}


@pytest.mark.parametrize(
    ("template", "value", "expected"),
    [
        # Docker's page "Format command and log output"
        ('{{join .Args " , "}}', {"Args": ["a", "b"]}, "a , b"),
        (
            "{{json .Mounts}}",
            {"Mounts": [{"Type": "bind", "RW": True}]},
            '[{"Type":"bind","RW":true}]',
        ),
        ("{{lower .Name}}", {"Name": "WEB"}, "web"),
        ('{{split .Image ":"}}', {"Image": "redis:7"}, "[redis 7]"),
        ("{{title .Name}}", {"Name": "a web server"}, "A Web Server"),
        ("{{upper .Name}}", {"Name": "web"}, "WEB"),
        ("{{pad .Field 5 10}}", {"Field": "x"}, "     x          "),
        ("{{truncate .Field 15}}", {"Field": "0123456789abcdefgh"}, "0123456789abcde"),
        ("{{println .Field}}", {"Field": "x"}, "x\n"),
        ("{{range .N}}{{println .P}}{{end}}", {"N": [{"P": 1}, {"P": 2}]}, "1\n2\n"),
        # node inspect, as its page shows
        ("{{ .ManagerStatus.Leader }}", NODE, "true"),
        ("{{.Spec.Role}}/{{.Status.State}}", NODE, "manager/ready"),
        ('{{index .Spec.Labels "com.example.disk"}}', NODE, "ssd"),
        (
            "{{range $k, $v := .Spec.Labels}}{{$k}}={{$v}} {{end}}",
            NODE,
            "com.example.disk=ssd zone=a ",
        ),
        ("{{.Spec.Labels.zone}}", NODE, "a"),
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
        ("{{.}}", {"b": [1, True], "a": None}, "map[a:<no value> b:[1 true]]"),
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
        ("{{json .}}", {"a": "<&>ü"}, '{"a":"<&>ü"}'),
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
        ("{{uper .Name}}", "did you mean 'upper'"),
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
        ('{{define "x"}}{{end}}', "is not offered"),
        ("{{break}}", "outside of a range"),
        ("{{index .List 7}}", "out of range"),
        ("{{lt .Name 1}}", "lt: "),
        ("{{.Name 1}}", "takes no arguments"),
        ("{{upper}}", "upper: "),
        ("{{range .Name}}{{end}}", "range needs a list"),
        ('{{printf "%y" 1}}', "%y is not offered"),
        ("{{/* open", "comment is not closed"),
    ],
)
def test_a_wrong_template_says_what_is_wrong(template: str, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        Template(template).render(Record(Name="web", List=[1]))


def test_methods_of_a_row_take_arguments() -> None:
    row = Record(Label={"zone": "a"}.get)
    assert Template('{{.Label "zone"}}').render(row) == "a"
    assert Template('{{if .Label "other"}}x{{else}}y{{end}}').render(row) == "y"


def test_an_absent_field_that_objects_have_is_empty_and_a_slip_is_an_error() -> None:
    known = frozenset({"Spec", "UpdateStatus", "State"})
    assert Template("<{{.UpdateStatus.State}}>", known=known).render({"Spec": {}}) == "<>"
    assert Template("{{if .UpdateStatus}}x{{else}}y{{end}}", known=known).render({}) == "y"
    with pytest.raises(Invalid, match="did you mean 'UpdateStatus'"):
        Template("{{.UpdateStauts}}", known=known).render({"Spec": {}})


def test_a_label_that_is_not_there_is_no_value() -> None:
    assert (
        Template("{{.Labels.zone}}", known=frozenset({"Labels"})).render({"Labels": {}})
        == "<no value>"
    )
