"""`service update` against the docker CLI: the same flags make the same of a service.

The docker CLI talks to an engine that has one service and keeps what it is sent; swarmctl to the
fake cluster with that service. Each difference on purpose is listed with its reason.
"""

from __future__ import annotations

import json
import shlex
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from cli import docker_json
from swarm.v1 import (
    Config,
    ConfigReference,
    ConfigSpec,
    ContainerSpec,
    DnsConfig,
    Driver,
    EndpointSpec,
    FileTarget,
    GenericResource,
    HealthConfig,
    Meta,
    Mount,
    Network,
    NetworkAttachmentSpec,
    NetworkSpec,
    Placement,
    PlacementPreference,
    PortConfig,
    Replicated,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    Secret,
    SecretReference,
    SecretSpec,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    Ulimit,
    UpdateConfig,
    UpdateRequest,
)
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.compose.fake_engine import _Handler, _Server, docker, docker_is_missing

_MISSING = docker_is_missing()
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "-")
SECOND_NS = 1_000_000_000


def file(name: str) -> FileTarget:
    return FileTarget(name=name, uid="0", gid="0", mode=0o444)


CONTAINER = ContainerSpec(
    image="nginx:1.26",
    env=("A=1", "B=2"),
    labels={"c1": "x"},
    mounts=(Mount(type="volume", source="data", target="/data"),),
    secrets=(SecretReference(secret_id="s1", secret_name="s1", file=file("s1")),),
    configs=(ConfigReference(config_id="k1", config_name="k1", file=file("/k1")),),
    hosts=("10.0.0.1 db", "10.0.0.2 db", "10.0.0.3 mq"),
    groups=("10", "20"),
    sysctls={"net.a": "1"},
    ulimits=(Ulimit(name="nofile", soft=10, hard=20),),
    dns=DnsConfig(nameservers=("1.1.1.1",), search=("a.b",), options=("ndots:1",)),
    capability_add=("CAP_SYS_TIME",),
    capability_drop=("CAP_CHOWN",),
    healthcheck=HealthConfig(test=("CMD-SHELL", "true"), interval_ns=SECOND_NS),
)
SPEC = ServiceSpec(
    name="web",
    labels={"l1": "x", "l2": "y"},
    task=TaskSpec(
        container=CONTAINER,
        resources=ResourceRequirements(
            limits=Resources(cpu_nano=SECOND_NS),
            reservations=Resources(generic=(GenericResource(kind="ssd", count=2),)),
        ),
        restart=RestartPolicy(condition="any", delay_ns=SECOND_NS),
        placement=Placement(
            constraints=("node.role==worker",),
            preferences=(PlacementPreference(spread="node.labels.zone"),),
        ),
        networks=(NetworkAttachmentSpec(target="n1"),),
        log_driver=Driver(name="json-file", options={"max-size": "1m"}),
    ),
    mode=ServiceMode(replicated=Replicated(replicas=2)),
    update=UpdateConfig(parallelism=2, failure_action="pause", order="stop-first"),
    rollback=UpdateConfig(parallelism=1, failure_action="pause", order="stop-first"),
    endpoint=EndpointSpec(
        mode="vip",
        ports=(
            PortConfig(protocol="tcp", target_port=80, published_port=80, publish_mode="ingress"),
            PortConfig(protocol="udp", target_port=53, published_port=53, publish_mode="ingress"),
        ),
    ),
)
WEB = Service(id="web1", meta=Meta(version=5), spec=SPEC, spec_version=2)


