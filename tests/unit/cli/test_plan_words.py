"""Field paths of plans in compose's words."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.compose.keys import DEPLOY
from cli.compose.keys import SERVICE as SERVICE_KEYS
from cli.plan_values import size
from cli.plan_words import OBJECT, SERVICE, Field, fields, split
from swarm.quantities import parse_bytes
from swarm.v1 import (
    ConfigSpec,
    FieldChange,
    Kind,
    Message,
    NetworkSpec,
    SecretSpec,
    ServiceSpec,
    VolumeSpec,
)


def change(path: str, before: Any = None, after: Any = None) -> FieldChange:
    """None: not set."""
    old, new = (None if value is None else json.dumps(value) for value in (before, after))
    return FieldChange(path=path, before=old, after=new)


def one(path: str, before: Any = None, after: Any = None, kind: Kind = Kind.SERVICE) -> Field:
    [found] = fields(kind, (change(path, before, after),), stack="app")
    return found


@pytest.mark.parametrize(
    ("path", "before", "after", "key", "shown"),
    [
        ("task.container.image", "a:1", "a:2", "image", ("a:1", "a:2")),
        ("task.container.env[DEBUG]", None, "1", "environment.DEBUG", (None, "1")),
        (
            "task.resources.reservations.devices[gpu]",
            None,
            {"count": 2, "capabilities": ["gpu"], "options": {"model": "A100"}},
            "deploy.resources.reservations.devices[gpu]",
            (None, "2 GPUs of model A100"),
        ),
        (
            "task.resources.reservations.devices[gpu].options[fraction]",
            "0.5",
            "0.25",
            "deploy.resources.reservations.devices[gpu].options[fraction]",
            ("0.5", "0.25"),
        ),
        ("task.container.env[A.B]", "x", "", "environment.A.B", ("x", '""')),
        ("task.container.env[GONE]", "x", None, "environment.GONE", ("x", None)),
        ("task.container.labels[a.b/c]", None, "1", "labels.a.b/c", (None, "1")),
        ("labels[tier]", None, "front", "deploy.labels.tier", (None, "front")),
        ("task.container.command", None, ["sh", "-c", "a b"], "entrypoint", (None, "sh -c 'a b'")),
        ("task.container.args", ["x"], ["y", "z"], "command", ("x", "y z")),
        ("task.container.dir", None, "/srv", "working_dir", (None, "/srv")),
        ("mode.replicated.replicas", 2, 3, "deploy.replicas", ("2", "3")),
        ("mode.replicated_job.total_completions", 2, 3, "deploy.replicas", ("2", "3")),
        (
            "task.resources.limits.memory_bytes",
            None,
            512 * 2**20,
            "deploy.resources.limits.memory",
            (None, "512M"),
        ),
        (
            "task.resources.reservations.cpu_nano",
            500_000_000,
            None,
            "deploy.resources.reservations.cpus",
            ("0.5", None),
        ),
        ("task.restart.delay_ns", None, 2 * 10**9, "deploy.restart_policy.delay", (None, "2s")),
        ("update.monitor_ns", None, 5 * 10**8, "deploy.update_config.monitor", (None, "500ms")),
        ("rollback.order", None, "start-first", "deploy.rollback_config.order", (None, "start-first")),
        ("task.container.stop_grace_period_ns", None, 0, "stop_grace_period", (None, "0s")),
        ("task.container.healthcheck.interval_ns", None, 10**9, "healthcheck.interval", (None, "1s")),
        ("task.container.shm_size_bytes", None, 1000, "shm_size", (None, "1000")),
        ("task.placement.max_replicas", None, 2, "deploy.placement.max_replicas_per_node", (None, "2")),
        (
            "task.placement.constraints[node.role == manager]",
            None,
            "node.role == manager",
            "deploy.placement.constraints",
            (None, "node.role == manager"),
        ),
        ("task.container.capability_add[CAP_X]", "CAP_X", None, "cap_add", ("CAP_X", None)),
        (
            "endpoint.ports[80/tcp].published_port",
            8080,
            8081,
            "ports[80/tcp].published",
            ("8080", "8081"),
        ),
        (
            "endpoint.ports[53/udp]",
            None,
            {
                "protocol": "udp",
                "target_port": 53,
                "published_port": 5353,
                "publish_mode": "host",
                "host_ip": "10.0.0.1",
            },
            "ports",
            (None, "10.0.0.1:5353->53/udp, mode host"),
        ),
        (
            "task.container.mounts[/data]",
            {"type": "bind", "source": "/srv", "target": "/data", "read_only": True},
            None,
            "volumes",
            ("/srv:/data (bind, read only)", None),
        ),
        (
            "task.container.mounts[/tmp].tmpfs_options.size_bytes",
            None,
            2**20,
            "volumes[/tmp].tmpfs.size",
            (None, "1M"),
        ),
        (
            "task.container.secrets[/run/secrets/app_key]",
            None,
            {"secret_name": "app_key", "file": {"name": "pass", "uid": "9", "mode": 0o440}},
            "secrets[key]",
            (None, "app_key (target: pass, uid: 9, mode: 0o440)"),
        ),
        (
            "task.container.secrets[/run/secrets/key].data",
            "0f0f",
            "1e1e",
            "secrets[key]",
            ("present content", "new content"),
        ),
        (
            "task.container.configs[/settings].file.mode",
            0o444,
            0o400,
            "configs[/settings].mode",
            ("0o444", "0o400"),
        ),
        ("task.container.ulimits[nofile]", None, {"soft": 1, "hard": 2}, "ulimits.nofile", (None, "1:2")),
        ("task.container.ulimits[nofile].soft", 1, 2, "ulimits.nofile.soft", ("1", "2")),
        (
            "depends_on[app_db]",
            None,
            {"service": "app_db", "condition": "service_healthy", "required": True},
            "depends_on.db",
            (None, "service_healthy"),
        ),
        ("depends_on[app_db].condition", "a", "b", "depends_on.db.condition", ("a", "b")),
        ("task.networks[app_front].aliases[web]", None, "web", "networks.front.aliases", (None, "web")),
        ("task.networks[app_front]", None, {"target": "x"}, "networks.front", (None, "{target: x}")),
        ("task.log_driver.options[max-size]", None, "1m", "logging.options.max-size", (None, "1m")),
        ("a.field_of.tomorrow", None, True, "a.field_of.tomorrow", (None, "true")),
        ("task.container.hologram_ns", None, 10**9, "task.container.hologram", (None, "1s")),
    ],
)  # fmt: skip
def test_paths_and_values_are_shown_as_compose_writes_them(
    path: str, before: Any, after: Any, key: str, shown: tuple[str | None, str | None]
) -> None:
    assert one(path, before, after) == Field(key, *shown)


@pytest.mark.parametrize(
    ("kind", "path", "key"),
    [
        (Kind.NETWORK, "driver.options[encrypted]", "driver_opts.encrypted"),
        (Kind.VOLUME, "driver.name", "driver"),
        (Kind.CONFIG, "templating.name", "template_driver"),
        (Kind.CONFIG, "data", "content"),
        (Kind.SECRET, "labels[a]", "labels.a"),
    ],
)
def test_other_objects_have_words_of_their_own(kind: Kind, path: str, key: str) -> None:
    assert one(path, "a", "b", kind=kind) == Field(key, "a", "b")


def test_what_stands_for_a_secret_s_content_is_not_shown() -> None:
    assert fields(Kind.SECRET, (change("data", "0f0f", "1e1e"),)) == []


def test_a_change_of_mode_is_one_field() -> None:
    found = fields(
        Kind.SERVICE,
        (change("mode.global_service", None, {}), change("mode.replicated", {"replicas": 3}, None)),
    )
    assert found == [
        Field("deploy.mode", "replicated", "global"),
        Field("deploy.replicas", "3", None),
    ]


def test_what_people_look_at_first_stands_first() -> None:
    paths = ("labels[x]", "task.restart.condition", "task.container.env[A]", "task.container.image")
    found = fields(Kind.SERVICE, tuple(change(path, "a", "b") for path in paths))
    assert [field.key for field in found] == [
        "image",
        "environment.A",
        "deploy.restart_policy.condition",
        "deploy.labels.x",
    ]


# ------------------------------------------------------------------ the table itself


def paths(cls: type[Message]) -> Iterator[str]:
    """Every path that a spec may have, `[]` for elements; each message and its fields."""
    for name, kind in typing.get_type_hints(cls).items():
        yield from _paths(name, kind)


def _paths(path: str, kind: Any) -> Iterator[str]:
    inner = [k for k in typing.get_args(kind) if k not in (type(None), Ellipsis)]
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        yield from _paths(path, inner[0])
        return
    yield path
    if origin is tuple:
        yield f"{path}[]"
        yield from (found for found in _paths(f"{path}[]", inner[0]))
    elif origin is dict:
        yield f"{path}[]"
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for name, deeper in typing.get_type_hints(kind).items():
            yield from _paths(f"{path}.{name}", deeper)


def test_every_entry_of_the_tables_is_a_path_that_exists() -> None:
    assert set(SERVICE) <= set(paths(ServiceSpec))
    others = {p for cls in (NetworkSpec, VolumeSpec, SecretSpec, ConfigSpec) for p in paths(cls)}
    assert set(OBJECT) <= others


# Messages that only hold others; a change names what is in them.
HOLDERS = ("task", "task.container", "task.container.dns", "mode", "endpoint")
UNKNOWN_TO_COMPOSE = (
    "name",
    # Docker's own, kept for read-back.
    "task.container.privileges",
    "task.container.isolation",
    # Counted up by `service update --force`.
    "task.force_update",
)


def test_every_field_of_a_service_is_shown_by_a_compose_key() -> None:
    for path in paths(ServiceSpec):
        if path in HOLDERS or path.startswith((*UNKNOWN_TO_COMPOSE, "mode.")):
            continue
        [shown] = fields(Kind.SERVICE, (change(path.replace("[]", "[x]"), "a", "b"),))
        key, _, rest = shown.key.partition("[")[0].partition(".")
        assert key in SERVICE_KEYS, path
        if key == "deploy":
            assert rest.split(".")[0] in (*DEPLOY, "max_concurrent"), path


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z_]+", fullmatch=True), st.text(alphabet="ab.[]/ =", max_size=6)
        )
    )
)
def test_a_path_splits_into_its_names_and_elements(parts: list[tuple[str, str]]) -> None:
    path = ".".join(f"{name}[{key}]" if key else name for name, key in parts)
    clean = all("]" not in key for _, key in parts)
    found = split(path)
    assert "".join(found).replace(".", "") == path.replace(".", "") or not clean
    if clean:
        expected = [
            piece for name, key in parts for piece in (name, f"[{key}]" if key else "") if piece
        ]
        assert found == expected


@given(st.integers(0, 2**60))
def test_a_size_is_exact(value: int) -> None:
    assert parse_bytes(size(value)) == value


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
       st.sampled_from(sorted(SERVICE)))  # fmt: skip
def test_whatever_the_value_a_field_can_be_shown(value: Any, pattern: str) -> None:
    path = pattern.replace("[]", "[x]")
    for before, after in ((None, value), (value, None), (value, "other")):
        fields(Kind.SERVICE, (change(path, before, after),), stack="app")
