"""The normal form: what it looks like, what it says of what it leaves out, and that nothing is lost
on the way there and back.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.compose import ComposeError, Normal, dump, keys, load, normal_form, printing, shapes
from cli.compose.problems import Report, Source
from cli.compose.tree import parse
from swarm.errors import Invalid
from swarm.v1 import StackSpec
from tests.unit.compose.strategies import documents, full_documents, texts

FOLDER = Path("/nonexistent")


def normal(text: str, environment: Mapping[str, str] | None = None, **options: Any) -> Normal:
    options.setdefault("project_directory", FOLDER)
    return normal_form(["-"], environment=environment or {}, stdin=textwrap.dedent(text), **options)


def service(lines: str, **options: Any) -> dict[str, Any]:
    """The service's own lines, in their normal form."""
    body = textwrap.indent(textwrap.dedent(lines), "    ")
    services: Any = normal(f"services:\n  web:\n    image: x\n{body}\n", **options).document[
        "services"
    ]
    found: dict[str, Any] = services["web"]
    del found["image"]
    return found


# ------------------------------------------------------------------ tables


@pytest.mark.parametrize(
    ("table", "known", "resolved"),
    [
        (shapes.SERVICE, keys.SERVICE, {"extends", "profiles", "label_file"}),
        (shapes.DEPLOY, keys.DEPLOY, set()),
        (shapes.JOB, keys.JOB, set()),
        (shapes.PLACEMENT, keys.PLACEMENT, set()),
        (shapes.PREFERENCE, keys.PREFERENCE, set()),
        (shapes.RESOURCES, keys.RESOURCES, set()),
        (shapes.LIMITS, keys.LIMITS, set()),
        (shapes.RESERVATIONS, keys.RESERVATIONS, set()),
        (shapes.DEVICE, keys.DEVICE, set()),
        (shapes.GENERIC, keys.GENERIC, set()),
        (shapes.RESTART, keys.RESTART, set()),
        (shapes.UPDATE, keys.UPDATE, set()),
        (shapes.HEALTHCHECK, keys.HEALTHCHECK, set()),
        (shapes.LOGGING, keys.LOGGING, set()),
        (shapes.PORT, keys.PORT, set()),
        (shapes.VOLUME_MOUNT, keys.VOLUME_MOUNT, set()),
        (shapes.BIND, keys.BIND, set()),
        (shapes.VOLUME_OPTIONS, keys.VOLUME_OPTIONS, set()),
        (shapes.TMPFS, keys.TMPFS, set()),
        (shapes.IMAGE_OPTIONS, keys.IMAGE_OPTIONS, set()),
        (shapes.FILE_REFERENCE, keys.FILE_REFERENCE, set()),
        (shapes.SERVICE_NETWORK, keys.SERVICE_NETWORK, set()),
        (shapes.ULIMIT, keys.ULIMIT, set()),
        (shapes.DEPENDENCY, keys.DEPENDENCY, set()),
        (shapes.CREDENTIAL_SPEC, keys.CREDENTIAL_SPEC, set()),
        (shapes.DEVICE_MAPPING, keys.DEVICE_MAPPING, set()),
        (shapes.NETWORK, keys.NETWORK, set()),
        (shapes.IPAM, keys.IPAM, set()),
        (shapes.IPAM_CONFIG, keys.IPAM_CONFIG, set()),
        (shapes.VOLUME, keys.VOLUME, set()),
        (shapes.SECRET, keys.SECRET, set()),
        (shapes.CONFIG, keys.CONFIG, set()),
    ],
)
def test_every_key_of_the_specification_is_printed(
    table: printing.Table, known: Mapping[str, keys.Key], resolved: set[str]
) -> None:
    assert set(table) == set(known) - resolved


# ------------------------------------------------------------------ what Docker does not know


