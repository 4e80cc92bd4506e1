"""`--format`: Docker's functions, and what its documentation shows. The engine is the leaf's."""

from __future__ import annotations

from typing import Any

import pytest

from cli.template import Template
from swarm.errors import Invalid
from swarm.gotemplate import Record

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
        ("{{json .}}", {"a": "<&>ü"}, '{"a":"<&>ü"}'),
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
    ],
)
def test_templates_give_what_docker_gives(template: str, value: Any, expected: str) -> None:
    assert Template(template).render(value) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{.Nmae}}", "^--format: line 1, column 3: .*did you mean 'Name'"),
        ("{{uper .Name}}", "did you mean 'upper'"),
        ("{{upper}}", "upper: needs 1 value"),
        ("{{join 1}}", "join: does not take a number"),
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
