"""A host is drained, and a service rebalanced, behind a published port under a constant load: not
one request fails.
"""

import http.client
import itertools
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from deploy.testbed import Bed, Host
from tests.e2e.cluster import Cluster, wait_for

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]

PORT = 4002
CLIENTS = 4  # of each host
# Answers at /cgi-bin/slow after a while, and ends at once when told to: whoever is being answered
# then gets nothing.
SERVE = """
mkdir -p /tmp/www/cgi-bin && hostname >/tmp/www/index.html
printf '#!/bin/sh\\nsleep 0.2\\nprintf "Content-Type: text/plain\\\\r\\\\n\\\\r\\\\n"\\nhostname\\n' \
>/tmp/www/cgi-bin/slow
chmod +x /tmp/www/cgi-bin/slow
trap 'exit 0' TERM
httpd -f -p 80 -h /tmp/www &
wait
"""


class Load:
    """Clients that ask all hosts without a pause, each over a new connection; a context."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = hosts
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.answered = 0
        self.failed: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Load":
        for host, number in itertools.product(self._hosts, range(CLIENTS)):
            path = "/cgi-bin/slow" if number % 2 else "/"
            thread = threading.Thread(target=self._ask, args=(host, path))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self, host: Host, path: str) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            connection = http.client.HTTPConnection(host.address, PORT, timeout=10)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                said = answer.read().decode().strip()
                problem = "" if answer.status == 200 and said else f"{answer.status} {said!r}"
            except (OSError, http.client.HTTPException) as error:
                problem = repr(error)
            finally:
                connection.close()
            with self._lock:
                self.answered += not problem
                if problem:
                    took = time.monotonic() - began
                    self.failed.append(f"{host.name} {path} after {took:.3f} s: {problem}")

    def more(self, requests: int = 200) -> None:
        """Waits until so many more were answered."""
        until = self.answered + requests
        wait_for(f"{requests} more requests", lambda: self.answered >= until, timeout_s=60)


@pytest.fixture(scope="module")
def cluster(bed: Bed) -> Iterator[Cluster]:
    made = Cluster(bed.docker_hosts(3))
    made.up()
    yield made
    made.down()


@pytest.fixture(params=[1, 4], ids=["one-replica", "four-replicas"])
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
    with Load(web.hosts) as load:
        load.more()
        for host in web.hosts:
            drain(web, host)
            wait_for("all replicas run", lambda: len(web.running("web")) == wanted)
            load.more()
            web.ctl("node", "update", "--availability", "active", host.name)
    assert not load.failed, f"{len(load.failed)} of {load.answered}: {load.failed[:20]}"
    moved = [t for t in web.tasks("web") if t["DesiredState"] == "Shutdown"]
    assert moved
    print(f"{load.answered} requests, {len(moved)} tasks moved")


@pytest.mark.parametrize("web", [4], indirect=True)
def test_no_request_fails_while_the_service_is_rebalanced(web: Cluster) -> None:
    wanted = len(web.running("web"))
    with Load(web.hosts) as load:
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
    assert not load.failed, f"{len(load.failed)} of {load.answered}: {load.failed[:20]}"


def test_no_request_fails_while_the_service_is_updated_start_first(web: Cluster) -> None:
    with Load(web.hosts) as load:
        load.more()
        web.ctl("service", "update", "--force", "--update-order", "start-first", "web")
        load.more()
    assert not load.failed, f"{len(load.failed)} of {load.answered}: {load.failed[:20]}"