def test_what_docker_refuses_is_printed_in_the_specifications_words() -> None:
    assert service(
        """
        gpus: 2
        restart: always
        mem_limit: 1g
        memswap_limit: -1
        group_add: [0, docker]
        depends_on: {db: {condition: service_healthy, required: false}, redis: }
        ports: [{target: 80, published: "8080", mode: host, host_ip: 127.0.0.1, name: web}]
        deploy: {resources: {reservations: {devices: [{capabilities: [gpu], count: all}]}}}
        healthcheck: {test: [NONE], start_interval: 2s}
        """
    ) == {
        "gpus": [{"count": 2}],
        "restart": "always",
        "mem_limit": "1073741824",
        "memswap_limit": "-1",
        "group_add": ["0", "docker"],
        "depends_on": {
            "db": {"condition": "service_healthy", "required": False},
            "redis": {},
        },
        "ports": [
            {"name": "web", "mode": "host", "host_ip": "127.0.0.1", "target": 80, "published": 8080}
        ],
        "deploy": {
            "resources": {"reservations": {"devices": [{"capabilities": ["gpu"], "count": "all"}]}}
        },
        "healthcheck": {"test": ["NONE"], "start_interval": "2s"},
    }


def test_extends_include_and_profiles_are_applied(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.yml").write_text(
        "services: {db: {image: d, env_file: v.env, volumes: ['./d:/d']}}\nvolumes: {v: }\n"
    )
    (tmp_path / "sub" / "v.env").write_text("A=1\n")
    (tmp_path / "c.yml").write_text(
        "name: shop\ninclude: [sub/more.yml]\nservices:\n"
        "  base: {image: x, profiles: [never], labels: {a: b}}\n"
        "  web: {extends: base, profiles: [extra], labels: {c: d}}\n"
        "  off: {image: y, profiles: [off]}\n"
    )
    found = normal_form([str(tmp_path / "c.yml")], environment={}, profiles=["extra"])
    assert found.document == {
        "version": "3.13",
        "name": "shop",
        "services": {
            "db": {
                "environment": {"A": "1"},
                "env_file": [str(tmp_path / "sub" / "v.env")],
                "image": "d",
                "volumes": [
                    {"type": "bind", "source": str(tmp_path / "sub" / "d"), "target": "/d"}
                ],
            },
            "web": {"image": "x", "labels": {"a": "b", "c": "d"}},
        },
        "volumes": {"v": {}},
    }


def test_an_unquoted_no_of_another_yaml_is_printed_as_the_word() -> None:
    assert service("restart: false") == {"restart": "no"}


def test_keys_a_deploy_refuses_are_printed_with_a_warning() -> None:
    found = normal(
        "services: {a: {build: {context: ., args: [A=1, B]}, blkio_config: {weight: 5}}}\n"
    )
    assert found.document["services"] == {
        "a": {
            "blkio_config": {"weight": 5},
            "build": {"context": ".", "args": {"A": "1", "B": None}},
        }
    }
    told = "\n".join(found.warnings)
    assert 'stdin:1:16: a deploy refuses this: services.a: "build"' in told
    assert "build and push the image first" in told
    assert '"blkio_config" is not supported' in told


def test_what_only_a_deploy_needs_is_a_warning() -> None:
    found = normal(
        "services: {a: {image: x, networks: [nope], secrets: [s]}}\nsecrets: {s: {file: /none}}"
    )
    assert any('the network "nope" is not declared' in each for each in found.warnings)
    assert any("no such file: /none" in each for each in found.warnings)
    assert all(each.startswith("stdin:") for each in found.warnings)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("services: {a: {image: x, prots: [80]}}", "1:26"),
        ("services: {a: {image: x, deploy: {replicas: many}}}", "1:45"),
        ("services: {a: {image: x, stop_grace_period: tens}}", "1:45"),
        ("services: {a: {image: x, deploy: {resources: {limits: {memory: 5Q}}}}}", "1:64"),
        ("services: {a: {image: x, ports: ['99999']}}", "1:34"),
        ("services: {a: {image: x, tty: maybe}}", "1:31"),
        ("services: {a: {image: x, environment: 5}}", "1:39"),
        ("services: [a]", "1:11"),
        ("networks: {n: {internal: perhaps}}", "1:26"),
        ("services: {a: {image: '${X:?}'}}", "1:24"),
        ("a: [", "2:1"),
    ],
)
def test_malformed_files_fail_with_the_place(text: str, place: str) -> None:
    with pytest.raises(ComposeError, match=f"stdin:{place}"):
        normal(text)