class _Engine(_Handler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        kind, _, name = path.split("/", 2)[-1].partition("/")
        if kind == "services" and name:
            self.answer(docker_json.service(WEB))
        elif kind == "networks" and name in ("n1", "n2", "front"):
            self.answer({"Name": name, "Id": "n1" if name == "n1" else "n2", "Scope": "swarm"})
        elif kind in ("secrets", "configs"):
            self.answer([{"ID": n, "Spec": {"Name": n}} for n in ("s1", "s2", "k1", "k2")])
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.setdefault("services", []).append(body)
        self.answer({"Warnings": []})


@contextmanager
def engine() -> Iterator[tuple[str, _Server]]:
    with tempfile.TemporaryDirectory() as folder:
        server = _Server(f"{folder}/docker.sock", ())
        server.RequestHandlerClass = _Engine
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"unix://{folder}/docker.sock", server
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture(scope="module")
def docker_engine() -> Iterator[tuple[str, _Server]]:
    with engine() as found:
        yield found


def of_docker(flags: str, at: tuple[str, _Server]) -> dict[str, Any] | str:
    """What docker sends, or what it says."""
    address, server = at
    server.bodies.clear()
    words = ("-H", address, "service", "update", "--detach", "--no-resolve-image")
    done = docker(*words, *shlex.split(flags), "web", environment={})
    if done.returncode:
        return done.stderr.strip()
    return dict(_bare(server.bodies["services"][-1]))


def of_us(flags: str, cli: Cli, cluster: FakeCluster) -> dict[str, Any] | str:
    answer = cli("service", "update", "-d", *shlex.split(flags), "web")
    if answer.code:
        return answer.err.strip()
    spec = cluster.last(UpdateRequest).spec
    assert spec is not None and spec.service is not None
    return dict(_bare(docker_json.service_spec(spec.service)))


_EMPTY: tuple[Any, ...] = (None, "", 0, False, {}, [])


def _bare(value: Any) -> Any:
    """Without what says nothing; orders that mean nothing are the same."""
    if isinstance(value, dict):
        found = {k: _bare(v) for k, v in value.items()}
        return {k: v for k, v in sorted(found.items()) if v not in _EMPTY}
    if isinstance(value, list):
        # Docker builds most of them from maps.
        return sorted((_bare(item) for item in value), key=str)
    return value


def _differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where they differ, in a line each."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        return [d for k in keys for d in _differences(ours.get(k), theirs.get(k), f"{path}/{k}")]
    return [] if ours == theirs else [f"{path}: {ours} here, {theirs} there"]


@pytest.fixture
def ours(cluster: FakeCluster) -> FakeCluster:
    cluster.add(replace(WEB))
    for name in ("s1", "s2"):
        cluster.add(Secret(id=name, spec=SecretSpec(name=name)))
    for name in ("k1", "k2"):
        cluster.add(Config(id=name, spec=ConfigSpec(name=name)))
    cluster.add(Network(id="n1", spec=NetworkSpec(name="n1")))
    cluster.add(Network(id="n2", spec=NetworkSpec(name="front")))
    return cluster


SAME = (
    "--env-add C=3 --env-rm A",
    "--env-add A=9",
    "--env-rm NOPE",
    "--label-add l1=z --label-add l3 --label-rm l2",
    "--label-rm NOPE",
    "--container-label-add c2=y --container-label-rm c1",
    "--container-label-rm NOPE",
    "--mount-add type=bind,source=/a,target=/b --mount-rm /data",
    "--mount-add type=volume,source=other,target=/data",
    "--mount-rm /nope",
    "--secret-add s2 --secret-rm s1",
    "--secret-rm nope",
    "--config-add source=k2,target=/etc/k2,mode=0400 --config-rm k1",
    "--config-rm nope",
    "--network-add front",
    "--network-rm n1",
    "--network-add name=front,alias=w",
    "--network-rm front",
    "--network-rm nope",
    "--publish-add 8080:8080",
    "--publish-rm 80",
    "--publish-rm 53/udp",
    "--publish-rm 53",
    "--publish-rm 9999",
    "--publish-rm 80 --publish-add published=8080,target=80,mode=host",
    "--constraint-add node.labels.a==b",
    "--constraint-rm node.role==worker",
    "--constraint-rm node.role==manager",
    "--placement-pref-add spread=node.labels.rack",
    "--placement-pref-rm spread=node.labels.zone",
    "--placement-pref-rm spread=node.labels.nope",
    "--generic-resource-add fpga=1",
    "--generic-resource-rm ssd",
    "--generic-resource-rm nope",
    "--host-add x:10.0.0.9",
    "--host-rm mq:10.0.0.3",
    "--host-rm db",
    "--host-rm db:10.0.0.1",
    "--host-rm nope:10.0.0.1",
    "--host-rm db:10.0.0.1 --host-add db:10.0.0.9",
    "--dns-add 9.9.9.9 --dns-rm 1.1.1.1",
    "--dns-rm 8.8.8.8",
    "--dns-search-add c.d --dns-option-add timeout:3",
    "--dns-search-rm a.b --dns-option-rm ndots:1",
    "--dns-search-rm nope --dns-option-rm nope",
    "--group-add 30 --group-rm 10",
    "--group-rm 99",
    "--ulimit-add nproc=5:6 --ulimit-rm nofile",
    "--ulimit-rm nope",
    "--sysctl-add net.b=2 --sysctl-rm net.a",
    "--sysctl-rm nope",
    "--cap-add NET_ADMIN",
    "--cap-add CHOWN",
    "--cap-drop SYS_TIME",
    "--cap-drop NET_RAW",
    "--health-cmd 'curl -f x' --health-timeout 3s --health-retries 5",
    "--no-healthcheck",
    "--no-healthcheck --health-cmd x",
    "--log-driver syslog",
    "--log-driver syslog --log-opt a=b",
    "--image nginx:1.27",
    "--args 'a \"b c\" d' --entrypoint '/bin/x -y'",
    "--force",
    "--replicas 5",
    "--replicas-max-per-node 2",
    "--limit-cpu .5 --limit-memory 1g --limit-pids 9 --reserve-memory 64M",
    "--restart-condition on-failure --restart-max-attempts 3 --restart-window 1m",
    "--update-parallelism 0 --update-order start-first --update-failure-action rollback",
    "--update-max-failure-ratio .25 --update-monitor 10s --update-delay 1s",
    "--rollback-order start-first --rollback-parallelism 3",
    "--endpoint-mode dnsrr",
    "--stop-signal INT --stop-grace-period 3s --hostname h --user 3:4 --workdir /w",
    "--init --tty --read-only",
    "--isolation default",
    "--oom-score-adj 5",
)


OTHERWISE = {
    "--constraint-add node.role==worker": "Docker lists what is there already once more",
    "--log-opt max-file=3": "Docker does nothing without --log-driver, and does not say so",
}


@pytest.mark.parametrize("flags", OTHERWISE)
def test_differences_on_purpose_are_there(
    cli: Cli, ours: FakeCluster, docker_engine: tuple[str, _Server], flags: str
) -> None:
    assert _differences(of_us(flags, cli, ours), of_docker(flags, docker_engine))


@pytest.mark.parametrize("flags", SAME)
def test_the_same_flags_make_the_same(
    cli: Cli, ours: FakeCluster, docker_engine: tuple[str, _Server], flags: str
) -> None:
    theirs = of_docker(flags, docker_engine)
    mine = of_us(flags, cli, ours)
    if isinstance(theirs, str):
        assert isinstance(mine, str), f"docker refuses: {theirs}"
    else:
        assert isinstance(mine, dict), mine
        found = _differences(mine, theirs)
        assert not found, "\n".join(found)
