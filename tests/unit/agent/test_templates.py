import pytest

from agent.runtime.base import Rejected
from agent.templates import Names, expand
from swarm.v1 import Assignment, ContainerSpec, Driver, Mount, Platform, Task, VolumeOptions

ASSIGNMENT = Assignment(
    task=Task(id="t1", service_id="s1", node_id="n1", slot=3),
    service_name="web",
    service_labels={"tier": "front", "com.example.zone": "a"},
    name="web.3.t1",
)
NAMES = Names.of(ASSIGNMENT, hostname="h1", platform=Platform(architecture="x86_64", os="linux"))


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
    ],
)
def test_placeholders_are_filled_in(text, expected):
    assert NAMES.expand(text, "env A") == expected


@pytest.mark.parametrize(
    "text", ["{{.Task.Nope}}", "{{.Service.Labels.none}}", "{{if .Task}}x{{end}}"]
)
def test_what_is_not_known_is_refused_by_name_and_place(text):
    with pytest.raises(Rejected, match=r"env A: the placeholder .* write one of .*Task\.Slot"):
        NAMES.expand(text, "env A")


def test_in_a_global_service_the_node_is_the_slot():
    task = Task(id="t1", service_id="s1", node_id="n1")
    names = Names.of(Assignment(task=task), hostname="h", platform=Platform())
    assert names.expand("{{.Task.Slot}}", "env") == "n1"


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
    out = expand(container, NAMES)
    assert (out.hostname, out.env, out.args) == ("3", ("A=3", "B"), ("{{.Task.Slot}}",))
    (mount,) = out.mounts
    assert (mount.source, mount.target) == ("data-3", "/d/n1")
    assert mount.volume_options is not None
    assert mount.volume_options.driver_config is not None
    assert mount.volume_options.labels == {"slot": "3"}
    assert mount.volume_options.driver_config.options == {"o": "3"}