# ------------------------------------------------------------------ the two forms


def test_the_exact_form_has_what_dockers_form_lacks() -> None:
    lines = """
        volumes:
          - ./a:/b:ro,z
          - {type: bind, source: /c, target: /c, bind: {create_host_path: false}}
        ulimits: {core: 0, nofile: {soft: 0, hard: 5}}
        oom_score_adj: 5
        environment: {A: $$x}
        tty: false
        """
    plain = service(lines)
    assert plain == {
        "environment": {"A": "$x"},
        "ulimits": {"core": {}, "nofile": {"hard": 5}},
        "volumes": [
            {"type": "bind", "source": "/nonexistent/a", "target": "/b", "read_only": True},
            {"type": "bind", "source": "/c", "target": "/c", "bind": {}},
        ],
    }
    assert service(lines, exact=True) == {
        "environment": {"A": "$$x"},
        "oom_score_adj": 5,
        "tty": False,
        "ulimits": {"core": 0, "nofile": {"soft": 0, "hard": 5}},
        "volumes": [
            {
                "type": "bind",
                "source": "/nonexistent/a",
                "target": "/b",
                "read_only": True,
                "bind": {"selinux": "z"},
            },
            {
                "type": "bind",
                "source": "/c",
                "target": "/c",
                "bind": {"create_host_path": False},
            },
        ],
    }


def test_placement_beyond_docker_is_printed() -> None:
    lines = """
        deploy:
          placement:
            constraints: ["node.labels.zone in (a, b)"]
            preferences: [{affinity: service.name == db, weight: 5}, {spread: node.id}]
            strategy: binpack
        """
    expected = {
        "placement": {
            "constraints": ["node.labels.zone in (a, b)"],
            "preferences": [
                {"affinity": "service.name == db", "weight": 5},
                {"spread": "node.id"},
            ],
            "strategy": "binpack",
        }
    }
    assert service(lines)["deploy"] == expected
    assert service(lines, exact=True)["deploy"] == expected


def test_what_dockers_form_lacks_is_told() -> None:
    found = normal("services: {a: {image: x, oom_score_adj: 5, volumes: ['/a:/b:z']}}")
    assert sum("has no place for it" in each for each in found.warnings) == 2
    exact = normal("services: {a: {image: x, oom_score_adj: 5}}", exact=True)
    assert not exact.warnings


def test_the_exact_form_needs_no_files_of_variables(tmp_path: Path) -> None:
    (tmp_path / "v.env").write_text("A=$b\nC='x'\n")
    (tmp_path / "c.yml").write_text("services: {a: {image: x, env_file: v.env}}")
    plain = normal_form([str(tmp_path / "c.yml")], environment={})
    assert plain.document["services"] == {
        "a": {"environment": {"A": "$b", "C": "'x'"}, "env_file": ["v.env"], "image": "x"}
    }
    exact = normal_form([str(tmp_path / "c.yml")], environment={}, exact=True)
    assert exact.document["services"] == {
        "a": {"environment": {"A": "$$b", "C": "'x'"}, "image": "x"}
    }


def test_variables_may_stay(tmp_path: Path) -> None:
    found = normal(
        """
        services:
          a:
            image: "x:${TAG:-1}"
            command: run $$A "${B} c"
            ports: ["${P}:80", "81:81"]
            volumes: ["${V:-./x}:/x", "./$D:/y:ro"]
            deploy: {replicas: "${N}", resources: {limits: {memory: "$M"}}}
            tty: "$T"
            environment: ["A=$A"]
            ulimits: {nofile: "$U"}
        x-a: $A
        """,
        interpolate=False,
        environment={"TAG": "2"},
    )
    assert found.document == {
        "version": "3.13",
        "services": {
            "a": {
                "command": ["run", "$$A", "${B} c"],
                "deploy": {"replicas": "${N}", "resources": {"limits": {"memory": "$M"}}},
                "environment": {"A": "$A"},
                "image": "x:${TAG:-1}",
                "ports": [
                    "${P}:80",
                    {"mode": "ingress", "target": 81, "published": 81, "protocol": "tcp"},
                ],
                "tty": "$T",
                "ulimits": {"nofile": "$U"},
                "volumes": [
                    {"type": "volume", "source": "${V:-./x}", "target": "/x"},
                    {
                        "type": "bind",
                        "source": "/nonexistent/$D",
                        "target": "/y",
                        "read_only": True,
                    },
                ],
            }
        },
        "x-a": "$A",
    }
    assert not found.warnings


