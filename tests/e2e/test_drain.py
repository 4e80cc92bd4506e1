"""A host is drained, and a service rebalanced, behind a published port under a constant load: not
one request fails.
"""

from collections.abc import Iterator

import pytest

from deploy.testbed import Bed, Host
from tests.e2e.asking import PORT, SERVE, Asking
from tests.e2e.cluster import Cluster, wait_for

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(bed: Bed) -> Iterator[Cluster]:
    made = Cluster(bed.docker_hosts(3))
    made.up()
    yield made
    made.down()


@pytest.fixture(
    params=[pytest.param(1, marks=pytest.mark.long), 4], ids=["one-replica", "four-replicas"]
)
def web(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    cluster.ctl(
        *("service", "create", "--name", "web", "--replicas", str(request.param)),
        *("--publish", f"{PORT}:80", "busybox:latest", "sh", "-c", SERVE),
    )
    yield cluster
    for host in cluster.hosts:
        cluster.ctl("node", "update", "--availability", "active", host.name)
    cluster.ctl("service", "rm", "web")
    wait_for("no container is left", lambda: not any(cluster.containers(h) for h in cluster.hosts))


def drain(cluster: Cluster, host: Host) -> None:
    cluster.ctl("node", "update", "--availability", "drain", host.name)
    wait_for(
        f"{host.name} is empty",
        lambda: not cluster.containers(host, every=False),
        timeout_s=60,
    )


def test_no_request_fails_while_each_host_in_turn_is_drained(web: Cluster) -> None:
    wanted = len(web.running("web"))
    with Asking(web.hosts) as load:
        load.more()
        for host in web.hosts:
            drain(web, host)
            wait_for("all replicas run", lambda: len(web.running("web")) == wanted)
            load.more()
            web.ctl("node", "update", "--availability", "active", host.name)
    load.check()
    moved = [t for t in web.tasks("web") if t["DesiredState"] == "Shutdown"]
    assert moved
    print(f"{load.answered} requests, {len(moved)} tasks moved")


@pytest.mark.parametrize("web", [4], indirect=True)
def test_no_request_fails_while_the_service_is_rebalanced(web: Cluster) -> None:
    wanted = len(web.running("web"))
    with Asking(web.hosts) as load:
        for host in web.hosts[1:]:
            drain(web, host)
        assert {t["Node"] for t in web.running("web")} == {web.hosts[0].name}
        for host in web.hosts[1:]:
            web.ctl("node", "update", "--availability", "active", host.name)
        web.ctl("service", "rebalance", "web")
        wait_for(
            "replicas are on all hosts",
            lambda: {t["Node"] for t in web.running("web")} == {h.name for h in web.hosts},
        )
        wait_for("no old one is left", lambda: len(web.running("web")) == wanted)
        load.more()
    load.check()
