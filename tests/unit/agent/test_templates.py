import pytest

from agent.runtime.base import Rejected
from agent.templates import expand, in_use, values_of
from swarm.v1 import (
    Assignment,
    ConfigData,
    ConfigReference,
    ContainerSpec,
    Driver,
    Mount,
    Platform,
    Task,
    VolumeOptions,
)

ASSIGNMENT = Assignment(
    task=Task(id="t1", service_id="s1", node_id="n1", slot=3),
    service_name="web",
    service_labels={"tier": "front", "com.example.zone": "a"},
    name="web.3.t1",
)
VALUES = values_of(ASSIGNMENT, hostname="h1", platform=Platform(architecture="x86_64", os="linux"))


def env(text, values=VALUES):
    (line,) = expand(ContainerSpec(env=(f"A={text}",)), values).env
    return line.removeprefix("A=")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("{{.Node.Hostname}}", "h1"),
        ("{{ .Service.Name }}-{{.Task.Slot}}", "web-3"),
        ("{{.Service.ID}}/{{.Task.ID}}/{{.Task.Name}}/{{.Node.ID}}", "s1/t1/web.3.t1/n1"),
        ("{{.Node.Platform.OS}}/{{.Node.Platform.Architecture}}", "linux/x86_64"),
        ("{{.Service.Labels.tier}}", "front"),
        ('{{index .Service.Labels "com.example.zone"}}', "a"),
        ('{{index .Service.Labels "none"}}', ""),
        ("}} {not one}", "}} {not one}"),
        (
            "{{range $k, $v := .Service.Labels}}{{$k}}={{$v}},{{end}}",
            "com.example.zone=a,tier=front,",
        ),
        ('{{if eq .Task.Slot "3"}}third{{end}}', "third"),
        ("{{with .Node}}{{.Hostname}}{{end}}", "h1"),
        ('{{printf "%03s" .Task.Slot}}', "003"),
        ('{{join "-" .Service.Name .Task.Slot}}', "web-3"),
        ("{{.Node.Platform}}", "{x86_64 linux}"),
    ],
)
def test_placeholders_are_filled_in(text, expected):
    assert env(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{.Task.Nope}}", "column 3: there is no field 'Nope' .fields here: ID, Name, Slot"),
        ("{{.Task.slot}}", "did you mean 'Slot'"),
        ("{{.Service.Labels.none}}", "no label 'none'.*index .Service.Labels"),
        ("{{.Service.Labels.com-x}}", "is read with index"),
        ("{{if .Task}}x", "not closed with {{end}}"),
        ('{{secret "x"}}', "there is no function 'secret'"),
        ("{{.Task.Slot", "not closed"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_line_and_column(text, reason):
    with pytest.raises(Rejected, match=f"^environment A: line 1, .*{reason}"):
        env(text)


def test_in_a_global_service_the_node_is_the_slot():
    task = Task(id="t1", service_id="s1", node_id="n1")
    values = values_of(Assignment(task=task), hostname="h", platform=Platform())
    assert env("{{.Task.Slot}}", values) == "n1"


def test_only_the_value_of_a_variable_is_a_template():
    container = ContainerSpec(env=("{{.Nope}}=x", "{{.Nope}}"))
    assert expand(container, VALUES) == container


def test_a_mounts_error_names_target_and_part():
    mount = Mount(target="/d", volume_options=VolumeOptions(labels={"l": "{{.Nope}}"}))
    with pytest.raises(Rejected, match="^mount /d: volume label l: line 1, column 3: "):
        expand(ContainerSpec(mounts=(mount,)), VALUES)


def test_templates_in_use_are_seen_wherever_they_may_be():
    assert not in_use(ContainerSpec(env=("A=b",), args=("{{.Task.Slot}}",)), {}, {})
    assert in_use(ContainerSpec(hostname="{{.Task.Slot}}"), {}, {})
    reference = ContainerSpec(configs=(ConfigReference(config_id="c"),))
    plain = ConfigData(id="c", data=b"{{")
    assert not in_use(reference, {}, {"c": plain})
    templated = ConfigData(id="c", templating=Driver(name="golang"))
    assert in_use(reference, {}, {"c": templated})


def test_hostname_environment_and_mounts_are_expanded_and_nothing_else():
    container = ContainerSpec(
        hostname="{{.Task.Slot}}",
        env=("A={{.Task.Slot}}", "B"),
        args=("{{.Task.Slot}}",),
        mounts=(
            Mount(
                type="volume",
                source="data-{{.Task.Slot}}",
                target="/d/{{.Node.ID}}",
                volume_options=VolumeOptions(
                    labels={"slot": "{{.Task.Slot}}"},
                    driver_config=Driver(name="local", options={"o": "{{.Task.Slot}}"}),
                ),
            ),
        ),
    )
    out = expand(container, VALUES)
    assert (out.hostname, out.env, out.args) == ("3", ("A=3", "B"), ("{{.Task.Slot}}",))
    (mount,) = out.mounts
    assert (mount.source, mount.target) == ("data-3", "/d/n1")
    assert mount.volume_options is not None
    assert mount.volume_options.driver_config is not None
    assert mount.volume_options.labels == {"slot": "3"}
    assert mount.volume_options.driver_config.options == {"o": "3"}