def test_the_exact_form_has_its_variables_filled_in() -> None:
    with pytest.raises(Invalid, match="filled in"):
        normal("services: {a: {image: x}}", interpolate=False, exact=True)


# ------------------------------------------------------------------ YAML


def test_times_and_numbers_are_spelled_as_go_spells_them() -> None:
    document = normal(
        "services: {}\nx-a: [2001-01-01, 2001-01-01T10:00:00.5+02:00, 1e3, 1.0, 1e21, 0.5, 017]"
    ).document
    moments: Any = document["x-a"]
    assert moments[0] == datetime(2001, 1, 1, tzinfo=UTC)
    assert dump(document) == (
        'version: "3.13"\nservices: {}\nx-a:\n- 2001-01-01T00:00:00Z\n'
        "- 2001-01-01T10:00:00.5+02:00\n- 1000\n- 1\n- 1e+21\n- 0.5\n- 15\n"
    )


def _read_as_docker(text: str) -> object:
    root = parse(Source("x", text), Report())
    assert root is not None
    return printing.plain(root)


@given(st.dictionaries(texts, texts))
def test_strings_read_back_as_strings_everywhere(document: dict[str, object]) -> None:
    text = dump(document)
    assert yaml.safe_load(text) == document
    assert _read_as_docker(text) == document


# ------------------------------------------------------------------ round trips


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("stack")
    (found / "content").write_text("hello\n")
    return found


_SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ENVIRONMENT = {"HOME": "/home/ada", "a": "from outside"}


def spec(text: str, folder: Path) -> StackSpec:
    """The stack, its parts in the order of their names: the forms are sorted."""
    found = load(
        ["-"], stack="st", environment=ENVIRONMENT, stdin=text, project_directory=folder
    ).spec
    parts = {
        name: tuple(sorted(value, key=lambda each: getattr(each, "name", each)))
        for name in found.__struct_fields__
        if isinstance(value := getattr(found, name), tuple)
    }
    return msgspec.structs.replace(found, **parts)


def form(text: str, folder: Path, **options: Any) -> dict[str, object]:
    return normal_form(
        ["-"],
        stack="st",
        environment=ENVIRONMENT,
        stdin=text,
        project_directory=folder,
        **options,
    ).document


@given(document=full_documents)
@_SETTINGS
def test_the_exact_form_loads_to_the_same_stack(document: dict[str, object], folder: Path) -> None:
    text = dump(document)
    assert spec(dump(form(text, folder, exact=True)), FOLDER) == spec(text, folder)


@given(document=full_documents)
@_SETTINGS
def test_the_forms_are_fixed_points(document: dict[str, object], folder: Path) -> None:
    text = dump(document)
    exact = form(text, folder, exact=True)
    assert form(dump(exact), FOLDER, exact=True) == exact
    plain = form(text, folder)
    assert form(dump(plain), folder, interpolate=False) == plain


@given(document=documents)
@_SETTINGS
def test_dockers_form_loads_to_the_same_stack(document: dict[str, object], folder: Path) -> None:
    text = dump(document)
    printed = dump(form(text, folder)).replace("$", "$$")
    assert spec(printed, FOLDER) == spec(text, folder)


def shuffled(value: Any, order: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(key, shuffled(inner, order)) for key, inner in value.items()]
        order.shuffle(items)
        return dict(items)
    if isinstance(value, list):
        return [shuffled(inner, order) for inner in value]
    return value


@given(document=full_documents, seed=st.integers(0, 99))
@_SETTINGS
def test_the_order_of_keys_does_not_matter(
    document: dict[str, object], seed: int, folder: Path
) -> None:
    first, second = dump(document), dump(shuffled(document, random.Random(seed)))
    assert dump(form(first, folder)) == dump(form(second, folder))
