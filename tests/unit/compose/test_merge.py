"""Several files, extends and include."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cli.compose import ComposeError, load
from cli.compose.merge import merge, plain
from cli.compose.problems import Source
from cli.compose.tree import Node
from swarm.v1 import ServiceSpec
from tests.unit.compose.helpers import container, task


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def merged(folder: Path, *keys: str, top: str = "") -> ServiceSpec:
    """The service web of files that each give some of its keys."""
    names = []
    for index, text in enumerate(keys):
        name = folder / f"{index}.yml"
        image = "    image: busybox\n" if index == 0 else ""
        body = textwrap.indent(textwrap.dedent(text), "    ")
        name.write_text(f"services:\n  web:\n{image}{body}\n{textwrap.dedent(top)}")
        names.append(str(name))
    return load(names, stack="st", environment={}).spec.services[0]


def ports(spec: ServiceSpec) -> list[tuple[int, int, str]]:
    assert spec.endpoint is not None
    return [(p.published_port, p.target_port, p.protocol) for p in spec.endpoint.ports]


def test_scalars_and_maps_merge_by_key(tmp_path: Path) -> None:
    found = merged(
        tmp_path,
        "hostname: a\nenvironment: [A=1, B=1]\ndeploy: {replicas: 2, labels: {x: 1}}",
        "hostname: b\nenvironment: {B: 2, C: 2}\ndeploy: {replicas: 3, labels: [y=2]}",
    )
    assert container(found).hostname == "b"
    assert container(found).env == ("A=1", "B=2", "C=2")
    assert found.mode is not None
    assert found.mode.replicated is not None
    assert found.mode.replicated.replicas == 3
    assert {k: v for k, v in found.labels.items() if len(k) == 1} == {"x": "1", "y": "2"}


def test_ports_merge_by_what_they_publish(tmp_path: Path) -> None:
    found = merged(
        tmp_path, "ports: ['80:80', '53:53', '9000']", "ports: ['80:8080', '53:53/udp', '9000']"
    )
    assert ports(found) == [(0, 9000, "tcp"), (53, 53, "tcp"), (53, 53, "udp"), (80, 8080, "tcp")]


def test_volumes_merge_by_target(tmp_path: Path) -> None:
    found = merged(tmp_path, "volumes: ['/a:/x', '/b:/y']", "volumes: ['/c:/x:ro', /z]")
    assert [(m.source, m.target, m.read_only) for m in container(found).mounts] == [
        ("/c", "/x", True),
        ("/b", "/y", False),
        ("", "/z", False),
    ]


def test_secrets_merge_by_source(tmp_path: Path) -> None:
    found = merged(
        tmp_path,
        "secrets: [a, {source: b, target: old}]",
        "secrets: [{source: b, target: new}]",
        top="secrets: {a: {external: true}, b: {external: true}}",
    )
    names = [(s.secret_name, s.file.name if s.file else "") for s in container(found).secrets]
    assert names == [("a", "a"), ("b", "new")]


def test_commands_are_replaced(tmp_path: Path) -> None:
    found = container(
        merged(
            tmp_path,
            "command: [a, b]\nentrypoint: [c]\nhealthcheck: {test: [CMD, a], interval: 5s}",
            "command: d\nentrypoint: [e, f]\nhealthcheck: {test: b}",
        )
    )
    assert (found.args, found.command) == (("d",), ("e", "f"))
    assert found.healthcheck is not None
    assert found.healthcheck.test == ("CMD-SHELL", "b")
    assert found.healthcheck.interval_ns == 5_000_000_000


def test_lists_join_and_repeat_as_in_docker(tmp_path: Path) -> None:
    found = container(merged(tmp_path, "cap_add: [chown]\ndns: 1.1.1.1", "dns: [1.1.1.1, 8.8.8.8]"))
    assert found.capability_add == ("CAP_CHOWN",)
    assert found.dns is not None
    assert found.dns.nameservers == ("1.1.1.1", "1.1.1.1", "8.8.8.8")


def test_claims_of_devices_are_not_repeated(tmp_path: Path) -> None:
    claim = "deploy: {resources: {reservations: {%s}}}"
    for reserved in (
        "devices: [{capabilities: [gpu], count: 1}]",
        "generic_resources: [{discrete_resource_spec: {kind: fpga, value: 1}}]",
    ):
        found = task(merged(tmp_path, claim % reserved, claim % reserved)).resources
        assert found is not None and found.reservations is not None
        assert len(found.reservations.devices) + len(found.reservations.generic) == 1


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            "{file: ./a, labels: {x: 1}}",
            "{external: true}",
            {"external": True},
        ),
        ("{external: true, name: q}", "{file: ./a}", {"name": "q", "file": "./a"}),
        (
            "{file: ./a, labels: {x: 1}}",
            "{content: b, labels: {y: 2}}",
            {"content": "b", "labels": {"x": 1, "y": 2}},
        ),
        (
            "{file: ./a, labels: {x: 1}}",
            "{name: z}",
            {"file": "./a", "labels": {"x": 1}, "name": "z"},
        ),
        ("{external: true}", "{name: z}", {"external": True, "name": "z"}),
        ("{driver: a, driver_opts: {x: 1}}", "{external: true}", {"external": True}),
        (
            "{driver: a, driver_opts: {x: 1}}",
            "{driver_opts: {y: 2}}",
            {"driver": "a", "driver_opts": {"x": 1, "y": 2}},
        ),
    ],
)
def test_an_object_is_from_one_place(first: str, second: str, expected: dict[str, object]) -> None:
    found = merge(node(yaml.safe_load(first)), node(yaml.safe_load(second)), ("secrets", "*"))
    assert plain(found) == expected


def test_another_log_driver_takes_no_options_of_the_first(tmp_path: Path) -> None:
    first = "logging: {driver: json-file, options: {max-size: 1m}}"
    found = merged(tmp_path, first, "logging: {driver: syslog, options: {tag: x}}")
    driver = task(found).log_driver
    assert driver is not None
    assert (driver.name, driver.options) == ("syslog", {"tag": "x"})
    same = task(merged(tmp_path, first, "logging: {options: {max-file: 3}}")).log_driver
    assert same is not None
    assert same.options == {"max-size": "1m", "max-file": "3"}


def test_reset_removes_and_override_replaces(tmp_path: Path) -> None:
    found = merged(
        tmp_path,
        "ports: ['80:80']\nenvironment: {A: 1, B: 2}\ncap_add: [chown]\nhostname: x",
        "ports: !override ['81:81']\nenvironment: {A: !reset null}\ncap_add: !reset []\n"
        "hostname: !reset",
    )
    assert ports(found) == [(81, 81, "tcp")]
    assert container(found).env == ("B=2",)
    assert container(found).capability_add == ()
    assert container(found).hostname == ""


def test_a_service_may_be_removed(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.yml": "services: {a: {image: x}, b: {image: x}}",
            "b.yml": "services: {b: !reset null}",
        },
    )
    paths = [str(tmp_path / name) for name in ("a.yml", "b.yml")]
    found = load(paths, stack="st", environment={}).spec
    assert [s.name for s in found.services] == ["st_a"]


def test_relative_paths_start_from_the_first_files_folder(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "one/a.yml": "services: {web: {image: x}}",
            "two/b.yml": "services: {web: {volumes: ['./d:/d']}}",
        },
    )
    paths = [str(tmp_path / "one/a.yml"), str(tmp_path / "two/b.yml")]
    found = load(paths, stack="st", environment={}).spec.services[0]
    assert container(found).mounts[0].source == str(tmp_path / "one/d")
    found = load(
        paths, stack="st", environment={}, project_directory=tmp_path / "three"
    ).spec.services[0]
    assert container(found).mounts[0].source == str(tmp_path / "three/d")


def test_a_problem_of_the_second_file_stands_there(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.yml": "services:\n  web:\n    image: x\n",
            "b.yml": "services:\n  web:\n    deploy:\n      replicas: -1\n",
        },
    )
    paths = [str(tmp_path / name) for name in ("a.yml", "b.yml")]
    with pytest.raises(ComposeError) as caught:
        load(paths, stack="st", environment={})
    problem = caught.value.problems[0]
    assert (problem.file, problem.line, problem.column) == (paths[1], 4, 17)


def test_stdin_may_be_one_of_several(tmp_path: Path) -> None:
    write(tmp_path, {"a.yml": "services: {web: {image: x, hostname: a}}"})
    found = load(
        [str(tmp_path / "a.yml"), "-"],
        stack="st",
        environment={},
        stdin="services: {web: {hostname: b}}",
    )
    assert container(found.spec.services[0]).hostname == "b"


def test_extends_starts_from_another_service(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "common/base.yml": """
                services:
                  base:
                    image: base
                    environment: {A: 1, B: 1}
                    volumes: ['./data:/data']
                    extends: root
                  root: {image: root, stop_signal: SIGINT, env_file: vars.env}
                """,
            "common/vars.env": "V=1\n",
            "a.yml": """
                services:
                  web:
                    extends: {file: common/base.yml, service: base}
                    environment: {B: 2}
                  other:
                    extends: {service: web}
                    image: mine
                """,
        },
    )
    found = load([str(tmp_path / "a.yml")], stack="st", environment={}).spec.services
    web, other = container(found[0]), container(found[1])
    assert (web.image, web.stop_signal) == ("base:latest", "SIGINT")
    assert web.env == ("A=1", "B=2", "V=1")
    assert web.mounts[0].source == str(tmp_path / "common/data")
    assert (other.image, other.env) == ("mine:latest", web.env)


def test_include_adds_another_files_objects(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "db/compose.yml": """
                services: {db: {image: 'postgres:$PG', volumes: ['./init:/i']}}
                volumes: {data: }
                """,
            "db/.env": "PG=16\n",
            "db/patch.yml": "services: {db: {hostname: h}}",
            "a.yml": """
                include:
                  - db/compose.yml
                services: {web: {image: x, depends_on: [db]}}
                """,
            "b.yml": """
                include:
                  - path: [db/compose.yml, db/patch.yml]
                services: {web: {image: x}}
                """,
        },
    )
    found = load([str(tmp_path / "a.yml")], stack="st", environment={}).spec
    assert [s.name for s in found.services] == ["st_web", "st_db"]
    db = container(found.services[1])
    assert db.image == "postgres:16"
    assert db.mounts[0].source == str(tmp_path / "db/init")
    found = load([str(tmp_path / "b.yml")], stack="st", environment={}).spec
    assert container(found.services[1]).hostname == "h"


def test_include_does_not_merge(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.yml": "include: [b.yml]\nservices: {web: {image: x}}",
            "b.yml": "services: {web: {image: y}}",
        },
    )
    with pytest.raises(ComposeError, match=r"services\.web is declared here and in .*b\.yml:1:17"):
        load([str(tmp_path / "a.yml")], stack="st", environment={})


def test_files_that_include_each_other_are_refused(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.yml": "include: [b.yml]\nservices: {web: {image: x}}",
            "b.yml": "include: [{path: [a.yml]}]\nservices: {db: {image: x}}",
        },
    )
    with pytest.raises(ComposeError, match=r"in a circle: a\.yml -> b\.yml -> a\.yml"):
        load([str(tmp_path / "a.yml")], stack="st", environment={})


@pytest.mark.parametrize(
    ("over", "env"),
    [
        ("env_file: !reset []", ("OWN=1",)),
        ("env_file: !override [b.env]", ("FROM_B=3", "OWN=1")),
        ("env_file: [b.env]", ("FROM_A=2", "FROM_B=3", "OWN=1")),
        ("environment: !reset {}", ()),
        ("environment: {FROM_A: !reset null}", ("OWN=1",)),
    ],
)
def test_variables_of_files_go_with_their_file(
    tmp_path: Path, over: str, env: tuple[str, ...]
) -> None:
    write(
        tmp_path,
        {
            "a.env": "FROM_A=2",
            "b.env": "FROM_B=3",
            "a.yml": "services: {web: {image: x, env_file: [a.env], environment: {OWN: 1}}}",
            "b.yml": f"services: {{web: {{{over}}}}}",
        },
    )
    paths = [str(tmp_path / name) for name in ("a.yml", "b.yml")]
    found = load(paths, stack="st", environment={}).spec.services[0]
    assert container(found).env == env


def test_labels_of_files_go_with_their_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "l": "a=1",
            "a.yml": "services: {web: {image: x, label_file: l, labels: {b: 2}}}",
            "b.yml": "services: {web: {label_file: !reset null}}",
        },
    )
    paths = [str(tmp_path / name) for name in ("a.yml", "b.yml")]
    found = load(paths, stack="st", environment={}).spec.services[0]
    assert sorted(container(found).labels) == ["b", "com.docker.stack.namespace"]


def test_what_was_reset_is_not_merged_into_again(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.yml": "services: {web: {image: x, ports: ['80:80'], environment: {A: 1}}}",
            "b.yml": "services: {web: {ports: !reset ['90:90'], environment: !reset {B: 1}}}",
            "c.yml": "services: {web: {ports: ['70:70'], environment: {C: 1}}}",
        },
    )
    paths = [str(tmp_path / name) for name in ("a.yml", "b.yml", "c.yml")]
    found = load(paths, stack="st", environment={}).spec.services[0]
    assert found.endpoint is not None
    assert [port.published_port for port in found.endpoint.ports] == [70]
    assert container(found).env == ("C=1",)


@pytest.mark.parametrize(
    ("base", "over", "left"),
    [
        ("[a, b]", "null", ["a", "b"]),
        ("null", "[a]", ["a"]),
        ("[a]", "[b]", ["b"]),
        ("[a]", "!reset null", []),
    ],
)
def test_nothing_over_a_list_changes_nothing(
    tmp_path: Path, base: str, over: str, left: list[str]
) -> None:
    keys = "command" if (base, over) == ("[a]", "[b]") else "dns_search"
    write(
        tmp_path,
        {
            "a.yml": f"services: {{web: {{image: x, {keys}: {base}}}}}",
            "b.yml": f"services: {{web: {{{keys}: {over}}}}}",
        },
    )
    paths = [str(tmp_path / name) for name in ("a.yml", "b.yml")]
    found = container(load(paths, stack="st", environment={}).spec.services[0])
    names = found.args if keys == "command" else found.dns.search if found.dns else ()
    assert list(names) == left


# ------------------------------------------------------------------ properties

SOURCE = Source("t.yml", "")


def node(value: object) -> Node:
    if isinstance(value, dict):
        return Node({k: node(v) for k, v in value.items()}, SOURCE, 1, 1)
    if isinstance(value, list):
        return Node([node(v) for v in value], SOURCE, 1, 1)
    assert value is None or isinstance(value, str | int)
    return Node(value, SOURCE, 1, 1)


def _port(target: int, published: int) -> dict[str, int]:
    return {"target": target, "published": published}


def _volume(source: str, target: str) -> dict[str, str]:
    return {"source": source, "target": target}


def _published(port: dict[str, int]) -> int:
    return port["published"]


def _target(volume: dict[str, str]) -> str:
    return volume["target"]


words = st.sampled_from(["a", "b", "c"])
services: st.SearchStrategy[object] = st.fixed_dictionaries(
    {},
    optional={
        "hostname": words,
        "environment": st.dictionaries(words, words),
        "cap_add": st.lists(words),
        "command": st.lists(words),
        "ports": st.lists(
            st.builds(_port, st.integers(1, 3), st.integers(1, 3)),
            unique_by=_published,  # type: ignore[arg-type]  # inferred from the outer dict
        ),
        "volumes": st.lists(
            st.builds(_volume, words, words),
            unique_by=_target,  # type: ignore[arg-type]  # likewise
        ),
        "logging": st.fixed_dictionaries(
            {"options": st.dictionaries(words, words)},
        ),
    },
)
objects: st.SearchStrategy[object] = st.fixed_dictionaries(
    {},
    optional={
        "external": st.booleans(),
        "file": words,
        "content": words,
        "name": words,
        "labels": st.dictionaries(words, words),
    },
)
files = st.fixed_dictionaries(
    {
        "services": st.dictionaries(words, services),
        "secrets": st.dictionaries(words, objects),
    }
)


def normal(value: object) -> object:
    """Keyed lists in order of their keys, because a list of one file keeps its own."""
    if isinstance(value, dict):
        return {
            k: sorted(v, key=repr) if k in ("ports", "volumes", "cap_add") else normal(v)
            for k, v in value.items()
        }
    return value


@given(files, files, files)
def test_merging_is_associative(a: object, b: object, c: object) -> None:
    left = merge(merge(node(a), node(b)), node(c))
    right = merge(node(a), merge(node(b), node(c)))
    assert normal(plain(left)) == normal(plain(right))


@given(files)
def test_merging_a_file_with_itself_only_repeats_what_lists_join(a: object) -> None:
    def once(value: object) -> object:
        if isinstance(value, dict):
            return {k: sorted(set(v)) if k == "cap_add" else once(v) for k, v in value.items()}
        return value

    assert once(normal(plain(merge(node(a), node(a))))) == once(normal(a))
