"""What differs between two specs, in FieldChange's terms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.api.field_diff import changes
from swarm.v1 import (
    ConfigReference,
    ContainerSpec,
    Dependency,
    DeviceMapping,
    DeviceRequest,
    EndpointSpec,
    FileTarget,
    GenericResource,
    HealthConfig,
    Mount,
    NetworkAttachmentSpec,
    Placement,
    PortConfig,
    Replicated,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    SecretReference,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    Ulimit,
    UpdateConfig,
)


def spec(container: dict[str, Any] | None = None, **fields: Any) -> ServiceSpec:
    task = {"container": ContainerSpec(image="i:1", **(container or {})), **fields.pop("task", {})}
    return ServiceSpec(name="web", task=TaskSpec(**task), **fields)


def ports(*given: PortConfig) -> dict[str, Any]:
    return {"endpoint": EndpointSpec(ports=given)}


def claims(*requests: DeviceRequest) -> dict[str, Any]:
    reserved = Resources(devices=requests)
    return {"resources": ResourceRequirements(reservations=reserved)}


def replicas(count: int | None) -> dict[str, Any]:
    return {"mode": ServiceMode(replicated=Replicated(replicas=count))}


def diff(before: ServiceSpec, after: ServiceSpec, **options: bool) -> list[tuple[Any, ...]]:
    return [(c.path, c.before, c.after) for c in changes(before, after, **options)]


DB = SecretReference(secret_id="aa", secret_name="db", file=FileTarget(name="db", mode=0o444))
CASES: dict[str, tuple[ServiceSpec, ServiceSpec, list[tuple[str, str | None, str | None]]]] = {
    "a scalar": (
        spec(),
        structs.replace(spec(), task=TaskSpec(container=ContainerSpec(image="i:2"))),
        [("task.container.image", '"i:1"', '"i:2"')],
    ),
    "variables by name": (
        spec({"env": ("A=1", "B=2", "C")}),
        spec({"env": ("B=3", "A=1", "D=x=y")}),
        [
            ("task.container.env[B]", '"2"', '"3"'),
            ("task.container.env[C]", "null", None),
            ("task.container.env[D]", None, '"x=y"'),
        ],
    ),
    "labels by key": (
        spec(labels={"a.b": "1"}),
        spec(labels={"a.b": "2", "c": ""}),
        [("labels[a.b]", '"1"', '"2"'), ("labels[c]", None, '""')],
    ),
    "mounts by target": (
        spec({"mounts": (Mount(type="bind", source="/a", target="/data"),)}),
        spec(
            {
                "mounts": (
                    Mount(type="tmpfs", target="/tmp"),
                    Mount(type="bind", source="/b", target="/data", read_only=True),
                )
            }
        ),
        [
            ("task.container.mounts[/data].read_only", None, "true"),
            ("task.container.mounts[/data].source", '"/a"', '"/b"'),
            ("task.container.mounts[/tmp]", None, '{"type":"tmpfs","target":"/tmp"}'),
        ],
    ),
    "ports by target and protocol": (
        spec(**ports(PortConfig(target_port=80, published_port=8080))),
        spec(**ports(PortConfig(target_port=80, published_port=8081, protocol="tcp"))),
        [("endpoint.ports[80/tcp].published_port", "8080", "8081")],
    ),
    "ports by the published one where the target is published twice": (
        spec(
            **ports(
                PortConfig(target_port=80, published_port=1),
                PortConfig(target_port=80, published_port=2),
            )
        ),
        spec(**ports(PortConfig(target_port=80, published_port=2))),
        [("endpoint.ports[80/tcp:1]", '{"target_port":80,"published_port":1}', None)],
    ),
    "a secret's content, which the caller put in place of its id": (
        spec({"secrets": (DB,)}),
        spec({"secrets": (structs.replace(DB, secret_id="bb"),)}),
        [("task.container.secrets[/run/secrets/db].data", '"aa"', '"bb"')],
    ),
    "references that come and go show no id": (
        spec({"secrets": (DB,)}),
        spec({"configs": (ConfigReference(config_id="x", config_name="c"),)}),
        [
            ("task.container.configs[/c]", None, '{"config_name":"c"}'),
            (
                "task.container.secrets[/run/secrets/db]",
                '{"secret_name":"db","file":{"name":"db","mode":292}}',
                None,
            ),
        ],
    ),
    "networks by name, ulimits by name, devices by target": (
        spec({"ulimits": (Ulimit(name="nofile", soft=1, hard=2),)}),
        spec(
            {
                "ulimits": (Ulimit(name="nofile", soft=1, hard=3),),
                "devices": (DeviceMapping(source="/dev/a", target="/dev/b"),),
            },
            task={"networks": (NetworkAttachmentSpec(target="front", aliases=("w",)),)},
        ),
        [
            (
                "task.container.devices[/dev/b]",
                None,
                '{"source":"/dev/a","target":"/dev/b"}',
            ),
            ("task.container.ulimits[nofile].hard", "2", "3"),
            ("task.networks[front]", None, '{"target":"front","aliases":["w"]}'),
        ],
    ),
    "claims on devices by their capabilities": (
        spec(task=claims(DeviceRequest(count=1, capabilities=("gpu",)))),
        spec(task=claims(DeviceRequest(count=2, capabilities=("gpu",), options={"model": "L4"}))),
        [
            ("task.resources.reservations.devices[gpu].count", "1", "2"),
            ("task.resources.reservations.devices[gpu].options[model]", None, '"L4"'),
        ],
    ),
    "constraints as a set": (
        spec(task={"placement": Placement(constraints=("a == b", "c == d"))}),
        spec(task={"placement": Placement(constraints=("c == d", "e == f"))}),
        [
            ("task.placement.constraints[a == b]", '"a == b"', None),
            ("task.placement.constraints[e == f]", None, '"e == f"'),
        ],
    ),
    "depends_on by service": (
        spec(depends_on=(Dependency(service="db", condition="service_started"),)),
        spec(depends_on=(Dependency(service="db", condition="service_healthy"),)),
        [("depends_on[db].condition", '"service_started"', '"service_healthy"')],
    ),
    "a message that comes is told field by field": (
        spec(),
        spec(
            {"healthcheck": HealthConfig(test=("CMD", "x"), retries=2)},
            task={"resources": ResourceRequirements(limits=Resources(cpu_nano=5))},
        ),
        [
            ("task.container.healthcheck.retries", None, "2"),
            ("task.container.healthcheck.test", None, '["CMD","x"]'),
            ("task.resources.limits.cpu_nano", None, "5"),
        ],
    ),
    "generic resources by kind": (
        spec(
            task={
                "resources": ResourceRequirements(
                    reservations=Resources(generic=(GenericResource(kind="gpu", count=1),))
                )
            }
        ),
        spec(
            task={
                "resources": ResourceRequirements(
                    reservations=Resources(generic=(GenericResource(kind="gpu", count=2),))
                )
            }
        ),
        [("task.resources.reservations.generic[gpu].count", "1", "2")],
    ),
    "zero that says something": (
        spec(update=UpdateConfig(parallelism=2)),
        spec(update=UpdateConfig(parallelism=0)),
        [("update.parallelism", "2", "0")],
    ),
    "replicas": (
        spec(**replicas(3)),
        spec(**replicas(0)),
        [("mode.replicated.replicas", "3", "0")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_differences_are_told_by_what_people_call_them(case: str):
    before, after, expected = CASES[case]
    assert diff(before, after) == expected


SAME: dict[str, tuple[ServiceSpec, ServiceSpec]] = {
    "no mode is one replica": (spec(), spec(**replicas(1))),
    "no update config is one at a time": (spec(), spec(update=UpdateConfig(parallelism=1))),
    "spelled out defaults of updates": (
        spec(update=UpdateConfig(parallelism=1)),
        spec(
            update=UpdateConfig(
                parallelism=1, order="stop-first", failure_action="pause", monitor_ns=5_000_000_000
            )
        ),
    ),
    "restart policy by default": (
        spec(),
        spec(task={"restart": RestartPolicy(condition="any", delay_ns=5_000_000_000)}),
    ),
    "empty messages": (
        spec(),
        spec(
            task={"resources": ResourceRequirements(limits=Resources()), "placement": Placement()}
        ),
    ),
    "an endpoint without ports": (spec(), spec(endpoint=EndpointSpec(mode="vip"))),
    "tcp and ingress": (
        spec(**ports(PortConfig(target_port=80))),
        spec(**ports(PortConfig(target_port=80, protocol="tcp", publish_mode="ingress"))),
    ),
    "sets in another order": (
        spec({"env": ("A=1", "B=2"), "capability_add": ("X", "Y")}),
        spec({"env": ("B=2", "A=1"), "capability_add": ("Y", "X")}),
    ),
    "the grace period by default": (spec(), spec({"stop_grace_period_ns": 10_000_000_000})),
}


@pytest.mark.parametrize("case", SAME)
def test_what_means_the_same_is_no_difference_unless_taken_literally(case: str):
    before, after = SAME[case]
    assert before != after
    assert diff(before, after) == []
    assert diff(after, before) == []
    assert diff(before, after, literal=True) != []


words = st.sampled_from(["a", "b", "c", "/x", "[y]", "k=v", ""])
specs = st.builds(
    ServiceSpec,
    name=st.just("web"),
    labels=st.dictionaries(words, words),
    task=st.none()
    | st.builds(
        TaskSpec,
        container=st.none()
        | st.builds(
            ContainerSpec,
            image=words,
            env=st.lists(words).map(tuple),
            args=st.lists(words).map(tuple),
            groups=st.lists(words).map(tuple),
            mounts=st.lists(st.builds(Mount, type=words, source=words, target=words)).map(tuple),
            secrets=st.lists(st.builds(SecretReference, secret_id=words, secret_name=words)).map(
                tuple
            ),
            init=st.none() | st.booleans(),
        ),
        restart=st.none() | st.builds(RestartPolicy, delay_ns=st.none() | st.integers(0, 2)),
    ),
    update=st.none() | st.builds(UpdateConfig, parallelism=st.integers(0, 2)),
    mode=st.none()
    | st.builds(
        ServiceMode,
        replicated=st.builds(Replicated, replicas=st.none() | st.integers(0, 2)),
    ),
)


@given(specs, specs)
@settings(deadline=None)
def test_literally_a_difference_is_found_exactly_where_there_is_one(
    before: ServiceSpec, after: ServiceSpec
):
    assert bool(changes(before, after, literal=True)) == (before != after)
    found = changes(before, after)
    assert [c.path for c in found] == sorted(c.path for c in found)
    assert all(c.before != c.after for c in found)
    back = changes(after, before)
    assert [(c.path, c.after, c.before) for c in back] == [
        (c.path, c.before, c.after) for c in found
    ]
