"""Updates of a service behind a published port on three Docker hosts, under a constant load: good
ones, broken ones and impossible ones. Not one request fails.
"""

from collections.abc import Iterator

import pytest

from deploy.testbed import Bed
from tests.e2e.asking import PORT, SERVE, Asking
from tests.e2e.cluster import Cluster, wait_for

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]

REPLICAS = 12
IMAGE = "busybox:latest"


@pytest.fixture(scope="module")
def cluster(bed: Bed) -> Iterator[Cluster]:
    made = Cluster(bed.docker_hosts(3))
    made.up()
    yield made
    made.down()


@pytest.fixture(scope="module")
def web(cluster: Cluster) -> Iterator[Cluster]:
    cluster.ctl(
        *("service", "create", "--name", "web", "--replicas", str(REPLICAS)),
        *("--update-order", "start-first", "--update-parallelism", "4"),
        *("--update-monitor", "1s", "--rollback-order", "start-first"),
        *("--rollback-parallelism", "0", "--rollback-monitor", "1s"),
        *("--restart-delay", "200ms", "--publish", f"{PORT}:80", IMAGE, "sh", "-c", SERVE),
    )
    yield cluster
    cluster.ctl("service", "rm", "web")
    wait_for("no container is left", lambda: not any(cluster.containers(h) for h in cluster.hosts))


def ids(cluster: Cluster) -> set[str]:
    return {t["ID"] for t in cluster.running("web")}


def test_twelve_replicas_are_updated_start_first(web: Cluster) -> None:
    before = ids(web)
    with Asking(web.hosts) as load:
        load.more()
        web.ctl("service", "update", "--env-add", "VERSION=2", "web")
        load.more()
    load.check()
    assert len(ids(web)) == REPLICAS
    assert not ids(web) & before


def test_a_host_is_drained(web: Cluster) -> None:
    host = web.hosts[1]
    with Asking(web.hosts) as load:
        load.more()
        web.ctl("node", "update", "--availability", "drain", host.name)
        wait_for("the host is empty", lambda: not web.containers(host, every=False), timeout_s=60)
        wait_for("all replicas run", lambda: len(web.running("web")) == REPLICAS)
        load.more()
    load.check()
    web.ctl("node", "update", "--availability", "active", host.name)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--image", "busybox:no-such-tag", "--no-resolve-image"), "no-such-tag"),
        (("--args", "sh -c 'exit 3'"), "exit"),
        (
            ("--health-cmd", "false", "--health-interval", "500ms", "--health-retries", "1"),
            "health",
        ),
    ],
    ids=["image-missing", "crashes", "unhealthy"],
)
def test_a_broken_update_is_rolled_back_by_itself(
    web: Cluster, words: tuple[str, ...], reason: str
) -> None:
    before = ids(web)
    with Asking(web.hosts) as load:
        load.more()
        code, said = web.fails(
            "service", "update", "--update-failure-action", "rollback", *words, "web"
        )
        load.more()
    load.check()
    assert code == 7, said
    assert reason in said.lower()
    assert ids(web) == before


def test_an_impossible_update_ends_with_its_reason(web: Cluster) -> None:
    before = ids(web)
    with Asking(web.hosts) as load:
        code, said = web.fails(
            *("service", "update", "--update-failure-action", "rollback"),
            *("--update-deadline", "3s", "--constraint-add", "node.labels.disk == ssd", "web"),
        )
        load.more()
    load.check()
    assert code == 7, said
    assert "node.labels.disk" in said
    assert ids(web) == before


def test_a_host_port_makes_start_first_stop_first_and_it_says_so(cluster: Cluster) -> None:
    cluster.ctl(
        *("service", "create", "--name", "edge", "--mode", "global"),
        *("--update-order", "start-first", "--update-monitor", "1s"),
        *("--publish", "mode=host,published=4100,target=80", IMAGE, "sh", "-c", SERVE),
    )
    said = cluster.ctl("service", "update", "--env-add", "VERSION=2", "edge")
    status = cluster.ctl("service", "inspect", "--pretty", "edge")
    cluster.ctl("service", "rm", "edge")
    assert "4100" in said + status
    assert "stop" in (said + status).lower()
    of_it = ("ps", "-aq", "--filter", "label=com.docker.swarm.service.name=edge")
    wait_for(
        "none of its containers is left", lambda: not any(h.docker(*of_it) for h in cluster.hosts)
    )
